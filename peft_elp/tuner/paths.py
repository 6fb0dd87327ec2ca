"""Paths of modules in a model."""

from __future__ import annotations


def canonical(name: str) -> str:
    """The name that a module or tensor had before wrappers came around it."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def join(*parts: str) -> str:
    """A module path from parts that may be empty."""
    return ".".join(part for part in parts if part)
