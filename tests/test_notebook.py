"""The notebook of the tutorial, with few steps: each cell runs, and the figures are in it."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tutorial" / "first-adapter.ipynb"
FEW = {"PRETRAINING_STEPS": 2, "EPOCHS": 1, "SEARCH_TRIALS": 1, "NUM_VOICES": 2, "NUM_WORDS": 6}


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_every_cell_runs(cells, tmp_path, monkeypatch, capsys):
    pytest.importorskip("espeakng_loader")
    examples = NOTEBOOK.parent.parent.parent / "examples"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(examples))
    names: dict = {}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("%"):
            continue
        for name, value in FEW.items():
            source = re.sub(rf"^{name} = \w+", f"{name} = {value}", source, flags=re.MULTILINE)
        exec(compile(source, cell["id"], "exec"), names)
    said = capsys.readouterr().out
    assert re.search(r"[\d.]+% of the test clips are right", said)
    assert "It hears" in said
    assert Path("outputs/adapter/adapter_config.json").is_file()


def test_the_notebook_holds_its_figures_no_error_and_links_that_lead_to_pages(cells):
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "/home/" not in NOTEBOOK.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+\.md)\)", "".join("".join(cell["source"]) for cell in cells)):
        assert (NOTEBOOK.parent / link).is_file(), link
