"""PEFT tuner layers: one part of a backbone together with its adapters, by adapter name."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapters import EAdapter, LAdapter, PAdapter, TapSum
from .backbones import Backbone
from .call import StackCall, current_call, under_way
from .guards import reentrant_checkpointing

WHY_NO_MERGE = (
    "ELP-adapters cannot be merged into the backbone: an E-adapter is a non-linear bottleneck, an L-adapter reads "
    "every layer and a P-adapter adds frames, so no weight of the backbone could hold them. Keep the adapter: save it "
    "with save_pretrained() and load it next to the backbone, or call unload() to get the backbone back without it."
)


def first(output: Any) -> Tensor:
    """The hidden states in what a module returns: a tensor, a tuple that begins with one, or a `ModelOutput`."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, x: Tensor) -> Any:
    """The same output with hidden states `x`."""
    if isinstance(output, Tensor):
        return x
    if isinstance(output, tuple):
        return (x, *output[1:])
    output[next(iter(output))] = x
    return output


class Wrapper(nn.Module):
    """A module around `base_layer` that answers for it: attributes it lacks are those of `base_layer`."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class TappedLayer(Wrapper):
    """An encoder layer whose output the call under way can read.

    It is a wrapper rather than a hook so that taps stay outside of gradient checkpointing, and independent of the
    order in which Transformers installs its own hooks.

    Args:
        base_layer: The encoder layer.
        index: Its 0-based number.
    """

    def __init__(self, base_layer: nn.Module, index: int) -> None:
        super().__init__(base_layer)
        self.index = index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is None:
            return self.base_layer(*args, **kwargs)
        call.mark(args[0] if args else kwargs["hidden_states"])
        output = self.base_layer(*args, **kwargs)
        call.mark(first(output))
        call.tap(self.index, first(output))
        return output


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
        self.merged_adapters = []

    def place(self, container: str, adapter_name: str, adapter: nn.Module, inference_mode: bool) -> None:
        """Put a new adapter into one of the `adapter_layer_names`, with the device and dtype of `base_layer`."""
        getattr(self, container)[adapter_name] = adapter
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def running(self, container: nn.ModuleDict) -> list[str]:
        """The active adapters among those in `container`; none while adapters are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in container]

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


class ELPSublayer(ELPLayer):
    """A feed-forward or attention module whose output passes through the active E-adapters, one after the other."""

    adapter_layer_names = ("elp_e",)

    def __init__(self, base_layer: nn.Module, active_adapters: Sequence[str] = ()) -> None:
        super().__init__(base_layer, active_adapters)
        self.elp_e = nn.ModuleDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        for name in self.running(self.elp_e):
            adapter = self.elp_e[name]
            assert isinstance(adapter, EAdapter)
            z = first(output)
            output = with_first(output, adapter(self._cast_input_dtype(z, adapter.up.weight.dtype)).to(z.dtype))
        return output


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
        name = self.only_running(self.elp_norm, "The trained layer norms")
        if name is None:
            return self.base_layer(x)
        norm = self.elp_norm[name]
        return norm(self._cast_input_dtype(x, next(norm.parameters()).dtype)).to(x.dtype)


class ELPStack(ELPLayer):
    """An encoder stack with its L-adapters, which read its layers, and P-adapters, which join its input.

    Args:
        base_layer: The encoder stack.
        family: Its row in the table of backbones.
        active_adapters: The names that are active in the model that gets the layer.
    """

    adapter_layer_names = ("elp_l", "elp_p")

    def __init__(self, base_layer: nn.Module, family: Backbone, active_adapters: Sequence[str] = ()) -> None:
        super().__init__(base_layer, active_adapters)
        self.family = family
        self.tapped_layers: dict[str, list[int]] = {}  # by adapter name
        self.elp_l = nn.ModuleDict()
        self.elp_p = nn.ModuleDict()
        self._layerdrop: float | None = None  # the backbone's own, while it is off
        self._feature_encoder_grad: bool | None = None  # the backbone's own, while it is off

    @property
    def encoder_layers(self) -> nn.ModuleList:
        """The encoder layers, as they are listed in the stack."""
        layers = self.base_layer.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def layerdrop(self) -> float:
        """The probability with which the backbone skips a layer in training."""
        holder, name = self._layerdrop_at()
        return float(getattr(holder, name)) if name else 0.0

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._switch_layerdrop()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._switch_layerdrop()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.tapped_layers.pop(adapter_name, None)
        self._switch_layerdrop()

    def _layerdrop_at(self) -> tuple[Any, str]:
        path = self.family.layerdrop
        if path is None:
            return None, ""
        *holders, name = path.split(".")
        holder: Any = self.base_layer
        for attribute in holders:
            holder = getattr(holder, attribute)
        return holder, name

    def _switch_layerdrop(self) -> None:
        # A skipped layer has no tap. Off while an L-adapter is active, as the backbone has it otherwise.
        holder, name = self._layerdrop_at()
        if not name:
            return
        if self.running(self.elp_l):
            if self._layerdrop is None:
                self._layerdrop = getattr(holder, name)
                setattr(holder, name, 0.0)
        elif self._layerdrop is not None:
            setattr(holder, name, self._layerdrop)
            self._layerdrop = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the encoder; what comes back has as many frames as went in.

        Takes what the encoder takes: `hidden_states`, `(batch, frames, hidden)`, `attention_mask`, `(batch, frames)`
        or None, and whatever it forwards to its layers.
        """
        inputs = dict(zip(("hidden_states", "attention_mask"), args, strict=False)) | kwargs
        x, mask = inputs.pop("hidden_states"), inputs.pop("attention_mask", None)
        call = StackCall()
        for name in self.running(self.elp_p):
            adapter = self.elp_p[name]
            assert isinstance(adapter, PAdapter)
            x, mask, real = adapter(x, mask)
            call.real += (real,)
        x = self._ready_for_checkpointing(x)

        name = self.only_running(self.elp_l, "The L-adapters")
        if name is None:
            with under_way(call):
                output = self.base_layer(x, attention_mask=mask, **inputs)
            return with_first(output, call.without_pseudo_features(first(output))) if call.real else output

        adapter = self.elp_l[name]
        assert isinstance(adapter, LAdapter)
        call.taps = TapSum(adapter)
        call.tap_of_layer = {layer: tap for tap, layer in enumerate(self.tapped_layers[name])}
        # The last tap is the stack's output: on a pre-norm stack that is the layer's after the final norm.
        last = call.tap_of_layer.pop(len(self.encoder_layers) - 1, None)
        with under_way(call):
            output = self.base_layer(x, attention_mask=mask, **inputs)
        x = first(output)
        if last is not None:
            call.taps.add(last, x.to(call.taps.shares.dtype))
        y = call.taps.result().to(x.dtype)
        return with_first(output, call.without_pseudo_features(x + y if adapter.residual else y))

    def _ready_for_checkpointing(self, x: Tensor) -> Tensor:
        """`x`, made to require a gradient where re-entrant checkpointing would otherwise lose the adapters'."""
        if not (self.training and torch.is_grad_enabled()):
            return x
        layer = self.encoder_layers[0]
        if not reentrant_checkpointing(layer.base_layer if isinstance(layer, Wrapper) else layer):
            return x
        if not self.family.reentrant_checkpointing:
            raise RuntimeError(
                f"{type(self.base_layer).__name__} never returns under re-entrant gradient checkpointing, with or "
                "without adapters. Enable the other form: "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}), or with "
                "Trainer TrainingArguments(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        # A copy, since the stack writes into its input and PyTorch allows no writing into a leaf.
        return x if x.requires_grad else x.detach().requires_grad_().clone()
