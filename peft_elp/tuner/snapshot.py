"""A model is changed completely or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedConfig

RECORDED = (nn.Module, PreTrainedConfig, PeftConfig)  # And whatever is of this package.
PACKAGE = __name__.partition(".")[0]


class Snapshot:
    """The structure of a model and its settings at one moment, which `restore` brings back.

    For every module it records the sub-modules, parameters, buffers, hooks and plain attributes, and for every
    parameter whether it is trained. It records the configurations and ELP's own objects in the same way. It does not
    copy tensors: what is written into a tensor stays.

    Args:
        model: The model. Everything that it holds is recorded.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> before = Snapshot(model)
        >>> model[0] = nn.Identity()
        >>> before.restore()
        >>> model
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
        )
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen: set[int] = set()
        self._objects: list[tuple[Any, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._trained: list[tuple[nn.Parameter, bool]] = []
        self._record(model)

    def _record(self, value: Any) -> None:
        kind = _kind(type(value))
        if kind is None or id(value) in self._seen:
            return
        self._seen.add(id(value))
        inner: Any = ()
        if kind is Tensor:
            if isinstance(value, nn.Parameter):
                self._trained.append((value, value.requires_grad))
        elif kind is object:
            self._objects.append((value, dict(vars(value))))
            inner = vars(value).values()
        elif kind is dict:
            self._containers.append((value, dict(value)))
            inner = value.values()
        else:
            self._containers.append((value, value.copy()))
            inner = value
        for part in list(inner):
            self._record(part)

    def restore(self) -> None:
        """Bring the model back to what was recorded. Objects and containers stay the same objects."""
        for thing, attributes in self._objects:
            for name in vars(thing).keys() - attributes.keys():
                del vars(thing)[name]
            vars(thing).update(attributes)
        for container, content in self._containers:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)
        for parameter, trained in self._trained:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)


@cache
def _kind(of: type) -> type | None:
    """What is recorded of the values of a type, found once for each type: most values of a model are plain ones."""
    if issubclass(of, Tensor):
        return Tensor
    if issubclass(of, RECORDED) or str(of.__module__).startswith(PACKAGE):
        return object
    return next((container for container in (dict, list, set) if issubclass(of, container)), None)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Bring a model back to what it was if an error occurs in the block, whatever the error is."""
    before = Snapshot(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise
