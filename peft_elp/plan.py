"""Everything that one injection will do, decided and checked before the model is changed."""

from __future__ import annotations

import re
import warnings
from copy import copy
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from .backbones import BACKBONES, Backbone, family, head_input
from .config import ELPConfig
from .heads import canonical, find_head, join, original, resolve
from .layer import Wrapper


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
            f"An adapter cannot be named {adapter_name!r}, since a module of {type(model).__name__} or of ELP has "
            "that name and PEFT tells tensors apart by it. Choose a name of its own, such as the task's."
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
            f"{type(model).__name__} contains several speech encoders: {named}. ELP adapts one: pass the sub-model "
            "that holds the one you mean to get_peft_model()."
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
    width = plain[0].get_submodule(row.norms[0]).weight
    assert isinstance(width, nn.Parameter)
    return Parts(encoder, encoder_path, stack, stack_path, row, plain, width.shape[0])


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
                f"use_weighted_layer_sum=True makes {name}'s head read the backbone's hidden states, past the "
                "L-adapter, which would never train. Set model.config.use_weighted_layer_sum=False before loading the "
                "model (the L-adapter learns such a sum itself), or leave L out of adapters."
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
            f"No E-adapter would be placed in {name}: it has {depth} layer(s), and with an L-adapter the last one "
            "gets none unless e_layers says so; exclude_modules may have taken the rest. Name layers in e_layers, or "
            "leave E out of adapters."
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
