"""Make small data sets and a small encoder for the recipes, without a network: `python examples/make_demo_data.py`.

Synthesises four data sets in `audiofolder` layout with espeak-ng, and pre-trains a small wav2vec 2.0 to name phonemes
in other words. Folders that exist are kept. Takes 3 minutes on one CPU core.

    demo/encoder    the encoder, as `save_pretrained` writes it
    demo/sentences  speech recognition: text; the voices and sentences of test are not in training
    demo/speakers   speaker verification: speaker_id, and trials.csv over the test speakers
    demo/emotions   moods made of pitch, speaking rate and range of pitch, not real emotions: emotion, speaker_id
    demo/intents    intent classification: action, object, location; the voices of test are not in training

This is clean synthetic speech, to see that a recipe runs and learns. Results on it say little about real speech.
"""

import csv
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import soundfile
from synthetic.small_encoder import TEST_VOICES, TRAINING_VOICES, pretrain
from synthetic.synthesize import RATE_HZ, synthesizer
from transformers import HfArgumentParser
from transformers.utils import logging

from peft_elp.recipes import option
from peft_elp.speech.data import read_table

Row = dict[str, Any]  # columns of metadata.csv, and the arguments of `Synthesizer.say` under "say"

WHO = ["my father", "her sister", "the doctor", "a farmer", "our teacher", "the king", "a child", "the pilot"]
DOES = ["finds", "paints", "washes", "opens", "counts", "carries", "sees", "needs"]
WHAT = ["the red boat", "five books", "a small box", "the green door"]
WHAT += ["two horses", "the old table", "some bread", "a kettle"]
WHEN = ["today", "again", "in the garden", "before dinner", "every week"]

# Pitch, words per minute and range of pitch, each drawn up to `SPREAD` around these: neighbouring moods overlap.
MOODS = {"calm": (45, 140, 40), "excited": (62, 185, 85), "angry": (40, 195, 75), "sad": (38, 120, 15)}
SPREAD = (10, 20, 20)

INTENTS = {
    ("activate", "lights"): "turn on the lights|switch the lights on|lights on",
    ("deactivate", "lights"): "turn off the lights|switch the lights off|lights off",
    ("increase", "heat"): "turn up the heat|make it warmer|heat up",
    ("decrease", "heat"): "turn down the heat|make it cooler|heat down",
}
LOCATIONS = {"none": "", "kitchen": " in the kitchen", "bedroom": " in the bedroom"}


@dataclass
class Arguments:
    """The options of the command line."""

    output_dir: str = option("demo", "Folder for the encoder and the data sets.")
    seed: int = option(0, "Seed of everything random.")
    num_clips: int = option(400, "Training clips of each data set, about.")
    num_voices: int = option(24, "Voices in training; a third as many, 8 at most, in test.")
    num_pretraining_words: int | None = option(None, "Words that the encoder is pre-trained on. Default: all 383.")
    pretraining_words_per_clip: int = option(1, "Most words in a clip of the pre-training.")
    pretraining_steps: int = option(400, "Steps, of 32 clips each, that pre-train the encoder.")
    pre_norm: bool = option(True, "Whether the layers of the encoder normalise their input, or their output.")


def sentences(voices: Sequence[str], num_clips: int, rng: random.Random) -> Iterator[Row]:
    for number in range(num_clips):
        text = " ".join(rng.choice(words) for words in (WHO, DOES, WHAT, WHEN))
        yield {"text": text, **manner(voices[number % len(voices)], text, rng)}


def speakers(voices: Sequence[str], num_clips: int, rng: random.Random) -> Iterator[Row]:
    for row in sentences(voices, num_clips, rng):
        row["say"]["pitch"] = rng.randint(45, 55)  # a speaker keeps to a pitch
        yield row


