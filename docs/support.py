"""Write the page of supported models from what the code does with each of them: `python docs/support.py`.

The script walks the auto classes of Transformers. It builds every model whose forward takes audio, with few layers and
without memory for the weights, and places adapters in it. A test compares the result with `docs/reference/support.md`.
"""

import functools
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from peft_elp import ELPConfig, find_encoder
from peft_elp.backbones import BACKBONES, REFUSED, Backbone

HERE = Path(__file__).parent
PAGE = HERE / "reference" / "support.md"
AUDIO = re.compile(
    r"input_features|input_values|audio"
)  # how inputs of a forward are named that take audio
DEPTH = re.compile(
    r"(num|n)_(hidden_)?(layers|blocks)|(encoder|decoder)_layers|\w*num(_local)?_experts"
)
# What the default configuration of a family lacks: the audio tower, a size.
OPTIONS: dict[str, dict[str, Any]] = {
    "embedding_gemma2": {"audio_config": {"model_type": "gemma4_audio"}},
    "gemma4": {"audio_config": {}},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron_h_omni": {
        "audio_config": {
            "model_type": "parakeet_encoder",
            "projection_hidden_size": 64,
            "projection_bias": False,
        }
    },
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}
PASSED_ON = (
    "Qwen3ASRForTokenClassification",
)  # its forward hands audio on as one of its **kwargs
# Models that tests/test_larger_models.py trains.
TRAINED = {
    "Qwen2AudioForConditionalGeneration",
    "SpeechEncoderDecoderModel",
    "SpeechT5ForSpeechToSpeech",
}
BEFORE = """---
hide: [toc]
---

# Supported encoders

Written by `python docs/support.py` from what the code does, for Transformers {version}. An encoder is found by the
class of the stack that runs its layers, wherever in a model it sits.

- **E** goes into every layer, by default after each of its feed-forward modules. `e_after` and `exclude_modules`
  choose.
- **L**: "any" output mode, or "project/residual" where the stack pools or up-samples after its layers, so that the sum
  of taps has to keep their width. There the last tap is read before the stack's final norm, elsewhere after it.
- **P**: "joined" to the stack's input, or "carried" through the layers beside the frames, where the front end sits
  inside the stack.

| stack | model | E | L | P |
|---|---|---|---|---|
"""
MODELS = """
## Models

Every model of Transformers' auto classes that takes audio, and what has been run of it:

- **tested**: a tiny one is trained, saved, loaded and compared in the project's tests.
- **placed**: the script placed the adapters in a small one without computing anything. The tests run its stack inside
  another model.
- **not built**: the script could not build it.

The head is what `modules_to_save=None` trains beside the adapters. A bare model, and one that generates, has none:
what follows its encoder is pre-trained and stays frozen.

| model | stack | head | run |
|---|---|---|---|
"""
AFTER = """
Models outside of Transformers come in through [`register_backbone`](../how-to/new-encoder.md).

## Refused

The error gives the reason.

"""


@dataclass(frozen=True)
class Outcome:
    """What became of one class of models.

    Args:
        name: The class.
        stack: The class of the encoder stack that got the adapters; empty if there is none.
        head: The modules that train beside the adapters.
        share: How much of the model they are.
        unbuilt: Why the model could not be built.
        reason: Why the model is refused.
    """

    name: str
    stack: str = ""
    head: tuple[str, ...] = ()
    share: float = 0.0
    unbuilt: str = ""
    reason: str = ""


def modules_of_transformers() -> dict[str, str]:
    """The module in which each class of a model is defined, by the name of the class."""
    root = Path(transformers.__file__).parent / "models"
    found: dict[str, str] = {}
    for file in sorted(root.glob("*/modeling_*.py")):
        name = f"transformers.models.{file.parent.name}.{file.stem}"
        found |= dict.fromkeys(
            re.findall(r"^class (\w+)", file.read_text(), flags=re.MULTILINE),
            name,
        )
    return found


def audio_models() -> list[type[PreTrainedModel]]:
    """The classes that the auto classes know, and those beside a known stack, whose forward takes audio."""
    names = set(PASSED_ON)
    for mapping in (
        getattr(modeling_auto, name)
        for name in dir(modeling_auto)
        if name.endswith("_NAMES")
    ):
        for value in mapping.values():
            names |= {value} if isinstance(value, str) else set(value)
    modules = modules_of_transformers()
    for stack in BACKBONES.keys() & modules.keys():
        names |= set(importlib.import_module(modules[stack]).__all__)
    classes = (getattr(transformers, name, None) for name in sorted(names))
    return [
        cls
        for cls in classes
        if isinstance(cls, type)
        and issubclass(cls, PreTrainedModel)
        and _hears(cls)
    ]


def _hears(cls: type[PreTrainedModel]) -> bool:
    if "PreTrainedModel" in cls.__name__:
        return False
    if cls.forward is nn.Module.forward:  # a model that only generates
        return "audio" in (cls.input_modalities or ())
    inputs = inspect.signature(cls.forward).parameters
    return cls.__name__ in PASSED_ON or any(
        AUDIO.search(name) for name in inputs
    )


