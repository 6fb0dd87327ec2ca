"""Find the speech encoder in a model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from torch import nn
from transformers import PreTrainedModel

from peft_elp.backbones import BACKBONES, Backbone, family, refusal
from peft_elp.wording import brief, shortened

from .paths import canonical, join, original
from .wrapper import Wrapper


@dataclass
class Encoder:
    """The speech encoder of one model: where it is and what it consists of, without ELP's wrappers."""

    backbone: nn.Module  # the encoder as a whole: the nearest Transformers model around the stack, or the stack itself
    backbone_path: str  # in the model
    stack: nn.Module
    stack_path: str
    family: Backbone  # its row in the table of backbones
    layers: list[nn.Module]
    hidden_size: int

    def layer_path(self, layer: int, part: str = "") -> str:
        """Return the path of an encoder layer in the model, or of a module inside that layer."""
        return join(self.stack_path, self.family.layers, str(layer), part)


def find_encoder(model: nn.Module, target: str | None = None) -> Encoder:
    """Find the speech encoder in a model.

    Args:
        model: The whole model.
        target: Path or class name of the encoder stack. Needed only if the model contains several.

    Raises:
        ValueError: The model contains no encoder that ELP knows, or several and `target` names none of them.

    Examples:
        >>> from transformers import WavLMConfig, WavLMForCTC
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
        >>> find_encoder(WavLMForCTC(WavLMConfig(**size))).stack_path
        'wavlm.encoder'
    """
    modules = _modules(model)
    rows = {path: family(type(module)) for path, module in modules.items()}
    stacks = {path: row for path, row in rows.items() if row is not None and _is_in_place(modules, path, row)}
    if target is not None:
        named = {path: row for path, row in stacks.items() if target in (path, type(modules[path]).__name__)}
        if not named:
            raise ValueError(
                f"target={brief(target)} does not name a speech encoder of {type(model).__name__}, which has "
                f"{_named(modules, stacks) or 'none'}. Use the path or class of one of them."
            )
        stacks = named
    if not stacks:
        raise ValueError(f"{type(model).__name__} contains no speech encoder that ELP can adapt{_why_none(model)}")
    if len(stacks) > 1:
        raise ValueError(
            f"{type(model).__name__} contains several speech encoders: {_named(modules, stacks)}. ELP adapts one of "
            "them: choose it with ELPConfig(target=<its path>)."
        )
    (path,) = stacks
    return _described(model, modules, path)


def encoder_of(model: nn.Module, stack: nn.Module) -> Encoder:
    """Return the encoder with a given stack, however many encoders of the same class the model contains.

    Raises:
        ValueError: The stack is not a part of the model, or not an encoder stack that ELP knows.
    """
    path = next((canonical(name) for name, module in model.named_modules() if module is stack), None)
    modules = _modules(model)
    if path is None or family(type(modules[path])) is None:
        raise ValueError(f"{type(stack).__name__} is not an encoder stack of this {type(model).__name__}.")
    return _described(model, modules, path)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by the path that they have without wrappers; a wrapped module stands for its wrapper."""
    return {canonical(name): module for name, module in model.named_modules()}


def _described(model: nn.Module, modules: dict[str, nn.Module], stack_path: str) -> Encoder:
    """Return the encoder whose stack is at a path, if ELP can adapt it and the table describes it correctly."""
    stack = modules[stack_path]
    row = family(type(stack))
    assert row is not None
    for path, module in modules.items():
        reason = refusal(type(module))
        if reason and (not path or f"{stack_path}.".startswith(f"{path}.")):
            raise ValueError(f"ELP cannot adapt {type(module).__name__}: {reason}. Adapt the plain encoder.")
    backbone, backbone_path = (stack, stack_path) if row.front_end_inside else _backbone(model, stack_path)
    try:
        layers = stack.get_submodule(row.layers)
        if not isinstance(layers, nn.ModuleList):
            raise TypeError(f"{row.layers!r} is a {type(layers).__name__}, not a list of layers")
        plain = [layer.base_layer if isinstance(layer, Wrapper) else layer for layer in layers]
        for holder, attribute in ((stack, row.layerdrop), (backbone, row.feature_encoder)):
            if attribute:
                attrgetter(attribute)(holder)
        width = next(plain[0].get_submodule(row.norms[0]).parameters())
    except (AttributeError, TypeError, IndexError, StopIteration) as error:
        raise ValueError(
            f"The description of {type(stack).__name__} does not fit this model: {error}. It says layers="
            f"{row.layers!r}, norms={row.norms}, layerdrop={row.layerdrop!r}, "
            f"feature_encoder={row.feature_encoder!r}. Update transformers, or correct the register_backbone call."
        ) from error
    if width.numel() == 0:
        raise ValueError(
            f"The weights of {type(model).__name__} are already partitioned (DeepSpeed ZeRO-3). Set zero3_init_flag "
            "to false in Accelerate's configuration, or place the adapters before the model is partitioned."
        )
    return Encoder(backbone, backbone_path, stack, stack_path, row, plain, width.shape[0])


def _backbone(model: nn.Module, stack_path: str) -> tuple[nn.Module, str]:
    backbone, backbone_path = model, ""
    here, path = model, ""
    for step in stack_path.split(".") if stack_path else ():
        if isinstance(here, PreTrainedModel):
            backbone, backbone_path = here, path
        here, path = original(getattr(here, step)), join(path, step)
    return backbone, backbone_path


def _is_in_place(modules: dict[str, nn.Module], path: str, row: Backbone) -> bool:
    """Whether the stack at `path` encodes speech and the model's loss reaches it; its class alone may not tell."""
    steps = path.split(".") if path else []
    around = [type(modules.get(".".join(steps[:depth]))).__name__ for depth in range(len(steps))]
    return (row.inside is None or row.inside in around[-1:]) and row.unreached_in not in around


