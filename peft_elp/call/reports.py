"""Whether somebody looks at what the encoder layers compute, besides the L-adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from torch import nn

from .context import CallVariable

REPORTS = ("output_hidden_states", "output_attentions")

# Whether the call of a model of Transformers asks for hidden states or attentions. The encoder cannot tell: some heads
# always ask it for hidden states, and drop them.
reports_asked: CallVariable[bool] = CallVariable("peft_elp_reports_asked")


def asking(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Remember for a block whether a call asks for reports, by its arguments or the configurations of the model.

    Nothing is remembered for classes of others, which may read hidden states without being asked.
    """
    if not type(model).__module__.startswith("transformers."):
        return nullcontext()
    configs = [model.config, kwargs.get("generation_config") or getattr(model, "generation_config", None)]
    by_default = {name: any(getattr(config, name, False) for config in configs) for name in REPORTS}
    asked = [by_default[name] if kwargs.get(name) is None else kwargs[name] for name in REPORTS]
    return reports_asked.set(any(asked) or any(value is True for value in args))


def are_watched(layers: Iterable[nn.Module], kwargs: Mapping[str, Any], config: Any) -> bool:
    """Whether a call of the stack reports what layers compute, or somebody has put a hook on one of them."""
    asked = reports_asked.get()
    if asked is None:  # The model is of another class, or was not called through PEFT.
        asked = any(kwargs.get(name) or getattr(config, name, False) for name in REPORTS) or _transformers_collects()
    if asked or torch.compiler.is_compiling():
        return asked
    return any(_is_watched(module) for layer in layers for module in layer.modules())


def _transformers_collects() -> bool:
    # Transformers keeps what a call reports in this private variable, and reads it in hooks that it never removes.
    # Older versions replace `forward` of the layers instead. `_is_watched` notices it, but not in a compiled model.
    capturing = getattr(transformers.utils, "output_capturing", None)
    if capturing is None:
        return torch.compiler.is_compiling()
    collector = capturing._active_collector
    # Its `get` cannot be traced before its `set` was, which keeps the value in this attribute.
    return bool(collector.global_var if torch.compiler.is_dynamo_compiling() else collector.get())


def _is_watched(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ours = ("transformers.", "peft_elp.")
    return "forward" in vars(module) or not all(hook.__module__.startswith(ours) for hook in hooks)
