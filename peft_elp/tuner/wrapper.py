"""A module that stands in for another one."""

from __future__ import annotations

from typing import Any

from torch import nn

# accelerate's `add_hook_to_module` keeps its state in these attributes: each module has its own.
NOT_SHARED = frozenset({"_hf_hook", "_old_forward"})


class Wrapper(nn.Module):
    """A module around `base_layer` that stands in for it: other attributes are read from it and written to it."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def keep_names(self) -> None:
        """Leave the wrapper out of the names in a state dict, as PyTorch's own wrapper for checkpointing does.

        An adapter's file, the backbone's checkpoint and the adapted model then agree on names, and Transformers, which
        matches the first with the last, finds each tensor.
        """
        # `_state_dict_hooks` is a private dictionary of nn.Module; it tells whether the hooks are there already.
        if _named_without_wrapper not in self._state_dict_hooks.values():
            self.register_state_dict_post_hook(_named_without_wrapper)
            self.register_load_state_dict_pre_hook(_named_with_wrapper)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in NOT_SHARED or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What a user writes has to reach the module that runs, as what a user reads comes from there.
        if self._is_shared(name):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_shared(name):
            delattr(self.base_layer, name)
        else:
            super().__delattr__(name)

    def _is_shared(self, name: str) -> bool:
        """Whether an attribute belongs to `base_layer` rather than to the wrapper."""
        base = self.__dict__.get("_modules", {}).get("base_layer")
        if base is None or name in NOT_SHARED or name in self.__dict__ or not hasattr(base, name):
            return False
        if any(name in self.__dict__[held] for held in ("_modules", "_parameters", "_buffers")):
            return False
        # BaseTunerLayer has read-only properties for attributes of the base layer, such as `weight`.
        of_class = getattr(type(self), name, ...)
        return of_class is ... or (isinstance(of_class, property) and of_class.fset is None)


def _named_without_wrapper(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    inside = f"{prefix}base_layer."
    for key in [key for key in state_dict if key.startswith(inside)]:
        state_dict[prefix + key.removeprefix(inside)] = state_dict.pop(key)


def _named_with_wrapper(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = tuple(f"{prefix}{name}." for name, _ in module.named_children())
    for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]:
        state_dict[f"{prefix}base_layer.{key.removeprefix(prefix)}"] = state_dict.pop(key)
