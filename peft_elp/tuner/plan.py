"""Everything that one injection will do, decided and checked before the model is changed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from peft_elp.adapters import EAdapter, LAdapter, PAdapter
from peft_elp.config import ELPConfig
from peft_elp.heads import head_input
from peft_elp.parameters import SETTINGS
from peft_elp.wording import brief, shortened

from .find import Encoder, find_encoder
from .head import Head
from .head_config import head_config, initialised, planned_head, refuse_left_out, remade_modules
from .head_modules import choose_head, find_head, warn_of_new_and_frozen, was_loaded
from .layers import ELPNorm, ELPSublayer
from .misfits import Settings
from .offload import copy_with_weights
from .paths import canonical, join, original
from .stack import ELPStack
from .window import averages_over_padding, check_window
from .wrapper import Wrapper

# What the names in a saved file start with: PEFT names a tensor from the PeftModel around the tuner around the model.
SAVED_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Site:
    """A module of the model, and what an adapter puts beside it."""

    path: str  # of the module in the model
    wrapper: type[ELPSublayer | ELPNorm | ELPStack | Head]  # the tuner layer that goes around it
    container: str  # where the tuner layer holds what its adapters put there, by adapter name
    like: nn.Module  # has tensors of the same names and shapes, maybe without values
    make: Callable[[], nn.Module]  # makes what the adapter puts there

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of `like` under the names that a saved adapter gives them."""
        prefix = join(self.path, "" if self.wrapper is Head else self.container)
        return {f"{SAVED_PREFIX}{join(prefix, name)}": tensor for name, tensor in self.like.state_dict().items()}


@dataclass
class Plan:
    """Everything that one injection will do."""

    encoder: Encoder
    config: ELPConfig  # with every open choice resolved
    sites: list[Site]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that the adapter will have, under their names in a saved file, maybe without values."""
        return {name: tensor for site in self.sites for name, tensor in site.tensors().items()}


def make_plan(model: nn.Module, config: ELPConfig) -> Plan:
    """Decide everything that an injection will do, from a copy of `config`. The model is not changed.

    Raises:
        ValueError: The configuration does not fit the model.
    """
    encoder, chosen, config = find_encoder(model, config.target), config, copy(config)
    _check_family(encoder, config)
    if config.chunk_length is not None:
        check_window(model, encoder, config.chunk_length)
    _choose_layers(model, encoder, config)
    _choose_pooling(model, encoder, config)
    config.modules_to_save = choose_head(model, encoder, chosen.modules_to_save)
    if config.modules_to_save or config.head_config:
        config.head_config = head_config(model, chosen.head_config)
        if chosen.head_config:
            head = find_head(model, encoder.backbone_path)
            refuse_left_out(model, head, config.modules_to_save, chosen.head_config)
    warn_of_new_and_frozen(model, config.modules_to_save)
    new_input = _resolve_l_output(model, encoder, config) if "L" in config.adapters else None
    if "L" in config.adapters:
        _leave_out_what_nothing_reads(config, chosen=chosen.e_layers)
    sites = [*_sites_in_layers(model, encoder, config), *_sites_of_stack(encoder, config)]
    plan = Plan(encoder, config, [*sites, *_sites_of_head(model, encoder, config, new_input)])
    _refuse_shared(model, plan)
    return plan


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that PEFT would also find elsewhere, since it finds an adapter's tensors by the name."""
    if not adapter_name or "." in adapter_name or adapter_name == "__base__" or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"An adapter cannot be named {adapter_name!r}, which is not a valid module name or has a meaning of its "
            "own. Use letters, digits and underscores, such as the name of the task."
        )
    taken = {step for name, _ in model.named_parameters() for step in canonical(name).split(".")}
    taken |= {"base_layer", "original_module", "modules_to_save", "base_model", "model", "taps", "down", "up", "norm"}
    others = set(getattr(model, "peft_config", {})) - {adapter_name}
    if adapter_name in taken - others:
        raise ValueError(
            f"An adapter cannot be named {adapter_name!r}: a module of {type(model).__name__}, of ELP or of another "
            "adapter has that name, and PEFT finds tensors by it. Use another name, such as the name of the task."
        )


