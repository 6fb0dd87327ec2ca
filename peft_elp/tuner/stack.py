"""The tuner layer around an encoder stack: its L- and P-adapters, and what surrounds one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from peft_elp.adapters import LAdapter, TapSum
from peft_elp.adapters.pseudo import RealFrames, join_each
from peft_elp.backbones import Backbone
from peft_elp.call.hidden_states import mark_replaced, without_pseudo_features
from peft_elp.call.outputs import another, hidden_states_of, with_hidden_states
from peft_elp.call.own_frames import mask_of, own_frames_weight
from peft_elp.call.reports import are_watched
from peft_elp.call.route import Route, current_route
from peft_elp.call.shared_pass import SharedPass, current_pass, readers_of_pass
from peft_elp.call.stack_call import StackCall, TapReader, current_call
from peft_elp.parameters import SETTINGS

from .head_config import TaskHead
from .layers import ELPLayer, TappedLayer
from .layout import lay_out_time_first, transposing_parts
from .patches import Patches
from .window import Window, common_window, window_text
from .wrapper import Wrapper


class ELPStack(ELPLayer):
    """An encoder stack with its L-adapters, which read its layers, and P-adapters, which join its input."""

    adapter_layer_names = ("elp_l", "elp_p")
    other_param_names = (SETTINGS,)
    # Declared with values, so that they are never those of `base_layer`.
    family: Backbone = Backbone()
    depth: int = 0
    said: bool = False  # Whether the warning about a missing mask was given.

    def __init__(self, base_layer: nn.Module, family: Backbone, active_adapters: Sequence[str] = ()) -> None:
        super().__init__(base_layer, active_adapters)
        self.family = family
        self.tapped_layers = {}  # By adapter name.
        # For each adapter whose taps may read cached features, the names of the encoders that computed them.
        self.cacheable: dict[str, set[str]] = {}
        self.own_frames: set[str] = set()  # Adapters whose head averages over a recording's own frames.
        self.windows: dict[str, int] = {}  # Seconds by adapter name, if an adapter has a shorter window.
        self.patches = Patches()
        self.loading_checks: list[Any] = []  # Of adapters that Transformers loads.
        self.while_active = Patches()  # LayerDrop and layout, unless adapters are disabled.
        self.window = Window(base_layer, family.window)
        self.elp_l = nn.ModuleDict()
        self.elp_p = nn.ModuleDict()
        self.elp_settings = nn.ModuleDict()
        self.task_head = TaskHead()
        self.depth = len(self.encoder_layers)

    @property
    def encoder_layers(self) -> nn.ModuleList:
        """The encoder layers, as they are listed in the stack."""
        layers = self.base_layer.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def check_set_adapter(self, adapter_names: Sequence[str]) -> None:
        """Refuse adapters that take windows of different lengths."""
        common_window(self.windows.get(name) for name in adapter_names)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.follow_adapters()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.follow_adapters()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.tapped_layers.pop(adapter_name, None)
        self.cacheable.pop(adapter_name, None)
        self.windows.pop(adapter_name, None)
        self.own_frames.discard(adapter_name)
        self.task_head.settings.pop(adapter_name, None)
        self.follow_adapters()
        if not self.elp_settings:
            self._release_norms()

    def hold_frozen_norms(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook of a model without a PeftModel, whose `train` switches all batch norms."""
        if model.training and self.elp_settings:
            set_frozen_norms(model, False)

    def release(self) -> None:
        """Undo what the stack has changed around itself, before `base_layer` takes its place again."""
        self.window.restore()
        self.task_head.follow([], enabled=False)
        self.while_active.undo()
        self.patches.undo()
        for index, layer in enumerate(self.encoder_layers):
            if isinstance(layer, TappedLayer):
                self.encoder_layers[index] = layer.base_layer
        self._release_norms()

    def _release_norms(self) -> None:
        set_frozen_norms(self.task_head.model or self.base_layer, self.training)

    def follow_adapters(self) -> None:
        """Let the head, LayerDrop, the window and the layout of hidden states follow the active adapters."""
        self.task_head.follow(self.active_adapters, not self.disable_adapters)
        active = [] if self.disable_adapters else self.active_adapters
        self.window.follow(self.windows.get(name) for name in active)
        if not active:  # PyTorch rounds differently in another layout, and disabled adapters must leave no trace.
            self.while_active.undo()
            return
        # In a skipped layer a tap has nothing to read, and an E-adapter gets no gradient, which
        # DistributedDataParallel waits for.
        path, _, name = (self.family.layerdrop or "").rpartition(".")
        holder: Any = self._attribute(path) or self.base_layer
        if name and getattr(holder, name):
            self.while_active.set_attribute(holder, name, 0.0)
        if not self.while_active.handles:
            self.while_active.handles = [
                part.register_forward_pre_hook(lay_out_time_first, with_kwargs=True)
                for part in transposing_parts(self.encoder_layers, self.family)
            ]

    def check_depth(self) -> None:
        """Refuse an encoder whose layers have been cut after its adapters were placed."""
        if len(self.encoder_layers) != self.depth:
            raise RuntimeError(
                f"The {type(self.base_layer).__name__} had {self.depth} layers when its adapters were placed and has "
                f"{len(self.encoder_layers)} now. Cut layers before get_peft_model or after unload()."
            )

    def _check_window(self, route: Route) -> None:
        """Refuse adapters that a call names if the encoder has the window of the active one, which is another."""
        chunk_length = common_window(self.windows.get(name) for name in route.names)
        active_s = common_window(self.windows.get(name) for name in self.active_adapters)
        if chunk_length != active_s:
            raise ValueError(
                f"The adapters of this call take {window_text(chunk_length)}, and the active adapter takes "
                f"{window_text(active_s)}. First call set_adapter with one of {[*route.adapters]}."
            )

    def train(self, mode: bool = True) -> ELPStack:
        """Set the training mode. The batch norms of the frozen encoder stay in evaluation mode."""
        super().train(mode)
        set_frozen_norms(self.base_layer, False)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the encoder, on what it takes. The output has as many frames as without adapters."""
        self.check_depth()
        current = current_pass.get()
        if current is not None and current.cached is not None:
            current.enter("encoder")
            return self._over_own_frames(self._from_cache(current.cached, current.encoder), None, args, kwargs)
        route = None if self.disable_adapters else current_route.get()
        if route is not None and self.windows:
            self._check_window(route)
        self.window.check(args[0] if args else kwargs.get("input_features"))
        shared = None if self.disable_adapters else readers_of_pass()
        if shared is not None:
            shared.enter("encoder")
        if shared is not None and shared.output is not None:
            return self._over_own_frames(another(shared.output, shared.ends[shared.task]), route, args, kwargs)
        if route is not None and route.whole is None:
            # The attention mask is not cut where Whisper drops recordings from a batch.
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
            route.check(inputs[0], axes=2)
        given = args, kwargs
        names = self.running(self.elp_p) if route is None else [name for name in route.adapters if name in self.elp_p]
        inside, pseudo, counts = self.family.front_end_inside, None, None
        real: tuple[RealFrames, ...] = ()
        if names and inside:
            pseudo, counts = self._carried_rows(route, names)
        elif names:
            args, kwargs, real = self._with_pseudo_features(route, names, args, kwargs)
        readers = self._readers(route) if shared is None else _readers_of_all(shared)
        call = StackCall(
            readers=readers,
            shared=shared,
            last_layer=self.depth - 1,
            last_run=self._last_run(readers, route, kwargs),
            ends_in_layer=self.family.taps_end == "last layer",
            copy_taps=self.family.tap_in_place,
            real=real,
            squeeze=self._squeeze,
            pseudo=pseudo,
            counts=counts,
            positions=self._positions() if pseudo is not None else None,
            # Readers have nothing inside the layers. A layer that runs again for its gradients, in the backward pass,
            # would know nothing of the shared pass, and would run with the adapters that are active.
            needs_gradient=self._loses_gradients() and shared is None,
        )
        with current_call.set(call):
            output = self.base_layer(*args, **kwargs)
        before = hidden_states_of(output)
        x = call.after_stack(before)
        if x is not before:
            mark_replaced(before)
        if shared is not None and not call.ends_in_layer:
            shared.output = another(output, hidden_states_of(output))
        # Carried pseudo features left the frames at the end of each layer.
        output = with_hidden_states(output, x if inside else without_pseudo_features(x, call.real))
        return self._over_own_frames(output, route, *given)

    def _over_own_frames(self, output: Any, route: Route | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Weigh the frames so that a head that averages over them averages over each recording's own frames."""
        names = self.running_names(route)
        if self.own_frames.isdisjoint(names):
            return output
        mask = mask_of(args, kwargs)
        if mask is None:
            if not self.said and not torch.compiler.is_compiling():
                self.said = True
                warnings.warn(
                    "The head averages over the padding of the window, because the batch has no attention_mask. Let "
                    "the feature extractor return it: return_attention_mask=True.",
                    stacklevel=2,
                )
            return output
        x = hidden_states_of(output)
        weight = own_frames_weight(mask, x)
        if not self.own_frames.issuperset(names):
            chosen = torch.tensor([name in self.own_frames for name in names], device=x.device)
            weight = torch.where(chosen[:, None, None], weight, torch.ones_like(weight))
        return with_hidden_states(output, x * weight)

    def running_names(self, route: Route | None) -> Sequence[str]:
        """Return the adapters of a call: one name for each utterance, or names that serve all."""
        if self.disable_adapters:
            return ()
        if route is None:
            return self.active_adapters
        return route.names if route.whole is None else (route.whole,)

    def _from_cache(self, cached: Mapping[int, Tensor], encoder: str | None) -> BaseModelOutput:
        """Return the output of the stack from what the taps read in an earlier call."""
        readers = self._readers(None)
        last = self.depth - 1
        if self.disable_adapters or not {*self.active_adapters} <= self.cacheable.keys():
            raise ValueError(
                f"The call has cached features, and the active adapters {self.active_adapters} have no FeatureCache. "
                "Activate the adapter that the features were cached for, or cache them for this one."
            )
        if not cached.keys() >= readers[0].of_layer.keys():
            raise ValueError(
                f"The cached features are of the layers {sorted(cached)}, and adapter {self.active_adapters[0]!r} "
                f"reads {sorted(readers[0].of_layer)}. Cache them again for this adapter."
            )
        if not all(encoder in self.cacheable[name] for name in self.active_adapters):
            raise ValueError(
                "The cached features are of another encoder, another window or other layers. Read the data set with a "
                "FeatureCache of this model."
            )
        for layer in readers[0].of_layer:
            readers[0].read(layer, cached[layer], copy=False)
        # Only a residual output looks at the encoder's own, which is what the last tap reads.
        x = cached[last] if readers[0].sum.adapter.residual else next(iter(cached.values()))
        _, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        return BaseModelOutput(last_hidden_state=readers[0].end(x.to(dtype)))

    def _last_run(self, readers: Sequence[TapReader], route: Route | None, kwargs: dict[str, Any]) -> int:
        """Number of the last layer that runs: the last tapped one, where sums of taps replace all outputs."""
        last = self.depth - 1
        if not readers or any(reader.sum.adapter.residual for reader in readers):
            return last
        if route is not None and not all(name in self.elp_l for name in route.names):
            return last
        last_read = max(max(reader.of_layer) for reader in readers)
        rest = list(self.encoder_layers)[last_read + 1 :]
        inside = [layer.base_layer if isinstance(layer, TappedLayer) else layer for layer in rest]
        return last if are_watched(inside, kwargs, getattr(self.base_layer, "config", None)) else last_read

    def _readers(self, route: Route | None) -> tuple[TapReader, ...]:
        if route is not None:
            return tuple(
                self._reader(name, partial(route.indices, name)) for name in route.adapters if name in self.elp_l
            )
        name = self.only_running(self.elp_l, "The L-adapters")
        return () if name is None else (self._reader(name),)

    def _reader(self, name: str, rows: Callable[[Tensor], Tensor] | None = None) -> TapReader:
        adapter = self.elp_l[name]
        assert isinstance(adapter, LAdapter)
        # What a checkpointed layer keeps is the output of the layer before it, which is the input of a tap.
        taps = TapSum(adapter, keep_inputs_only=self._is_checkpointing())
        return TapReader(taps, {layer: tap for tap, layer in enumerate(self.tapped_layers[name])}, rows)

    def _carried_rows(self, route: Route | None, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """Return the pseudo features that are carried, and how many each utterance has if that differs."""
        if route is None:
            prompts: list[Any] = [self.elp_p[name] for name in names]
            return torch.cat([adapter.rows for adapter in prompts]), None
        rows, counts, _ = self._rows_by_utterance(route, names)
        return rows, None if len(counts.unique()) == 1 else counts

    def _with_pseudo_features(
        self, route: Route | None, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[RealFrames, ...]]:
        """Return the arguments with pseudo features among the frames, and where the real frames are then."""
        inputs = {("hidden_states", "attention_mask")[place]: value for place, value in enumerate(args)} | kwargs
        x, mask = inputs.pop("hidden_states"), inputs.pop("attention_mask", None)
        real: tuple[RealFrames, ...] = ()
        if route is None:
            prompts: list[Any] = [self.elp_p[name] for name in names]
            for adapter in prompts:
                x, mask, frames = adapter(x, mask, self._squeeze)
                real += (frames,)
        else:
            x, mask, frames = join_each(x, mask, *self._rows_by_utterance(route, names), self._squeeze)
            real = (frames,)
        chunk = self._attribute(self.family.attention_chunk)
        if chunk and x.shape[1] > chunk:
            raise ValueError(
                f"With its pseudo features this batch has {x.shape[1]} frames, and the attention of "
                f"{type(self.base_layer).__name__} sees {chunk} at a time ({self.family.attention_chunk}), so most "
                "frames would not see the pseudo features. Shorten the audio, or leave P out of adapters."
            )
        return (x,), {**inputs, "attention_mask": mask}, real

    def _rows_by_utterance(self, route: Route, names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """For each utterance of a mixed batch: pseudo features, how many of them count, whether they come first."""
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

    @property
    def _squeeze(self) -> int:
        """How many frames of the stack's input the layers take as one."""
        return int(self._attribute(self.family.squeeze) or 1)

    def _positions(self) -> Callable[[Tensor, Tensor], Any] | None:
        """Computes the positions that the stack gives its layers, from hidden states and frame numbers."""
        if self.family.rotary:
            return self._attribute(self.family.rotary)
        relative = self._attribute(self.family.positions)
        return None if relative is None else lambda x, numbers: relative(x)

    def _attribute(self, path: str | None) -> Any:
        value: Any = self.base_layer
        for name in path.split(".") if path else ():
            value = getattr(value, name)
        return value if path else None

    @property
    def _first_layer(self) -> nn.Module:
        layer = self.encoder_layers[0]
        return layer.base_layer if isinstance(layer, Wrapper) else layer

    def _is_checkpointing(self) -> bool:
        layer = self._first_layer
        return layer.training and torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False)

    def _loses_gradients(self) -> bool:
        """Whether re-entrant checkpointing is on, which loses gradients inside layers whose input needs none."""
        # Transformers keeps the partial of torch.utils.checkpoint.checkpoint that a layer uses in this private
        # attribute. Without the keyword, PyTorch checkpoints in the re-entrant form.
        checkpoint = getattr(self._first_layer, "_gradient_checkpointing_func", None)
        if not (self._is_checkpointing() and getattr(checkpoint, "keywords", {}).get("use_reentrant", True)):
            return False
        if not self.family.reentrant_checkpointing:
            raise RuntimeError(
                f"{type(self.base_layer).__name__} never returns under re-entrant gradient checkpointing, with or "
                "without adapters. Pass gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        return True


def _readers_of_all(shared: SharedPass) -> tuple[TapReader, ...]:
    """Return the readers of all tasks that share a pass, or none if the layers ran already."""
    if shared.ends:
        return ()
    return tuple(
        TapReader(TapSum(adapter), {layer: tap for tap, layer in enumerate(layers)}, task=task)
        for task, (adapter, layers) in shared.readers.items()
    )


def set_frozen_norms(model: nn.Module, training: bool) -> None:
    """Set the training mode of the frozen batch norms.

    Their running statistics are not saved with an adapter. If they moved in training, a loaded adapter would not
    compute what the trained one did.
    """
    # The common base class of BatchNorm1d to 3d and SyncBatchNorm is private to PyTorch.
    kind = nn.modules.batchnorm._BatchNorm
    for name, module in model.named_modules():
        if isinstance(module, kind) and ".modules_to_save." not in f".{name}":
            module.train(training)
