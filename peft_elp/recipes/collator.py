"""Batches of recordings, decoded when they are needed."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from peft_elp.backbones import has_fixed_window, window_s
from peft_elp.speech.audio import AudioError, cut_long, decode, name_of


class Collator:
    """Decode the recordings of a batch, extract their features and pad them together, for any supported encoder.

    Args:
        feature_extractor: The feature extractor of the encoder.
        model: The model, whose encoder may need all recordings padded to one fixed length, and whose data type is
            used. None: recordings are padded to the longest of the batch, as float32.
        names: The names of the classes. The label of an example is then read from its column `label`.
        crop_s: Length in seconds. A random piece of this length is taken from each longer recording. None: the whole
            recording.
        on_long_audio: What to do with a recording over `longest_s`: "error", "crop" to its beginning, or "split" into
            pieces. The pieces of a recording follow each other in the batch, and `pieces` counts them.
        longest_s: Seconds that the encoder is to read at most. None: the window of the feature extractor, if it has
            one.

    Shape:
        Examples with `audio` (a path, an entry of a `datasets.Audio(decode=False)` column, or a waveform `(samples,)`
        at the rate of the feature extractor) and optional `labels` become a dictionary of tensors with `batch` as the
        first axis. Labels of different lengths are padded with -100. Encoders with a window, such as Whisper's, get
        the mask of each recording's own frames.

    Raises:
        AudioError: A recording cannot be read, or is too long.

    Examples:
        >>> from transformers import Wav2Vec2FeatureExtractor
        >>> collate = Collator(Wav2Vec2FeatureExtractor(return_attention_mask=True), names=["no", "yes"])
        >>> batch = collate([{"audio": np.zeros(length, np.float32), "label": "yes"} for length in (8_000, 4_000)])
        >>> {name: tuple(tensor.shape) for name, tensor in batch.items()}
        {'input_values': (2, 8000), 'attention_mask': (2, 8000), 'labels': (2,)}
    """

    def __init__(
        self,
        feature_extractor: Any,
        model: Any = None,
        names: Sequence[str] | None = None,
        *,
        crop_s: float | None = None,
        on_long_audio: str = "error",
        longest_s: float | None = None,
    ) -> None:
        self.feature_extractor, self.names, self.crop_s = feature_extractor, names, crop_s
        self.on_long_audio = on_long_audio
        self.longest_s = min(window_s(feature_extractor), float("inf") if longest_s is None else longest_s)
        self.options: dict[str, Any] = {"return_tensors": "pt", "sampling_rate": feature_extractor.sampling_rate}
        if model is None or not has_fixed_window(model):
            self.options["padding"] = True
        if hasattr(feature_extractor, "n_samples"):
            self.options["return_attention_mask"] = True  # A head averages over a recording's own frames.
        self.dtype = torch.float32 if model is None else model.dtype

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pieces = [self._read(example["audio"]) for example in examples]
        batch = self.feature_extractor([piece for cut in pieces for piece in cut], **self.options)
        batch = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in batch.items()}
        if self.names is not None:
            batch["labels"] = torch.tensor([self.names.index(example["label"]) for example in examples])
        elif "labels" in examples[0]:
            labels = [torch.as_tensor(example["labels"]) for example in examples]
            pad = partial(pad_sequence, batch_first=True, padding_value=-100)
            batch["labels"] = pad(labels) if labels[0].dim() else torch.stack(labels)
        if self.on_long_audio == "split":
            batch["pieces"] = torch.tensor([len(cut) for cut in pieces])
            if "labels" in batch:
                batch["labels"] = batch["labels"].repeat_interleave(batch["pieces"], dim=0)
        return batch

    def _read(self, audio: Any) -> list[np.ndarray]:
        rate_hz = self.feature_extractor.sampling_rate
        waveform = audio if isinstance(audio, np.ndarray) else decode(audio, rate_hz)
        if self.crop_s is not None and len(waveform) > (length := int(self.crop_s * rate_hz)):
            start = int(torch.randint(len(waveform) - length + 1, ()))
            waveform = waveform[start : start + length]
        if len(waveform) > self.longest_s * rate_hz and self.on_long_audio not in ("crop", "split"):
            raise AudioError(
                f"{name_of(audio)} has {len(waveform) / rate_hz:.1f} s, and the encoder reads at most "
                f"{self.longest_s:g} s. Choose what to do with --on_long_audio: crop, split or skip.",
                "too long",
            )
        return cut_long(waveform, self.longest_s * rate_hz, self.on_long_audio)
