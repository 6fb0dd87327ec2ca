"""A folder by a stranger is read in time and in memory, or refused in one line."""

import json
import re
import resource
import time

import pytest
from hostile import FAULTS, copied
from on_disk import adapted, record, save_base

from peft_elp.cli import main
from peft_elp.saved.folder import read_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
LONGEST = 700  # characters of an error, the names of two folders included


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    place = tmp_path_factory.mktemp("good")
    adapted(save_base(place / "base"), "ForSequenceClassification").save_pretrained(place / "adapter")
    record(place / "a.wav", 3000, seed=1)
    return place / "adapter"


@pytest.fixture
def folder(good, tmp_path, request):
    return copied(good, tmp_path / "hostile", FAULTS[request.param])


@pytest.fixture
def run(capsys):
    def run(*arguments):
        capsys.readouterr()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.monotonic()
        status = main([str(argument) for argument in arguments])
        assert time.monotonic() - start < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000  # KiB
        out, err = capsys.readouterr()
        return out, err, status

    return run


@pytest.mark.parametrize(
    ("folder", "error"), [(name, fault.error) for name, fault in FAULTS.items()], indirect=["folder"]
)
def test_info_answers_or_says_in_one_line_what_is_wrong(run, folder, error):
    out, err, status = run("info", folder)
    if error is None:
        assert (err, status) == ("", 0)
        assert len(out) < 2000
    else:
        assert status == 1
        assert out == ""
        assert re.fullmatch(rf"peft-elp: [^\n]*{error}[^\n]*\n", err)
        assert len(err) < LONGEST
        with pytest.raises(ValueError, match=error):
            read_adapter(folder)
    out, _, status = run("info", folder, "--json")
    assert [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()] if status == 0 else not out


REFUSED = {name: fault.error for name, fault in FAULTS.items() if fault.error is not None}


@pytest.mark.parametrize(("folder", "error"), REFUSED.items(), indirect=["folder"])
def test_classify_says_in_one_line_what_is_wrong(run, folder, good, error):
    out, err, status = run("classify", folder, good.parent / "a.wav", "--device", "cpu")
    assert (out, status) == ("", 1)
    assert re.fullmatch(rf"peft-elp: [^\n]*{error}[^\n]*\n", err)
    assert len(err) < LONGEST
