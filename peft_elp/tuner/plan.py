"""Everything that one injection will do, decided and checked before the model is changed."""

from __future__ import annotations

import re
import warnings
from copy import copy
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from peft_elp.backbones import BRIDGES, family
from peft_elp.config import ELPConfig
from peft_elp.heads import head_input

from .find import Encoder, find_encoder
from .head import find_head, original, resolve
from .head_config import head_config, other_modules
from .layers import Wrapper
from .paths import canonical, join
from .window import check_window


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

    parts: Encoder
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


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that PEFT, which finds an adapter's tensors by it, would find elsewhere too.

    Raises:
        ValueError: A module of the model, or a part of an adapter, has the same name.
    """
    taken = {part for name, _ in model.named_parameters() for part in canonical(name).split(".")}
    taken |= {"base_layer", "original_module", "modules_to_save", "base_model", "model", "taps", "down", "up", "norm"}
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"An adapter cannot be named {adapter_name!r}: PyTorch takes it for no name of a module. Use letters, "
            "digits and underscores, such as the task's name."
        )
    others = set(getattr(model, "peft_config", {})) - {adapter_name}
    if adapter_name in taken - others:
        raise ValueError(
            f"An adapter cannot be named {adapter_name!r}, since a module of {type(model).__name__} or of ELP, or an "
            "adapter of another method, has that name, and PEFT tells tensors apart by it. Choose a name of its own, "
            "such as the task's."
        )


def make_plan(model: nn.Module, config: ELPConfig) -> Plan:
    """Decide everything that an injection will do, from a copy of `config`; the model is not changed.

    Raises:
        ValueError: The configuration does not fit the model.
    """
    parts = find_encoder(model, config.target)
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
    _check_family(plan)
    if config.window_s is not None:
        check_window(model, parts, config.window_s)
    if "L" in config.adapters:
        configs = [getattr(module, "config", None) for module in (model, parts.backbone)]
        if any(getattr(known, "use_weighted_layer_sum", False) for known in configs):
            raise ValueError(
                f"use_weighted_layer_sum=True makes {name}'s head read the backbone's hidden states, past the "
                "L-adapter, which would never train. Set model.config.use_weighted_layer_sum=False before loading the "
                "model (the L-adapter learns such a sum itself), or leave L out of adapters."
            )
        config.l_layers = list(range(depth)) if config.l_layers is None else config.l_layers
        config.l_input_norm = parts.family.pre_norm if config.l_input_norm is None else config.l_input_norm
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
    absent = {part for i, part in plan.e_sites + plan.norm_sites if not _has(parts.layers[i], part)}
    if absent:
        raise ValueError(
            f"The layers of {type(parts.stack).__name__} are described as having {', '.join(sorted(absent))}, and a "
            f"{type(parts.layers[0]).__name__} of this model has not. It has "
            f"{', '.join(child for child, _ in parts.layers[0].named_children())}. Update transformers, or correct "
            "what register_backbone was told."
        )
    if "E" in config.adapters and not plan.e_sites:
        raise ValueError(
            f"No E-adapter would be placed in {name}: it has {depth} layer(s), and with an L-adapter the last one "
            "gets none unless e_layers says so; exclude_modules may have taken the rest. Name layers in e_layers, or "
            "leave E out of adapters."
        )
    if config.modules_to_save is None:
        generates = _generates(model)
        config.modules_to_save = (
            [name for name in BRIDGES if hasattr(model, name)] if generates else _head(model, parts)
        )
        if getattr(getattr(parts.backbone, "config", None), "add_adapter", False):
            convolutions = join(parts.backbone_path, "adapter")
            warnings.warn(
                f"config.add_adapter=True: the backbone's convolutions after the encoder, {convolutions!r}, stay "
                "frozen. If they are not pre-trained, train them too: modules_to_save="
                f"{[*config.modules_to_save, convolutions]}.",
                stacklevel=2,
            )
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about parameters of a head that the user did not ask for
            head = _head(model, parts)
        config.modules_to_save = resolve(model, config.modules_to_save, parts.stack_path, head)
    if config.modules_to_save or config.head_config:
        config.head_config = head_config(model, config.head_config)
    _refuse_quantised(model, config.modules_to_save)
    if "L" in config.adapters:
        _resolve_l_output(model, plan)
    return plan


def _refuse_quantised(model: nn.Module, head: list[str]) -> None:
    """Refuse to train what is quantised; the frozen encoder may be."""
    for path in head:
        for name, parameter in original(model.get_submodule(path)).named_parameters():
            # torchao's tensors pass for floating-point ones.
            if not parameter.dtype.is_floating_point or type(parameter).__module__.startswith("torchao"):
                raise ValueError(
                    f"{join(path, name)!r} is quantised ({type(parameter).__name__}, {parameter.dtype}), and the head "
                    "is trained. Quantise the encoder alone: load the model with BitsAndBytesConfig("
                    f"llm_int8_skip_modules={head}, ...), or call torchao's quantize_ on its base_model."
                )


def _head(model: nn.Module, parts: Encoder) -> list[str]:
    return find_head(model, parts.backbone_path, lambda module: family(type(module)) is not None)


def _has(layer: nn.Module, part: str) -> bool:
    try:
        layer.get_submodule(part)
    except AttributeError:
        return False
    return True


def _generates(model: nn.Module) -> bool:
    """Whether what follows the encoder is a pre-trained decoder or language model rather than a task's head."""
    return isinstance(model, PreTrainedModel) and model.can_generate() and head_input(type(model)) is None


