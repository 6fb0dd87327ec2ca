"""PEFT tuner layers: one part of a backbone together with its adapters, by adapter name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapters import EAdapter, LAdapter, PAdapter, TapSum
from .backbones import Backbone
from .call import StackCall, current_call, first, under_way, with_first, without_pseudo_features
from .guards import reentrant_checkpointing

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
        self.training = base_layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is None:
            return self.base_layer(*args, **kwargs)
        args, kwargs = call.before_layer(args, kwargs)
        return call.after_layer(self.index, self.base_layer(*args, **kwargs))


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
        """Put a new adapter into one of the `adapter_layer_names`, with device, dtype and mode of `base_layer`."""
        getattr(self, container)[adapter_name] = adapter.train(self.training)
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
        if self.family.layerdrop is None:
            return None, ""
        path, _, name = self.family.layerdrop.rpartition(".")
        return self._attribute(path) if path else self.base_layer, name

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

    def train(self, mode: bool = True) -> ELPStack:
        """Set the mode of training; batch norms of the frozen encoder stay in evaluation.

        Their running statistics are not saved with an adapter, so a loaded one would not be the trained one.
        """
        super().train(mode)
        for norm in self.frozen_norms():
            norm.eval()
        return self

    def frozen_norms(self) -> list[nn.Module]:
        """The batch norms of the encoder."""
        kind = nn.modules.batchnorm._BatchNorm
        return [module for module in self.base_layer.modules() if isinstance(module, kind)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the encoder; what comes back has as many frames as it has without adapters.

        Takes what the encoder takes. Where the front end is outside: `hidden_states`, `(batch, frames, hidden)`,
        `attention_mask`, `(batch, frames)` or None, and whatever the stack forwards to its layers.
        """
        call = StackCall(needs_gradient=self._loses_gradients(), copy_taps=self.family.tap_in_place)
        prompts: list[Any] = [self.elp_p[name] for name in self.running(self.elp_p)]
        if prompts and self.family.front_end_inside:
            call.pseudo = torch.cat([adapter.rows for adapter in prompts])
            call.positions = self._positions()
        elif prompts:
            args, kwargs = self._join(call, prompts, args, kwargs)

        name = self.only_running(self.elp_l, "The L-adapters")
        if name is not None:
            adapter = self.elp_l[name]
            assert isinstance(adapter, LAdapter)
            call.taps = TapSum(adapter)
            call.tap_of_layer = {layer: tap for tap, layer in enumerate(self.tapped_layers[name])}
            call.last_layer = len(self.encoder_layers) - 1
            call.ends_in_layer = self.family.taps_end == "last layer"
        with under_way(call):
            output = self.base_layer(*args, **kwargs)
        x = call.after_stack(first(output))
        # Carried pseudo features left the frames where each layer ended.
        return with_first(output, x if self.family.front_end_inside else without_pseudo_features(x, call.real))

    def _join(
        self, call: StackCall, prompts: list[PAdapter], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the stack with pseudo features among its frames."""
        names = ("hidden_states", "attention_mask")
        inputs = {names[place]: value for place, value in enumerate(args)} | kwargs
        x, mask = inputs.pop("hidden_states"), inputs.pop("attention_mask", None)
        call.squeeze = int(self._attribute(self.family.squeeze) or 1)
        for adapter in prompts:
            x, mask, real = adapter(x, mask, call.squeeze)
            call.real += (real,)
        chunk = self._attribute(self.family.attention_chunk)
        if chunk and x.shape[1] > chunk:
            raise ValueError(
                f"With its pseudo features this batch has {x.shape[1]} frames, and the attention of "
                f"{type(self.base_layer).__name__} sees {chunk} at a time ({self.family.attention_chunk}): most "
                "frames would not see the pseudo features. Shorten the audio, raise the chunk, or leave P out of "
                "adapters."
            )
        return (x,), {**inputs, "attention_mask": mask}

    def _positions(self) -> Callable[[Tensor, Tensor], Any] | None:
        """How the stack computes what its layers know of positions, from hidden states and the numbers of frames."""
        if self.family.rotary:
            return self._attribute(self.family.rotary)
        relative = self._attribute(self.family.positions)
        return None if relative is None else lambda x, numbers: relative(x)

    def _attribute(self, path: str | None) -> Any:
        value: Any = self.base_layer
        for name in path.split(".") if path else ():
            value = getattr(value, name)
        return value if path else None

    def _loses_gradients(self) -> bool:
        """Whether re-entrant checkpointing is on, which loses gradients inside of layers whose input needs none."""
        if not (self.training and torch.is_grad_enabled()):
            return False
        layer = self.encoder_layers[0]
        if not reentrant_checkpointing(layer.base_layer if isinstance(layer, Wrapper) else layer):
            return False
        if not self.family.reentrant_checkpointing:
            raise RuntimeError(
                f"{type(self.base_layer).__name__} never returns under re-entrant gradient checkpointing, with or "
                "without adapters. Enable the other form: "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}), or with "
                "Trainer TrainingArguments(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        return True
