"""A parameter that should be trained and gets no gradient is named in the first step of a training run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from peft_elp.parameters import belongs_to
from peft_elp.wording import shortened

from .paths import canonical
from .stack import ELPStack


@dataclass
class FirstStep:
    """A training step that is waited for.

    Args:
        model: The model, which may be gone by then.
        adapter_names: The adapters that were called in training mode.
    """

    model: ref[nn.Module]
    adapter_names: frozenset[str]

    def is_over(self, optimizer: torch.optim.Optimizer) -> bool:
        """Look at the gradients if the step of this optimizer is the one. Whether there is nothing to wait for now."""
        model = self.model()
        if model is None:
            return True
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = {name: p for name, p in _trained(model, self.adapter_names) if id(p) in held}
        unreached = [name for name, parameter in trained.items() if parameter.grad is None]
        if unreached:
            warnings.warn(_message(unreached), stacklevel=2)
        return bool(trained)


_awaited: list[FirstStep] = []


def watch_first_step(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """Look at the gradients of some adapters when an optimizer takes its next step with them, and never again.

    Args:
        model: The model, which is called in training mode now.
        adapter_names: The adapters that this call uses.
    """
    _awaited.append(FirstStep(ref(model), frozenset(adapter_names)))


def _look(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # A closure computes the gradients inside the step. It follows the optimizer in `args`.
    if _awaited and len(args) < 2 and kwargs.get("closure") is None:
        _awaited[:] = [step for step in _awaited if not step.is_over(optimizer)]


def watch_when_trained(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a model without a PeftModel around it, whose tuner would watch its first step."""
    if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
        return
    for stack in (module for module in model.modules() if isinstance(module, ELPStack)):
        watch_first_step(model, stack.active_adapters)
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is watch_when_trained]:
        model._forward_pre_hooks.pop(key, None)


# For every optimizer, and for good, since PyTorch cannot remove a hook during a step.
register_optimizer_step_pre_hook(_look)


def _trained(model: nn.Module, adapter_names: Iterable[str]) -> Iterable[tuple[str, nn.Parameter]]:
    """The parameters of adapters that every training step should reach."""
    stacks = [module for module in model.modules() if isinstance(module, ELPStack)]
    # LayerDrop skips layers at random, and their adapters with them.
    skipped = {
        id(parameter)
        for stack in stacks
        if stack.layer_drop.probability > 0
        for parameter in stack.encoder_layers.parameters()
    }
    for name, parameter in model.named_parameters():
        of_adapter = any(belongs_to(adapter_name, name) for adapter_name in adapter_names)
        # FSDP leaves parameters empty in the processes that hold no part of them.
        if of_adapter and parameter.requires_grad and parameter.numel() and id(parameter) not in skipped:
            yield name, parameter


def _message(unreached: list[str]) -> str:
    reason = "no output that the loss depends on comes after them"
    if any(".elp_l." in f".{name}" for name in unreached):
        reason = (
            "the loss does not depend on the encoder's last_hidden_state, which the L-adapter replaces. Let the head "
            "read that, not hidden_states, or leave L out of adapters"
        )
    return (
        f"{len(unreached)} parameters that should be trained got no gradient in the first training step "
        f"({shortened(map(canonical, unreached), shown=2)}): {reason}."
    )
