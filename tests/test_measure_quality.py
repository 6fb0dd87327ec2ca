"""The grids of examples/benchmarks in a very short form, their reports, and the page with the real results."""

import csv
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from on_disk import record, save_whisper

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("optuna")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))

import common
import compare_methods
import measure_quality as quality
import report_quality

from peft_elp.speech.metrics import equal_error_rate

DOCS = Path(__file__).parent.parent / "docs" / "reference"
SPEAKERS = {"train": "abc", "validation": "d", "test": "ef"}

# The heads of tiny models are not small beside their encoders.


def write(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """All sets alike: two clips of each speaker, with another word and another mood."""
    folder = tmp_path_factory.mktemp("recordings")
    slots = {f"slot_{name}": "" for name in ("size", "roast", "shots", "milk", "sugar")}
    for name in {task.folder for task in quality.TASKS.values()}:
        for split, speakers in SPEAKERS.items():
            (folder / name / split).mkdir(parents=True)
            rows = []
            for seed, (speaker, word) in enumerate(itertools.product(speakers, "xy")):
                file = f"{speaker}{word}.wav"
                record(folder / name / split / file, 4000 + 320 * seed, seed=ord(speaker) + seed)
                row = {"file_name": file, "speaker_id": speaker, "group": speaker, "emotion": word, "label": word}
                rows.append(row | slots)
            write(folder / name / split / "metadata.csv", rows)
        pairs = itertools.combinations([f"{speaker}{word}.wav" for speaker in "ef" for word in "xy"], 2)
        trials = [{"label": int(a[0] == b[0]), "file_a": f"test/{a}", "file_b": f"test/{b}"} for a, b in pairs]
        write(folder / name / "trials.csv", trials)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_whisper(tmp_path_factory.mktemp("encoder"), window_s=5)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two folds, one setting for each method, and few replicates."""
    for name, value in {"FOLDS": 2, "TRAINED_FOLDS": 2, "REPLICATES": 20}.items():
        monkeypatch.setattr(quality, name, value)
    for name in quality.METHODS:
        monkeypatch.setitem(quality.METHODS, name, quality.METHODS[name][:1])


def result(rate, fold=0, tested_on="test", task="orders", validation=0.0, **test):
    setting = {"method": "full", "rate": rate}
    return quality.Result(task, common.FULL, setting, fold, "v", tested_on, [50, validation], 1, test, 1, 1.0)


def test_a_grid_is_trained_once_and_reported(encoder, recordings, tmp_path, monkeypatch):
    words = ["run", "--model_name_or_path", str(encoder), "--recordings", str(recordings), "--steps", "1"]
    words += ["--output_dir", str(tmp_path), "--methods"]
    methods = [common.HEAD, common.SUM, "E+L", quality.LORA]
    quality.main([*words, *methods])
    monkeypatch.setattr(quality.Grid, "train", lambda *_: pytest.fail("It was trained again."))
    quality.main([*words, *methods])
    fake = SimpleNamespace(model=None, classify=lambda files, top_k: [[{"label": "x"}]] * len(files))
    fake.embed = lambda files: [np.array([i % 3, 1.0], np.float32) for i in range(len(files))]
    monkeypatch.setattr(quality, "train", lambda *args, **options: SimpleNamespace(adapter=fake))
    monkeypatch.setattr(quality, "count_parameters", lambda model: {"L": 7, "head": 1})
    quality.main([*words, common.SEARCH])

    summary, page, plot = tmp_path / "measured.json", tmp_path / "page.md", tmp_path / "plot.svg"
    quality.main(["collect", "--recordings", str(recordings), "--output_dir", str(tmp_path), "--json", str(summary)])
    measured = json.loads(summary.read_text())
    assert len(measured["methods"]) == 3 * len(methods) + 2  # Orders have several columns.
    for row in measured["methods"]:
        assert 0 <= row["interval"][0] <= row["interval"][1] <= 100
        assert np.mean(row["runs"]) == pytest.approx(row["test"], abs=0.01)
    trained = {row["method"]: row["trained"] for row in measured["methods"] if row["task"] == "emotions"}
    assert (trained[common.HEAD], trained[common.SUM], trained[common.SEARCH]) == ([0], [2], [7])
    right = {row["task"]: row["test"] for row in measured["methods"] if row["method"] == common.SEARCH}
    assert right["emotions"] == 50
    compared = {(row["task"], row["method"], row["minus"]) for row in measured["compared"]}
    assert ("voices", "E+L", quality.LORA) in compared
    page.write_text("<!-- table: methods -->\nold\n<!-- end -->\nrest")
    report_quality.main(["--json", str(summary), "--page", str(page), "--plot", str(plot)])
    assert "old" not in page.read_text()
    assert page.read_text().endswith("rest")
    assert all(f"| {method} | " in page.read_text() for method in (*methods, common.SEARCH))
    assert plot.stat().st_size


def test_folds_keep_speakers_apart_and_swap_them_where_there_is_no_test_split(recordings):
    for name, task in quality.TASKS.items():
        data = quality.Data(name, recordings)
        for fold in data.folds:
            heard = {data.rows[i]["speaker_id"] for i in fold.train}
            held = [{data.rows[i]["speaker_id"] for i in part} for part in fold.parts.values()]
            assert not heard & set.union(*held)
            assert len(fold.uses) == 1 + task.swapped
    tested = [test for fold in quality.Data("emotions", recordings).folds for _, test in fold.uses]
    assert {name: tested.count(name) for name in tested} == dict.fromkeys("abcdef", 2)


def test_a_setting_is_chosen_by_the_mean_over_folds_among_those_that_have_all():
    errors = {(0.1, 0): 10, (0.1, 1): 50, (0.2, 0): 20, (0.2, 1): 30, (0.3, 0): 0}
    runs = quality.choose([result(rate, fold, validation=error) for (rate, fold), error in errors.items()])
    assert [[one.setting["rate"] for one in run] for run in runs] == [[0.2], [0.2]]
    swapped = [result(rate, 0, name, validation=rate if name == "a" else -rate) for rate in (1, 2) for name in "ab"]
    assert [[(one.tested_on, one.setting["rate"]) for one in run] for run in quality.choose(swapped)] == [
        [("a", 1), ("b", 2)]
    ]


def test_errors_are_resampled_over_clips(recordings):
    bootstrap = quality.Bootstrap(quality.Data("orders", recordings))
    names = bootstrap.blocks[0]
    errors = bootstrap.run([result(0.1, **dict(zip(names, (0, 0, 0, 1), strict=True)))])
    assert errors[0] == 25
    assert set(errors[1:]) <= {0, 25, 50, 75, 100}
    assert errors[1:].std() > 5
    voices = quality.Bootstrap(quality.Data("voices", recordings))
    scores = np.array([0.9, 0.1, 0.3, 0.2, 0.8, 0.4])
    labels = common.read_pairs(voices.data.trials)[0]
    assert voices.voices(scores)[0] == pytest.approx(100 * equal_error_rate(labels, scores), abs=15)
    best = np.array(labels) + scores / 10
    assert voices.voices(best)[0] == 0


def test_p_values_are_corrected_for_their_number():
    # By hand: 3 x 0.01, then 2 x 0.03, and no less than that.
    assert quality.holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])


def test_the_page_has_the_tables_of_its_results(tmp_path):
    page = Path(shutil.copy(DOCS / "measured.md", tmp_path))
    before = page.read_text(encoding="utf-8")
    report_quality.main(["--json", str(DOCS / "measured.json"), "--page", str(page)])
    assert page.read_text(encoding="utf-8") == before
    assert all(f"<!-- table: {name} -->" in before for name in report_quality.REPORTS)


def test_commands_go_on_where_they_were_stopped_and_are_tabled_with_mean_and_deviation(tmp_path, capsys):
    script = tmp_path / "task.py"
    script.write_text(
        "import json, sys; from pathlib import Path\n"
        "arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "if arguments['--method'] == 'broken': sys.exit(3)\n"
        "results = {'eval_accuracy': 0.5 + int(arguments['--seed']) / 10, 'eval_min_dcf': 0.5}\n"
        "results |= {'trained_parameters_encoder': 1234, 'trained_parameters_head': 5}\n"
        "Path(arguments['--output_dir'], 'all_results.json').write_text(json.dumps(results))\n"
    )
    grid = tmp_path / "grid.json"
    words = ["--grid", str(grid), "--output_dir", str(tmp_path / "runs")]
    plan = {"tasks": {"words": f"{script} --steps 3"}, "methods": {"ELP": "--method elp"}, "seeds": [0, 2]}
    grid.write_text(json.dumps(plan))
    assert compare_methods.main(words) == 0
    assert "| ELP | 1,234 | 5 | 0.500 ± 0.000 | 60.0 ± 14.1 | 2 |" in (tmp_path / "runs" / "table.md").read_text()
    assert capsys.readouterr().out.count(" took ") == 2
    plan["methods"]["new"] = "--method elp"
    grid.write_text(json.dumps(plan | {"settings": {"words": {"new": "--method broken"}}}))
    assert compare_methods.main(words) == 2
    said = capsys.readouterr().out
    assert (said.count(" took "), said.count("FAILED")) == (0, 2)  # what is done is done
    assert "| new | - | - | - | - | 0 |" in said
    grid.write_text(json.dumps(plan | {"settings": {"words": {"old": ""}}}))
    with pytest.raises(ValueError, match="name 'old', which is not in"):
        compare_methods.main(words)