def _check_family(encoder: Encoder, config: ELPConfig) -> None:
    """Refuse adapters that have no sound place in the encoder's family, and resolve the length of P."""
    row, stack = encoder.family, type(encoder.stack).__name__
    none = {letter: reason for letter, reason in (("L", row.no_l), ("P", row.no_p)) if reason}
    for letter in (letter for letter in none if letter in config.adapters):
        left = "".join(other for other in config.adapters if other not in none) or "E"
        raise ValueError(f"There is no {letter}-adapter for {stack}: {none[letter]}. Write adapters={left!r}.")
    if "P" not in config.adapters:
        return
    if row.front_end_inside and config.p_position == "prepend":
        raise ValueError(
            f"p_position='prepend' has no meaning for {stack}: its pseudo features are carried through the layers "
            "beside the frames, and have no place among them. Leave p_position at 'append'."
        )
    factor = getattr(encoder.backbone.config, row.squeeze.rpartition(".")[2]) if row.squeeze else 1
    length = factor if config.p_length is None else config.p_length
    if length % factor:
        raise ValueError(
            f"{stack} takes {factor} frames as one, so p_length must be a multiple of {factor}, got {length}. "
            f"Write p_length={max(length // factor, 1) * factor}."
        )
    config.p_length = length


def _choose_layers(model: nn.Module, encoder: Encoder, config: ELPConfig) -> None:
    depth, name = len(encoder.layers), type(model).__name__
    # The paper's 256 and 512 of 768.
    config.e_dim = _share(encoder.hidden_size, 1 / 3) if config.e_dim is None else config.e_dim
    config.l_dim = _share(encoder.hidden_size, 2 / 3) if config.l_dim is None else config.l_dim
    for option in ("e_layers", "l_layers"):
        beyond = [layer for layer in getattr(config, option) or () if layer >= depth]
        if beyond:
            raise ValueError(
                f"{option} names {shortened(beyond)}, and {name} has {depth} layers: 0 to {depth - 1}, counted from 0."
            )
    if "L" in config.adapters:
        configs = [getattr(module, "config", None) for module in (model, encoder.backbone)]
        if any(getattr(known, "use_weighted_layer_sum", False) for known in configs):
            raise ValueError(
                f"use_weighted_layer_sum=True makes {name}'s head read past the L-adapter, which would never train. "
                "Load the model with use_weighted_layer_sum=False, since the L-adapter learns such a sum itself, or "
                "leave L out of adapters."
            )
        config.l_layers = list(range(depth)) if config.l_layers is None else config.l_layers
        config.l_input_norm = encoder.family.pre_norm if config.l_input_norm is None else config.l_input_norm
    if "E" in config.adapters and config.e_layers is None:
        config.e_layers = list(range(depth - 1 if "L" in config.adapters else depth))


def _share(width: int, share: float) -> int:
    return max(8, round(width * share / 8) * 8)


def _choose_pooling(model: nn.Module, encoder: Encoder, config: ELPConfig) -> None:
    possible = averages_over_padding(model, encoder)
    if config.pool_own_frames and not possible:
        raise ValueError(
            "pool_own_frames=True needs a head that averages over a fixed window, as WhisperForAudioClassification in "
            f"recent versions of Transformers, and {type(model).__name__} has none. Leave pool_own_frames out."
        )
    config.pool_own_frames = possible if config.pool_own_frames is None else config.pool_own_frames


def _leave_out_what_nothing_reads(config: ELPConfig, chosen: list[int] | None) -> None:
    """Leave out the E-adapters behind the last tapped layer if the sum of taps replaces the encoder's output."""
    last = max(config.l_layers or [0])
    unread = [layer for layer in config.e_layers or () if layer > last]
    if config.l_output == "residual" or "E" not in config.adapters or not unread:
        return
    if chosen is not None:
        raise ValueError(
            f"e_layers={brief(chosen)} names {brief(unread)}, and with l_output={config.l_output!r} nothing reads the "
            f"layers behind the last tapped one, {last}. Tap a later layer, leave them out of e_layers, or write "
            "l_output='residual'."
        )
    config.e_layers = [layer for layer in config.e_layers or () if layer <= last]


