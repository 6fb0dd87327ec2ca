"""Data sets of recordings: read from the Hub or a folder, checked before training, split by speaker or session.

Needs datasets, scikit-learn, soundfile and soxr: `pip install 'peft-elp[recipes]'`.
"""

from __future__ import annotations

import csv
import json
import mimetypes
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peft_elp.backbones import receptive_field

from .audio import AUDIO_SUFFIXES, RATE_HZ, AudioError, read_audio

try:
    from datasets import Audio, ClassLabel, Dataset, Features, Value, load_dataset
    from sklearn.model_selection import LeaveOneGroupOut
except ImportError as error:
    raise ImportError(
        f"peft_elp.speech.data needs datasets and scikit-learn ({error}). Install them: pip install 'peft-elp[recipes]'."
    ) from error

AUDIO_COLUMNS = ("file_name", "audio", "path", "file")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
FINDINGS = Features(
    {"reason": Value("string"), "detail": Value("string"), "duration_s": Value("float64"), "rate_hz": Value("int64")}
)
SHOWN = 5  # mistakes that an error lists


class Trial(NamedTuple):
    """Two recordings, and whether one speaker is heard in both (1) or two are (0)."""

    label: int
    file_a: str
    file_b: str


def read_dataset(
    name: str | Path, split: str | None, config_name: str | None = None, *, audio_column_name: str | None = None
) -> Dataset:
    """One split of a data set from the Hub, a folder or a table, with its recordings in a column `audio`.

    Args:
        name: A Hub id, or one of these local layouts. A path in a table is relative to the folder of the table:

            - a folder in `audiofolder` layout: `<name>/<split>/metadata.csv` with a column `file_name`, or
              `<name>/<split>/<label>/*.wav`, which gives a column `label`;
            - a folder with a table for each split, `<name>/<split>.csv`;
            - one table with a column `split`: `<name>` itself, or `<name>/metadata.csv`;
            - a copy of a Hub data set, in Parquet files.

            A table is a `.csv`, `.tsv` or `.jsonl` file.
        split: The name of the split; None takes all rows of a single table.
        config_name: The configuration of a Hub data set.
        audio_column_name: The column of the recordings. None takes a column of type `Audio`, or else the first of
            `file_name`, `audio`, `path` and `file`.

    Returns:
        A column `audio` of type `Audio(decode=False)`, whose entries `peft_elp.speech.audio.decode` takes, and every other
        column as it was; the columns of a csv file are text. Nothing is decoded yet: see `check_audio`.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There is no such split or column, or a row of a table is broken.

    Examples:
        >>> calls = read_dataset("calls", "train")  # doctest: +SKIP
        >>> calls.column_names  # doctest: +SKIP
        ['audio', 'label']
    """
    place = Path(name).expanduser()
    if place.exists():
        if local := _local_rows(place, split):
            if config_name is not None:
                raise ValueError(
                    f"{name} is a local folder and has no configuration {config_name!r}. Leave config_name out."
                )
            return from_rows(*local, audio_column_name=audio_column_name)
        if next(place.rglob("*.parquet"), None) is None:
            there = sorted({path.stem for path in place.iterdir() if path.is_dir() or path.suffix in TABLE_SUFFIXES})
            raise ValueError(
                f"{name} has no split {split!r} with recordings; it holds {', '.join(there) or 'nothing'}. A split is "
                "a folder <split>/ with metadata.csv or with a folder of recordings for each label, a table "
                "<split>.csv, or a value in the column `split` of metadata.csv."
            )
        name = place
    elif place.is_absolute() or str(name).startswith((".", "~")) or place.suffix in TABLE_SUFFIXES:
        raise FileNotFoundError(f"{name} does not exist. Give a folder, a .csv, .tsv or .jsonl file, or a Hub id.")
    if split is None:
        raise ValueError(f"{name} has several splits: name one of them, as in split='train'.")
    return _with_audio(load_dataset(str(name), config_name, split=split), audio_column_name)


