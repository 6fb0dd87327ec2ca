import importlib.util
import re
import sys
from pathlib import Path

import pytest
import transformers

from peft_elp.backbones import BACKBONES, REFUSED

ROOT = Path(__file__).parent.parent
WRITTEN_FOR = re.search(r"for Transformers ([\d.]+\d)", (ROOT / "docs/reference/support.md").read_text())


@pytest.fixture(scope="module")
def support():
    """The script that writes the page, which keeps what it found for all tests."""
    assert WRITTEN_FOR
    if transformers.__version__ != WRITTEN_FOR[1]:
        pytest.skip(f"the page is written for Transformers {WRITTEN_FOR[1]}")
    spec = importlib.util.spec_from_file_location("support", ROOT / "docs" / "support.py")
    assert spec
    assert spec.loader
    module = sys.modules["support"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_supported_models_is_what_the_code_does(support):
    assert WRITTEN_FOR
    assert f"transformers=={WRITTEN_FOR[1]}" in (ROOT / "constraints.txt").read_text()
    assert {*BACKBONES, *REFUSED} <= support.modules_of_transformers().keys()
    assert support.PAGE.read_text() == support.page(), "run python docs/support.py"


def test_every_model_that_takes_audio_is_adapted_or_refused_with_a_reason(support):
    assert [found.name for found in support.outcomes() if not (found.stack or found.reason or found.unbuilt)] == []


def test_no_model_trains_a_decoder_or_language_model_as_its_head(support):
    assert {found.name: found.share for found in support.outcomes() if found.share > 1 / 3} == {}
    assert [
        found.name for found in support.outcomes() if found.head and found.name.endswith(("Model", "Encoder"))
    ] == []
