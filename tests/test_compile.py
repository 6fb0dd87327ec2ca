"""Compiled and exported models, in a process of their own: checking the axes of tensors, as here, stops tracing."""

import subprocess
import sys
from pathlib import Path

import pytest

PLAIN = ["-q", "-rs", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=ignore"]


@pytest.mark.parametrize("which", ["some families", "every family"])
def test_compiled_and_exported_models_give_what_the_others_give(which):
    marked = "not gate and not exhaustive" if which == "some families" else "gate"
    path = Path(__file__).with_name("compiled.py")
    command = [sys.executable, "-m", "pytest", *PLAIN, "-m", marked, str(path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
