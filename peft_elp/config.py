"""ELPConfig: every choice a user has, with its default, range and help."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

import numpy as np
from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME

from .adapters import ACTIVATIONS
from .heads import HEAD_SETTINGS
from .published import SETTINGS
from .saved.weights import SavedTensor, find_weights, open_tensors
from .wording import brief

LETTERS = "ELP"
E_PLACES = ("feed_forward", "attention")
L_OUTPUTS = ("head", "project", "residual")
P_POSITIONS = ("append", "prepend")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Far above any useful size. Without these limits, a configuration from the Hub could ask for any amount of memory.
LARGEST_SIZE, MOST_OUTPUTS = 2**14, 2**20

# The `role` in the metadata of a field says what the field decides. "computation", the default: what an adapter
# computes, or the shapes of its tensors. "selection": which modules have tensors, as the tensor names also show.
# "training": only the start of training and its dropout. "use": nothing in the model.
ROLES = ("computation", "selection", "training", "use")
SELECTION, TRAINING, USE = ({"role": role} for role in ROLES[1:])

Config = TypeVar("Config", bound=PeftConfig)


def _with_help(cls: type[Config]) -> type[Config]:
    """Put the text of each argument in the docstring into the metadata of its field, as "help"."""
    arguments = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    helps = dict(re.findall(r"^    (\w+): (.*(?:\n     .*)*)", arguments, re.MULTILINE))
    for one in fields(cls):
        if one.name in helps:
            one.metadata = {**one.metadata, "help": " ".join(helps[one.name].split())}  # pyright: ignore[reportAttributeAccessIssue]
    return cls


@_with_help
@dataclass
class ELPConfig(PeftConfig):
    """Configuration of ELP-adapters ([arXiv:2407.21066](https://arxiv.org/abs/2407.21066)).

    The defaults adapt any supported speech encoder with E-, L- and P-adapters and train the model's head with them.
    If a field is None, the model decides. The decision is written into the saved `adapter_config.json`.

    Args:
        adapters: Any non-empty subset of the letters E, L and P: which adapters are placed and trained.
        e_dim: Width of the E-adapters' bottleneck, at least 1. None: a third of the encoder's width, which is 256 of
            768 as in the paper.
        e_activation: Activation of the E-adapters: gelu, leaky_relu, mish, relu, sigmoid, silu, tanh.
        e_dropout: Dropout in the E-adapters' bottleneck, in [0, 1).
        e_layers: 0-based layers that get E-adapters. None: all but the last together with an L-adapter, else all.
        e_after: Where in a layer E-adapters sit: 'feed_forward', 'attention' or both.
        l_dim: Width of the L-adapter's taps. None: two thirds of the encoder's width, which is 512 of 768 as in the
            paper. 0: the taps have no matrix; each is its layer's output, normalised per frame without parameters, and
            only the layer weights are trained.
        l_activation: Activation of the L-adapter: gelu, leaky_relu, mish, relu, sigmoid, silu, tanh.
        l_dropout: Dropout in the L-adapter's taps, in [0, 1).
        l_layers: 0-based layers that the L-adapter taps. None: all.
        l_input_norm: Whether each tap normalises its input, frame by frame and without parameters. None: in pre-norm
            encoders, whose layers return the bare residual sum; not in post-norm ones (the paper's).
        l_output: Where the L-adapter's sum goes. 'head': to the head, whose first linear layer is re-made at width
            l_dim (the paper). 'project': through one linear layer back to the encoder's width. 'residual': as
            'project', zero-initialised and added to the encoder's own output, which a fresh adapter does not change.
            None: 'head' where a known head that is trained and newly initialised reads the encoder, else 'residual'.
        p_length: Number of pseudo features of the P-adapter. None: as few as the encoder takes, mostly 1.
        p_position: 'append' puts the pseudo features after each utterance's last valid frame, 'prepend' before its
            first.
        p_init_std: Standard deviation of the pseudo features at the start, at least 0. The default changes almost
            nothing; a few thousandths and more derail a pre-norm encoder until they are trained.
        train_layer_norms: Whether the layer norms of each layer with an E- or L-adapter are trained, as copies that
            belong to the adapter. With L alone, False spares the backward pass through the backbone.
        init_weights: How E- and L-adapters start. True: E with PyTorch's initialisation and a norm with gain 0, which
            makes it exactly the identity, and the taps of L from N(0, init_std^2). 'paper': both from
            N(0, init_std^2). False: both with PyTorch's initialisation.
        init_std: Standard deviation of the linear weights that start from a normal distribution.
        modules_to_save: Modules trained whole and saved with the adapter. None: every module of the model outside its
            base encoder (the head), but no decoder or language model. A list: exactly that; full paths, or endings of
            paths as elsewhere in PEFT.
        head_config: Settings of the adapter's head that differ from the model's, such as {"num_labels": 10}:
            num_labels, id2label, label2id, problem_type, classifier_proj_size, vocab_size, tdnn_dim, tdnn_kernel,
            tdnn_dilation, xvector_output_dim. None: as in the model. They are saved with the adapter, which keeps its
            head in a model with another one.
        target: Which speech encoder, where the model holds several: its path in the model or the name of its class.
            None: the only one.
        exclude_modules: Modules inside the encoder layers that get neither an E-adapter nor a trained layer norm: a
            regular expression for the whole path, or a list of paths or path endings.
        chunk_length: Whole seconds to which the encoder's fixed window is cut while the adapter is active, such as 2
            of Whisper's 30, for classification and speaker verification. The feature extractor has to pad to the same
            length. None: the whole window.
        pool_own_frames: Whether a head that averages over a fixed window, as WhisperForAudioClassification does,
            averages over a recording's own frames instead, by the attention_mask of the feature extractor. None:
            where there is such a head.
        verification_threshold: For speaker verification, the cosine score in [-1, 1) from which two voices count as
            the same. It changes nothing in the model. None: not known.
        window_s: The name of `chunk_length` in older files.
        config_format: In older files, whose heads averaged over the whole window.

    Raises:
        ValueError: A value is out of its range. The message names the value, the range and the remedy.

    Examples:
        >>> config = ELPConfig(adapters="EL", e_dim=64)
        >>> config.e_after
        ('feed_forward',)
    """

    adapters: str = "ELP"
    e_dim: int | None = None
    e_activation: str = "gelu"
    e_dropout: float = field(default=0.0, metadata=TRAINING)
    e_layers: list[int] | None = None
    e_after: Sequence[str] | str = ("feed_forward",)
    l_dim: int | None = None
    l_activation: str = "gelu"
    l_dropout: float = field(default=0.0, metadata=TRAINING)
    l_layers: list[int] | None = None
    l_input_norm: bool | None = None
    l_output: str | None = None
    p_length: int | None = None
    p_position: str = "append"
    p_init_std: float = field(default=1e-4, metadata=TRAINING)
    train_layer_norms: bool = True
    init_weights: bool | str = field(default=True, metadata=TRAINING)
    init_std: float = field(default=1e-3, metadata=TRAINING)
    modules_to_save: list[str] | None = field(default=None, metadata=SELECTION)
    head_config: dict[str, Any] | None = None
    target: str | None = field(default=None, metadata=SELECTION)
    exclude_modules: list[str] | str | None = field(default=None, metadata=SELECTION)
    chunk_length: int | None = None
    pool_own_frames: bool | None = None
    verification_threshold: float | None = field(default=None, metadata=USE)
    window_s: InitVar[int | None] = None
    config_format: InitVar[int | None] = None

    # `describe` sets this on one configuration; it is for the card alone.
    description: ClassVar[Any] = None
    # from_pretrained sets this on one configuration: a copy of it as it was read, and the tensors beside it.
    as_read: ClassVar[tuple[ELPConfig, dict[str, SavedTensor]] | None] = None
    # Called with the folder and the configuration when PEFT has saved an adapter.
    after_save: ClassVar[Callable[[str, ELPConfig], None] | None] = None

    def __post_init__(self, window_s: int | None, config_format: int | None) -> None:
        super().__post_init__()
        self.peft_type = PeftType("ELP")
        self.chunk_length = window_s if self.chunk_length is None else self.chunk_length
        self.adapters = _letters(self.adapters)
        self.e_after = _places(self.e_after)
        self.e_layers = _layers("e_layers", self.e_layers)
        self.l_layers = _layers("l_layers", self.l_layers)
        for name, least in (("e_dim", 1), ("l_dim", 0), ("p_length", 1), ("chunk_length", 1)):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least, LARGEST_SIZE)
        for name in ("e_activation", "l_activation"):
            _one_of(name, getattr(self, name), sorted(ACTIVATIONS))
        for name, below in (("e_dropout", 1.0), ("l_dropout", 1.0), ("p_init_std", math.inf), ("init_std", math.inf)):
            _number(name, getattr(self, name), 0.0, below)
        _one_of("init_weights", self.init_weights, (True, False, "paper"))
        for name in ("l_input_norm", "pool_own_frames"):
            _one_of(name, getattr(self, name), (None, False, True))
        if config_format is not None and self.pool_own_frames is None:
            self.pool_own_frames = False  # An older file: the head averaged over the window.
        _one_of("l_output", self.l_output, (None, *L_OUTPUTS))
        _one_of("p_position", self.p_position, P_POSITIONS)
        if self.verification_threshold is not None:
            _number("verification_threshold", self.verification_threshold, -1.0, 1.0)
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                f"modules_to_save must be a list of module names or None, got the string {self.modules_to_save!r}. "
                f"Write modules_to_save=[{self.modules_to_save!r}]."
            )
        if self.exclude_modules is not None and not isinstance(self.exclude_modules, str):
            self.exclude_modules = sorted(self.exclude_modules)
        self.head_config = None if self.head_config is None else _head_config(self.head_config)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration. If that fails, the configuration that was in the folder stays there."""
        os.makedirs(save_directory, exist_ok=True)
        with TemporaryDirectory(prefix=".saving-", dir=save_directory) as beside:
            super().save_pretrained(beside, **kwargs)
            os.replace(Path(beside, CONFIG_NAME), Path(save_directory, CONFIG_NAME))
        # PeftModel.save_pretrained passes this argument, when the weights have been written.
        if "auto_mapping_dict" in kwargs and self.after_save is not None:
            self.after_save(save_directory, self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Load the configuration of a saved adapter, and check that its weights are there and complete.

        PEFT downloads the weights after it has placed the adapter in the model, and leaves the untrained adapter there
        if the download fails. This method therefore downloads and checks them first; PEFT finds them in the cache.

        Args:
            pretrained_model_name_or_path: A folder, which may hold a configuration alone if it was saved alone, or a
                repository on the Hub.
            subfolder: The folder inside of it.
            **kwargs: What `huggingface_hub.hf_hub_download` takes, such as `token` and `revision`.

        Raises:
            ValueError: The configuration or the weights are missing, or the weights are broken.
            OSError: The download failed. Other errors of the Hub are passed on as they are.
        """
        config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub_options, *_ = cls._split_kwargs(kwargs)
        path = find_weights(pretrained_model_name_or_path, subfolder, **hub_options)
        adapter = str(Path(pretrained_model_name_or_path, subfolder or ""))
        if path is not None:
            tensors = open_tensors(path, adapter).items()
            config.as_read = copy(config), {name: SavedTensor.of(tensor) for name, tensor in tensors}
        elif config.inference_mode:  # PEFT sets it when it saves weights, and leaves it out for a configuration alone.
            raise ValueError(f"{adapter!r} holds {CONFIG_NAME} but no weights. Save the adapter again.")
        return config

    def tensors_to_load(self) -> dict[str, SavedTensor] | None:
        """Return what is known of each tensor saved with this configuration, by name.

        None if there are none, or if the configuration was changed after it was read, for a new adapter.
        """
        if self.as_read is None or differing_fields(self, self.as_read[0], "computation", "selection"):
            return None
        return self.as_read[1]

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ELPConfig:
        """Return the configuration of a published setting.

        Args:
            name: "e+l": the proposal of [arXiv:2212.02780](https://arxiv.org/abs/2212.02780), E after the feed-forward
                module of all layers but the last, and L. "conventional": what it compares with, E after attention and
                feed-forward in all layers. "e-only": E in all layers. "l-only": L, with trained layer norms (which the
                published count of its parameters leaves out). "paper", also "e+l+p": all three adapters, as in
                [arXiv:2407.21066](https://arxiv.org/abs/2407.21066), with 16 pseudo features, which is our choice.
            overrides: Fields to set differently. The published code has `e_activation="relu", l_activation="relu"` for
                speaker verification and emotion recognition.

        Raises:
            ValueError: The name is unknown, or the value of a field is out of its range.

        Examples:
            >>> ELPConfig.preset("conventional").e_after
            ('feed_forward', 'attention')
        """
        _one_of("The name of a preset", name, list(SETTINGS))
        return cls(**{**SETTINGS[name], **overrides})


def differing_fields(one: ELPConfig, other: ELPConfig, *roles: str) -> dict[str, tuple[Any, Any]]:
    """Return the fields of some of the `ROLES` that differ in two configurations, with both values.

    Examples:
        >>> differing_fields(ELPConfig(e_dim=8, e_dropout=0.1), ELPConfig(), "computation")
        {'e_dim': (8, None)}
    """
    own = fields(ELPConfig)[len(fields(PeftConfig)) :]
    compared = [field.name for field in own if field.metadata.get("role", "computation") in roles]
    values = {name: (getattr(one, name), getattr(other, name)) for name in compared}
    return {name: (value, another) for name, (value, another) in values.items() if value != another}


def plain_settings(value: Any) -> Any:
    """Replace tuples by lists and NumPy's numbers by Python's, as JSON takes them.

    Examples:
        >>> plain_settings({"id2label": {np.int64(0): np.str_("no")}, "tdnn_dim": (8, 8)})
        {'id2label': {0: 'no'}, 'tdnn_dim': [8, 8]}
    """
    if isinstance(value, dict):
        return {plain_settings(key): plain_settings(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_settings(entry) for entry in value]
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _head_config(value: Any) -> dict[str, Any]:
    unknown = sorted(map(str, set(value) - set(HEAD_SETTINGS))) if isinstance(value, dict) else value
    if not isinstance(value, dict) or unknown:
        raise ValueError(
            f"head_config must be a dictionary of settings of a head, got {brief(unknown)}. The settings are "
            f"{', '.join(HEAD_SETTINGS)}, as in head_config={{'num_labels': 10}}."
        )
    settings = plain_settings(value)
    if settings.get("id2label") is not None:
        settings["id2label"] = _labels(settings["id2label"])
        settings["label2id"] = {label: number for number, label in settings["id2label"].items()}
        settings["num_labels"] = len(settings["id2label"])
    if settings.get("problem_type") is not None:
        _one_of("problem_type in head_config", settings["problem_type"], PROBLEM_TYPES)
    for name, setting in settings.items():
        if name not in ("id2label", "label2id", "problem_type"):
            for size in setting if isinstance(setting, list) and name.startswith("tdnn_") else [setting]:
                _whole(f"{name} in head_config", size, 1, MOST_OUTPUTS)
    return {name: settings[name] for name in HEAD_SETTINGS if name in settings}


def _labels(value: Any) -> dict[int, str]:
    try:
        labels = {int(number): label for number, label in value.items()}  # JSON makes strings of the numbers.
    except (AttributeError, TypeError, ValueError):
        labels = {}
    without_gap = sorted(labels) == list(range(len(labels)))
    if not labels or not without_gap or not all(isinstance(label, (str, int)) for label in labels.values()):
        raise ValueError(
            f"id2label in head_config must map 0, 1, ... to labels, got {brief(value)}. Write for example "
            "head_config={'id2label': dict(enumerate(['no', 'yes']))}."
        )
    return labels


def _letters(value: Any) -> str:
    letters = value if isinstance(value, str) else ""
    if not letters or set(letters) - set(LETTERS) or len(set(letters)) < len(letters):
        wanted = "".join(letter for letter in LETTERS if letter in letters.upper())
        raise ValueError(
            f"adapters must be a non-empty subset of the letters E, L and P, each at most once, got {brief(value)}. "
            f"Write adapters={wanted or LETTERS!r}."
        )
    return "".join(letter for letter in LETTERS if letter in letters)


def _places(value: Any) -> tuple[str, ...]:
    places = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not places or set(places) - set(E_PLACES) or len(set(places)) < len(places):
        raise ValueError(
            f"e_after must be 'feed_forward', 'attention' or both, each at most once, got {brief(value)}. "
            "Write for example e_after=('feed_forward',)."
        )
    return tuple(place for place in E_PLACES if place in places)


def _layers(name: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    layers = list(value) if isinstance(value, Iterable) else [value]
    if any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in layers):
        raise ValueError(
            f"{name} must hold integers, counted from 0, got {brief(value)}. Write for example {name}=[0, 1]."
        )
    if len(set(layers)) < len(layers):
        raise ValueError(f"{name} must not name a layer twice, got {brief(value)}.")
    if not layers:
        raise ValueError(f"{name} must not be empty. Leave it at None, or drop {name[0].upper()} from adapters.")
    return sorted(layers)


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}, got {brief(value)}.")


def _number(name: str, value: Any, least: float, below: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < below:
        upper = "finite" if below == math.inf else f"less than {below:g}"
        raise ValueError(f"{name} must be at least {least:g} and {upper}, got {brief(value)}.")


def _one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {brief(value)}.")
