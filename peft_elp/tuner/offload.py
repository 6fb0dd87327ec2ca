"""Weights that accelerate keeps on the CPU or on disk, and brings back for each call of a module."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy

import torch
from accelerate.hooks import ModelHook, remove_hook_from_module
from accelerate.utils import align_module_device
from torch import nn


def running_device(module: nn.Module) -> torch.device | None:
    """Return the device of a module's first parameter while the module runs, or None if it has no parameters.

    A parameter that is kept elsewhere is on the meta device between calls.
    """
    for inner in module.modules():
        for parameter in inner.parameters(recurse=False):
            # `_hf_hook` is where accelerate's `add_hook_to_module` keeps the hook of a module.
            device = getattr(vars(inner).get("_hf_hook"), "execution_device", None) if parameter.is_meta else None
            return parameter.device if device is None else torch.device(device)
    return None


def copy_with_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module that holds its weights itself, on the device where the module runs."""
    hooks = [vars(inner)["_hf_hook"] for inner in module.modules() if "_hf_hook" in vars(inner)]
    with ExitStack() as aligned:
        for inner in module.modules():
            aligned.enter_context(align_module_device(inner))
        # The hooks hold the weights of the whole model, so they are not copied.
        copy = deepcopy(module, {id(hook): hook for hook in hooks})
    for inner in copy.modules():
        if "_hf_hook" in vars(inner):
            vars(inner)["_hf_hook"] = ModelHook()  # The copied hook would move the weights when it is removed.
            remove_hook_from_module(inner)
            vars(inner).pop("forward", None)  # It is the method of the class again.
    return copy
