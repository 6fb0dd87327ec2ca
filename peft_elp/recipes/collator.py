"""Batches of recordings, decoded when they are needed."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
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
        ValueError: A recording is longer than what the feature extractor keeps.

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
        self.crop_s, self.window_s = crop_s, window_s(feature_extractor)
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
            pad = partial(pad_sequence, batch_first=True, padding_value=-100)
            batch["labels"] = pad(labels) if labels[0].dim() else torch.stack(labels)
        return batch

    def _read(self, audio: Any) -> np.ndarray:
        rate_hz = self.feature_extractor.sampling_rate
        waveform = audio if isinstance(audio, np.ndarray) else decode(audio, rate_hz)
        if self.crop_s is not None and len(waveform) > (length := int(self.crop_s * rate_hz)):
            start = int(torch.randint(len(waveform) - length + 1, ()))
            waveform = waveform[start : start + length]
        if len(waveform) > self.window_s * rate_hz:
            raise ValueError(
                f"A recording of {len(waveform) / rate_hz:.1f} s is longer than the {self.window_s:g} s that the "
                "encoder reads, and would be cut. Lower --max_duration_in_seconds or --crop_length_in_seconds."
            )
        return waveform


def window_s(feature_extractor: Any) -> float:
    """Return the seconds to which a feature extractor cuts every recording; infinity where it cuts none."""
    if hasattr(feature_extractor, "n_samples"):
        return feature_extractor.n_samples / feature_extractor.sampling_rate
    frames = getattr(feature_extractor, "max_length", None)
    return frames / 100 if isinstance(frames, int) else math.inf  # AST counts frames of 10 ms.