def emotions(voices: Sequence[str], num_clips: int, rng: random.Random) -> Iterator[Row]:
    for number, row in enumerate(sentences(voices, num_clips, rng)):
        mood = list(MOODS)[number // len(voices) % len(MOODS)]
        drawn = [round(rng.uniform(x - y, x + y)) for x, y in zip(MOODS[mood], SPREAD, strict=True)]
        row["say"] |= dict(zip(("pitch", "words_per_minute", "pitch_range"), (max(0, x) for x in drawn), strict=True))
        yield {"emotion": mood, **row}


def intents(voices: Sequence[str], num_clips: int, rng: random.Random) -> Iterator[Row]:
    kinds = [(*intent, place) for intent in INTENTS for place in LOCATIONS]
    for number in range(num_clips):
        action, thing, place = kinds[number // len(voices) % len(kinds)]
        text = rng.choice(INTENTS[action, thing].split("|")) + LOCATIONS[place]
        slots = {"action": action, "object": thing, "location": place}
        yield {**slots, "text": text, **manner(voices[number % len(voices)], text, rng)}


def manner(voice: str, text: str, rng: random.Random) -> Row:
    """Draw the pitch and speaking rate of a clip."""
    say = {"text": text, "voice": voice, "pitch": rng.randint(35, 65), "words_per_minute": rng.randint(130, 200)}
    return {"speaker_id": voice.partition("+")[2], "say": say}


def write_split(folder: Path, rows: Sequence[Row]) -> None:
    """Write `<folder>/*.flac` and `<folder>/metadata.csv`."""
    folder.mkdir(parents=True)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["file_name", *(column for column in rows[0] if column != "say")])
        table.writeheader()
        for number, row in enumerate(rows):
            name = f"{row['say']['voice'].partition('+')[2]}-{number:04}.flac"
            soundfile.write(folder / name, synthesizer().say(**row["say"]).waveform, RATE_HZ)
            table.writerow({"file_name": name, **{column: row[column] for column in row if column != "say"}})


def write_trials(folder: Path) -> None:
    """Write `trials.csv`: every pair of one test speaker, and as many pairs of two."""
    pairs = list(combinations(read_table(folder / "test" / "metadata.csv"), 2))
    same = [pair for pair in pairs if pair[0]["speaker_id"] == pair[1]["speaker_id"]]
    other = [pair for pair in pairs if pair[0]["speaker_id"] != pair[1]["speaker_id"]]
    trials = [(1, *pair) for pair in same] + [(0, *pair) for pair in random.Random(0).sample(other, len(same))]
    rows = [(label, f"test/{a['file_name']}", f"test/{b['file_name']}") for label, a, b in trials]
    with (folder / "trials.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("label", "file_a", "file_b"), *rows])


def make(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill the folder, unless it exists; a folder that was not finished is made again."""
    if folder.exists():
        print(f"{folder} is there")
        return
    begun = folder.with_name(folder.name + ".part")
    shutil.rmtree(begun, ignore_errors=True)
    write(begun)
    begun.rename(folder)
    print(f"{folder} made")


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing, with a command line, by default that of the process."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args=argv)  # pyright: ignore[reportArgumentType]
    # Hide the progress bars of loading; the bars of training stay.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    training_voices = TRAINING_VOICES.split()[: args.num_voices]
    test_voices = TEST_VOICES.split()[: max(2, args.num_voices // 3)]
    root, num_test = Path(args.output_dir), args.num_clips // 4

    def write(folder: Path, rows: Callable[..., Iterator[Row]]) -> None:
        rng = random.Random(args.seed)
        train = list(rows(training_voices, args.num_clips, rng))
        test = list(rows(test_voices, num_test, rng))
        if rows is sentences:
            heard = {row["text"] for row in train}
            test = [row for row in test if row["text"] not in heard]
        write_split(folder / "train", train)
        write_split(folder / "test", test)
        if rows is speakers:
            write_trials(folder)

    def write_encoder(folder: Path) -> None:
        words, per_clip = args.num_pretraining_words, args.pretraining_words_per_clip
        pretrain(folder, args.pretraining_steps, args.seed, words, args.num_voices, per_clip, args.pre_norm)

    for rows in (sentences, speakers, intents):
        make(root / rows.__name__, partial(write, rows=rows))
    # Folds over speakers need no test split: one table holds all.
    moody = training_voices[:6]
    moods = list(emotions(moody, args.num_clips, random.Random(args.seed)))
    make(root / "emotions", lambda folder: write_split(folder, moods))
    make(root / "encoder", write_encoder)


if __name__ == "__main__":
    main()
