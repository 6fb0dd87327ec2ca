"""What is in a folder of recordings, and what speaks against training on it."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, get_dataset_split_names
from pandas import DataFrame
from tqdm.auto import tqdm

from peft_elp.saved.folder import is_hub_id
from peft_elp.speech.audio import AudioError, read_audio
from peft_elp.speech.data import COLUMNS, TABLE_SUFFIXES, read_column, read_dataset
from peft_elp.speech.inference import MAX_DURATION_S
from peft_elp.wording import first_line, shortened

TASKS = {"classify": "name classes", "transcribe": "write texts", "verify": "compare voices"}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}
KNOWN_SPLITS = {name: split for split, names in SPLITS.items() for name in names}
FEW = 10  # clips of a class
QUIET = 1e-3  # root mean square below which a recording holds nothing to learn from
IMBALANCE = 10  # the commonest class against the rarest


@dataclass
class Recordings:
    """The recordings that a training uses.

    `table` has a row for each: `label` (its class or text), `speaker` (None where it is not known), `split` ("train",
    "validation" or "test"), `duration_s`, `rate_hz`, `file` and `digest`, the hash of its samples.
    """

    rows: Dataset  # with the columns `audio` and `duration_s`
    table: Any  # a data frame, whose types pyright cannot follow
    task: str  # "classify", "verify" or "transcribe"
    columns: dict[str, str]  # which one was taken for what
    warnings: list[str] = field(default_factory=list)  # what speaks against the data, each with what to do

    @cached_property
    def labels(self) -> list[str]:
        """The class or the text of each recording."""
        return self.table["label"].tolist()

    @cached_property
    def speakers(self) -> list[str] | None:
        """The speaker of each recording; None if one of them is not known."""
        return self.table["speaker"].tolist() if self.table["speaker"].notna().all() else None

    @property
    def longest_s(self) -> float:
        """The duration of the longest recording."""
        return float(self.table["duration_s"].max())

    @property
    def names(self) -> list[str]:
        """The classes of training and validation, sorted."""
        return sorted({self.labels[i] for i in self.where("train", "validation")})

    def where(self, *splits: str) -> list[int]:
        """Return the numbers of the recordings of some splits."""
        return [number for number, split in enumerate(self.table["split"]) if split in splits]

    def overview(self) -> DataFrame:
        """Return what is in each class, or in each split where texts are written."""
        groups = self.table.groupby("split" if self.task == "transcribe" else "label")
        clips: Any = groups.size().to_frame("clips")
        if self.task != "transcribe":
            clips = groups["split"].value_counts().unstack(fill_value=0)
            clips = clips.reindex(columns=[split for split in SPLITS if split in clips])
        found = groups["duration_s"].agg(seconds="sum", shortest="min", longest="max")
        if self.speakers:
            found["speakers"] = groups["speaker"].nunique()
        found["Hz"] = groups["rate_hz"].agg(lambda rates: shortened(sorted(set(rates)), 2))
        return clips.join(found)

    def show(self, say: Callable[..., Any]) -> None:
        """Print what was found."""
        overview = self.overview().rename(index=printable)
        say(overview.to_string(max_rows=30, float_format="{:.1f}".format))
        columns = ", ".join(f"{what} from {column!r}" for what, column in self.columns.items())
        say(f"Task: {TASKS[self.task]} ({printable(columns)}).")
        for warning in self.warnings:
            say(f"Warning: {printable(warning)}")


def look(
    folder: str | Path,
    task: str | None = None,
    label: str | None = None,
    speaker: str | None = None,
    skip_bad: bool = False,
    progress: bool = True,
) -> Recordings:
    """Read all recordings of a folder once, and find what cannot be trained or should be known before.

    Args:
        folder: A folder `<label>/*.wav`, `<label>/<speaker>/*.wav`, or such a folder for each split; a folder or file
            with a table; or whatever else `peft_elp.speech.data.read_dataset` reads.
        task: As for `Training`, like the others. With "verify", the classes are the speakers, and those of the test
            split are others. None: the first of "classify", "transcribe" and "verify" that has a column.
        label: The column of the classes or texts.
        speaker: The column of the speakers. None finds it, or takes the folders inside those of the labels.
        skip_bad: Whether recordings that cannot be read are left out, with a warning.
        progress: Show a progress bar.

    Raises:
        ValueError: It cannot be trained on: no recordings, fewer than two classes, broken files, a class with a single
            recording.
        FileNotFoundError: There is no such folder.
    """
    splits = list(_splits(folder))
    task, columns = _columns([rows for _, rows in splits], task, label, speaker)
    merged: list[dict[str, Any]] = []
    audio: list[Any] = []
    notes: list[str] = []
    bad: list[str] = []
    with tqdm(total=sum(len(rows) for _, rows in splits), desc="Looking", unit="clip", disable=not progress) as bar:
        for split, rows in splits:
            labels, speakers = read_column(rows, columns["label"]), _speakers(rows, columns.get("speaker"))
            for number, entry in enumerate(rows["audio"]):
                bar.update()
                file = (entry or {}).get("path") or f"row {number} of {split}"
                try:
                    heard = _heard(entry, notes)
                except AudioError as error:
                    bad.append(f"{file}: {error}")
                    continue
                audio.append(entry)
                merged.append(
                    {"file": file, "label": labels[number], "speaker": speakers[number], "split": split, **heard}
                )
    if bad and not (skip_bad and merged):
        listed = "".join(f"\n  {one}" for one in bad[:5])
        raise ValueError(
            f"{len(bad)} of {len(bad) + len(merged)} recordings cannot be used.{listed}\nRepair or remove them, or "
            "leave them out with skip_bad (--skip-bad)."
        )
    table = DataFrame(merged)
    rows = Dataset.from_dict({"audio": audio, "duration_s": table["duration_s"].tolist()})
    found = Recordings(rows, table, task, columns)
    if bad:
        found.warnings.append(f"{len(bad)} recordings cannot be read and are left out: {shortened(bad, 3)}.")
    refuse(found)
    found.warnings += [*_counted(notes), *_doubts(found)]
    return found


def printable(text: str) -> str:
    """Return text in which characters that act on a terminal are escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def _splits(folder: str | Path) -> Iterator[tuple[str, Dataset]]:
    """Yield the splits of a folder, a table or a Hub data set; without splits, everything is for training."""
    place, names = Path(folder).expanduser(), []
    inside = {path.stem if path.is_file() else path.name: path for path in sorted(place.glob("*"))}
    folders = {name for name, path in inside.items() if path.is_dir() and not name.startswith(".")}
    tables = {name for name, path in inside.items() if path.suffix in TABLE_SUFFIXES}
    if place.is_file() or "metadata" in tables:
        everything = read_dataset(place, None)
        if "split" in everything.column_names:
            names = [str(value or "").strip() for value in everything["split"]]
            if unknown := sorted(set(names) - set(KNOWN_SPLITS)):
                raise ValueError(
                    f"The column `split` of {place} must hold train, validation or test, got "
                    f"{shortened(map(repr, unknown))}."
                )
        else:
            yield "train", everything
    elif not place.exists() or next(place.rglob("*.parquet"), None) is not None:
        names = _names_of_splits(str(folder), place)
    elif (folders | tables) & set(SPLITS["train"]) and folders <= set(KNOWN_SPLITS):
        names = [*folders, *tables]
    else:
        try:
            yield "train", read_dataset(place.resolve().parent, place.resolve().name)
        except ValueError as error:
            raise ValueError(
                f"There are no labelled recordings in {place}: it holds {shortened(sorted(inside)) or 'nothing'}. "
                "Make a folder of recordings for each label, or a table metadata.csv with file_name and label."
            ) from error
    for name, split in KNOWN_SPLITS.items():
        if name in names:
            yield split, read_dataset(place if place.exists() else str(folder), name)


