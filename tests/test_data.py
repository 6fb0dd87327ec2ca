"""Recordings and data sets as a user has them: whole, broken, in every layout that the readers know."""

import importlib
import pickle
import re
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from backbones import build
from datasets import Audio, ClassLabel, Dataset, Features, Value

from peft_elp.speech.audio import AudioError, decode
from peft_elp.speech.data import (
    check_audio,
    check_disjoint,
    find_column,
    from_rows,
    label_names,
    leave_one_group_out,
    read_column,
    read_dataset,
    read_trials,
)


def tone(duration_s=0.2, rate_hz=16000, pitch_hz=440):
    return 0.5 * np.sin(2 * np.pi * pitch_hz * np.arange(round(duration_s * rate_hz)) / rate_hz)


def record(path, waveform=None, rate_hz=16000, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(rate_hz=rate_hz) if waveform is None else waveform, rate_hz, **options)
    return path


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refuses(message, call, *args, **options):
    with pytest.raises(ValueError, match=message):
        call(*args, **options)


def fails(audio, **options):
    with pytest.raises(AudioError) as raised:
        decode(audio, **options)
    return raised.value.reason, str(raised.value)


# One recording


def test_a_recording_at_16_khz_is_read_as_it_is_and_channels_are_averaged(tmp_path):
    waveform = tone().astype("float32")
    read = decode(record(tmp_path / "a.wav", waveform, subtype="FLOAT"))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, waveform)
    stereo = np.stack([waveform, np.full(3200, 0.25)], 1)
    read = decode(record(tmp_path / "a.wav", stereo, subtype="FLOAT"))
    np.testing.assert_allclose(read, (waveform + 0.25) / 2, atol=1e-6)


@pytest.mark.parametrize("rate_hz", [8000, 22050, 48000])
def test_another_rate_is_resampled_to_the_same_sound(tmp_path, rate_hz):
    read = decode(record(tmp_path / "a.flac", tone(rate_hz=rate_hz), rate_hz))
    assert len(read) == 3200
    inner = slice(400, -400)  # the filter rings at both ends
    np.testing.assert_allclose(read[inner], tone()[inner], atol=5e-3)
    assert len(decode(tmp_path / "a.flac", rate_hz=8000)) == 1600


class Decoder:
    """As torchcodec's; it takes any file."""

    metadata = SimpleNamespace(duration_seconds=0.05)

    def __init__(self, source):
        self.samples = tone()[:800].astype(np.float32)

    def get_all_samples(self):
        return SimpleNamespace(data=torch.from_numpy(np.stack([self.samples, self.samples / 2])), sample_rate=16000)


def test_the_entry_of_a_data_set_is_what_it_holds_and_not_what_lies_at_its_path(tmp_path):
    path = record(tmp_path / "a.flac")
    whole, part = decode(path), tone()[:800].astype(np.float32)
    np.testing.assert_array_equal(decode({"path": "elsewhere/b.flac", "bytes": path.read_bytes()}), whole)
    for array in (part, torch.from_numpy(part), part.astype(float)):
        for key in ("array", "raw"):
            entry = {key: array, "sampling_rate": 16000, "path": str(path)}
            np.testing.assert_allclose(decode(entry), part, atol=1e-6)
    assert len(decode({"array": part, "sampling_rate": 8000})) == 1600
    np.testing.assert_allclose(decode(Decoder(path)), 0.75 * part, atol=1e-6)


