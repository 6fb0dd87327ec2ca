"""The methods and the models of the conformance tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from backbones import ELP, build, waveforms
from families import FAMILIES
from peft import LNTuningConfig, LoraConfig, PeftConfig
from torch import Tensor

from peft_elp import ELPConfig


@dataclass(frozen=True)
class Model:
    """A tiny speech model with what the methods need to know of it.

    Args:
        make: Builds it, always with the same weights.
        inputs: A batch of three utterances.
        head: The modules of its head.
        linears: Pattern of the linear layers that LoRA adapts.
        norms: Pattern of the layer norms that LN-Tuning trains.
    """

    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]]
    head: tuple[str, ...]
    linears: str
    norms: str


@dataclass(frozen=True)
class Method:
    """A method of PEFT.

    Args:
        name: Its name in the ids of the tests.
        config: Builds a configuration from the model and options.
        prefix: How the names of its parameters start.
        without_head: Options that leave the head frozen.
        joint: Options with which several adapters can be active together.
        one_layer: Options that adapt layer 1 alone.
        impossible: Options that no model can fulfil.
    """

    name: str
    config: Callable[..., PeftConfig]
    prefix: str
    one_layer: Callable[[Model], dict[str, Any]]
    without_head: dict[str, Any] = field(default_factory=lambda: {"modules_to_save": None})
    joint: dict[str, Any] = field(default_factory=lambda: {"modules_to_save": None})
    impossible: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["nowhere"]})


def _speech() -> dict[str, Tensor]:
    return dict(zip(("input_values", "attention_mask"), waveforms(), strict=True))


def _spectrogram() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"input_features": torch.randn(3, 8, 40), "decoder_input_ids": torch.tensor([[3, 5, 7]] * 3)}


_WAVE = {
    "linears": r".*encoder\.layers\.\d+\.feed_forward\.(intermediate_dense|output_dense)",
    "norms": r".*encoder\.layers\.\d+\.(layer_norm|final_layer_norm)",
}
_WHISPER = {
    "linears": r".*encoder\.layers\.\d+\.(fc1|fc2)",
    "norms": r".*encoder\.layers\.\d+\.(self_attn_layer_norm|final_layer_norm)",
}
MODELS = {
    "wav2vec2-ctc": Model(partial(build, "wav2vec2"), _speech, ("lm_head",), **_WAVE),
    "wavlm-classification": Model(
        partial(build, "wavlm", "ForSequenceClassification"), _speech, ("projector", "classifier"), **_WAVE
    ),
    "hubert-bare": Model(partial(build, "hubert", "Model"), _speech, (), **_WAVE),
    "whisper-generation": Model(lambda: FAMILIES["whisper"].plain().eval(), _spectrogram, (), **_WHISPER),
}


def _elp(model: Model, **options: Any) -> PeftConfig:
    return ELPConfig(**ELP | options)


def _ln_tuning(model: Model, **options: Any) -> PeftConfig:
    return LNTuningConfig(**{"target_modules": model.norms, "modules_to_save": list(model.head) or None} | options)


def _lora(model: Model, **options: Any) -> PeftConfig:
    return LoraConfig(**{"target_modules": model.linears, "modules_to_save": list(model.head) or None} | options)


METHODS = {
    method.name: method
    for method in (
        Method(
            "ELP",
            _elp,
            "elp_",
            one_layer=lambda model: {"adapters": "E", "e_layers": [1], "train_layer_norms": False},
            without_head={"modules_to_save": []},
            joint={"adapters": "EP", "train_layer_norms": False, "modules_to_save": []},
            impossible={"e_layers": [99]},
        ),
        Method(
            "LN-Tuning",
            _ln_tuning,
            "ln_tuning_",
            one_layer=lambda model: {"target_modules": model.norms.replace(r"\d+", "1")},
        ),
        Method("LoRA", _lora, "lora_", one_layer=lambda model: {"target_modules": model.linears.replace(r"\d+", "1")}),
    )
}
