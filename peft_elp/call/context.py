"""A value that holds for one call and one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class CallVariable(Generic[T]):
    """A value that is set for a `with` block, in the thread that entered the block.

    torch.compile cannot trace a context variable. It traces in one thread at a time, so a value that is set during
    tracing is kept in an attribute. `_holders` tells without a context variable whether any thread has set a value.

    Args:
        name: Name of the context variable.

    Examples:
        >>> language = CallVariable("language")
        >>> with language.set("fi"):
        ...     language.get()
        'fi'
        >>> language.get() is None
        True
    """

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[T | None] = ContextVar(name, default=None)
        self._traced: T | None = None
        self._lock = Lock()
        self._holders = 0  # How many blocks hold a value, in all threads.

    def get(self) -> T | None:
        if torch.compiler.is_dynamo_compiling() and (self._traced is not None or not self._holders):
            return self._traced
        # Layers that are compiled one by one, or after a graph break, are called by a stack that is not traced.
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
        try:
            self._count(1)
            yield
        finally:
            self._variable.reset(token)  # First: a value that stayed would serve the next call.
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self._holders += change