def test_a_missing_or_empty_file_is_an_error(tmp_path):
    (tmp_path / "empty.wav").touch()
    assert fails(tmp_path / "none.wav") == ("missing", "there is no such file")
    assert fails(tmp_path / "empty.wav") == ("empty", "the file is empty")
    assert fails({"path": "a.wav", "bytes": b""})[0] == "empty"
    assert fails(record(tmp_path / "silent.wav", np.zeros(0))) == ("empty", "it holds no sound")
    broken = record(tmp_path / "nan.wav", np.full(800, np.nan), subtype="FLOAT")
    assert fails(broken) == ("unreadable", "it holds samples that are not finite numbers")
    for nothing in (None, "", {"path": None, "bytes": None}):
        assert fails(nothing) == ("missing", "no recording is given")


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
def test_a_recording_that_was_cut_off_is_an_error(tmp_path, kind):
    path = record(tmp_path / f"a.{kind}", np.random.default_rng(0).normal(0, 0.1, 16000))
    decode(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert fails(path)[0] == "unreadable"


@pytest.mark.parametrize("stated", [0x7FFFF000, 0xFFFFFFFF])
def test_a_wav_file_that_was_piped_is_whole_although_its_header_promises_gigabytes(stated):
    samples = (tone() * 32767).astype("<i2").tobytes()
    form = struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)
    header = b"RIFF" + struct.pack("<I", 0xFFFFFFFF) + b"WAVEfmt " + form + b"data" + struct.pack("<I", stated)
    np.testing.assert_allclose(decode({"bytes": header + samples}, max_duration_s=1), tone(), atol=1e-4)


def test_a_recording_over_the_limit_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = record(tmp_path / "a.flac", tone(3))
    assert len(decode(path, max_duration_s=3)) == 48000
    monkeypatch.setattr("soundfile.SoundFile.read", pytest.fail)
    for audio in (path, {"bytes": path.read_bytes()}, {"array": tone(3), "sampling_rate": 16000}):
        reason, message = fails(audio, max_duration_s=2)
        assert (reason, message) == ("too long", "it is too long, 3 s; at most 2 s are allowed (max_duration_s)")


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (20000 * tone(), "its samples reach 10000, expected floats from -1 to 1. Divide 16-bit samples by 32768."),
        (np.zeros((3200, 2)), "it is silent, all samples are 0."),
        (np.stack([tone(), -0.9 * tone()], 1), "its channels have opposite phases and cancel each other"),
    ],
    ids=["16-bit range", "silent", "opposite phases"],
)
def test_a_recording_that_hardly_holds_what_it_should_is_named_in_a_warning(tmp_path, channels, message):
    path = record(tmp_path / "a.wav", channels, subtype="FLOAT")
    with pytest.warns(UserWarning, match=re.escape(f"{path}: {message}")):
        decode(path)
    with pytest.warns(UserWarning, match=re.escape(f"{path}: {message}")):
        check_audio(from_rows([{"audio": path}]))
    if channels.ndim == 1:
        with pytest.warns(UserWarning, match=re.escape(f"The array: {message}")):
            decode({"array": channels, "sampling_rate": 16000})


def test_what_soundfile_cannot_read_goes_to_torchcodec(tmp_path, monkeypatch):
    path = write(tmp_path / "a.m4a", "no sound at all")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert re.fullmatch("soundfile cannot read it .* install torchcodec and ffmpeg", fails(path)[1])
    torchcodec = SimpleNamespace(AudioDecoder=Decoder)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", torchcodec)
    for audio in (path, {"bytes": b"no sound at all"}):
        assert len(decode(audio)) == 800
        assert fails(audio, max_duration_s=0.01)[0] == "too long"
    torchcodec.AudioDecoder = lambda source: soundfile.SoundFile(source)  # a RuntimeError, as of torchcodec
    assert re.fullmatch("neither soundfile .* nor torchcodec .* can read it", fails(path)[1])


def test_the_error_of_a_recording_survives_another_process():
    error = pickle.loads(pickle.dumps(AudioError("there is no such file", "missing")))
    assert (str(error), error.reason) == ("there is no such file", "missing")


# Layouts


