"""examples/measure_starts.py, in a very short form, on noise and tiny random models."""

import csv
import itertools
import re
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from backbones import build
from on_disk import record, save_base, save_tokenizer, save_whisper
from transformers import AutoConfig

from peft_elp import find_encoder

pytest.importorskip("jiwer")
pytest.importorskip("sklearn")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import measure_starts
from keys_and_values import KeysAndValues

# The heads of tiny models are not small beside their encoders.
pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save=.* trains and saves:UserWarning")
NUMBER = r"[\d.]+"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two speakers in training, two others elsewhere, who read the same letter loudly or softly."""
    folder = tmp_path_factory.mktemp("recordings")
    for number, split in enumerate(("train", "validation", "test")):
        (folder / split).mkdir()
        rows = []
        for clip in range(8):
            record(folder / split / f"{clip}.wav", 4000 + 320 * clip, seed=8 * number + clip)
            speaker, mood = f"{min(number, 1)}{clip % 2}", ("calm", "angry")[clip // 4]
            rows.append(
                {"file_name": f"{clip}.wav", "speaker_id": speaker, "emotion": mood, "label": mood, "text": "a"}
            )
        with open(folder / split / "metadata.csv", "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    with open(folder / "trials.csv", "w", newline="") as file:
        trials = [(int(a % 2 == b % 2), f"test/{a}.wav", f"test/{b}.wav") for a, b in combinations(range(8), 2)]
        csv.writer(file).writerows([("label", "file_a", "file_b"), *trials])
    return folder


@pytest.fixture(scope="module", params=["wav2vec2", "whisper"])
def recogniser(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "whisper":
        return save_whisper(folder)
    save_base(folder, "wav2vec2")
    build("wav2vec2", "ForCTC", vocab_size=9).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_taps_are_read_in_each_way(recogniser, recordings, monkeypatch, capsys):
    monkeypatch.setattr(measure_starts, "TAPS_STEPS", 2)
    words = ["--model_name_or_path", str(recogniser), "--verification", str(recordings), "--emotions", str(recordings)]
    measure_starts.main(["taps", *words, "--seeds", "0", "1", "--rates", "1e-3"])
    lines = capsys.readouterr().out.splitlines()
    errors = rf"error {NUMBER} ± {NUMBER} / {NUMBER} ± {NUMBER} \(validation / test\)"
    assert all(re.search(errors, line) for line in lines)
    assert sum("rate 0.001" in line for line in lines) == 2 * len(measure_starts.READINGS)
    layers = AutoConfig.from_pretrained(recogniser).num_hidden_layers
    assert sum("taps that weigh most" in line for line in lines) == 2 * (layers - 1)


def test_the_rate_that_is_best_on_validation_is_measured(recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_starts, "TAPS_STEPS", 2)
    by_rate = {1e-3: {"validation": 30.0, "test": 20.0}, 1e-2: {"validation": 10.0, "test": 40.0}}

    def train(clips, names, task, reading, rate, seed):
        reader = measure_starts.Reader(2, 24, len(names), None)
        reader.rate = rate
        return reader

    def error(reader, clips, names, trials):
        return by_rate[reader.rate][Path(clips[0].file).parent.name]

    monkeypatch.setattr(measure_starts, "train_reader", train)
    task = measure_starts.TAPS_TASKS["emotions"]._replace(error=error)
    monkeypatch.setattr(measure_starts, "TAPS_TASKS", {"emotions": task})
    words = ["--model_name_or_path", save_base(tmp_path), "--emotions", str(recordings), "--rates", "1e-3", "1e-2"]
    measure_starts.main(["taps", *words])
    assert "error 10.0 ± 0.0 / 40.0 ± 0.0 (validation / test), rate 0.01" in capsys.readouterr().out


def test_a_fresh_default_costs_a_recogniser_nothing(recogniser, recordings, capsys):
    words = ["--model_name_or_path", str(recogniser), "--recordings", str(recordings), "--max_clips", "2"]
    measure_starts.main(["fresh", *words])
    said = dict(re.findall(rf"(.+): loss ({NUMBER}), word error rate {NUMBER} %", capsys.readouterr().out))
    assert list(said) == list(measure_starts.FRESH)
    assert said["E"] == said["L"] == said["the model alone"] != said["ELP, the paper's starts"]


def test_each_start_is_trained_at_each_rate(recogniser, recordings, capsys):
    window = ["--chunk_length", "1"] if "whisper" in str(recogniser) else []
    words = ["--model_name_or_path", str(recogniser), "--recordings", str(recordings), *window]
    measure_starts.main(["rates", *words, "--steps", "3", "--rates", "1e-4", "1e-2"])
    alone, *starts = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"head alone: {NUMBER}", alone)
    pattern = rf".+: {NUMBER} at 0.0001, {NUMBER} at 0.01; better than the head alone at \d of 2 rates"
    assert all(re.fullmatch(pattern, line) for line in starts)
    assert len(starts) == 2


@pytest.mark.parametrize("options", [[], ["--keys_and_values"]], ids=["carried", "keys and values"])
def test_each_length_is_trained_with_e_and_l_and_without(recogniser, recordings, options, capsys):
    window = ["--chunk_length", "1"] if "whisper" in str(recogniser) else []
    words = ["--model_name_or_path", str(recogniser), "--recordings", str(recordings), *window]
    measure_starts.main(["lengths", *words, "--steps", "2", "--lengths", "0", "2", "--seeds", "0", "1", *options])
    held = rf"{NUMBER} ± {NUMBER} / {NUMBER} ± {NUMBER} \(validation / test\), rate 0.0+1"
    lines = capsys.readouterr().out.splitlines()
    starts = itertools.product(["P, 0 rows", "P, 2 rows", "ELP, 0 rows", "ELP, 2 rows"], ["loss", "error"])
    for (start, what), line in zip(starts, lines, strict=True):
        assert re.fullmatch(rf"{start}: {what} {held}", line)


@pytest.mark.parametrize("stable", [False, True], ids=["post-norm", "pre-norm"])
def test_rows_as_keys_and_values_alone_reach_the_frames_and_no_padding(stable):
    model = build("wav2vec2", "ForSequenceClassification", do_stable_layer_norm=stable)
    for name, parameter in model.named_parameters():
        if "_proj.weight" in name:  # Where they start, attention adds next to nothing.
            torch.nn.init.normal_(parameter, std=0.3)
    waveform = torch.randn(1, 2000)
    plain = model(waveform).logits
    keys = KeysAndValues(find_encoder(model), 3, std=1.0)
    changed = model(waveform).logits
    changed.square().sum().backward()
    assert (changed - plain).abs().max() > 1e-4
    assert keys.rows.grad is not None
    assert keys.rows.grad.abs().min() > 0
    padded, mask = torch.nn.functional.pad(waveform, (0, 800)), (torch.arange(2800) < 2000).long()[None]
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, changed)
