"""Batches of recordings, decoded when they are needed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from peft_elp.backbones import has_fixed_window
from peft_elp.speech.audio import decode


class Collator:
    """Decode the recordings of a batch, extract their features and pad them together.

    Args:
        feature_extractor: The feature extractor of the encoder.
        model: The model, whose encoder may need all recordings padded to one fixed length, and whose data type is
            used. None: recordings are padded to the longest of the batch, as float32.
        crop_s: Length in seconds. A random piece of this length is taken from each longer recording. None: the whole
            recording.

    Shape:
        Rows with `audio` (a path, an entry of a `datasets.Audio(decode=False)` column, or a waveform `(samples,)` at
        the rate of the feature extractor) and optional `labels` become a dictionary of tensors with `batch` as the
        first axis. Labels of different lengths are padded with -100.

    Raises:
        AudioError: A recording cannot be read.
        ValueError: A recording is longer than the fixed length.

    Examples:
        >>> from transformers import Wav2Vec2FeatureExtractor
        >>> collate = Collator(Wav2Vec2FeatureExtractor(return_attention_mask=True), crop_s=0.5)
        >>> rows = [{"audio": np.zeros(length, np.float32), "labels": 1} for length in (16_000, 4_000)]
        >>> batch = collate(rows)
        >>> batch["input_values"].shape, batch["labels"]
        (torch.Size([2, 8000]), tensor([1, 1]))
    """

    def __init__(self, feature_extractor: Any, model: Any = None, crop_s: float | None = None) -> None:
        self.feature_extractor = feature_extractor
        self.crop_s = crop_s
        self.fixed_window = model is not None and has_fixed_window(model)
        self.dtype = torch.float32 if model is None else model.dtype

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        waveforms = [self._read(row["audio"]) for row in rows]
        rate_hz = self.feature_extractor.sampling_rate
        padding = {} if self.fixed_window else {"padding": True}
        batch = self.feature_extractor(waveforms, sampling_rate=rate_hz, return_tensors="pt", **padding)
        batch = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in batch.items()}
        if "labels" in rows[0]:
            labels = [torch.as_tensor(row["labels"]) for row in rows]
            batch["labels"] = (
                pad_sequence(labels, batch_first=True, padding_value=-100) if labels[0].dim() else torch.stack(labels)
            )
        return batch

    def _read(self, audio: Any) -> np.ndarray:
        rate_hz = self.feature_extractor.sampling_rate
        waveform = audio if isinstance(audio, np.ndarray) else decode(audio, rate_hz)
        longest = self.feature_extractor.n_samples if self.fixed_window else len(waveform)
        if self.crop_s is None and len(waveform) > longest:
            raise ValueError(
                f"A recording of {len(waveform) / rate_hz:.1f} s is longer than the {longest / rate_hz:g} s that the "
                "encoder takes: the rest would be cut off. Lower --max_duration_in_seconds."
            )
        if self.crop_s is None or len(waveform) <= (length := int(self.crop_s * rate_hz)):
            return waveform
        start = int(torch.randint(len(waveform) - length + 1, ()))
        return waveform[start : start + length]
