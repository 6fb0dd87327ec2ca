"""The settings that an adapter's head is made from, and the model's configuration while that adapter is in use."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from copy import copy, deepcopy
from functools import partial
from types import MethodType
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_elp.config import plain_settings
from peft_elp.heads import HEAD_SETTINGS, head_input
from peft_elp.wording import brief, shortened

from .offload import running_device
from .paths import original


def head_config(model: nn.Module, given: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the settings that an adapter's head is made from: the model's, with `given` in place of some.

    None if the head is not one that Transformers makes from settings.
    """
    if not isinstance(model, PreTrainedModel) or head_input(type(model)) is None:
        if given:
            raise ValueError(
                f"head_config={brief(given)} describes a head that Transformers makes, and {type(model).__name__} has "
                "none that ELP knows. Load it with one, as AutoModelForCTC does, or leave head_config out."
            )
        return None
    settings = _settings(_config_without_adapters(model))
    if given and given.get("num_labels", settings["num_labels"]) != settings["num_labels"]:
        settings = {name: value for name, value in settings.items() if name not in ("id2label", "label2id")}
    return settings | (given or {})


def refuse_left_out(model: nn.Module, head: Iterable[str], trained: Collection[str], settings: dict[str, Any]) -> None:
    """Refuse settings that change a module of the head which is not trained, and would stay as the model has it."""
    left_out = sorted(remade_modules(model, [path for path in head if path not in trained], settings))
    if left_out:
        raise ValueError(
            f"head_config changes {shortened(map(repr, left_out))}, which modules_to_save={brief(list(trained))} "
            "leaves out. Add it to modules_to_save, or leave modules_to_save at None to train the whole head."
        )


def remade_modules(model: nn.Module, paths: Iterable[str], settings: dict[str, Any] | None) -> dict[str, nn.Module]:
    """Return the modules of a head that are different under the given settings, by path, on the meta device.

    They are taken from a second model of the same class, no tensor of which is allocated.
    """
    if not settings or not isinstance(model, PreTrainedModel):
        return {}
    config = _config_without_adapters(model)
    if settings.items() <= _settings(config).items():
        return {}
    config.update(settings)
    with torch.device("meta"):
        other = type(model)(config)
    modules = {path: (original(model.get_submodule(path)), other.get_submodule(path)) for path in paths}
    return {path: new for path, (old, new) in modules.items() if _description(old) != _description(new)}


def planned_head(
    model: nn.Module,
    paths: Iterable[str],
    settings: dict[str, Any] | None,
    input_path: str | None,
    input_size: int,
) -> dict[str, nn.Module]:
    """Return the modules of the head that an adapter does not copy from the model, by path, on the meta device.

    The head's first linear layer is among them if the L-adapter feeds it (`input_path`, at width `input_size`).
    """
    modules = remade_modules(model, paths, settings)
    if input_path is not None:
        linear = modules.get(input_path, original(model.get_submodule(input_path)))
        assert isinstance(linear, nn.Linear)
        modules[input_path] = nn.Linear(input_size, linear.out_features, linear.bias is not None, device="meta")
    return {
        path: new.to(next(original(model.get_submodule(path)).parameters()).dtype) for path, new in modules.items()
    }


def initialised(model: nn.Module, path: str, planned: nn.Module) -> nn.Module:
    """Give a module of `planned_head` tensors, initialised as Transformers initialises modules of that model."""
    old = original(model.get_submodule(path))
    module = planned.to_empty(device=running_device(old))
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(old.get_buffer(name))
        if isinstance(model, PreTrainedModel):
            for parameter in module.parameters():
                parameter.normal_()  # As a bare parameter starts. The layers are initialised next.
            # `_init_weights` is private. It initialises one module in place, and PreTrainedModel applies it to each.
            return module.apply(model._init_weights)
    assert isinstance(module, nn.Linear)
    module.reset_parameters()
    return module


def _config_without_adapters(model: PreTrainedModel) -> Any:
    config = deepcopy(model.config)
    for head in (vars(module).get("task_head") for module in model.modules()):
        if isinstance(head, TaskHead):
            head.restore(config)
    return config


def _settings(config: Any) -> dict[str, Any]:
    """Return the settings of a configuration that are set, in plain Python values."""
    found = plain_settings(
        {name: getattr(config, name) for name in HEAD_SETTINGS if getattr(config, name, None) is not None}
    )
    if found.get("id2label") == {i: f"LABEL_{i}" for i in range(found.get("num_labels", 0))}:
        del found["id2label"], found["label2id"]  # These are the names that Transformers gives.
    return found


