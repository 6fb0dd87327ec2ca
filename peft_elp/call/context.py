"""A value that holds for one call and one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Current(Generic[T]):
    """A value that holds for the duration of a `with` block, and for the thread that set it alone.

    torch.compile cannot trace a context variable. It traces in one thread at a time, so that what is set while it does
    may live here; and where no thread holds a value, there is no need to look.
    """

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[T | None] = ContextVar(name, default=None)
        self._traced: T | None = None
        self._lock = Lock()
        self._holders = 0
        self._held = False

    def get(self) -> T | None:
        if torch.compiler.is_dynamo_compiling() and (self._traced is not None or not self._held):
            return self._traced
        # Layers that are compiled one by one, or behind a break of the graph, are called by an untraced stack.
        return self._variable.get()

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        if torch.compiler.is_dynamo_compiling():
            before, self._traced = self._traced, value
            try:
                yield
            finally:
                self._traced = before
            return
        token = self._variable.set(value)
        self._hold(1)
        try:
            yield
        finally:
            self._hold(-1)
            self._variable.reset(token)

    def _hold(self, change: int) -> None:
        with self._lock:
            self._holders += change
            self._held = self._holders > 0
