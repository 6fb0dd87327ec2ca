"""Several tasks in as few passes through one backbone as their adapters allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_elp.call.route import Route, current_route
from peft_elp.call.shared_pass import SharedPass, current_pass

from .find import Encoder, encoder_of
from .layers import ELPNorm, ELPSublayer
from .place import wrap_front_end
from .stack import ELPStack


@dataclass(frozen=True)
class Task:
    """One of the tasks of a pass.

    Args:
        encoder: The base encoder of its model.
        stack: The encoder stack in it.
        adapter: The adapter that it uses.
        call: Calls its model.
        route: What makes the model use that adapter, where it is not the active one.
    """

    encoder: nn.Module
    stack: ELPStack
    adapter: str
    call: Callable[[], Any]
    route: Route | None = None

    def leaves_backbone_alone(self) -> bool:
        """Whether the adapter changes nothing that a layer computes."""
        parts = [getattr(part, name) for part in self.stack.modules() for name in _inside(part)]
        alone = self.adapter in self.stack.elp_l and not any(self.adapter in adapters for adapters in parts)
        return alone and not self.trains_backbone()

    def trains_backbone(self) -> bool:
        """Whether the adapter has its own copy of a module of the encoder, such as the projection of its features."""
        copies = [part for part in self.encoder.modules() if isinstance(part, ModulesToSaveWrapper)]
        return any(self.adapter in part.modules_to_save for part in copies)


def _inside(part: nn.Module) -> tuple[str, ...]:
    if isinstance(part, ELPStack):
        return ("elp_p",)
    return part.adapter_layer_names if isinstance(part, (ELPSublayer, ELPNorm)) else ()


def run(tasks: Mapping[str, Task]) -> dict[str, Any]:
    """The output of each task.

    The convolutions over the waveform run once. Tasks that leave the backbone alone share one pass through its layers,
    each other one has a pass of its own.
    """
    shared = SharedPass()
    for name, task in tasks.items():
        if task.leaves_backbone_alone() and not task.stack.disable_adapters:
            adapter: Any = task.stack.elp_l[task.adapter]
            shared.readers[name] = (adapter, task.stack.tapped_layers[task.adapter])
    outputs: dict[str, Any] = {}
    for name in [*shared.readers, *(name for name in tasks if name not in shared.readers)]:
        task = tasks[name]
        trains = task.trains_backbone()
        own = shared if name in shared.readers else SharedPass(features=None if trains else shared.features)
        own.task = name
        with current_pass.set(own), current_route.set(task.route) if task.route else nullcontext():
            outputs[name] = task.call()
        if not trains:
            shared.features = own.features
    return {name: outputs[name] for name in tasks}


def parts_of(model: nn.Module) -> tuple[Encoder, ELPStack]:
    """The parts of a model with ELP-adapters, and its encoder stack."""
    stacks = [module for module in model.modules() if isinstance(module, ELPStack)]
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} encoders with ELP-adapters, and tasks share one. Place "
            "adapters with get_peft_model(model, ELPConfig()) first."
        )
    parts = encoder_of(model, stacks[0])
    wrap_front_end(parts)
    return parts, stacks[0]


def refuse_reports(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse to report hidden states: a task that shares a pass has none of its own.

    Raises:
        ValueError: Hidden states or attentions are asked for.
    """
    config = getattr(model, "config", None)
    for name in ("output_hidden_states", "output_attentions"):
        asked = kwargs.get(name)
        if asked or (asked is None and getattr(config, name, False)):
            raise ValueError(
                f"{name}=True: tasks that share one pass have no hidden states and attentions of their own. Call the "
                "model once with one of the adapters for them."
            )


def refuse_idle_labels(names: Iterable[str], labels: Mapping[str, Any] | None) -> None:
    """Refuse labels of tasks that are not run.

    Raises:
        ValueError: There are some.
    """
    idle = sorted({*(labels or ())} - {*names})
    if idle:
        raise ValueError(
            f"There are labels for {', '.join(map(repr, idle))}, which is not among what is run: "
            f"{', '.join(map(repr, names))}. Run it too, or leave its labels out."
        )
