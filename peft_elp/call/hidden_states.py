"""Hidden states that Transformers reports, without pseudo features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peft_elp.adapters.pseudo import RealFrames


def trim_hidden_states(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the backbone: report hidden states as the backbone does without adapters.

    Transformers collects hidden states where the layers return them, with the pseudo features still in. The entries
    carry the mark of `StackCall`. Attentions do not, and keep the pseudo features. And where the last entry is the
    stack's output, as in post-norm encoders, it is what takes that output's place under an L-adapter of that width.
    """
    if isinstance(output, dict):
        for key, value in output.items():
            if isinstance(value, tuple):
                output[key] = _trimmed(value, output.get("last_hidden_state"))
        return output
    if isinstance(output, tuple):
        return tuple(_trimmed(value, output[0]) for value in output)
    return output


def mark_replaced(x: Tensor) -> None:
    """Mark a tensor that is the output of an encoder stack, which something else takes the place of."""
    x._elp_replaced = True  # pyright: ignore[reportAttributeAccessIssue]


def _trimmed(states: Any, last: Any) -> Any:
    if not isinstance(states, (tuple, list)):
        return states
    real = next((x._elp_real_frames for x in states if hasattr(x, "_elp_real_frames")), ())
    joined = real[-1].joined if real else None
    trimmed = tuple(
        without_pseudo_features(x, real) if isinstance(x, Tensor) and x.shape[1] == joined else x for x in states
    )
    replaced = bool(states) and getattr(states[-1], "_elp_replaced", False)
    if replaced and isinstance(last, Tensor) and last.shape == trimmed[-1].shape:
        return (*trimmed[:-1], last)
    return trimmed if real else states


def without_pseudo_features(x: Tensor, real: Sequence[RealFrames]) -> Tensor:
    """Return the frames of `x` that belong to the utterances."""
    for frames in reversed(real):
        x = frames.of(x)
    return x
