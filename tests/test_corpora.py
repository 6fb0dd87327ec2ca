"""The readers of published corpora, on miniature folders in the published layouts."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from corpora import fluent_speech_commands, iemocap, librilight, librispeech, voxceleb1

from peft_elp.speech.data import (
    check_audio,
    check_disjoint,
    leave_one_group_out,
    read_dataset,
    read_trials,
)


def record(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 1600), 16000)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def chapter(folder, speaker, number, *texts):
    """A chapter as LibriSpeech publishes it."""
    names = [f"{speaker}-{number}-{index:04}" for index in range(len(texts))]
    record(*(folder / speaker / number / f"{name}.flac" for name in names))
    lines = [f"{name} {text}" for name, text in zip(names, texts, strict=True)]
    write(folder / speaker / number / f"{speaker}-{number}.trans.txt", *lines)


def test_librispeech(tmp_path):
    chapter(tmp_path / "dev-clean", "84", "121123", "GO DO YOU HEAR", "BUT IN LESS")
    chapter(tmp_path / "dev-clean", "174", "50561", "FORGOTTEN TOO")
    chapter(tmp_path / "test-other", "367", "130732", "LOBSTERS")
    dataset = check_audio(librispeech(tmp_path, "dev-clean"))
    assert dataset.column_names == ["audio", "text", "speaker", "chapter", "utterance", "duration_s"]
    assert dataset.remove_columns(["audio", "duration_s"]).to_list()[1:] == [
        {"text": "GO DO YOU HEAR", "speaker": "84", "chapter": "121123", "utterance": "84-121123-0000"},
        {"text": "BUT IN LESS", "speaker": "84", "chapter": "121123", "utterance": "84-121123-0001"},
    ]
    assert dataset[2]["audio"]["path"] == str(tmp_path / "dev-clean/84/121123/84-121123-0001.flac")
    with pytest.raises(ValueError, match=r"There is no .*dev-other"):
        librispeech(tmp_path, "dev-other")


def test_librispeech_notices_what_does_not_belong_together(tmp_path):
    chapter(tmp_path / "dev-clean", "84", "1", "HELLO", "WORLD")
    folder = tmp_path / "dev-clean/84/1"
    record(folder / "84-1-0002.flac")
    with pytest.raises(ValueError, match=r"1 recordings in .* have no text, such as .*84-1-0002\.flac"):
        librispeech(tmp_path, "dev-clean")
    (folder / "84-1-0002.flac").unlink()
    (folder / "84-1-0001.flac").unlink()
    with pytest.raises(ValueError, match=r"1 missing[^$]*84-1-0001\.flac"):
        check_audio(librispeech(tmp_path, "dev-clean"))
    write(folder / "84-1.trans.txt", "84-1-0000")
    with pytest.raises(ValueError, match=r"84-1\.trans\.txt has a line without a text: '84-1-0000'"):
        librispeech(tmp_path, "dev-clean")


def test_librilight_10h_is_1h_and_9h_together(tmp_path):
    for part in range(6):
        chapter(tmp_path / f"1h/{part}/clean", str(100 + part), "1", "A")
    chapter(tmp_path / "9h/clean", "200", "1", "B", "C")
    chapter(tmp_path / "9h/other", "300", "1", "D")
    sizes = {split: len(librilight(tmp_path, split)) for split in ("10min", "1h", "10h")}
    assert sizes == {"10min": 1, "1h": 6, "10h": 9}
    assert set(check_audio(librilight(tmp_path))["speaker"]) == {*map(str, range(100, 106)), "200", "300"}
    with pytest.raises(ValueError, match="split must be one of 10h, 1h, 10min, got '100h'"):
        librilight(tmp_path, "100h")
    (tmp_path / "9h").rename(tmp_path / "nine")
    with pytest.raises(ValueError, match=r"There is no .*9h"):
        librilight(tmp_path)


@pytest.fixture
def vox(tmp_path):
    heard = ["id10001/1zcIwhmdeo4/00001", "id10001/7gWzIy6yIIk/00001", "id10002/6WO410QOeuo/00001"]
    a, b, c = tested = ["id10270/5r0dWxy17C8/00001", "id10270/8jEAjG6SegY/00008", "id10300/ize_eiCFEg0/00003"]
    record(*(tmp_path / f"wav/{name}.wav" for name in (*heard, *tested)))
    write(tmp_path / "veri_test.txt", f"1 {a}.wav {b}.wav", f"0 {a}.wav {c}.wav")
    return tmp_path


def test_voxceleb1_tests_on_the_speakers_of_its_trials(vox):
    (vox / "voices").mkdir()
    for split in ("train", "test"):  # saved as Parquet files, for the recipes
        voxceleb1(vox, split).to_parquet(vox / f"voices/{split}.parquet")
    train, test = (check_audio(read_dataset(vox / "voices", split)) for split in ("train", "test"))
    assert train.column_names == ["audio", "speaker", "video", "duration_s"]
    assert train["speaker"][:] == ["id10001", "id10001", "id10002"]
    assert train["video"][:] == ["1zcIwhmdeo4", "7gWzIy6yIIk", "6WO410QOeuo"]
    check_disjoint(train, test)
    trials = read_trials(vox / "veri_test.txt", vox / "wav")
    assert [trial.label for trial in trials] == [1, 0]
    assert {file for trial in trials for file in trial[1:]} == {entry["path"] for entry in test["audio"]}


def test_voxceleb1_without_its_list_recordings_or_split_is_an_error(vox):
    with pytest.raises(ValueError, match="split must be one of train, test, got 'validation'"):
        voxceleb1(vox, "validation")
    (vox / "wav").rename(vox / "vox1_dev_wav")
    with pytest.raises(ValueError, match=r"There is no .*wav/<speaker>/<video>/<segment>\.wav of the split 'train'"):
        voxceleb1(vox, "train")
    (vox / "veri_test.txt").unlink()
    with pytest.raises(ValueError, match=r"There is no .*veri_test\.txt"):
        voxceleb1(vox, "train")


@pytest.fixture
def emotions(tmp_path):
    """Two sessions; each dialog is of two speakers and named after the one with the markers."""
    heard = {"F000": "ang", "M000": "neu", "F001": "exc", "M001": "hap", "F002": "sad", "M002": "fru", "F003": "xxx"}
    for session in (1, 2):
        folder, dialog = tmp_path / f"Session{session}", f"Ses0{session}F_script01_1"
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
        for turn, label in heard.items():
            lines += [f"[6.2901 - 8.2357]\t{dialog}_{turn}\t{label}\t[2.5000, 2.5000, 2.5000]"]
            lines += ["C-E2:\tNeutral;\t()", ""]
            record(folder / "sentences/wav" / dialog / f"{dialog}_{turn}.wav")
        write(folder / "dialog/EmoEvaluation" / f"{dialog}.txt", *lines)
        write(folder / "dialog/EmoEvaluation/Categorical" / f"{dialog}_e1_cat.txt", f"{dialog}_F000 :Anger; ()")
        (folder / "dialog/EmoEvaluation" / f"._{dialog}.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    return tmp_path


def test_iemocap_has_four_classes_by_session_and_speaker_or_others(emotions):
    dataset = check_audio(iemocap(emotions))
    assert dataset.column_names == ["audio", "label", "session", "speaker", "utterance", "duration_s"]
    assert dataset["label"][:] == ["ang", "neu", "hap", "hap", "sad"] * 2
    assert dataset["speaker"][:5] == ["Ses01F", "Ses01M", "Ses01F", "Ses01M", "Ses01F"]
    assert dataset[5]["utterance"] == "Ses02F_script01_1_F000"
    folds = list(leave_one_group_out(dataset, "session"))
    assert [(one, len(train), len(test)) for one, train, test in folds] == [("Session1", 5, 5), ("Session2", 5, 5)]
    labels = {"fru": "negative", "ang": "negative", "exc": "positive"}
    assert iemocap(emotions, labels)["label"][:3] == ["negative", "positive", "negative"]
    with pytest.raises(ValueError, match="has the class anger; its labels are ang, exc, fru, hap, neu, sad, xxx"):
        iemocap(emotions, {"anger": "anger", "sad": "sad"})


def test_iemocap_does_not_pass_over_what_it_cannot_read(emotions):
    with pytest.raises(ValueError, match=r"There is no .*EmoEvaluation/<dialog>\.txt"):
        iemocap(emotions / "Session1")
    write(emotions / "Session1/dialog/EmoEvaluation/Ses01M_impro01.txt", "[1.0 - 2.0]\tSes01M_impro01_F000 ang")
    with pytest.raises(ValueError, match=r"Ses01M_impro01\.txt has a line"):
        iemocap(emotions)


def test_fluent_speech_commands(tmp_path):
    header = ",path,speakerId,transcription,action,object,location"
    for split, speaker in (("train", "2BqVo8kVB2Skwgyb"), ("valid", "4BrX8aDqK2cLZRYl"), ("test", "7B4XmNppyrCK977p")):
        path = f"wavs/speakers/{speaker}/0a3129c0.wav"
        record(tmp_path / path)
        rows = ['"Lights on, please",activate,lights,kitchen', "Music,activate,music,none"]
        write(tmp_path / f"data/{split}_data.csv", header, *(f"{n},{path},{speaker},{rows[n]}" for n in range(2)))
    train, validation = (fluent_speech_commands(tmp_path, split) for split in ("train", "validation"))
    slots = {"action": "activate", "object": "lights", "location": "kitchen", "label": "activate, lights, kitchen"}
    expected = {"text": "Lights on, please", "speaker": "2BqVo8kVB2Skwgyb", **slots}
    assert check_audio(train).remove_columns(["audio", "duration_s"])[0] == expected
    assert train["location"][:] == ["kitchen", "none"]
    check_disjoint(train, validation)
    assert len(fluent_speech_commands(tmp_path, "valid")) == 2
    with pytest.raises(ValueError, match=r"There is no .*data/dev_data\.csv"):
        fluent_speech_commands(tmp_path, "dev")
    write(tmp_path / "data/test_data.csv", ",path,transcription,action,object", "0,a.wav,Music,activate,music")
    with pytest.raises(ValueError, match="no column location, speakerId"):
        fluent_speech_commands(tmp_path, "test")
