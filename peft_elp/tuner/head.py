"""The task's layers after the backbone: which modules they are, and how each adapter gets its own copy of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_elp.call.route import current_route

from .paths import canonical, join
from .trained import KeepsTrained


def find_head(model: nn.Module, encoder_path: str, is_encoder: Callable[[nn.Module], bool]) -> list[str]:
    """The modules outside the base encoder, by full path.

    Compares the model with its base encoder rather than knowing names: everything that lies beside the way from the
    model to the encoder and has parameters. A list of modules is named entry by entry: it is never called itself.

    Args:
        model: The whole model.
        encoder_path: Where in it the base encoder is; empty if the model is the encoder.
        is_encoder: Tells an encoder of speech. What holds another one is no head.
    """
    head: list[str] = []
    steps = encoder_path.split(".") if encoder_path else []
    here, path = model, ""
    for step in steps:
        bare = [name for name, _ in here.named_parameters(recurse=False)]
        if bare:
            warnings.warn(
                f"{', '.join(bare)} of {type(here).__name__} stay frozen and are not saved with the adapter: PEFT "
                "trains modules, these are bare parameters. "
                + (
                    "For a trained sum over layers use an L-adapter instead of use_weighted_layer_sum."
                    if "layer_weights" in bare
                    else "To train them, put them into a module of their own."
                ),
                stacklevel=2,
            )
        for name, child in here.named_children():
            if name != step and not any(is_encoder(module) for module in child.modules()):
                head += _callable_parts(join(path, name), child)
        here, path = here.get_submodule(step), join(path, step)
    return head


def _callable_parts(path: str, module: nn.Module) -> list[str]:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [part for name, child in module.named_children() for part in _callable_parts(join(path, name), child)]
    return [path] if any(True for _ in module.parameters()) else []


def resolve(model: nn.Module, names: list[str], stack_path: str, head: list[str]) -> list[str]:
    """The full paths of the modules that a user named.

    A name that is a module's full path means that module alone; else it means every module whose path ends with it.

    Raises:
        ValueError: A name means no module, or one around or inside the encoder stack, which holds adapters itself.
    """
    modules = {canonical(name): module for name, module in model.named_modules() if ".modules_to_save." not in name}
    paths: list[str] = []
    for name in names:
        found = [name] if name in modules else [path for path in modules if path.endswith(f".{name}")]
        found = [part for path in found for part in _callable_parts(path, modules[path])]
        if not found:
            raise ValueError(
                f"modules_to_save names {name!r}, and {type(model).__name__} has no such module with parameters. "
                f"Its head is {head or 'empty: it is a bare encoder'}; modules_to_save=None takes that."
            )
        for path in found:
            if f"{stack_path}.".startswith(f"{path}.") or path.startswith(f"{stack_path}."):
                raise ValueError(
                    f"modules_to_save names {name!r}, which means {path!r}: that lies around or inside the encoder "
                    f"{stack_path!r}, where the adapters sit. Name modules outside of it, such as {head or 'a head'}."
                )
        paths += [path for path in found if path not in paths]
    return paths


class Head(KeepsTrained, ModulesToSaveWrapper):
    """A module of the head with a copy for each adapter, which also serves batches that mix adapters.

    PEFT's own wrapper mixes linear and convolutional layers only, and asks whether the active adapter has a copy where
    it has to ask for each one of the batch. And it freezes the copy that was active, where another may be trainable.
    """

    other_param_names = ("modules_to_save",)
    # PEFT's own map ends in a bare KeyError where a saved tensor is missing. With a tuner around the model, that one
    # puts the names into place and looks at all of the adapter's tensors together.
    named_by_tuner = False

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        return {} if self.named_by_tuner else super().adapter_state_dict_load_map(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.train_only([] if inference_mode else self.active_adapters)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        # PEFT hands over all that are active next, and refuses several even where only one has a copy.
        own = [name for name in new_active_adapters or () if name in self.modules_to_save]
        super().delete_adapter(adapter_name, own)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = None if self.disable_adapters else current_route.get()
        if route is None:
            return super().forward(*args, **kwargs)
        copies: dict[str, Any] = dict(self.modules_to_save.items())
        if route.whole is not None:
            whole: Any = copies.get(route.whole, self.original_module)
            return whole(*args, **kwargs)
        x, *others = args
        parts: list[tuple[Tensor, Tensor]] = []
        for name in dict.fromkeys(route.names):
            rows = route.rows(name, x, axes=2)
            module: Any = copies.get(name, self.original_module)
            # Features of another width than its own came padded to the widest.
            own = x[rows, ..., : module.in_features] if isinstance(module, nn.Linear) else x[rows]
            part = module(own, *(y[rows] if isinstance(y, Tensor) else y for y in others), **kwargs)
            if not isinstance(part, Tensor) or part.shape[:1] != rows.shape:
                raise ValueError(
                    f"A {type(self.original_module).__name__} of modules_to_save gives no tensor with a row for each "
                    "utterance, so that a batch with adapter_names cannot be put together again. If it computes a "
                    "loss, call the model without labels; else call it once for each adapter."
                )
            parts.append((rows, part))
        shapes = {tuple(part.shape[1:]) for _, part in parts}
        if len(shapes) > 1:
            raise ValueError(
                f"The heads of {', '.join(map(repr, dict.fromkeys(route.names)))} give outputs of different shapes, "
                f"{' and '.join(map(str, sorted(shapes)))}, which do not fit into one batch. Call the model once for "
                "each."
            )
        y = parts[0][1].new_empty(len(x), *shapes.pop())
        for rows, part in parts:
            y = y.index_copy(0, rows, part)
        return y


def head_copy(module: nn.Module, adapter_name: str) -> nn.Module:
    """The copy of a head's module that belongs to an adapter."""
    assert isinstance(module, ModulesToSaveWrapper)
    return module.modules_to_save[adapter_name]


