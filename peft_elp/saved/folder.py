"""What the folder of a saved adapter says without its base: settings, numbers of parameters, layer weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft.utils import CONFIG_NAME
from torch import Tensor

from peft_elp.config import ELPConfig
from peft_elp.heads import HeadRow, head_row
from peft_elp.parameters import CONTAINERS, PARTS, SETTINGS
from peft_elp.wording import brief, first_line, shortened

from .weights import find_weights, open_tensors

TOKENIZER = ("tokenizer_config.json", "vocab.json", "tokenizer.json")  # one of them is beside every tokenizer
LARGEST_CONFIG = 10_000_000  # bytes; the names of 100,000 labels take about 3,000,000
KINDS = {  # fields of PEFT's that are read here and that nothing else checks
    "base_model_name_or_path": str,
    "revision": str,
    "auto_mapping": dict,
    "peft_version": str,
    "modules_to_save": list,
}


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk."""

    folder: Path
    config: dict[str, Any]  # the fields of its `adapter_config.json`, checked
    counts: dict[str, int] = field(default_factory=dict)  # of parameters: E, L, P, layer norms, head
    layer_weights: list[tuple[int, float]] = field(default_factory=list)  # of each tapped layer: number, share

    @property
    def base(self) -> str | None:
        """The name of the base model: a Hub id or a path."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def model_class(self) -> str | None:
        """The name of the class of Transformers that the adapter was trained with, head included."""
        return (self.config.get("auto_mapping") or {}).get("base_model_class")

    @property
    def head(self) -> HeadRow | None:
        """What the head of that class has in common with others; None for a class without a known head."""
        return head_row(self.model_class)

    @property
    def task(self) -> str | None:
        """The adapter's task, as the Hub names it."""
        return self.head.task if self.head else None

    @property
    def num_labels(self) -> int | None:
        """How many labels the adapter's head has; None without a head for labels."""
        if self.task != "audio-classification":
            return None
        return (self.config.get("head_config") or {}).get("num_labels")

    @property
    def labels(self) -> list[str]:
        """The names of the labels, by their number; none where the folder names none."""
        names = (self.config.get("head_config") or {}).get("id2label") if self.num_labels else None
        return [str(names[number]) for number in sorted(names)] if names else []

    def sizes(self) -> dict[str, str]:
        """Say in words what each part of the adapter consists of."""
        get = self.config.get
        places = " and ".join(place.replace("_", "-") for place in get("e_after") or ())
        words = {
            "E": f"bottleneck of {get('e_dim')} after {places}, layers {_ranges(get('e_layers'))}",
            "L": f"taps of {get('l_dim')}, layers {_ranges(get('l_layers'))}, to: {get('l_output')}",
            "P": f"{(p := get('p_length'))} pseudo feature{'s' * (p != 1)}, {get('p_position')}ed",
            "layer norms": "copies that replace those of the base",
            "head": ", ".join(get("modules_to_save") or ()),
        }
        return {part: words[part] for part, count in self.counts.items() if count}

    def holds(self, *names: str) -> bool:
        """Whether one of these files is beside the adapter."""
        return any((self.folder / name).is_file() for name in names)


def find_adapter(
    adapter: str | Path, subfolder: str | None = None, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Find the folder of an adapter: the one named, or a copy of a repository on the Hub."""
    name = os.fspath(adapter)
    folder = Path(os.path.expanduser(name))
    if not os.path.isdir(folder):
        if os.path.lexists(folder) or not is_hub_id(name):
            raise ValueError(f"There is no folder {name!r}. Pass the folder of an adapter, or its name on the Hub.")
        wanted = [f"{subfolder}/*" if subfolder else "*"]
        try:
            folder = Path(
                snapshot_download(
                    name, revision=revision, token=token, allow_patterns=wanted, ignore_patterns=["checkpoint-*"]
                )
            )
        except (OSError, ValueError) as error:  # The errors of the Hub are of these kinds.
            raise ValueError(
                f"There is no folder {name!r}, and no adapter of that name could be fetched from the Hub: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
    return folder / (subfolder or "")


def is_hub_id(name: str) -> bool:
    """Whether a repository on the Hub could have that name; folders may have it as well.

    Examples:
        >>> is_hub_id("me/voices"), is_hub_id("./voices")
        (True, False)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "~", "/"))


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read a folder in which an ELP-adapter was saved, and check the types of all that it says."""
    folder = Path(folder)
    config = _read_config(folder)
    path = find_weights(folder)
    if path is None:
        raise ValueError(f"{str(folder)!r} holds {CONFIG_NAME} but no weights. Save the adapter again.")
    tensors = open_tensors(path, str(folder))
    counts = dict.fromkeys(PARTS, 0)
    for name, tensor in tensors.items():
        part = next((part for container, part in CONTAINERS.items() if f".{container}." in name), "head")
        counts[part] += tensor.numel() * (SETTINGS not in name)
    shares = _layer_shares(folder, tensors)
    layers = config["l_layers"] or range(len(shares))
    if shares and len(layers) != len(shares):
        raise ValueError(
            f"{CONFIG_NAME} in {str(folder)!r} names {len(layers)} layers that the L-adapter taps, but its weights "
            f"have {len(shares)}. Save the adapter again."
        )
    return SavedAdapter(folder, config, counts, layer_weights=list(zip(layers, shares, strict=False)))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        inside = shortened(sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}")))
        remedy = f"These folders inside of it do: {inside}." if inside else "model.save_pretrained(folder) saves one."
        raise ValueError(f"{str(folder)!r} holds no adapter: there is no {CONFIG_NAME} in it. {remedy}")
    try:
        return _checked_config(path)
    except Exception as error:  # Anything may be wrong with a file by a stranger.
        raise ValueError(f"{CONFIG_NAME} in {str(folder)!r} is not valid: {first_line(error)}") from error


def _checked_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"it must not be larger than {LARGEST_CONFIG:,} bytes. It is not read.")
    fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"it must hold an object with the adapter's fields, got {brief(fields)}.")
    if fields.get("peft_type") != "ELP":
        raise ValueError(
            f"it is of the method {brief(fields.get('peft_type'))}, not of ELP. PEFT loads it without this package."
        )
    for name, kind in KINDS.items():
        if not isinstance(fields.get(name), kind | None):
            raise ValueError(f"{name} must be a {kind.__name__}, got {brief(fields[name])}.")
    model_class = (fields.get("auto_mapping") or {}).get("base_model_class")
    if model_class is not None and not str(model_class).isidentifier():
        raise ValueError(f"base_model_class must be the name of a class, got {brief(model_class)}.")
    config = ELPConfig.from_peft_type(**fields).to_dict()
    if any(not isinstance(module, str) for module in config["modules_to_save"] or ()):
        raise ValueError(f"modules_to_save must hold names of modules, got {brief(config['modules_to_save'])}.")
    return config


def _ranges(numbers: Sequence[int] | None) -> str:
    """Write `[0, 1, 2, 5]` as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers or ():
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _layer_shares(folder: Path, tensors: Mapping[str, Tensor]) -> list[float]:
    """Return the layer weights in the tensors of an adapter; none without an L-adapter."""
    logits = [tensor for name, tensor in tensors.items() if name.endswith(".elp_l.layer_weights")]
    if not logits:
        return []
    if len(logits) > 1 or logits[0].ndim != 1 or not logits[0].isfinite().all():
        raise ValueError(
            f"The layer weights in {str(folder)!r} must be finite, one per layer. Save the adapter again."
        )
    return logits[0].double().softmax(0).tolist()
