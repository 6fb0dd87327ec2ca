"""PEFT tuner layers: one part of a backbone together with its adapters, by adapter name."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_elp.adapters import EAdapter
from peft_elp.call.outputs import hidden_states_of, with_hidden_states
from peft_elp.call.route import current_route
from peft_elp.call.shared_pass import current_pass
from peft_elp.call.stack_call import current_call

from .offload import running_device
from .trained import KeepsTrained
from .wrapper import Wrapper

WHY_NO_MERGE = (
    "ELP-adapters cannot be merged into the backbone: an E-adapter is a non-linear bottleneck, an L-adapter reads "
    "every layer and a P-adapter adds frames, so no weight of the backbone could hold them. Keep the adapter: save it "
    "with save_pretrained() and load it next to the backbone, or call unload() to get the backbone back without it."
)


class ELPLayer(KeepsTrained, Wrapper, BaseTunerLayer):
    """Base of the tuner layers, with what PEFT asks of each."""

    adapter_layer_names: tuple[str, ...] = ()
    cast_input_dtype_enabled = True  # PEFT's `disable_input_dtype_casting` sets it.

    def __init__(self, base_layer: nn.Module, active_adapters: Sequence[str] = ()) -> None:
        super().__init__(base_layer)
        # BaseTunerLayer reads these from the class, where a base layer that is a tuner layer itself has others.
        self._active_adapter = list(active_adapters)
        self._disable_adapters = False
        self.merged_adapters = []

    def place(self, container: str, adapter_name: str, adapter: nn.Module) -> None:
        """Put a new adapter into one of the `adapter_layer_names`, frozen, with device and dtype of `base_layer`."""
        getattr(self, container)[adapter_name] = adapter.train(self.training).requires_grad_(False)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def adapter_names(self) -> set[str]:
        """Return the names of the adapters that the layer holds."""
        return {name for container in self.adapter_layer_names for name in getattr(self, container)}

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and the only trained ones unless `inference_mode` is set."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.train_only([] if inference_mode else names)
        self._active_adapter = names

    def running(self, container: nn.ModuleDict) -> list[str]:
        """Return the active adapters in `container`, which serve the whole batch; none while disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in container]

    def mixed(self, container: nn.ModuleDict, x: Tensor) -> list[tuple[str, Tensor]] | None:
        """Return the adapters in `container`, each with the utterances of `x` it serves; None if not mixed."""
        route = None if self.disable_adapters else current_route.get()
        if route is None:
            return None
        return [(name, route.indices(name, x)) for name in route.adapters if name in container]

    def only_running(self, container: nn.ModuleDict, what: str) -> str | None:
        """Return the one active adapter in `container`, or None; refuse several."""
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
        # `_move_adapter_to_device_of_base_layer` of BaseTunerLayer asks this for the device and dtype of an adapter.
        # PEFT's own method looks for a `weight`; a feed-forward module or a whole encoder has none.
        for parameter in base_layer.parameters():
            if parameter.dtype.is_floating_point:
                return running_device(base_layer), parameter.dtype
        return None, None

    def __repr__(self) -> str:
        return "elp." + super().__repr__()


class TappedLayer(ELPLayer):
    """An encoder layer whose output the current call can read.

    It is a wrapper rather than a hook, so that taps stay outside of gradient checkpointing and do not depend on the
    order in which Transformers installs its own hooks. It holds no adapter, but it is a tuner layer, so that PEFT
    leaves it out when it names the backbone's tensors.
    """

    index: int = -1

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
            output = call.shared.replay(self.index)
        else:
            if self.index > call.last_run:
                output = call.skipped(args[0] if args else kwargs["hidden_states"])
            else:
                output = self.base_layer(*args, **kwargs)
            if call.shared is not None and call.ends_in_layer:
                call.shared.keep(self.index, output)
        return call.after_layer(self.index, output)


class FrontEnd(Wrapper):
    """The convolutions over the waveform, which run once for all tasks that share a pass.

    It holds no adapter and is not a tuner layer, since PEFT asks the first tuner layer which adapters are active. It
    is placed by the first shared pass, when a state dict may have been saved already, and so keeps all names.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.training = base_layer.training
        self.keep_names()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shared = current_pass.get()
        if shared is None:
            return self.base_layer(*args, **kwargs)
        shared.enter("feature encoder")
        if shared.cached is not None:
            waveforms = args[0] if args else next(iter(kwargs.values()))
            return self._blank(waveforms, next(iter(shared.cached.values())))
        if shared.features is None:
            shared.features = self.base_layer(*args, **kwargs)
        return shared.features

    def _blank(self, waveforms: Tensor, x: Tensor) -> Tensor:
        """Return zeros `(batch, channels, frames)` for a call whose layers do not run."""
        channels = [module.out_channels for module in self.base_layer.modules() if isinstance(module, nn.Conv1d)][-1]
        return waveforms.new_zeros(()).expand(len(x), channels, x.shape[1])


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
            for name, indices in mixed:
                z = z.index_copy(0, indices, self._through(name, z[indices]))
        return with_hidden_states(output, z)

    def _through(self, name: str, z: Tensor) -> Tensor:
        adapter = self.elp_e[name]
        assert isinstance(adapter, EAdapter)
        # The dtype of `norm`, since a dynamically quantised linear layer has a method in place of its weight.
        return adapter(self._cast_input_dtype(z, adapter.norm.weight.dtype)).to(z.dtype)


class ELPNorm(ELPLayer):
    """A layer norm with a trained copy for each adapter. The active adapter's copy runs in its place."""

    adapter_layer_names = ("elp_norm",)
    # The norm's first parameter, whose dtype its input gets. It is read as an attribute, since a replica of
    # DataParallel has no parameters.
    scale: str = "weight"

    def __init__(self, base_layer: nn.Module, active_adapters: Sequence[str] = ()) -> None:
        super().__init__(base_layer, active_adapters)
        self.elp_norm = nn.ModuleDict()
        self.scale, _ = next(base_layer.named_parameters())

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixed(self.elp_norm, x)
        if mixed is not None:
            y = self.base_layer(x)
            for name, indices in mixed:
                y = y.index_copy(0, indices, self._through(name, x[indices]))
            return y
        name = self.only_running(self.elp_norm, "The trained layer norms")
        return self.base_layer(x) if name is None else self._through(name, x)

    def _through(self, name: str, x: Tensor) -> Tensor:
        norm = self.elp_norm[name]
        return norm(self._cast_input_dtype(x, attrgetter(self.scale)(norm).dtype)).to(x.dtype)
