"""A model that has adapters without a PeftModel around it, as Transformers' `add_adapter` and `load_adapter` give it.

What a PeftModel and its tuner do later for an adapter is done here once, when it is placed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_elp.config import ELPConfig

from .first_step import watch_when_trained
from .guards import expect_loading, refuse_unloaded
from .patches import set_attribute
from .place import unwrap
from .snapshot import unchanged_on_error
from .wrapper import Wrapper


def prepare(model: nn.Module, config: ELPConfig, adapter_name: str) -> None:
    """Prepare a model with a new adapter for Transformers' own methods.

    Args:
        model: The model.
        config: The configuration of the adapter.
        adapter_name: Its name.
    """
    for module in model.modules():
        if isinstance(module, Wrapper):
            module.keep_names()
    kind: Any = type(model)
    config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    # `_forward_pre_hooks` is a private dictionary of nn.Module; it tells whether a hook is there already.
    if config.inference_mode:
        tensor = re.compile(rf"\.(elp_[a-z]+|modules_to_save)\.{re.escape(adapter_name)}\.")
        expect_loading(parameter for name, parameter in model.named_parameters() if tensor.search(name))
        if refuse_unloaded not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(refuse_unloaded)
    elif watch_when_trained not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(watch_when_trained)
    if input_embeddings(model) is None:
        set_attribute(model, "get_input_embeddings", _no_embeddings)
        set_attribute(model, "get_output_embeddings", _no_embeddings)
    if hasattr(kind, "delete_adapter"):
        set_attribute(model, "delete_adapter", DeleteAdapter(model))


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The embeddings of a text vocabulary, or None for a model of speech, where Transformers mostly raises."""
    base: Any = model
    try:
        return base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _no_embeddings() -> None:
    """The answer of a speech model that is asked for the embeddings of a text vocabulary."""


@dataclass(eq=False)
class DeleteAdapter:
    """Transformers' `delete_adapter` for one model, which also removes the wrappers that no adapter needs any more.

    Args:
        model: The model.
    """

    model: Any

    def __call__(self, adapter_names: str | list[str]) -> None:
        with unchanged_on_error(self.model):
            type(self.model).delete_adapter(self.model, adapter_names)
            unwrap(self.model, only_unused=True)
