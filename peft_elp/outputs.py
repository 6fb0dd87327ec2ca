"""The hidden states in whatever a module of Transformers returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def first(output: Any) -> Tensor:
    """The hidden states in what a module returns: a tensor, a tuple that begins with one, or a `ModelOutput`."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, x: Tensor | None) -> Any:
    """The same output with hidden states `x`."""
    if isinstance(output, Tensor):
        return x
    if isinstance(output, tuple):
        return (x, *output[1:])
    output[next(iter(output))] = x
    return output
