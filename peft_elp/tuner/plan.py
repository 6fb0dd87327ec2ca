"""Everything that one injection will do, decided and checked before the model is changed."""

from __future__ import annotations

import warnings
from copy import copy
from dataclasses import dataclass, field

import regex
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_elp.backbones import BRIDGES, family
from peft_elp.config import ELPConfig
from peft_elp.heads import head_input
from peft_elp.wording import brief, shortened

from .find import Encoder, find_encoder
from .head import find_head, original, resolve
from .head_config import head_config, refuse_left_out, remade_modules
from .paths import canonical, join
from .window import check_window

# Settings of a backbone that add modules behind its encoder layers.
ADDED_BEHIND = ("add_adapter", "use_intermediate_ffn_before_adapter")
SECONDS_A_MATCH = 0.2  # For a regular expression and one path.

LARGE_HEAD = 1 / 3  # of a model's parameters; an x-vector head holds 6 % of wav2vec 2.0 base


@dataclass
class Plan:
    """Everything that one injection will do, decided before anything is changed.

    Args:
        encoder: The speech encoder of the model.
        config: The configuration with every open choice resolved.
        e_sites: Layer and relative path of each E-adapter.
        norm_sites: Layer and relative path of each trained layer norm.
        new_head_input: Path of the head's linear layer that is re-made at width `l_dim`, None if none is.
    """

    encoder: Encoder
    config: ELPConfig
    e_sites: list[tuple[int, str]] = field(default_factory=list)
    norm_sites: list[tuple[int, str]] = field(default_factory=list)
    new_head_input: str | None = None

    def expected(self) -> set[str]:
        """The names of all adapters that the configuration asks for."""
        config, encoder = self.config, self.encoder
        names = {f"E at {encoder.layer_path(layer, part)}" for layer, part in self.e_sites}
        names |= {f"layer norm at {encoder.layer_path(layer, part)}" for layer, part in self.norm_sites}
        if "L" in config.adapters:
            names |= {f"L at {encoder.layer_path(layer)}" for layer in config.l_layers or ()}
        if "P" in config.adapters:
            names.add(f"P at {encoder.stack_path}")
        return names


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that PEFT would also find elsewhere, since it finds an adapter's tensors by the name.

    Raises:
        ValueError: A module of the model, or a part of an adapter, has the same name.
    """
    taken = {step for name, _ in model.named_parameters() for step in canonical(name).split(".")}
    taken |= {"base_layer", "original_module", "modules_to_save", "base_model", "model", "taps", "down", "up", "norm"}
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"An adapter cannot be named {adapter_name!r}, which is not a valid module name. Use letters, digits and "
            "underscores, such as the name of the task."
        )
    others = set(getattr(model, "peft_config", {})) - {adapter_name}
    if adapter_name in taken - others:
        raise ValueError(
            f"An adapter cannot be named {adapter_name!r}: a module of {type(model).__name__}, of ELP or of another "
            "adapter has that name, and PEFT finds tensors by it. Use another name, such as the name of the task."
        )


def make_plan(model: nn.Module, config: ELPConfig) -> Plan:
    """Decide everything that an injection will do, from a copy of `config`. The model is not changed.

    Raises:
        ValueError: The configuration does not fit the model.
    """
    plan = Plan(find_encoder(model, config.target), copy(config))
    _check_family(plan)
    if config.chunk_length is not None:
        check_window(model, plan.encoder, config.chunk_length)
    _choose_layers(model, plan)
    _choose_sites(model, plan)
    _choose_head(model, plan)
    if "L" in config.adapters:
        _resolve_l_output(model, plan)
        _leave_out_what_nothing_reads(plan, chosen=config.e_layers)
        _refuse_no_site(model, plan)
    return plan


def _choose_layers(model: nn.Module, plan: Plan) -> None:
    """Resolve which layers get E-adapters and which are tapped."""
    config, encoder = plan.config, plan.encoder
    depth, name = len(encoder.layers), type(model).__name__
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
                f"use_weighted_layer_sum=True makes {name}'s head read the backbone's hidden states, past the "
                "L-adapter, which would never train. Set model.config.use_weighted_layer_sum=False before loading the "
                "model, since the L-adapter learns such a sum itself, or leave L out of adapters."
            )
        config.l_layers = list(range(depth)) if config.l_layers is None else config.l_layers
        config.l_input_norm = encoder.family.pre_norm if config.l_input_norm is None else config.l_input_norm
    if "E" in config.adapters and config.e_layers is None:
        config.e_layers = list(range(depth - 1 if "L" in config.adapters else depth))


def _choose_sites(model: nn.Module, plan: Plan) -> None:
    """Decide which modules inside the layers get an E-adapter, and which layer norms are trained."""
    config, encoder = plan.config, plan.encoder
    e_layers = (config.e_layers or []) if "E" in config.adapters else []
    l_layers = (config.l_layers or []) if "L" in config.adapters else []
    paths = {"feed_forward": encoder.family.feed_forward, "attention": encoder.family.attention}
    plan.e_sites = [(layer, path) for layer in e_layers for place in config.e_after for path in paths[place]]
    if config.train_layer_norms:
        plan.norm_sites = [(layer, path) for layer in sorted({*e_layers, *l_layers}) for path in encoder.family.norms]
    if config.exclude_modules:
        _exclude(plan, config.exclude_modules, type(model).__name__)
    absent = {path for layer, path in plan.e_sites + plan.norm_sites if not _has(encoder.layers[layer], path)}
    if absent:
        raise ValueError(
            f"The layers of {type(encoder.stack).__name__} are described as having {shortened(sorted(absent))}, and a "
            f"{type(encoder.layers[0]).__name__} of this model has not. It has "
            f"{shortened(child for child, _ in encoder.layers[0].named_children())}. Update transformers, or correct "
            "the register_backbone call."
        )
    _refuse_no_site(model, plan)


def _refuse_no_site(model: nn.Module, plan: Plan) -> None:
    """Refuse a configuration with E-adapters that leaves no layer for them.

    Raises:
        ValueError: No layer is left.
    """
    if "E" in plan.config.adapters and not plan.e_sites:
        raise ValueError(
            f"No E-adapter would be placed in {type(model).__name__}: it has {len(plan.encoder.layers)} layer(s), the "
            "last one gets none beside an L-adapter unless e_layers names it, nor do those behind the last tapped one "
            "unless l_output is 'residual', and exclude_modules may exclude the others. "
            "Name layers in e_layers, or leave E out of adapters."
        )


def _choose_head(model: nn.Module, plan: Plan) -> None:
    """Resolve which modules are trained whole, and from which settings they are made."""
    config, encoder = plan.config, plan.encoder
    if config.modules_to_save is None:
        bridges = [name for name in BRIDGES if hasattr(model, name)]
        config.modules_to_save = bridges if _generates(model) else _head(model, encoder)
        chosen = False
    else:
        head = _head_in_silence(model, encoder)
        config.modules_to_save = resolve(model, config.modules_to_save, encoder.stack_path, head)
        chosen = True
    if config.modules_to_save or config.head_config:
        given, config.head_config = config.head_config, head_config(model, config.head_config)
        if given:
            refuse_left_out(model, _head_in_silence(model, encoder), config.modules_to_save, given)
    _refuse_quantised(model, config.modules_to_save)
    if not config.inference_mode:
        _warn_of_large_head(model, config.modules_to_save)
    _name_new_and_frozen(model, plan, chosen)


def _name_new_and_frozen(model: nn.Module, plan: Plan, chosen: bool) -> None:
    """Warn of modules that are newly initialised, not pre-trained, and yet stay frozen.

    Args:
        model: The model.
        plan: The plan, with the modules that are trained.
        chosen: Whether the user has named the modules that are trained.
    """
    trained, backbone = plan.config.modules_to_save or [], plan.encoder.backbone
    marked = {id(parameter) for parameter in model.parameters() if was_loaded(parameter)}
    if marked:
        frozen = _without(marked, "", model, {*trained})
        problem = "newly initialised and stay frozen"
    else:  # Nothing was loaded, or nothing tells. What the settings add behind the layers is often new.
        settings = getattr(backbone, "config", None)
        if chosen or not any(getattr(settings, name, False) for name in ADDED_BEHIND):
            return
        names = [name for name, _ in backbone.named_children()]
        stack_name = plan.encoder.stack_path.rpartition(".")[2]
        behind = [join(plan.encoder.backbone_path, name) for name in names[names.index(stack_name) + 1 :]]
        frozen = [path for path in behind if path not in trained]
        problem = "behind the encoder layers and stay frozen. They may not be pre-trained"
    if frozen:
        warnings.warn(
            f"{shortened(map(repr, frozen))} of {type(model).__name__} are {problem}. Train them too: "
            f"modules_to_save={[*trained, *frozen]}.",
            stacklevel=2,
        )


def _without(marked: set[int], path: str, module: nn.Module, trained: set[str]) -> list[str]:
    """The paths of the largest modules none of whose parameters are marked, apart from what is trained."""
    if (
        canonical(path) in trained
        or path.split(".")[-1].startswith("elp_")
        or isinstance(module, ModulesToSaveWrapper)
    ):
        return []
    parameters = list(module.parameters())
    holds_trained = any(name.startswith(f"{canonical(path)}.") for name in trained)  # As a list of modules does.
    if parameters and not holds_trained and not any(id(parameter) in marked for parameter in parameters):
        return [canonical(path)]
    return [
        found
        for name, child in module.named_children()
        for found in _without(marked, join(path, name), child, trained)
    ]


def _leave_out_what_nothing_reads(plan: Plan, chosen: list[int] | None) -> None:
    """Leave out the E-adapters behind the last tapped layer if the sum of taps replaces the encoder's output.

    Raises:
        ValueError: The user has chosen these layers for E-adapters, which would never be trained.
    """
    config = plan.config
    last = max(config.l_layers or [0])
    unread = [layer for layer in config.e_layers or () if layer > last]
    if config.l_output == "residual" or "E" not in config.adapters or not unread:
        return
    if chosen is None:
        config.e_layers = [layer for layer in config.e_layers or () if layer <= last]
        plan.e_sites = [(layer, path) for layer, path in plan.e_sites if layer <= last]
        plan.norm_sites = [(layer, path) for layer, path in plan.norm_sites if layer <= last]
    elif config.auto_mapping is None:  # Else it was saved, by an earlier version, and is loaded as it is.
        raise ValueError(
            f"e_layers={brief(chosen)} names {brief(unread)}, and l_layers={brief(config.l_layers)} ends with {last}: "
            f"with l_output={config.l_output!r} nothing reads the layers behind it, and these E-adapters would never "
            "be trained. Tap a later layer, leave them out of e_layers, or write l_output='residual'."
        )


def _warn_of_large_head(model: nn.Module, head: list[str]) -> None:
    """Warn if the adapter trains so much of the model that a pre-trained decoder may be a part of it."""
    trained = sum(p.numel() for path in head for p in original(model.get_submodule(path)).parameters())
    whole = sum(p.numel() for name, p in model.named_parameters() if ".modules_to_save." not in name)
    if trained > whole * LARGE_HEAD:
        warnings.warn(
            f"modules_to_save=[{shortened(head)}] trains and saves {trained:,} of the {whole:,} parameters of "
            f"{type(model).__name__} ({trained / whole:.0%}) beside the adapter. If a pre-trained decoder or language "
            "model is among them, name the layers of the task alone.",
            stacklevel=2,
        )


def _refuse_quantised(model: nn.Module, head: list[str]) -> None:
    """Refuse a head that is quantised, since it is trained. The frozen encoder may be quantised."""
    for path in head:
        for name, parameter in original(model.get_submodule(path)).named_parameters():
            # torchao's tensors report a floating-point dtype.
            if not parameter.dtype.is_floating_point or type(parameter).__module__.startswith("torchao"):
                raise ValueError(
                    f"{join(path, name)!r} is quantised ({type(parameter).__name__}, {parameter.dtype}), and the head "
                    "is trained. Quantise the encoder alone: pass BitsAndBytesConfig("
                    f"llm_int8_skip_modules={brief(head)}), or call torchao's quantize_ on the model's base_model."
                )


def _head(model: nn.Module, encoder: Encoder) -> list[str]:
    return find_head(model, encoder.backbone_path, lambda module: family(type(module)) is not None)


def _head_in_silence(model: nn.Module, encoder: Encoder) -> list[str]:
    """The same without warnings about parameters of a head that the user did not ask for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _head(model, encoder)


