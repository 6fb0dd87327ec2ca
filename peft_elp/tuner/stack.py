"""The tuner layer around an encoder stack: its L- and P-adapters, and what surrounds one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_elp.adapters import LAdapter, TapSum
from peft_elp.backbones import Backbone
from peft_elp.call.hidden_states import without_pseudo_features
from peft_elp.call.outputs import another, hidden_states_of, with_hidden_states
from peft_elp.call.route import Route, current_route
from peft_elp.call.shared_pass import SharedPass, readers_of_pass
from peft_elp.call.stack_call import Reader, StackCall, current_call
from peft_elp.pseudo import join_each

from .guards import reentrant_checkpointing
from .head_config import TaskHead
from .layers import ELPLayer, ELPNorm, ELPSublayer, Wrapper
from .window import Window


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
        self.windows: dict[str, int] = {}  # seconds by adapter name, where an adapter has a shorter window
        self.window = Window(base_layer, family.window)
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
        self.windows.pop(adapter_name, None)
        self.task_head.settings.pop(adapter_name, None)
        self._follow_adapters()

    def _follow_adapters(self) -> None:
        self.task_head.follow(self.active_adapters, not self.disable_adapters)
        self._switch_layerdrop()
        self._switch_window()

    def _switch_window(self) -> None:
        windows = {self.windows.get(name) for name in self.active_adapters} if not self.disable_adapters else set()
        if len(windows) > 1:
            lengths = " and ".join("the whole window" if one is None else f"{one} s" for one in windows)
            raise ValueError(
                f"The active adapters take windows of different lengths: {lengths}. Activate one of them."
            )
        window_s = windows.pop() if windows else None
        if window_s is None:
            self.window.restore()
        else:
            self.window.shorten(window_s)

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
        x = call.after_stack(hidden_states_of(output))
        if shared is not None and not call.ends_in_layer:
            shared.output = another(output, hidden_states_of(output))
        # Carried pseudo features left the frames where each layer ended.
        return with_hidden_states(output, x if self.family.front_end_inside else without_pseudo_features(x, call.real))

    def _taps(self, route: Route | None) -> tuple[Reader, ...]:
        if route is not None:
            return tuple(
                self._taps_of(name, partial(route.rows, name)) for name in route.adapters if name in self.elp_l
            )
        name = self.only_running(self.elp_l, "The L-adapters")
        return () if name is None else (self._taps_of(name),)

    def _taps_of(self, name: str, rows: Callable[[Tensor], Tensor] | None = None) -> Reader:
        adapter = self.elp_l[name]
        assert isinstance(adapter, LAdapter)
        return Reader(TapSum(adapter), {layer: tap for tap, layer in enumerate(self.tapped_layers[name])}, rows)

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


def _taps_of_all(shared: SharedPass) -> tuple[Reader, ...]:
    """The sums of all tasks that share a pass, where the layers run; of none, where they ran already."""
    if shared.ends:
        return ()
    return tuple(
        Reader(TapSum(adapter), {layer: tap for tap, layer in enumerate(layers)}, task=task)
        for task, (adapter, layers) in shared.readers.items()
    )