def _sites_in_layers(model: nn.Module, encoder: Encoder, config: ELPConfig) -> Iterator[Site]:
    """Decide which modules inside the layers get an E-adapter, and which layer norms are trained."""
    e_layers = (config.e_layers or []) if "E" in config.adapters else []
    l_layers = (config.l_layers or []) if "L" in config.adapters else []
    paths = {"feed_forward": encoder.family.feed_forward, "attention": encoder.family.attention}
    e_sites = [(layer, path) for layer in e_layers for place in config.e_after for path in paths[place]]
    both = sorted({*e_layers, *l_layers}) if config.train_layer_norms else []
    norm_sites = [(layer, path) for layer in both for path in encoder.family.norms]
    if config.exclude_modules:
        excluded = _excluded(encoder, config.exclude_modules, e_sites + norm_sites, type(model).__name__)
        e_sites = [site for site in e_sites if site not in excluded]
        norm_sites = [site for site in norm_sites if site not in excluded]
    parts = [{canonical(name) for name, _ in layer.named_modules()} for layer in encoder.layers]
    absent = {path for layer, path in e_sites + norm_sites if path not in parts[layer]}
    if absent:
        raise ValueError(
            f"The layers of {type(encoder.stack).__name__} are described as having {shortened(sorted(absent))}, and a "
            f"{type(encoder.layers[0]).__name__} of this model has not. It has "
            f"{shortened(child for child, _ in encoder.layers[0].named_children())}. Update transformers, or correct "
            "the register_backbone call."
        )
    if "E" in config.adapters and not e_sites:
        raise ValueError(
            f"No E-adapter would be placed in {type(model).__name__}: of its {len(encoder.layers)} layer(s), the last "
            "gets none beside an L-adapter, nor do those behind the last tapped one, and exclude_modules may exclude "
            "the others. Name layers in e_layers, or leave E out of adapters."
        )
    assert config.e_dim is not None  # `_choose_layers` has chosen it.
    make = partial(
        EAdapter,
        encoder.hidden_size,
        config.e_dim,
        config.e_activation,
        config.e_dropout,
        init_std=config.init_std if config.init_weights == "paper" else None,
        norm_gain=0.0 if config.init_weights is True else 1.0,
    )
    like = _without_values(make) if e_sites else nn.Module()
    for site in e_sites:
        yield Site(encoder.layer_path(*site), ELPSublayer, "elp_e", like, make)
    for layer, path in norm_sites:
        module = encoder.layers[layer].get_submodule(path)
        norm = module.base_layer if isinstance(module, Wrapper) else module
        yield Site(encoder.layer_path(layer, path), ELPNorm, "elp_norm", norm, partial(copy_with_weights, norm))


def _excluded(
    encoder: Encoder, excluded: list[str] | str, sites: list[tuple[int, str]], model_name: str
) -> set[tuple[int, str]]:
    """Return the sites that `exclude_modules` names: an expression for whole paths, or a list of endings."""
    paths = {site: encoder.layer_path(*site) for site in sites}
    if isinstance(excluded, str):
        try:
            found = {site for site, path in paths.items() if re.fullmatch(excluded, path)}
        except re.error as error:
            raise ValueError(
                f"exclude_modules={brief(excluded)} is not a regular expression: {error}. Write a list of "
                r"paths, or an expression such as r'.*layers\.0\..*'."
            ) from error
    else:
        found = {site for site, path in paths.items() if any(f".{path}".endswith(f".{ending}") for ending in excluded)}
    if not found:
        warnings.warn(
            f"exclude_modules={brief(excluded)} excludes nothing in {model_name}. Its E-adapters and trained layer "
            f"norms are at paths like {encoder.layer_path(0, encoder.family.feed_forward[0])!r}.",
            stacklevel=2,
        )
    return found


