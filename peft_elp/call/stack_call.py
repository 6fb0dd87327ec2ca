"""What the layers of one encoder share during one call: the running sum of taps, and where the real frames are.

The state is kept in a context variable from the start of a stack's call to its end. Threads that share a model do not
see each other's state, and nothing of it is left after the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_elp.adapters import TapSum
from peft_elp.adapters.pseudo import Carried, RealFrames

from .context import CallVariable
from .outputs import another, hidden_states_of, with_hidden_states
from .shared_pass import SharedPass


@dataclass
class TapReader:
    """The running sum of one L-adapter during one call."""

    sum: TapSum
    of_layer: dict[int, int]  # for each tapped layer, its number among the taps
    indices: Callable[[Tensor], Tensor] | None = None  # of the utterances that the adapter serves; None: all
    task: str = ""  # that the adapter serves, if several share a pass

    def read(self, layer: int, x: Tensor, copy: bool) -> None:
        """Add the tap of a layer with output `x`, if it has one."""
        if layer in self.of_layer:
            # The layer may be on another device than the adapter.
            x = self._served(x).to(self.sum.shares)
            self.sum.add(self.of_layer[layer], x.clone() if copy else x)

    def end(self, x: Tensor) -> Tensor:
        """Return what replaces the encoder's output `x` for the utterances that the adapter serves."""
        y = self.sum.result().to(x)
        return self._served(x) + y if self.sum.adapter.residual else y

    def _served(self, x: Tensor) -> Tensor:
        return x if self.indices is None else x[self.indices(x)]


@dataclass
class StackCall:
    """One call of one encoder stack."""

    readers: tuple[TapReader, ...] = ()  # several if a batch mixes adapters, or if tasks share the pass
    shared: SharedPass | None = None
    last_layer: int = 0  # number of the stack's last layer
    last_run: int = 0  # number of the last layer that runs; nothing reads the layers after it
    ends_in_layer: bool = False  # whether the sum of taps replaces the output of the last layer, not of the stack
    copy_taps: bool = False  # whether the stack writes into the outputs of its layers
    real: tuple[RealFrames, ...] = ()  # in the stack's input, for each P-adapter in the order of joining
    squeeze: int = 1  # how many frames of the stack's input the layers take as one
    # Pseudo features that are carried through the layers: `(rows, hidden)` before the first layer, `(batch, rows,
    # hidden)` after it. None if there are none, or if they joined the stack's input.
    pseudo: Tensor | None = None
    counts: Tensor | None = None  # how many of them each utterance has, `(batch, 1)`; None if it has all
    # The position embeddings that the layers take, from hidden states and the numbers of their frames, `(1, frames)`.
    positions: Callable[[Tensor, Tensor], Any] | None = None
    needs_gradient: bool = False  # whether a layer's adapters get none unless its input requires one
    _carried: Carried | None = None
    _positions: Any = None
    _last_output: Any = None

    def before_layer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Join the pseudo features that are carried through the layers with the frames in a layer's arguments."""
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
                        "The layers of this encoder take no attention mask, so utterances with different numbers of "
                        "pseudo features cannot share a batch. Call the model once per adapter."
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

    def skipped(self, x: Tensor) -> Any:
        """Return what stands for the output of a layer that does not run: its input, in the form of an output."""
        return another(self._last_output, x)

    def after_layer(self, layer: int, output: Any) -> Any:
        """Split the pseudo features off a layer's output, and read it for the L-adapters."""
        x = hidden_states_of(output)
        self._mark(x)
        if layer == self.last_run:
            self._last_output = output
        if self._carried is not None:
            x, self.pseudo = self._carried.split(x)
            output = with_hidden_states(output, x)
        if layer < self.last_layer:
            for reader in self.readers:
                reader.read(layer, x, self.copy_taps)
        elif self.ends_in_layer and self._has_ends():
            output = with_hidden_states(output, self._end_taps(x))
        return output

    def after_stack(self, x: Tensor) -> Tensor:
        """Return what replaces the stack's output `x`.

        The last tap reads `x`, unless the taps end in the last layer. On a pre-norm stack, `x` is the last layer's
        output after the final norm.
        """
        if self.ends_in_layer:
            for reader in self.readers:
                reader.sum.check()  # The last layer, where the taps end, may have been skipped.
            return x
        return self._end_taps(x) if self._has_ends() else x

    def _has_ends(self) -> bool:
        return bool(self.readers) or (self.shared is not None and bool(self.shared.ends))

    def _end_taps(self, x: Tensor) -> Tensor:
        for reader in self.readers:
            reader.read(self.last_layer, x, self.copy_taps)
        if self.shared is not None:
            self.shared.ends |= {reader.task: reader.end(x) for reader in self.readers}
            return self.shared.ends[self.shared.task]
        if self.readers[0].indices is None:
            return self.readers[0].end(x)
        # A head whose first layer was re-made reads as many features as that layer takes. The others are padding.
        ends = [(reader.indices(x), reader.end(x)) for reader in self.readers if reader.indices is not None]
        width = max([x.shape[-1], *(end.shape[-1] for _, end in ends)])
        y = nn.functional.pad(x, (0, width - x.shape[-1]))
        for indices, end in ends:
            y = y.index_copy(0, indices, nn.functional.pad(end, (0, width - end.shape[-1])))
        return y

    def _mark(self, x: Tensor) -> None:
        # Transformers may report this tensor as a hidden state. The mark tells `trim_hidden_states` where its real
        # frames are.
        if self.real:
            real = self.real if self.squeeze == 1 else tuple(frames.squeezed(self.squeeze) for frames in self.real)
            x._elp_real_frames = real  # pyright: ignore[reportAttributeAccessIssue]


current_call: CallVariable[StackCall] = CallVariable("peft_elp_stack_call")
