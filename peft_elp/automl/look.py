"""What is in a folder of recordings, and what speaks against training on it."""

from __future__ import annotations

import hashlib
import math
import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from peft_elp.speech.audio import AudioError, read_audio
from peft_elp.speech.data import TABLE_SUFFIXES, read_column, read_dataset
from peft_elp.speech.inference import MAX_DURATION_S
from peft_elp.wording import shortened

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}
LABELS = ("label", "emotion", "intent", "class", "command", "keyword", "category")
SPEAKERS = ("speaker", "speaker_id", "client_id")
TEXTS = ("text", "transcription", "sentence")
FEW = 10  # clips of a class
QUIET = 1e-3  # root mean square below which a recording holds nothing to learn from
IMBALANCE = 10  # the commonest class against the rarest


@dataclass
class Recordings:
    """The recordings that a training uses.

    Args:
        rows: The recordings with the columns `audio` and `duration_s`.
        labels: The class of each.
        speakers: The speaker of each; None if they are not known.
        splits: The split of each: "train", "validation" or "test".
        rates_hz: The sampling rate of each.
        columns: Which column was taken for what.
        warnings: What speaks against the data, each with what to do.
    """

    rows: Dataset
    labels: list[str]
    speakers: list[str] | None
    splits: list[str]
    rates_hz: list[int]
    columns: dict[str, str]
    warnings: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The classes of training and validation, sorted."""
        return sorted({self.labels[i] for i in self.where("train", "validation")})

    @property
    def durations_s(self) -> list[float]:
        """The duration of each recording."""
        return list(self.rows["duration_s"])

    def where(self, *splits: str) -> list[int]:
        """Return the numbers of the recordings of some splits."""
        return [number for number, split in enumerate(self.splits) if split in splits]

    def file(self, number: int) -> str:
        """Return the path of a recording, or its row where it is not a file."""
        return self.rows[number]["audio"]["path"] or f"row {number}"

    def classes(self) -> list[dict[str, Any]]:
        """Return for each class its clips by split, seconds, durations, speakers and sampling rates."""
        found = []
        for name in sorted(set(self.labels)):
            of = [number for number, label in enumerate(self.labels) if label == name]
            durations = [self.durations_s[number] for number in of]
            found.append(
                {
                    "class": name,
                    "clips": {split: sum(self.splits[number] == split for number in of) for split in SPLITS},
                    "seconds": sum(durations),
                    "shortest": min(durations),
                    "longest": max(durations),
                    "speakers": len({self.speakers[number] for number in of}) if self.speakers else None,
                    "rates": sorted({self.rates_hz[number] for number in of}),
                }
            )
        return found

    def table(self, most: int = 30) -> str:
        """Return the classes as a table of text."""
        classes = self.classes()
        rows: list[tuple[str, ...]] = [("class", "train", "validation", "test", "seconds", "each", "speakers", "Hz")]
        for one in classes[:most]:
            each = f"{one['shortest']:.1f}-{one['longest']:.1f}"
            who, rates = str(one["speakers"] or "?"), shortened(one["rates"], 2)
            rows.append(
                (
                    printable(one["class"])[:30],
                    *map(str, one["clips"].values()),
                    f"{one['seconds']:.0f}",
                    each,
                    who,
                    rates,
                )
            )
        widths = [max(len(str(row[column])) for row in rows) for column in range(8)]
        lines = ["  ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
        more = [f"... and {len(classes) - most} more classes"] if len(classes) > most else []
        return "\n".join(line.rstrip() for line in [*lines, *more])


def look(
    folder: str | Path,
    label: str | None = None,
    speaker: str | None = None,
    verify: bool = False,
    skip_bad: bool = False,
    progress: bool = True,
) -> Recordings:
    """Read all recordings of a folder once, and find what cannot be trained or should be known before.

    Args:
        folder: A folder `<label>/*.wav`, `<label>/<speaker>/*.wav`, or such a folder for each split; a folder or file
            with a table; or whatever else `peft_elp.speech.data.read_dataset` reads.
        label: The column of the classes. None finds it.
        speaker: The column of the speakers. None finds it, or takes the folders inside those of the labels.
        verify: Whether voices are compared. The classes are the speakers then, and those of the test split are others.
        skip_bad: Whether recordings that cannot be read are left out, with a warning.
        progress: Show a progress bar.

    Raises:
        ValueError: It cannot be trained on: no recordings, fewer than two classes, broken files, a class with a single
            recording.
        FileNotFoundError: There is no such folder.
    """
    splits = list(_splits(Path(folder).expanduser()))
    merged: list[dict[str, Any]] = []
    columns = _columns([rows for _, rows in splits], label, speaker, verify)
    notes: list[str] = []
    bad: list[str] = []
    digests: list[str] = []
    with tqdm(total=sum(len(rows) for _, rows in splits), desc="Looking", unit="clip", disable=not progress) as bar:
        for split, rows in splits:
            labels = read_column(rows, columns["label"])
            speakers = _speakers(rows, columns.get("speaker"))
            for number, entry in enumerate(rows["audio"]):
                bar.update()
                row = {"audio": entry, "label": labels[number], "speaker": speakers and speakers[number]}
                try:
                    row |= _heard(entry, notes)
                except AudioError as error:
                    bad.append(f"{(entry or {}).get('path') or f'row {number} of {split}'}: {error}")
                    continue
                digests.append(row.pop("digest"))
                merged.append({**row, "split": split})
    if bad and not (skip_bad and merged):
        listed = "".join(f"\n  {one}" for one in bad[:5])
        raise ValueError(
            f"{len(bad)} of {len(bad) + len(merged)} recordings cannot be used.{listed}\nRepair or remove them, or "
            "leave them out with skip_bad (--skip-bad)."
        )
    data = Dataset.from_dict(
        {"audio": [row["audio"] for row in merged], "duration_s": [row["duration_s"] for row in merged]}
    )
    who = [row["speaker"] for row in merged]
    found = Recordings(
        rows=data,
        labels=[row["label"] for row in merged],
        speakers=who if all(who) else None,
        splits=[row["split"] for row in merged],
        rates_hz=[row["rate_hz"] for row in merged],
        columns=columns,
    )
    if bad:
        found.warnings.append(f"{len(bad)} recordings cannot be read and are left out: {shortened(bad, 3)}.")
    _refuse(found, verify)
    found.warnings += [*_counted(notes), *_doubts(found, digests)]
    return found


def printable(text: str) -> str:
    """Return text in which characters that act on a terminal are escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def _splits(place: Path) -> Iterator[tuple[str, Dataset]]:
    """Yield the splits of a folder, a table or a Hub data set; without splits, everything is for training."""
    if not place.exists():
        raise FileNotFoundError(
            f"{place} does not exist. Pass a folder of recordings, or a .csv, .tsv or .jsonl file."
        )
    inside = (
        {path.name if path.is_dir() else path.stem: path for path in sorted(place.iterdir())} if place.is_dir() else {}
    )
    there = {name for name, path in inside.items() if path.is_dir() or path.suffix in TABLE_SUFFIXES}
    named = {split: next((name for name in names if name in there), None) for split, names in SPLITS.items()}
    folders = {name for name, path in inside.items() if path.is_dir() and not name.startswith(".")}
    table = place if place.is_file() else next((p for n, p in inside.items() if n == "metadata" and p.is_file()), None)
    if table is not None:
        everything = read_dataset(table, None)
        if "split" in everything.column_names:
            values = [str(value or "").strip() for value in everything["split"]]
            yield from _by_column(everything, values, table)
        else:
            yield "train", everything
    elif named["train"] and folders <= set(filter(None, named.values())):
        for split, name in named.items():
            if name is not None:
                yield split, read_dataset(place, name)
    elif place.is_dir() and next(place.rglob("*.parquet"), None) is not None:
        raise ValueError(f"{place} holds Parquet files. Write them as a table first: see peft_elp.speech.data.")
    else:
        try:
            yield "train", read_dataset(place.resolve().parent, place.resolve().name)
        except ValueError as error:
            raise ValueError(
                f"There are no labelled recordings in {place}: it holds {shortened(sorted(inside)) or 'nothing'}. "
                "Make a folder of recordings for each label, or a table metadata.csv with file_name and label."
            ) from error


