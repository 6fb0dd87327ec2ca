"""Put an adapter into a model by its plan, and take wrappers out again."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_elp.call.hidden_states import trim_hidden_states
from peft_elp.call.short_utterances import refuse_short_utterances

from .find import Encoder
from .layers import ELPLayer, FrontEnd, TappedLayer
from .paths import canonical
from .plan import Plan
from .stack import ELPStack


def place_adapter(model: nn.Module, plan: Plan, adapter_name: str, active_adapters: list[str]) -> nn.Module:
    """Put an adapter into a model, frozen, and return the model: its wrapper if it is an encoder stack itself."""
    made = [site.make() for site in plan.sites]  # A module that cannot be copied is an error before anything changes.
    stack = _wrap_stack(model, plan.encoder, active_adapters)
    model = model if plan.encoder.stack_path else stack
    for site, module in zip(plan.sites, made, strict=True):
        layer: Any = stack if site.wrapper is ELPStack else _wrap(model, site.path, site.wrapper, active_adapters)
        layer.place(site.container, adapter_name, module)
    config = plan.config
    if config.chunk_length is not None:
        stack.windows[adapter_name] = config.chunk_length
    if config.pool_own_frames:
        stack.own_frames.add(adapter_name)
    if "L" in config.adapters:
        stack.tapped_layers[adapter_name] = config.l_layers or []
    heads: list[Any] = [model.get_submodule(path) for path in config.modules_to_save or ()]
    stack.task_head.join(model, adapter_name, config.head_config, heads)
    stack.follow_adapters()
    return model


def _wrap(model: nn.Module, path: str, wrapper: Any, active_adapters: list[str]) -> Any:
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    module = getattr(parent, name)
    if not isinstance(module, wrapper):
        module = wrapper(module, active_adapters).train(module.training)
        setattr(parent, name, module)
    return module


def _wrap_stack(model: nn.Module, encoder: Encoder, active_adapters: list[str]) -> ELPStack:
    parent_path, _, name = encoder.stack_path.rpartition(".")
    parent = model.get_submodule(parent_path)
    module = getattr(parent, name) if name else model
    if isinstance(module, ELPStack):
        return module
    stack = ELPStack(module, encoder.family, active_adapters).train(module.training)
    if name:  # Else the model is its own stack, and its caller puts the wrapper in its place.
        setattr(parent, name, stack)
    for index, layer in enumerate(stack.encoder_layers):
        stack.encoder_layers[index] = TappedLayer(layer, index, active_adapters)
    path = encoder.family.feature_encoder
    cnn: Any = attrgetter(path)(encoder.backbone) if path else None
    if hasattr(cnn, "_requires_grad"):
        # While this private flag of Transformers is set, the convolutions record a graph in training, though frozen.
        stack.patches.set_attribute(cnn, "_requires_grad", False)
        short = encoder.backbone.register_forward_pre_hook(refuse_short_utterances, with_kwargs=True)
        stack.patches.handles.append(short)
    stack.patches.handles.append(encoder.backbone.register_forward_hook(trim_hidden_states))
    return stack


def wrap_front_end(encoder: Encoder) -> None:
    """Let the convolutions over the waveform run once for all tasks that share a pass."""
    if encoder.family.feature_encoder:
        path, _, name = encoder.family.feature_encoder.rpartition(".")
        holder = attrgetter(path)(encoder.backbone) if path else encoder.backbone
        if not isinstance(getattr(holder, name), FrontEnd):
            setattr(holder, name, FrontEnd(getattr(holder, name)))


def adapted_modules(model: nn.Module) -> list[str]:
    """Return the paths of the modules that hold adapters."""
    return [
        canonical(name)
        for name, module in model.named_modules()
        if isinstance(module, ELPLayer) and module.adapter_layer_names
    ]


def unwrap(model: nn.Module, only_unused: bool = False) -> nn.Module:
    """Put the model's own modules back in place of ELP's wrappers, and undo what ELP has changed besides.

    With `only_unused`, wrappers that hold an adapter stay, and those around a wrapper that does.
    """
    idle = {
        module
        for module in model.modules()
        if isinstance(module, (ELPLayer, FrontEnd, ModulesToSaveWrapper)) and not (only_unused and _is_used(module))
    }
    for module in idle:
        if isinstance(module, ELPStack):
            module.release()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in idle:
                inner = child.original_module if isinstance(child, ModulesToSaveWrapper) else child.base_layer
                setattr(parent, name, inner)
    whole: Any = model
    return whole.base_layer if model in idle else model


def _is_used(module: nn.Module) -> bool:
    if isinstance(module, ModulesToSaveWrapper):
        return bool(module.modules_to_save)
    # A wrapper of a layer is needed by its stack, which looks at all of its own.
    return isinstance(module, TappedLayer) or any(
        layer.adapter_names() for layer in module.modules() if isinstance(layer, ELPLayer)
    )
