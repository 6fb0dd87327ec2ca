"""From a folder of recordings to an adapter: what is refused, what is chosen, what is saved and reported."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset
from on_disk import save_base, save_whisper
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

import peft_elp
from peft_elp_command import main

pytest.importorskip("optuna")

from peft_elp.automl import features as features_module
from peft_elp.automl import live, measures, report, search, split, transcribe
from peft_elp.automl import look as look_module
from peft_elp.automl.features import Base
from peft_elp.automl.look import look
from peft_elp.automl.reader import Problem, Setting, answer, cool, place, train_reader
from peft_elp.automl.split import make_folds
from peft_elp.automl.train import train
from peft_elp.speech.inference import SpeechAdapter

RATE_HZ = 16_000
TONES = {"low": 300, "middle": 1200, "high": 4000}
ODD = {"<b>bold</b>": 300, "=1+1": 1200, "../x": 2400, "صوت 声音": 4000}
SPEAKERS = ("Ann", "Bob", "Cem", "Dao")


def tone(path: Path, hz: float, seed: int, seconds: float = 0.4, rate_hz: int = RATE_HZ) -> str:
    """A noisy tone; the seed gives its loudness and phase."""
    random = np.random.default_rng(seed)
    time_s = np.arange(int(seconds * rate_hz)) / rate_hz
    sound = random.uniform(0.1, 0.3) * np.sin(2 * np.pi * hz * time_s + random.uniform(0, 6))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound + random.normal(scale=0.02, size=len(sound)), rate_hz)
    return str(path)


def folders(folder: Path, clips: int = 8, classes=TONES, **options) -> Path:
    """A folder of recordings for each class."""
    for number, (name, hz) in enumerate(classes.items()):
        for clip in range(clips):
            tone(folder / name / f"{clip}.wav", hz, 100 * number + clip, **options)
    return folder


def table(folder: Path, classes=TONES, clips: int = 12, splits=("train",) * 8 + ("test",) * 4, **columns) -> Path:
    """A table with speakers and splits: each speaker is in one of the splits."""
    rows = []
    for number, (name, hz) in enumerate(classes.items()):
        for clip in range(clips):
            file = f"{number}-{clip}.wav"
            tone(folder / file, hz, 100 * number + clip)
            split = splits[clip]
            speaker = f"{split} {SPEAKERS[clip % 4]}"
            rows.append({"file_name": file, "label": name, "speaker": speaker, "split": split, **columns})
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_folds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "FOLDS", 3)
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    return {
        "wav2vec2": save_base(place / "wav2vec2", "wav2vec2", init_std=0.4),
        "whisper": str(save_whisper(place / "whisper")),
    }


@pytest.fixture
def one_epoch(monkeypatch):
    monkeypatch.setattr(live, "EPOCHS", 1)


def run(recordings, base, output, **options):
    return train(recordings, base, output, **{"trials": 3, "minutes": 1, "progress": False, **options})


@pytest.fixture(scope="module", params=["wav2vec2", "whisper"])
def made(request, bases, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    recordings = table(place / "recordings", ODD)
    return recordings, run(recordings, bases[request.param], place / "adapter", trials=4)


def test_tones_are_learned_and_the_verdict_says_so(made):
    _, trained = made
    facts = trained.report.facts
    assert facts["result"]["metrics"]["accuracy"]["value"] > 0.7
    assert trained.report.summary().startswith("Better than chance (25.0 %)")
    assert facts["measured_on"] == "test"
    assert facts["clips"] == 16


def test_the_saved_adapter_answers_as_the_search_did(made):
    recordings, trained = made
    assert answers_as_reported(recordings, trained)


@pytest.mark.parametrize(
    ("name", "l_dim", "in_memory", "tolerance"),
    [
        ("wav2vec2", 0, 2e9, 1e-4),
        ("wav2vec2", 6, 2e9, 1e-4),
        ("whisper", 0, 2e9, 1e-4),
        ("whisper", 6, 2e9, 1e-4),
        ("whisper", 6, 0, 2e-2),  # half precision, read from files
    ],
)
def test_a_reader_and_its_saved_adapter_give_the_same_logits(
    bases, tmp_path, monkeypatch, name, l_dim, in_memory, tolerance
):
    monkeypatch.setattr(features_module, "IN_MEMORY", in_memory)
    found = look(folders(tmp_path / "tones", clips=4), progress=False)
    base = Base(bases[name], found.names, found.longest_s)
    features = base.read(found.rows, tmp_path / "features", progress=False)
    labels = torch.tensor([found.names.index(label) for label in found.labels])
    problem, rows = Problem(features, labels, 3, width=base.width), list(range(12))
    reader, _, _ = train_reader(problem, Setting((0, 1), l_dim, steps=10), rows)
    expected = answer(problem, reader, rows) / 2.0
    model = base.adapted(l_dim=l_dim, l_layers=[0, 1], l_input_norm=True)
    place(reader.folded(), model)
    cool(model, 2.0)
    with torch.no_grad():
        logits = [model(**base.collate([found.rows[row]])).logits[0] for row in rows]
    torch.testing.assert_close(torch.stack(logits), expected, atol=tolerance, rtol=tolerance)


def test_the_numbers_of_the_report_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    right, answered = random.integers(4, size=60), random.integers(4, size=60)
    own = measures.metrics_of(measures.confusion_matrix(right, answered, 5))
    assert own["accuracy"] == pytest.approx(accuracy_score(right, answered))
    assert own["unweighted_accuracy"] == pytest.approx(balanced_accuracy_score(right, answered))
    assert own["f1"] == pytest.approx(f1_score(right, answered, labels=[0, 1, 2, 3], average="macro"))


def test_the_report_escapes_labels_and_links_to_recordings(made):
    _, trained = made
    page = (trained.folder / "report.html").read_text(encoding="utf-8")
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "صوت 声音" in page
    assert not re.search(r"(src|href)=\"https?:", page)
    saved = json.loads((trained.folder / "report.json").read_text(encoding="utf-8"))
    assert saved["verdict"] == trained.report.facts["verdict"]
    assert "<b>bold" not in (trained.folder / "README.md").read_text(encoding="utf-8")


def test_links_of_the_report_lead_from_the_folder_of_the_adapter(tmp_path):
    file = tone(tmp_path / "clips #1" / "a b.wav", 300, 0)
    found = report.link(file, tmp_path / "adapter")
    assert found == "../clips%20%231/a%20b.wav"


def test_the_same_seed_gives_the_same_adapter_and_another_seed_other_folds(bases, tmp_path):
    recordings = folders(tmp_path / "tones")
    one, two = (run(recordings, bases["wav2vec2"], tmp_path / name).report.facts for name in ("one", "two"))
    for facts in (one, two):
        facts.pop("seconds")
        for row in [*facts["candidates"], facts["chosen"], facts["head"]]:
            row.pop("seconds")
    assert one == two
    found = look(recordings, progress=False)
    assert make_folds(found, 0)[0] != make_folds(found, 1)[0]


def test_without_a_test_split_the_figures_are_of_held_out_folds_and_the_report_warns(bases, tmp_path):
    trained = run(folders(tmp_path / "tones"), bases["wav2vec2"], tmp_path / "adapter", trials=1)
    assert trained.report.facts["measured_on"] == "held-out"
    assert "There is no test split" in trained.report.summary()
    assert trained.report.facts["clips"] == 24


def test_an_output_is_overwritten_only_on_request(bases, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    recordings = folders(tmp_path / "tones")
    with pytest.raises(FileExistsError, match=r"exists. Choose another output, or replace it with overwrite"):
        run(recordings, bases["wav2vec2"], tmp_path / "adapter")
    run(recordings, bases["wav2vec2"], tmp_path / "adapter", trials=1, overwrite=True)
    assert not (tmp_path / "adapter" / "mine.txt").exists()


@pytest.mark.parametrize("further", [False, True])
def test_voices_are_compared_on_other_speakers(bases, tmp_path, one_epoch, monkeypatch, further):
    monkeypatch.setattr(live, "is_better", lambda *_: True)
    voices = {f"v{number}": 250 * (number + 1) for number in range(9)}
    splits = {name: "test" if number % 3 == 2 else "train" for number, name in enumerate(voices)}
    rows = []
    for name, hz in voices.items():
        for clip in range(5):
            tone(tmp_path / "voices" / f"{name}-{clip}.wav", hz, clip)
            rows.append(f"{name}-{clip}.wav,{name},{splits[name]}")
    (tmp_path / "voices" / "metadata.csv").write_text("file_name,speaker_id,split\n" + "\n".join(rows))
    options = {"task": "verify", "trials": 3, "live": further}
    trained = run(tmp_path / "voices", bases["wav2vec2"], tmp_path / "adapter", **options)
    facts = trained.report.facts
    assert facts["result"]["metrics"]["eer"]["value"] < 0.4
    files = [tmp_path / "voices" / f"v2-{clip}.wav" for clip in range(2)]
    assert trained.adapter.verify(*files).threshold == pytest.approx(facts["threshold"])
    embeddings = dict(enumerate(trained.adapter.embed(files)))
    assert np.isfinite(embeddings[0]).all()
    assert trained.adapter.saved.config["adapters"] == ("EL" if further else "L")


# Trained on the recordings themselves --------------------------------------------------------------------------------


def answers_as_reported(recordings, trained):
    wrong = trained.report.facts["result"]["confusion"]
    adapter = SpeechAdapter.from_pretrained(trained.folder, base=trained.base, dtype="float32")
    found = look(recordings, progress=False)
    names = found.names
    confusion = np.zeros_like(wrong)
    for number in found.where("test"):
        best = adapter.classify(found.table["file"][number], top_k=1)[0]
        confusion[names.index(found.labels[number]), names.index(best["label"])] += 1
    return confusion.tolist() == wrong


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_what_is_trained_on_recordings_is_kept_if_it_is_better(bases, tmp_path, one_epoch, monkeypatch, kept, name):
    monkeypatch.setattr(live, "is_better", lambda *_: kept)
    recordings = table(tmp_path / "recordings", splits=("train",) * 8 + ("test",) * 3, clips=11)
    trained = run(recordings, bases[name], tmp_path / "adapter", trials=1, live=True)
    assert trained.adapter.saved.config["adapters"] == ("EL" if kept else "L")
    assert ("That was kept." if kept else "was not kept") in trained.report.summary()
    assert answers_as_reported(recordings, trained)


def test_augmentation_changes_a_recording_and_makes_it_no_longer():
    sound = np.sin(np.arange(8000, dtype=np.float32))
    one, other = (live.augmented(sound, RATE_HZ, np.random.default_rng(seed)) for seed in (0, 1))
    assert max(len(one), len(other)) <= 8000
    assert one.dtype == np.float32
    assert not np.allclose(one[:4000], other[:4000])


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_texts_are_trained_measured_before_and_after_and_written_by_the_adapter(bases, tmp_path, one_epoch, name):
    recordings = table(tmp_path / "recordings", {"a bad dog": 300, "no lid": 2000})
    (recordings / "metadata.csv").write_text((recordings / "metadata.csv").read_text().replace("label", "text"))
    trained = run(recordings, bases[name], tmp_path / "adapter", minutes=0.01)
    facts = trained.report.facts
    files = [recordings / f"{number}-{clip}.wav" for number in range(2) for clip in range(8, 12)]
    written = trained.adapter.transcribe(files)
    assert jiwer.wer(["a bad dog"] * 4 + ["no lid"] * 4, written) == pytest.approx(
        facts["result"]["metrics"]["wer"]["value"]
    )
    assert facts["beside"] == ("writing nothing" if name == "wav2vec2" else "the base before training")
    assert "than writing nothing (100.0 %): word error rate" in trained.report.summary()
    assert "a bad dog" in (trained.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def training_of_texts(bases, tmp_path, monkeypatch):
    """Trains on texts; a function is called where an epoch is measured."""
    recordings = table(tmp_path / "recordings", {"a bad dog": 300, "no lid": 2000})
    (recordings / "metadata.csv").write_text((recordings / "metadata.csv").read_text().replace("label", "text"))
    measured = transcribe.of_texts
    monkeypatch.setattr(transcribe, "compare", lambda _, *answers: report.compare(measured, *answers))

    def start(meanwhile):
        monkeypatch.setattr(transcribe, "of_texts", lambda *answers: meanwhile() or measured(*answers))
        return run(recordings, bases["wav2vec2"], tmp_path / "adapter").report.facts

    return start


def test_ctrl_c_ends_a_training_on_recordings_and_keeps_its_best_epoch(training_of_texts, tmp_path):
    facts = training_of_texts(lambda: signal.raise_signal(signal.SIGINT))
    assert len(facts["curve"]) == len(facts["losses"]) == 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_killed_training_on_recordings_goes_on_where_it_was(training_of_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "EPOCHS", 3)
    epochs = iter(range(1, 9))
    with pytest.raises(RuntimeError, match="killed"):
        training_of_texts(lambda: killed() if next(epochs) == 2 else None)
    (unfinished,) = (tmp_path / "adapter.search").glob("live-*/checkpoint-*")
    (unfinished.parent / "checkpoint-9").mkdir()  # killed while it was saved
    facts = training_of_texts(lambda: next(epochs) and None)
    assert (len(facts["curve"]), next(epochs)) == (3, 5)  # Two of three epochs were left.
    assert not unfinished.exists()


def killed():
    raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("written", "what"),
    [
        (["", "", "", "a"], "3 of 4 texts are empty"),
        (["a b", "a b", "a b", "c"], "3 of 4 texts are 'a b'"),
        (["no no no no no no no", "a b a b a b a b a b", "c"], "2 of 3 texts repeat their words"),
        (["one", "two", "three"], None),
    ],
)
def test_a_model_that_writes_only_padding_or_repeats_is_told(written, what):
    said = list(transcribe._degenerate(written))
    assert (what in said[0]) if what else not said


# What is in a folder -------------------------------------------------------------------------------------------------


def test_speakers_are_found_in_columns_and_in_folders_and_are_not_split(tmp_path):
    for speaker in SPEAKERS:
        for name, hz in TONES.items():
            for clip in range(3):
                tone(tmp_path / "tones" / name / speaker / f"{clip}.wav", hz, clip)
    found = look(tmp_path / "tones", progress=False)
    assert set(found.speakers or ()) == set(SPEAKERS)
    folds, how = make_folds(found, seed=0)
    assert "no speaker in two of them" in how
    for fold in folds:
        assert not {found.speakers[i] for i in fold.train} & {found.speakers[i] for i in fold.held_out}


def test_a_small_validation_split_joins_training_and_the_test_split_is_in_no_fold(tmp_path):
    found = look(table(tmp_path, splits=("train",) * 6 + ("validation",) * 2 + ("test",) * 4), progress=False)
    folds, how = make_folds(found, seed=0)
    assert "training and validation together" in how
    held_out = sorted(i for fold in folds for i in fold.held_out)
    assert held_out == found.where("train", "validation")


def test_split_folders_are_read(tmp_path):
    for name in ("train", "test"):
        folders(tmp_path / name, clips=3)
    assert len(look(tmp_path, progress=False).where("test")) == 9


def empty(place):
    place.mkdir()


def one_class(place):
    folders(place, classes={"only": 300})


def one_clip_each(place):
    folders(place, clips=1)


def many_classes_few_files(place):
    for number in range(200):
        tone(place / f"class {number}" / "a.wav", 300, 0, seconds=0.02)


def broken(place):
    folders(place)
    (place / "low" / "broken.wav").write_bytes(b"RIFF nonsense")
    (place / "low" / "empty.wav").touch()


def only_text(place):
    place.mkdir()
    tone(place / "a.wav", 300, 0)
    (place / "metadata.csv").write_text("file_name,text\na.wav,hello\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty, "There are no labelled recordings in .*holds nothing"),
        (one_class, "needs at least two classes, got 'only'"),
        (one_clip_each, "3 of 3 classes have a single recording"),
        (many_classes_few_files, "200 of 200 classes have a single recording"),
        (broken, "2 of 26 recordings cannot be used"),
        (only_text, "needs at least two texts, got 'hello'"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused(tmp_path, make, message):
    make(tmp_path / "folder")
    with pytest.raises(ValueError, match=message):
        look(tmp_path / "folder", progress=False)


def test_a_test_split_with_one_voice_is_refused(tmp_path):
    for name, count in {"train": 4, "test": 1}.items():
        for number in range(count):
            for clip in range(3):
                tone(tmp_path / name / f"{name} {number}" / f"{clip}.wav", 300 + 100 * number, clip)
    with pytest.raises(ValueError, match=r"a test split with two speakers.* Got 3 recordings of test 0"):
        look(tmp_path, task="verify", progress=False)


def test_a_bootstrap_passes_over_draws_of_one_speaker(monkeypatch):
    monkeypatch.setattr(report, "LEAST_SPEAKERS", 2)
    voices = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    measured = report.verification(["a", "a", "b", "b"], voices, voices.flip(0), seed=0)["metrics"]["eer"]
    assert measured == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        look(tmp_path / "nowhere", progress=False)


def test_broken_files_are_left_out_on_request(tmp_path):
    broken(tmp_path / "tones")
    found = look(tmp_path / "tones", skip_bad=True, progress=False)
    assert len(found.labels) == 24
    assert any("2 recordings cannot be read and are left out" in warning for warning in found.warnings)


def test_a_link_out_of_the_folder_and_mixed_formats_are_read(tmp_path):
    folders(tmp_path / "tones", clips=3, classes={**TONES, "\x1b[31mred": 500})
    said: list[str] = []
    look(tmp_path / "tones", progress=False).show(said.append)
    assert r"\x1b[31mred" in "".join(said)
    assert "\x1b" not in "".join(said)
    tone(tmp_path / "elsewhere.flac", 300, 7, rate_hz=8000)
    (tmp_path / "tones" / "low" / "link.flac").symlink_to(tmp_path / "elsewhere.flac")
    assert sorted(set(look(tmp_path / "tones", progress=False).table["rate_hz"])) == [8000, 16_000]


def test_parquet_files_are_read(tmp_path):
    found = look(table(tmp_path / "tones"), progress=False)
    (tmp_path / "parquet").mkdir()
    for name in ("train", "test"):
        rows = found.where(name)
        audio = [{"path": f"{i}.wav", "bytes": Path(found.table["file"][i]).read_bytes()} for i in rows]
        data = Dataset.from_dict({"audio": audio, "label": [found.labels[i] for i in rows]})
        data.cast_column("audio", Audio(decode=False)).to_parquet(tmp_path / "parquet" / f"{name}.parquet")
    again = look(tmp_path / "parquet", progress=False)
    assert again.labels == [found.labels[i] for i in found.where("train") + found.where("test")]
    assert again.table["split"].value_counts().to_dict() == {"train": 24, "test": 12}


def test_what_is_neither_a_folder_nor_on_the_hub_is_told(monkeypatch):
    def missing(name):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(look_module, "get_dataset_split_names", missing)
    with pytest.raises(
        ValueError, match=r"me/no-such-data is not a folder, and datasets cannot load it: Couldn't reach"
    ):
        look("me/no-such-data", progress=False)


def test_a_thousand_classes_are_trained(bases, tmp_path):
    names = {f"class {number}": 200 + 7 * number for number in range(1000)}
    trained = run(folders(tmp_path / "many", 2, names, seconds=0.05), bases["wav2vec2"], tmp_path / "a", trials=1)
    assert trained.report.facts["clips"] == 2000
    assert "And 900 more classes in report.json" in (tmp_path / "a" / "report.html").read_text(encoding="utf-8")


def warned(place, **options):
    return " ".join(look(place, progress=False, **options).warnings)


def test_what_speaks_against_the_data_is_said(tmp_path):
    few = folders(tmp_path / "few", clips=3)
    assert "3 classes have fewer than 10 recordings" in warned(few)
    soundfile.write(few / "low" / "silent.wav", np.zeros(8000), RATE_HZ)
    assert "silent" in warned(few)
    (few / "high" / "copy.wav").write_bytes((few / "low" / "0.wav").read_bytes())
    assert "1 recordings are in two classes" in warned(few)
    for number, hz in enumerate(TONES.values()):
        folders(tmp_path / "rates", classes={f"c{number}": hz}, rate_hz=8000 * (number + 1))
        folders(tmp_path / "lengths", classes={f"c{number}": hz}, seconds=0.2 * (number + 1))
    assert "Each class has one sampling rate" in warned(tmp_path / "rates")
    assert "durations of the classes do not overlap" in warned(tmp_path / "lengths")
    apart = table(tmp_path / "split")
    (apart / "0-11.wav").write_bytes((apart / "0-0.wav").read_bytes())
    text = (apart / "metadata.csv").read_text().replace("test Ann", "train Ann")
    (apart / "metadata.csv").write_text(text)
    assert "1 recordings are in two splits" in warned(apart)
    assert "1 speakers are in training and in test: train Ann" in warned(apart)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "rank"}, "task must be one of"),
        ({"metric": "bleu"}, "metric must be one of unweighted_accuracy, accuracy, f1, got 'bleu'"),
        ({"minutes": 0}, "minutes must be above 0, got 0"),
        ({"chunk_length": 0}, "chunk_length must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"engine": "spark"}, "engine must be one of local, ray, got 'spark'"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"device": "cuda:1"}, "device must be a kind, such as 'cuda', got 'cuda:1'.* CUDA_VISIBLE_DEVICES"),
        ({"base": "no/such base"}, "The base 'no/such base' cannot be used"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tmp_path, bases, options, message):
    with pytest.raises(ValueError, match=message):
        run(**{"recordings": tmp_path / "nowhere", "base": bases["wav2vec2"], "output": tmp_path / "out", **options})


def test_recordings_beyond_the_window_of_the_encoder_are_refused_by_number(bases, tmp_path, capsys):
    recordings = folders(tmp_path / "long", clips=2, seconds=1.2)
    message = "6 of 6 recordings are longer than the 1 s that the encoder reads: .*0.wav"
    with pytest.raises(ValueError, match=f"{message}.*'skip' leaves them out, 'crop' reads their beginning"):
        run(recordings, bases["whisper"], tmp_path / "adapter")
    assert main(["train", str(recordings), "--check-only", "--base", bases["whisper"]]) == 0
    assert re.search(f"Warning: {message}", capsys.readouterr().out)
    with pytest.raises(ValueError, match="would cut speech but not its text"):
        features_module.fit_window(replace(look(recordings, progress=False), task="transcribe"), 1, "crop")


@pytest.mark.parametrize(("on_long_audio", "clips"), [("skip", 12), ("crop", 13)])
def test_recordings_beyond_the_window_are_left_out_or_cropped_on_request(bases, tmp_path, on_long_audio, clips):
    recordings = folders(tmp_path / "tones", clips=4)
    tone(recordings / "low" / "long.wav", 300, 0, seconds=1.2)
    trained = run(recordings, bases["whisper"], tmp_path / "a", trials=1, on_long_audio=on_long_audio)
    facts = trained.report.facts
    assert (facts["clips"], facts["data"]["overview"][-1]["longest"] <= 1) == (clips, True)
    assert "1 of 13 recordings are longer than the 1 s that the encoder reads" in facts["warnings"][-1]


def test_a_head_that_does_not_average_over_frames_is_refused(tmp_path):
    config = ASTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_mel_bins=16, max_length=64
    )
    ASTForAudioClassification(config).save_pretrained(tmp_path / "ast")
    ASTFeatureExtractor(num_mel_bins=16, max_length=64).save_pretrained(tmp_path / "ast")
    with pytest.raises(ValueError, match=r"ASTForAudioClassification does not average over frames .* Choose another"):
        run(folders(tmp_path / "tones", clips=2), str(tmp_path / "ast"), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wav2vec2", {"chunk_length": 1}, "chunk_length shortens a fixed window, such as Whisper's"),
        ("wav2vec2", {"label": "loudness"}, "There is no column 'loudness'; the data set has audio, label"),
        ("wav2vec2", {"task": "transcribe"}, "No column tells the texts; the data set has audio, label"),
    ],
)
def test_options_that_do_not_fit_are_refused(bases, tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        run(folders(tmp_path / "tones", clips=2), bases[name], tmp_path / "adapter", **options)


@pytest.mark.parametrize(("name", "options"), [("wav2vec2", {"dtype": "bfloat16"}), ("whisper", {"chunk_length": 1})])
def test_dtype_and_window_can_be_chosen(bases, tmp_path, name, options):
    trained = run(table(tmp_path / "recordings"), bases[name], tmp_path / "adapter", trials=2, **options)
    assert trained.report.facts["result"]["metrics"]["accuracy"]["value"] > 0.5


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_trains_and_says_what_the_adapter_is_worth(bases, tmp_path, capsys):
    recordings, output = table(tmp_path / "recordings"), tmp_path / "adapter"
    words = ["train", str(recordings), "--base", bases["wav2vec2"], "--output", str(output)]
    assert main([*words, "--trials", "2", "--no-live"]) == 0
    said = capsys.readouterr().out
    assert "Task: name classes (label from 'label', speaker from 'speaker')." in said
    assert re.search(
        r"Better than chance \(33.3 %\): unweighted accuracy .*\nSaved in .*report.html tells the rest", said
    )
    assert main(words) == 1
    assert "exists. Choose another output, or replace it with overwrite (--overwrite)." in capsys.readouterr().err


def test_the_command_names_the_extra_that_is_missing(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("peft_elp.automl")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(peft_elp, "automl")
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["train", str(tmp_path), "--check-only"]) == 1
    assert "pip install 'peft-elp[train]'" in capsys.readouterr().err


def test_the_command_needs_a_base_and_an_output(tmp_path, capsys):
    assert main(["train", str(tmp_path)]) == 2
    assert "training needs --base and --output" in capsys.readouterr().err


# The search ----------------------------------------------------------------------------------------------------------


def candidate(number, scores, l_dim=0, layers=(3,)):
    return search.Candidate(Setting(layers, l_dim), 10, scores, [], 1.0, number)


def test_the_smallest_candidate_within_one_standard_error_of_the_best_is_chosen():
    best = candidate(0, [0.9, 0.92, 0.88], l_dim=32)
    close, far = candidate(1, [0.91, 0.9, 0.87]), candidate(2, [0.8, 0.82, 0.78])
    assert search.choose([best, close, far], 384).number == 1
    assert search.choose([best, far], 384).number == 0


def test_a_temperature_makes_scores_of_held_out_answers_right():
    random = np.random.default_rng(0)
    right = torch.tensor(random.integers(3, size=2000))
    logits = torch.tensor(random.normal(size=(2000, 3)), dtype=torch.float32)
    drawn = torch.distributions.Categorical(logits=logits).sample()
    temperature = report.fit_temperature(5 * logits, drawn)
    assert temperature == pytest.approx(5, rel=0.15)
    assert right.shape == drawn.shape


PROGRAM = """
import sys
from peft_elp.automl import split
from peft_elp.automl.train import train
if __name__ == "__main__":
    split.FOLDS = 3
    train(*sys.argv[1:4], trials=1000, minutes=1, progress=False)
