"""A model that has adapters without a PeftModel around it, by Transformers' `add_adapter` or `load_adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from peft_elp.config import ELPConfig
from peft_elp.parameters import belongs_to
from peft_elp.saved.weights import SavedTensor
from peft_elp.wording import shortened

from .head_modules import was_loaded
from .misfits import is_usable
from .paths import canonical
from .stack import ELPStack
from .wrapper import Wrapper

VERSION = "_elp_version"  # Attribute of a parameter: how often it had been written when the adapter was placed.


def prepare_for_transformers(model: nn.Module, stack: ELPStack, config: ELPConfig, adapter_name: str) -> None:
    """Prepare a model with a new adapter for Transformers' own methods."""
    for module in model.modules():
        if isinstance(module, Wrapper):
            module.keep_names()
    kind: Any = type(model)
    config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    parameters = dict(model.named_parameters())
    own = frozenset(name for name in parameters if belongs_to(adapter_name, name))
    for waiting in stack.loading_checks:
        waiting.look(parameters)  # Before the marks are set anew.
    for parameter in parameters.values():
        if not parameter.is_inference():
            # PyTorch counts the writes into a tensor in this private attribute. Inference tensors lack it.
            vars(parameter)[VERSION] = parameter._version
    check = LoadingCheck(own, frozenset(parameters.keys() - own), set(own) if config.inference_mode else set())
    stack.loading_checks.append(check)
    stack.patches.handles.append(model.register_forward_pre_hook(check))
    if len(stack.elp_settings) == 1:
        stack.patches.handles.append(model.register_forward_pre_hook(stack.hold_frozen_norms))
    if _has_no_embeddings(model):
        # Saving asks for the embeddings where the vocabulary has changed, and most speech models raise.
        for name in ("get_input_embeddings", "get_output_embeddings"):
            stack.patches.set_attribute(model, name, _no_embeddings)


def _has_no_embeddings(model: Any) -> bool:
    try:
        return model.get_input_embeddings() is None
    except (AttributeError, NotImplementedError):
        return True


def _no_embeddings() -> None:
    """Answer for a speech model that is asked for the embeddings of a text vocabulary."""


@dataclass
class LoadingCheck:
    """Forward pre-hook of a model: Transformers has loaded the adapter, all of it, and nothing else.

    Transformers only logs which tensors of a file it did not find, and writes every tensor that has a name in the
    model, whether it belongs to the adapter or not.
    """

    own: frozenset[str]  # the names of the adapter's parameters
    others: frozenset[str]  # the names of all other parameters that the model had when the adapter was placed
    missing: set[str]  # of `own`: those that have to be loaded and have not been yet
    foreign: set[str] = field(default_factory=set)  # of `others`: those that were overwritten
    done: bool = False  # whether the check was passed

    def look(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note what was written since the parameters were marked."""
        held = {name: vars(parameters[name]) for name in parameters}
        self.missing = {name for name in self.missing if held.get(name, {}).get(VERSION) == parameters[name]._version}
        # Transformers puts a new, marked parameter where it loads a tensor.
        replaced = [name for name in self.others if name in held and VERSION not in held[name]]
        self.foreign |= {name for name in replaced if was_loaded(parameters[name])}

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if self.done or torch.compiler.is_compiling():
            return
        parameters = dict(model.named_parameters())
        if not parameters:  # A replica of DataParallel has none.
            return
        self.missing = {name for name in self.missing if name in parameters}
        self.look(parameters)
        if self.missing:
            raise RuntimeError(
                f"{len(self.missing)} tensors of an adapter that was added for inference were never loaded: "
                f"{shortened(map(canonical, sorted(self.missing)), shown=2)}. Before 5.20, Transformers (here "
                f"{transformers.__version__}) loads no adapter with a head; else the folder is incomplete. Use "
                "PeftModel.from_pretrained(base_model, folder)."
            )
        own = {name: p for name, p in parameters.items() if name in self.own}
        broken = [name for name, p in own.items() if not is_usable(SavedTensor.of(p), p.dtype)]
        if broken or self.foreign:
            what = (
                "hold values that are not finite or too large"
                if broken
                else "are not the adapter's and were overwritten"
            )
            raise RuntimeError(
                f"{len(broken or self.foreign)} tensors {what} when an adapter was loaded: "
                f"{shortened(map(canonical, sorted(broken or self.foreign)), shown=2)}. Load the base model again. "
                "PeftModel.from_pretrained(base_model, folder) refuses such a folder before it changes the model."
            )
        self.done = True
