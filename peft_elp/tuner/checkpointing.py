"""Whether Transformers' gradient checkpointing is on for an encoder layer, and in which form."""

from __future__ import annotations

import torch
from torch import nn


def is_checkpointing(layer: nn.Module) -> bool:
    """Whether gradient checkpointing is on for this layer: a training step keeps only its input."""
    return layer.training and torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False)


def is_checkpointing_reentrant(layer: nn.Module) -> bool:
    """Whether gradient checkpointing is on for this layer in its re-entrant form."""
    # Transformers keeps the partial of torch.utils.checkpoint.checkpoint that a layer uses in this private attribute.
    # Without the keyword, PyTorch checkpoints in the re-entrant form.
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    return is_checkpointing(layer) and bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", True))
