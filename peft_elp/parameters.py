"""The parameters of one adapter by part: E, L, P, layer norms and head."""

from __future__ import annotations

from torch import nn

CONTAINERS = {"elp_e": "E", "elp_l": "L", "elp_p": "P", "elp_norm": "layer norms", "modules_to_save": "head"}
PARTS = tuple(CONTAINERS.values())


def belongs_to(adapter_name: str, name: str) -> bool:
    """Whether a parameter or tensor of that name is a part of the adapter."""
    return any(f"{container}.{adapter_name}." in f".{name}" for container in CONTAINERS)


def parameters_by_part(model: nn.Module, adapter_name: str = "default") -> dict[str, dict[str, nn.Parameter]]:
    """The parameters that an adapter holds: for each part, parameters by name.

    Args:
        model: A model with ELP-adapters, as `get_peft_model` returns it.
        adapter_name: The adapter.

    Returns:
        Under each of `PARTS`, what `model.named_parameters()` has of it; nothing where the adapter lacks the part. "L"
        includes the layer weights.

    Raises:
        ValueError: The model has no adapter of that name.
    """
    peft_config = getattr(model, "peft_config", {})
    if adapter_name not in peft_config:
        raise ValueError(f"No adapter named {adapter_name!r}; the model has {sorted(peft_config) or 'none'}.")
    parameters: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        for container, part in CONTAINERS.items():
            if f".{container}.{adapter_name}." in name:
                parameters[part][name] = parameter
    return parameters


def count_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """How many parameters an adapter holds, by part.

    Args:
        model: A model with ELP-adapters, as `get_peft_model` returns it.
        adapter_name: The adapter to count.

    Returns:
        Numbers under "E", "L" (with its layer weights), "P", "layer norms" and "head".

    Raises:
        ValueError: The model has no adapter of that name.
    """
    parts = parameters_by_part(model, adapter_name)
    return {part: sum(parameter.numel() for parameter in held.values()) for part, held in parts.items()}
