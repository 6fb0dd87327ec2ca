"""The pages say what the code does: each block of code and each command on them is run."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pages
import pytest
import transformers
import yaml
from hub import client, left, serving

from peft_elp.backbones import BACKBONES, REFUSED

ROOT = Path(__file__).parent.parent
WRITTEN_FOR = re.search(r"for Transformers ([\d.]+\d)", (ROOT / "docs/reference/support.md").read_text())
WITH_WHISPER = [
    "data",
    "feature-cache",
    "many-adapters",
    "own-recordings",
    "train-from-a-folder",
    "train-with-trainer",
]
WIDEST = 80  # columns of code that fit the page beside its two menus


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Runs a function in a process whose Hub is on this machine."""
    with serving() as hub, client(hub, tmp_path_factory.mktemp("client")) as there:
        for name, files in there(pages.bases).items():
            hub.create(name, files=files)
        yield there
        assert there(left) == [], "a page tried to leave this machine"


@pytest.fixture(scope="module")
def provided(there, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    there(pages.provide, str(folder))
    return folder


@pytest.fixture
def folder(provided, tmp_path):
    """A folder for one page, with what the pages say that a reader has."""
    return shutil.copytree(provided, str(tmp_path / "page"), symlinks=True)


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_blocks_of_a_page_run_in_order(page, there, folder):
    counts = there(pages.run, page, folder)
    assert counts.get("skipped", 0) == len(pages.reasons(page)), "a block that is not run needs a reason"


@pytest.mark.parametrize("page", ["tutorial/first-adapter", *(f"how-to/{name}" for name in WITH_WHISPER)])
def test_a_page_runs_with_whisper_by_changing_one_line(page, there, folder):
    page = f"docs/{page}.md"
    assert (ROOT / page).read_text(encoding="utf-8").count(f'"{pages.BASE}"') <= 1
    there(pages.run, page, folder, pages.WHISPER)


@pytest.mark.parametrize("page", pages.PAGES)
def test_code_on_a_page_fits_its_width(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?!json)\w+.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)  # text in JSON cannot wrap
    wide = [line for block in blocks for line in block.splitlines() if len(line) > WIDEST]
    assert wide == []


@pytest.mark.parametrize("heading", pages.ERRORS)
def test_an_error_of_the_page_on_errors_occurs(heading, there, folder):
    assert heading in pages.headings("docs/troubleshooting.md")
    assert heading in there(pages.message, heading, folder)


def load(name: str) -> ModuleType:
    """A script of the documentation."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec
    assert spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def support():
    """The script that writes the page, which keeps what it found for all tests."""
    assert WRITTEN_FOR
    if transformers.__version__ != WRITTEN_FOR[1]:
        pytest.skip(f"the page is written for Transformers {WRITTEN_FOR[1]}")
    return load("support")


def test_the_page_of_supported_models_is_what_the_code_does(support):
    assert WRITTEN_FOR
    assert f"transformers=={WRITTEN_FOR[1]}" in (ROOT / "constraints.txt").read_text()
    newer = {"OmniASRAudioModel", "WavTokenizerEncoder", "Apertus1p5Model"}  # of Transformers 5.24
    assert {*BACKBONES, *REFUSED} - newer <= support.modules_of_transformers().keys()
    assert support.PAGE.read_text() == support.page(), "run python docs/support.py"


def test_every_model_that_takes_audio_is_adapted_or_refused_with_a_reason(support):
    assert [found.name for found in support.outcomes() if not (found.stack or found.reason or found.unbuilt)] == []


def test_no_model_trains_a_decoder_or_language_model_as_its_head(support):
    assert {found.name: found.share for found in support.outcomes() if found.share > 1 / 3} == {}
    assert [
        found.name for found in support.outcomes() if found.head and found.name.endswith(("Model", "Encoder"))
    ] == []


def test_the_figure_is_that_of_its_script():
    figure = load("figure")
    for theme in figure.COLOURS:
        drawn = (figure.ASSETS / f"elp-{theme}.svg").read_text(encoding="utf-8")
        assert drawn == figure.figure(theme), "run python docs/figure.py"


def test_the_workflows_call_targets_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in sorted((ROOT / ".github").rglob("*.yml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        steps = [step for job in content.get("jobs", {}).values() for step in job["steps"]]
        matrix = {
            target
            for job in content.get("jobs", {}).values()
            for words in job.get("strategy", {}).get("matrix", {}).get("target", [])
            for target in words.split()
        }
        called = {word for step in steps for word in re.findall(r"^make ([\w-]+)$", step.get("run", ""))}
        assert called | matrix <= targets, path


def test_the_citation_and_the_changelog_have_the_version_of_the_package():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version[1]
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version[1]