def _names_of_splits(name: str, place: Path) -> list[str]:
    """Return the splits of a data set that `datasets` loads: Parquet files, or one of the Hub."""
    if not place.exists() and not ("/" in name and is_hub_id(name)):
        raise FileNotFoundError(
            f"{place} does not exist. Pass a folder of recordings, a .csv, .tsv or .jsonl file, or a data set of the "
            "Hub, as owner/name."
        )
    try:
        names = get_dataset_split_names(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is not a folder, and datasets cannot load it: {first_line(error)} Pass a folder of recordings, a "
            "table, or a data set of the Hub with a single configuration."
        ) from error
    if not set(names) & set(KNOWN_SPLITS):
        raise ValueError(f"The splits of {name} must be train, validation and test, got {shortened(names)}.")
    return names


def _columns(
    splits: Sequence[Dataset], task: str | None, label: str | None, speaker: str | None
) -> tuple[str, dict[str, str]]:
    """Return the task, and which column is the label and which the speaker; one with empty rows is not guessed."""
    columns = splits[0].column_names
    if wrong := next((name for name in (label, speaker) if name and name not in columns), None):
        raise ValueError(f"There is no column {wrong!r}; the data set has {', '.join(columns)}.")
    filled = [name for name in columns if all(_is_filled(rows, name) for rows in splits)]

    def find(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in filled and name != label), None)

    who = speaker or find(COLUMNS["speaker"])
    found = {
        "classify": label or find(COLUMNS["label"]),
        "transcribe": label or find(COLUMNS["text"]),
        "verify": label or who or find(["label"]),
    }
    task = task or next((task for task, column in found.items() if column), "classify")
    if (what := found[task]) is None:
        raise ValueError(
            f"No column tells {'the texts' if task == 'transcribe' else 'the classes'}; the data set has "
            f"{', '.join(columns)}. Name it with label (--label), or pass another task (--task): {', '.join(TASKS)}."
        )
    who = what if task == "verify" else who
    return task, {"label": what, **({"speaker": who} if who else {})}


