"""What the folder of a saved adapter says without its base: settings, numbers of parameters, layer weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .parts import CONTAINERS, PARTS

# By the end of a model's class name: what the Hub calls its task.
TASKS = {
    "ForCTC": "automatic-speech-recognition",
    "ForConditionalGeneration": "automatic-speech-recognition",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForSequenceClassification": "audio-classification",
    "ForAudioClassification": "audio-classification",
    "ForAudioFrameClassification": "audio-classification",
    "ForXVector": "audio-classification",
    "Model": "feature-extraction",
}


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
        ending = next((ending for ending in TASKS if (self.model_class or "").endswith(ending)), None)
        return TASKS.get(ending or "")

    def holds(self, *names: str) -> bool:
        """Whether one of these files is beside the adapter."""
        return any((self.folder / name).is_file() for name in names)


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
