"""ELPModel: finds the parts of a backbone that get an adapter, checks the whole plan, then wraps them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .adapters import EAdapter, LAdapter, PAdapter
from .backbones import BACKBONES, Backbone, family, head_input
from .call import trim_hidden_states
from .config import ELPConfig
from .guards import refuse_short_utterances
from .heads import canonical, find_head, head_copy, join, original, place_head, remove_head, resolve
from .layer import WHY_NO_MERGE, ELPLayer, ELPNorm, ELPStack, ELPSublayer, TappedLayer, Wrapper


@dataclass
class Parts:
    """The parts of one model that ELP works on.

    Args:
        encoder: The base encoder: the nearest Transformers model around the stack, which may be the stack itself.
        encoder_path: Where it is in the model.
        stack: The encoder stack, as the backbone has it.
        stack_path: Where it is in the model.
        family: The stack's row in the table of backbones.
        layers: The encoder layers, as the backbone has them.
        hidden_size: Width of the hidden states.
    """

    encoder: nn.Module
    encoder_path: str
    stack: nn.Module
    stack_path: str
    family: Backbone
    layers: list[nn.Module]
    hidden_size: int

    def layer_path(self, layer: int, part: str = "") -> str:
        """Where a layer, or a part of it, is in the model."""
        return join(self.stack_path, self.family.layers, str(layer), part)


@dataclass
class Plan:
    """Everything that one injection will do, decided before anything is changed.

    Args:
        parts: The parts of the model.
        config: The configuration with every open choice resolved.
        e_sites: Layer and relative path of each E-adapter.
        norm_sites: Layer and relative path of each trained layer norm.
        new_head_input: Path of the head's linear layer that is re-made at width `l_dim`, None if none is.
    """

    parts: Parts
    config: ELPConfig
    e_sites: list[tuple[int, str]] = field(default_factory=list)
    norm_sites: list[tuple[int, str]] = field(default_factory=list)
    new_head_input: str | None = None

    def expected(self) -> set[str]:
        """The names of all adapters that the configuration asks for."""
        config, parts = self.config, self.parts
        names = {f"E at {parts.layer_path(layer, part)}" for layer, part in self.e_sites}
        names |= {f"layer norm at {parts.layer_path(layer, part)}" for layer, part in self.norm_sites}
        if "L" in config.adapters:
            names |= {f"L at {parts.layer_path(layer)}" for layer in config.l_layers or ()}
        if "P" in config.adapters:
            names.add(f"P at {parts.stack_path}")
        return names


class ELPModel(BaseTuner):
    """The tuner that `get_peft_model(model, ELPConfig())` puts around a speech encoder, with any of its heads.

    Args:
        model: A Transformers model that contains one supported speech encoder.
        config: The configuration, or configurations by adapter name.
        adapter_name: Name of the first adapter.

    Raises:
        ValueError: The model has no supported encoder or several, or the configuration does not fit it. The model is
            then as it was.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import WavLMConfig, WavLMForCTC
        >>> import peft_elp
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, layerdrop=0.0)
        >>> model = get_peft_model(WavLMForCTC(WavLMConfig(vocab_size=8, **size)), peft_elp.ELPConfig())
        >>> model.peft_config["default"].l_output
        'head'
    """

    prefix = "elp_"
    tuner_layer_cls = ELPLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Place one adapter; called by PEFT for the first and for every further one.

        PEFT's own walk replaces modules by a list of names made beforehand, in which a parent that is replaced hides its
        children. ELP wraps parents and children, so it follows a plan of its own.

        Raises:
            ValueError: The configuration does not fit the model. Nothing is changed then.
            RuntimeError: An adapter that the plan holds was not found after placing. The adapter is removed again.
        """
        config = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        check_adapter_name(model, adapter_name)
        plan = make_plan(model, config)
        existing = [layer for layer in model.modules() if isinstance(layer, ELPLayer)]
        trainable_before = {p: p.requires_grad for p in model.parameters()} if existing else {}

        self.peft_config[adapter_name] = plan.config
        try:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._place(model, adapter_name, plan)
            missing = plan.expected() - placed(model, adapter_name)
            if missing:
                raise RuntimeError(
                    f"{len(missing)} of {len(plan.expected())} adapters found no place: {', '.join(sorted(missing))}. "
                    "Are layers of this model shared? Name the layers to adapt with e_layers and l_layers."
                )
        except BaseException:
            self.peft_config[adapter_name] = config
            remove_adapter(model, adapter_name)
            raise

        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        place_head(
            model,
            plan.config.modules_to_save or [],
            adapter_name,
            active=adapter_name in self.active_adapters,
            inference_mode=config.inference_mode,
            replacements=new_head_input(model, plan),
        )
        for parameter, requires_grad in trainable_before.items():
            parameter.requires_grad_(requires_grad)
        names = [canonical(name) for name, module in model.named_modules() if isinstance(module, ELPLayer)]
        self.targeted_module_names[:] = names

    def _place(self, model: nn.Module, adapter_name: str, plan: Plan) -> None:
        config, parts = plan.config, plan.parts
        active, frozen = self.active_adapters, config.inference_mode
        init_std = config.init_std if config.init_weights else None
        for layer, part in plan.e_sites:
            sublayer = wrap(parts.layers[layer], part, ELPSublayer, active)
            adapter = EAdapter(parts.hidden_size, config.e_dim, config.e_activation, config.e_dropout, init_std)
            sublayer.place("elp_e", adapter_name, adapter, frozen)
        for layer, part in plan.norm_sites:
            wrap(parts.layers[layer], part, ELPNorm, active).copy_for(adapter_name, frozen)

        stack = self._wrap_stack(model, parts)
        if "L" in config.adapters:
            assert config.l_layers is not None
            assert config.l_output is not None
            stack.tapped_layers[adapter_name] = config.l_layers
            if stack.layerdrop > 0:
                warnings.warn(
                    f"LayerDrop ({parts.family.layerdrop}={stack.layerdrop}) is off while an L-adapter is active: a layer "
                    "that is skipped has no output to read. unload() restores it.",
                    stacklevel=2,
                )
            adapter = LAdapter(
                parts.hidden_size,
                len(config.l_layers),
                config.l_dim,
                config.l_activation,
                config.l_dropout,
                init_std,
                output="taps" if config.l_output == "head" else config.l_output,
            )
            stack.place("elp_l", adapter_name, adapter, frozen)
        if "P" in config.adapters:
            adapter = PAdapter(parts.hidden_size, config.p_length, config.p_position, config.p_init_std)
            stack.place("elp_p", adapter_name, adapter, frozen)
        if "L" in config.adapters or "P" in config.adapters:
            for index, layer in enumerate(stack.encoder_layers):
                if not isinstance(layer, TappedLayer):
                    stack.encoder_layers[index] = TappedLayer(layer, index)

    def _wrap_stack(self, model: nn.Module, parts: Parts) -> ELPStack:
        parent_path, _, name = parts.stack_path.rpartition(".")
        parent = model.get_submodule(parent_path)
        module = getattr(parent, name)
        if isinstance(module, ELPStack):
            return module
        stack = ELPStack(module, parts.family, self.active_adapters)
        setattr(parent, name, stack)
        cnn = feature_encoder(parts.encoder, parts.family)
        if cnn is not None:
            # Else the CNN, though frozen, would be recorded for a backward pass in every training step.
            stack._feature_encoder_grad, cnn._requires_grad = cnn._requires_grad, False
            parts.encoder.register_forward_pre_hook(refuse_short_utterances, with_kwargs=True)
        parts.encoder.register_forward_hook(trim_hidden_states)
        return stack

    def get_input_embeddings(self) -> nn.Module | None:
        """The embeddings of a text vocabulary, None for an encoder of speech.

        PEFT asks for them when it saves a model whose vocabulary is not that of its base, such as a CTC head for a new
        language. Transformers raises for most speech models.
        """
        try:
            return self.model.get_input_embeddings()
        except NotImplementedError:
            return None

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("ELP places its adapters in inject_adapter, by a plan.")

    def _check_merge_allowed(self) -> NoReturn:
        raise ValueError(WHY_NO_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        unwrap(self.model)
        remove_head(self.model)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The saved name of a tensor must not depend on which other adapters wrap the same backbone.
        return canonical(re.sub(rf"(\.elp_[a-z]+)\.{re.escape(adapter_name)}(?=\.)", r"\1", key))


def count_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """How many parameters an adapter holds, by part.

    Args:
        model: A model with ELP-adapters, as `get_peft_model` returns it.
        adapter_name: The adapter to count.

    Returns:
        Numbers under "E", "L" (with its layer weights), "P", "layer norms" and "head".

    Raises:
        ValueError: The model has no adapter of that name.
    """
    peft_config = getattr(model, "peft_config", {})
    if adapter_name not in peft_config:
        raise ValueError(f"No adapter named {adapter_name!r}; the model has {sorted(peft_config) or 'none'}.")
    counts = dict.fromkeys(("E", "L", "P", "layer norms", "head"), 0)
    containers = {"elp_e": "E", "elp_l": "L", "elp_p": "P", "elp_norm": "layer norms", "modules_to_save": "head"}
    for name, parameter in model.named_parameters():
        for container, part in containers.items():
            if f".{container}.{adapter_name}." in name:
                counts[part] += parameter.numel()
    return counts


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that PEFT, which finds an adapter's tensors by it, would find elsewhere too.

    Raises:
        ValueError: A module of the model, or a part of an adapter, has the same name.
    """
    taken = {part for name, _ in model.named_parameters() for part in canonical(name).split(".")}
    taken |= {"base_layer", "original_module", "modules_to_save", "base_model", "model", "taps", "down", "up", "norm"}
    others = set(getattr(model, "peft_config", {})) - {adapter_name}
    if adapter_name in taken - others:
        raise ValueError(
            f"An adapter cannot be named {adapter_name!r}, since a module of {type(model).__name__} or of ELP has that "
            "name and PEFT tells tensors apart by it. Choose a name of its own, such as the task's."
        )


def find_parts(model: nn.Module) -> Parts:
    """Find the speech encoder in a model.

    Raises:
        ValueError: There is none that ELP knows, or several.
    """
    stacks: dict[str, tuple[nn.Module, Backbone]] = {}
    for name, module in model.named_modules():
        row = family(type(module))
        if row is not None:
            stacks[canonical(name)] = (module, row)
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} contains no speech encoder that ELP knows. It knows these encoder stacks: "
            f"{', '.join(sorted(BACKBONES))}. Load the model of such a family, for example "
            "AutoModelForCTC.from_pretrained('microsoft/wavlm-base-plus')."
        )
    if len(stacks) > 1:
        named = ", ".join(
            f"{path or 'the model itself'} ({type(stack).__name__})" for path, (stack, _) in stacks.items()
        )
        raise ValueError(
            f"{type(model).__name__} contains several speech encoders: {named}. ELP adapts one: pass the sub-model that "
            "holds the one you mean to get_peft_model()."
        )
    ((stack_path, (stack, row)),) = stacks.items()
    encoder, encoder_path = model, ""
    here, path = model, ""
    for step in stack_path.split("."):
        if isinstance(here, PreTrainedModel):
            encoder, encoder_path = here, path
        here, path = getattr(here, step), join(path, step)
    layers = stack.get_submodule(row.layers)
    assert isinstance(layers, nn.ModuleList)
    plain = [layer.base_layer if isinstance(layer, Wrapper) else layer for layer in layers]
    hidden_size = plain[0].get_submodule(row.norms[0]).weight.shape[0]
    return Parts(encoder, encoder_path, stack, stack_path, row, plain, int(hidden_size))


def make_plan(model: nn.Module, config: ELPConfig) -> Plan:
    """Decide everything that an injection will do, from a copy of `config`; the model is not changed.

    Raises:
        ValueError: The configuration does not fit the model.
    """
    parts = find_parts(model)
    config = copy(config)
    plan = Plan(parts, config)
    depth = len(parts.layers)
    name = type(model).__name__

    for option in ("e_layers", "l_layers"):
        layers = getattr(config, option)
        beyond = [layer for layer in layers or () if layer >= depth]
        if beyond:
            raise ValueError(
                f"{option}={layers} names {beyond}, and {name} has {depth} layers: 0 to {depth - 1}, counted from 0."
            )
    if "L" in config.adapters:
        if getattr(model.config, "use_weighted_layer_sum", False) or getattr(
            parts.encoder.config, "use_weighted_layer_sum", False
        ):
            raise ValueError(
                f"use_weighted_layer_sum=True makes {name}'s head read the backbone's hidden states, past the L-adapter, "
                "which would never train. Set model.config.use_weighted_layer_sum=False before loading the model (the "
                "L-adapter learns such a sum itself), or leave L out of adapters."
            )
        config.l_layers = list(range(depth)) if config.l_layers is None else config.l_layers
    if "E" in config.adapters:
        if config.e_layers is None:
            config.e_layers = list(range(depth - 1 if "L" in config.adapters else depth))
        sublayers = {"feed_forward": parts.family.feed_forward, "attention": parts.family.attention}
        plan.e_sites = [(i, part) for i in config.e_layers for place in config.e_after for part in sublayers[place]]
    if config.train_layer_norms:
        adapted = set(config.e_layers or () if "E" in config.adapters else ())
        adapted |= set(config.l_layers or () if "L" in config.adapters else ())
        plan.norm_sites = [(i, part) for i in sorted(adapted) for part in parts.family.norms]

    _exclude(plan, name)
    if "E" in config.adapters and not plan.e_sites:
        raise ValueError(
            f"No E-adapter would be placed in {name}: it has {depth} layer(s), and with an L-adapter the last one gets "
            "none unless e_layers says so; exclude_modules may have taken the rest. Name layers in e_layers, or leave E "
            "out of adapters."
        )
    head = find_head(model, parts.encoder_path) if config.modules_to_save is None else []
    if config.modules_to_save is None:
        config.modules_to_save = head
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about parameters of a head that the user did not ask for
            head = find_head(model, parts.encoder_path)
        config.modules_to_save = resolve(model, config.modules_to_save, parts.stack_path, head)
    if "L" in config.adapters:
        _resolve_l_output(model, plan)
    return plan


def _exclude(plan: Plan, model_name: str) -> None:
    excluded = plan.config.exclude_modules
    if not excluded:
        return

    def kept(site: tuple[int, str]) -> bool:
        path = plan.parts.layer_path(*site)
        if isinstance(excluded, str):
            return re.fullmatch(excluded, path) is None
        return not any(path == name or path.endswith(f".{name}") for name in excluded)

    before = len(plan.e_sites) + len(plan.norm_sites)
    plan.e_sites = [site for site in plan.e_sites if kept(site)]
    plan.norm_sites = [site for site in plan.norm_sites if kept(site)]
    if len(plan.e_sites) + len(plan.norm_sites) == before:
        warnings.warn(
            f"exclude_modules={excluded!r} excludes nothing in {model_name}. Its E-adapters and trained layer norms sit at "
            f"paths like {plan.parts.layer_path(0, plan.parts.family.feed_forward[0])!r}.",
            stacklevel=2,
        )


def _resolve_l_output(model: nn.Module, plan: Plan) -> None:
    config, parts = plan.config, plan.parts
    if config.l_output not in (None, "head"):
        return
    path, reason = _head_input_path(model, plan)
    if path is None and config.l_output == "head":
        raise ValueError(
            f"l_output='head' needs a known, trained head that reads the encoder, and {reason}. Write "
            "l_output='project', or None to let ELP choose."
        )
    config.l_output = "head" if path else "project"
    plan.new_head_input = path


def _head_input_path(model: nn.Module, plan: Plan) -> tuple[str | None, str]:
    """The head's first linear layer, if it reads the encoder and is trained; else why it does not count."""
    parts = plan.parts
    if not parts.encoder_path:
        return None, f"{type(model).__name__} is a bare encoder"
    parent_path = parts.encoder_path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    name = head_input(type(parent))
    if name is None:
        return None, f"{type(parent).__name__} is none that ELP knows"
    path = join(parent_path, name)
    linear = original(model.get_submodule(path))
    if getattr(parts.encoder.config, "add_adapter", False):
        return None, f"config.add_adapter puts the backbone's own convolutions between the encoder and {path!r}"
    if not isinstance(linear, nn.Linear) or linear.in_features != parts.hidden_size:
        return None, f"{path!r} is no linear layer of {parts.hidden_size} features"
    if path not in (plan.config.modules_to_save or ()):
        return None, f"modules_to_save does not hold its first layer {path!r}"
    return path, ""


def new_head_input(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The head's first linear layer at width `l_dim`, by its path; nothing where the plan has none.

    It starts as Transformers starts the layers of that model.
    """
    path = plan.new_head_input
    if path is None:
        return {}
    old = original(model.get_submodule(path))
    assert isinstance(old, nn.Linear)
    options = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    new = nn.Linear(plan.config.l_dim, old.out_features, **options)
    if isinstance(model, PreTrainedModel):
        model._init_weights(new)
    return {path: new}


def wrap(layer: nn.Module, part: str, wrapper: Any, active_adapters: list[str]) -> Any:
    """The tuner layer around a part of an encoder layer; made if it is not there yet."""
    parent_path, _, name = part.rpartition(".")
    parent = layer.get_submodule(parent_path)
    module = getattr(parent, name)
    if not isinstance(module, wrapper):
        module = wrapper(module, active_adapters)
        setattr(parent, name, module)
    return module


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


def feature_encoder(encoder: nn.Module, row: Backbone) -> Any:
    """The backbone's convolutions over the waveform, None where it has none that ELP knows of."""
    cnn = getattr(encoder, row.feature_encoder, None) if row.feature_encoder else None
    return cnn if hasattr(cnn, "_requires_grad") else None


def _with_children(model: nn.Module) -> Iterable[tuple[nn.Module, str, nn.Module]]:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take one adapter out again, with every wrapper that it alone needed."""
    for layer in model.modules():
        if isinstance(layer, ELPLayer):
            for container in layer.adapter_layer_names:
                if adapter_name in getattr(layer, container):
                    del getattr(layer, container)[adapter_name]
        if isinstance(layer, ELPStack):
            layer.tapped_layers.pop(adapter_name, None)
            layer._switch_layerdrop()
    unwrap(model, only_unused=True)
    remove_head(model, only_unused=True)


def unwrap(model: nn.Module, only_unused: bool = False) -> None:
    """Put the backbone's own modules back in place of ELP's wrappers, and its settings back to what they were.

    Args:
        model: The whole model.
        only_unused: Leave those wrappers that hold an adapter.
    """
    for parent, name, child in _with_children(model):
        if isinstance(child, ELPStack) and not (only_unused and child._get_available_adapters()):
            _unwrap_stack(model, child)
            setattr(parent, name, child.base_layer)
    for parent, name, child in _with_children(model):
        if isinstance(child, ELPLayer) and not isinstance(child, ELPStack):
            if not (only_unused and child._get_available_adapters()):
                setattr(parent, name, child.base_layer)


def _unwrap_stack(model: nn.Module, stack: ELPStack) -> None:
    if stack._layerdrop is not None:
        holder, attribute = stack._layerdrop_at()
        setattr(holder, attribute, stack._layerdrop)
    for index, layer in enumerate(stack.encoder_layers):
        if isinstance(layer, TappedLayer):
            stack.encoder_layers[index] = layer.base_layer
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in (trim_hidden_states, refuse_short_utterances)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if stack._feature_encoder_grad is not None and module is not stack and hasattr(module, "_requires_grad"):
            module._requires_grad = stack._feature_encoder_grad
