"""A model that has adapters without a PeftModel around it, by Transformers' `add_adapter` or `load_adapter`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from peft_elp.config import ELPConfig
from peft_elp.wording import shortened

from .head_modules import was_loaded
from .paths import canonical
from .stack import ELPStack
from .wrapper import Wrapper

VERSION = "_elp_version"  # Attribute of a parameter: how often it had been written when the adapter was placed.


def prepare_for_transformers(model: nn.Module, stack: ELPStack, config: ELPConfig, adapter_name: str) -> None:
    """Prepare a model with a new adapter for Transformers' own methods.

    Args:
        model: The model.
        stack: The tuner layer around its encoder stack.
        config: The configuration of the adapter.
        adapter_name: Its name.
    """
    for module in model.modules():
        if isinstance(module, Wrapper):
            module.keep_names()
    kind: Any = type(model)
    config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    tensor = re.compile(rf"\.(elp_[a-z]+|modules_to_save)\.{re.escape(adapter_name)}\.")
    names = dict(model.named_parameters())
    own = frozenset(name for name in names if tensor.search(f".{name}"))
    for parameter in names.values():
        if not parameter.is_inference():
            # PyTorch counts the writes into a tensor in this private attribute. Inference tensors lack it.
            vars(parameter)[VERSION] = parameter._version
    check = LoadingCheck(own, frozenset(names.keys() - own), config.inference_mode)
    stack.patches.handles.append(model.register_forward_pre_hook(check))
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

    Args:
        own: The names of the adapter's parameters.
        others: The names of all other parameters.
        expected: Whether the adapter is for inference, so that its tensors have to be loaded.
        done: Whether the check was passed.
    """

    own: frozenset[str]
    others: frozenset[str]
    expected: bool
    done: bool = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Check the parameters at the first call.

        Raises:
            RuntimeError: Tensors were not loaded or are not finite, or tensors of others were overwritten.
        """
        if self.done or torch.compiler.is_compiling():
            return
        parameters = {name: p for name, p in model.named_parameters() if name in self.own or name in self.others}
        if not parameters:  # A replica of DataParallel has none.
            return
        own = {name: parameters[name] for name in self.own if name in parameters}
        missing = [name for name, p in own.items() if self.expected and vars(p).get(VERSION) == p._version]
        if missing:
            raise RuntimeError(
                f"{len(missing)} tensors of an adapter that was added for inference were never loaded: "
                f"{shortened(map(canonical, sorted(missing)), shown=2)}. Before 5.20, Transformers (here "
                f"{transformers.__version__}) loads no adapter with a head; else the folder is incomplete. Load it "
                "with PEFT, which says what is wrong: PeftModel.from_pretrained(base_model, folder)."
            )
        broken = [name for name, p in own.items() if p.numel() and not p.is_meta and not p.isfinite().all()]
        # Transformers puts a new, marked parameter where it loads a tensor.
        others = {name: parameters[name] for name in self.others if name in parameters}
        foreign = [name for name, p in others.items() if VERSION not in vars(p) and was_loaded(p)]
        if broken or foreign:
            what = "hold values that are not finite" if broken else "are not the adapter's and were overwritten"
            raise RuntimeError(
                f"{len(broken or foreign)} tensors {what} when an adapter was loaded: "
                f"{shortened(map(canonical, sorted(broken or foreign)), shown=2)}. Load the base model again. "
                "PeftModel.from_pretrained(base_model, folder) refuses such a folder before it changes the model."
            )
        self.done = True
