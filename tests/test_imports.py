"""The architecture: which part of the package may import which."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import peft_elp

PACKAGE = Path(peft_elp.__file__).parent

FACTS = {"backbones", "heads", "parameters", "published", "weights", "wording"}
USED_IN_TRAINING_AND_EVALUATION = {
    "audio", "cli", "corpora", "data", "demo", "inference", "metrics", "optim", "plots", "recipes", "speakers",
}  # fmt: skip

# What each part of the package may import: folders and single modules, by their name.
ALLOWED: dict[str, set[str]] = {
    "shapes": set(),
    "moved": set(),
    **{fact: {"wording"} - {fact} for fact in FACTS},
    "pseudo": {"shapes"},
    "recompute": set(),
    "bottleneck": {"recompute"},
    "adapters": {"shapes", "pseudo", "bottleneck", "recompute"},
    "call": {"shapes", "pseudo", "adapters"},
    "config": {"adapters", *FACTS},
    "saved": {"config", *FACTS},
    "tuner": {"recompute", "shapes", "pseudo", "adapters", "call", "config", *FACTS},
    "multitask": {"call", "tuner", *FACTS},
    "feature_cache": {"call", "tuner", *FACTS},
    **{
        name: {
            "__init__",
            "adapters",
            "config",
            "feature_cache",
            "multitask",
            "saved",
            *FACTS,
            *USED_IN_TRAINING_AND_EVALUATION,
        }
        for name in USED_IN_TRAINING_AND_EVALUATION
    },
    "__init__": {"config", "feature_cache", "moved", "multitask", "optim", "saved", "tuner", *FACTS},
    "__main__": {"cli"},
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
    assert part(name) in ALLOWED, f"Say in ALLOWED what the new part {part(name)!r} of the package may import."
    assert others <= ALLOWED[part(name)], (
        f"{name} imports {sorted(others - ALLOWED[part(name)])}. docs/contributing.md draws which way imports go."
    )


def test_no_module_is_imported_in_a_circle():
    # prepare() raises a CycleError that names the circle.
    TopologicalSorter({name: imported(name) - {"__init__"} for name in MODULES}).prepare()


def test_adapters_need_only_torch():
    for name in ("shapes", "pseudo", "recompute", "bottleneck", "adapters"):
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        outside = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
        }
        allowed = {"__future__", "collections", "dataclasses", "functools", "jaxtyping", "math", "torch", "typing"}
        assert {module.split(".")[0] for module in outside} <= allowed
