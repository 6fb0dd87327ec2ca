"""What the layers of one encoder share during one call: the running sum of taps, and where the real frames are.

The state lives in a context variable from the start of a stack's call to its end, so two threads that share a model do
not meet, and nothing outlives the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import RealFrames, TapSum, after_last_valid


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


@dataclass(frozen=True)
class Carried:
    """Where pseudo features sit that travel through the layers beside the frames of an encoder.

    Args:
        real: Where the real frames are among all.
        source: For each place, which of `[frames ; rows]` goes there, `(batch, joined)`; None: as they stand.
        rows: The place of each pseudo feature, `(batch, rows)`; None: at the end.
        mask: The attention mask of all of them, `(batch, heads, queries, keys)`, or None.
    """

    real: RealFrames
    source: Tensor | None
    rows: Tensor | None
    mask: Tensor | None

    @classmethod
    def beside(cls, x: Tensor, pseudo: Tensor, mask: Any) -> Carried:
        """Behind each utterance's last valid frame, which the first frame's row of the attention mask tells.

        Args:
            x: The frames, `(batch, frames, hidden)`.
            pseudo: The pseudo features, `(rows, hidden)`.
            mask: The attention mask of the frames, boolean or additive, or None.

        Raises:
            ValueError: The mask is of a kind that cannot be extended.
        """
        (batch, frames, _), length = x.shape, len(pseudo)
        if mask is None:
            return cls(RealFrames(frames + length, None, 0, frames), None, None, None)
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise ValueError(
                "Pseudo features are carried through the layers of this encoder, and its attention mask is a "
                f"{type(mask).__name__} that cannot be extended. Use attn_implementation='sdpa' or 'eager', or leave "
                "P out of adapters."
            )
        boolean = mask.dtype == torch.bool
        seen = mask[:, 0, 0] if boolean else mask[:, 0, 0] == 0
        source, real, rows = after_last_valid(seen.expand(batch, -1), length)
        mask = mask.expand(batch, -1, -1, -1)
        # All queries see the pseudo features, but those of padding that see nothing at all.
        sight = mask.any(dim=-1, keepdim=True) if boolean else mask.new_zeros(*mask.shape[:-1], 1)
        mask = torch.cat([mask, sight.expand(*mask.shape[:-1], length)], dim=-1)
        mask = mask.gather(-1, source[:, None, None].expand(-1, *mask.shape[1:-1], -1))
        if mask.shape[-2] > 1:
            mask = torch.cat([mask, mask[:, :, :1].expand(-1, -1, length, -1)], dim=-2)
            mask = mask.gather(-2, source[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
        return cls(RealFrames(frames + length, real, 0, frames), source, rows, mask)

    def join(self, x: Tensor, pseudo: Tensor) -> Tensor:
        """Frames and pseudo features in their places."""
        pseudo = pseudo.to(x.dtype)
        joined = torch.cat([x, pseudo if pseudo.dim() == 3 else pseudo.expand(x.shape[0], -1, -1)], dim=1)
        return joined if self.source is None else joined.gather(1, self.source[:, :, None].expand_as(joined))

    def part(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """Frames, and pseudo features."""
        if self.rows is None:
            return self.real.of(joined), joined[:, self.real.frames :]
        return self.real.of(joined), joined.gather(1, self.rows[:, :, None].expand(-1, -1, joined.shape[-1]))


@dataclass
class StackCall:
    """One call of one encoder stack.

    Args:
        taps: The running sum of the active L-adapter, if any.
        tap_of_layer: For each tapped layer, its number among the taps.
        last_layer: Number of the stack's last layer.
        ends_in_layer: Whether the sum of taps replaces the output of the last layer, rather than that of the stack.
        copy_taps: Whether the stack writes into the outputs of its layers.
        real: Where the real frames are in the stack's input, for each active P-adapter in the order of joining.
        squeeze: How many frames of the stack's input the layers take as one.
        pseudo: Pseudo features that are carried through the layers: `(rows, hidden)` before the first of them,
            `(batch, rows, hidden)` from then on. None where there are none, or where they joined the stack's input.
        positions: Computes what the layers know of positions, from hidden states `(batch, frames, hidden)` and the
            numbers of their frames, `(1, frames)`. None where the layers know nothing of them.
        needs_gradient: Whether a layer loses the gradients of what is inside it unless its input requires one.
    """

    taps: TapSum | None = None
    tap_of_layer: dict[int, int] = field(default_factory=dict)
    last_layer: int = 0
    ends_in_layer: bool = False
    copy_taps: bool = False
    real: tuple[RealFrames, ...] = ()
    squeeze: int = 1
    pseudo: Tensor | None = None
    positions: Callable[[Tensor, Tensor], Any] | None = None
    needs_gradient: bool = False
    _carried: Carried | None = None
    _positions: Any = None

    def before_layer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a layer, with the pseudo features that are carried beside its frames."""
        args, kwargs = tuple(args), dict(kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        if self.needs_gradient and not x.requires_grad:
            x = x.detach().requires_grad_().clone()
        if self.pseudo is not None:
            if self._carried is None:
                self._carried = Carried.beside(
                    x, self.pseudo, args[1] if len(args) > 1 else kwargs.get("attention_mask")
                )
                self.real = (self._carried.real,)
            x = self._carried.join(x, self.pseudo)
            if len(args) > 1:
                args = (x, self._carried.mask, *args[2:])
            elif "attention_mask" in kwargs:
                kwargs["attention_mask"] = self._carried.mask
            if self.positions is not None:
                numbers = torch.arange(x.shape[1], device=x.device)[None]
                if self._positions is None:
                    self._positions = self.positions(x, numbers)
                kwargs["position_embeddings"] = self._positions
                if "position_ids" in kwargs:
                    kwargs["position_ids"] = numbers
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
        if self._carried is not None:
            x, self.pseudo = self._carried.part(x)
            output = with_first(output, x)
        if self.taps is None or (layer == self.last_layer and not self.ends_in_layer):
            return output
        if layer == self.last_layer:
            return with_first(output, self._end_taps(x))
        self._tap(layer, x)
        return output

    def after_stack(self, x: Tensor) -> Tensor:
        """What takes the place of the stack's output `x`.

        The last tap reads it where it can: on a pre-norm stack, that is the last layer's output after the final norm.
        """
        if self.taps is None:
            return x
        if self.ends_in_layer:
            self.taps.check()  # the last layer, and with it the end of the taps, may have been skipped
            return x
        return self._end_taps(x)

    def _tap(self, layer: int, x: Tensor) -> None:
        if self.taps is not None and layer in self.tap_of_layer:
            x = x.to(self.taps.shares.dtype)
            self.taps.add(self.tap_of_layer[layer], x.clone() if self.copy_taps else x)

    def _end_taps(self, x: Tensor) -> Tensor:
        assert self.taps is not None
        self._tap(self.last_layer, x)
        y = self.taps.result().to(x.dtype)
        return x + y if self.taps.adapter.residual else y

    def _mark(self, x: Tensor) -> None:
        # Transformers may report this very tensor as a hidden state; the mark says where its real frames are.
        if self.real:
            real = self.real if self.squeeze == 1 else tuple(frames.squeezed(self.squeeze) for frames in self.real)
            x._elp_real_frames = real  # pyright: ignore[reportAttributeAccessIssue]


_call: ContextVar[StackCall | None] = ContextVar("peft_elp_stack_call", default=None)
# torch.compile cannot trace a context variable. It traces in one thread at a time, and its graph has no variable.
_traced_call: StackCall | None = None


def current_call() -> StackCall | None:
    """The call of an encoder stack that is under way in this thread, None outside of one."""
    # Where layers are compiled one by one, or the graph breaks, the stack itself runs untraced.
    traced = _traced_call if torch.compiler.is_dynamo_compiling() else None
    return _call.get() if traced is None else traced


@contextmanager
def under_way(call: StackCall) -> Iterator[None]:
    """Make `call` the current one for the duration of a `with` block."""
    global _traced_call
    if torch.compiler.is_dynamo_compiling():
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
            if isinstance(value, tuple):
                output[key] = _trimmed(value)
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
