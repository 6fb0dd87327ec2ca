"""A linear combination of adapters that have the same tensors, as model soups average whole models."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import nn

from peft_elp.config import ELPConfig, differing_fields
from peft_elp.parameters import parameters_by_part
from peft_elp.wording import shortened, unknown_adapter


def check_combination(
    configs: dict[str, Any], adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> ELPConfig:
    """Return the configuration that the adapters have in common, if they can be combined with these weights."""
    unknown = set(adapters) - set(configs)
    if unknown:
        raise ValueError(unknown_adapter(unknown, configs))
    if not adapters:
        raise ValueError("adapters=[] names no adapter to average. Pass the names of two or more adapters.")
    if adapter_name in configs:
        raise ValueError(f"There is already an adapter {adapter_name!r}. Choose another name, or delete it first.")
    if len(adapters) != len(weights) or not all(map(isfinite, weights)) or abs(sum(weights) - 1) > 1e-4:
        raise ValueError(
            f"An average needs one finite weight for each adapter, and weights that sum to 1, got "
            f"[{shortened(weights)}] for {shortened(map(repr, adapters))}: layer norms and heads are full copies, not "
            f"deltas. Write for example weights=[1 / {len(adapters)}] * {len(adapters)}."
        )
    first, *others = adapters
    for name in others:
        differing = differing_fields(configs[first], configs[name], "computation", "selection")
        for field, (one, other) in differing.items():
            raise ValueError(
                f"{first!r} and {name!r} are configured differently: {field} is {one!r} and {other!r}. Average "
                "adapters of the same settings; to keep both, use set_adapter, adapter_names or forward_all."
            )
    return configs[first]


@torch.no_grad()
def combine(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Write `sum_i weights_i * adapters_i` into the tensors of `adapter_name`, which is configured as they are."""
    sources = [parameters_by_part(model, name) for name in adapters]
    for part, targets in parameters_by_part(model, adapter_name).items():
        for name, target in targets.items():
            total = torch.zeros_like(target, dtype=torch.float32)
            for source, adapter, weight in zip(sources, adapters, weights, strict=True):
                total += weight * source[part][renamed(name, adapter_name, adapter)].float()
            # A new adapter has the backbone's dtype. PEFT keeps those of a half-precision model in float32.
            target.data = total.to(sources[0][part][renamed(name, adapter_name, adapters[0])].dtype)


def renamed(name: str, old: str, new: str) -> str:
    """Return the name of a tensor of adapter `old`, with the name of adapter `new` in its place."""
    return ".".join(new if step == old else step for step in name.split("."))