def _by_column(everything: Dataset, values: list[str], table: Path) -> Iterator[tuple[str, Dataset]]:
    known = {name: split for split, names in SPLITS.items() for name in names}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(
            f"The column `split` of {table} must hold train, validation or test, got {shortened(map(repr, unknown))}."
        )
    for split in SPLITS:
        if chosen := [row for row, value in enumerate(values) if known[value] == split]:
            yield split, everything.select(chosen)


def _columns(splits: Sequence[Dataset], label: str | None, speaker: str | None, verify: bool) -> dict[str, str]:
    """Return which column is the label and which the speaker; one with empty rows is not taken unasked."""
    columns = splits[0].column_names
    if wrong := next((name for name in (label, speaker) if name and name not in columns), None):
        raise ValueError(f"There is no column {wrong!r}; the data set has {', '.join(columns)}.")
    filled = [name for name in columns if all(_is_filled(rows, name) for rows in splits)]
    who = speaker or next((name for name in SPEAKERS if name in filled and name != label), None)
    if verify:
        label = speaker = who = label or who or ("label" if "label" in filled else None)
    what = label or next((name for name in LABELS if name in filled), None)
    if what is None:
        text = any(name in filled for name in TEXTS)
        raise ValueError(
            f"No column tells the classes; the data set has {', '.join(columns)}. "
            + ("Recognition of text is not trained here: use examples/run_speech_recognition.py. " if text else "")
            + ("To compare voices, pass task='verify' (--task verify). " if who else "")
            + "Name the column of the classes with label (--label)."
        )
    return {"label": what, **({"speaker": who} if who else {})}


def _is_filled(rows: Dataset, column: str) -> bool:
    return column in rows.column_names and all(value not in (None, "") for value in rows[column])


