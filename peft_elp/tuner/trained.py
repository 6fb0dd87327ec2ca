"""Which adapters are trained stays as it was while adapters are switched off and on again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class KeepsTrained:
    """Base of the modules that hold adapters by name, in front of PEFT's base class for them.

    PEFT freezes all adapters when it disables them. When it enables them again it trains the active one, whatever was
    trained before. Here the same parameters are trained as before.
    """

    adapter_layer_names: tuple[str, ...]
    _disable_adapters: bool  # PEFT's flag behind its read-only property `disable_adapters`.
    trained: frozenset[str] = frozenset()  # The adapters that may be trained. All others are frozen.
    paused: Sequence[nn.Parameter] = ()  # The parameters that are trained again when adapters are enabled.

    def enable_adapters(self, enabled: bool) -> None:
        if enabled != self._disable_adapters:
            return
        held: list[Any] = [getattr(self, name) for name in self.adapter_layer_names]
        if enabled:
            again, self.paused = self.paused, ()
        else:
            again = self.paused = [p for adapters in held for p in adapters.parameters() if p.requires_grad]
        for parameter in again:
            parameter.requires_grad_(enabled)
        self._disable_adapters = not enabled

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = frozenset([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        self.trained = self.trained | names if requires_grad else self.trained - names
        super().set_requires_grad(adapter_names, requires_grad)  # pyright: ignore[reportAttributeAccessIssue]

    def train_only(self, adapter_names: Sequence[str]) -> None:
        """Train these adapters and freeze those that were trained: PEFT would visit every adapter, however many."""
        for container in self.adapter_layer_names:
            adapters = getattr(self, container)
            for name in self.trained.union(adapter_names):
                if name in adapters:
                    adapters[name].requires_grad_(name in adapter_names)
        self.trained, self.paused = frozenset(adapter_names), ()
