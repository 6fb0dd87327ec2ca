"""The hidden states in the outputs of Transformers' modules."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Tensor


def hidden_states_of(output: Any) -> Tensor:
    """Return the hidden states in a module's output: a tensor, or the first entry of a tuple or a `ModelOutput`."""
    return output if isinstance(output, Tensor) else output[0]


def with_hidden_states(output: Any, x: Tensor | None) -> Any:
    """Return the same output with hidden states `x`. A `ModelOutput` is changed in place."""
    if isinstance(output, Tensor):
        return x
    if isinstance(output, tuple):
        return (x, *output[1:])
    output[next(iter(output))] = x
    return output


def another(output: Any, x: Tensor | None) -> Any:
    """Return a copy of the output with hidden states `x`."""
    return with_hidden_states(output if isinstance(output, (Tensor, tuple)) else copy(output), x)
