"""Paths of modules in a model, with and without wrappers."""

from __future__ import annotations

from peft.utils import ModulesToSaveWrapper
from torch import nn


def canonical(name: str) -> str:
    """Return the name that a module or tensor had before wrappers came around it."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def join(*parts: str) -> str:
    """Return a module path from parts that may be empty."""
    return ".".join(part for part in parts if part)


def original(module: nn.Module) -> nn.Module:
    """Return the module of the head that the model has without adapters."""
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module