def _shallow(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with two layers wherever it counts layers."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _shallow(value)
        elif DEPTH.fullmatch(name) and isinstance(value, int) and value > 2:
            setattr(config, name, 2)
    return config


def small(cls: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of the class without memory for its weights, with two layers if its configuration allows that."""
    config_class: Any = cls.config_class
    options = OPTIONS.get(config_class.model_type, {})
    if cls is transformers.SpeechEncoderDecoderModel:
        decoder = transformers.BertConfig(
            num_hidden_layers=2, is_decoder=True, add_cross_attention=True
        )
        config = config_class.from_encoder_decoder_configs(
            _shallow(transformers.Wav2Vec2Config()), decoder
        )
        with torch.device("meta"):
            return cls(config)
    try:
        with torch.device("meta"):
            return cls(_shallow(config_class(**options)))
    except (
        ValueError,
        AttributeError,
    ):  # another setting holds the number of layers too
        with torch.device("meta"):
            return cls(config_class(**options))


def outcome(cls: type[PreTrainedModel]) -> Outcome:
    """Build a model of the class and place adapters in it."""
    try:
        model = small(cls)
    except ImportError as error:
        needed = re.search(r"requires the (\w+) library", str(error))
        return Outcome(
            cls.__name__,
            unbuilt=f"it needs {needed[1] if needed else 'another package'}",
        )
    except AttributeError as error:
        return Outcome(
            cls.__name__,
            unbuilt=f"its default configuration is incomplete ({error})",
        )
    modules, whole = dict(model.named_modules()), _size(model)
    try:
        encoder = find_encoder(model)
        row = encoder.family
        letters = "E" + ("" if row.no_l else "L") + ("" if row.no_p else "P")
        config = get_peft_model(model, ELPConfig(adapters=letters)).peft_config[
            "default"
        ]
    except ValueError:
        reasons = (
            REFUSED.get(type(module).__name__) for module in model.modules()
        )
        return Outcome(cls.__name__, reason=next(filter(None, reasons), ""))
    assert isinstance(config, ELPConfig)
    head = tuple(config.modules_to_save or ())
    share = sum(_size(modules[path]) for path in head) / whole
    return Outcome(cls.__name__, type(encoder.stack).__name__, head, share)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@functools.cache
def outcomes() -> list[Outcome]:
    """What becomes of every model that takes audio."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [outcome(cls) for cls in audio_models()]


def tested() -> set[str]:
    """The classes of which the tests train a tiny model."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    backbones, families = (
        importlib.import_module("backbones"),
        importlib.import_module("families"),
    )
    line = {
        start + head
        for start in backbones.FAMILIES.values()
        for head in backbones.HEADS
    }
    return (
        TRAINED
        | line
        | {
            type(family.model()).__name__
            for family in families.FAMILIES.values()
            if family.available
        }
    )


def stack_row(stack: str, backbone: Backbone, module_name: str) -> str:
    """One line of the table of stacks."""
    cells = [
        f"`{stack}`",
        module_name.split(".")[2],
        " and ".join(f"`{part}`" for part in backbone.feed_forward),
        f"no: {backbone.no_l}"
        if backbone.no_l
        else "any"
        if backbone.taps_end == "stack"
        else "project/residual",
        f"no: {backbone.no_p}"
        if backbone.no_p
        else "carried"
        if backbone.front_end_inside
        else "joined",
    ]
    return f"| {' | '.join(cells)} |"


def model_rows() -> Iterator[str]:
    """The lines of the table of models."""
    known = tested()
    for found in outcomes():
        if not found.stack and not found.unbuilt:
            continue
        run = (
            "tested"
            if found.name in known
            else "placed"
            if found.stack
            else f"not built: {found.unbuilt}"
        )
        paths = dict.fromkeys(
            re.sub(r"\.\d+$", ".*", path) for path in found.head
        )
        head = ", ".join(f"`{path}`" for path in paths)
        yield f"| `{found.name}` | {found.stack and f'`{found.stack}`'} | {head} | {run} |"


def refused_rows() -> Iterator[str]:
    """The lines about what is refused: the models, then the parts of models by which the code tells them."""
    models: dict[str, list[str]] = {}
    for found in outcomes():
        if not found.stack and not found.unbuilt:
            models.setdefault(found.reason, []).append(found.name)
    for name, reason in REFUSED.items():
        if name not in models.setdefault(reason, []):
            models[reason].append(name)
    for reason, names in sorted(models.items(), key=lambda item: item[1]):
        yield f"- {', '.join(f'`{name}`' for name in names)}: {reason}."


def page() -> str:
    """The whole page."""
    modules = modules_of_transformers()
    stacks = [
        stack_row(stack, row, modules[stack])
        for stack, row in BACKBONES.items()
        if stack in modules
    ]
    before = BEFORE.format(version=transformers.__version__)
    return (
        "\n".join(
            [
                before + "\n".join(stacks),
                MODELS + "\n".join(model_rows()),
                AFTER + "\n".join(refused_rows()),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page())
