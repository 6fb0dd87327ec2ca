"""What ELP changes around an encoder stack besides wrapping modules, and how it is undone."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Patches:
    """Hooks and attributes that a model gets with its first adapter and loses with its last.

    They are kept in the tuner layer around the encoder stack, so that a copied or pickled model has its own.
    """

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.attributes: list[tuple[nn.Module, str, Any]] = []

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of one module, and remember what it was."""
        self.attributes.append((module, name, vars(module).get(name, ...)))
        vars(module)[name] = value

    def undo(self) -> None:
        """Remove the hooks and give the attributes their values back."""
        for handle in self.handles:
            handle.remove()
        for module, name, before in reversed(self.attributes):
            vars(module).pop(name, None)
            if before is not ...:
                vars(module)[name] = before
        self.handles, self.attributes = [], []