LAYOUTS = {  # what lies in a folder: lines of tables, and recordings, of which the first two are those of training
    "metadata.csv": {
        "train/metadata.csv": ["file_name,label", "a.wav,yes", "deep/b.wav,no"],
        "recordings": ["train/a.wav", "train/deep/b.wav"],
    },
    "metadata.jsonl": {
        "train/metadata.jsonl": ['{"file_name": "a.wav", "label": "yes"}', '{"label": "no", "file_name": "b.wav"}'],
        "recordings": ["train/a.wav", "train/b.wav"],
    },
    "labels": {"train/yes/LICENSE": ["not a recording"], "recordings": ["train/no/x/b.WAV", "train/yes/a.wav"]},
    "a table for each split": {
        "train.tsv": ["path\tlabel", "clips/a.wav\tyes", "clips/b.wav\tno"],
        "test.tsv": ["path\tlabel", "clips/c.wav\tyes"],
        "recordings": ["clips/a.wav", "clips/b.wav"],
    },
    "one table": {
        "all.csv": ["split,label,audio", "train,yes,a.wav", "test,no,c.wav", "train,no,b.wav"],
        "recordings": ["a.wav", "b.wav"],
    },
    "one table with splits": {
        "metadata.csv": ["split,label,file_name", "train,yes,a.wav", "test,no,c.wav", "train,no,b.wav"],
        "recordings": ["a.wav", "b.wav"],
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_local_split_is_read_in_every_layout(tmp_path, name):
    files = [record(tmp_path / file, format="WAV") for file in LAYOUTS[name]["recordings"]]
    for table in LAYOUTS[name].keys() - {"recordings"}:
        write(tmp_path / table, *LAYOUTS[name][table])
    place = tmp_path / "all.csv" if name == "one table" else tmp_path
    dataset = read_dataset(place, "train")
    assert dataset.features["audio"] == Audio(decode=False)
    assert [row["path"] for row in dataset["audio"]] == [str(file) for file in files]
    assert dataset["label"][:] == (["no", "yes"] if name == "labels" else ["yes", "no"])
    assert len(check_audio(check_audio(dataset))) == 2  # What is checked can be checked again.
    refuses("'dev'", read_dataset, place, "dev")


def test_a_folder_of_labels_alone_is_read_with_the_speakers_inside_them(tmp_path):
    for name in ("calm/ann/1.wav", "calm/bob/1.wav", "angry/ann/2.wav"):
        record(tmp_path / name)
    dataset = read_dataset(tmp_path, None)
    assert (dataset["label"][:], dataset["speaker"][:]) == (["angry", "calm", "calm"], ["ann", "ann", "bob"])
    (tmp_path / "test").mkdir()
    refuses("has no split None with recordings; it holds angry, calm, test", read_dataset, tmp_path, None)


def test_the_column_of_labels_is_the_only_one_with_a_usual_name():
    assert find_column(rows_of(emotion=["a"], text=["b"]), "label") == "emotion"
    assert find_column(rows_of(emotion=["a"], label=["b"]), "label", "emotion") == "emotion"
    refuses("Several columns .* the label: label, emotion; the", find_column, rows_of(emotion=[], label=[]), "label")
    refuses("No column holds the speaker; the data set has audio, text", find_column, rows_of(text=["a"]), "speaker")
    refuses("There is no column 'mood'; the data set has", find_column, rows_of(label=["a"]), "label", "mood")


def test_nothing_in_a_folder_of_labels_or_a_column_of_splits_is_passed_over(tmp_path):
    for name in ("train/a/1.wav", "train/b/1.wav"):
        record(tmp_path / name)
    record(tmp_path / "train/a/2.w64", format="W64")
    (tmp_path / "train/a/.hidden.wav").touch()
    (tmp_path / "train/a/notes.txt").touch()
    (tmp_path / "train/c").symlink_to(tmp_path / "train/b")
    assert len(check_audio(read_dataset(tmp_path, "train"))) == 4
    (tmp_path / "train/b/2.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "train/a/3.jpg").write_bytes(b"an image")
    linked = read_dataset(tmp_path, "train")
    assert linked["label"][:] == ["a", "a", "a", "b", "b", "c", "c"]
    refuses("3 of 7 recordings cannot be used: 2 missing, 1 unreadable", check_audio, linked)
    record(tmp_path / "train/2.wav")
    refuses(r"1 files of .* are not in the folder of a label.*\n  2\.wav", read_dataset, tmp_path, "train")
    write(tmp_path / "metadata.csv", "file_name,split", "a.wav,train ", "b.wav,test")
    assert len(read_dataset(tmp_path / "metadata.csv", "train")) == 1
    write(tmp_path / "metadata.csv", "file_name,split", "a.wav,train", "b.wav,")
    refuses(r"1 of 2 rows .* have nothing in the column `split`", read_dataset, tmp_path / "metadata.csv", "train")


def test_a_copy_of_a_hub_data_set_is_read_with_its_bytes(tmp_path):
    content = record(tmp_path / "a.flac").read_bytes()
    hub = Dataset.from_dict({"sound": [{"path": "a.flac", "bytes": content}], "label": [0], "file": ["x/a.flac"]})
    hub = hub.cast_column("sound", Audio()).cast_column("label", ClassLabel(names=["no", "yes"]))
    (tmp_path / "hub/data").mkdir(parents=True)
    hub.to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    dataset = read_dataset(tmp_path / "hub", "train")
    assert dataset.column_names == ["audio", "label", "file"]
    np.testing.assert_array_equal(decode(dataset[0]["audio"]), decode(tmp_path / "a.flac"))
    assert read_column(dataset, "label") == ["no"]
    refuses("has several splits: name one of them", read_dataset, tmp_path / "hub", None)
    with pytest.raises(ValueError, match=r"'label' must hold recordings or paths, got"):
        read_dataset(tmp_path / "hub", "train", audio_column_name="label")


def test_what_a_table_holds_stays_text_and_its_audio_column_can_be_named(tmp_path):
    lines = ["\ufefffile_name,speaker,text,sound", 'a.wav,007,"null, and void",c.wav', "b.wav,1e3,NA,d.wav"]
    table = write(tmp_path / "all.csv", *lines)
    dataset = read_dataset(table, None)
    assert (dataset["speaker"][:], dataset["text"][:]) == (["007", "1e3"], ["null, and void", "NA"])
    assert read_dataset(table, None, audio_column_name="sound")[0]["audio"]["path"] == str(tmp_path / "c.wav")
    write(tmp_path / "all.jsonl", '{"path": "a.wav"}', "", '{"path": "b.wav", "text": "hello"}')
    assert read_dataset(tmp_path / "all.jsonl", None)["text"][:] == [None, "hello"]  # a key that only one row has


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.csv", ["file_name,text", "a.wav,hello, world"], r"Row 1 of .*a\.csv cannot be read: its number of fields"),
        ("a.csv", ["file_name,text", "a.wav,hello", "b.wav"], "Row 2 of .* its number of fields is not that of the"),
        ("a.csv", ["file_name,text", f"a.wav,{'x' * 150_000}"], "Row 1 of .* field larger than field limit"),
        ("a.jsonl", ['{"path": "a.wav"}', "{"], r"Row 2 of .*a\.jsonl cannot be read"),
        ("a.jsonl", ["3"], r"Row 1 of .*a\.jsonl cannot be read: it is not a JSON object"),
        ("a.csv", ["sound,text", "a.wav,hello"], "must be one of sound, text, got file_name or audio or path or file"),
        ("a.csv", ["file_name,text"], "at least one recording"),
    ],
    ids=["more fields", "fewer fields", "a long field", "cut", "no object", "no recordings", "no rows"],
)
def test_a_broken_table_is_named(tmp_path, name, lines, message):
    refuses(message, read_dataset, write(tmp_path / name, *lines), None)


def test_two_tables_for_one_split_and_a_configuration_of_a_folder_are_refused(tmp_path):
    write(tmp_path / "train/metadata.csv", "file_name", "a.wav")
    refuses("config_name must be None for a local folder, got 'en'", read_dataset, tmp_path, "train", "en")
    write(tmp_path / "train/metadata.jsonl", '{"file_name": "a.wav"}')
    refuses("There are two tables, ", read_dataset, tmp_path, "train")


@pytest.mark.parametrize("name", ["/no/such/folder", "./folder", "~/no-such-folder", "clips.csv"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_dataset(name, "train")


# Checking


@pytest.fixture
def mixed(tmp_path):
    """Eight recordings of which three are good, two of these at other rates."""
    good = [record(tmp_path / "good.wav"), record(tmp_path / "8.wav", rate_hz=8000), tmp_path / "44.flac"]
    record(good[2], rate_hz=44100)
    bad = [tmp_path / "none.wav", tmp_path / "empty.wav", write(tmp_path / "corrupt.wav", "RIFF")]
    bad[1].touch()
    long, short = record(tmp_path / "long.wav", tone(3)), record(tmp_path / "short.wav", tone(0.01))
    return from_rows([{"audio": path.name} for path in [good[0], *bad, long, short, *good[1:]]], tmp_path)


BAD = r"5 of 8 recordings cannot be used: 1 missing, 1 empty, 1 unreadable, 1 too long, 1 too short\.\n"
LIMITS = {"min_duration_in_seconds": 0.05, "max_duration_in_seconds": 2}


def test_bad_recordings_are_an_error_that_counts_and_names_them(mixed):
    with pytest.raises(ValueError, match=BAD) as raised:
        check_audio(mixed, **LIMITS)
    message = str(raised.value)
    assert "none.wav: there is no such file" in message
    assert "long.wav: 3 s, too long: 0.05 s to 2 s are allowed" in message
    assert "on_bad_audio='skip'" in message
    refuses("on_bad_audio must be 'error' or 'skip', got 'ignore'", check_audio, mixed, on_bad_audio="ignore")


def test_bad_recordings_are_left_out_on_request_and_said(mixed):
    with (
        pytest.warns(UserWarning, match="Decoding resamples") as resampled,
        pytest.warns(UserWarning, match="cannot be used") as left_out,
    ):
        checked = check_audio(mixed, **LIMITS, on_bad_audio="skip", num_proc=2)
    assert [entry["path"].rpartition("/")[2] for entry in checked["audio"]] == ["good.wav", "8.wav", "44.flac"]
    assert checked["duration_s"][:] == pytest.approx([0.2, 0.2, 0.2])
    assert re.match(BAD, str(left_out[0].message))
    said = str(resampled[0].message)
    assert said == "Decoding resamples recordings to 16,000 Hz: 1 of 8,000 Hz, 1 of 44,100 Hz."


def test_only_the_first_few_of_many_bad_recordings_are_named(tmp_path):
    rows = [{"audio": f"{index}.wav"} for index in range(20)] + [{"audio": None}]
    with pytest.raises(ValueError, match=r"21 of 21 .* 21 missing") as raised:
        check_audio(from_rows(rows, tmp_path), on_bad_audio="skip")  # nothing is left: an error all the same
    assert "4.wav" in str(raised.value)
    assert "5.wav" not in str(raised.value)
    assert "... and 16 more\n" in str(raised.value)


def test_a_recording_too_short_for_the_encoder_is_found_to_the_sample(tmp_path):
    config = build().config  # needs 45 samples for a frame
    record(tmp_path / "45.wav", tone()[:45])
    record(tmp_path / "44.wav", tone()[:44])
    check_audio(from_rows([{"audio": "45.wav"}], tmp_path), config)
    refuses(r"1 of 1 .* 1 too short", check_audio, from_rows([{"audio": "44.wav"}], tmp_path), config)
    check_audio(from_rows([{"audio": "44.wav"}], tmp_path), object())  # an encoder without convolutions over samples


# Columns, speakers, folds


def rows_of(**columns):
    count = len(next(iter(columns.values())))
    return Dataset.from_dict({"audio": [f"{index}.wav" for index in range(count)], **columns})


def test_classes_are_those_of_training_and_test_adds_none():
    train = rows_of(label=["b", "a", "b"])
    assert label_names(train, rows_of(label=["b"])) == ["a", "b"]
    refuses(r"1 classes .* 2 classes of training.*\n  c", label_names, train, rows_of(label=["b", "c"]))
    refuses("needs at least two classes; the column 'label' holds only 'a'", label_names, rows_of(label=["a", "a"]))


def test_a_row_without_a_value_is_an_error():
    for blank in ("", " ", None):
        with pytest.raises(ValueError, match="1 of 3 rows have no value in the column 'text'; the first is row 1"):
            read_column(rows_of(text=["a", blank, "b"]), "text")
    unlabelled = Dataset.from_dict({"label": [1, -1]}, Features({"label": ClassLabel(names=["a", "b"])}))
    refuses("first is row 1", read_column, unlabelled, "label")
    refuses("no column 'label'; the data set has audio, text", read_column, rows_of(text=["a"]), "label")
    assert read_column(rows_of(label=[0, 1]).cast_column("label", Value("int8")), "label") == ["0", "1"]


def test_a_speaker_in_training_and_test_is_named():
    train = rows_of(speaker=["anna", "bert", "carl"])
    check_disjoint(train, rows_of(speaker=["dora"]))
    with pytest.raises(ValueError, match=r"2 values of the column 'speaker' .*\n  anna\n  carl$"):
        check_disjoint(train, rows_of(speaker=["carl", "dora", "anna"]))


def test_each_session_is_held_out_once():
    dataset = rows_of(session=["2", "1", "2", "3"])
    folds = list(leave_one_group_out(dataset, "session"))
    assert folds == [("1", [0, 2, 3], [1]), ("2", [1, 3], [0, 2]), ("3", [0, 1, 2], [3])]
    with pytest.raises(ValueError, match=r"fewer than 2 unique groups|number of groups"):
        list(leave_one_group_out(rows_of(session=["1", "1"]), "session"))


# Trials


@pytest.mark.parametrize("kind", ["voxceleb", "csv"])
def test_trials_are_read_from_lists_and_tables(tmp_path, kind):
    files = [record(tmp_path / "wav" / name) for name in ("id1/v/1.wav", "id1/w/1.wav", "id2/v/1.wav")]
    a, b, c = (str(file.relative_to(tmp_path / "wav")) for file in files)
    if kind == "voxceleb":
        trials = read_trials(write(tmp_path / "veri_test.txt", f"1 {a} {b}", f"0 {a} {c}"), tmp_path / "wav")
    else:
        lines = ["label,file_a,file_b,note", f"1,{a},{b},x", f"0,{a},{c},y"]
        trials = read_trials(write(tmp_path / "wav/trials.csv", *lines))
    a, b, c = map(str, files)
    assert [tuple(trial) for trial in trials] == [(1, a, b), (0, a, c)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1 a.wav", "0 a.wav b.wav"], "must be a label, 0 or 1, and two files, got '1 a.wav'"),
        (["a.wav b.wav 1"], "got 'a.wav b.wav 1'"),
        (["1 a.wav b.wav", "1 a.wav a.wav"], "must have trials with label 1 and with label 0; its 2 trials do not"),
        ([""], "its 0 trials"),
    ],
)
def test_a_broken_list_of_trials_is_refused(tmp_path, lines, message):
    refuses(message, read_trials, write(tmp_path / "trials.txt", *lines))


def test_trials_without_their_columns_or_recordings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no column file_a, file_b; it has label, x, y"):
        read_trials(write(tmp_path / "trials.csv", "label,x,y", "1,a.wav,b.wav"))
    record(tmp_path / "a.wav")
    path = write(tmp_path / "trials.txt", "1 a.wav b.wav", "0 a.wav c.wav", "0 b.wav a.wav")
    with pytest.raises(FileNotFoundError, match=r"2 of the 3 recordings .*\n  .*b.wav\n  .*c.wav$"):
        read_trials(path)


@pytest.mark.parametrize(
    ("package", "module"), [("soundfile", "audio"), ("soxr", "audio"), ("datasets", "data"), ("sklearn", "data")]
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, package, module):
    monkeypatch.delitem(sys.modules, f"peft_elp.speech.{module}")
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"peft_elp\.speech\.{module} .*pip install 'peft-elp\[recipes\]'"):
        importlib.import_module(f"peft_elp.speech.{module}")
