"""Folders of adapters as a stranger, or a fault, could leave them: each with what has to be said about it."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
HUGE, MANY = 10**9, 10**5

Change = Callable[[Path], Any]  # changes a copy of a good folder


def copied(good: Path, folder: Path, change: Change) -> Path:
    """The good folder, changed."""
    shutil.copytree(good, folder)
    change(folder)
    return folder


def text(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def replaced(name: str, make: Change) -> Change:
    """Something else in place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def fields(**changed: Any) -> Change:
    """Other values in the configuration."""

    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changed))

    return change


def head(**changed: Any) -> Change:
    """Other values in the configuration's `head_config`; None takes one out."""

    def change(folder: Path) -> None:
        settings = json.loads((folder / CONFIG).read_text())["head_config"] | changed
        fields(head_config={name: value for name, value in settings.items() if value is not None})(folder)

    return change


def tensors(ending: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Change:
    """Another tensor in place of one, or none."""

    def change(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        name = next(name for name in weights if name.endswith(ending))
        made = make(weights.pop(name))
        save_file(weights if made is None else weights | {name: made}, folder / WEIGHTS)

    return change


class Payload:
    """What a pickle may do on loading."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (os.environ.get("PEFT_ELP_PAYLOAD", "/nowhere/at/all"),)


def pickled(content: Any) -> Change:
    return replaced(WEIGHTS, lambda path: torch.save(content, path.with_name("adapter_model.bin")))


NO_CONFIG, NOT_VALID = "holds no adapter: there is no", r"adapter_config\.json in '[^\n]*' is not valid: "
NO_FILE = r"cannot be read: adapter_model\.safetensors is not a regular file"
TORN = "The weights of the adapter '[^\n]*' are broken or cut short[^\n]*force_download=True"
DTYPE = r"An adapter is saved in float64, [^\n]*layer_weights \(torch"
LAYERS = "The layer weights in '[^\n]*' must be finite, one per layer"
LAYER_WEIGHTS = ".elp_l.layer_weights"

VALUES: list[dict[str, Any]] = [  # that one field of the configuration must not have
    *({"peft_type": value} for value in ("LORA", None, ["ELP"] * MANY)),
    *({"base_model_name_or_path": value} for value in (5, ["a"] * MANY)),
    *({"auto_mapping": value} for value in ([1], "x", {"base_model_class": 5}, {"base_model_class": "X\nimport os"})),
    *({"adapters": value} for value in (3, ["E"] * 10**6)),
    *({"e_layers": value} for value in ("zero", {"a": 1}, [[0]])),
    *({"e_dim": value} for value in ("64", HUGE)),
    *({"e_after": value} for value in ({"a": {}}, [[1]])),
    *({"modules_to_save": value} for value in (5, [5])),
    *({"verification_threshold": value} for value in ("high", float("nan"))),
    {"revision": {}},
    {"l_layers": ["x"] * 10**6},
    {"head_config": [1]},
    {"exclude_modules": 5},
]
HEAD_VALUES: list[dict[str, Any]] = [
    {"id2label": ["a", "b", "c"]},
    {"id2label": {"0": "a", "2": "c"}, "label2id": None},
    {"id2label": {"a": "b"}},
    {"id2label": {"0": [1], "1": {}}},
    *({"num_labels": value, "id2label": None} for value in ("3", [3], -3, 10**1000)),
    {"num_labels": HUGE, "id2label": None, "label2id": None},
]

# What the package refuses in one line through all of its doors.
REFUSED: dict[str, tuple[Change, str]] = {
    "config is missing": (lambda folder: (folder / CONFIG).unlink(), NO_CONFIG),
    "config is a dangling link": (replaced(CONFIG, lambda path: path.symlink_to("nowhere")), NO_CONFIG),
    "config is a pipe": (replaced(CONFIG, os.mkfifo), NO_CONFIG),
    "config is empty": (text(CONFIG, ""), NOT_VALID),
    "config is cut": (text(CONFIG, '{"peft_type": "ELP"'), NOT_VALID),
    "config is not UTF-8": (text(CONFIG, b'{"peft_type": "\xff"}'), NOT_VALID),
    "config is a list": (text(CONFIG, "[1, 2]"), NOT_VALID + r"it must hold an object .*, got \[1, 2\]"),
    "config is null": (text(CONFIG, "null"), NOT_VALID + "it must hold an object .*, got None"),
    "config is deep": (text(CONFIG, '{"a": ' + "[" * MANY + "]" * MANY + "}"), NOT_VALID),
    "config is large": (text(CONFIG, '{"a": "' + "x" * 11_000_000 + '"}'), NOT_VALID + "it must not be larger than"),
    **{f"{str(value)[:60]}": (fields(**value), NOT_VALID) for value in VALUES},
    **{f"{str(value)[:60]}": (head(**value), NOT_VALID) for value in HEAD_VALUES},
    "l_layers has many entries": (fields(l_layers=list(range(MANY))), "names 100000 layers"),
    "l_layers is of another adapter": (fields(l_layers=[0]), "names 1 layers that the L-adapter taps, but its"),
    "weights are missing": (lambda folder: (folder / WEIGHTS).unlink(), "holds adapter_config.json but no weights"),
    "weights are a dangling link": (replaced(WEIGHTS, lambda path: path.symlink_to("nowhere")), NO_FILE),
    "weights are a pipe": (replaced(WEIGHTS, os.mkfifo), NO_FILE),
    "weights are a folder": (replaced(WEIGHTS, Path.mkdir), NO_FILE),
    "weights are of two saves": (text("adapter_model.bin", ""), r"both adapter_model\.safetensors and .*\.bin"),
    "weights are empty": (text(WEIGHTS, ""), TORN),
    "weights are a text": (text(WEIGHTS, "x" * 100), TORN),
    "weights have a header of 2**60 bytes": (text(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"), TORN),
    "weights are cut": (lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100), TORN),
    "pickle holds code": (pickled({"base_model.model.classifier.weight": Payload()}), TORN),
    "pickle holds a list": (pickled([1, 2]), TORN),
    "pickle holds no tensors": (pickled({"a": 1}), TORN),
    "pickle holds a tensor without end": (pickled({"a": torch.zeros(1).expand(10**6, 10**6)}), TORN),
    "layer weights are complex": (tensors(LAYER_WEIGHTS, lambda old: old.to(torch.complex64)), DTYPE),
    "layer weights are NaN": (tensors(LAYER_WEIGHTS, lambda old: old * float("nan")), LAYERS),
    "layer weights are a matrix": (tensors(LAYER_WEIGHTS, lambda old: old[None].clone()), LAYERS),
    "layer weights are too many": (tensors(LAYER_WEIGHTS, lambda old: torch.zeros(9)), "taps, but its weights have 9"),
}

# What can only be refused when the base is there.
MISFITS: dict[str, Change] = {
    "p_length": fields(p_length=100),
    "l_dim": fields(l_dim=2**14),
    "e_layers": fields(e_layers=[7]),
    "target": fields(target="nothing"),
    "modules_to_save": fields(modules_to_save=["nowhere"]),
    "exclude_modules": fields(exclude_modules="("),
    "num_labels": head(num_labels=2**20, id2label=None, label2id=None),
    "a tensor is missing": tensors(".elp_e.down.weight", lambda old: None),
    "a tensor is of another shape": tensors(".elp_e.down.weight", lambda old: old.T.contiguous()),
    "a tensor is infinite": tensors(".elp_p.rows", lambda old: old / 0),
    "a tensor holds whole numbers": tensors(".elp_p.rows", lambda old: old.long()),
}

# What is odd and works.
ODD: dict[str, Change] = {
    "num_labels has no names": head(id2label=None, label2id=None),
    "card is not UTF-8": text(CARD, b"---\nlicense: m\xff\n---\n"),
    "card is broken": text(CARD, "---\n: [\n---\n"),
    "card is deep": text(CARD, "---\na: " + "[" * 5000 + "\n---\n"),
    "card holds laughs": text(
        CARD,
        "---\na0: &a0 [ha, ha]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
        + "model-index:\n- name: x\n  results:\n  - task: {type: x}\n    dataset: {name: x, type: x}\n"
        "    metrics:\n    - {type: x, value: *a11}\n---\n",
    ),
}
