"""The mean over a recording's own frames, where a head averages over the padding of a fixed window."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .outputs import hidden_states_of, with_hidden_states


def own_frames_weight(mask: Tensor, x: Tensor) -> Tensor:
    """Return the weight of each frame with which a mean over all frames is one over a recording's own frames.

    Computes `own * frames / sum(own)`, `(batch, frames, 1)`, with `own` 1 for frames of the recording and 0 for
    padding, from the attention mask of the feature extractor, `(batch, steps)`, with whole steps per frame.

    Examples:
        >>> import torch
        >>> x = torch.tensor([[[1.0], [3.0], [100.0], [100.0]]])
        >>> (x * own_frames_weight(torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]]), x)).mean(1)
        tensor([[2.]])
    """
    frames = x.shape[1]
    if mask.dim() != 2 or len(mask) != len(x) or mask.shape[1] < frames or mask.shape[1] % frames:
        raise ValueError(
            f"attention_mask must be (batch, steps) with a multiple of {frames} steps for {tuple(x.shape)} hidden "
            f"states, got {tuple(mask.shape)}. Let the feature extractor return it: return_attention_mask=True."
        )
    own = (mask[:, :: mask.shape[1] // frames] != 0).to(x.dtype)
    return (own * (frames / own.sum(1, keepdim=True).clamp(min=1)))[:, :, None]


def weigh_own_frames(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of an encoder: a mean over its output is one over each recording's own frames."""
    mask = mask_of(args, kwargs)
    x = hidden_states_of(output)
    return output if mask is None else with_hidden_states(output, x * own_frames_weight(mask, x))


def mask_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the attention mask among the arguments of an encoder."""
    return args[1] if len(args) > 1 else kwargs.get("attention_mask")
