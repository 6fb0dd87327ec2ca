"""What the layers of one encoder share during one call: the running sums of taps, and where the real frames are.

The state lives in a context variable from the start of a stack's call to its end, so two threads that share a model do
not meet, and nothing outlives the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import RealFrames, TapSum


@dataclass
class StackCall:
    """One call of one encoder stack.

    Args:
        taps: The running sum of the active L-adapter, if any.
        tap_of_layer: For each tapped layer, its number among the taps.
        real: Where the real frames are, one entry for each active P-adapter, in the order in which they joined.
    """

    taps: TapSum | None = None
    tap_of_layer: dict[int, int] = field(default_factory=dict)
    real: tuple[RealFrames, ...] = ()

    def tap(self, layer: int, x: Tensor) -> None:
        """Let the L-adapter read the output `x` of a layer, if it taps this layer."""
        if self.taps is not None and layer in self.tap_of_layer:
            self.taps.add(self.tap_of_layer[layer], x.to(self.taps.shares.dtype))

    def mark(self, x: Tensor) -> None:
        """Note on a tensor that Transformers may report as a hidden state where its real frames are."""
        if self.real:
            x._elp_real_frames = self.real  # pyright: ignore[reportAttributeAccessIssue]

    def without_pseudo_features(self, x: Tensor) -> Tensor:
        """The frames of `x` that belong to the utterances."""
        return _without_pseudo_features(x, self.real)


_call: ContextVar[StackCall | None] = ContextVar("peft_elp_stack_call", default=None)
# torch.compile cannot trace a context variable. It traces in one thread at a time, and its graph has no variable.
_traced_call: StackCall | None = None


def current_call() -> StackCall | None:
    """The call of an encoder stack that is under way in this thread, None outside of one."""
    return _traced_call if torch.compiler.is_compiling() else _call.get()


@contextmanager
def under_way(call: StackCall) -> Iterator[None]:
    """Make `call` the current one for the duration of a `with` block."""
    global _traced_call
    if torch.compiler.is_compiling():
        before, _traced_call = _traced_call, call
        try:
            yield
        finally:
            _traced_call = before
    else:
        token = _call.set(call)
        try:
            yield
        finally:
            _call.reset(token)


def trim_hidden_states(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the base encoder: take the pseudo features out of the hidden states that it reports.

    Transformers collects hidden states where the layers return them, with the pseudo features still in. The entries
    carry the mark of `StackCall.mark`; attentions do not, they keep the pseudo features.
    """
    if isinstance(output, dict):
        for key, value in output.items():
            if (trimmed := _trimmed(value)) is not value:
                output[key] = trimmed
        return output
    if isinstance(output, tuple):
        return tuple(_trimmed(value) for value in output)
    return output


def _trimmed(states: Any) -> Any:
    if not isinstance(states, (tuple, list)):
        return states
    real = next((x._elp_real_frames for x in states if hasattr(x, "_elp_real_frames")), ())
    if not real:
        return states
    joined = real[-1].joined
    return tuple(
        _without_pseudo_features(x, real) if isinstance(x, Tensor) and x.shape[1] == joined else x for x in states
    )


def _without_pseudo_features(x: Tensor, real: Sequence[RealFrames]) -> Tensor:
    for frames in reversed(real):
        x = frames.of(x)
    return x
