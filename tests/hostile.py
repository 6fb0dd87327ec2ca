"""Folders of adapters as a stranger, or a fault, could leave them: each with what has to be said about it.

`FAULTS` changes a copy of a good folder. `error` is what the package says in one line through all of its doors; None
where a folder is only odd, and works.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
HUGE = 10**9


@dataclass(frozen=True)
class Fault:
    """A change of a good folder, and the error that `peft-elp info` ends with."""

    change: Callable[[Path], Any]
    error: str | None


def copied(good: Path, folder: Path, fault: Fault) -> Path:
    """The good folder with that fault."""
    shutil.copytree(good, folder)
    fault.change(folder)
    return folder


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def fields(**changed: Any) -> Callable[[Path], Any]:
    """Other values in the configuration."""

    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changed))

    return change


def head(**changed: Any) -> Callable[[Path], Any]:
    """Other values in the configuration's `head_config`; None takes one out."""

    def change(folder: Path) -> None:
        settings = json.loads((folder / CONFIG).read_text())["head_config"] | changed
        fields(head_config={name: value for name, value in settings.items() if value is not None})(folder)

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """Other tensors."""

    def rewrite(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return rewrite


def layer_weights(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], Any]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        (name,) = [name for name in weights if name.endswith(".elp_l.layer_weights")]
        weights[name] = make(weights[name])

    return tensors(change)


