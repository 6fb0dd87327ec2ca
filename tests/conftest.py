"""Which tests run when, and one saved adapter for all tests that need one."""

import functools
import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports that read it
# The workers of a parallel run share the cores; tiny tensors gain nothing from more threads, here and in programs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# What reads the environment is imported after it is set.
from backbones import AUTO, ELP, answer, build, shaken  # noqa: E402
from families import FAMILIES  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from peft_elp import ELPConfig  # noqa: E402

# The other files hold models, inputs, servers and programs; --doctest-modules would collect them.
_HERE = Path(__file__).parent
collect_ignore = [str(file.relative_to(_HERE)) for file in _HERE.rglob("*.py") if not file.name.startswith("test_")]

# When tests run, by patterns in their ids. What matches nothing runs with `make test`. What is of the `gate` runs with
# `make gate`, before a change is done. What is `exhaustive` runs on request: `pytest -m exhaustive`.
WHEN = {
    "exhaustive": [
        r"every family",
        r"test_fuzz\.py::test_many",
        r"conformance/.*\[.*(LN-Tuning|LoRA-(wavlm|hubert|whisper))",  # what PEFT's own methods do, beyond one model
        r"automl\.py::test_processes_side_by_side.*\[ray",
        r"automl\.py::test_a_thousand",
        r"serve\.py::test_a_replica",  # Ray gives its proxy five seconds to start; a busy machine takes longer
        r"\[docs/how-to/compile-and-export",  # what compiled.py does and compares
        r"\[deleted by Transformers-(?!wavlm|wav2vec2\]|hubert\]|sew\]|whisper|qwen2_audio)",
    ],
    "gate": [
        r"test_(accelerate|compile|demo|examples|fuzz|hub|label_corpus|measure_\w+|notebook|recipes)\.py",
        # In a process of their own: what test_compile.py runs with "every family".
        r"compiled\.py::.*(hubert|wavlm-(bare|frames|xvector|stable|For)|one_graph\[wavlm|graph\[False)",
        r"compiled\.py::test_a_(strict_export|graph_that_breaks)",
        r"test_(inference|starts)\.py::test_(how_many|whisper_|a_fresh_adapter_costs)",
        r"test_automl\.py::test_(a_killed_search|processes_side_by_side|the_same_seed)",
        r"test_(check|serve)\.py::test_(a_thousand|openais_client|the_command|voices)",
        r"test_docs\.py::test_(the_blocks|a_page_runs|an_error|the_page|every_model|no_model)",
        r"conformance/.*\[.*(LoRA|hubert-bare|wavlm-classification)",
    ],
}
# The families that a test of all families runs on with `make test`: post-norm and pre-norm layers, all heads, one
# that pools, one with a decoder behind it, one inside a larger model. The others are of the gate.
QUICK = {name for name in FAMILIES if name.startswith("wavlm")} | {
    "hubert", "qwen2_audio", "sew", "wav2vec2", "wav2vec2-stable", "whisper", "whisper-classification",
}  # fmt: skip


def pytest_report_header():
    return "versions: " + ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "accelerate")
    )


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(items):
    for item in items:
        found = [when for when, patterns in WHEN.items() if any(re.search(one, item.nodeid) for one in patterns)]
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if not found and any(isinstance(x, str) and x in FAMILIES.keys() - QUICK for x in parameters):
            found = ["gate"]
        for when in found[:1]:
            item.add_marker(when)


@functools.cache
def transformers_refuses_lora():
    """Whether Transformers' own `add_adapter` refuses the installed PEFT, whatever the method."""
    try:
        build().add_adapter(LoraConfig(target_modules=["q_proj"]))
    except ValueError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except Exception as error:
        told = f"{error} {error.__context__}"  # the other is behind an error that a test expects otherwise
        if "The version of PEFT you are using is not compatible" in told and transformers_refuses_lora():
            pytest.skip(f"Transformers {version('transformers')} adds no adapter to a model, LoRA neither")
        raise


@dataclass(frozen=True)
class Saved:
    """A trained adapter on disk, for reading only.

    Args:
        base: The folder of its base.
        adapter: Its own folder.
        logits: What it answers to the usual batch of noise.
        auto: The class that loads the base.
    """

    base: Path
    adapter: Path
    logits: torch.Tensor
    auto: type

    def load_base(self, **options):
        """The base, as users load it."""
        return self.auto.from_pretrained(self.base, **options)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Saves a trained adapter on a family with a head, once: `saved("ForCTC", "hubert")`."""

    @functools.cache
    def save(head="ForCTC", family="wavlm"):
        folder = tmp_path_factory.mktemp(f"{family}-{head}")
        build(family, head).save_pretrained(folder / "base")
        base = AUTO[head].from_pretrained(folder / "base")
        output = "residual" if head == "Model" else "head"
        model: Any = shaken(get_peft_model(base, ELPConfig(**ELP, l_output=output))).eval()
        model.save_pretrained(folder / "adapter")
        return Saved(folder / "base", folder / "adapter", answer(model), AUTO[head])

    return save