def from_rows(
    rows: Sequence[Mapping[str, Any]], folder: str | Path = "", *, audio_column_name: str | None = None
) -> Dataset:
    """A data set made from rows that name a recording each.

    Args:
        rows: A mapping for each recording, from column to value.
        folder: The folder that relative paths of recordings count from.
        audio_column_name: As in `read_dataset`.

    Returns:
        Columns as in `read_dataset`.

    Raises:
        ValueError: There are no rows, or they have no column of recordings.

    Examples:
        >>> from_rows([{"path": "a.wav", "label": "yes"}], folder="calls").column_names
        ['audio', 'label']
    """
    if not rows:
        raise ValueError("A data set needs at least one recording, got no rows.")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    found = _find_audio(columns, audio_column_name)
    paths = [str(Path(folder, row[found]).absolute()) if row.get(found) else None for row in rows]
    others = {column: [row.get(column) for row in rows] for column in columns if column not in (found, "audio")}
    return Dataset.from_dict({"audio": paths, **others}).cast_column("audio", Audio(decode=False))


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `.csv`, `.tsv` or `.jsonl` file.

    Args:
        path: The file.

    Returns:
        A dictionary for each row, from column to value. Values are text, except in `.jsonl` files.

    Raises:
        ValueError: A row has more or fewer fields than the header, or is not a JSON object.

    Examples:
        >>> read_table("calls/train.csv")[0]  # doctest: +SKIP
        {'file_name': 'a.wav', 'label': 'yes'}
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            try:
                rows.extend(dict(json.loads(line)) for line in filter(str.strip, file))
            except (TypeError, ValueError) as error:
                raise ValueError(f"Row {len(rows) + 1} of {path} is not a JSON object ({error}).") from error
            return rows
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}, has {'more' if None in row else 'fewer'} fields than the "
                    f"{len(reader.fieldnames or [])} of its header. Quote fields that contain the separator."
                )
            rows.append(row)
    return rows


