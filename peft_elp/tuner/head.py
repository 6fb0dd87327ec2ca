"""A module of the head with a copy for each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_elp.call.route import Route, current_route
from peft_elp.wording import shortened

from .trained import KeepsTrained


class Head(KeepsTrained, ModulesToSaveWrapper):
    """A module of the head with a copy for each adapter, which also serves batches that mix adapters.

    PEFT's own wrapper mixes only linear and convolutional layers in a batch, and asks whether the active adapter has a
    copy where it should ask for each adapter of the batch. When it switches, it freezes the copy that was active,
    although another one may be trainable.
    """

    # PEFT's `ModulesToSaveWrapper` is subclassed. This relies on `original_module`, `modules_to_save` (a ModuleDict by
    # adapter name), `_adapters` (the set of names that have a copy) and `_active_adapter` (one name or a list).
    other_param_names = ("modules_to_save",)

    def __init__(self, module: nn.Module, active_adapters: Sequence[str] = ()) -> None:
        super().__init__(module, "")
        self._active_adapter = []

    def update(self, adapter_name: str, tied_module: Any = None, **kwargs: Any) -> None:
        """Do nothing: PEFT would copy the module here, and `place` is given the copy."""

    def place(self, container: str, adapter_name: str, copy: nn.Module) -> None:
        """Give an adapter its copy of the module, frozen."""
        self.original_module.requires_grad_(False)
        self.modules_to_save[adapter_name] = copy.train(self.original_module.training).requires_grad_(False)
        self._adapters.add(adapter_name)
        self.train(self.original_module.training)

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
        outputs: list[tuple[Tensor, Tensor]] = []
        for name in dict.fromkeys(route.names):
            indices = route.indices(name, x, axes=2)
            module: Any = copies.get(name, self.original_module)
            # Features that are narrower than the widest of the batch are padded.
            features = x[indices, ..., : module.in_features] if isinstance(module, nn.Linear) else x[indices]
            output = module(features, *(y[indices] if isinstance(y, Tensor) else y for y in others), **kwargs)
            if not isinstance(output, Tensor) or output.shape[:1] != indices.shape:
                raise ValueError(
                    f"A {type(self.original_module).__name__} of the head does not return one row per utterance, as "
                    "adapter_names needs: call the model without labels, or once per adapter."
                )
            outputs.append((indices, output))
        shapes = {tuple(output.shape[1:]) for _, output in outputs}
        if len(shapes) > 1:
            raise ValueError(
                f"The heads of {shortened(map(repr, dict.fromkeys(route.names)))} return different shapes, "
                f"{' and '.join(map(str, sorted(shapes)))}. Call the model once per adapter."
            )
        y = outputs[0][1].new_empty(len(x), *shapes.pop())
        for indices, output in outputs:
            y = y.index_copy(0, indices, output)
        return y
