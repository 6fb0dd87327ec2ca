"""What the folder of a saved adapter says without its base: settings, numbers of parameters, layer weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from peft_elp.heads import head_row
from peft_elp.parameters import CONTAINERS, PARTS


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk.

    Args:
        folder: Where it is.
        config: What is in its `adapter_config.json`.
        counts: Numbers of parameters under "E", "L" (with its layer weights), "P", "layer norms" and "head".
        layer_weights: For each layer that an L-adapter taps its number, from 0, and its share.
    """

    folder: Path
    config: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)
    layer_weights: list[tuple[int, float]] = field(default_factory=list)

    @property
    def base(self) -> str | None:
        """The name of the base model: a Hub id or a path."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def model_class(self) -> str | None:
        """The name of the class of Transformers that the adapter was trained with, head included."""
        return (self.config.get("auto_mapping") or {}).get("base_model_class")

    @property
    def task(self) -> str | None:
        """What the Hub calls the adapter's task."""
        row = head_row(self.model_class)
        return row.task if row else None

    @property
    def labels(self) -> list[str]:
        """The names of the labels, or as many numbers where nobody has named them; none without a head for labels."""
        head = self.config.get("head_config") or {}
        names = {int(number): name for number, name in (head.get("id2label") or {}).items()}
        count = head.get("num_labels", 0) if self.task == "audio-classification" else 0
        return [names.get(number, f"LABEL_{number}") for number in range(count)]

    def sizes(self) -> dict[str, str]:
        """What each part that the adapter has consists of, in words."""
        get = self.config.get
        places = " and ".join(place.replace("_", "-") for place in get("e_after") or ())
        words = {
            "E": f"bottleneck of {get('e_dim')} after {places}, layers {_ranges(get('e_layers'))}",
            "L": f"taps of {get('l_dim')}, layers {_ranges(get('l_layers'))}, to: {get('l_output')}",
            "P": f"{get('p_length')} pseudo features, {get('p_position')}ed",
            "layer norms": "in the place of the base's",
            "head": ", ".join(get("modules_to_save") or ()),
        }
        return {part: words[part] for part, count in self.counts.items() if count}

    def holds(self, *names: str) -> bool:
        """Whether one of these files is beside the adapter."""
        return any((self.folder / name).is_file() for name in names)


def find_adapter(
    adapter: str | Path, subfolder: str | None = None, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder of an adapter: the one named, or a copy of what has that name on the Hub.

    Raises:
        ValueError: There is no such folder, and nothing of that name could be fetched.
    """
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        name = str(adapter)
        if folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or len(folder.parts) > 2:
            raise ValueError(f"There is no folder {name!r}. Give the folder of an adapter, or its name on the Hub.")
        wanted = [f"{subfolder}/*" if subfolder else "*"]
        try:
            folder = Path(
                snapshot_download(
                    name, revision=revision, token=token, allow_patterns=wanted, ignore_patterns=["checkpoint-*"]
                )
            )
        except (OSError, ValueError) as error:  # the Hub's own errors are of these kinds
            raise ValueError(
                f"There is no folder {name!r}, and no adapter of that name could be fetched from the Hub: "
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            ) from error
    return folder / (subfolder or "")


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read a folder in which an ELP-adapter was saved.

    Raises:
        ValueError: There is none, or it is of another method, or its weights are broken.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        raise ValueError(
            f"{str(folder)!r} holds no adapter: there is no {CONFIG_NAME} in it. "
            + (f"The folders {', '.join(inside)} inside of it do." if inside else "model.save_pretrained writes one.")
        )
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{CONFIG_NAME} in {str(folder)!r} is broken: {error}.") from error
    if config.get("peft_type") != "ELP":
        raise ValueError(
            f"{str(folder)!r} holds an adapter of the method {config.get('peft_type')!r}, not of ELP. PEFT loads it "
            "without this package."
        )
    shapes, weights = _read_weights(folder)
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in shapes.items():
        counts[_part(name)] += prod(shape)
    shares = np.exp(weights - weights.max(initial=0.0))
    layers = config.get("l_layers") or range(len(shares))
    layer_weights = list(zip(layers, (shares / shares.sum()).tolist(), strict=True)) if len(shares) else []
    return SavedAdapter(folder, config, counts, layer_weights)


def _ranges(numbers: Sequence[int] | None) -> str:
    """`[0, 1, 2, 5]` as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers or ():
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _part(name: str) -> str:
    return next((part for container, part in CONTAINERS.items() if f".{container}." in name), "head")


def _read_weights(folder: Path) -> tuple[dict[str, tuple[int, ...]], np.ndarray]:
    """The shape of each tensor, and the layer weights before their softmax."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:  # of NumPy there is no bfloat16
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                weights = [file.get_tensor(name) for name in shapes if name.endswith(".elp_l.layer_weights")]
        except SafetensorError as error:
            raise ValueError(f"The weights in {str(folder)!r} are broken or cut short ({error}).") from error
    elif (folder / WEIGHTS_NAME).is_file():
        import torch

        tensors = torch.load(folder / WEIGHTS_NAME, map_location="cpu", weights_only=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        weights = [tensor for name, tensor in tensors.items() if name.endswith(".elp_l.layer_weights")]
    else:
        raise ValueError(f"{str(folder)!r} holds {CONFIG_NAME} but no weights: {SAFETENSORS_WEIGHTS_NAME} is missing.")
    return shapes, weights[0].double().numpy() if weights else np.zeros(0)
