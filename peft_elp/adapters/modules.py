"""The three adapters, one formula each, in plain PyTorch.

Source: Inoue, Otake, Hirose, Ohi, Kawakami, "ELP-Adapters: Parameter Efficient Adapter Tuning for Various Speech
Processing Tasks" ([arXiv:2407.21066](https://arxiv.org/abs/2407.21066)), and its predecessor
([arXiv:2212.02780](https://arxiv.org/abs/2212.02780)).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .bottleneck import after_down
from .pseudo import RealFrames, end_of, row_places, start_of
from .recompute import run_again_in_backward
from .shapes import FrameMask, HiddenStates, JoinedMask, JoinedStates, LayerShares, TapFrames

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def _at_least_one(value: int, name: str, adapter: str) -> int:
    if value < 1:
        raise ValueError(f"An {adapter} needs a {name} of 1 or more, got {value}.")
    return value


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {name!r}; known are {', '.join(sorted(ACTIVATIONS))}.")
    return ACTIVATIONS[name]()


def _linear(in_features: int, out_features: int, init_std: float | None) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    if init_std is not None:
        nn.init.normal_(linear.weight, std=init_std)
        nn.init.zeros_(linear.bias)
    return linear


class EAdapter(nn.Module):
    """Encoder adapter: a residual bottleneck on the output of one feed-forward (or attention) module.

    Computes `E(z) = z + norm(up(dropout(activation(down(z)))))`, the E-adapter of Inoue et al. 2024
    ([arXiv:2407.21066](https://arxiv.org/abs/2407.21066)). With the paper's initialisation, the default, the branch
    enters `norm` so small that its `eps` of 1e-5 keeps it near zero: a fresh adapter is near the identity, not exactly
    it. With `init_std=None, norm_gain=0.0` it is exactly the identity.

    The backward pass computes what follows `down` again, so that a training step keeps `z` and the bottleneck only.

    Args:
        hidden_size: Width of the backbone's hidden states.
        bottleneck_size: Width between `down` and `up`, at least 1. The cost grows linearly with it.
        activation: A name from `ACTIVATIONS`.
        dropout: Probability, in training, that an element of the bottleneck is dropped.
        init_std: Standard deviation of the linear weights, biases being 0; None keeps PyTorch's initialisation.
        norm_gain: The weight of `norm` at the start.

    Shape:
        `(batch, frames, hidden)` to the same.

    Raises:
        ValueError: `bottleneck_size` is below 1, or `activation` is unknown.

    Examples:
        >>> EAdapter(hidden_size=768, bottleneck_size=256)(torch.zeros(2, 49, 768)).shape
        torch.Size([2, 49, 768])
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int = 256,
        activation: str = "gelu",
        dropout: float = 0.0,
        init_std: float | None = 1e-3,
        norm_gain: float = 1.0,
    ) -> None:
        super().__init__()
        _at_least_one(bottleneck_size, "bottleneck_size", "E-adapter")
        self.down = _linear(hidden_size, bottleneck_size, init_std)
        self.activation = _activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.up = _linear(bottleneck_size, hidden_size, init_std)
        self.norm = nn.LayerNorm(hidden_size)
        nn.init.constant_(self.norm.weight, norm_gain)

    def forward(self, z: HiddenStates) -> HiddenStates:
        return z + after_down(self.down(z), self.activation, self.dropout, self.up, self.norm)


class Tap(nn.Module):
    """What an L-adapter makes of one layer: `A_l = norm(dropout(activation(down(x))))`.

    With `input_norm`, `x` is normalised first, frame by frame and without parameters.

    Args:
        hidden_size: Width of the backbone's hidden states.
        tap_size: Width of the tap.
        activation: A name from `ACTIVATIONS`.
        dropout: Probability, in training, that an element is dropped before the norm.
        init_std: Standard deviation of the linear weights, biases being 0; None keeps PyTorch's initialisation.
        input_norm: Whether the input is normalised.

    Shape:
        `(batch, frames, hidden)` to `(batch, frames, tap)`.
    """

    input_norm: bool = False  # here as well, for taps that version 0.1 pickled

    def __init__(
        self,
        hidden_size: int,
        tap_size: int,
        activation: str,
        dropout: float,
        init_std: float | None,
        input_norm: bool = False,
    ) -> None:
        super().__init__()
        self.input_norm = input_norm
        self.down = _linear(hidden_size, tap_size, init_std)
        self.activation = _activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(tap_size)

    def forward(self, x: HiddenStates, share: Tensor | None = None, keep_input_only: bool = False) -> TapFrames:
        """`A_l`, times the weight of its layer if that is given.

        The backward pass computes what follows `down` again. With `keep_input_only` it computes all of it again: less
        memory where `x` is kept anyway, for another product with the matrix of `down`.
        """
        if keep_input_only:
            return run_again_in_backward(self._from_input, self.norm.weight, self.dropout, x, share)
        return self._from_input(x, share)

    def _from_input(self, x: HiddenStates, share: Tensor | None) -> TapFrames:
        h = self.down(nn.functional.layer_norm(x, x.shape[-1:]) if self.input_norm else x)
        return after_down(h, self.activation, self.dropout, None, self.norm, share)


class LAdapter(nn.Module):
    """Layer adapter: a path from every tapped layer to the head.

    Computes `Y = sum_l softmax(w)_l A_l`, with `A_l` a `Tap` of the output of layer `l`: the L-adapter of Inoue et al.
    2024 ([arXiv:2407.21066](https://arxiv.org/abs/2407.21066)). `w` starts uniform (1/N each). While an encoder runs,
    `TapSum` adds the taps as they come.

    Args:
        hidden_size: Width of the backbone's hidden states.
        num_taps: Number of tapped layers, at least 1.
        tap_size: Width of each tap and of `Y`, at least 1.
        activation: A name from `ACTIVATIONS`.
        dropout: Probability, in training, that an element of a tap is dropped before its norm.
        init_std: Standard deviation of the taps' linear weights, biases being 0; None keeps PyTorch's initialisation.
        output: "taps" gives `Y` as it is; "project" adds one linear layer from `tap_size` to `hidden_size` (PyTorch's
            initialisation: it stands in for the encoder's output, so it must not start near zero); "residual" adds one
            that starts at zero, for a sum with the encoder's own output.
        input_norm: Whether each tap normalises its input, frame by frame and without parameters: for layers whose
            outputs are not normalised.

    Shape:
        `num_taps` tensors `(batch, frames, hidden)` to `(batch, frames, tap)`, or `(batch, frames, hidden)` with an
        output layer.

    Raises:
        ValueError: A size is below 1, or `activation` or `output` is unknown.

    Examples:
        >>> adapter = LAdapter(hidden_size=768, num_taps=12)
        >>> adapter([torch.zeros(2, 49, 768)] * 12).shape
        torch.Size([2, 49, 512])
    """

    def __init__(
        self,
        hidden_size: int,
        num_taps: int,
        tap_size: int = 512,
        activation: str = "gelu",
        dropout: float = 0.0,
        init_std: float | None = 1e-3,
        output: str = "taps",
        input_norm: bool = False,
    ) -> None:
        super().__init__()
        _at_least_one(num_taps, "num_taps", "L-adapter")
        _at_least_one(tap_size, "tap_size", "L-adapter")
        if output not in ("taps", "project", "residual"):
            raise ValueError(f"An L-adapter's output is 'taps', 'project' or 'residual', got {output!r}.")
        self.taps = nn.ModuleList(
            Tap(hidden_size, tap_size, activation, dropout, init_std, input_norm) for _ in range(num_taps)
        )
        self.layer_weights = nn.Parameter(torch.full((num_taps,), 1 / num_taps))
        self.output = None if output == "taps" else nn.Linear(tap_size, hidden_size)
        self.residual = output == "residual"
        if self.output is not None and self.residual:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def shares(self) -> LayerShares:
        """The weight of each tapped layer in the sum: `softmax(w)`, positive and summing to 1."""
        return self.layer_weights.softmax(dim=0)

    def forward(self, layers: Iterable[HiddenStates]) -> Tensor:
        taps = TapSum(self)
        for tap, x in enumerate(layers):
            taps.add(tap, x)
        return taps.result()


class TapSum:
    """The sum of one L-adapter over one pass through an encoder, tap by tap, so that no stack of layers is ever held.

    Args:
        adapter: The L-adapter whose taps are summed.
        keep_inputs_only: Passed to each tap: whether a training step keeps nothing of it but its input.

    Raises:
        RuntimeError: From `check()` and `result()`, where a tap was not added exactly once.
    """

    def __init__(self, adapter: LAdapter, keep_inputs_only: bool = False) -> None:
        self.adapter = adapter
        self.keep_inputs_only = keep_inputs_only
        self.shares = adapter.shares()
        self.seen: list[int] = []
        self.total: Tensor | None = None

    def add(self, tap: int, x: HiddenStates) -> None:
        """Add the tap with number `tap` (0-based, among the tapped layers) of hidden states `x`."""
        term = self.adapter.taps[tap](x, self.shares[tap], self.keep_inputs_only)
        self.total = term if self.total is None else self.total + term
        self.seen.append(tap)

    def check(self) -> None:
        """Raise unless each tap was added exactly once."""
        expected = len(self.adapter.taps)
        if sorted(self.seen) != list(range(expected)):
            raise RuntimeError(
                f"An L-adapter with {expected} taps was given taps {self.seen} in one pass: some layers did not run, "
                "or not through the wrappers around them. A layer that is skipped in training (LayerDrop) has no tap: "
                "leave the backbone's layerdrop at 0 while an L-adapter is active."
            )

    def result(self) -> Tensor:
        """`Y`, through the output layer where the adapter has one."""
        self.check()
        assert self.total is not None
        return self.total if self.adapter.output is None else self.adapter.output(self.total)


class PAdapter(nn.Module):
    """Prompt adapter: learned pseudo features next to the CNN features of every utterance.

    Computes `[X_0 ; P]` along time with a trained `P: (length, hidden)`, rows drawn from N(0, init_std^2): the
    P-adapter of Inoue et al. 2024 ([arXiv:2407.21066](https://arxiv.org/abs/2407.21066)). In a padded batch the rows
    follow each utterance's own last valid frame, so that the length a batch is padded to changes nothing. In a
    pre-norm encoder the first norm brings the rows to full size unless `init_std` is far below the root of its `eps`,
    0.003. Rows of exactly 0 would stay equal to one another where they have no positions, as in Whisper.

    Args:
        hidden_size: Width of the backbone's hidden states.
        length: Number of pseudo features, at least 1.
        position: "append" puts them after the last valid frame of each utterance, "prepend" before its first.
        init_std: Standard deviation of the rows.

    Shape:
        `(batch, frames, hidden)` and, if given, the mask `(batch, frames)` (non-zero: valid) to the same with `length`
        more frames; the mask keeps its dtype. With a `squeeze` above 1, for an encoder that takes so many frames as
        one, the rows start at a multiple of it, behind padding where there is need.

    Raises:
        ValueError: `length` is below 1, or `position` is unknown.

    Examples:
        >>> joined, mask, real = PAdapter(hidden_size=768, length=16)(torch.zeros(2, 49, 768))
        >>> joined.shape, real.of(joined).shape
        (torch.Size([2, 65, 768]), torch.Size([2, 49, 768]))
    """

    def __init__(self, hidden_size: int, length: int = 16, position: str = "append", init_std: float = 0.02) -> None:
        super().__init__()
        _at_least_one(length, "length", "P-adapter")
        if position not in ("append", "prepend"):
            raise ValueError(f"A P-adapter's position is 'append' or 'prepend', got {position!r}.")
        self.position = position
        self.rows = nn.Parameter(torch.empty(length, hidden_size))
        nn.init.normal_(self.rows, std=init_std)

    def forward(
        self, x: HiddenStates, mask: FrameMask | None = None, squeeze: int = 1
    ) -> tuple[JoinedStates, JoinedMask | None, RealFrames]:
        batch, frames, _ = x.shape
        length = self.rows.shape[0]
        rows = self.rows.to(x).expand(batch, -1, -1)
        if self.position == "prepend" and mask is None:
            return torch.cat([rows, x], dim=1), None, RealFrames(frames + length, None, length, frames)
        padding = -frames % squeeze if self.position == "append" else 0
        joined = torch.cat([nn.functional.pad(x, (0, 0, 0, padding)), rows], dim=1)
        if mask is None:
            return joined, None, RealFrames(frames + padding + length, None, 0, frames)
        mask = nn.functional.pad(mask, (0, padding))
        begin = end_of(mask, squeeze) if self.position == "append" else start_of(mask, squeeze)
        source, real, _ = row_places(begin, frames + padding, length, length)
        joined = joined.gather(1, source.unsqueeze(-1).expand_as(joined))
        joined_mask = torch.cat([mask, mask.new_ones(batch, length)], dim=1).gather(1, source)
        return joined, joined_mask, RealFrames(joined.shape[1], real[:, :frames], 0, frames)
