"""What the layers of one encoder share during one call: the running sum of taps, and where the real frames are.

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


def first(output: Any) -> Tensor:
    """The hidden states in what a module returns: a tensor, a tuple that begins with one, or a `ModelOutput`."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, x: Tensor) -> Any:
    """The same output with hidden states `x`."""
    if isinstance(output, Tensor):
        return x
    if isinstance(output, tuple):
        return (x, *output[1:])
    output[next(iter(output))] = x
    return output


@dataclass
class StackCall:
    """One call of one encoder stack.

    Args:
        taps: The running sum of the active L-adapter, if any.
        tap_of_layer: For each tapped layer, its number among the taps.
        end_layer: The layer whose output the sum of taps replaces; None where it replaces the stack's.
        copy_taps: Whether the stack writes into the outputs of its layers.
        real: Where the real frames are in the stack's input, for each active P-adapter in the order of joining.
        squeeze: How many frames of the stack's input the layers take as one.
        pseudo: Pseudo features that are carried through the layers: `(rows, hidden)` before the first of them,
            `(batch, rows, hidden)` from then on. None where there are none, or where they joined the stack's input.
        needs_gradient: Whether a layer loses the gradients of what is inside it unless its input requires one.
    """

    taps: TapSum | None = None
    tap_of_layer: dict[int, int] = field(default_factory=dict)
    end_layer: int | None = None
    copy_taps: bool = False
    real: tuple[RealFrames, ...] = ()
    squeeze: int = 1
    pseudo: Tensor | None = None
    needs_gradient: bool = False

    def before_layer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a layer, with the pseudo features that are carried beside its frames."""
        args, kwargs = tuple(args), dict(kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        if self.needs_gradient and not x.requires_grad:
            x = x.detach().requires_grad_().clone()
        if self.pseudo is not None:
            rows = self.pseudo.to(x.dtype)
            joined = torch.cat([x, rows if rows.dim() == 3 else rows.expand(x.shape[0], -1, -1)], dim=1)
            self.real = (RealFrames(joined.shape[1], None, 0, x.shape[1]),)
            x = joined
            if len(args) > 1:
                args = (args[0], _attend_to_all(args[1], rows.shape[-2]), *args[2:])
            elif "attention_mask" in kwargs:
                kwargs["attention_mask"] = _attend_to_all(kwargs["attention_mask"], rows.shape[-2])
        if args:
            args = (x, *args[1:])
        else:
            kwargs["hidden_states"] = x
        self._mark(x)
        return args, kwargs

    def after_layer(self, layer: int, output: Any) -> Any:
        """What a layer hands on: its output without carried pseudo features, or the sum of taps in its place."""
        x = first(output)
        self._mark(x)
        if self.pseudo is not None:
            frames = self.real[0].frames
            x, self.pseudo = x[:, :frames], x[:, frames:]
            output = with_first(output, x)
        if self.taps is None:
            return output
        if layer in self.tap_of_layer:
            self.add_tap(layer, x)
        return with_first(output, self.sum_of_taps(x)) if layer == self.end_layer else output

    def add_tap(self, layer: int, x: Tensor) -> None:
        """Let the L-adapter read the output `x` of a tapped layer."""
        assert self.taps is not None
        x = x.to(self.taps.shares.dtype)
        self.taps.add(self.tap_of_layer[layer], x.clone() if self.copy_taps else x)

    def sum_of_taps(self, x: Tensor) -> Tensor:
        """What takes the place of `x`: the sum of all taps, added to `x` where the adapter says so."""
        assert self.taps is not None
        y = self.taps.result().to(x.dtype)
        return x + y if self.taps.adapter.residual else y

    def _mark(self, x: Tensor) -> None:
        # Transformers may report this very tensor as a hidden state; the mark says where its real frames are.
        if self.real:
            real = self.real if self.squeeze == 1 else tuple(frames.squeezed(self.squeeze) for frames in self.real)
            x._elp_real_frames = real  # pyright: ignore[reportAttributeAccessIssue]


def _attend_to_all(mask: Any, rows: int) -> Any:
    """An attention mask `(batch, heads, queries, keys)`, boolean or additive, with `rows` more that all may see."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise ValueError(
            f"Pseudo features are carried through the layers of this encoder, and its attention mask is a "
            f"{type(mask).__name__} that cannot be extended. Use attn_implementation='sdpa' or 'eager', or leave P "
            "out of adapters."
        )
    if mask.shape[-2] > 1:
        mask = torch.cat([mask, mask[:, :, :1].expand(-1, -1, rows, -1)], dim=-2)
    visible = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
    return torch.cat([mask, visible.expand(*mask.shape[:-1], rows)], dim=-1)


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
    carry the mark of `StackCall`; attentions do not, they keep the pseudo features.
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
        without_pseudo_features(x, real) if isinstance(x, Tensor) and x.shape[1] == joined else x for x in states
    )


def without_pseudo_features(x: Tensor, real: Sequence[RealFrames]) -> Tensor:
    """The frames of `x` that belong to the utterances."""
    for frames in reversed(real):
        x = frames.of(x)
    return x
