"""Hidden states that Transformers reports, without pseudo features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peft_elp.pseudo import RealFrames


def trim_hidden_states(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the base encoder: take the pseudo features out of the hidden states that it reports.

    Transformers collects hidden states where the layers return them, with the pseudo features still in. The entries
    carry the mark of `StackCall`; attentions do not, they keep the pseudo features.
    """
    if isinstance(output, dict):
        for key, value in output.items():
            if isinstance(value, tuple):
                output[key] = _trimmed(value)
        return output
    if isinstance(output, tuple):
        return tuple(_trimmed(value) for value in output)
    return output


def _trimmed(states: Any) -> Any:
    if not isinstance(states, (tuple, list)):
        return states
    real = next((x._elp_real_frames for x in states if hasattr(x, "_elp_real_frames")), ())
    if not real:
        return states
    joined = real[-1].joined
    return tuple(
        without_pseudo_features(x, real) if isinstance(x, Tensor) and x.shape[1] == joined else x for x in states
    )


def without_pseudo_features(x: Tensor, real: Sequence[RealFrames]) -> Tensor:
    """The frames of `x` that belong to the utterances."""
    for frames in reversed(real):
        x = frames.of(x)
    return x
