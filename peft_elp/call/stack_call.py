"""What the layers of one encoder share during one call: the running sum of taps, and where the real frames are.

The state lives in a context variable from the start of a stack's call to its end, so two threads that share a model do
not meet, and nothing outlives the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_elp.adapters import TapSum
from peft_elp.pseudo import Carried, RealFrames

from .context import Current
from .outputs import hidden_states_of, with_hidden_states
from .shared_pass import SharedPass


@dataclass
class Reader:
    """The running sum of one L-adapter during one call.

    Args:
        sum: The sum.
        of_layer: For each tapped layer, its number among the taps.
        rows: Which utterances of a batch the adapter serves; None: all.
        task: The task that it serves, where several share a pass.
    """

    sum: TapSum
    of_layer: dict[int, int]
    rows: Callable[[Tensor], Tensor] | None = None
    task: str = ""

    def read(self, layer: int, x: Tensor, copy: bool) -> None:
        """Add the tap of a layer with output `x`, if it has one."""
        if layer in self.of_layer:
            # The layer may be on another device than the adapter.
            x = (x if self.rows is None else x[self.rows(x)]).to(self.sum.shares)
            self.sum.add(self.of_layer[layer], x.clone() if copy else x)

    def end(self, x: Tensor) -> Tensor:
        """What the adapter puts in place of the encoder's output `x`, for its rows."""
        y = self.sum.result().to(x)
        return (x if self.rows is None else x[self.rows(x)]) + y if self.sum.adapter.residual else y


@dataclass
class StackCall:
    """One call of one encoder stack.

    Args:
        taps: The running sums of the L-adapters at work: of one, of one for each part of a mixed batch, or of one for
            each task that shares the pass.
        shared: What tasks share that share the pass, or None.
        last_layer: Number of the stack's last layer.
        ends_in_layer: Whether the sum of taps replaces the output of the last layer, rather than that of the stack.
        copy_taps: Whether the stack writes into the outputs of its layers.
        real: Where the real frames are in the stack's input, for each active P-adapter in the order of joining.
        squeeze: How many frames of the stack's input the layers take as one.
        pseudo: Pseudo features that are carried through the layers: `(rows, hidden)` before the first of them,
            `(batch, rows, hidden)` from then on. None where there are none, or where they joined the stack's input.
        counts: How many of them each utterance has, `(batch, 1)`; None: all.
        positions: Computes what the layers know of positions, from hidden states `(batch, frames, hidden)` and the
            numbers of their frames, `(1, frames)`. None where the layers know nothing of them.
        needs_gradient: Whether a layer loses the gradients of what is inside it unless its input requires one.
    """

    taps: tuple[Reader, ...] = ()
    shared: SharedPass | None = None
    last_layer: int = 0
    ends_in_layer: bool = False
    copy_taps: bool = False
    real: tuple[RealFrames, ...] = ()
    squeeze: int = 1
    pseudo: Tensor | None = None
    counts: Tensor | None = None
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
                mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
                self._carried = Carried.beside(x, self.pseudo, self.counts, mask)
                if self._carried.mask is not None and len(args) < 2 and "attention_mask" not in kwargs:
                    raise ValueError(
                        "The layers of this encoder take no attention mask, so that utterances with different numbers "
                        "of pseudo features cannot share a batch. Split it by adapter."
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
        x = hidden_states_of(output)
        self._mark(x)
        if self._carried is not None:
            x, self.pseudo = self._carried.split(x)
            output = with_hidden_states(output, x)
        if layer < self.last_layer:
            for taps in self.taps:
                taps.read(layer, x, self.copy_taps)
        elif self.ends_in_layer and self._has_ends():
            output = with_hidden_states(output, self._end_taps(x))
        return output

    def after_stack(self, x: Tensor) -> Tensor:
        """What takes the place of the stack's output `x`.

        The last tap reads it where it can: on a pre-norm stack, that is the last layer's output after the final norm.
        """
        if self.ends_in_layer:
            for taps in self.taps:
                taps.sum.check()  # the last layer, and with it the end of the taps, may have been skipped
            return x
        return self._end_taps(x) if self._has_ends() else x

    def _has_ends(self) -> bool:
        return bool(self.taps) or (self.shared is not None and bool(self.shared.ends))

    def _end_taps(self, x: Tensor) -> Tensor:
        for taps in self.taps:
            taps.read(self.last_layer, x, self.copy_taps)
        if self.shared is not None:
            self.shared.ends |= {taps.task: taps.end(x) for taps in self.taps}
            return self.shared.ends[self.shared.task]
        if self.taps[0].rows is None:
            return self.taps[0].end(x)
        # A head whose first layer was re-made reads the features that are its own; the rest of them is padding.
        ends = [(taps.rows(x), taps.end(x)) for taps in self.taps if taps.rows is not None]
        width = max([x.shape[-1], *(end.shape[-1] for _, end in ends)])
        y = nn.functional.pad(x, (0, width - x.shape[-1]))
        for rows, end in ends:
            y = y.index_copy(0, rows, nn.functional.pad(end, (0, width - end.shape[-1])))
        return y

    def _mark(self, x: Tensor) -> None:
        # Transformers may report this very tensor as a hidden state; the mark says where its real frames are.
        if self.real:
            real = self.real if self.squeeze == 1 else tuple(frames.squeezed(self.squeeze) for frames in self.real)
            x._elp_real_frames = real  # pyright: ignore[reportAttributeAccessIssue]


current_call: Current[StackCall] = Current("peft_elp_stack_call")
