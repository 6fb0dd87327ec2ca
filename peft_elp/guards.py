"""Mistakes that would otherwise stay silent, and the errors that name them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def receptive_field(config: Any) -> int:
    """Samples that the convolutions over the waveform need for one frame; 400 (25 ms) in wav2vec 2.0."""
    samples = 1
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        samples = (samples - 1) * stride + kernel
    return samples


def refuse_short_utterances(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the base encoder: an utterance without a single frame is an error.

    In a padded batch Transformers would take such an utterance for a full-length one: the mask of zero frames wraps
    around to all frames.

    Raises:
        ValueError: An utterance is shorter than the receptive field of the convolutions.
    """
    if torch.compiler.is_compiling():
        return
    waveforms = args[0] if args else kwargs.get("input_values")
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if waveforms is None:
        return
    least = receptive_field(module.config)
    shortest = waveforms.shape[-1] if mask is None else min(int(mask.sum(-1).min()), waveforms.shape[-1])
    if shortest < least:
        raise ValueError(
            f"An utterance of {shortest} samples is too short for {type(module).__name__}: its convolutions need at "
            f"least {least} samples ({1000 * least / 16000:.0f} ms at 16 kHz) for one frame. Drop it or pad it with "
            "silence that its attention_mask counts as valid."
        )


def reentrant_checkpointing(layer: nn.Module) -> bool:
    """Whether gradient checkpointing is on for this layer in its re-entrant form."""
    if not getattr(layer, "gradient_checkpointing", False):
        return False
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    # Without the keyword, PyTorch checkpoints re-entrantly.
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", True))