def _check_family(plan: Plan) -> None:
    """Refuse adapters that the family has no sound place for."""
    config, row = plan.config, plan.parts.family
    stack = type(plan.parts.stack.base_layer if isinstance(plan.parts.stack, Wrapper) else plan.parts.stack).__name__
    for letter, reason in (("L", row.no_l), ("P", row.no_p)):
        if letter in config.adapters and reason:
            left = config.adapters.replace("L", "" if row.no_l else "L").replace("P", "" if row.no_p else "P")
            raise ValueError(
                f"There is no {letter}-adapter for {stack}: {reason}. "
                + (f"Write adapters={left!r}." if left else "Choose another adapter.")
            )
    if "P" not in config.adapters:
        return
    if row.front_end_inside and config.p_position == "prepend":
        raise ValueError(
            f"p_position='prepend' has no meaning for {stack}: its pseudo features are carried through the layers "
            "beside the frames, without a place among them. Leave p_position at 'append'."
        )
    if row.squeeze:
        _, _, name = row.squeeze.rpartition(".")
        factor = getattr(plan.parts.backbone.config, name)
        if config.p_length % factor:
            raise ValueError(
                f"{stack} takes {factor} frames as one, so that p_length has to be a multiple of {factor}, got "
                f"{config.p_length}. Write p_length={max(config.p_length // factor, 1) * factor}."
            )


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
            f"exclude_modules={excluded!r} excludes nothing in {model_name}. Its E-adapters and trained layer norms "
            f"sit at paths like {plan.parts.layer_path(0, plan.parts.family.feed_forward[0])!r}.",
            stacklevel=2,
        )


def _resolve_l_output(model: nn.Module, plan: Plan) -> None:
    config = plan.config
    if config.l_output not in (None, "head"):
        return
    path, reason = _head_input_path(model, plan)
    if path is None and config.l_output == "head":
        raise ValueError(
            f"l_output='head' needs a known, trained head that reads the encoder, and {reason}. Write "
            "l_output='residual', or None to let ELP choose."
        )
    if config.l_output is None:
        config.l_output = "head" if path and _is_new(model, path, config) else "residual"
    plan.new_head_input = path if config.l_output == "head" else None


def _is_new(model: nn.Module, path: str, config: ELPConfig) -> bool:
    """Whether the head's layer at `path` is newly initialised, so that nothing is lost if it is re-made."""
    if other_modules(model, [path], config.head_config):
        return True
    # Transformers marks each parameter that it loads; the marks survive a change of dtype or device, but no deepcopy.
    layer = original(model.get_submodule(path))
    loaded = {id(parameter) for parameter in model.parameters() if getattr(parameter, "_is_hf_initialized", False)}
    if loaded:
        return not any(id(parameter) in loaded for parameter in layer.parameters())
    return not getattr(getattr(model, "config", None), "name_or_path", "")


def _head_input_path(model: nn.Module, plan: Plan) -> tuple[str | None, str]:
    """The head's first linear layer, if it reads the encoder and is trained; else why it does not count."""
    parts = plan.parts
    if not parts.backbone_path:
        return None, f"{type(model).__name__} is a bare encoder"
    if parts.family.taps_end != "stack":
        return None, f"{type(parts.stack).__name__} pools or up-samples between its layers and the head"
    parent_path = parts.backbone_path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    name = head_input(type(parent))
    if name is None or not hasattr(parent, name):
        return None, f"{type(parent).__name__} is none that ELP knows"
    path = join(parent_path, name)
    linear = original(model.get_submodule(path))
    if getattr(parts.backbone.config, "add_adapter", False):
        return None, f"config.add_adapter puts the backbone's own convolutions between the encoder and {path!r}"
    if not isinstance(linear, nn.Linear) or linear.in_features != parts.hidden_size:
        return None, f"{path!r} is no linear layer of {parts.hidden_size} features"
    if path not in (plan.config.modules_to_save or ()):
        return None, f"modules_to_save does not hold its first layer {path!r}"
    return path, ""
