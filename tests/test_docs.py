import importlib.util
import re
from pathlib import Path

import pytest
import transformers

from peft_elp.backbones import BACKBONES, REFUSED

ROOT = Path(__file__).parent.parent


def load_support():
    spec = importlib.util.spec_from_file_location("support", ROOT / "docs" / "support.py")
    assert spec
    assert spec.loader
    support = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(support)
    return support


def test_the_table_of_supported_encoders_is_that_of_the_code():
    written_for = re.search(r"for Transformers ([\d.]+\d)", (ROOT / "docs/reference/support.md").read_text())
    assert written_for
    assert f"transformers=={written_for[1]}" in (ROOT / "constraints.txt").read_text()
    if transformers.__version__ != written_for[1]:
        pytest.skip(f"the page is written for Transformers {written_for[1]}")
    support = load_support()
    assert {*BACKBONES, *REFUSED} <= support.modules_of_transformers().keys()
    assert support.PAGE.read_text() == support.page(), "run python docs/support.py"