def _is_filled(rows: Dataset, column: str) -> bool:
    return column in rows.column_names and all(value not in (None, "") for value in rows[column])


def _speakers(rows: Dataset, column: str | None) -> Sequence[str | None]:
    if column is not None:
        return read_column(rows, column)
    unknown = [None] * len(rows)
    paths = [Path(entry["path"]) for entry in rows["audio"] if entry and entry["path"]]
    if "label" not in rows.column_names or len(paths) < len(rows):
        return unknown
    inner = [path.parts[-2] for path, label in zip(paths, rows["label"], strict=True) if path.parts[-3:-2] == (label,)]
    return inner if len(inner) == len(rows) else unknown


def _heard(entry: Any, notes: list[str]) -> dict[str, Any]:
    """Read one recording; add what is doubtful about it to the notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        waveform, rate_hz = read_audio(entry, MAX_DURATION_S)
    level = float(np.sqrt(np.square(waveform, dtype=np.float64).mean()))
    if caught:
        notes += [str(one.message) for one in caught]
    elif level < QUIET:
        notes.append(f"{entry.get('path')}: it is almost silent, at {20 * math.log10(level + 1e-12):.0f} dB.")
    digest = hashlib.sha256(waveform.tobytes()).hexdigest()
    return {"duration_s": len(waveform) / rate_hz, "rate_hz": rate_hz, "digest": digest}


def refuse(found: Recordings) -> None:
    """Refuse recordings with too few classes, or classes with too few recordings."""
    counts = Counter(found.labels[i] for i in found.where("train", "validation"))
    if len(counts) < 2:
        raise ValueError(
            f"Training needs at least two {'texts' if found.task == 'transcribe' else 'classes'}, got "
            f"{', '.join(map(repr, counts)) or 'none'} in the column {found.columns['label']!r}."
        )
    if found.task == "transcribe":
        return
    if single := sorted(name for name, count in counts.items() if count < 2):
        raise ValueError(
            f"{len(single)} of {len(counts)} classes have a single recording to train on: {shortened(single)}. "
            f"A class needs two, and {FEW} or more to be learned. Add recordings, or leave these classes out."
        )
    test = Counter(found.labels[i] for i in found.where("test"))
    if test and found.task == "verify" and (len(test) < 2 or max(test.values()) < 2):
        raise ValueError(
            "Comparing voices needs a test split with two speakers, and two recordings of one of them. Got "
            f"{test.total()} recordings of {shortened(test)}."
        )
    unknown = sorted(set(test) - set(counts))
    if unknown and found.task == "classify":
        raise ValueError(
            f"{len(unknown)} classes are in the test split alone: {shortened(unknown)}. Add recordings of them to "
            "training, or leave them out."
        )


def _counted(notes: Sequence[str]) -> Iterator[str]:
    """Yield the notes about single recordings, joined where they differ in numbers alone."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for note in notes:
        name, _, what = note.partition(": ")
        alike.setdefault(re.sub(r"\d+", "", what), []).append((name, what))
    for group in alike.values():
        names = shortened((name for name, _ in group), 3)
        yield f"{len(group)} recordings, {names}: {group[0][1]} Check or remove them."