def _sites_of_stack(encoder: Encoder, config: ELPConfig) -> Iterator[Site]:
    settings = Settings(config)
    yield Site(encoder.stack_path, ELPStack, SETTINGS, settings, lambda: settings)
    if "L" in config.adapters:
        assert config.l_dim is not None  # `_choose_layers` and `_resolve_l_output` have chosen these.
        assert config.l_output is not None
        make = partial(
            LAdapter,
            encoder.hidden_size,
            len(config.l_layers or ()),
            config.l_dim,
            config.l_activation,
            config.l_dropout,
            config.init_std if config.init_weights else None,
            output="taps" if config.l_output == "head" else config.l_output,
            input_norm=bool(config.l_input_norm),
        )
        yield Site(encoder.stack_path, ELPStack, "elp_l", _without_values(make), make)
    if "P" in config.adapters:
        assert config.p_length is not None  # `_check_family` has chosen it.
        make = partial(PAdapter, encoder.hidden_size, config.p_length, config.p_position, config.p_init_std)
        yield Site(encoder.stack_path, ELPStack, "elp_p", _without_values(make), make)


def _sites_of_head(model: nn.Module, encoder: Encoder, config: ELPConfig, new_input: str | None) -> Iterator[Site]:
    """Return the modules of the head, copied from the model or made anew, as `new_input` is at width `l_dim`."""
    paths = config.modules_to_save or ()
    anew = planned_head(model, paths, config.head_config, new_input, config.l_dim or encoder.hidden_size)
    for path in paths:
        module = original(model.get_submodule(path))
        make = partial(initialised, model, path, anew[path]) if path in anew else partial(copy_with_weights, module)
        yield Site(path, Head, "modules_to_save", anew.get(path, module), make)


def _without_values(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def _refuse_shared(model: nn.Module, plan: Plan) -> None:
    """Refuse a module that would get two adapters because the model uses it twice."""
    found: dict[tuple[int, str], str] = {}
    for site in plan.sites:
        key = (id(model.get_submodule(site.path)), site.container)
        if key in found:
            raise ValueError(
                f"{site.path!r} and {found[key]!r} are the same module, which can hold one adapter. Name one of the "
                "layers that share it in e_layers and l_layers, with train_layer_norms=False."
            )
        found[key] = site.path


def _resolve_l_output(model: nn.Module, encoder: Encoder, config: ELPConfig) -> str | None:
    """Resolve where the sum of taps goes. Return the path of the head's layer that is made anew, if one is."""
    if config.l_output not in (None, "head"):
        return None
    path, reason = _head_input_path(model, encoder, config)
    if path is None and config.l_output == "head":
        raise ValueError(
            f"l_output='head' needs a known, trained head that reads the encoder, and {reason}. Write "
            "l_output='residual', or None to let ELP choose."
        )
    if config.l_output is None:
        config.l_output = "head" if path and _is_new(model, path, config) else "residual"
    return path if config.l_output == "head" else None


def _is_new(model: nn.Module, path: str, config: ELPConfig) -> bool:
    """Whether the head's layer at `path` is newly initialised, so that nothing is lost if it is made anew."""
    if remade_modules(model, [path], config.head_config):
        return True
    layer = original(model.get_submodule(path))
    if any(was_loaded(parameter) for parameter in model.parameters()):
        return not any(was_loaded(parameter) for parameter in layer.parameters())
    return not getattr(getattr(model, "config", None), "name_or_path", "")


def _head_input_path(model: nn.Module, encoder: Encoder, config: ELPConfig) -> tuple[str | None, str]:
    """Return the path of the head's first linear layer that reads the encoder and is trained, or why there is none."""
    if not encoder.backbone_path:
        return None, f"{type(model).__name__} is a bare encoder"
    if encoder.family.taps_end != "stack":
        return None, f"{type(encoder.stack).__name__} pools or up-samples between its layers and the head"
    parent_path = encoder.backbone_path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    name = head_input(type(parent))
    if name is None or not hasattr(parent, name):
        return None, f"{type(parent).__name__} is not a head that ELP knows"
    path = join(parent_path, name)
    linear = original(model.get_submodule(path))
    if getattr(encoder.backbone.config, "add_adapter", False):
        return None, f"config.add_adapter puts the backbone's own convolutions between the encoder and {path!r}"
    if not isinstance(linear, nn.Linear) or linear.in_features != encoder.hidden_size:
        return None, f"{path!r} is not a linear layer of {encoder.hidden_size} features"
    if path not in (config.modules_to_save or ()):
        return None, f"modules_to_save does not hold its first layer {path!r}"
    return path, ""
