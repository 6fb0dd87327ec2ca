"""Wrappers are put around the modules of a model, found there again, and removed."""

from __future__ import annotations

import warnings
from operator import attrgetter
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_elp.call.hidden_states import trim_hidden_states
from peft_elp.wording import shortened

from .build import new_e_adapter, new_l_adapter, new_p_adapter
from .find import Encoder
from .guards import refuse_short_utterances
from .head import place_head, remove_head, remove_head_copies
from .head_config import initialised, planned_head
from .languages import LoadLanguage, has_languages
from .layers import ELPLayer, ELPNorm, ELPSublayer, FrontEnd, TappedLayer
from .long_form import GenerateSegment, generates_long_form
from .patches import set_attribute, undo_patches
from .paths import canonical, join
from .plan import Plan
from .stack import ELPStack


def place_adapter(model: nn.Module, plan: Plan, adapter_name: str, active_adapters: list[str]) -> nn.Module:
    """Put an adapter into a model, without its head.

    Args:
        model: The model.
        plan: What to place, and where.
        adapter_name: The adapter's name.
        active_adapters: The names of the adapters that are active in the model.

    Returns:
        The model. It is another object only if the model is an encoder stack itself, which is wrapped then.
    """
    config, encoder = plan.config, plan.encoder
    frozen = config.inference_mode
    for layer, path in plan.e_sites:
        sublayer = wrap(encoder.layers[layer], path, ELPSublayer, active_adapters)
        sublayer.place("elp_e", adapter_name, new_e_adapter(plan), frozen)
    for layer, path in plan.norm_sites:
        wrap(encoder.layers[layer], path, ELPNorm, active_adapters).copy_for(adapter_name, frozen)

    stack = wrap_stack(model, encoder, active_adapters)
    if config.chunk_length is not None:
        stack.windows[adapter_name] = config.chunk_length
    if "L" in config.adapters:
        assert config.l_layers is not None
        if stack.layer_drop.probability > 0:
            warnings.warn(
                f"LayerDrop ({encoder.family.layerdrop}={stack.layer_drop.probability}) is off while an L-adapter is "
                "active: a layer that is skipped has no output to read. unload() restores it.",
                stacklevel=2,
            )
        stack.tapped_layers[adapter_name] = config.l_layers
        stack.place("elp_l", adapter_name, new_l_adapter(plan), frozen)
    if "P" in config.adapters:
        stack.place("elp_p", adapter_name, new_p_adapter(plan), frozen)
    return model if encoder.stack_path else stack


def check_placed(model: nn.Module, plan: Plan, adapter_name: str) -> None:
    """Compare what is in the model with what the plan asks for.

    Raises:
        RuntimeError: Something is missing.
    """
    expected = plan.expected()
    missing = sorted(expected - placed(model, adapter_name))
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(expected)} adapters found no place: {shortened(missing)}. Are layers of this "
            "model shared? Name the layers to adapt with e_layers and l_layers."
        )


def give_head(model: nn.Module, plan: Plan, adapter_name: str, active: bool, named_by_tuner: bool) -> None:
    """Give an adapter its copies of the head, and tell the stack about them.

    Args:
        model: The model, with the adapter in place.
        plan: The plan of the adapter.
        adapter_name: The adapter's name.
        active: Whether it is active.
        named_by_tuner: Whether the tuner names the tensors of the head when they are loaded.
    """
    paths, inference_mode = plan.config.modules_to_save or [], plan.config.inference_mode
    place_head(model, paths, adapter_name, active, inference_mode, new_head(model, plan), named_by_tuner)
    join_head(model, plan, adapter_name)


def adapted_modules(model: nn.Module) -> list[str]:
    """The paths of the modules that hold adapters."""
    return [
        canonical(name)
        for name, module in model.named_modules()
        if isinstance(module, ELPLayer) and module.adapter_layer_names
    ]


def wrap(layer: nn.Module, part: str, wrapper: Any, active_adapters: list[str]) -> Any:
    """The tuner layer around a module inside an encoder layer. It is made if it is not there yet."""
    parent_path, _, name = part.rpartition(".")
    parent = layer.get_submodule(parent_path)
    module = getattr(parent, name)
    if not isinstance(module, wrapper):
        module = wrapper(module, active_adapters).train(module.training)
        setattr(parent, name, module)
    return module


