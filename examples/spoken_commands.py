"""One small speech encoder, two tasks, an adapter for each: `python examples/spoken_commands.py`.

Needs no download: espeak-ng speaks ten commands in many voices, and a small wav2vec 2.0 is pre-trained on other words
before it is frozen. `peft_elp.train` then finds an adapter for each task: which word it is, in voices that were never
heard, and whose voice it is, by words that were never heard. At the end both answer from one pass of the encoder.
Took 261 s of one CPU core.

With a network, the same script adapts a real encoder to a data set of your own, whose one task is its labels:
`python examples/spoken_commands.py --model microsoft/wavlm-base-plus --dataset <folder or table>`.
"""

import csv
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_demo_data import write_split
from synthetic.small_encoder import OTHER_WORDS, TEST_VOICES, TRAINING_VOICES, pretrain, vary
from transformers import HfArgumentParser
from transformers.utils import logging

import peft_elp
from peft_elp.recipes import option
from peft_elp.speech.data import read_table

COMMANDS = ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]


@dataclass
class Arguments:
    """The options of the command line."""

    dataset: str | None = option(
        None, "A data set: a folder or a table, see docs/how-to/data.md. Default: synthesised."
    )
    model: str | None = option(None, "A speech encoder: Hub id or folder. Default: a small one, pre-trained here.")
    output_dir: str = option("outputs/spoken_commands", "Folder for the adapters and the small encoder.")
    minutes: float = option(0.5, "How long to search, for each task.")
    trials: int | None = option(None, "How many candidates at most, for each task. Default: as time allows.")
    seed: int = option(0, "Seed of everything random.")
    pretraining_steps: int = option(400, "Steps, of 32 clips each, that pre-train the small encoder.")
    num_pretraining_words: int = option(len(OTHER_WORDS), "Words that it is pre-trained on.")
    num_commands: int = option(len(COMMANDS), "Synthesised commands, 4 or more.")
    num_voices: int = option(len(TRAINING_VOICES.split()), "Voices at most, in training and in test.")


def synthesize_commands(args: Arguments) -> dict[str, str]:
    """Speak the commands; return a table of recordings for each task."""
    folder, commands = Path(args.output_dir), COMMANDS[: args.num_commands]
    shutil.rmtree(folder / "commands", ignore_errors=True)
    words: list[list[str]] = []
    for split, voices in (("train", TRAINING_VOICES), ("test", TEST_VOICES)):
        voices = voices.split()[: args.num_voices]
        said = vary(commands, voices, len(voices), takes=4)
        clips = folder / "commands" / split
        write_split(clips, [{"label": say["text"], "voice": say["voice"], "say": say} for say in said])
        rows = read_table(clips / "metadata.csv")
        words += [[f"commands/{split}/{row['file_name']}", row["label"], row["voice"], split] for row in rows]
    unheard = commands[-(len(commands) // 3) :]
    voices = [
        [file, voice, "test" if word in unheard else "train"] for file, word, voice, split in words if split == "train"
    ]
    tables = {
        "word": (["file_name", "label", "speaker", "split"], words),
        "voice": (["file_name", "label", "split"], voices),
    }
    for task, (columns, rows) in tables.items():
        with (folder / f"{task}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    print(
        f"{len(commands)} commands: {' '.join(commands)}. To tell voices, {' '.join(unheard)} are kept for the test."
    )
    return {task: str(folder / f"{task}.csv") for task in tables}


def make_backbone(args: Arguments) -> str:
    """Pre-train the small encoder; return its folder."""
    folder = str(Path(args.output_dir, "backbone"))
    pretrain(folder, args.pretraining_steps, args.seed, args.num_pretraining_words, args.num_voices)
    return folder


def answer_at_once(trained: dict[str, Any], clip: str) -> dict[str, str]:
    """Return the label of a clip for each task, from one pass of the encoder."""
    adapters = {task: one.adapter for task, one in trained.items()}
    first = next(iter(adapters.values()))
    tasks = peft_elp.MultiTaskModel({task: one.model for task, one in adapters.items()}).eval()
    inputs = first.feature_extractor(first.read(clip), sampling_rate=first.sampling_rate, return_tensors="pt")
    with torch.no_grad():
        outputs = tasks(**inputs)
    names = {task: one.model.get_base_model().config.id2label for task, one in adapters.items()}
    return {task: names[task][int(output.logits.argmax())] for task, output in outputs.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the example with a command line, by default that of the process; return the accuracies of each task."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args=argv)  # pyright: ignore[reportArgumentType]
    # PEFT 0.21 asks Transformers 5 for gradient checkpointing by its old name.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    logging.disable_progress_bar()  # of files that load in a moment; the bars of training stay
    logging.set_verbosity_error()  # Transformers warns that the head is new, as it should be here

    print("\n1. The recordings")
    tables = {"label": args.dataset} if args.dataset else synthesize_commands(args)

    print("\n2. The encoder")
    base = args.model or make_backbone(args)

    trained, accuracies = {}, {}
    for number, (task, table) in enumerate(tables.items(), start=3):
        print(f"\n{number}. An adapter that tells the {task}")
        options = {"minutes": args.minutes, "trials": args.trials, "seed": args.seed, "overwrite": True}
        trained[task] = peft_elp.train(table, base, Path(args.output_dir, task), **options)
        result = trained[task].report.facts["result"]
        found = {"head alone": result["head"], "ELP": result["metrics"]}
        accuracies[task] = {name: metrics["unweighted_accuracy"]["value"] for name, metrics in found.items()}

    print(f"\n{len(tables) + 3}. What was learned, on the same frozen encoder")
    print(f"{'':8}{'head alone':>12}{'ELP':>8}{'adapter':>10}")
    for task, found in accuracies.items():
        size = (trained[task].folder / "adapter_model.safetensors").stat().st_size / 1000
        print(f"{task:8}{found['head alone']:12.1%}{found['ELP']:8.1%}{size:7.0f} kB")
    if len(trained) > 1:
        row = next(row for row in read_table(tables["voice"]) if row["split"] == "test")
        clip = Path(args.output_dir, row["file_name"])
        heard = ", ".join(f"{task} {label!r}" for task, label in answer_at_once(trained, str(clip)).items())
        print(f"One pass of the encoder over {clip} answers both: {heard}. It is voice {row['label']!r}.")

    program, adapter = os.path.relpath(Path(sys.executable).parent), Path(args.output_dir, next(iter(tables)))
    program = "peft-elp" if program.startswith("..") else f"{program}/peft-elp"  # as it is typed from here
    print(f"\nNext, try it on a recording of your own:\n$ {program} classify {adapter} my-voice.wav")
    return accuracies


if __name__ == "__main__":
    main()
