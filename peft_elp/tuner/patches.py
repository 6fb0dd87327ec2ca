"""What ELP changes around an encoder stack besides wrapping modules, and how it is undone."""

from __future__ import annotations

from typing import Any

from torch.utils.hooks import RemovableHandle


class Patches:
    """Hooks and attributes that a model gets with its first adapter and loses with its last.

    They are kept in the tuner layer around the encoder stack, so that a copied or pickled model has its own.
    """

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.attributes: list[tuple[Any, str, Any, Any]] = []

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of one module or configuration, and remember what it was."""
        self.attributes.append((owner, name, vars(owner).get(name, ...), value))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Remove the hooks, and give the attributes their values back that nobody has written meanwhile."""
        for handle in self.handles:
            handle.remove()
        for owner, name, before, value in reversed(self.attributes):
            if getattr(owner, name, ...) == value:
                if before is ...:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)
        self.handles, self.attributes = [], []
