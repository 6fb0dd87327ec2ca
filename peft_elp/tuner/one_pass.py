"""Several tasks in as few passes through one backbone as their adapters allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_elp.call.reports import REPORTS
from peft_elp.call.route import Route, current_route
from peft_elp.call.shared_pass import SharedPass, current_pass
from peft_elp.wording import shortened

from .find import Encoder, encoder_of
from .layers import ELPNorm, ELPSublayer
from .place import wrap_front_end
from .stack import ELPStack
from .window import common_window


@dataclass(frozen=True)
class Task:
    """One task of a call that serves several."""

    backbone: nn.Module  # the speech encoder of the task's model, as a whole
    stack: ELPStack  # in it
    adapter: str
    call: Callable[[], Any]  # calls the model
    route: Route | None = None  # makes the model use `adapter`, if it is not the active one

    def leaves_layers_alone(self) -> bool:
        """Whether the adapter reads the encoder layers and changes nothing that they compute."""
        inside = [layer for layer in self.stack.modules() if isinstance(layer, (ELPSublayer, ELPNorm))]
        changes = self.adapter in self.stack.elp_p or any(self.adapter in layer.adapter_names() for layer in inside)
        return self.adapter in self.stack.elp_l and not changes and not self.trains_backbone()

    def trains_backbone(self) -> bool:
        """Whether the adapter has its own copy of a module of the backbone, such as the feature projection."""
        copies = [module for module in self.backbone.modules() if isinstance(module, ModulesToSaveWrapper)]
        return any(self.adapter in module.modules_to_save for module in copies)


def run_tasks(tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Run several tasks on the same input, and return the output of each.

    The convolutions over the waveform run once. The tasks that leave the encoder layers alone share one pass through
    them; each other task has its own.
    """
    shared = SharedPass()
    for name, task in tasks.items():
        if task.leaves_layers_alone() and not task.stack.disable_adapters:
            adapter: Any = task.stack.elp_l[task.adapter]
            shared.readers[name] = (adapter, task.stack.tapped_layers[task.adapter])
    common_window(tasks[name].stack.windows.get(tasks[name].adapter) for name in shared.readers)
    outputs: dict[str, Any] = {}
    for name in [*shared.readers, *(name for name in tasks if name not in shared.readers)]:
        task = tasks[name]
        trains = task.trains_backbone()
        passed = shared if name in shared.readers else SharedPass(features=None if trains else shared.features)
        passed.task = name
        with current_pass.set(passed), current_route.set(task.route) if task.route else nullcontext():
            outputs[name] = task.call()
        if not trains:
            shared.features = passed.features
    return {name: outputs[name] for name in tasks}


_wrapping = Lock()


def adapted_encoder(model: nn.Module) -> tuple[Encoder, ELPStack]:
    """Return the encoder of a model that has ELP-adapters, ready to share a pass, and its wrapped stack."""
    stacks = [module for module in model.modules() if isinstance(module, ELPStack)]
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} encoders with ELP-adapters, and tasks share the passes through "
            "one. Place adapters with get_peft_model(model, ELPConfig()) first."
        )
    encoder = encoder_of(model, stacks[0])
    with _wrapping:  # Two threads may make the first call of a model.
        wrap_front_end(encoder)
    return encoder, stacks[0]


def refuse_reports(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse to report hidden states or attentions, if the call or the model's configuration asks for them."""
    config = getattr(model, "config", None)
    for name in REPORTS:
        asked = kwargs.get(name)
        if asked or (asked is None and getattr(config, name, False)):
            raise ValueError(
                f"{name}=True: tasks that share one pass have no hidden states or attentions of their own. Leave it "
                "out here, and call the model with one adapter to get them."
            )


def refuse_idle_labels(names: Iterable[str], labels: Mapping[str, Any] | None) -> None:
    """Refuse labels of tasks that are not run."""
    idle = sorted({*(labels or ())} - {*names})
    if idle:
        raise ValueError(
            f"There are labels for {shortened(map(repr, idle))}, which is not run. What is run: "
            f"{shortened(map(repr, names))}. Run that task as well, or leave its labels out."
        )
