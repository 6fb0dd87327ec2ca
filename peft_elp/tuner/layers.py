"""PEFT tuner layers: one part of a backbone together with its adapters, by adapter name."""

from __future__ import annotations

from collections.abc import Sequence, Set
from copy import deepcopy
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_elp.adapters import EAdapter
from peft_elp.call.outputs import hidden_states_of, with_hidden_states
from peft_elp.call.route import current_route
from peft_elp.call.shared_pass import current_pass
from peft_elp.call.stack_call import current_call

WHY_NO_MERGE = (
    "ELP-adapters cannot be merged into the backbone: an E-adapter is a non-linear bottleneck, an L-adapter reads "
    "every layer and a P-adapter adds frames, so no weight of the backbone could hold them. Keep the adapter: save it "
    "with save_pretrained() and load it next to the backbone, or call unload() to get the backbone back without it."
)


class Wrapper(nn.Module):
    """A module around `base_layer` that answers for it: attributes it lacks are those of `base_layer`."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def keep_names(self) -> None:
        """Leave the wrapper out of the names in a state dict, as PyTorch's own wrapper for checkpointing does.

        An adapter's file, the backbone's checkpoint and the adapted model then agree on names, and Transformers, which
        matches the first with the last, finds each tensor.
        """
        if _named_without_wrapper not in self._state_dict_hooks.values():
            self.register_state_dict_post_hook(_named_without_wrapper)
            self.register_load_state_dict_pre_hook(_named_with_wrapper)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def _named_without_wrapper(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    inside = f"{prefix}base_layer."
    for key in [key for key in state_dict if key.startswith(inside)]:
        state_dict[prefix + key.removeprefix(inside)] = state_dict.pop(key)


def _named_with_wrapper(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = tuple(f"{prefix}{name}." for name, _ in module.named_children())
    for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]:
        state_dict[f"{prefix}base_layer.{key.removeprefix(prefix)}"] = state_dict.pop(key)


class ELPLayer(Wrapper, BaseTunerLayer):
    """Base of the tuner layers: what PEFT asks of each.

    Args:
        base_layer: The wrapped part of the backbone.
        active_adapters: The names that are active in the model that gets the layer.
    """

    def __init__(self, base_layer: nn.Module, active_adapters: Sequence[str] = ()) -> None:
        super().__init__(base_layer)
        self._active_adapter = list(active_adapters)
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # which PEFT's disable_input_dtype_casting switches
        self.merged_adapters = []
        self._trainable: Set[str] = frozenset()  # adapters that may be; all others are frozen

    def place(self, container: str, adapter_name: str, adapter: nn.Module, inference_mode: bool) -> None:
        """Put a new adapter into one of the `adapter_layer_names`, with device, dtype and mode of `base_layer`."""
        getattr(self, container)[adapter_name] = adapter.train(self.training).requires_grad_(False)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and the only trainable ones unless `inference_mode` is set.

        PEFT visits every adapter to freeze it. This visits those that were trainable or will be, so that switching
        costs the same with two adapters and with fifty.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        trainable = frozenset() if inference_mode else frozenset(names)
        for container in self.adapter_layer_names:
            adapters = getattr(self, container)
            for name in self._trainable | trainable:
                if name in adapters:
                    adapters[name].requires_grad_(name in trainable)
        self._trainable = trainable
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        if requires_grad:
            self._trainable |= {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)

    def running(self, container: nn.ModuleDict) -> list[str]:
        """The adapters of the whole batch among those in `container`; none while adapters are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in container]

    def mixed(self, container: nn.ModuleDict, x: Tensor) -> list[tuple[str, Tensor]] | None:
        """The adapters in `container` that serve a part of the batch `x`, each with its rows; None: no mixed batch."""
        route = None if self.disable_adapters else current_route.get()
        if route is None:
            return None
        return [(name, route.rows(name, x)) for name in route.adapters if name in container]

    def only_running(self, container: nn.ModuleDict, what: str) -> str | None:
        """The one active adapter in `container`, None if there is none.

        Raises:
            ValueError: Several are active, where only one can be.
        """
        names = self.running(container)
        if len(names) > 1:
            raise ValueError(
                f"{what} of {' and '.join(map(repr, names))} cannot be active together: each would take the other's "
                "place. Activate one of them with set_adapter(name)."
            )
        return names[0] if names else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise ValueError(WHY_NO_MERGE)

    def unmerge(self) -> NoReturn:
        raise ValueError(WHY_NO_MERGE)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # PEFT looks for a `weight`; a feed-forward module or a whole encoder has none of its own.
        for parameter in base_layer.parameters():
            if parameter.dtype.is_floating_point:
                return parameter.device, parameter.dtype
        return None, None

    def __repr__(self) -> str:
        return "elp." + super().__repr__()


