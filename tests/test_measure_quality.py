"""The grids of examples/benchmarks in a very short form, their reports, and the page with the real results."""

import argparse
import csv
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from on_disk import record, save_base

pytest.importorskip("jiwer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))

import common
import compare_methods
import measure_quality as quality
import report_quality

DOCS = Path(__file__).parent.parent / "docs" / "reference"

# The heads of tiny models are not small beside their encoders.
pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save=.* trains and saves:UserWarning")


def write(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """All sets alike: in each split, four clips of two speakers, who say two words in two moods."""
    folder = tmp_path_factory.mktemp("recordings")
    slots = {f"slot_{name}": "" for name in ("size", "roast", "shots", "milk", "sugar")}
    for name in {task.folder for task in quality.TASKS.values()}:
        for number, split in enumerate(("train", "validation", "test")):
            (folder / name / split).mkdir(parents=True)
            rows = []
            for clip in range(4):
                record(folder / name / split / f"{clip}.wav", 4000 + 320 * clip, seed=4 * number + clip)
                row = {"file_name": f"{clip}.wav", "speaker_id": f"{number}{clip % 2}", "transcription_norm": "ab"}
                rows.append(row | {"emotion": "ab"[clip // 2], "label": "ab"[clip // 2], **slots})
            write(folder / name / split / "metadata.csv", rows)
        trials = [(a % 2 == b % 2, f"test/{a}.wav", f"test/{b}.wav") for a, b in itertools.combinations(range(4), 2)]
        for kind in ("trials", "trials_cross"):
            rows = [{"label": int(same), "file_a": a, "file_b": b} for same, a, b in trials]
            write(folder / name / f"{kind}.csv", rows)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("encoder"), "wav2vec2")


def run(encoder, recordings, folder, *words):
    words = ["--recordings", str(recordings), "--output_dir", str(folder), "--steps", "1", "--seeds", "1", *words]
    quality.main(["run", "--model_name_or_path", str(encoder), "--name", "tiny", *words])
    return {file: file.read_bytes() for file in Path(folder).glob("tiny/*/*.json")}


@pytest.fixture
def one_rate(monkeypatch):
    """Every method chooses from one rate, and emotions have two folds."""
    for held in (quality.METHODS, quality.CHOICES):
        for name, method in list(held.items()):
            monkeypatch.setitem(held, name, quality.replace(method, rates=method.rates[:1]))
    emotions = quality.TASKS["emotions"]
    two = quality.replace(emotions, seconds=1, folds=lambda rows: itertools.islice(emotions.folds(rows), 2))
    monkeypatch.setitem(quality.TASKS, "emotions", two)


def test_a_grid_is_trained_once_and_reported(encoder, recordings, tmp_path, one_rate, monkeypatch):
    tasks, changed = ["voices", "digits", "emotions"], next(iter(quality.CHOICES))
    methods = [common.HEAD, common.L_ONLY, "E+L", common.LORA, changed]
    words = ["--no_bf16", "--methods", *methods, "--tasks", *tasks]
    files = run(encoder, recordings, tmp_path, *words)
    monkeypatch.setattr(quality.Grid, "train_now", lambda *_: pytest.fail("It was trained again."))
    assert run(encoder, recordings, tmp_path, *words) == files

    summary, page = tmp_path / "measured.json", tmp_path / "page.md"
    quality.main(["collect", "--output_dir", str(tmp_path), "--json", str(summary)])
    results = report_quality.read_results(summary)
    chosen, final = ([r for r in results if bool(r.seed) == after] for after in (False, True))
    assert {(result.fold, *result.errors) for result in chosen if result.task == "voices"} == {(0, "validation")}
    assert len(chosen) == len(final) == len(methods) * 4  # Emotions have two folds.
    assert all(0 <= error <= 100 for r in final if r.task != "digits" for error in r.errors.values())
    assert "test across sets" in next(result.errors for result in final if result.task == "voices")
    assert "test of words" in next(result.errors for result in final if result.task == "digits")
    sizes = {result.method: result.trained[0] for result in final}
    assert sizes[common.LORA] == pytest.approx(sizes["E+L"], rel=0.25)  # A rank is a whole number, the encoder tiny.
    assert sizes[common.HEAD] == 0

    marks = [f"<!-- table: tiny, {name} -->\nold\n<!-- end -->\n" for name in report_quality.REPORTS]
    page.write_text("".join(marks) + "the rest")
    costs = [
        {"method": common.FULL, "saved_mib": 8, "step_s": [2, 4]},
        {"method": "E+L", "saved_mib": 2, "step_s": [1, 1]},
    ]
    (tmp_path / "cost.json").write_text(json.dumps({"costs": costs}))
    words = ["--json", str(summary), "--page", str(page), "--plots", str(tmp_path / "plots")]
    report_quality.main([*words, "--cost", "tiny", str(tmp_path / "cost.json")])
    written = page.read_text()
    assert "old" not in written
    assert written.endswith("the rest")
    (line,) = (line for line in written.splitlines() if line.startswith("| E+L | ") and "| 0.25 | 0.38 |" in line)
    assert line.count("|") == 5 + len(tasks)
    assert all(f"| {method} | " in written for method in methods)
    assert len(list((tmp_path / "plots").glob("*.svg"))) == 2


def test_a_task_in_bfloat16_can_be_trained_in_float32(encoder, recordings, tmp_path, one_rate):
    words = ["--methods", common.HEAD, "--tasks", "orders"]
    losses = []
    for more in ([], ["--no_bf16"]):  # A stored training in another precision is not used.
        files = run(encoder, recordings, tmp_path, *words, *more)
        found = [json.loads(content)["result"] for content in files.values()]
        losses.append({(result["seed"], result["bf16"]): result["loss"] for result in found})
        assert "test slot_milk" in next(result["errors"] for result in found if result["seed"])
    half, single = losses
    assert ({*half}, {*single}) == ({(0, True), (1, True)}, {(0, False), (1, False)})
    assert half[0, True] == pytest.approx(single[0, False], rel=0.02)
    assert half[0, True] != single[0, False]


def grid(tmp_path, model="", **options):
    words = {"name": "tiny", "recordings": Path(), "output_dir": tmp_path, "model_name_or_path": str(model)}
    return quality.Grid(argparse.Namespace(**words, **{"seeds": None, "head_rate": None, "methods": None} | options))


def result(rate, seed=0, fold=0, method="E", task="emotions", **errors):
    return quality.Result("tiny", task, method, rate, 0.1, seed, fold, errors, (1, 1), 0.0, 0.0)


@pytest.mark.parametrize(
    ("best", "lowest", "highest", "chosen"),
    [
        (0.001, 3e-4, 1e-2, 0.001),  # Nothing beyond the four is tried.
        (0.1, 3e-4, 0.3, 0.09),
        (1e-9, 3e-6, 1e-2, 3e-6),  # It stops after four more.
    ],
)
def test_rates_beyond_the_best_one_are_tried(monkeypatch, tmp_path, best, lowest, highest, chosen):
    tried = []

    def train(grid, training):
        tried.append(training.rate)
        return result(training.rate, task="words", validation=abs(np.log(training.rate / best)))

    monkeypatch.setattr(quality, "read_folds", lambda *_: [{}])
    monkeypatch.setattr(quality.Grid, "train", train)
    assert grid(tmp_path).choose([("words", "E")], {"words": 0.1}, map) == [("words", "E", chosen, 0.1)]
    assert (min(tried), max(tried)) == (lowest, highest)
    assert len(tried) == len(set(tried))


def test_the_rate_of_the_heads_is_that_of_the_head_alone_or_given(monkeypatch, tmp_path):
    def train(grid, training):
        trained.append(training)
        return quality.Result(**vars(training), errors={"validation": 1}, trained=(1, 1), loss=1.0, seconds=1.0)

    monkeypatch.setattr(quality, "read_folds", lambda *_: [{}])
    monkeypatch.setattr(quality.Grid, "train", train)
    for given in (None, 0.007):
        trained = []
        grid(tmp_path, tasks=["words"], methods=[common.HEAD, "E"], head_rate=given).run()
        alone = {training.rate for training in trained if training.method == common.HEAD and training.seed}
        assert {training.head_rate for training in trained if training.method == "E"} == ({given} if given else alone)
        assert all(one.head_rate == one.rate for one in trained if one.method == common.HEAD)


def test_rates_are_chosen_by_the_mean_over_folds_that_hold_two_speakers_out(tmp_path):
    rows = [{"speaker_id": speaker} for speaker in "abcabc"]
    folds = list(quality.speaker_folds({"train": rows[:2], "validation": rows[2:4], "test": rows[4:]}))
    speakers = [[{row["speaker_id"] for row in fold[split]} for split in ("train", "test")] for fold in folds]
    assert [(len(train), len(test), train & test) for train, test in speakers] == [(1, 1, set())] * 3

    errors = {(0.1, 0): 10, (0.1, 1): 50, (0.2, 0): 20, (0.2, 1): 30}
    results = [result(rate, fold=fold, validation=error) for (rate, fold), error in errors.items()]
    results += [result(rate, 1, fold, validation=0, test=0) for rate, fold in errors]
    for number, one in enumerate(results):
        file = tmp_path / f"tiny/emotions/E-0-0-0-{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"result": vars(one)}))
    quality.main(["collect", "--output_dir", str(tmp_path), "--json", str(tmp_path / "all.json")])
    kept = report_quality.read_results(tmp_path / "all.json")
    assert {one.rate for one in kept if one.seed} == {0.2}
    assert len(kept) == 6


def test_the_page_has_the_tables_of_its_results(tmp_path):
    page = Path(shutil.copy(DOCS / "measured.md", tmp_path))
    before = page.read_text(encoding="utf-8")
    words = ["--json", str(DOCS / "measured.json"), "--page", str(page)]
    report_quality.main([*words, "--cost", "Whisper tiny.en", str(DOCS / "measured-cost.json")])
    assert page.read_text(encoding="utf-8") == before
    for encoder in {found["encoder"] for found in json.loads((DOCS / "measured.json").read_text())}:
        assert f"<!-- table: {encoder}, methods -->" in before


def test_p_values_are_of_paired_seeds():
    def results(*errors):
        return [result(0.1, seed, test=error) for seed, error in enumerate(errors, start=1)]

    # By hand: differences 1, 2, 3 have a mean of 2 and a standard error of 1 / sqrt(3), so t = 3.464 with 2 degrees.
    assert report_quality.compare(results(2, 4, 6), results(1, 2, 3)) == (2, pytest.approx(0.0742, abs=1e-4))
    assert report_quality.compare(results(1.1, 2.1, 3.1), results(1, 2, 3)) == (pytest.approx(0.1), None)
    assert report_quality.compare(results(1), results(2)) == (-1, None)


# compare_methods -----------------------------------------------------------------------------------------------------


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
    words = ["--grid", str(tmp_path / "grid.json"), "--output_dir", str(tmp_path / "runs")]
    plan = {"tasks": {"words": f"{script} --steps 3"}, "methods": {"ELP": "--method elp"}, "seeds": [0, 2]}
    Path(words[1]).write_text(json.dumps(plan))
    assert compare_methods.main(words) == 0
    line = "| ELP | 1,234 | 5 | 0.500 ± 0.000 | 60.0 ± 14.1 | 2 |"
    assert line in (tmp_path / "runs" / "table.md").read_text()
    assert capsys.readouterr().out.count(" took ") == 2

    plan["methods"]["new"] = "--method broken"
    Path(words[1]).write_text(json.dumps(plan))
    assert compare_methods.main(words) == 2
    said = capsys.readouterr().out
    assert (said.count(" took "), said.count("FAILED")) == (0, 2)  # what is done is done
    assert "| new | - | - | - | - | 0 |" in said


def test_a_grid_has_settings_of_one_method_in_one_task():
    plan = {"tasks": {"a": "a.py", "b": "b.py"}, "methods": {"x": "--x 1", "y": "--y 1"}, "seeds": [0]}
    plan["settings"] = {"b": {"x": "--z 2"}}
    commands = compare_methods.commands_of(plan)
    assert [run for run, command in commands.items() if "--z" in command] == [("b", "x", 0)]
    for unknown in ({"c": {}}, {"a": {"z": ""}}):
        with pytest.raises(ValueError, match="which is not in"):
            compare_methods.commands_of({**plan, "settings": unknown})
