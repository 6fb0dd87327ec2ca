"""An utterance without a single frame is an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_elp.backbones import receptive_field


def refuse_short_utterances(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the backbone: refuse utterances shorter than the receptive field of the convolutions.

    In a padded batch Transformers would treat such an utterance as a full-length one, since the mask of zero frames
    wraps around to all frames.
    """
    waveforms = args[0] if args else kwargs.get("input_values")
    if waveforms is None or torch.compiler.is_compiling():
        return
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    least = receptive_field(module.config)
    shortest = waveforms.shape[-1] if mask is None else min(int(mask.sum(-1).min()), waveforms.shape[-1])
    if shortest < least:
        raise ValueError(
            f"An utterance of {shortest} samples is too short for {type(module).__name__}: its convolutions need at "
            f"least {least} samples ({least / 16:.0f} ms at 16 kHz). Drop it, or pad it with silence, unmasked."
        )