def write_table(dataset: Dataset, path: str | Path) -> None:
    """Write a data set whose recordings are files as a table, which `read_dataset` and the recipes read.

    Args:
        dataset: A data set such as the readers of `peft_elp.corpora` return.
        path: A `.csv` file. With the name `<folder>/<split>.csv`, `read_dataset` takes it as that split of `<folder>`.

    Raises:
        ValueError: The path does not end in `.csv`, or a recording is not a file.

    Examples:
        >>> from peft_elp.corpora import voxceleb1  # doctest: +SKIP
        >>> write_table(voxceleb1("VoxCeleb1", "train"), "voices/train.csv")  # doctest: +SKIP
        >>> read_dataset("voices", "train")  # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix != ".csv":
        raise ValueError(f"A table is written to a .csv file, got {str(path)!r}.")
    files: list[str] = []
    for row, entry in enumerate(dataset["audio"]):
        if not entry or not entry["path"] or entry["bytes"] is not None:
            raise ValueError(
                f"The recording in row {row} is not a file. A table names files: save this data set with to_parquet."
            )
        files.append(str(Path(entry["path"]).absolute()))
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {"file_name": files}
    for name in (name for name in dataset.column_names if name not in ("audio", "file_name")):
        values, feature = list(dataset[name]), dataset.features[name]
        if isinstance(feature, ClassLabel):  # names instead of numbers, as in `read_column`
            values = ["" if value is None or value < 0 else feature.int2str(value) for value in values]
        columns[name] = values
    Dataset.from_dict(columns).to_csv(path)


def check_audio(
    dataset: Dataset,
    config: Any = None,
    *,
    min_duration_in_seconds: float = 0.0,
    max_duration_in_seconds: float | None = None,
    on_bad_audio: Literal["error", "skip"] = "error",
    rate_hz: int = RATE_HZ,
    num_proc: int | None = None,
) -> Dataset:
    """Decode every recording once, before training, and refuse or leave out the ones that cannot be used.

    Args:
        dataset: A data set with a column `audio`, as the readers return it.
        config: The configuration of the encoder. A recording with fewer samples than its convolutions need for one
            frame (400 in wav2vec 2.0) is too short. None, or an encoder without such convolutions: no such bound.
        min_duration_in_seconds: A recording below this duration is too short.
        max_duration_in_seconds: A recording above this duration is too long; None has no bound.
        on_bad_audio: "error" refuses the data set, "skip" leaves bad recordings out with a warning.
        rate_hz: The sampling rate of the encoder in Hz. A warning counts the recordings with another rate, which
            `decode` resamples.
        num_proc: The number of processes that decode.

    Returns:
        The data set, or its good recordings, with a column `duration_s`: seconds.

    Raises:
        ValueError: Recordings are missing, unreadable, empty, too short or too long. The error counts them for each
            reason and names the first few. With "skip": no recording is left.

    Examples:
        >>> calls = check_audio(read_dataset("calls", "train"), on_bad_audio="skip")  # doctest: +SKIP
        >>> sum(calls["duration_s"]) / 3600  # doctest: +SKIP
        1.5
    """
    if on_bad_audio not in ("error", "skip"):
        raise ValueError(f"on_bad_audio is 'error' or 'skip', got {on_bad_audio!r}.")
    # Configurations of encoders that take log-Mel frames have no convolutions over samples.
    least_s = receptive_field(config) / rate_hz if hasattr(config, "conv_kernel") else 0.0
    most_s = float("inf") if max_duration_in_seconds is None else max_duration_in_seconds
    inspect = partial(_inspect, least_s=max(least_s, min_duration_in_seconds), most_s=most_s)
    options = {"with_indices": True, "remove_columns": "audio", "features": FINDINGS, "desc": "Checking audio"}
    findings = dataset.with_format(None).select_columns("audio").map(inspect, num_proc=num_proc, **options)
    reasons = list(findings["reason"])
    good = [index for index, reason in enumerate(reasons) if reason is None]
    if len(good) < len(dataset):
        counts = ", ".join(f"{count} {reason}" for reason, count in Counter(filter(None, reasons)).most_common())
        message = f"{len(dataset) - len(good)} of {len(dataset)} recordings cannot be used: {counts}." + _listed(
            [detail for detail in findings["detail"] if detail is not None]
        )
        if on_bad_audio == "error" or not good:
            way_out = (
                "Repair or remove them, allow other durations with min_duration_in_seconds and "
                "max_duration_in_seconds, or leave them out with on_bad_audio='skip'."
                if good
                else "No recording is left."
            )
            raise ValueError(f"{message}\n{way_out}")
        warnings.warn(f"{message}\nThey are left out.", stacklevel=2)
    rates = Counter(rate for rate, reason in zip(findings["rate_hz"], reasons, strict=True) if reason is None)
    if other_rates := ", ".join(f"{rates[rate]} of {rate:,} Hz" for rate in sorted(rates) if rate != rate_hz):
        warnings.warn(f"Decoding resamples recordings to {rate_hz:,} Hz: {other_rates}.", stacklevel=2)
    if "duration_s" in dataset.column_names:
        dataset = dataset.remove_columns("duration_s")
    return dataset.add_column("duration_s", list(findings["duration_s"])).select(good)  # pyright: ignore[reportCallIssue]


def read_column(dataset: Dataset, column: str) -> list[str]:
    """The values of a column as text; classes as their names.

    Args:
        dataset: The data set.
        column: The name of the column.

    Raises:
        ValueError: There is no such column, or a row has no value in it.

    Examples:
        >>> read_column(from_rows([{"path": "a.wav", "label": "yes"}]), "label")
        ['yes']
    """
    if column not in dataset.column_names:
        raise ValueError(f"There is no column {column!r}; the data set has {', '.join(dataset.column_names)}.")
    values, feature = list(dataset.with_format(None)[column]), dataset.features[column]
    if isinstance(feature, ClassLabel):
        values = [None if value is None or value < 0 else feature.int2str(value) for value in values]
    texts = ["" if value is None else str(value) for value in values]
    blank = [index for index, text in enumerate(texts) if not text.strip()]
    if blank:
        raise ValueError(
            f"{len(blank)} of {len(texts)} rows have no value in the column {column!r}; the first is row {blank[0]}. "
            f"Leave these rows out, or name another column: {', '.join(dataset.column_names)}."
        )
    return texts


def label_names(train: Dataset, *others: Dataset, column: str = "label") -> list[str]:
    """The names of the classes in the training data, sorted.

    Args:
        train: The training data.
        *others: Data sets, such as validation and test, whose classes must be among them.
        column: The column that holds the classes.

    Raises:
        ValueError: There are fewer than two classes, or another data set has a class that training does not have.

    Examples:
        >>> label_names(from_rows([{"path": "a.wav", "label": "yes"}, {"path": "b.wav", "label": "no"}]))
        ['no', 'yes']
    """
    names = sorted(set(read_column(train, column)))
    if len(names) < 2:
        raise ValueError(f"Training needs two classes or more; the column {column!r} holds only {names[0]!r}.")
    unknown = sorted({name for other in others for name in read_column(other, column)} - set(names))
    if unknown:
        raise ValueError(
            f"{len(unknown)} classes in the column {column!r} are not among the {len(names)} classes of training. "
            f"Leave them out, or choose other splits.{_listed(unknown)}"
        )
    return names


def check_disjoint(train: Dataset, test: Dataset, column: str = "speaker") -> None:
    """Check that nobody is heard both in training and in test.

    Args:
        train: The training data.
        test: The test data.
        column: The column that names who is heard.

    Raises:
        ValueError: A value of the column is in both. The error names the first few.

    Examples:
        >>> check_disjoint(*(from_rows([{"path": "a.wav", "speaker": name}]) for name in ("Ann", "Bob")))
    """
    both = sorted(set(read_column(train, column)) & set(read_column(test, column)))
    if both:
        raise ValueError(
            f"{len(both)} values of the column {column!r} are both in training and in test.{_listed(both)}"
        )


def leave_one_group_out(dataset: Dataset, column: str) -> Iterator[tuple[str, list[int], list[int]]]:
    """Folds of cross-validation, each with one session or speaker held out; scikit-learn's `LeaveOneGroupOut`.

    Args:
        dataset: The data set.
        column: The column that names sessions or speakers.

    Yields:
        The value that is held out, and the row numbers of training and of test, for `dataset.select`.

    Raises:
        ValueError: The column has fewer than two values.

    Examples:
        >>> rows = [{"path": f"{name}.wav", "speaker": name} for name in ("Ann", "Bob", "Bob")]
        >>> list(leave_one_group_out(from_rows(rows), "speaker"))
        [('Ann', [1, 2], [0]), ('Bob', [0], [1, 2])]
    """
    groups = read_column(dataset, column)
    for train, test in LeaveOneGroupOut().split(groups, groups=groups):
        yield groups[test[0]], train.tolist(), test.tolist()


def read_trials(
    path: str | Path, folder: str | Path | None = None, columns: tuple[str, str, str] = ("label", "file_a", "file_b")
) -> list[Trial]:
    """The trials of speaker verification in a list, with the paths of their recordings.

    Args:
        path: A text file with lines `label file file`, as VoxCeleb publishes them, or a `.csv`, `.tsv` or `.jsonl`
            table.
        folder: The folder that paths in the list count from; None is the folder of the list. For VoxCeleb1 it is
            `<root>/wav`.
        columns: The columns of a table: label, first file, second file.

    Raises:
        ValueError: A line is not a trial, a label is neither 0 nor 1, or all labels are the same.
        FileNotFoundError: Recordings are missing. The error counts them and names the first few.

    Examples:
        >>> read_trials("VoxCeleb1/veri_test.txt", "VoxCeleb1/wav")[0]  # doctest: +SKIP
        Trial(label=1, file_a='VoxCeleb1/wav/id10270/x/1.wav', file_b='VoxCeleb1/wav/id10270/y/2.wav')
    """
    path = Path(path)
    if path.suffix in TABLE_SUFFIXES:
        table = read_table(path)
        if absent := [column for column in columns if table and column not in table[0]]:
            raise ValueError(f"{path} has no column {', '.join(absent)}; it has {', '.join(table[0])}.")
        rows = [[str(row[column]) for column in columns] for row in table]
    else:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = next((row for row in rows if len(row) != 3 or row[0] not in ("0", "1")), None)
    if wrong:
        raise ValueError(f"{path} has the line {' '.join(wrong)!r}. A trial is a label, 0 or 1, and two files.")
    if {row[0] for row in rows} != {"0", "1"}:
        raise ValueError(
            f"{path} needs trials with label 1 and with label 0; its {len(rows)} trials all have the same label."
        )
    folder = path.parent if folder is None else Path(folder)
    trials = [Trial(int(label), *(str(folder / file) for file in files)) for label, *files in rows]
    files = dict.fromkeys(file for trial in trials for file in trial[1:])
    if missing := [file for file in files if not Path(file).is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} recordings in {path} do not exist in {folder}.{_listed(missing)}"
        )
    return trials


def _local_rows(place: Path, split: str | None) -> tuple[list[dict[str, Any]], Path] | None:
    """The rows of a split and the folder that their paths count from; None if no layout has such a split."""
    if place.is_file():
        return _rows_of_split(place, split)
    for stem in (place / split / "metadata", place / split) if split else ():
        if table := _table(stem):
            return read_table(table), table.parent
    if split:
        files = _labelled_files(place / split)
        if files:
            return [{"audio": str(file), "label": file.relative_to(place / split).parts[0]} for file in files], Path()
    table = _table(place / "metadata")
    return _rows_of_split(table, split) if table else None


def _labelled_files(folder: Path) -> list[Path]:
    """The recordings under `<folder>/<label>/`. A recording outside of these is an error, an odd file a warning."""
    walked = os.walk(folder, followlinks=True)  # A dangling link is a file here: `check_audio` names it.
    inside = sorted(Path(place, name) for place, _, names in walked for name in names if not name.startswith("."))
    files = [file for file in inside if file.suffix.lower() in AUDIO_SUFFIXES]
    labelled = [file for file in files if file.parent != folder]
    if loose := [str(file) for file in files if file.parent == folder] if labelled else []:
        raise ValueError(
            f"{len(loose)} recordings are not in the folder of a label. Move them into one.{_listed(loose)}"
        )
    others = [str(file) for file in inside if file.suffix and file not in {*files} and not _is_text(file)]
    if labelled and others:
        warnings.warn(f"{len(others)} files do not have the name of a recording.{_listed(others)}", stacklevel=5)
    return labelled


def _is_text(file: Path) -> bool:
    kind = mimetypes.guess_type(file)[0] or ""
    return kind.startswith("text/") or kind == "application/json"


def _table(stem: Path) -> Path | None:
    found = [path for suffix in TABLE_SUFFIXES if (path := stem.with_name(stem.name + suffix)).is_file()]
    if len(found) > 1:
        raise ValueError(f"There are two tables, {' and '.join(map(str, found))}. Remove one.")
    return found[0] if found else None


def _rows_of_split(table: Path, split: str | None) -> tuple[list[dict[str, Any]], Path]:
    rows = read_table(table)
    if split is not None:
        splits = [str(row.get("split") or "").strip() for row in rows]
        if split not in splits:
            there = ", ".join(sorted({*splits} - {""})) or "nothing"
            raise ValueError(
                f"{table} has no rows with {split!r} in a column `split`, but {there}. split=None takes all rows."
            )
        if "" in splits:
            raise ValueError(
                f"{splits.count('')} of {len(rows)} rows of {table} name no split; the first is row "
                f"{splits.index('')}. Fill the column `split`, or leave these rows out."
            )
        rows = [row for row, name in zip(rows, splits, strict=True) if name == split]
    return rows, table.parent


def _with_audio(dataset: Any, wanted: str | None) -> Dataset:
    kinds = dataset.features
    column = wanted or next((name for name in kinds if isinstance(kinds[name], Audio)), None)
    column = _find_audio(list(kinds), column)
    kind = kinds[column]
    recorded = isinstance(kind, Audio) or (isinstance(kind, dict) and {*kind} == {"bytes", "path"})
    if not recorded and kind not in (Value("string"), Value("large_string")):
        raise ValueError(f"The column {column!r} holds {kind}, where recordings or paths belong.")
    if column != "audio":
        dataset = dataset.remove_columns("audio") if "audio" in kinds else dataset
        dataset = dataset.rename_column(column, "audio")
    return dataset.cast_column("audio", Audio(decode=False))


def _find_audio(columns: Sequence[str], wanted: str | None) -> str:
    names = [wanted] if wanted else AUDIO_COLUMNS
    found = next((name for name in names if name in columns), None)
    if found is None:
        raise ValueError(
            f"No column of recordings: none of {', '.join(names)} is among {', '.join(columns)}. Name the column "
            "with audio_column_name."
        )
    return found


def _inspect(row: dict[str, Any], index: int, least_s: float, most_s: float) -> dict[str, Any]:
    """The findings of `check_audio` about one recording."""
    name = (row["audio"] or {}).get("path") or f"row {index}"
    try:
        waveform, rate_hz = read_audio(row["audio"])
    except AudioError as error:
        return {"reason": error.reason, "detail": f"{name}: {error}", "duration_s": None, "rate_hz": None}
    duration_s = len(waveform) / rate_hz
    reason = "too short" if duration_s < least_s else "too long" if duration_s > most_s else None
    detail = f"{name}: {duration_s:.4g} s, {reason}: {least_s:.4g} s to {most_s:.4g} s are allowed"
    return {"reason": reason, "detail": detail if reason else None, "duration_s": duration_s, "rate_hz": rate_hz}


def _listed(items: Sequence[str]) -> str:
    more = [f"... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return "".join(f"\n  {item}" for item in [*items[:SHOWN], *more])
