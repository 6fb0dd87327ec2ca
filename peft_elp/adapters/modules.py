"""The three adapters, one formula each, in plain PyTorch.

Source: Inoue, Otake, Hirose, Ohi, Kawakami, "ELP-Adapters: Parameter Efficient Adapter Tuning for Various Speech
Processing Tasks" ([arXiv:2407.21066](https://arxiv.org/abs/2407.21066)), and its predecessor
([arXiv:2212.02780](https://arxiv.org/abs/2212.02780)).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint

from .pseudo import RealFrames, end_of, row_places, start_of
from .shapes import FrameMask, HiddenStates, JoinedMask, JoinedStates, LayerWeights, TapFrames

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _require_one_of(name: str, value: str, options: Iterable[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}.")


def _activation(name: str) -> nn.Module:
    _require_one_of("activation", name, ACTIVATIONS)
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
    ([arXiv:2407.21066](https://arxiv.org/abs/2407.21066)). With the paper's initialisation, the default, the input of
    `norm` is so small that its `eps` of 1e-5 keeps the branch near zero: a fresh adapter is nearly the identity. With
    `init_std=None, norm_gain=0.0` it is exactly the identity.

    Args:
        hidden_size: Width of the backbone's hidden states.
        bottleneck_size: Width between `down` and `up`, at least 1. The cost grows linearly with it.
        activation: A name from `ACTIVATIONS`.
        dropout: Probability, in training, that an element of the bottleneck is dropped.
        init_std: Standard deviation of the initial linear weights, with biases of 0. None keeps PyTorch's
            initialisation.
        norm_gain: Initial weight of `norm`.

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
        _require_positive("bottleneck_size", bottleneck_size)
        self.down = _linear(hidden_size, bottleneck_size, init_std)
        self.activation = _activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.up = _linear(bottleneck_size, hidden_size, init_std)
        self.norm = nn.LayerNorm(hidden_size)
        nn.init.constant_(self.norm.weight, norm_gain)

    def forward(self, z: HiddenStates) -> HiddenStates:
        return z + self.norm(self.up(self.dropout(self.activation(self.down(z)))))


class _WeightedNorm(nn.LayerNorm):
    """Layer norm times a layer weight, multiplied into its parameters so that the graph need not keep the output."""

    def forward(self, input: TapFrames, layer_weight: Tensor | None = None) -> TapFrames:
        if layer_weight is None:
            return super().forward(input)
        weight, bias = layer_weight * self.weight, layer_weight * self.bias
        return layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class Tap(nn.Module):
    """Transform of the hidden states of one layer in an L-adapter: `A_l = norm(dropout(activation(down(x))))`.

    With `input_norm`, `x` is first normalised per frame, without parameters. A tap of size 0 has no parameters: it is
    the normalised `x` itself. The arguments are those of `LAdapter`.

    Shape:
        `(batch, frames, hidden)` to `(batch, frames, tap)`, or to the same with a size of 0.
    """

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
        self.tap_size = tap_size
        self.input_norm = input_norm or not tap_size
        if tap_size:
            self.down = _linear(hidden_size, tap_size, init_std)
            self.activation = _activation(activation)
            self.dropout = nn.Dropout(dropout)
            self.norm = _WeightedNorm(tap_size)

    def forward(self, x: HiddenStates, layer_weight: Tensor | None = None) -> TapFrames:
        """Return `A_l`, multiplied by the layer weight if that is given."""
        if self.input_norm:
            x = layer_norm(x, x.shape[-1:])
        if not self.tap_size:
            return x if layer_weight is None else layer_weight * x
        return self.norm(self.dropout(self.activation(self.down(x))), layer_weight)


class LAdapter(nn.Module):
    """Layer adapter: a path from every tapped layer to the head.

    Computes `Y = sum_l softmax(w)_l A_l`, with `A_l` a `Tap` of the output of layer `l`: the L-adapter of Inoue et al.
    2024 ([arXiv:2407.21066](https://arxiv.org/abs/2407.21066)). `softmax(w)` are the layer weights; `w`, the layer
    logits, start uniform. While an encoder runs, `TapSum` adds the taps one by one.

    Args:
        hidden_size: Width of the backbone's hidden states.
        num_taps: Number of tapped layers, at least 1.
        tap_size: Width of each tap and of `Y`. 0: the taps are the normalised layers, and `Y` is as wide as they are.
        activation: A name from `ACTIVATIONS`.
        dropout: Probability, in training, that an element of a tap is dropped before its norm.
        init_std: Standard deviation of the taps' initial linear weights, with biases of 0. None keeps PyTorch's
            initialisation.
        output: "taps" returns `Y` itself. "project" applies a linear layer from `tap_size` to `hidden_size`, with
            PyTorch's initialisation, because it replaces the encoder's output. "residual" applies one that starts at
            zero, because its result is added to the encoder's output.
        input_norm: Whether each tap normalises its input per frame, without parameters: for layers whose outputs are
            not normalised.

    Shape:
        `num_taps` tensors `(batch, frames, hidden)` to `(batch, frames, tap)`, or `(batch, frames, hidden)` with an
        output layer.

    Raises:
        ValueError: A size is out of range, or `activation` or `output` is unknown.

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
        _require_positive("num_taps", num_taps)
        if tap_size < 0:
            raise ValueError(f"tap_size must be at least 0, got {tap_size}.")
        _require_one_of("output", output, ("taps", "project", "residual"))
        self.taps = nn.ModuleList(
            Tap(hidden_size, tap_size, activation, dropout, init_std, input_norm) for _ in range(num_taps)
        )
        # The layer logits. Saved adapters hold them under this name.
        self.layer_weights = nn.Parameter(torch.full((num_taps,), 1 / num_taps))
        self.output = None if output == "taps" else nn.Linear(tap_size or hidden_size, hidden_size)
        self.residual = output == "residual"
        if self.output is not None and self.residual:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def shares(self) -> LayerWeights:
        """Return the layer weights `softmax(w)`: each tap's share in the sum, positive and adding up to 1."""
        return self.layer_weights.softmax(dim=0)

    def forward(self, layers: Iterable[HiddenStates]) -> Tensor:
        taps = TapSum(self)
        for tap, x in enumerate(layers):
            taps.add(tap, x)
        return taps.result()


class TapSum:
    """Add up the taps of one L-adapter while an encoder runs, so that no stack of hidden states is held.

    Args:
        adapter: The L-adapter.
        keep_inputs_only: Whether the graph keeps only the inputs of the taps, and the backward pass computes the taps
            again. This saves memory where the graph keeps the inputs anyway, as with gradient checkpointing.

    Raises:
        RuntimeError: From `check()` and `result()`, if a tap was not added exactly once.
    """

    def __init__(self, adapter: LAdapter, keep_inputs_only: bool = False) -> None:
        self.adapter = adapter
        self.keep_inputs_only = keep_inputs_only
        self.shares = adapter.shares()
        self.seen: list[int] = []
        self.total: Tensor | None = None

    def add(self, tap: int, x: HiddenStates) -> None:
        """Add the tap with number `tap` (0-based, among the tapped layers) of hidden states `x`."""
        module, share = self.adapter.taps[tap], self.shares[tap]
        term: Any = checkpoint(module, x, share, use_reentrant=False) if self.keep_inputs_only else module(x, share)
        self.total = term if self.total is None else self.total + term
        self.seen.append(tap)

    def check(self) -> None:
        """Check that each tap was added exactly once."""
        expected = len(self.adapter.taps)
        if sorted(self.seen) != list(range(expected)):
            raise RuntimeError(
                f"An L-adapter must read each of its {expected} layers once per call, but it read {self.seen} "
                "(numbers of its taps). Leave the backbone's layerdrop at 0, because a skipped layer has no output, "
                "and let no layer run twice."
            )

    def result(self) -> Tensor:
        """Return `Y`, through the output layer if the adapter has one."""
        self.check()
        assert self.total is not None
        return self.total if self.adapter.output is None else self.adapter.output(self.total)


class PAdapter(nn.Module):
    """Prompt adapter: learned pseudo features beside the CNN features of every utterance.

    Computes `[X_0 ; P]` along time with a trained `P: (length, hidden)`, drawn from N(0, init_std^2): the P-adapter of
    Inoue et al. 2024 ([arXiv:2407.21066](https://arxiv.org/abs/2407.21066)). In a padded batch the pseudo features
    follow the last valid frame of each utterance, so the padding changes nothing. In a pre-norm encoder the first norm
    scales them up to full size unless `init_std` is far below 0.003, the root of its `eps`. Pseudo features of exactly
    0 would stay equal to one another where they have no positions, as in Whisper.

    Args:
        hidden_size: Width of the backbone's hidden states.
        length: Number of pseudo features, at least 1.
        position: "append" puts them after the last valid frame of each utterance, "prepend" before its first.
        init_std: Standard deviation of the initial pseudo features.

    Shape:
        `(batch, frames, hidden)` and, if given, the mask `(batch, frames)` (non-zero: valid) to the same with `length`
        more frames; the mask keeps its dtype. With a `squeeze` above 1, for an encoder that takes so many frames as
        one, the pseudo features start at a multiple of it, after padding if necessary.

    Raises:
        ValueError: `length` is below 1, or `position` is unknown.

    Examples:
        >>> joined, mask, real = PAdapter(hidden_size=768, length=16)(torch.zeros(2, 49, 768))
        >>> joined.shape, real.of(joined).shape
        (torch.Size([2, 65, 768]), torch.Size([2, 49, 768]))
    """

    def __init__(self, hidden_size: int, length: int = 16, position: str = "append", init_std: float = 0.02) -> None:
        super().__init__()
        _require_positive("length", length)
        _require_one_of("position", position, ("append", "prepend"))
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
