"""The features of all recordings, computed once: everything that a candidate of the search reads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForAudioClassification
from transformers.utils import logging

from peft_elp import ELPConfig, FeatureCache, find_encoder, speed_up_frozen
from peft_elp.backbones import has_fixed_window
from peft_elp.call.shared_pass import CACHED
from peft_elp.speech.audio import decode
from peft_elp.wording import first_line

IN_MEMORY = 2e9  # bytes: frames beyond it are read from their files
FRAMES_PER_S = 50  # in every encoder of the table


@dataclass
class Features:
    """The hidden states of all layers for all recordings, each frame normalised without parameters.

    Args:
        pooled: Their means over a recording's own frames, `(layers, recordings, hidden)`.
        frames: For each recording, by its number, the frames that the means are of,
            `(layers, frames, hidden)`, not normalised yet.
        own: How many of its frames are its own; the rest is padding.
    """

    pooled: Tensor
    frames: Any
    own: list[int]

    def of(self, recording: int) -> Tensor:
        """Return the normalised frames of a recording, `(layers, frames, hidden)`."""
        x = self.frames[recording]
        x = (x[CACHED] if isinstance(x, Mapping) else x)[:, : self.own[recording]].float()
        return layer_norm(x, x.shape[-1:])

    def some(self, recordings: Sequence[int], layers: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
        """Return `count` frames of each recording, drawn with replacement, `(layers, recordings, count, hidden)`."""
        drawn = []
        for recording in recordings:
            x = self.frames[recording]
            x = x[CACHED] if isinstance(x, Mapping) else x
            places = torch.randint(self.own[recording], (count,), generator=generator)
            drawn.append(x[torch.tensor(layers)[:, None], places].float())
        x = torch.stack(drawn, dim=1)
        return layer_norm(x, x.shape[-1:])


class Base:
    """A pretrained encoder that gets a head for the classes.

    Args:
        name: A Hub id or folder.
        names: The names of the classes.
        longest_s: The duration of the longest recording. The window of an encoder such as Whisper's is cut to it.
        device: Where the encoder runs, in float32. None: a CUDA device if there is one, else the CPU.

    Raises:
        ValueError: There is no such base, or its head does not average over frames.
    """

    def __init__(self, name: str, names: Sequence[str], longest_s: float, device: str | None = None) -> None:
        self.name = name
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        labels = {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
        self.config = self.check(name, **labels)
        extractor: Any = AutoFeatureExtractor.from_pretrained(name)
        for key, value in {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "apply_spec_augment": False}.items():
            if hasattr(self.config, key):
                setattr(self.config, key, value)
        self.model = self._load()
        encoder = find_encoder(self.model)
        self.layers, self.hidden = len(encoder.layers), encoder.hidden_size
        self.width: int = self.config.classifier_proj_size
        self.has_window = has_fixed_window(self.model)
        self.window_s: float = math.inf
        self.chunk_length: int | None = None
        if self.has_window and hasattr(extractor, "chunk_length"):
            self.window_s = extractor.chunk_length
            if (whole := max(1, math.ceil(longest_s - 1e-3))) < self.window_s:
                self.chunk_length = whole
                extractor = AutoFeatureExtractor.from_pretrained(name, chunk_length=whole)
        if self.has_window:
            extractor.return_attention_mask = True  # The mean over own frames needs it; saved with the adapter.
        self.extractor = extractor

    @staticmethod
    def check(name: str, **settings: Any) -> Any:
        """Return the configuration of a base.

        Raises:
            ValueError: There is no such base.
        """
        try:
            AutoFeatureExtractor.from_pretrained(name)
            return AutoConfig.from_pretrained(name, **settings)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"The base {name!r} cannot be used: {first_line(error)} Pass the folder or the Hub name of a speech "
                "encoder, such as microsoft/wavlm-base-plus."
            ) from error

    def cut(self, durations_s: Sequence[float]) -> list[str]:
        """Return a warning if recordings are longer than the window of the encoder."""
        cut = sum(duration > self.window_s + 1e-3 for duration in durations_s)
        if not cut:
            return []
        return [
            f"{cut} recordings are longer than {self.window_s:g} s, the window of the encoder, and are cut there. Cut "
            "them into pieces that hold what their label says."
        ]

    def _load(self) -> Any:
        verbosity, shows = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()  # Transformers reports each tensor of a new head.
        logging.disable_progress_bar()
        try:
            model = AutoModelForAudioClassification.from_pretrained(
                self.name, config=self.config, dtype=torch.float32, ignore_mismatched_sizes=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"The base {self.name!r} cannot be used: {first_line(error)}") from error
        finally:
            logging.set_verbosity(verbosity)
            if shows:
                logging.enable_progress_bar()
        for layer in ("projector", "classifier"):
            if not isinstance(getattr(model, layer, None), nn.Linear):
                raise ValueError(
                    f"The head of {type(model).__name__} does not average over frames between two linear layers, "
                    "which the search needs. Choose another base, such as wav2vec 2.0, HuBERT, WavLM or Whisper."
                )
        return speed_up_frozen(model).to(self.device)

    def adapted(self, **settings: Any) -> PeftModel:
        """Return the encoder with a new L-adapter; the base can be used for one adapted model at a time."""
        model, self.model = self.model or self._load(), None
        settings = {"l_output": "head", "train_layer_norms": False, "chunk_length": self.chunk_length} | settings
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "modules_to_save=.* trains and saves", UserWarning)
            adapted: Any = get_peft_model(model, ELPConfig(adapters="L", **settings))
        return adapted.eval()

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch for the model from rows with a column `audio`."""
        waveforms: list[np.ndarray] = [decode(row["audio"], self.extractor.sampling_rate) for row in rows]
        padding = {"return_attention_mask": True} if self.has_window else {"padding": True}
        batch = self.extractor(waveforms, sampling_rate=self.extractor.sampling_rate, return_tensors="pt", **padding)
        return dict(batch)

    def read(self, rows: Dataset, folder: Path, progress: bool) -> Features:
        """Return the features of recordings; those of an earlier run are taken from the folder.

        Raises:
            ValueError: The head of the model does not take the mean over a recording's own frames.
        """
        model = self.adapted(l_dim=0)
        cache = FeatureCache(model, folder, dtype=torch.float32 if self.size(rows) < IN_MEMORY else torch.float16)
        recordings: Any = rows.select_columns("audio")
        cached = cache.read(recordings, self.collate, progress=progress)
        pooled, frames, own = [], [], []
        fits = self.size(rows) < IN_MEMORY
        for number in range(len(cached)):
            row = cached[number]
            x = row[CACHED]
            count = x.shape[1]
            if self.has_window:
                mask = row["attention_mask"]
                count = max(1, int(mask[:: len(mask) // count].ne(0).sum()))
            own.append(count)
            frames.append(x[:, :count].clone() if fits else None)
            normalised = layer_norm(x[:, :count].float(), x.shape[-1:])
            pooled.append(normalised.mean(1))
        features = Features(torch.stack(pooled, dim=1), frames if fits else cached, own)
        self._compare(model, rows[0], features)
        self.model = model.unload()
        return features

    def size(self, rows: Dataset) -> float:
        """Return the size of all frames in float32."""
        return 4 * self.layers * self.hidden * FRAMES_PER_S * sum(rows["duration_s"])

    def _compare(self, model: PeftModel, row: Mapping[str, Any], features: Features) -> None:
        """Check that the model answers from the mean over own frames."""
        base: Any = model.get_base_model()
        with torch.inference_mode():
            live = model(**{key: x.to(self.device) for key, x in self.collate([row]).items()}).logits[0].float().cpu()
            means = features.pooled[:, 0].mean(0).to(self.device)  # Fresh layer weights are uniform.
            own = base.classifier(base.projector(means)).float().cpu()
        if not torch.allclose(live, own, rtol=0.05, atol=0.05 * float(live.abs().max())):
            raise ValueError(
                f"{type(base).__name__} does not answer from the mean over a recording's own frames, which the search "
                "needs. Choose another base, such as wav2vec 2.0, HuBERT, WavLM or Whisper."
            )
