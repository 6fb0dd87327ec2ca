"""examples/spoken_commands.py, which `make demo` runs, in a short form."""

import csv
import re
import sys
from pathlib import Path

import pytest
from on_disk import record

pytest.importorskip("espeakng_loader")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import spoken_commands

# The heads of tiny models are not small beside their encoders.
pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save=.* trains and saves:UserWarning")


def test_spoken_commands_trains_saves_and_classifies_in_another_process(tmp_path, capsys):
    small = ["--num_commands", "2", "--num_voices", "2", "--num_pretraining_words", "6", "--pretraining_steps", "2"]
    spoken_commands.main([*small, "--max_steps", "2", "--output_dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.search(r"Trained: [\d,]+ parameters \(E [\d,]+, L [\d,]+, P [\d,]+", said)
    assert re.search(r"head alone\s+[\d.]+%\nELP-adapters\s+[\d.]+%", said)
    assert re.search(r"It hears '\w+'; the clip says '\w+'", said)
    assert re.search(r"adapter's folder takes \d+ kB", said)
    program, adapter, clip = re.search(r"^\$ (\S+) classify (\S+) (\S+\.flac)$", said, flags=re.MULTILINE).groups()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in Path(adapter).iterdir()}
    assert Path(clip).is_file()
    assert f"$ {program} classify {adapter} my-voice.wav" in said
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
    words = ["--model", str(tmp_path / "backbone"), "--dataset", str(tmp_path / "mine"), "--max_steps", "1"]
    assert {*spoken_commands.main([*words, "--output_dir", str(tmp_path / "out")])} == {"head", "ELP"}
    with pytest.raises(ValueError, match="validation"):
        spoken_commands.main([*words, "--eval_split_name", "validation"])