def _named(modules: dict[str, nn.Module], paths: Iterable[str]) -> str:
    return shortened(f"{path or 'the model itself'} ({type(modules[path]).__name__})" for path in paths)


def _why_none(model: nn.Module) -> str:
    """Return why a model has no known encoder, or how to describe its encoder: the end of an error."""
    for name, module in model.named_modules():
        reason = refusal(type(module))
        if reason:
            return f": {reason} (found at {name or 'the model itself'})."
    known = f". It knows these encoder stacks: {', '.join(sorted(BACKBONES))}"
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(layer) for layer in module}) == 1
    ]
    if not lists:
        return f"{known}. Load a model of such a family, for example with AutoModelForCTC.from_pretrained(...)."
    heard = [(name, layers) for name, layers in lists if re.search("audio|speech|acoustic", name.lower())]
    name, layers = max(heard or lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    stack_path, _, layers_name = name.rpartition(".")
    stack = model.get_submodule(stack_path)
    return (
        f"{known}. If {type(stack).__name__} encodes speech, describe it first; this is a guess at how:\n"
        f"    stack = model{f'.get_submodule({stack_path!r})' if stack_path else ''}\n"
        f"    peft_elp.register_backbone(type(stack), peft_elp.Backbone({_guess(stack, layers_name, layers[0])}))"
    )


def _guess(stack: nn.Module, layers_name: str, layer: nn.Module) -> str:
    """Return the arguments that may describe an unknown encoder stack, as code."""
    children = [child for child, _ in layer.named_children()]
    forward = [child for child in children if re.search(r"feed_?forward|ffn|mlp|fc2", child) and "norm" not in child]
    norms = [child for child in children if "norm" in child.lower()]
    holders = {"layerdrop": stack, "config.layerdrop": getattr(stack, "config", None)}
    layerdrop = next((path for path, holder in holders.items() if hasattr(holder, "layerdrop")), None)
    parts = [child for child, _ in stack.named_children()]
    found = {
        "layers": layers_name,
        "feed_forward": tuple(forward) or ("?",),
        "norms": tuple(norms) or ("?",),
        "layerdrop": layerdrop,
        "feature_encoder": None,
    }
    if _hears_features(type(stack)):
        found["front_end_inside"] = True
    if any("norm" in part for part in parts[parts.index(layers_name) + 1 :]):  # It normalises what the layers return.
        found["pre_norm"] = True
    return ", ".join(f"{name}={value!r}" for name, value in found.items())


def _hears_features(stack_class: type[nn.Module]) -> bool:
    """Whether a stack takes audio features or a waveform rather than hidden states, by the name of its first input."""
    inputs = list(inspect.signature(stack_class.forward).parameters)[1:2]
    return bool(inputs) and re.search(r"feature|input_values|audio|mel|spectrogram|wave", inputs[0]) is not None
