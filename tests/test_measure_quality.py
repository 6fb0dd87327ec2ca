"""The grid of examples/measure_quality.py in a very short form, its report, and the page with the real results."""

import csv
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
from on_disk import record, save_base, save_whisper

pytest.importorskip("jiwer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import measure_quality as quality
import report_quality

ROOT = Path(__file__).parent.parent

# The heads of tiny models are not small beside their encoders.
pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save=.* trains and saves:UserWarning")


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
                rows.append(
                    {"file_name": f"{clip}.wav", "speaker_id": f"{number}{clip % 2}", "transcription_norm": "ab"}
                    | {"emotion": ("calm", "angry")[clip // 2], "label": ("yes", "no")[clip // 2], **slots}
                )
            write(folder / name / split / "metadata.csv", rows)
        trials = [(a % 2 == b % 2, f"test/{a}.wav", f"test/{b}.wav") for a, b in itertools.combinations(range(4), 2)]
        rows = [{"label": int(same), "file_a": a, "file_b": b} for same, a, b in trials]
        for kind in ("trials", "trials_cross"):
            write(folder / name / f"{kind}.csv", rows)
    return folder


def write(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


@pytest.fixture(scope="module", params=["wav2vec2", "whisper"])
def encoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return save_whisper(folder) if request.param == "whisper" else save_base(folder, "wav2vec2")


def test_a_grid_is_trained_once_and_reported(encoder, recordings, tmp_path, monkeypatch):
    tasks = ["voices", "digits", "orders"] if "wav2vec2" in str(encoder) else ["voices", "emotions"]
    methods = [quality.HEAD, quality.L_ONLY, "E+L", quality.LORA, quality.FULL]
    changed = next(iter(quality.CHOICES))
    words = ["run", "--model_name_or_path", str(encoder), "--name", "tiny", "--recordings", str(recordings)]
    words += ["--output_dir", str(tmp_path), "--steps", "1", "--seeds", "2", "--no_bf16"]
    words += ["--methods", *methods, changed]
    for name in quality.METHODS | quality.CHOICES:
        method = (quality.METHODS | quality.CHOICES)[name]
        held = quality.METHODS if name in quality.METHODS else quality.CHOICES
        monkeypatch.setitem(held, name, quality.replace(method, rates=method.rates[:1]))
    emotions = quality.TASKS["emotions"]
    monkeypatch.setitem(
        quality.TASKS,
        "emotions",
        quality.replace(emotions, seconds=1, folds=lambda rows: itertools.islice(emotions.folds(rows), 2)),
    )
    quality.main([*words, "--tasks", *tasks])
    files = {file: file.read_bytes() for file in tmp_path.glob("tiny/*/*.json")}
    quality.main([*words, "--tasks", *tasks])
    assert {file: file.read_bytes() for file in tmp_path.glob("tiny/*/*.json")} == files  # Nothing was trained again.

    summary, page = tmp_path / "measured.json", tmp_path / "page.md"
    quality.main(["collect", "--output_dir", str(tmp_path), "--json", str(summary)])
    results = report_quality.read_results(summary)
    chosen = [result for result in results if result.seed == 0]
    assert {(result.fold, *result.errors) for result in chosen if result.task == "voices"} == {(0, "validation")}
    assert len(chosen) == 6 * (len(tasks) + ("emotions" in tasks))  # Rates are chosen in all folds.
    final = [result for result in results if result.seed]
    assert len(final) == 6 * 2 * (len(tasks) + ("emotions" in tasks))  # Emotions have two folds.
    assert all(0 <= error <= 100 for r in final if r.task != "digits" for error in r.errors.values())
    assert "test across sets" in next(result.errors for result in final if result.task == "voices")
    lora, el = (next(r.trained[0] for r in final if r.method == name) for name in (quality.LORA, "E+L"))
    assert lora == pytest.approx(el, rel=0.25)  # A rank is a whole number, and these encoders are tiny.
    assert next(r.trained[0] for r in final if r.method == quality.HEAD) == 0

    marks = [f"<!-- table: tiny, {name} -->\nold\n<!-- end -->\n" for name in report_quality.REPORTS]
    page.write_text("".join(marks) + "the rest")
    costs = [
        {"method": quality.FULL, "saved_mib": 8, "step_s": [2, 4]},
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
    for method in methods:
        assert f"| {method} | " in written
    assert len(list((tmp_path / "plots").glob("*.svg"))) == 2


def test_several_processes_train_the_same(recordings, tmp_path):
    encoder = save_base(tmp_path / "encoder", "wav2vec2")
    words = ["run", "--model_name_or_path", encoder, "--name", "tiny", "--recordings", str(recordings)]
    words += ["--steps", "1", "--seeds", "1", "--methods", quality.HEAD, "--tasks", "words"]
    found = {}
    for processes in (1, 2):
        quality.main([*words, "--output_dir", str(tmp_path / str(processes)), "--processes", str(processes)])
        files = (tmp_path / str(processes)).glob("tiny/words/*.json")
        found[processes] = {file.name: json.loads(file.read_text()) | {"seconds": 0} for file in files}
    assert found[1] == found[2]
    assert len(found[1]) >= 5


def test_the_rate_of_the_heads_can_be_given(recordings, tmp_path):
    encoder = save_base(tmp_path / "encoder", "wav2vec2")
    words = ["run", "--model_name_or_path", encoder, "--name", "tiny", "--recordings", str(recordings)]
    words += ["--steps", "1", "--seeds", "1", "--methods", quality.HEAD, "E", "--tasks", "words"]
    quality.main([*words, "--output_dir", str(tmp_path), "--head_rate", "0.007"])
    found = [json.loads(file.read_text()) for file in tmp_path.glob("tiny/words/*.json")]
    assert {result["head_rate"] for result in found if result["method"] == "E"} == {0.007}
    assert all(result["head_rate"] == result["rate"] for result in found if result["method"] == quality.HEAD)


def test_a_task_in_bfloat16_can_be_trained_in_float32(recordings, tmp_path, monkeypatch):
    monkeypatch.setitem(quality.METHODS, quality.HEAD, quality.replace(quality.METHODS[quality.HEAD], rates=[0.001]))
    encoder = save_base(tmp_path / "encoder", "wav2vec2")
    words = ["run", "--model_name_or_path", encoder, "--name", "tiny", "--recordings", str(recordings)]
    words += ["--steps", "1", "--seeds", "1", "--methods", quality.HEAD, "--tasks", "orders"]
    found = []
    for folder, more in (("half", []), ("single", ["--no_bf16"])):
        quality.main([*words, "--output_dir", str(tmp_path / folder), *more])
        (file,) = (tmp_path / folder).glob("tiny/orders/*-0-0.json")
        found.append(quality.Result(**json.loads(file.read_text())))
    assert [result.bf16 for result in found] == [True, False]
    assert found[0].loss == pytest.approx(found[1].loss, rel=0.02)
    assert found[0].loss != found[1].loss
    with pytest.raises(ValueError, match=r"was trained in float32, and this run trains in bfloat16\. .*--output_dir"):
        quality.main([*words, "--output_dir", str(tmp_path / "single")])


@pytest.mark.parametrize(
    ("best", "lowest", "highest", "chosen"),
    [
        (0.001, 3e-4, 1e-2, 0.001),  # Nothing beyond the four is tried.
        (0.1, 3e-4, 0.3, 0.09),
        (1e-9, 3e-6, 1e-2, 3e-6),  # It stops after four more.
    ],
)
def test_rates_beyond_the_best_one_are_tried(monkeypatch, best, lowest, highest, chosen):
    tried = []

    def train(grid, training):
        tried.append(training.rate)
        error = abs(quality.np.log(training.rate / best))
        return quality.Result(
            "tiny", training.task, training.method, training.rate, 0.1, 0, 0, {"validation": error}, (1, 1), 0.0, 0.0
        )

    monkeypatch.setattr(quality, "read_folds", lambda *_: [{}])
    monkeypatch.setattr(quality.Grid, "train", train)
    args = quality.argparse.Namespace(name="tiny", recordings=Path(), output_dir=Path())
    found = quality.Grid(args).choose([("words", "E")], {"words": 0.1}, map)
    assert found == {("words", "E"): (chosen, 0.1)}
    assert (min(tried), max(tried)) == (lowest, highest)
    assert len(tried) == len(set(tried))


def test_rates_are_chosen_by_the_mean_over_folds(tmp_path):
    def result(rate, seed, fold, error):
        return quality.Result(
            "tiny", "emotions", "E", rate, 0.1, seed, fold, {"validation": error, "test": error}, (1, 1), 0.0, 0.0
        )

    results = [result(0.1, 0, 0, 10), result(0.1, 0, 1, 50), result(0.2, 0, 0, 20), result(0.2, 0, 1, 30)]
    results += [result(rate, 1, fold, 0) for rate in (0.1, 0.2) for fold in (0, 1)]
    (tmp_path / "tiny/emotions").mkdir(parents=True)
    for number, one in enumerate(results):
        (tmp_path / f"tiny/emotions/E-0-0-0-{number}.json").write_text(json.dumps(vars(one)))
    quality.main(["collect", "--output_dir", str(tmp_path), "--json", str(tmp_path / "all.json")])
    kept = report_quality.read_results(tmp_path / "all.json")
    assert {one.rate for one in kept if one.seed} == {0.2}
    assert len(kept) == 6


def test_folds_hold_two_speakers_out():
    rows = [{"speaker_id": speaker} for speaker in "abcabc"]
    found = list(quality.speaker_folds({"train": rows[:2], "validation": rows[2:4], "test": rows[4:]}))
    assert len(found) == 3
    for fold in found:
        speakers = [{row["speaker_id"] for row in fold[split]} for split in ("train", "validation", "test")]
        assert [len(held) for held in speakers] == [1, 1, 1]
        assert len(set.union(*speakers)) == 3


def test_the_page_has_the_tables_of_its_results(tmp_path):
    page = shutil.copy(ROOT / "docs/reference/measured.md", tmp_path)
    before = Path(page).read_text(encoding="utf-8")
    costs = str(ROOT / "docs/reference/measured-cost.json")
    words = ["--json", str(ROOT / "docs/reference/measured.json"), "--page", page]
    report_quality.main([*words, "--cost", "Whisper tiny.en", costs])
    assert Path(page).read_text(encoding="utf-8") == before
    assert "<!-- table: " in before
    encoders = {result["encoder"] for result in json.loads((ROOT / "docs/reference/measured.json").read_text())}
    for encoder in encoders:
        assert f"<!-- table: {encoder}, methods -->" in before


def test_p_values_are_of_paired_seeds():
    def results(*errors):
        return [
            quality.Result("tiny", "words", "E", 0.1, 0.1, seed, 0, {"test": error}, (1, 1), 0.0, 0.0)
            for seed, error in enumerate(errors, start=1)
        ]

    # By hand: differences 1, 2, 3 have a mean of 2 and a standard error of 1 / sqrt(3), so t = 3.464 with 2 degrees.
    assert report_quality.p_value(results(2, 4, 6), results(1, 2, 3), "test") == pytest.approx(0.0742, abs=1e-4)
    assert report_quality.p_value(results(1.1, 2.1, 3.1), results(1, 2, 3), "test") is None
    assert report_quality.p_value(results(1), results(2), "test") is None
