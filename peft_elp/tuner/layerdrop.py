"""LayerDrop, which skips encoder layers in training, is off while adapters are active."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import nn


class LayerDrop:
    """The LayerDrop of one encoder stack.

    Args:
        stack: The encoder stack, without ELP's wrapper.
        attribute: Path from the stack to the attribute that holds the probability of skipping a layer. None if the
            encoder has no LayerDrop.
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
