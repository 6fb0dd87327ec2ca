"""The head of a model: which modules it consists of, and the copies of them that each adapter has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_elp.call.route import Route, current_route
from peft_elp.wording import brief, shortened

from .offload import copy_with_weights, is_kept_elsewhere
from .paths import canonical, join
from .trained import KeepsTrained


def find_head(model: nn.Module, backbone_path: str, is_encoder: Callable[[nn.Module], bool]) -> list[str]:
    """The paths of the modules outside the speech encoder.

    The head is found without knowing its name: it is every module with parameters that is not on the way from the
    model to the encoder. A bare model of Transformers has no head, so that the search ends there. The modules in a
    list are named one by one, since a list is never called.

    Args:
        model: The whole model.
        backbone_path: The path of the speech encoder; empty if the model is the encoder.
        is_encoder: Whether a module is an encoder stack. A module that contains one does not belong to a head.
    """
    head: list[str] = []
    steps = backbone_path.split(".") if backbone_path else []
    here, path = model, ""
    for step in steps:
        if _is_bare(type(here)):
            break
        bare = [name for name, _ in here.named_parameters(recurse=False)]
        if bare:
            warnings.warn(
                f"{shortened(bare)} of {type(here).__name__} stay frozen and are not saved with the adapter: PEFT "
                "trains modules, and these are parameters outside any module of the head. "
                + (
                    "For a trained sum over layers, use an L-adapter instead of use_weighted_layer_sum."
                    if "layer_weights" in bare
                    else "To train them, move them into a module."
                ),
                stacklevel=2,
            )
        for name, child in here.named_children():
            if name != step and not any(is_encoder(module) for module in child.modules()):
                head += _callable_modules(join(path, name), child)
        here, path = here.get_submodule(step), join(path, step)
    return head


def _is_bare(model_class: type) -> bool:
    """Whether this is a bare model of Transformers: what it contains beside the encoder is pre-trained with it."""
    return model_class.__module__.startswith("transformers.") and model_class.__name__.endswith("Model")


def _callable_modules(path: str, module: nn.Module) -> list[str]:
    """The path of a module with parameters, or of the modules in a list or dictionary, which is not called itself."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [
            inner for name, child in module.named_children() for inner in _callable_modules(join(path, name), child)
        ]
    return [path] if any(True for _ in module.parameters()) else []


def resolve(model: nn.Module, names: list[str], stack_path: str, head: list[str]) -> list[str]:
    """The full paths of the modules that `modules_to_save` names.

    A name that is the full path of a module means that module alone. Any other name means all modules whose path ends
    with it.

    Args:
        model: The whole model.
        names: The names.
        stack_path: The path of the encoder stack.
        head: The paths of the head's modules, for the errors.

    Raises:
        ValueError: A name means no module, or a module around or inside the encoder stack, where the adapters are.
    """
    modules = {canonical(name): module for name, module in model.named_modules() if ".modules_to_save." not in name}
    paths: list[str] = []
    for name in names:
        found = [name] if name in modules else [path for path in modules if path.endswith(f".{name}")]
        found = [inner for path in found for inner in _callable_modules(path, modules[path])]
        if not found:
            raise ValueError(
                f"modules_to_save names {brief(name)}, and {type(model).__name__} has no such module with parameters. "
                f"Its head is {brief(head) if head else 'empty: it is a bare encoder'}. modules_to_save=None trains "
                "the whole head."
            )
        for path in found:
            if f"{stack_path}.".startswith(f"{path}.") or path.startswith(f"{stack_path}."):
                raise ValueError(
                    f"modules_to_save names {brief(name)}, which means {path!r}: that lies around or inside the "
                    f"encoder {stack_path!r}, where the adapters are. Name modules outside of it, such as "
                    f"{brief(head) if head else 'a head'}."
                )
        paths += [path for path in found if path not in paths]
    return paths