def original(module: nn.Module) -> nn.Module:
    """The module of the backbone, without PEFT's wrapper."""
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def place_head(
    model: nn.Module,
    paths: list[str],
    adapter_name: str,
    active: bool,
    inference_mode: bool,
    replacements: dict[str, nn.Module],
    named_by_tuner: bool,
) -> None:
    """Give an adapter its own copy of the modules at `paths`, which are trained and saved with it.

    PEFT's own function finds modules by the end of their path, which cannot tell the linear layer `feature_extractor`
    of an x-vector head from the CNN of the same name.

    Args:
        model: The whole model.
        paths: Full paths of the modules.
        adapter_name: The adapter's name.
        active: Whether it is the active one.
        inference_mode: Whether its copy is frozen.
        replacements: Modules that take the place of a copy, by path.
        named_by_tuner: Whether the tuner names their tensors when they are loaded.
    """
    for path in paths:
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        module = getattr(parent, name)
        if isinstance(module, ModulesToSaveWrapper):
            wrapper: Any = module
            wrapper.update(adapter_name)
        else:
            wrapper = Head(module, adapter_name)
            wrapper.set_adapter([])
            setattr(parent, name, wrapper)
        wrapper.named_by_tuner = named_by_tuner
        if path in replacements:
            wrapper.modules_to_save[adapter_name] = replacements[path]
        wrapper.train(wrapper.original_module.training)
        if active:
            wrapper.set_adapter(adapter_name, inference_mode=inference_mode)
        else:
            wrapper.modules_to_save[adapter_name].requires_grad_(False)


def remove_head_copies(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter's copies of the head out again."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            del wrapper.modules_to_save[adapter_name]
            wrapper._adapters.discard(adapter_name)


def remove_head(model: nn.Module, only_unused: bool = False) -> None:
    """Put the backbone's own modules back in place of PEFT's wrappers; with `only_unused`, of those without a copy."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ModulesToSaveWrapper) and not (only_unused and child.modules_to_save):
                setattr(parent, name, child.original_module)
