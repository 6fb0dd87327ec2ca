"""The parameters of one adapter, by its parts: E, L, P, layer norms and head."""

from __future__ import annotations

import re

from torch import nn

from .wording import unknown_adapter

CONTAINERS = {"elp_e": "E", "elp_l": "L", "elp_p": "P", "elp_norm": "layer norms", "modules_to_save": "head"}
PARTS = tuple(CONTAINERS.values())
SETTINGS = "elp_settings"  # where the settings of adapters are, which are saved with the tensors


def belongs_to(adapter_name: str, name: str) -> bool:
    """Tell by its name in the model whether a tensor belongs to an adapter.

    Examples:
        >>> belongs_to("asr", "encoder.elp_p.asr.rows"), belongs_to("asr", "encoder.elp_p.emotion.rows")
        (True, False)
    """
    return re.search(rf"\.(elp_[a-z]+|modules_to_save)\.{re.escape(adapter_name)}\.", f".{name}") is not None


def parameters_by_part(model: nn.Module, adapter_name: str = "default") -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters of an adapter by part, one of `PARTS`, and by name; "L" includes the layer weights.

    Raises:
        ValueError: The model has no adapter of that name.
    """
    peft_config = getattr(model, "peft_config", {})
    if adapter_name not in peft_config:
        raise ValueError(unknown_adapter(adapter_name, peft_config))
    parameters: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        for container, part in CONTAINERS.items():
            if f".{container}.{adapter_name}." in f".{name}":  # A model that is the stack itself holds them directly.
                parameters[part][name] = parameter
    return parameters


def count_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """Return the number of parameters of an adapter, by part.

    Args:
        model: A model with ELP-adapters, as `get_peft_model` returns it.
        adapter_name: The adapter's name.

    Returns:
        The numbers under "E", "L" (with its layer weights), "P", "layer norms" and "head".

    Raises:
        ValueError: The model has no adapter of that name.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import WavLMConfig, WavLMModel
        >>> from peft_elp import ELPConfig
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, layerdrop=0.0)
        >>> count_parameters(get_peft_model(WavLMModel(WavLMConfig(**size)), ELPConfig(adapters="P", p_length=4)))
        {'E': 0, 'L': 0, 'P': 128, 'layer norms': 0, 'head': 0}
    """
    parts = parameters_by_part(model, adapter_name)
    return {part: sum(parameter.numel() for parameter in held.values()) for part, held in parts.items()}