class Head(KeepsTrained, ModulesToSaveWrapper):
    """A module of the head with a copy for each adapter, which also serves batches that mix adapters.

    PEFT's own wrapper mixes only linear and convolutional layers in a batch, and asks whether the active adapter has a
    copy where it should ask for each adapter of the batch. When it switches, it freezes the copy that was active,
    although another one may be trainable.
    """

    # PEFT's `ModulesToSaveWrapper` is subclassed. This relies on `original_module`, `modules_to_save` (a ModuleDict by
    # adapter name), `_adapters` (the set of names that have a copy) and `_active_adapter` (one name or a list).
    other_param_names = ("modules_to_save",)
    # PEFT's own map ends in a bare KeyError if a saved tensor is missing. With a tuner around the model, the tuner
    # names the tensors of the head, and compares them together with the adapter's other tensors.
    named_by_tuner = False

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        return {} if self.named_by_tuner else super().adapter_state_dict_load_map(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.train_only([] if inference_mode else self.active_adapters)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        # PEFT passes all adapters that are active next, and refuses several even if only one of them has a copy.
        with_copy = [name for name in new_active_adapters or () if name in self.modules_to_save]
        super().delete_adapter(adapter_name, with_copy)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = None if self.disable_adapters else current_route.get()
        if route is None:
            return super().forward(*args, **kwargs)
        copies: dict[str, Any] = dict(self.modules_to_save.items())
        if route.whole is not None:
            module: Any = copies.get(route.whole, self.original_module)
            return module(*args, **kwargs)
        return self._mixed(route, copies, *args, **kwargs)

    def _mixed(self, route: Route, copies: dict[str, Any], x: Tensor, *others: Any, **kwargs: Any) -> Tensor:
        """The output for a batch whose utterances use different adapters."""
        outputs: list[tuple[Tensor, Tensor]] = []
        for name in dict.fromkeys(route.names):
            indices = route.indices(name, x, axes=2)
            module: Any = copies.get(name, self.original_module)
            # Features that are narrower than the widest of the batch are padded.
            features = x[indices, ..., : module.in_features] if isinstance(module, nn.Linear) else x[indices]
            output = module(features, *(y[indices] if isinstance(y, Tensor) else y for y in others), **kwargs)
            if not isinstance(output, Tensor) or output.shape[:1] != indices.shape:
                raise ValueError(
                    f"A {type(self.original_module).__name__} of the head does not return one row per utterance, so a "
                    "batch with adapter_names cannot be put together again. If it computes a loss, call the model "
                    "without labels. Else call the model once per adapter."
                )
            outputs.append((indices, output))
        shapes = {tuple(output.shape[1:]) for _, output in outputs}
        if len(shapes) > 1:
            raise ValueError(
                f"The heads of {shortened(map(repr, dict.fromkeys(route.names)))} return different shapes, "
                f"{' and '.join(map(str, sorted(shapes)))}, which do not fit into one batch. Call the model once per "
                "adapter."
            )
        y = outputs[0][1].new_empty(len(x), *shapes.pop())
        for indices, output in outputs:
            y = y.index_copy(0, indices, output)
        return y


def original(module: nn.Module) -> nn.Module:
    """The module that the model has without adapters."""
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
    """Give an adapter copies of the modules at `paths`, which are trained and saved with it.

    PEFT's own function finds modules by the end of their path. It cannot distinguish the linear layer
    `feature_extractor` of an x-vector head from the convolutions of the same name.

    Args:
        model: The whole model.
        paths: Full paths of the modules.
        adapter_name: The adapter's name.
        active: Whether the adapter is the active one.
        inference_mode: Whether its copies are frozen.
        replacements: Modules to use instead of a copy, by path.
        named_by_tuner: Whether the tuner names the copies' tensors when they are loaded.
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
        elif is_kept_elsewhere(wrapper.original_module):
            # PEFT's copy would be given the weights of the original again in each call.
            wrapper.modules_to_save[adapter_name] = copy_with_weights(wrapper.original_module)
        wrapper.train(wrapper.original_module.training)
        if active:
            wrapper.set_adapter(adapter_name, inference_mode=inference_mode)
        else:
            wrapper.modules_to_save[adapter_name].requires_grad_(False)


def remove_head_copies(model: nn.Module, adapter_name: str) -> None:
    """Remove the copies of the head that belong to an adapter."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            del wrapper.modules_to_save[adapter_name]
            wrapper._adapters.discard(adapter_name)


def remove_head(model: nn.Module, only_unused: bool = False) -> None:
    """Replace PEFT's wrappers by the modules that they wrap.

    Args:
        model: The whole model.
        only_unused: Keep the wrappers that hold a copy for some adapter.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ModulesToSaveWrapper) and not (only_unused and child.modules_to_save):
                setattr(parent, name, child.original_module)
