"""PEFT tuner layers: one part of a backbone together with its adapters, by adapter name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence, Set
from copy import deepcopy
from functools import partial
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapters import EAdapter, LAdapter, TapSum, join_each
from .backbones import Backbone
from .call import StackCall, Taps, current_call, without_pseudo_features
from .guards import reentrant_checkpointing
from .head_config import TaskHead
from .outputs import another, first, with_first
from .routing import Route, current_route
from .sharing import SharedPass, current_pass, readers_of_pass

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
        z = first(output)
        mixed = self.mixed(self.elp_e, z)
        if mixed is None:
            for name in self.running(self.elp_e):
                z = self._through(name, z)
        else:
            for name, rows in mixed:
                z = z.index_copy(0, rows, self._through(name, z[rows]))
        return with_first(output, z)

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
        self.task_head = TaskHead(None)
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
        self._follow_adapters()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._follow_adapters()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.forget(adapter_name)

    def forget(self, adapter_name: str) -> None:
        """Drop what the stack knows of an adapter that is gone."""
        self.tapped_layers.pop(adapter_name, None)
        self.task_head.settings.pop(adapter_name, None)
        self._follow_adapters()

    def _follow_adapters(self) -> None:
        self.task_head.follow(self.active_adapters, not self.disable_adapters)
        self._switch_layerdrop()

    def _layerdrop_at(self) -> tuple[Any, str]:
        if self.family.layerdrop is None:
            return None, ""
        path, _, name = self.family.layerdrop.rpartition(".")
        return self._attribute(path) if path else self.base_layer, name

    def _switch_layerdrop(self, off: bool = False) -> None:
        # A skipped layer has no tap. Off while an L-adapter is active, as the backbone has it otherwise.
        holder, name = self._layerdrop_at()
        if not name:
            return
        if off or self.running(self.elp_l):
            if self._layerdrop is None:
                self._layerdrop = getattr(holder, name)
                setattr(holder, name, 0.0)
        elif self._layerdrop is not None:
            setattr(holder, name, self._layerdrop)
            self._layerdrop = None

    def _runs_in_layers(self) -> bool:
        """Whether an active adapter has parameters inside of the encoder layers."""
        parts = [module for module in self.modules() if isinstance(module, (ELPSublayer, ELPNorm))]
        return any(self.running(getattr(part, name)) for part in parts for name in part.adapter_layer_names)

    def _keep_processes_in_step(self) -> None:
        """Switch LayerDrop off where several processes train the layers: each waits for the gradients of all of them.

        Here rather than in `set_adapter`, since processes may be joined after the adapters are placed.
        """
        if not (self.training and self.layerdrop > 0 and self._layerdrop is None):
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized() and self._runs_in_layers():
            warnings.warn(
                f"LayerDrop ({self.family.layerdrop}={self.layerdrop}) is off while adapters inside the encoder "
                "layers are trained by several processes: in a skipped layer they have no gradient, and "
                "DistributedDataParallel waits for one. unload() restores it.",
                stacklevel=3,
            )
            self._switch_layerdrop(off=True)

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
        self._keep_processes_in_step()
        shared = None if self.disable_adapters else readers_of_pass()
        if shared is not None and shared.output is not None:
            return another(shared.output, shared.ends[shared.task])
        # Readers have nothing inside of the layers. A layer that ran again for its gradients, in the backward pass,
        # would know nothing of the shared one, and run with the adapters that are active.
        needs_gradient = self._loses_gradients() and shared is None
        call = StackCall(shared=shared, needs_gradient=needs_gradient, copy_taps=self.family.tap_in_place)
        route = None if self.disable_adapters else current_route.get()
        args, kwargs = self._with_pseudo_features(call, route, args, kwargs)
        call.taps = self._taps(route) if shared is None else _taps_of_all(shared)
        call.last_layer = len(self.encoder_layers) - 1
        call.ends_in_layer = self.family.taps_end == "last layer"
        with current_call.set(call):
            output = self.base_layer(*args, **kwargs)
        x = call.after_stack(first(output))
        if shared is not None and not call.ends_in_layer:
            shared.output = another(output, first(output))
        # Carried pseudo features left the frames where each layer ended.
        return with_first(output, x if self.family.front_end_inside else without_pseudo_features(x, call.real))

    def _taps(self, route: Route | None) -> tuple[Taps, ...]:
        if route is not None:
            return tuple(
                self._taps_of(name, partial(route.rows, name)) for name in route.adapters if name in self.elp_l
            )
        name = self.only_running(self.elp_l, "The L-adapters")
        return () if name is None else (self._taps_of(name),)

    def _taps_of(self, name: str, rows: Callable[[Tensor], Tensor] | None = None) -> Taps:
        adapter = self.elp_l[name]
        assert isinstance(adapter, LAdapter)
        return Taps(TapSum(adapter), {layer: tap for tap, layer in enumerate(self.tapped_layers[name])}, rows)

    def _with_pseudo_features(
        self, call: StackCall, route: Route | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the stack with pseudo features among its frames, where they do not travel beside them."""
        names = self.running(self.elp_p) if route is None else [name for name in route.adapters if name in self.elp_p]
        if not names:
            return args, kwargs
        prompts: list[Any] = [self.elp_p[name] for name in names]
        if self.family.front_end_inside:
            call.positions = self._positions()
            if route is None:
                call.pseudo = torch.cat([adapter.rows for adapter in prompts])
            else:
                call.pseudo, counts, _ = self._own_rows(route, names)
                call.counts = None if len(counts.unique()) == 1 else counts
            return args, kwargs

        inputs = {("hidden_states", "attention_mask")[place]: value for place, value in enumerate(args)} | kwargs
        x, mask = inputs.pop("hidden_states"), inputs.pop("attention_mask", None)
        call.squeeze = int(self._attribute(self.family.squeeze) or 1)
        if route is None:
            for adapter in prompts:
                x, mask, real = adapter(x, mask, call.squeeze)
                call.real += (real,)
        else:
            x, mask, real = join_each(x, mask, *self._own_rows(route, names), call.squeeze)
            call.real = (real,)
        chunk = self._attribute(self.family.attention_chunk)
        if chunk and x.shape[1] > chunk:
            raise ValueError(
                f"With its pseudo features this batch has {x.shape[1]} frames, and the attention of "
                f"{type(self.base_layer).__name__} sees {chunk} at a time ({self.family.attention_chunk}): most "
                "frames would not see the pseudo features. Shorten the audio, raise the chunk, or leave P out of "
                "adapters."
            )
        return (x,), {**inputs, "attention_mask": mask}

    def _own_rows(self, route: Route, names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """For each utterance of a mixed batch: pseudo features, how many are its own, whether they come first."""
        prompts: list[Any] = [self.elp_p[name] for name in names]
        length = max(len(adapter.rows) for adapter in prompts)
        none = torch.zeros_like(prompts[0].rows[:1]).expand(length, -1)
        table = [nn.functional.pad(adapter.rows, (0, 0, 0, length - len(adapter.rows))) for adapter in prompts]
        which = torch.tensor([names.index(name) if name in names else -1 for name in route.names])
        counts = torch.tensor([*(len(adapter.rows) for adapter in prompts), 0])[which]
        before = torch.tensor([*(adapter.position == "prepend" for adapter in prompts), False])[which]
        device = none.device
        rows = torch.stack([*table, none])[which.to(device)]
        return rows, counts[:, None].to(device), before[:, None].to(device)

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


def _taps_of_all(shared: SharedPass) -> tuple[Taps, ...]:
    """The sums of all tasks that share a pass, where the layers run; of none, where they ran already."""
    if shared.ends:
        return ()
    return tuple(
        Taps(TapSum(adapter), {layer: tap for tap, layer in enumerate(layers)}, task=task)
        for task, (adapter, layers) in shared.readers.items()
    )