def _doubts(found: Recordings) -> Iterator[str]:
    table = found.table
    for column, what, remedy in (
        ("split", "splits", "The test knows these answers: remove them from one split"),
        ("label", "texts" if found.task == "transcribe" else "classes", "One label is wrong: correct it"),
    ):
        differ = table.groupby("digest")[column].transform("nunique") > 1
        if differ.any():
            same = table[differ].groupby("digest", sort=False)["file"].agg(lambda files: " = ".join(files[:2]))
            yield f"{len(same)} recordings are in two {what}: {shortened(same, 3)}. {remedy}."
    test = table.assign(test=table["split"] == "test").groupby("speaker")["test"].nunique()
    if len(both := test[test > 1]) and found.speakers:
        yield (
            f"{len(both)} speakers are in training and in test: {shortened(both.index)}. The test says nothing about "
            "new speakers. Move each to one split, unless these are the speakers of later use."
        )
    if found.task != "transcribe":
        yield from _doubts_about_classes(found)
    if table["rate_hz"].min() < 16_000 <= table["rate_hz"].max():
        yield "Recordings of less than 16,000 Hz lack high frequencies. Use what later recordings will have."


def _doubts_about_classes(found: Recordings) -> Iterator[str]:
    """Yield warnings for few recordings, imbalance, and classes that are told apart by something else than speech."""
    counts = Counter(found.labels[i] for i in found.where("train", "validation")).most_common()
    if few := [f"{name} ({count})" for name, count in reversed(counts) if count < FEW]:
        yield (
            f"{len(few)} classes have fewer than {FEW} recordings: {shortened(few, 5)}. Their figures mean little: "
            "record more."
        )
    (common, most), (rare, fewest) = counts[0], counts[-1]
    if most > IMBALANCE * fewest:
        yield (
            f"{common} has {most} recordings, {rare} has {fewest}. The loss is weighted and unweighted accuracy is "
            "measured; more recordings of the rare classes help more."
        )
    groups = found.table.groupby("label")
    rates, numbers = groups["rate_hz"].first(), groups["rate_hz"].nunique()
    if (numbers == 1).all() and rates.nunique() > 1:
        named = shortened((f"{name} {rate:,} Hz" for name, rate in rates.items()), 4)
        yield (
            f"Each class has one sampling rate: {named}. The model will learn the rate instead of the class. "
            "Record all classes in the same way."
        )
    spans = sorted(zip(groups["duration_s"].min(), groups["duration_s"].max(), strict=True))
    if all(one[1] < other[0] for one, other in pairwise(spans)) and groups.size().min() > 2:
        yield (
            "The durations of the classes do not overlap. The model may learn the duration instead of the class. Cut "
            "the recordings to the same lengths."
        )
