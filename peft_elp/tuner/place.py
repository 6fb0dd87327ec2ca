"""Wrappers come into the model, are found there again, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_elp.call.hidden_states import trim_hidden_states

from .find import Encoder
from .guards import refuse_short_utterances
from .head import original, remove_head, remove_head_copies
from .head_config import remade_head
from .layers import ELPLayer, ELPNorm, ELPSublayer, FrontEnd, TappedLayer, Wrapper
from .paths import canonical, join
from .plan import Plan
from .stack import ELPStack


def wrap(layer: nn.Module, part: str, wrapper: Any, active_adapters: list[str]) -> Any:
    """The tuner layer around a part of an encoder layer; made if it is not there yet."""
    parent_path, _, name = part.rpartition(".")
    parent = layer.get_submodule(parent_path)
    if isinstance(parent, Wrapper):  # what is set on a wrapper does not reach the module that runs
        parent = parent.base_layer
    module = getattr(parent, name)
    if not isinstance(module, wrapper):
        module = wrapper(module, active_adapters).train(module.training)
        setattr(parent, name, module)
    return module


def wrap_stack(model: nn.Module, parts: Encoder, active_adapters: list[str]) -> ELPStack:
    """The tuner layer around the encoder stack; made if it is not there yet, with what it needs around it."""
    parent_path, _, name = parts.stack_path.rpartition(".")
    parent = model.get_submodule(parent_path)
    module = getattr(parent, name) if name else model
    if isinstance(module, ELPStack):
        return module
    stack = ELPStack(module, parts.family, active_adapters).train(module.training)
    if name:  # else the model is its own stack, and whoever holds it takes the wrapper in its place
        setattr(parent, name, stack)
    for index, layer in enumerate(stack.encoder_layers):
        stack.encoder_layers[index] = TappedLayer(layer, index, active_adapters)
    cnn: Any = attrgetter(parts.family.feature_encoder)(parts.backbone) if parts.family.feature_encoder else None
    if hasattr(cnn, "_requires_grad"):
        # Else the CNN, though frozen, would be recorded for a backward pass in every training step.
        cnn._elp_requires_grad, cnn._requires_grad = cnn._requires_grad, False
        parts.backbone.register_forward_pre_hook(refuse_short_utterances, with_kwargs=True)
    parts.backbone.register_forward_hook(trim_hidden_states)
    return stack


def join_head(model: nn.Module, plan: Plan, adapter_name: str) -> None:
    """Tell the stack which head goes along with its adapters."""
    stack = model.get_submodule(plan.parts.stack_path)
    assert isinstance(stack, ELPStack)
    stack.task_head.config = getattr(model, "config", None)
    for path in plan.config.modules_to_save or ():
        copies = model.get_submodule(path)
        assert isinstance(copies, ModulesToSaveWrapper)
        if all(copies is not known for known in stack.task_head.copies):
            stack.task_head.copies.append(copies)
    if plan.config.head_config:
        stack.task_head.settings[adapter_name] = plan.config.head_config
    stack._follow_adapters()


def wrap_front_end(parts: Encoder) -> None:
    """Let the convolutions over the waveform run once for all tasks that share a pass."""
    if parts.family.feature_encoder:
        path, _, name = parts.family.feature_encoder.rpartition(".")
        holder = attrgetter(path)(parts.backbone) if path else parts.backbone
        if not isinstance(getattr(holder, name), FrontEnd):
            setattr(holder, name, FrontEnd(getattr(holder, name)))


def placed(model: nn.Module, adapter_name: str) -> set[str]:
    """The names of the adapters of that name that are in the model, as `Plan.expected` names them."""
    names: set[str] = set()
    for name, module in model.named_modules():
        path = canonical(name)
        if isinstance(module, ELPSublayer) and adapter_name in module.elp_e:
            names.add(f"E at {path}")
        elif isinstance(module, ELPNorm) and adapter_name in module.elp_norm:
            names.add(f"layer norm at {path}")
        elif isinstance(module, ELPStack):
            if adapter_name in module.elp_p:
                names.add(f"P at {path}")
            if adapter_name in module.elp_l:
                tapped = set(module.tapped_layers[adapter_name])
                names |= {
                    f"L at {join(path, module.family.layers, str(index))}"
                    for index, layer in enumerate(module.encoder_layers)
                    if index in tapped and isinstance(layer, TappedLayer)
                }
    return names


def _with_children(model: nn.Module) -> Iterable[tuple[nn.Module, str, nn.Module]]:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child


def remove_adapter(model: nn.Module, adapter_name: str) -> nn.Module:
    """Take one adapter out again, with every wrapper that it alone needed; gives the model as `unwrap` does."""
    for layer in model.modules():
        if isinstance(layer, ELPLayer):
            for container in layer.adapter_layer_names:
                if adapter_name in getattr(layer, container):
                    del getattr(layer, container)[adapter_name]
        if isinstance(layer, ELPStack):
            layer.forget(adapter_name)
    remove_head_copies(model, adapter_name)
    remove_head(model, only_unused=True)
    return unwrap(model, only_unused=True)


def unwrap(model: nn.Module, only_unused: bool = False) -> nn.Module:
    """Put the backbone's own modules back in place of ELP's wrappers, and its settings back to what they were.

    Args:
        model: The whole model.
        only_unused: Leave those wrappers that hold an adapter, or one around which another holds one.

    Returns:
        The model, which is another object only if it was a wrapped stack itself.
    """

    def kept(stack: ELPStack) -> bool:  # it serves E-adapters too, which it does not hold itself
        layers = [layer for layer in stack.modules() if isinstance(layer, ELPLayer)]
        return only_unused and any(layer._get_available_adapters() for layer in layers)

    if isinstance(model, ELPStack) and not kept(model):
        _unwrap_stack(model, model)
        model = model.base_layer
    for parent, name, child in _with_children(model):
        if isinstance(child, ELPStack) and not kept(child):
            _unwrap_stack(model, child)
            setattr(parent, name, child.base_layer)
    for parent, name, child in _with_children(model):
        unused = isinstance(child, ELPLayer) and not (only_unused and child._get_available_adapters())
        if isinstance(child, FrontEnd) or (unused and not isinstance(child, (ELPStack, TappedLayer))):
            setattr(parent, name, child.base_layer)
    return model


def _unwrap_stack(model: nn.Module, stack: ELPStack) -> None:
    if stack._layerdrop is not None:
        holder, attribute = stack._layerdrop_at()
        setattr(holder, attribute, stack._layerdrop)
    stack.window.restore()
    stack.task_head.follow([], enabled=False)
    for index, layer in enumerate(stack.encoder_layers):
        if isinstance(layer, TappedLayer):
            stack.encoder_layers[index] = layer.base_layer
    for norm in stack.frozen_norms():
        norm.train(stack.training)
    for module in _around(model, stack):
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in (trim_hidden_states, refuse_short_utterances)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for part in module.modules():
            if "_elp_requires_grad" in part.__dict__:
                part.__dict__["_requires_grad"] = part.__dict__.pop("_elp_requires_grad")


def _around(model: nn.Module, stack: ELPStack) -> list[nn.Module]:
    """The base encoder that one stack belongs to: whatever carries ELP's hooks and holds the stack."""
    hooked = [m for m in model.modules() if trim_hidden_states in m._forward_hooks.values()]
    return [module for module in hooked if any(part in (stack, stack.base_layer) for part in module.modules())]


def new_head(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The modules of the head that an adapter does not copy from the model, by path.

    They are what its own settings make otherwise, and the first linear layer at width `l_dim` where the plan says so,
    which starts as Transformers starts the layers of that model.
    """
    fresh = remade_head(model, plan.config.modules_to_save or (), plan.config.head_config)
    path = plan.new_head_input
    if path is None:
        return fresh
    old = fresh.get(path, original(model.get_submodule(path)))
    assert isinstance(old, nn.Linear)
    bias = old.bias is not None
    new = nn.Linear(plan.config.l_dim, old.out_features, bias, device=old.weight.device, dtype=old.weight.dtype)
    if isinstance(model, PreTrainedModel):
        model._init_weights(new)
    return {**fresh, path: new}