def _has(layer: nn.Module, part: str) -> bool:
    try:
        layer.get_submodule(part)
    except AttributeError:
        return False
    return True


def _generates(model: nn.Module) -> bool:
    """Whether what follows the encoder is a pre-trained decoder or language model rather than a task's head."""
    generates = isinstance(model, PreTrainedModel) and (model.can_generate() or hasattr(model, "generate_speech"))
    return generates and head_input(type(model)) is None


def _check_family(plan: Plan) -> None:
    """Refuse adapters that have no sound place in the encoder's family."""
    config, row = plan.config, plan.encoder.family
    stack = type(plan.encoder.stack).__name__
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
            "beside the frames, and have no place among them. Leave p_position at 'append'."
        )
    factor = 1
    if row.squeeze:
        _, _, name = row.squeeze.rpartition(".")
        factor = getattr(plan.encoder.backbone.config, name)
    length = factor if config.p_length is None else config.p_length
    if length % factor:
        raise ValueError(
            f"{stack} takes {factor} frames as one, so p_length has to be a multiple of {factor}, got "
            f"{length}. Write p_length={max(length // factor, 1) * factor}."
        )
    config.p_length = length


def _exclude(plan: Plan, excluded: list[str] | str, model_name: str) -> None:
    """Leave out the sites that `exclude_modules` names.

    Raises:
        ValueError: A string is not a regular expression, or one that takes too long.
    """
    sites = {site: plan.encoder.layer_path(*site) for site in plan.e_sites + plan.norm_sites}
    if isinstance(excluded, str):
        try:
            # The standard library's `re` has no time limit.
            pattern = regex.compile(excluded)
            left_out = {site for site, path in sites.items() if pattern.fullmatch(path, timeout=SECONDS_A_MATCH)}
        except regex.error as error:
            raise ValueError(
                f"exclude_modules={brief(excluded)} is not a regular expression: {error}. Write a list of paths, or "
                r"an expression such as r'.*layers\.0\..*'."
            ) from error
        except TimeoutError as error:
            raise ValueError(
                f"exclude_modules={brief(excluded)} takes too long to match. Write a list of paths, or a simpler "
                "regular expression."
            ) from error
    else:
        left_out = {
            site for site, path in sites.items() if any(f".{path}".endswith(f".{ending}") for ending in excluded)
        }
    plan.e_sites = [site for site in plan.e_sites if site not in left_out]
    plan.norm_sites = [site for site in plan.norm_sites if site not in left_out]
    if not left_out:
        warnings.warn(
            f"exclude_modules={brief(excluded)} excludes nothing in {model_name}. Its E-adapters and trained layer "
            f"norms are at paths like {plan.encoder.layer_path(0, plan.encoder.family.feed_forward[0])!r}.",
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


def was_loaded(parameter: nn.Parameter) -> bool:
    """Whether Transformers has loaded a parameter. It marks those, and a deep copy has no marks."""
    return getattr(parameter, "_is_hf_initialized", False)


def _is_new(model: nn.Module, path: str, config: ELPConfig) -> bool:
    """Whether the head's layer at `path` is newly initialised, so that nothing is lost if it is re-made."""
    if remade_modules(model, [path], config.head_config):
        return True
    layer = original(model.get_submodule(path))
    if any(was_loaded(parameter) for parameter in model.parameters()):
        return not any(was_loaded(parameter) for parameter in layer.parameters())
    return not getattr(getattr(model, "config", None), "name_or_path", "")


def _head_input_path(model: nn.Module, plan: Plan) -> tuple[str | None, str]:
    """The head's first linear layer, if it reads the encoder and is trained, or else the reason why not."""
    encoder = plan.encoder
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
    if path not in (plan.config.modules_to_save or ()):
        return None, f"modules_to_save does not hold its first layer {path!r}"
    return path, ""
