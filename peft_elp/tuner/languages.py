"""The adapters for the languages of MMS, which Transformers loads into a wav2vec 2.0 model, below ELP-adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from .stack import ELPStack
from .wrapper import Wrapper


def has_languages(model: nn.Module) -> bool:
    """Whether Transformers can load adapters for languages into the model.

    `_get_adapters` is private. It marks the classes whose `load_adapter` is meant for languages.
    """
    return hasattr(model, "_get_adapters") and getattr(model.config, "adapter_attn_dim", None) is not None


@dataclass(eq=False)
class LoadLanguage:
    """`load_adapter` of one model, as Transformers has it for languages.

    Transformers finds the tensors by their names in the model, and replaces `lm_head` if the new language has another
    vocabulary. So it has to see the model without wrappers. An ELP-adapter with a head keeps its own vocabulary.

    Args:
        model: The model.
    """

    model: Any

    def __call__(self, target_lang: str, *args: Any, **kwargs: Any) -> None:
        known = set(self.model.parameters())
        with without_wrappers(self.model):
            type(self.model).load_adapter(self.model, target_lang, *args, **kwargs)
        for parameter in self.model.parameters():
            if parameter not in known:
                parameter.requires_grad_(False)  # As the rest of the backbone.


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """Take all wrappers off the model for a block. Modules that are replaced in it are wrapped afterwards."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, (Wrapper, ModulesToSaveWrapper))
    ]
    stacks = [child for _, _, child in wrapped if isinstance(child, ELPStack)]
    for stack in stacks:
        stack.task_head.follow([], enabled=False)
    for parent, name, child in wrapped:
        setattr(parent, name, child.base_layer if isinstance(child, Wrapper) else child.original_module)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            inner = "base_layer" if isinstance(child, Wrapper) else "original_module"
            setattr(child, inner, getattr(parent, name))
            setattr(parent, name, child)
        for stack in stacks:
            stack.follow_adapters()
