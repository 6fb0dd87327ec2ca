"""What ELP changes around an encoder stack besides wrapping modules, and how it is undone."""

from __future__ import annotations

from operator import attrgetter
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


class LayerDrop:
    """The LayerDrop of one encoder stack, which skips layers in training: off while adapters are active.

    Args:
        stack: The encoder stack, without ELP's wrapper.
        attribute: Path from it to the attribute that holds the probability of skipping a layer, or None.
    """

    def __init__(self, stack: nn.Module, attribute: str | None) -> None:
        self.stack = stack
        self.attribute = attribute
        self.before: float | None = None  # The backbone's own probability, while LayerDrop is off.

    def turn_off(self) -> None:
        """Let no layer be skipped until `restore`."""
        holder, name = self._place()
        if name and (self.before is None or getattr(holder, name)):
            self.before = getattr(holder, name)
            setattr(holder, name, 0.0)

    def restore(self) -> None:
        """Give the encoder its own probability back, or leave it the one that a user has written meanwhile."""
        holder, name = self._place()
        if self.before is not None and not getattr(holder, name):
            setattr(holder, name, self.before)
        self.before = None

    def _place(self) -> tuple[Any, str]:
        path, _, name = (self.attribute or "").rpartition(".")
        return attrgetter(path)(self.stack) if path else self.stack, name
