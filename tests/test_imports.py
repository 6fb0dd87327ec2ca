"""The architecture: which part of the package may import which."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import peft_elp

PACKAGE = Path(peft_elp.__file__).parent

FACTS = {"backbones", "heads", "parameters", "published", "wording"}
# What each room of the package may import: folders and single modules, by their name.
ALLOWED: dict[str, set[str]] = {
    **{fact: {"wording"} - {fact} for fact in FACTS},
    "adapters": set(),
    "call": {"adapters", *FACTS},
    "config": {"adapters", "saved", *FACTS},
    "saved": {"config", *FACTS},
    "tuner": {"adapters", "call", "config", "saved", *FACTS},
    "multitask": {"call", "tuner", *FACTS},
    "feature_cache": {"call", "tuner", *FACTS},
    "optim": FACTS,
    "speech": {"__init__", "config", "multitask", "saved", *FACTS},
    "recipes": {"__init__", "config", "feature_cache", "multitask", "optim", "saved", "speech", "tuner", *FACTS},
    "serving": {"call", "multitask", "saved", "speech", *FACTS},
    "automl": {"__init__", "adapters", "call", "optim", "recipes", "saved", "speech", *FACTS},
    "__init__": {"automl", "config", "feature_cache", "multitask", "optim", "saved", "tuner", *FACTS},
    "__main__": set(),
}
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports, wherever in the file it does."""
    found = set()
    here = name.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "peft_elp"):
            base = here[: len(here) + 1 - node.level] if node.level else []
            path = [*base, *(node.module or "").removeprefix("peft_elp").strip(".").split(".")]
            target = ".".join(step for step in path if step)
            names = {f"{target}.{alias.name}".strip(".") for alias in node.names} & MODULES.keys()
            found |= names or {target if target in MODULES else f"{target}.__init__".strip(".")}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("peft_elp.") for alias in node.names if alias.name.startswith("peft_elp.")
            }
    assert found <= MODULES.keys(), found - MODULES.keys()
    return found


def part(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    others = {part(other) for other in imported(name)} - {part(name)}
    assert part(name) in ALLOWED, f"Say in ALLOWED what the new room {part(name)!r} of the package may import."
    assert others <= ALLOWED[part(name)], (
        f"{name} imports {sorted(others - ALLOWED[part(name)])}. docs/contributing.md draws which way imports go."
    )


def test_no_module_is_imported_in_a_circle():
    # prepare() raises a CycleError that names the circle.
    TopologicalSorter({name: imported(name) - {"__init__"} for name in MODULES}).prepare()


def test_adapters_need_only_torch():
    allowed = {"__future__", "collections", "dataclasses", "functools", "jaxtyping", "math", "torch", "typing"}
    for name in (name for name in MODULES if part(name) == "adapters"):
        for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] in allowed, (name, node.module)
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name


SEEN_BEFORE_AND_AFTER = """
import accelerate, peft, torch, transformers
from torch import nn
from torch.nn.modules import module
from torch.optim import Optimizer, optimizer
from transformers.integrations.peft import PeftAdapterMixin

CLASSES = [
    peft.AutoPeftModel, peft.LoraConfig, peft.LoraModel, peft.PeftConfig, peft.PeftModel,
    peft.PeftModelForSequenceClassification, peft.tuners.tuners_utils.BaseTuner,
    peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper, accelerate.Accelerator, nn.Module,
    nn.Parameter, torch.Tensor, torch.optim.AdamW, Optimizer, PeftAdapterMixin, transformers.PreTrainedModel,
    transformers.Trainer, transformers.Wav2Vec2ForCTC, transformers.WhisperForConditionalGeneration,
]
MODULES = [
    peft, peft.mapping, peft.peft_model, peft.utils.save_and_load, nn.functional, torch, transformers, module,
    optimizer,
]

def state():
    found = {f"{cls.__qualname__}.{key}": value for cls in CLASSES for key, value in vars(cls).items()}
    found |= {f"{one.__name__}.{key}": value for one in MODULES for key, value in vars(one).items()}
    hooks = {key: dict(value) for key, value in found.items() if "hooks" in key and isinstance(value, dict)}
    return found, hooks

before, hooks = state()
import peft_elp
import peft_elp.recipes, peft_elp.speech.inference
after, hooks_after = state()
assert peft.PeftType("ELP") in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
changed = {key for key in before if after.get(key) is not before[key] and after.get(key) != before[key]}
assert not changed, changed
assert hooks and hooks_after == hooks, (hooks, hooks_after)
"""


def test_importing_the_package_changes_nothing_of_another_library_but_pefts_registry():
    run = subprocess.run([sys.executable, "-c", SEEN_BEFORE_AND_AFTER], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_map_of_the_package_shows_every_module():
    page = (PACKAGE.parent / "docs/contributing.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```text\npeft_elp/\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    named, room = set(), ""
    for indent, folder, module in re.findall(r"^( +)(?:(\w+)/|(\w+)\.py)", shown, re.MULTILINE):
        room = folder or (room if len(indent) > 2 else "")
        named |= {f"{room}.{module}".strip(".")} if module else set()
    assert named == {name for name in MODULES if not name.endswith(("__init__", "__main__"))}