def wrap_stack(model: nn.Module, encoder: Encoder, active_adapters: list[str]) -> ELPStack:
    """The tuner layer around the encoder stack. It is made if it is not there yet, with the patches that it needs."""
    parent_path, _, name = encoder.stack_path.rpartition(".")
    parent = model.get_submodule(parent_path)
    module = getattr(parent, name) if name else model
    if isinstance(module, ELPStack):
        return module
    stack = ELPStack(module, encoder.family, active_adapters).train(module.training)
    if name:  # Else the model is its own stack, and whoever holds it puts the wrapper in its place.
        setattr(parent, name, stack)
    for index, layer in enumerate(stack.encoder_layers):
        stack.encoder_layers[index] = TappedLayer(layer, index, active_adapters)
    path = encoder.family.feature_encoder
    cnn: Any = attrgetter(path)(encoder.backbone) if path else None
    if hasattr(cnn, "_requires_grad"):
        # While this private flag of Transformers is set, the convolutions record a graph in training, though frozen.
        set_attribute(cnn, "_requires_grad", False)
        encoder.backbone.register_forward_pre_hook(refuse_short_utterances, with_kwargs=True)
    encoder.backbone.register_forward_hook(trim_hidden_states)
    return stack


def join_head(model: nn.Module, plan: Plan, adapter_name: str) -> None:
    """Tell the stack which head goes along with its adapters."""
    stack = model.get_submodule(plan.encoder.stack_path)
    assert isinstance(stack, ELPStack)
    stack.task_head.config, stack.task_head.model = getattr(model, "config", None), model
    for path in plan.config.modules_to_save or ():
        copies = model.get_submodule(path)
        assert isinstance(copies, ModulesToSaveWrapper)
        if all(copies is not known for known in stack.task_head.copies):
            stack.task_head.copies.append(copies)
    stack.task_head.join(adapter_name, plan.config.head_config)
    if generates_long_form(model):
        set_attribute(model, "generate_with_fallback", GenerateSegment(model))
    if has_languages(model):
        set_attribute(model, "load_adapter", LoadLanguage(model))
    stack.follow_adapters()


def wrap_front_end(encoder: Encoder) -> None:
    """Let the convolutions over the waveform run once for all tasks that share a pass."""
    if encoder.family.feature_encoder:
        path, _, name = encoder.family.feature_encoder.rpartition(".")
        holder = attrgetter(path)(encoder.backbone) if path else encoder.backbone
        if not isinstance(getattr(holder, name), FrontEnd):
            setattr(holder, name, FrontEnd(getattr(holder, name)))


def placed(model: nn.Module, adapter_name: str) -> set[str]:
    """The parts of an adapter that are in the model, named as `Plan.expected` names them."""
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


def remove_adapter(model: nn.Module, adapter_name: str) -> nn.Module:
    """Take one adapter out of the model, with every wrapper that it alone needed.

    Returns:
        The model, as `unwrap` returns it.
    """
    for layer in list(model.modules()):
        if isinstance(layer, ELPLayer):
            layer.remove(adapter_name)
    remove_head_copies(model, adapter_name)
    return unwrap(model, only_unused=True)


def unwrap(model: nn.Module, only_unused: bool = False) -> nn.Module:
    """Put the backbone's own modules back in place of ELP's wrappers, and undo what ELP has patched.

    Args:
        model: The whole model.
        only_unused: Keep the wrappers that hold an adapter, and those around a wrapper that does.

    Returns:
        The model. It is another object only if the model was a wrapped encoder stack itself.
    """
    stacks = [module for module in model.modules() if isinstance(module, ELPStack)]
    unused = {stack for stack in stacks if not (only_unused and _holds_adapters(stack))}
    for stack in unused:
        for backbone in _backbones_around(model, stack):
            undo_patches(backbone.modules())
        stack.release()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_idle(child, unused, only_unused):
                setattr(parent, name, child.base_layer)
    remove_head(model, only_unused=only_unused)
    unwrapped = model.base_layer if isinstance(model, ELPStack) and model in unused else model
    if not any(isinstance(module, ELPStack) for module in unwrapped.modules()):
        undo_patches(unwrapped.modules())
    return unwrapped


def _is_idle(module: nn.Module, unused_stacks: set[ELPStack], only_unused: bool) -> bool:
    """Whether a module is a wrapper whose place its `base_layer` takes again."""
    if isinstance(module, ELPStack):
        return module in unused_stacks
    if isinstance(module, TappedLayer):  # Its stack releases it.
        return False
    unused = isinstance(module, ELPLayer) and not (only_unused and module.adapter_names())
    return unused or isinstance(module, FrontEnd)


def _holds_adapters(stack: ELPStack) -> bool:
    return any(layer.adapter_names() for layer in stack.modules() if isinstance(layer, ELPLayer))


def _backbones_around(model: nn.Module, stack: ELPStack) -> list[nn.Module]:
    """The backbone that a stack belongs to: the module that carries ELP's hooks and contains the stack."""
    hooked = [module for module in model.modules() if trim_hidden_states in module._forward_hooks.values()]
    return [module for module in hooked if any(inner in (stack, stack.base_layer) for inner in module.modules())]


def new_head(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The modules of the head that an adapter does not copy from the model, by path."""
    config = plan.config
    modules = planned_head(model, config.modules_to_save or (), config.head_config, plan.new_head_input, config.l_dim)
    return {path: initialised(model, path, module) for path, module in modules.items()}