"""


def test_a_killed_search_goes_on_and_an_interrupted_one_is_saved(bases, tmp_path, monkeypatch):
    arguments = [str(folders(tmp_path / "tones")), bases["wav2vec2"], str(tmp_path / "adapter")]
    journal = tmp_path / "adapter.search" / "trials.log"
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments]) as process:
        while process.poll() is None and not (journal.is_file() and journal.read_text().count('"candidate"') >= 2):
            time.sleep(0.05)
        process.kill()
    assert not (tmp_path / "adapter").exists()
    before = journal.read_text().count('"candidate"')
    evaluate = search.Search.evaluate

    def interrupted(self, *arguments):
        if journal.read_text().count('"candidate"') > before:
            raise KeyboardInterrupt
        return evaluate(self, *arguments)

    monkeypatch.setattr(search.Search, "evaluate", interrupted)
    trained = run(*arguments, trials=1000)
    assert trained.report.facts["tried"] == before + 1
    assert "The search was interrupted" in trained.report.summary()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_processes_side_by_side_share_the_trials(bases, tmp_path, engine):
    if engine == "ray":
        pytest.importorskip("ray")
    options = {"trials": 5, "jobs": 2, "minutes": 5, "engine": engine}
    trained = run(folders(tmp_path / "tones"), bases["wav2vec2"], tmp_path / "adapter", **options)
    numbers = [row["trial"] for row in trained.report.facts["candidates"]]
    assert len(set(numbers)) == len(numbers)
    assert 5 <= trained.report.facts["tried"] <= 6  # Both may have one in hand at the end.


def test_an_interruption_before_the_first_candidate_saves_nothing(bases, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(search.Search, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folders(tmp_path / "tones"), bases["wav2vec2"], tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
