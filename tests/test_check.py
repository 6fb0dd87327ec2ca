"""peft-elp check: the metric of an adapter, and what noise, rooms and telephones take from it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from on_disk import adapted, save_base

from peft_elp.automl.check import CLEAN, check, conditions_of
from peft_elp.automl.report import percent
from peft_elp_command import main

RATE_HZ = 16_000
HERTZ = {"yes": 1000.0, "no": 6000.0}


class Ear:
    """Stands for an adapter: it names the class whose frequency is the strongest."""

    sampling_rate = RATE_HZ
    task = "classify"
    saved = SimpleNamespace(config={}, model_class="Ear", folder="ear", base="ear")
    model = SimpleNamespace(
        get_base_model=lambda: SimpleNamespace(config=SimpleNamespace(id2label={0: "yes", 1: "no"}))
    )

    def __init__(self, deaf=False):
        self.deaf = deaf

    def _check(self, task):
        assert task in ("classify", "verify")

    def _energies(self, sounds):
        for sound in sounds:
            spectrum = np.abs(np.fft.rfft(sound["array"]))
            step = RATE_HZ / len(sound["array"])
            around = [spectrum[int(0.8 * hz / step) : int(1.2 * hz / step)].max() for hz in HERTZ.values()]
            yield np.array([1.0, 0.0] if self.deaf else around)

    def classify(self, sounds, batch_size):
        scores = [energy / energy.sum() for energy in self._energies(sounds)]
        return [[{"label": name, "score": x} for name, x in zip(HERTZ, one, strict=True)] for one in scores]

    def embed(self, sounds, batch_size):
        return [energy / np.linalg.norm(energy) for energy in self._energies(sounds)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six speakers, each with two clips of two tones."""
    folder = tmp_path_factory.mktemp("check")
    seconds, random = np.arange(8000) / RATE_HZ, np.random.default_rng(0)
    for label, hz in HERTZ.items():
        for speaker in "abcdef":
            (folder / label / speaker).mkdir(parents=True)
            for clip in range(2):
                tone = 0.1 * np.sin(2 * np.pi * hz * random.uniform(0.95, 1.05) * seconds)
                soundfile.write(folder / label / speaker / f"{clip}.wav", tone, RATE_HZ)
    return folder


def accuracy(found, condition):
    return found.facts["conditions"][condition]["metrics"]["unweighted_accuracy"]


def test_a_telephone_takes_the_high_tones_and_noise_does_not(folder):
    found = check(Ear(), folder)
    assert found.value == 1
    assert (found.facts["unit"], found.facts["recordings"]) == ("speakers", 24)
    assert accuracy(found, "noise, 10 dB")["value"] == 1
    assert accuracy(found, "telephone")["value"] == 0.5
    gain = found.facts["conditions"]["telephone"]["gain"]
    assert (gain["value"], gain["high"] < 0) == (-0.5, True)
    assert [one["recall"] for one in found.facts["classes"]] == [1, 1]
    rows = {name: (metric, change) for name, metric, change in found.table()}
    assert rows[CLEAN] == ("100.0 % (100.0 to 100.0)", "")
    assert rows["telephone"][1].startswith("-50.0 points")


def test_two_adapters_are_compared_on_the_same_recordings(folder):
    found = check(Ear(), folder, Ear(deaf=True))
    gain = found.facts["conditions"][CLEAN]["gain"]
    assert (gain["value"], gain["low"] > 0) == (0.5, True)
    assert list(found.table())[1][2].startswith("+50.0 points")


def test_voices_are_measured_by_their_pairs(folder, tmp_path):
    found = check(Ear(), folder, Ear(deaf=True), task="verify", label="label", at_most=0.1)
    assert (found.metric, found.value, found.good) == ("eer", 0, True)
    found.save_page(tmp_path / "page.html")
    assert '<td class="text">ear</td>' in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_recordings_of_unknown_classes_and_empty_folders_of_noise_are_refused(folder, tmp_path):
    tone = (folder / "yes" / "a" / "0.wav").read_bytes()
    for name in ("yes", "maybe"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.wav").write_bytes(tone)
    with pytest.raises(ValueError, match=r"1 classes .* unknown to the adapter in 'ear': 'maybe'"):
        check(Ear(), tmp_path / "data")
    with pytest.raises(ValueError, match="no recordings in the folder"):
        check(Ear(), folder, noise=tmp_path / "data" / "none")


def test_conditions_do_to_a_sound_what_their_names_say(tmp_path):
    random = np.random.default_rng(0)
    sound = random.normal(scale=0.05, size=16_000)
    soundfile.write(tmp_path / "hum.wav", np.sin(np.arange(3000) / 20), RATE_HZ)
    power = np.square(sound).mean()
    for noise in (None, tmp_path):
        found = {name: distort(sound, random) for name, distort in conditions_of(RATE_HZ, noise).items()}
        for level in (20, 10, 0):
            added = np.square(found[f"noise, {level} dB"] - sound).mean()
            assert 10 * np.log10(power / added) == pytest.approx(level, abs=0.1)
    np.testing.assert_array_equal(found[CLEAN], sound)
    assert np.square(found["reverberation"]).mean() == pytest.approx(power)
    assert np.abs(np.corrcoef(found["reverberation"], sound)[0, 1]) < 0.9
    spectrum = np.abs(np.fft.rfft(found["telephone"]))
    assert spectrum[4200:].max() < 0.01 * spectrum[1000:3000].mean()
    assert np.abs(found["20 dB louder"]).max() == 1
    lengths = {name: len(found[name]) / len(sound) for name in ("slower by 10 %", "faster by 10 %")}
    assert list(lengths.values()) == pytest.approx([1 / 0.9, 1 / 1.1], abs=0.001)


def test_the_command_measures_writes_a_page_and_its_status_is_1_below_the_limit(folder, tmp_path, capsys):
    adapted(save_base(tmp_path / "base"), "ForSequenceClassification").save_pretrained(tmp_path / "words")
    page = tmp_path / "new" / "page.html"
    command = ["check", str(tmp_path / "words"), str(folder)]
    assert main([*command, "--json", "--at-least", "0.99", "--report", str(page)]) == 1
    found = json.loads(capsys.readouterr().out)
    telephone = found["conditions"]["telephone"]["metrics"]
    assert telephone.keys() == {"unweighted_accuracy", "accuracy", "f1"}
    html = page.read_text(encoding="utf-8")
    value = percent(telephone["unweighted_accuracy"])
    assert f'<td class="text">telephone</td><td>{value}</td>' in html
    assert main([*command, "--at-most", "0.1"]) == 1
    assert "is better the higher it is. Limit it with at_least (--at-least)" in capsys.readouterr().err
