"""A trained adapter without its weakest taps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from peft_elp.config import ELPConfig
from peft_elp.parameters import parameters_by_part
from peft_elp.wording import unknown_adapter

from .averaging import renamed
from .stack import ELPStack


def prune_taps(
    model: PeftModel,
    adapter_name: str,
    new_name: str,
    *,
    keep: int | Sequence[int],
) -> list[int]:
    """Add an adapter that equals a trained one without the taps that weigh least.

    With the weights `softmax(w)_l` of `N` taps, the new adapter sums the kept ones with `softmax(w)_l / sum_k
    softmax(w)_k`. Where the sum replaces the encoder's output (`l_output="head"` or `"project"`), the layers above the
    last kept tap do not run. E-adapters and layer norms of these layers are left out. The new adapter is not active
    until `set_adapter`. Measure its quality, and train it further if need be.

    Args:
        model: A model with ELP-adapters, as `get_peft_model` returns it.
        adapter_name: The trained adapter, which has an L-adapter.
        new_name: Name of the new adapter.
        keep: How many taps to keep, those that weigh most; or the 0-based numbers of the layers whose taps are kept.

    Returns:
        The layers whose taps were kept.

    Raises:
        ValueError: The adapter does not exist or has no L-adapter, no tap would be kept, or a layer has no tap. The
            model is as it was.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import WavLMConfig, WavLMForSequenceClassification
        >>> from peft_elp import ELPConfig, prune_taps
        >>> size = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, layerdrop=0.0)
        >>> base = WavLMForSequenceClassification(WavLMConfig(num_labels=2, **size))
        >>> model = get_peft_model(base, ELPConfig(adapters="L"))
        >>> prune_taps(model, "default", "short", keep=[0, 1])
        [0, 1]
    """
    if adapter_name not in model.peft_config:
        raise ValueError(unknown_adapter(adapter_name, model.peft_config))
    if new_name in model.peft_config:
        raise ValueError(f"There is already an adapter {new_name!r}. Choose another name, or delete it first.")
    stack = next(module for module in model.modules() if isinstance(module, ELPStack))
    if adapter_name not in stack.elp_l:
        raise ValueError(f"Adapter {adapter_name!r} has no L-adapter, so it has no taps.")
    adapter: Any = stack.elp_l[adapter_name]
    shares = dict(zip(stack.tapped_layers[adapter_name], adapter.shares().tolist(), strict=True))
    kept = _kept(shares, keep)
    config: Any = model.peft_config[adapter_name]
    model.add_adapter(new_name, _shorter(config, kept, adapter.residual))
    _copy(model, adapter_name, new_name, [list(shares).index(layer) for layer in kept])
    return kept


def _kept(shares: dict[int, float], keep: int | Sequence[int]) -> list[int]:
    if isinstance(keep, int):
        kept = sorted(sorted(shares, key=lambda layer: -shares[layer])[: max(keep, 0)])
    else:
        kept = sorted(set(keep))
    without = [layer for layer in kept if layer not in shares]
    if without or not kept:
        what = f"Layers {without} have no tap" if without else "No tap would be kept"
        values = ", ".join(f"{layer}: {share:.3f}" for layer, share in shares.items())
        raise ValueError(f"{what}. The tapped layers and their shares are {values}.")
    return kept


def _shorter(config: ELPConfig, kept: list[int], residual: bool) -> ELPConfig:
    if residual or config.e_layers is None:  # What lies above the last tap is left out anyway.
        return replace(config, l_layers=kept)
    return replace(config, l_layers=kept, e_layers=[layer for layer in config.e_layers if layer <= kept[-1]])


@torch.no_grad()
def _copy(model: PeftModel, adapter_name: str, new_name: str, taps: list[int]) -> None:
    """Copy the tensors of an adapter into a new one, of whose taps only some are left."""
    source = {name: value for held in parameters_by_part(model, adapter_name).values() for name, value in held.items()}
    for held in parameters_by_part(model, new_name).values():
        for name, target in held.items():
            start, inside, tap = renamed(name, new_name, adapter_name).partition(f".elp_l.{adapter_name}.taps.")
            if inside:
                number, _, rest = tap.partition(".")
                value = source[f"{start}{inside}{taps[int(number)]}.{rest}"]
            elif name.endswith(f".elp_l.{new_name}.layer_weights"):
                value = source[start][taps]
            else:
                value = source[start]
            target.data = value.detach().clone()