def _speakers(rows: Dataset, column: str | None) -> list[str] | None:
    if column is not None:
        return read_column(rows, column)
    paths = [Path(entry["path"]) for entry in rows["audio"] if entry and entry["path"]]
    if "label" not in rows.column_names or len(paths) < len(rows):
        return None
    inner = [
        path.parts[len(path.parts) - 2] if len(path.parts) > 2 and path.parts[-3] == label else None
        for path, label in zip(paths, rows["label"], strict=True)
    ]
    return [str(name) for name in inner] if all(inner) else None


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


def _refuse(found: Recordings, verify: bool) -> None:
    counts = Counter(found.labels[i] for i in found.where("train", "validation"))
    if len(counts) < 2:
        raise ValueError(
            f"Training needs at least two classes, got {', '.join(map(repr, counts)) or 'none'} in the column "
            f"{found.columns['label']!r}."
        )
    if single := sorted(name for name, count in counts.items() if count < 2):
        raise ValueError(
            f"{len(single)} of {len(counts)} classes have a single recording to train on: {shortened(single)}. "
            f"A class needs two, and {FEW} or more to be learned. Add recordings, or leave these classes out."
        )
    unknown = sorted({found.labels[i] for i in found.where("test")} - set(counts))
    if unknown and not verify:
        raise ValueError(
            f"{len(unknown)} classes are in the test split alone: {shortened(unknown)}. Add recordings of them to "
            "training, or leave them out."
        )


def _counted(notes: Sequence[str]) -> Iterator[str]:
    """Yield the notes about single recordings, joined where they say the same."""
    alike: dict[str, list[str]] = defaultdict(list)
    for note in notes:
        name, _, what = note.partition(": ")
        alike[what if "reach" not in what and "dB" not in what else what.partition(",")[0] + "."].append(name)
    for what, names in alike.items():
        yield f"{len(names)} recordings, {shortened(names, 3)}: {what} Check or remove them."


def _doubts(found: Recordings, digests: Sequence[str]) -> Iterator[str]:
    counts = Counter(found.labels[i] for i in found.where("train", "validation"))
    if few := sorted((count, name) for name, count in counts.items() if count < FEW):
        named = shortened((f"{name} ({count})" for count, name in few), 5)
        yield f"{len(few)} classes have fewer than {FEW} recordings: {named}. Their figures mean little: record more."
    if max(counts.values()) > IMBALANCE * min(counts.values()):
        common, rare = max(counts, key=lambda name: counts[name]), min(counts, key=lambda name: counts[name])
        yield (
            f"{common} has {counts[common]} recordings, {rare} has {counts[rare]}. The loss is weighted and "
            "unweighted accuracy is measured; more recordings of the rare classes help more."
        )
    same: dict[str, list[int]] = defaultdict(list)
    for number, digest in enumerate(digests):
        same[digest].append(number)
    for what, values, remedy in (
        ("two splits", found.splits, "The test knows these answers: remove them from one split"),
        ("two classes", found.labels, "One label is wrong: correct it"),
    ):
        twice = [group for group in same.values() if len({values[i] for i in group}) > 1]
        if twice:
            names = shortened((" = ".join(found.file(i) for i in group[:2]) for group in twice), 3)
            yield f"{len(twice)} recordings are in {what}: {names}. {remedy}."
    if found.speakers:
        yield from _speakers_in_splits(found)
    yield from _shortcuts(found)


def _speakers_in_splits(found: Recordings) -> Iterator[str]:
    where: dict[str, set[str]] = defaultdict(set)
    for speaker, split in zip(found.speakers or (), found.splits, strict=True):
        where[speaker].add("test" if split == "test" else "training")
    if both := sorted(speaker for speaker, splits in where.items() if len(splits) > 1):
        yield (
            f"{len(both)} speakers are in training and in test: {shortened(both)}. The test says nothing about new "
            "speakers. Move each to one split, unless these are the speakers of later use."
        )


def _shortcuts(found: Recordings) -> Iterator[str]:
    """Yield warnings for classes that are told apart by something that is not speech."""
    classes = found.classes()
    rates = {one["class"]: tuple(one["rates"]) for one in classes}
    if len(set(rates.values())) > 1 and all(len(rate) == 1 for rate in rates.values()):
        named = shortened((f"{name} {rate[0]:,} Hz" for name, rate in rates.items()), 4)
        yield (
            f"Each class has one sampling rate: {named}. The model will learn the rate instead of the class. "
            "Record all classes in the same way."
        )
    spans = sorted((one["shortest"], one["longest"]) for one in classes)
    apart = all(one[1] < other[0] for one, other in pairwise(spans))
    if apart and min(Counter(found.labels).values()) > 2:
        yield (
            "The durations of the classes do not overlap. The model may learn the duration instead of the class. Cut "
            "the recordings to the same lengths."
        )
    if (
        len(set(found.rates_hz)) > 1
        and (low := statistics.mode(found.rates_hz))
        and min(found.rates_hz) < 16_000 <= low
    ):
        yield "Recordings of less than 16,000 Hz lack high frequencies. Use what later recordings will have."
