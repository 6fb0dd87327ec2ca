"""What an adapter's head is made from, and what follows in the model when another adapter becomes active."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_elp.heads import HEAD_SETTINGS, head_input

from .head import original


def head_config(model: nn.Module, given: dict[str, Any] | None) -> dict[str, Any] | None:
    """The settings that an adapter's head has: those of the model, with `given` in place of some.

    Returns:
        None where the head is none that Transformers makes from settings.

    Raises:
        ValueError: There is no such head, and yet settings are given.
    """
    if not isinstance(model, PreTrainedModel) or head_input(type(model)) is None:
        if given:
            raise ValueError(
                f"head_config={given!r} describes a head that Transformers makes, and {type(model).__name__} has none "
                "that ELP knows. Load the model with such a head, as AutoModelForCTC does, or leave head_config out."
            )
        return None
    own = _settings(_own_config(model))
    if given and given.get("num_labels", own["num_labels"]) != own["num_labels"]:
        own = {name: value for name, value in own.items() if name not in ("id2label", "label2id")}
    return own | (given or {})


def _own_config(model: PreTrainedModel) -> Any:
    """A copy of the model's configuration as it is without adapters."""
    config = deepcopy(model.config)
    for head in (vars(module).get("task_head") for module in model.modules()):
        if isinstance(head, TaskHead):
            config.update(head.own)
    return config


def _settings(config: Any) -> dict[str, Any]:
    found = {name: _plain(getattr(config, name)) for name in HEAD_SETTINGS if getattr(config, name, None) is not None}
    if found.get("id2label") == {i: f"LABEL_{i}" for i in range(found.get("num_labels", 0))}:
        del found["id2label"], found["label2id"]  # nobody has named the labels
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else deepcopy(value)


def remade_head(model: nn.Module, paths: Sequence[str], settings: dict[str, Any] | None) -> dict[str, nn.Module]:
    """Those of a head's modules that come out otherwise under the given settings, by path; newly initialised."""
    fresh: dict[str, nn.Module] = {}
    for path, new in other_modules(model, paths, settings).items():
        assert isinstance(model, PreTrainedModel)
        old = original(model.get_submodule(path))
        like = next(old.parameters())
        new = new.to_empty(device=like.device).to(like.dtype)
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.normal_()  # as a bare parameter starts; layers are initialised next
            for name, buffer in new.named_buffers():
                buffer.copy_(old.get_buffer(name))
            fresh[path] = new.apply(model._init_weights)
    return fresh


def other_modules(model: nn.Module, paths: Sequence[str], settings: dict[str, Any] | None) -> dict[str, nn.Module]:
    """Those of a head's modules that come out otherwise under the given settings, by path; without memory.

    They are taken from a second model of the class, of which nothing is given memory.
    """
    if not settings or not isinstance(model, PreTrainedModel):
        return {}
    config = _own_config(model)
    if settings.items() <= _settings(config).items():
        return {}
    config.update(settings)
    with torch.device("meta"):
        other = type(model)(config)
    found = {path: (original(model.get_submodule(path)), other.get_submodule(path)) for path in paths}
    return {path: new for path, (old, new) in found.items() if _make(old) != _make(new)}


def _make(module: nn.Module) -> list[Any]:
    """What tells two modules of different make apart: classes, shapes, and the plain values that they hold."""

    def values(part: nn.Module) -> dict[str, Any]:
        named = {name: value for name, value in vars(part).items() if name != "training" and not name.startswith("_")}
        return {name: value for name, value in named.items() if isinstance(value, (int, float, str, tuple))}

    parts = [(name, type(part), values(part)) for name, part in module.named_modules()]
    return [*parts, *((name, parameter.shape) for name, parameter in module.named_parameters())]


class TaskHead:
    """A model's head, which goes along with the adapters of the encoder stack.

    PEFT switches the copies of the head's modules. Transformers leaves them out when it enables adapters again, and
    neither tells the model's configuration of the labels or the vocabulary of the active one.

    Args:
        config: The model's configuration, None if it has none.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.copies: list[ModulesToSaveWrapper] = []
        self.settings: dict[str, dict[str, Any]] = {}  # by adapter name
        self.own: dict[str, Any] = {}  # the model's settings, while others are in their place

    def follow(self, active_adapters: Sequence[str], enabled: bool) -> None:
        """Enable or disable the copies, and give the configuration the settings of the active adapter."""
        for copy in self.copies:
            if copy.disable_adapters == enabled:
                copy.enable_adapters(enabled)
        wanted = next((self.settings[name] for name in active_adapters if enabled and name in self.settings), {})
        if self.own:
            self.config.update(self.own)
            self.own = {}
        if wanted and not wanted.items() <= _settings(self.config).items():
            self.own = {name: getattr(self.config, name) for name in HEAD_SETTINGS if hasattr(self.config, name)}
            self.config.update(wanted)
