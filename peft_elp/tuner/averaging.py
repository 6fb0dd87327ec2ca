"""A linear combination of adapters of one shape, as model soups average whole models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft_elp.config import ELPConfig
from peft_elp.parameters import parameters_by_part

# What an adapter computes with its tensors, and which tensors it has.
MAKE = (
    "adapters",
    "e_dim",
    "e_activation",
    "e_layers",
    "e_after",
    "l_dim",
    "l_activation",
    "l_layers",
    "l_input_norm",
    "l_output",
    "p_length",
    "p_position",
    "train_layer_norms",
    "modules_to_save",
    "head_config",
    "target",
    "exclude_modules",
    "window_s",
)


def check_combination(
    configs: dict[str, Any], adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> ELPConfig:
    """The configuration that combined adapters have in common.

    Raises:
        ValueError: They cannot be combined so.
    """
    unknown = [name for name in adapters if name not in configs]
    if unknown or not adapters:
        raise ValueError(
            f"adapters={list(adapters)!r} names {unknown or 'none'}, and the model has "
            f"{', '.join(map(repr, sorted(configs)))}. Name adapters that are there."
        )
    if adapter_name in configs:
        raise ValueError(f"There is an adapter {adapter_name!r} already. Choose another name, or delete it first.")
    if len(adapters) != len(weights) or abs(sum(weights) - 1) > 1e-4:
        raise ValueError(
            f"An average needs one weight for each adapter, and weights that add up to 1: got {list(weights)!r} for "
            f"{list(adapters)!r}. The copies of layer norms and of the head are whole ones, no changes to be scaled. "
            f"Write for example weights={[round(1 / len(adapters), 4)] * len(adapters)}."
        )
    first, *others = adapters
    for name in others:
        for field in MAKE:
            one, other = getattr(configs[first], field), getattr(configs[name], field)
            if one != other:
                raise ValueError(
                    f"{first!r} and {name!r} are of different make: {field} is {one!r} and {other!r}. Only adapters "
                    "whose tensors have the same shape and meaning can be averaged. Use set_adapter, adapter_names "
                    "or forward_all to keep both."
                )
    return configs[first]


@torch.no_grad()
def combine(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Write `sum_i weights_i * adapters_i` into the tensors of `adapter_name`, which has the same make."""
    sources = [parameters_by_part(model, name) for name in adapters]
    for part, own in parameters_by_part(model, adapter_name).items():
        for name, target in own.items():
            total = torch.zeros_like(target, dtype=torch.float32)
            for source, adapter, weight in zip(sources, adapters, weights, strict=True):
                total += weight * source[part][_renamed(name, adapter_name, adapter)].float()
            # A new adapter has the backbone's precision, where PEFT keeps those of a half one in full.
            target.data = total.to(sources[0][part][_renamed(name, adapter_name, adapters[0])].dtype)


def _renamed(name: str, old: str, new: str) -> str:
    return ".".join(new if step == old else step for step in name.split("."))
