"""examples/spoken_commands.py, which `make demo` runs, in a short form."""

import csv
import re
import sys
from pathlib import Path

import pytest
from on_disk import record

pytest.importorskip("espeakng_loader")
pytest.importorskip("optuna")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import spoken_commands

# The heads of tiny models are not small beside their encoders.


def test_spoken_commands_trains_two_tasks_and_answers_both_from_one_pass(tmp_path, capsys):
    small = ["--num_commands", "4", "--num_voices", "2", "--num_pretraining_words", "6", "--pretraining_steps", "2"]
    accuracies = spoken_commands.main([*small, "--trials", "2", "--output_dir", str(tmp_path)])
    assert {*accuracies} == {"word", "voice"}
    said = capsys.readouterr().out
    for task, found in accuracies.items():
        assert re.search(rf"{task}\s+{found['head alone']:.1%}\s+{found['ELP']:.1%}\s+\d+ kB", said)
        assert f"Saved in {tmp_path / task}: {tmp_path / task / 'report.html'} tells the rest." in said
        assert (tmp_path / task / "report.html").is_file()
    assert re.search(r"One pass of the encoder over \S+\.flac answers both: word '\w+', voice '[\w+-]+'", said)
    program, adapter = re.search(r"^\$ (\S+) classify (\S+) my-voice.wav$", said, flags=re.MULTILINE).groups()
    assert (Path(adapter) / "adapter_model.safetensors").is_file()
    assert program == "peft-elp" or Path(program).is_file()  # what is printed works as it is


def test_it_takes_an_encoder_and_a_data_set_of_ones_own(tmp_path):
    spoken_commands.pretrain(tmp_path / "backbone", steps=1, num_words=6, num_voices=2)
    for split, count in (("train", 6), ("test", 2)):
        (tmp_path / "mine" / split).mkdir(parents=True)
        with (tmp_path / "mine" / split / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerow(["file_name", "label"])
            for i in range(count):
                clip = record(tmp_path / "mine" / split / f"{i}.wav", 12_000, seed=i)
                csv.writer(file).writerow([clip, ["loud", "quiet"][i % 2]])
    words = ["--model", str(tmp_path / "backbone"), "--dataset", str(tmp_path / "mine"), "--trials", "1"]
    assert {*spoken_commands.main([*words, "--output_dir", str(tmp_path / "out")])["label"]} == {"head alone", "ELP"}
