"""The hidden states in whatever a module of Transformers returns."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Tensor


def hidden_states_of(output: Any) -> Tensor:
    """The hidden states in what a module returns: a tensor, a tuple that begins with one, or a `ModelOutput`."""
    return output if isinstance(output, Tensor) else output[0]


def with_hidden_states(output: Any, x: Tensor | None) -> Any:
    """The same output with hidden states `x`."""
    if isinstance(output, Tensor):
        return x
    if isinstance(output, tuple):
        return (x, *output[1:])
    output[next(iter(output))] = x
    return output


def another(output: Any, x: Tensor | None) -> Any:
    """An output like this one with hidden states `x`; this one stays as it is."""
    return with_hidden_states(output if isinstance(output, (Tensor, tuple)) else copy(output), x)