def _description(module: nn.Module) -> list[Any]:
    """Return what distinguishes modules that are configured differently: classes, shapes and plain values."""

    def values(inner: nn.Module) -> dict[str, Any]:
        named = {name: value for name, value in vars(inner).items() if name != "training" and not name.startswith("_")}
        return {name: value for name, value in named.items() if isinstance(value, (int, float, str, tuple))}

    modules = [(name, type(inner), values(inner)) for name, inner in module.named_modules()]
    return [*modules, *((name, parameter.shape) for name, parameter in module.named_parameters())]


class Absent:
    """Stands for a setting that a configuration does not have."""


class TaskHead:
    """A model's head, which follows the active adapter of the encoder stack.

    PEFT switches the copies of the head's modules. Transformers does not enable them again together with the other
    adapters, and neither of them tells the model's configuration about the labels or the vocabulary of the active
    adapter. `problem_type` needs care: Transformers guesses it from the first labels and writes the guess into the
    configuration. The guess belongs to the adapter that was active, and is saved with it.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.config: Any = None
        self.copies: list[ModulesToSaveWrapper] = []
        self.settings: dict[str, dict[str, Any]] = {}  # By adapter name.
        self.own: dict[str, Any] = {}  # What the model has instead, while an adapter's settings are in its place.
        self.problem_type: Any = Absent  # Of the model without adapters.
        self.followed: str | None = None  # The adapter whose settings the configuration has.

    def join(
        self,
        model: nn.Module,
        adapter_name: str,
        settings: dict[str, Any] | None,
        copies: Iterable[ModulesToSaveWrapper],
    ) -> None:
        """Remember the head of an adapter: the settings that it is made from, and the modules it has copies of."""
        self.model, self.config = model, getattr(model, "config", None)
        self.copies += [module for module in copies if all(module is not known for known in self.copies)]
        if settings and self.config is not None:
            if self.problem_type is Absent:
                self.problem_type = getattr(self.config, "problem_type", Absent)
            self.settings[adapter_name] = settings

    def follow(self, active_adapters: Sequence[str], enabled: bool) -> None:
        """Enable or disable the copies, and give the configuration the settings of the active adapter."""
        for module in self.copies:
            if module.disable_adapters == enabled:
                module.enable_adapters(enabled)
        if self.config is None:
            return
        self.keep_problem_type()
        self.restore(self.config)
        self.own = {}
        self.followed = next((name for name in active_adapters if enabled and name in self.settings), None)
        if self.followed is not None:
            wanted = self.settings[self.followed]
            if not _without_problem_type(wanted).items() <= _settings(self.config).items():
                self.own = {name: getattr(self.config, name, Absent) for name in HEAD_SETTINGS}
                self.config.update(_without_problem_type(wanted))
            self.config.problem_type = wanted.get("problem_type")
        self._tell(self.model)

    def keep_problem_type(self, adapter_name: str | None = None, config: Any = None) -> None:
        """Take what Transformers has guessed during a call into the settings of the adapter that was active."""
        name = adapter_name or self.followed
        guess = getattr(config or self.config, "problem_type", None)
        if name in self.settings and guess is not None:
            self.settings[name]["problem_type"] = guess

    def restore(self, config: Any) -> None:
        """Give a configuration the settings that the model has without adapters."""
        for name, value in self.own.items():
            if value is not Absent:
                setattr(config, name, value)
            elif hasattr(config, name):
                delattr(config, name)
        if self.problem_type is not Absent:
            config.problem_type = self.problem_type

    def seen_by(self, adapter_name: str, model: nn.Module) -> nn.Module:
        """Return the model with the settings of an adapter's head, for one call: all else is the same objects.

        Another thread that calls the model does not see these settings.
        """
        settings = self.settings.get(adapter_name)
        if settings is None:
            return model
        view: Any = copy(model)
        view.config = copy(self.config)
        self.restore(view.config)
        view.config.update(_without_problem_type(settings))
        view.config.problem_type = settings.get("problem_type")
        self._tell(view)
        forward = vars(view).get("forward")
        if isinstance(forward, partial):
            # accelerate's `add_hook_to_module` binds the module into `forward` and `_old_forward`.
            view.forward = partial(forward.func, view)
            view._old_forward = MethodType(view._old_forward.__func__, view)
        return view

    def _tell(self, model: Any) -> None:
        # Heads that classify frames read the number of labels from here, not from the configuration.
        if model is not None and "num_labels" in vars(model):
            model.num_labels = model.config.num_labels


def _without_problem_type(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "problem_type"}
