"""The features of all recordings, computed once: everything that a candidate of the search reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from peft_elp import ELPConfig, FeatureCache, find_encoder, recipes
from peft_elp.backbones import has_fixed_window
from peft_elp.call.shared_pass import CACHED
from peft_elp.recipes.collator import window_s
from peft_elp.wording import first_line, shortened

from .look import Recordings, refuse

IN_MEMORY = 2e9  # bytes: frames beyond it are read from their files
FRAMES_PER_S = 50  # in every encoder of the table


@dataclass
class Features:
    """The hidden states of all layers for all recordings, each frame normalised without parameters."""

    pooled: Tensor  # means over a recording's own frames, (layers, recordings, hidden)
    frames: Any  # of each recording, by its number, (layers, frames, hidden), not normalised yet
    own: list[int]  # how many of these are its own; the rest is padding

    def of(self, recording: int) -> Tensor:
        """Return the normalised frames of a recording, `(layers, frames, hidden)`."""
        return _normalised(self._raw(recording)[:, : self.own[recording]])

    def some(self, recordings: Sequence[int], layers: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
        """Return `count` frames of each recording, drawn with replacement, `(layers, recordings, count, hidden)`."""
        drawn = []
        for recording in recordings:
            places = torch.randint(self.own[recording], (count,), generator=generator)
            drawn.append(self._raw(recording)[torch.tensor(layers)[:, None], places])
        return _normalised(torch.stack(drawn, dim=1))

    def _raw(self, recording: int) -> Tensor:
        x = self.frames[recording]
        return x[CACHED] if isinstance(x, Mapping) else x


def _normalised(x: Tensor) -> Tensor:
    return layer_norm(x.float(), x.shape[-1:])


class Base:
    """A pretrained encoder that gets a head for the classes.

    Args:
        name: A Hub id or folder.
        names: The names of the classes.
        longest_s: The duration of the longest recording. The window of an encoder such as Whisper's is cut to it.
        device: Where the encoder runs. None: a CUDA device if there is one, else the CPU.
        dtype: The dtype of the encoder.
        chunk_length: The window in whole seconds. None: that of `longest_s`.
        on_long_audio: "crop" reads the beginning of a recording that is longer than the window.

    Raises:
        ValueError: There is no such base, or its head does not average over frames.
    """

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        longest_s: float,
        device: str | None = None,
        dtype: str = "float32",
        chunk_length: int | None = None,
        on_long_audio: str = "error",
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.config, _ = check_base(
            name, id2label=dict(enumerate(names)), label2id={label: i for i, label in enumerate(names)}
        )
        self.config.apply_spec_augment = False
        self.arguments = recipes.ModelArguments(model_name_or_path=name, dtype=dtype)
        self.model = self._load()
        encoder = find_encoder(self.model)
        self.layers, self.hidden = len(encoder.layers), encoder.hidden_size
        self.width: int = self.config.classifier_proj_size
        self.has_window = has_fixed_window(self.model)
        if self.has_window:
            shortest = max(1, math.ceil(longest_s - 1e-3))
            whole = recipes.load_feature_extractor(self.arguments).chunk_length
            self.arguments.chunk_length = chunk_length or (shortest if shortest < whole else None)
        elif chunk_length:
            raise ValueError(f"chunk_length shortens a fixed window, such as Whisper's, which {name} does not have.")
        self.extractor = recipes.load_feature_extractor(self.arguments)
        self.collate = recipes.Collator(self.extractor, self.model, on_long_audio=on_long_audio)

    def _load(self) -> Any:
        name = self.arguments.model_name_or_path
        try:
            with redirect_stdout(StringIO()):  # It names the new head.
                model: Any = recipes.load_model(AutoModelForAudioClassification, self.arguments, self.config)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"The base {name!r} cannot be used: {first_line(error)}") from error
        for layer in ("projector", "classifier"):
            if not isinstance(getattr(model, layer, None), nn.Linear):
                raise ValueError(
                    f"The head of {type(model).__name__} does not average over frames between two linear layers, "
                    "which the search needs. Choose another base, such as wav2vec 2.0, HuBERT, WavLM or Whisper."
                )
        return model.to(self.device)

    def adapted(self, **settings: Any) -> PeftModel:
        """Return the encoder with a new L-adapter; the base can be used for one adapted model at a time."""
        model, self.model = self.model or self._load(), None
        own = {"adapters": "L", "l_output": "head", "train_layer_norms": False}
        settings = own | {"chunk_length": self.arguments.chunk_length} | settings
        adapted: Any = get_peft_model(model, ELPConfig(**settings))
        return adapted.eval()

    def read(self, rows: Dataset, folder: Path, progress: bool) -> Features:
        """Return the features of recordings; those of an earlier run are taken from the folder.

        Raises:
            ValueError: The head of the model does not take the mean over a recording's own frames.
        """
        model, fits = self.adapted(l_dim=0), self.size(rows) < IN_MEMORY
        cache = FeatureCache(model, folder, dtype=torch.float32 if fits else torch.float16)
        recordings: Any = rows.select_columns("audio")
        cached = cache.read(recordings, self.collate, progress=progress)
        pooled, frames, own = [], [], []
        for number in range(len(cached)):
            row = cached[number]
            x = row[CACHED]
            count = x.shape[1]
            if self.has_window:
                mask = row["attention_mask"]
                count = max(1, int(mask[:: len(mask) // count].ne(0).sum()))
            own.append(count)
            frames.append(x[:, :count].clone() if fits else None)
            pooled.append(_normalised(x[:, :count]).mean(1))
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
            means = features.pooled[:, 0].mean(0).to(self.device, base.dtype)  # Fresh layer weights are uniform.
            own = base.classifier(base.projector(means)).float().cpu()
        if not torch.allclose(live, own, rtol=0.05, atol=0.05 * float(live.abs().max())):
            raise ValueError(
                f"{type(base).__name__} does not answer from the mean over a recording's own frames, which the search "
                "needs. Choose another base, such as wav2vec 2.0, HuBERT, WavLM or Whisper."
            )


def check_base(name: str, **settings: Any) -> tuple[Any, float]:
    """Return the configuration of a base, and the seconds that its feature extractor keeps of a recording.

    Raises:
        ValueError: There is no such base.
    """
    try:
        config, extractor = recipes.load_config(name, **settings), AutoFeatureExtractor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"The base {name!r} cannot be used: {first_line(error)} Pass the folder or the Hub name of a speech "
            "encoder, such as microsoft/wavlm-base-plus."
        ) from error
    return config, window_s(extractor)


def fit_window(found: Recordings, seconds: float, on_long_audio: str) -> Recordings:
    """Crop recordings that are longer than the window of an encoder, leave them out, refuse them, or only warn.

    Raises:
        ValueError: There are some, and `on_long_audio` is "error"; or they have texts and it is "crop".
    """
    longer = found.table["duration_s"] > seconds
    if not longer.any():
        return found
    said = (
        f"{longer.sum()} of {len(longer)} recordings are longer than the {seconds:g} s that the encoder reads: "
        f"{shortened(found.table['file'][longer], 3)}."
    )
    if on_long_audio == "error":
        raise ValueError(
            f"{said} Cut them into pieces that hold what their label says, or choose on_long_audio "
            "(--on-long-audio): 'skip' leaves them out, 'crop' reads their beginning."
        )
    if on_long_audio == "crop":
        if found.task == "transcribe":
            raise ValueError(f"{said} on_long_audio='crop' would cut speech but not its text. Choose 'skip'.")
        found = replace(found, table=found.table.assign(duration_s=found.table["duration_s"].clip(upper=seconds)))
    if on_long_audio == "skip":
        kept = np.flatnonzero(~longer)
        found = replace(found, rows=found.rows.select(kept), table=found.table.iloc[kept].reset_index(drop=True))
        refuse(found)
    done = {"skip": " They are left out.", "crop": " Only their beginning is read."}
    found.warnings.append(said + done.get(on_long_audio, ""))
    return found
