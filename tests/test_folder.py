"""A folder by a stranger is read in time and in memory, or refused in one line."""

import json
import re
import resource
import time
from contextlib import suppress

import pytest
from backbones import build
from hostile import FAULTS, Fault, copied, fields, head
from on_disk import adapted, record, save_base
from peft import PeftModel
from test_life_cycle import assert_untouched, snapshot

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


@pytest.mark.parametrize(
    "change",
    [
        head(num_labels=10**9, id2label=None, label2id=None),
        fields(e_dim=10**9),
        fields(l_dim=10**9),
        fields(p_length=10**9),
        fields(modules_to_save=["nowhere"]),
        fields(e_layers=[7]),
        fields(target="nothing"),
        fields(exclude_modules="("),
    ],
    ids=["num_labels", "e_dim", "l_dim", "p_length", "modules_to_save", "e_layers", "target", "exclude_modules"],
)
def test_classify_refuses_what_does_not_fit_its_base(run, good, tmp_path, change):
    folder = copied(good, tmp_path / "hostile", Fault(change, None))
    out, err, status = run("classify", folder, good.parent / "a.wav", "--device", "cpu")
    assert (out, status) == ("", 1)
    assert re.fullmatch(r"peft-elp: [^\n]+\n", err)
    assert len(err) < 2500


@pytest.mark.parametrize(
    ("door", "folder"), [(door, name) for door in ("PEFT", "Transformers") for name in REFUSED], indirect=["folder"]
)
def test_a_model_that_a_folder_is_refused_for_stays_as_it_was(folder, door, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_ELP_PAYLOAD", str(tmp_path / "executed"))
    base = build("wavlm", "ForSequenceClassification")
    before = snapshot(base)
    loaded = False
    with suppress(Exception):
        PeftModel.from_pretrained(base, folder) if door == "PEFT" else base.load_adapter(str(folder))
        loaded = True
    assert not (tmp_path / "executed").exists()
    if not loaded:  # Some faults are only of what the command reads.
        assert_untouched(base, before)
        assert not hasattr(base, "peft_config")
