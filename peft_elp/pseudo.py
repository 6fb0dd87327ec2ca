"""Index arithmetic of pseudo features: where they join the frames of a batch, and where the frames are then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .shapes import FrameIndex, FrameMask, HiddenStates, JoinedIndex, JoinedMask, JoinedStates


@dataclass(frozen=True)
class RealFrames:
    """Where the frames of the utterances are among all frames, once pseudo features have joined them.

    Args:
        joined: Number of frames with the pseudo features.
        index: The place of each real frame, `(batch, frames)`, where it differs between utterances; else None.
        start: Place of the first real frame, where `index` is None.
        frames: Number of real frames.
    """

    joined: int
    index: Tensor | None
    start: int
    frames: int

    def of(self, x: JoinedStates) -> HiddenStates:
        """The real frames of `x`: `(batch, joined, width)` to `(batch, frames, width)`."""
        if self.index is None:
            return x[:, self.start : self.start + self.frames]
        return x.gather(1, self.index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def squeezed(self, factor: int) -> RealFrames:
        """The same at a rate where `factor` frames count as one."""
        frames = self.frames // factor
        index = None if self.index is None else self.index[:, ::factor][:, :frames] // factor
        return RealFrames(self.joined // factor, index, self.start // factor, frames)


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
    def beside(cls, x: Tensor, pseudo: Tensor, counts: Tensor | None, mask: Any) -> Carried:
        """Behind each utterance's last valid frame, which the first frame's row of the attention mask tells.

        Args:
            x: The frames, `(batch, frames, hidden)`.
            pseudo: The pseudo features, `(rows, hidden)` or `(batch, rows, hidden)`.
            counts: How many of them each utterance has, `(batch, 1)`; None: all.
            mask: The attention mask of the frames, boolean or additive, or None.

        Raises:
            ValueError: The mask is of a kind that cannot be extended.
        """
        (batch, frames, _), length = x.shape, pseudo.shape[-2]
        if mask is None:
            if counts is None:
                return cls(RealFrames(frames + length, None, 0, frames), None, None, None)
            mask = x.new_zeros(batch, 1, 1, frames)
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise ValueError(
                "Pseudo features are carried through the layers of this encoder, and its attention mask is a "
                f"{type(mask).__name__} that cannot be extended. Use attn_implementation='sdpa' or 'eager', or leave "
                "P out of adapters."
            )
        boolean = mask.dtype == torch.bool
        seen = mask[:, 0, 0] if boolean else mask[:, 0, 0] == 0
        source, real, rows = row_places(
            end_of(seen.expand(batch, -1)), frames, length, length if counts is None else counts
        )
        mask = mask.expand(batch, -1, -1, -1)
        # All queries see the pseudo features, but those of padding that see nothing at all.
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
        """Frames and pseudo features in their places."""
        pseudo = pseudo.to(x)
        joined = torch.cat([x, pseudo if pseudo.dim() == 3 else pseudo.expand(x.shape[0], -1, -1)], dim=1)
        return joined if self.source is None else joined.gather(1, self.source[:, :, None].expand_as(joined))

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """Frames, and pseudo features."""
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
    """Join each utterance of a batch with pseudo features of its own, as `PAdapter` joins all with the same.

    Args:
        x: The frames, `(batch, frames, hidden)`.
        mask: Which of them are valid, or None.
        rows: For each utterance, as many pseudo features as the one with the most has.
        counts: How many of them are its own; the others are masked.
        before: Whether they come before its first frame, rather than after its last valid one.
        squeeze: How many frames the encoder takes as one.

    Returns:
        As `PAdapter` does, always with a mask.
    """
    frames = x.shape[1]
    padding = -frames % squeeze
    x = nn.functional.pad(x, (0, 0, 0, padding))
    if mask is None:  # without one, what follows the frames up to the pseudo features counts as frames
        mask = torch.arange(frames + padding, device=x.device) < torch.where(counts > 0, frames + padding, frames)
    else:
        mask = nn.functional.pad(mask, (0, padding))
    begin = torch.where(before, 0, end_of(mask, squeeze))
    source, real, _ = row_places(begin, frames + padding, rows.shape[1], counts)
    joined = torch.cat([x, rows.to(x)], dim=1)
    joined = joined.gather(1, source.unsqueeze(-1).expand_as(joined))
    own = (torch.arange(rows.shape[1], device=x.device) < counts).to(mask.dtype)
    joined_mask = torch.cat([mask, own], dim=1).gather(1, source)
    return joined, joined_mask, RealFrames(joined.shape[1], real[:, :frames], 0, frames)


def end_of(mask: FrameMask, squeeze: int = 1) -> Int[Tensor, "batch 1"]:
    """The first place behind each utterance's last valid frame that is a multiple of `squeeze`."""
    step = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    valid = torch.where(mask != 0, step, 0).amax(dim=1, keepdim=True)
    return (valid + squeeze - 1) // squeeze * squeeze


def row_places(
    begin: Int[Tensor, "batch 1"], frames: int, length: int, counts: Int[Tensor, "batch 1"] | int
) -> tuple[JoinedIndex, FrameIndex, Int[Tensor, "batch rows"]]:
    """Indices that move rows from the end of a batch in between each utterance's frames.

    Args:
        begin: Where the first row of each utterance goes.
        frames: Number of frames.
        length: Number of rows at the end of the batch.
        counts: How many of them move; the others stay.

    Returns:
        `(batch, frames + length)`: for each place, which of `[frames ; rows]` goes there; `(batch, frames)`: for each
        frame, its place; `(batch, length)`: for each row, its place.
    """
    place = torch.arange(frames + length, device=begin.device)
    step, row = place[:frames], place[:length]
    shifted = torch.where(place < frames + counts, place - counts, place)
    source = torch.where(place < begin, place, torch.where(place < begin + counts, place - begin + frames, shifted))
    real = torch.where(step < begin, step, step + counts)
    return source, real, torch.where(row < counts, begin + row, frames + row)
