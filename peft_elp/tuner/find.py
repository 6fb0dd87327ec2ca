"""Find the speech encoder in a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from operator import attrgetter

from torch import nn
from transformers import PreTrainedModel

from peft_elp.backbones import BACKBONES, REFUSED, Backbone, family

from .head import original
from .layers import Wrapper
from .paths import canonical, join


@dataclass
class Encoder:
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


def find_encoder(model: nn.Module, target: str | None = None) -> Encoder:
    """Find the speech encoder in a model.

    Args:
        model: The whole model.
        target: Path or class of the encoder stack, where there are several.

    Raises:
        ValueError: There is none that ELP knows, or several without a choice.
    """
    modules = {canonical(name): module for name, module in model.named_modules()}
    stacks = {path: (module, row) for path, module in modules.items() if (row := family(type(module))) is not None}
    stacks = {path: (stack, row) for path, (stack, row) in stacks.items() if _is_fed_speech(modules, path, row)}
    if target is not None:
        named = {path: found for path, found in stacks.items() if target in (path, type(found[0]).__name__)}
        if not named:
            raise ValueError(
                f"target={target!r} names no speech encoder in {type(model).__name__}, which has "
                f"{_named(stacks) or 'none'}. Name one of them by its path or class."
            )
        stacks = named
    if not stacks:
        raise ValueError(f"{type(model).__name__} contains no speech encoder that ELP can adapt{_why_none(model)}")
    if len(stacks) > 1:
        raise ValueError(
            f"{type(model).__name__} contains several speech encoders: {_named(stacks)}. ELP adapts one: name it with "
            "ELPConfig(target=<path or class>)."
        )
    ((stack_path, (stack, row)),) = stacks.items()
    for path, module in modules.items():
        if type(module).__name__ in REFUSED and (not path or f"{stack_path}.".startswith(f"{path}.")):
            raise ValueError(
                f"ELP cannot adapt {type(module).__name__}: {REFUSED[type(module).__name__]}. Adapt the plain encoder."
            )
    encoder, encoder_path = model, ""
    here, path = model, ""
    for step in stack_path.split(".") if stack_path else ():
        if isinstance(here, PreTrainedModel):
            encoder, encoder_path = here, path
        here, path = original(getattr(here, step)), join(path, step)
    if row.front_end_inside:
        encoder, encoder_path = stack, stack_path
    try:
        layers = stack.get_submodule(row.layers)
        if not isinstance(layers, nn.ModuleList):
            raise TypeError(f"{row.layers!r} is a {type(layers).__name__}, no list of layers")
        plain = [layer.base_layer if isinstance(layer, Wrapper) else layer for layer in layers]
        for holder, attribute in ((stack, row.layerdrop), (encoder, row.feature_encoder)):
            if attribute:
                attrgetter(attribute)(holder)
        width = next(plain[0].get_submodule(row.norms[0]).parameters())
    except (AttributeError, TypeError, IndexError, StopIteration) as error:
        raise ValueError(
            f"{type(stack).__name__} is described as keeping its layers in {row.layers!r} with norms {row.norms} and "
            f"layerdrop={row.layerdrop!r}, and {type(encoder).__name__} as having feature_encoder="
            f"{row.feature_encoder!r}; that does not fit this model ({error}). Update transformers, or correct what "
            "register_backbone was told."
        ) from error
    if width.numel() == 0:
        raise ValueError(
            f"The weights of {type(model).__name__} are in parts on several processes already (DeepSpeed ZeRO-3), and "
            "adapters are built to the shapes of whole ones. Set zero3_init_flag to false in Accelerate's "
            "configuration, or place the adapters before the model is partitioned."
        )
    return Encoder(encoder, encoder_path, stack, stack_path, row, plain, width.shape[0])


def _is_fed_speech(modules: dict[str, nn.Module], path: str, row: Backbone) -> bool:
    """Whether the stack at `path` hears speech, where its class alone does not tell."""
    caller = modules.get(path.rpartition(".")[0]) if path else None
    return row.inside is None or type(caller).__name__ == row.inside


def _named(stacks: dict[str, tuple[nn.Module, Backbone]]) -> str:
    return ", ".join(f"{path or 'the model itself'} ({type(stack).__name__})" for path, (stack, _) in stacks.items())


def _why_none(model: nn.Module) -> str:
    """The end of the error about a model without a known encoder: the reason, or how to describe the encoder."""
    for name, module in model.named_modules():
        reason = REFUSED.get(type(module).__name__)
        if reason:
            return f": {reason} (found at {name or 'the model itself'})."
    known = f". It knows these encoder stacks: {', '.join(sorted(BACKBONES))}"
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(layer) for layer in module}) == 1
    ]
    if not lists:
        return f"{known}. Load the model of such a family, as with AutoModelForCTC.from_pretrained(...)."
    name, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    stack_path, _, layers_name = name.rpartition(".")
    children = [child for child, _ in layers[0].named_children()]
    forward = [child for child in children if re.search(r"feed_?forward|ffn|mlp|fc2", child) and "norm" not in child]
    norms = [child for child in children if "norm" in child.lower()]
    stack_class = type(model.get_submodule(stack_path)).__name__
    return (
        f"{known}. If {stack_class} hears speech, describe it first; this is a guess at how:\n"
        f"    peft_elp.register_backbone({stack_class!r}, peft_elp.Backbone(layers={layers_name!r}, "
        f"feed_forward={tuple(forward) or ('?',)}, norms={tuple(norms) or ('?',)}, layerdrop=None, "
        "feature_encoder=None))"
    )
