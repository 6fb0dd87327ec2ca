"""Checks for mistakes that would otherwise stay silent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn

from peft_elp.backbones import receptive_field
from peft_elp.wording import shortened

from .paths import canonical


def refuse_short_utterances(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the backbone: an utterance without a single frame is an error.

    In a padded batch Transformers would treat such an utterance as a full-length one, since the mask of zero frames
    wraps around to all frames.

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
            f"least {least} samples ({1000 * least / 16000:.0f} ms at 16 kHz) for one frame. Drop it, or pad it with "
            "silence and a mask of ones."
        )


def expect_loading(parameters: Iterable[nn.Parameter]) -> None:
    """Remember that nothing has been written into these parameters yet."""
    for parameter in parameters:
        if not parameter.is_inference():
            # PyTorch counts the writes into a tensor in this private attribute. Inference tensors lack it.
            parameter._elp_version = parameter._version  # pyright: ignore[reportAttributeAccessIssue]


def refuse_unloaded(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a model with an adapter for inference: its tensors must have been loaded by now.

    Transformers only logs which tensors it did not find, and which it found and did not use.

    Raises:
        RuntimeError: Some of them were never written.
    """
    # A replica of DataParallel has no parameters to look at.
    if torch.compiler.is_compiling() or getattr(model, "_is_replica", False):
        return
    made = {name: (vars(p)["_elp_version"], p) for name, p in model.named_parameters() if "_elp_version" in vars(p)}
    missing = [canonical(name) for name, (version, p) in made.items() if version == p._version]
    if missing:
        raise RuntimeError(
            f"{len(missing)} tensors of an adapter that was added for inference were never loaded: "
            f"{shortened(missing, shown=2)}. Before 5.20, Transformers (here {transformers.__version__}) loads no "
            "adapter with a head; else the folder is incomplete. Load it with PEFT, which says what is wrong: "
            "PeftModel.from_pretrained(base_model, folder)."
        )
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is refuse_unloaded]:
        model._forward_pre_hooks.pop(key, None)


def checkpointing(layer: nn.Module) -> bool:
    """Whether gradient checkpointing is on for this layer: a training step keeps only its input."""
    return layer.training and torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False)


def reentrant_checkpointing(layer: nn.Module) -> bool:
    """Whether gradient checkpointing is on for this layer in its re-entrant form."""
    if not checkpointing(layer):
        return False
    # Transformers keeps the partial of torch.utils.checkpoint.checkpoint that a layer uses in this private attribute.
    # Without the keyword, PyTorch checkpoints in the re-entrant form.
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", True))