class TappedLayer(ELPLayer):
    """An encoder layer whose output the call under way can read.

    It is a wrapper rather than a hook so that taps stay outside of gradient checkpointing, and independent of the
    order in which Transformers installs its own hooks. It holds no adapter, but as a tuner layer it is left out where
    PEFT names the backbone's tensors.

    Args:
        base_layer: The encoder layer.
        index: Its 0-based number.
        active_adapters: The names that are active in the model that gets the layer.
    """

    adapter_layer_names = ()

    def __init__(self, base_layer: nn.Module, index: int, active_adapters: Sequence[str] = ()) -> None:
        super().__init__(base_layer, active_adapters)
        self.index = index
        self.training = base_layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = current_call.get()
        if call is None:
            return self.base_layer(*args, **kwargs)
        args, kwargs = call.before_layer(args, kwargs)
        if call.shared is not None and call.shared.ends:
            output = call.shared.replay(self.index, args[0] if args else kwargs["hidden_states"])
        else:
            output = self.base_layer(*args, **kwargs)
            if call.shared is not None and call.ends_in_layer:
                call.shared.keep(self.index, output)
        return call.after_layer(self.index, output)


class FrontEnd(Wrapper):
    """The convolutions over the waveform, which run once for all tasks that share a pass.

    It holds no adapter and is no tuner layer: PEFT asks the first of these which adapters are active. And it comes
    with the first shared pass, when a state dict may have been saved already.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.training = base_layer.training
        self.keep_names()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shared = current_pass.get()
        if shared is None:
            return self.base_layer(*args, **kwargs)
        if shared.features is None:
            shared.features = self.base_layer(*args, **kwargs)
        return shared.features


class ELPSublayer(ELPLayer):
    """A feed-forward or attention module whose output passes through the active E-adapters, one after the other."""

    adapter_layer_names = ("elp_e",)

    def __init__(self, base_layer: nn.Module, active_adapters: Sequence[str] = ()) -> None:
        super().__init__(base_layer, active_adapters)
        self.elp_e = nn.ModuleDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        z = hidden_states_of(output)
        mixed = self.mixed(self.elp_e, z)
        if mixed is None:
            for name in self.running(self.elp_e):
                z = self._through(name, z)
        else:
            for name, rows in mixed:
                z = z.index_copy(0, rows, self._through(name, z[rows]))
        return with_hidden_states(output, z)

    def _through(self, name: str, z: Tensor) -> Tensor:
        adapter = self.elp_e[name]
        assert isinstance(adapter, EAdapter)
        return adapter(self._cast_input_dtype(z, adapter.up.weight.dtype)).to(z.dtype)


class ELPNorm(ELPLayer):
    """A layer norm that gives way to the active adapter's trained copy of it."""

    adapter_layer_names = ("elp_norm",)

    def __init__(self, base_layer: nn.Module, active_adapters: Sequence[str] = ()) -> None:
        super().__init__(base_layer, active_adapters)
        self.elp_norm = nn.ModuleDict()

    def copy_for(self, adapter_name: str, inference_mode: bool) -> None:
        """Give an adapter its own copy, which starts as the backbone's."""
        self.place("elp_norm", adapter_name, deepcopy(self.base_layer), inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixed(self.elp_norm, x)
        if mixed is not None:
            y = self.base_layer(x)
            for name, rows in mixed:
                y = y.index_copy(0, rows, self._through(name, x[rows]))
            return y
        name = self.only_running(self.elp_norm, "The trained layer norms")
        return self.base_layer(x) if name is None else self._through(name, x)

    def _through(self, name: str, x: Tensor) -> Tensor:
        norm = self.elp_norm[name]
        return norm(self._cast_input_dtype(x, next(norm.parameters()).dtype)).to(x.dtype)
