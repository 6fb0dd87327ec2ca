"""The commands of the README and the documentation, in a short form."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).parent.parent
SHORT = ["--num_commands", "2", "--num_voices", "2", "--num_pretraining_words", "6", "--pretraining_steps", "2"]


def run(*arguments, code=0):
    script = ROOT / "examples" / "spoken_commands.py"
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_spoken_commands_trains_saves_and_classifies_in_another_process(tmp_path):
    said = run(*SHORT, "--max_steps", "2", "--output_dir", str(tmp_path))
    assert re.search(r"Trained: [\d,]+ parameters \(E [\d,]+, L [\d,]+, P [\d,]+", said)
    assert re.search(r"head alone\s+[\d.]+%\nELP-adapters\s+[\d.]+%", said)
    assert re.search(r"It hears '\w+'; the clip says '\w+'", said)
    assert re.search(r"adapter's folder takes \d+ kB", said)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in (tmp_path / "adapter").iterdir()}
    program, adapter, clip = re.search(r"^\$ (\S+) classify (\S+) (\S+\.flac)$", said, flags=re.MULTILINE).groups()
    assert soundfile.info(ROOT / clip).samplerate == 16000
    assert f"$ {program} classify {adapter} my-voice.wav" in said
    assert program == "peft-elp" or (ROOT / program).is_file()  # what is printed works as it is

    # A dataset of one's own, on the small encoder that was just made.
    for split, count in (("train", 6), ("test", 2)):
        folder = tmp_path / "mine" / split
        folder.mkdir(parents=True)
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "label"])
            for i in range(count):
                soundfile.write(folder / f"{i}.flac", np.random.default_rng(i).normal(0, 0.1, 12000), 16000)
                writer.writerow([f"{i}.flac", ["loud", "quiet"][i % 2]])
    options = ["--model", str(tmp_path / "backbone"), "--dataset", str(tmp_path / "mine"), "--max_steps", "1"]
    assert "ELP-adapters" in run(*options, "--output_dir", str(tmp_path / "again"))
    assert "validation" in run(*options, "--eval_split_name", "validation", code=1)
