"""Compiled and exported models, in processes of their own: checking the axes of tensors, as here, stops tracing."""

import subprocess
import sys
from pathlib import Path

import pytest

PLAIN = ["-q", "-rs", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=ignore"]


def promises_hold(script, marked):
    path = Path(__file__).with_name(script)
    command = [sys.executable, "-m", "pytest", *PLAIN, "-m", marked, str(path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
    if " passed" not in run.stdout:
        pytest.skip(run.stdout[-500:])


@pytest.mark.parametrize("script", ["compiled.py", "exported.py"])
def test_compiled_and_exported_models_give_what_the_others_give(script):
    promises_hold(script, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["compiled.py", "exported.py"])
def test_those_of_every_family_do_too(script):
    promises_hold(script, "slow")
