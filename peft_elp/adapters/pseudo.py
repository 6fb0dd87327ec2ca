"""Index arithmetic of pseudo features: where they are put among the frames, and where the frames end up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .shapes import FrameIndex, FrameMask, HiddenStates, JoinedIndex, JoinedMask, JoinedStates


@dataclass(frozen=True)
class RealFrames:
    """Positions of the real frames among frames and pseudo features."""

    joined: int  # number of frames and pseudo features together
    index: Tensor | None  # position of each real frame, `(batch, frames)`; None if the same in all utterances:
    start: int  # position of the first real frame
    frames: int  # number of real frames

    def of(self, x: JoinedStates) -> HiddenStates:
        """Return the real frames of `x`: `(batch, joined, width)` to `(batch, frames, width)`."""
        if self.index is None:
            return x[:, self.start : self.start + self.frames]
        return x.gather(1, self.index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def squeezed(self, factor: int) -> RealFrames:
        """Return the positions after an encoder has merged each `factor` frames into one."""
        frames = self.frames // factor
        index = None if self.index is None else self.index[:, ::factor][:, :frames] // factor
        return RealFrames(self.joined // factor, index, self.start // factor, frames)


@dataclass(frozen=True)
class Carried:
    """Positions of pseudo features that are carried through the encoder layers beside the frames."""

    real: RealFrames
    # For each position, which of `[frames ; pseudo features]` is put there, `(batch, joined)`; the position of each
    # pseudo feature, `(batch, rows)`. None if they stay behind the frames.
    source: Tensor | None
    rows: Tensor | None
    mask: Tensor | None  # of frames and pseudo features, `(batch, heads, queries, keys)`

    @classmethod
    def beside(cls, x: Tensor, pseudo: Tensor, counts: Tensor | None, mask: Any) -> Carried:
        """Put pseudo features after the last valid frame of each utterance, one that the first frame may attend to.

        Takes frames `(batch, frames, hidden)`, pseudo features `(rows, hidden)` or `(batch, rows, hidden)`, how many
        each utterance has, `(batch, 1)` (None: all), and the mask of the frames, boolean, additive or None.
        """
        (batch, frames, _), length = x.shape, pseudo.shape[-2]
        if mask is None:
            if counts is None:
                return cls(RealFrames(frames + length, None, 0, frames), None, None, None)
            mask = x.new_zeros(batch, 1, 1, frames)
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise ValueError(
                f"This encoder's attention mask, a {type(mask).__name__}, cannot be extended by pseudo features. "
                "Use attn_implementation='sdpa' or 'eager', or leave P out of adapters."
            )
        boolean = mask.dtype == torch.bool
        seen = mask[:, 0, 0] if boolean else mask[:, 0, 0] == 0
        source, real, rows = row_places(
            end_of(seen.expand(batch, -1)), frames, length, length if counts is None else counts
        )
        mask = mask.expand(batch, -1, -1, -1)
        # All queries attend to the pseudo features, except queries in padding that attend to nothing at all.
        sight = mask.any(dim=-1, keepdim=True) if boolean else mask.new_zeros(*mask.shape[:-1], 1)
        sight = sight.expand(*mask.shape[:-1], length)
        if counts is not None:
            other = (torch.arange(length, device=x.device) >= counts)[:, None, None]
            sight = sight.masked_fill(other, False if boolean else torch.finfo(mask.dtype).min)
        mask = torch.cat([mask, sight], dim=-1)
        mask = mask.gather(-1, source[:, None, None].expand(-1, *mask.shape[1:-1], -1))
        if mask.shape[-2] > 1:
            mask = torch.cat([mask, mask[:, :, :1].expand(-1, -1, length, -1)], dim=-2)
            mask = mask.gather(-2, source[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
        return cls(RealFrames(frames + length, real, 0, frames), source, rows, mask)

    def join(self, x: Tensor, pseudo: Tensor) -> Tensor:
        """Join the frames with the pseudo features."""
        pseudo = pseudo.to(x)
        joined = torch.cat([x, pseudo if pseudo.dim() == 3 else pseudo.expand(x.shape[0], -1, -1)], dim=1)
        return joined if self.source is None else joined.gather(1, self.source[:, :, None].expand_as(joined))

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """Split the result of `join`, or the output of a layer for it, into frames and pseudo features."""
        if self.rows is None:
            return self.real.of(joined), joined[:, self.real.frames :]
        return self.real.of(joined), joined.gather(1, self.rows[:, :, None].expand(-1, -1, joined.shape[-1]))


def join_each(
    x: HiddenStates,
    mask: FrameMask | None,
    rows: Float[Tensor, "batch rows hidden"],
    counts: Int[Tensor, "batch 1"],
    before: Bool[Tensor, "batch 1"],
    squeeze: int = 1,
) -> tuple[JoinedStates, JoinedMask, RealFrames]:
    """Join each utterance of a batch with pseudo features of its own: `counts` of its `rows`, the rest is padding.

    They come before the first valid frame of the utterance where `before` says so, else after the last. The other
    arguments and the results are those of `PAdapter`.
    """
    frames = x.shape[1]
    padding = -frames % squeeze
    x = nn.functional.pad(x, (0, 0, 0, padding))
    if mask is None:  # Then the padding between the frames and the pseudo features counts as frames.
        mask = torch.arange(frames + padding, device=x.device) < torch.where(counts > 0, frames + padding, frames)
    else:
        mask = nn.functional.pad(mask, (0, padding))
    begin = torch.where(before, start_of(mask, squeeze), end_of(mask, squeeze))
    source, real, _ = row_places(begin, frames + padding, rows.shape[1], counts)
    joined = torch.cat([x, rows.to(x)], dim=1)
    joined = joined.gather(1, source.unsqueeze(-1).expand_as(joined))
    own = (torch.arange(rows.shape[1], device=x.device) < counts).to(mask.dtype)
    joined_mask = torch.cat([mask, own], dim=1).gather(1, source)
    return joined, joined_mask, RealFrames(joined.shape[1], real[:, :frames], 0, frames)


def start_of(mask: FrameMask, squeeze: int = 1) -> Int[Tensor, "batch 1"]:
    """Return the last multiple of `squeeze` that is not after the first valid frame of each utterance.

    Examples:
        >>> start_of(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist()
        [[0], [1]]
    """
    return (mask != 0).to(torch.long).argmax(dim=1, keepdim=True) // squeeze * squeeze


def end_of(mask: FrameMask, squeeze: int = 1) -> Int[Tensor, "batch 1"]:
    """Return the first multiple of `squeeze` that is after the last valid frame of each utterance.

    Examples:
        >>> end_of(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist()
        [[2], [3]]
    """
    step = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    valid = torch.where(mask != 0, step, 0).amax(dim=1, keepdim=True)
    return (valid + squeeze - 1) // squeeze * squeeze


def row_places(
    begin: Int[Tensor, "batch 1"], frames: int, length: int, counts: Int[Tensor, "batch 1"] | int
) -> tuple[JoinedIndex, FrameIndex, Int[Tensor, "batch rows"]]:
    """Return indices that move pseudo features from behind the frames to a position among them.

    Args:
        begin: Position of the first pseudo feature of each utterance.
        frames: Number of frames.
        length: Number of pseudo features behind the frames.
        counts: How many of them are moved. The others stay at the end.

    Returns:
        Three tensors. `(batch, frames + length)`: for each position, which of `[frames ; pseudo features]` is put
        there. `(batch, frames)`: the position of each frame. `(batch, length)`: the position of each pseudo feature.

    Examples:
        >>> source, frames, rows = row_places(torch.tensor([[2]]), frames=3, length=2, counts=2)
        >>> source.tolist(), frames.tolist(), rows.tolist()
        ([[0, 1, 3, 4, 2]], [[0, 1, 4]], [[2, 3]])
    """
    position = torch.arange(frames + length, device=begin.device)
    step, row = position[:frames], position[:length]
    shifted = torch.where(position < frames + counts, position - counts, position)
    inserted = torch.where(position < begin + counts, position - begin + frames, shifted)
    source = torch.where(position < begin, position, inserted)
    real = torch.where(step < begin, step, step + counts)
    return source, real, torch.where(row < counts, begin + row, frames + row)