class Payload:
    """What a pickle may do on loading."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (os.environ.get("PEFT_ELP_PAYLOAD", "/nowhere/at/all"),)


def pickled(content: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "adapter_model.bin")

    return change


def dangling(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "nowhere")

    return change


BROKEN_JSON = "is broken: "
KIND = r"has .* in the field \w+, where a \w+ belongs"
FIELD = r"adapter_config\.json in .*: "
TORN = "The weights of the adapter .* are broken or cut short"
NO_FILE = "cannot be read: adapter_model.safetensors is not a regular file"
DTYPE = r"An adapter is saved in float64, .*layer_weights \(torch"
LAYERS = "The layer weights in .* (must be one number per layer|are not finite)"

FAULTS: dict[str, Fault] = {
    # The configuration as a file
    "config is missing": Fault(lambda folder: (folder / CONFIG).unlink(), "holds no adapter: there is no"),
    "config is a dangling link": Fault(dangling(CONFIG), "holds no adapter: there is no"),
    "config is empty": Fault(text(CONFIG, ""), BROKEN_JSON),
    "config is cut": Fault(text(CONFIG, '{"peft_type": "ELP"'), BROKEN_JSON),
    "config is not UTF-8": Fault(text(CONFIG, b'{"peft_type": "\xff"}'), BROKEN_JSON),
    "config is a list": Fault(text(CONFIG, "[1, 2]"), r"holds \[1, 2\], where an object with the adapter's fields"),
    "config is a number": Fault(text(CONFIG, "5"), "holds 5, where an object"),
    "config is null": Fault(text(CONFIG, "null"), "holds None, where an object"),
    "config is deep": Fault(text(CONFIG, "[" * 200_000), BROKEN_JSON),
    "config is deep inside": Fault(text(CONFIG, '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), BROKEN_JSON),
    "config is large": Fault(text(CONFIG, '{"a": "' + "x" * 11_000_000 + '"}'), "is larger than 10,000,000 bytes"),
    "config is of another method": Fault(fields(peft_type="LORA"), "of the method 'LORA', not of ELP"),
    "config has no method": Fault(fields(peft_type=None), "of the method None, not of ELP"),
    "config has a list for a method": Fault(fields(peft_type=["ELP"] * 10**5), r"of the method \['ELP', .*\.\.\.\]"),
    # Fields of PEFT
    "base is a number": Fault(fields(base_model_name_or_path=5), KIND),
    "base is a list": Fault(fields(base_model_name_or_path=["a"] * 10**5), KIND),
    "revision is an object": Fault(fields(revision={}), KIND),
    "auto_mapping is a list": Fault(fields(auto_mapping=[1]), KIND),
    "auto_mapping is a text": Fault(fields(auto_mapping="x"), KIND),
    "class is a number": Fault(fields(auto_mapping={"base_model_class": 5}), KIND),
    "class is code": Fault(
        fields(auto_mapping={"base_model_class": "X\nimport os"}),
        r"names the class 'X\\nimport os', which is not the name",
    ),
    # Fields of ELP
    "adapters is a number": Fault(fields(adapters=3), FIELD),
    "adapters is a list": Fault(fields(adapters=["E"] * 10**6), FIELD),
    "e_layers is a text": Fault(fields(e_layers="zero"), FIELD),
    "e_layers is an object": Fault(fields(e_layers={"a": 1}), FIELD),
    "e_layers is nested": Fault(fields(e_layers=[[0]]), FIELD),
    "l_layers has a million entries": Fault(
        fields(l_layers=list(range(10**6))), "(names 1000000 layers|adapter_config)"
    ),
    "l_layers has a million texts": Fault(fields(l_layers=["x"] * 10**6), FIELD),
    "l_layers is of another adapter": Fault(fields(l_layers=[0]), "names 1 layers that the L-adapter taps, but its"),
    "e_dim is a text": Fault(fields(e_dim="64"), FIELD),
    "e_after is an object": Fault(fields(e_after={"a": {}}), FIELD),
    "e_after holds lists": Fault(fields(e_after=[[1]]), r"adapter_config\.json"),
    "head_config is a list": Fault(fields(head_config=[1]), FIELD),
    "modules_to_save is a number": Fault(fields(modules_to_save=5), r"adapter_config\.json"),
    "modules_to_save holds numbers": Fault(fields(modules_to_save=[5]), r"adapter_config\.json"),
    "id2label is a list": Fault(head(id2label=["a", "b", "c"]), r"adapter_config\.json"),
    "id2label has a gap": Fault(head(id2label={"0": "a", "2": "c"}, label2id=None), r"adapter_config\.json"),
    "id2label has texts for numbers": Fault(head(id2label={"a": "b"}), r"adapter_config\.json"),
    "id2label has a list for a label": Fault(head(id2label={"0": [1], "1": {}}), r"adapter_config\.json"),
    "num_labels is a text": Fault(head(num_labels="3", id2label=None), r"adapter_config\.json"),
    "num_labels is negative": Fault(head(num_labels=-3, id2label=None), r"adapter_config\.json"),
    "exclude_modules is a number": Fault(fields(exclude_modules=5), r"adapter_config\.json"),
    "threshold is a text": Fault(fields(verification_threshold="high"), FIELD),
    "threshold is NaN": Fault(fields(verification_threshold=float("nan")), FIELD),
    "num_labels is huge": Fault(
        head(num_labels=HUGE, id2label=None, label2id=None), "num_labels in head_config is .*, got 1000000000"
    ),
    # The weights
    "weights are missing": Fault(lambda folder: (folder / WEIGHTS).unlink(), "but no weights"),
    "weights are a dangling link": Fault(dangling(WEIGHTS), NO_FILE),
    "weights are a pipe": Fault(lambda folder: [(folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)], NO_FILE),
    "weights are a folder": Fault(lambda folder: [(folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()], NO_FILE),
    "weights are of two saves": Fault(text("adapter_model.bin", ""), "both adapter_model.safetensors and adapter_mod"),
    "weights are empty": Fault(text(WEIGHTS, ""), TORN),
    "weights are a text": Fault(text(WEIGHTS, "x" * 100), TORN),
    "weights have a header of 2**60 bytes": Fault(text(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"), TORN),
    "weights are cut": Fault(
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]), TORN
    ),
    "pickle holds code": Fault(pickled({"base_model.model.classifier.weight": Payload()}), TORN),
    "pickle holds a list": Fault(pickled([1, 2]), TORN),
    "pickle holds a tensor without end": Fault(pickled({"a": torch.zeros(1).expand(10**6, 10**6)}), TORN),
    "pickle holds no tensors": Fault(pickled({"a": 1}), TORN),
    "layer weights are complex": Fault(layer_weights(lambda old: old.to(torch.complex64)), DTYPE),
    "layer weights are whole": Fault(layer_weights(lambda old: old.to(torch.int8)), DTYPE),
    "layer weights are NaN": Fault(layer_weights(lambda old: old * float("nan")), LAYERS),
    "layer weights are a matrix": Fault(layer_weights(lambda old: old[None].clone()), LAYERS),
    "layer weights are too many": Fault(layer_weights(lambda old: torch.zeros(9)), "taps, but its weights have 9"),
    # What is odd and works, as far as no model is needed
    "num_labels has no names": Fault(head(id2label=None, label2id=None), None),
    "num_labels has a thousand digits": Fault(
        head(num_labels=10**1000, id2label=None), "num_labels in head_config is"
    ),
    "e_dim is huge": Fault(fields(e_dim=HUGE), "e_dim is .*, got 1000000000"),
    "card is not UTF-8": Fault(text(CARD, b"---\nlicense: m\xff\n---\n"), None),
    "card is broken": Fault(text(CARD, "---\n: [\n---\n"), None),
    "card is deep": Fault(text(CARD, "---\na: " + "[" * 5000 + "\n---\n"), None),
    "card holds laughs": Fault(
        text(
            CARD,
            "---\na0: &a0 [ha, ha]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
            + "model-index:\n- name: x\n  results:\n  - task: {type: x}\n    dataset: {name: x, type: x}\n"
            "    metrics:\n    - {type: x, value: *a11}\n---\n",
        ),
        None,
    ),
}
