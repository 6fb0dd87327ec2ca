"""Where the modules of version 0.1 are now, so that imports and pickles of that version keep working."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]

# For each module of version 0.1, the modules that hold what was in it.
MOVED: dict[str, tuple[str, ...]] = {
    "averaging": ("tuner.averaging",),
    "call": ("call.stack_call", "call.hidden_states", "pseudo"),
    "backbones": ("heads",),
    "card": ("saved.card",),
    "guards": ("tuner.guards", "backbones"),
    "head_config": ("tuner.head_config", "heads"),
    "heads": ("tuner.head", "tuner.paths"),
    "hotswap": ("tuner.hotswap",),
    "layer": ("tuner.layers", "tuner.stack"),
    "loading": ("tuner.fit",),
    "model": ("tuner.model",),
    "multitask": ("tuner.one_pass",),
    "outputs": ("call.outputs",),
    "parts": ("parameters",),
    "placing": ("tuner.place",),
    "plan": ("tuner.plan", "tuner.find"),
    "registry": ("tuner.registry",),
    "saved": ("saved.folder",),
    "routing": ("call.route", "call.context"),
    "sharing": ("call.shared_pass",),
}

# Names that changed as well.
RENAMED = {"Parts": "Encoder", "find_parts": "find_encoder", "Taps": "Reader"}


class MovedModule(ModuleType):
    """A module of version 0.1 that is no longer a file."""

    def __getattr__(self, name: str) -> Any:
        return find_moved(self.__name__.rpartition(".")[2], name)


def find_moved(module: str, name: str) -> Any:
    """Return the object that version 0.1 had under that name in one of its modules.

    Raises:
        AttributeError: The module had no such name.
    """
    if not name.startswith("__"):
        for place in MOVED[module]:
            holder = import_module(f"{PACKAGE}.{place}")
            if hasattr(holder, RENAMED.get(name, name)):
                return getattr(holder, RENAMED.get(name, name))
    raise AttributeError(f"module '{PACKAGE}.{module}' has no attribute {name!r}")


def keep_old_modules() -> None:
    """Make the modules of version 0.1 importable. Modules that still exist find the names that moved."""
    package = sys.modules[PACKAGE]
    for old in MOVED:
        module = sys.modules.setdefault(f"{PACKAGE}.{old}", MovedModule(f"{PACKAGE}.{old}"))
        if not isinstance(module, MovedModule):
            vars(module)["__getattr__"] = lambda name, old=old: find_moved(old, name)
        if not hasattr(package, old):
            setattr(package, old, module)
