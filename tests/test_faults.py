"""An exception at any line of placing, loading, saving, deleting or unloading leaves nothing half done.

By default a few lines of each operation are tried. `-m exhaustive` tries every line, which takes ten minutes or more.
"""

import linecache
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from backbones import ELP, build, shaken
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from untouched import logits

import peft_elp
from peft_elp import ELPConfig

PACKAGE = str(Path(peft_elp.__file__).parent)


class UnexpectedError(Exception):
    """What no code of the package expects."""


class Lines:
    """The lines of the package that run in a block, each at most twice: when it first runs, and when it last does.

    Args:
        fault_at: Raise an `UnexpectedError` there: a line and how often it has run before.
    """

    def __init__(self, fault_at: tuple[tuple[str, int], int] | None = None) -> None:
        self.fault_at = fault_at
        self.runs: dict[tuple[str, int], int] = {}

    def __enter__(self) -> "Lines":
        self.before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)

    def _called(self, frame: Any, event: str, arg: Any) -> Any:
        return self._traced if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _traced(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            line = (frame.f_code.co_filename, frame.f_lineno)
            runs = self.runs.get(line, 0)
            self.runs[line] = runs + 1
            if (line, runs) == self.fault_at:
                sys.settrace(self.before)  # Only one fault: what cleans up after it is not disturbed.
                raise UnexpectedError(f"{line[0]}:{line[1]}, run {runs}")
        return self._traced

    def places(self) -> list[tuple[tuple[str, int], int]]:
        # Python runs the line of a `with` statement again when the block ends. What is raised there skips the end of
        # the context, which no code can prevent.
        return [
            (line, run)
            for line, runs in self.runs.items()
            for run in sorted({0, runs - 1})
            if run == 0 or not linecache.getline(*line).lstrip().startswith("with ")
        ]


def picture(model: Any, folder: Path) -> Any:
    """All that a fault may not change: modules with attributes and hooks, tensors, settings, and files."""
    modules = []
    for name, module in model.named_modules():
        plain = {}
        for key, value in vars(module).items():
            if key == "_modules":
                plain[key] = [(child, id(one)) for child, one in value.items()]
            elif key in ("_parameters", "_buffers"):
                plain[key] = [(tensor, id(one)) for tensor, one in value.items()]
            elif isinstance(value, nn.Module):
                plain[key] = id(value)
            elif key.endswith("_hooks") or key.endswith("_hooks_with_kwargs"):
                plain[key] = list(value)
            elif not callable(value):
                plain[key] = repr(value)
            else:
                plain[key] = type(value)
        modules.append((name, type(module), id(module), plain))
    tensors = [(name, p.requires_grad, p.detach().double().sum().item()) for name, p in model.named_parameters()]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return modules, tensors, model.config.to_dict(), files


def outline(model: Any, folder: Path) -> Any:
    """What an operation that is complete has changed. The card is not worth an error, so it may be missing."""
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    files = {path.name: path.read_bytes() for path in folder.rglob("adapter_*")}
    return modules, files, len(list(folder.glob("**/.saving-*")))


class Operation(NamedTuple):
    """Something that is done to a model, which a fault must not leave half done.

    Args:
        prepare: Makes the model.
        run: Does it, given the model, the folder of a saved adapter and a folder to save into.
        may_end: Whether it may be complete after a fault, rather than not done.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any, Path, Path], Any]
    may_end: bool = False


CONFIG = {**ELP, "e_layers": [0], "l_layers": [0, 1]}


def base() -> Any:
    return build("wavlm", "ForSequenceClassification", num_hidden_layers=2)


def adapted(*others: str) -> Any:
    model: Any = get_peft_model(base(), ELPConfig(**CONFIG), adapter_name="one")
    for name in others:
        model.add_adapter(name, ELPConfig(**CONFIG))
    return shaken(model)


def alone(*names: str) -> Any:
    model = base()
    for name in names:
        model.add_adapter(ELPConfig(**CONFIG), name)
    return model


OPERATIONS = {
    "get_peft_model": Operation(base, lambda model, saved, folder: get_peft_model(model, ELPConfig(**CONFIG))),
    "add_adapter": Operation(adapted, lambda model, saved, folder: model.add_adapter("two", ELPConfig(**CONFIG))),
    "inject_adapter_in_model": Operation(base, lambda model, *_: inject_adapter_in_model(ELPConfig(**CONFIG), model)),
    "add_adapter of Transformers": Operation(base, lambda model, *_: model.add_adapter(ELPConfig(**CONFIG))),
    "from_pretrained": Operation(base, lambda model, saved, folder: PeftModel.from_pretrained(model, str(saved))),
    "load_adapter": Operation(adapted, lambda model, saved, folder: model.load_adapter(str(saved), "two")),
    "load_adapter of Transformers": Operation(base, lambda model, saved, _: model.load_adapter(str(saved))),
    "save_pretrained": Operation(adapted, lambda model, _, folder: model.save_pretrained(folder), may_end=True),
    "delete_adapter": Operation(lambda: adapted("two"), lambda model, *_: model.delete_adapter("one"), may_end=True),
    "delete the last adapter": Operation(adapted, lambda model, *_: model.delete_adapter("one"), may_end=True),
    "delete_adapter of Transformers": Operation(
        lambda: alone("one", "two"), lambda model, *_: model.delete_adapter("one"), may_end=True
    ),
    "unload": Operation(lambda: adapted("two"), lambda model, *_: model.unload(), may_end=True),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    adapted().save_pretrained(folder, selected_adapters=["one"])
    return folder / "one"


@pytest.mark.parametrize("most", [10, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.exhaustive])])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.filterwarnings("ignore:The adapter is saved in .*, but its card could not be written:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_a_fault_leaves_nothing_half_done(name, most, saved, tmp_path):
    operation = OPERATIONS[name]

    def prepared(number: int) -> tuple[Any, Path]:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "README.md").write_text("Mine.")
        return operation.prepare(), folder

    model, folder = prepared(0)
    with Lines() as lines:
        operation.run(model, saved, folder)
    places, complete = lines.places(), outline(model, folder)
    assert len(places) > 40
    if most is not None:
        places = random.Random(name).sample(places, most)
    wrong = []
    for number, place in enumerate(places, start=1):
        model, folder = prepared(number)
        before = picture(model, folder)
        try:
            with Lines(place):
                operation.run(model, saved, folder)
        except UnexpectedError:
            pass
        else:
            continue  # It did not run this time: a cache was filled by then.
        if operation.may_end and outline(model, folder) == complete:
            continue
        if picture(model, folder) != before:
            wrong.append((place, "left traces", difference(before, picture(model, folder))))
            continue
        try:
            operation.run(model, saved, folder)
            logits(model.base_model.model if isinstance(model, PeftModel) else model)
        except Exception as error:
            wrong.append((place, "no second try", repr(error)))
    assert not wrong, f"{len(wrong)} of {len(places)}: " + "\n".join(map(str, wrong[:20]))


def difference(before: Any, after: Any) -> str:
    """What differs first, for the message of a failure."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        return f"{keys[0]}: {difference(before.get(keys[0]), after.get(keys[0]))}"
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)) and len(before) == len(after):
        one, other = next((a, b) for a, b in zip(before, after, strict=True) if a != b)
        return f"{before[0]!s:.40} > {difference(one, other)}"
    return f"{before!s:.200} became {after!s:.200}"
