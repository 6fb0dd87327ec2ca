"""Data sets of recordings: read from the Hub or a folder, checked before training, split by speaker or session.

Needs datasets, scikit-learn, soundfile and soxr: `pip install 'peft-elp[recipes]'`.
"""

from __future__ import annotations

import csv
import glob
import json
import mimetypes
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peft_elp.backbones import receptive_field

from .audio import RATE_HZ, AudioError, read_audio

try:
    from datasets import Audio, ClassLabel, Dataset, Features, Value, load_dataset
    from sklearn.model_selection import LeaveOneGroupOut
except ImportError as error:
    raise ImportError(
        f"peft_elp.speech.data needs datasets and scikit-learn ({error}): pip install 'peft-elp[recipes]'"
    ) from error

AUDIO_COLUMNS = ("file_name", "audio", "path", "file")
# Usual names of the other columns, ours first.
COLUMNS = {
    "label": ("label", "emotion", "intent", "class", "command", "keyword", "category"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "text": ("text", "transcription", "sentence"),
}
SPLITS = ("train", "validation", "valid", "dev", "test")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
FINDINGS = Features(
    {"reason": Value("string"), "detail": Value("string"), "duration_s": Value("float64"), "rate_hz": Value("int64")}
)
SHOWN = 5  # mistakes that an error lists


class Trial(NamedTuple):
    """Two recordings, and whether they are of one speaker (1) or of two (0)."""

    label: int
    file_a: str
    file_b: str


def read_dataset(
    name: str | Path, split: str | None, config_name: str | None = None, *, audio_column_name: str | None = None
) -> Dataset:
    """Read one split of a data set from the Hub, a folder or a table, with its recordings in a column `audio`.

    Args:
        name: A Hub id; a folder with `<split>/metadata.csv`, `<split>/<label>/*.wav` (which gives a column `label`),
            `<split>.csv` or Parquet files; or a table with a column `split`, `<name>` itself or `<name>/metadata.csv`.
            A table is a `.csv`, `.tsv` or `.jsonl` file with paths relative to its folder; only JSON has types.
        split: The name of the split; None takes all of a single table or of `<name>/<label>/*.wav`.
        config_name: The configuration of a Hub data set.
        audio_column_name: The column of the recordings. None takes a column of type `Audio`, or else the first of
            `file_name`, `audio`, `path` and `file`.

    Returns:
        A column `audio` of type `Audio(decode=False)`, whose entries `peft_elp.speech.audio.decode` takes, and every
        other column as it was. Nothing is decoded yet: see `check_audio`.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There is no such split or column, or a row of a table is broken.
    """
    place = Path(name).expanduser()
    if not place.exists():
        if place.is_absolute() or str(name).startswith((".", "~")) or place.suffix in TABLE_SUFFIXES:
            raise FileNotFoundError(f"{name} does not exist. Pass a folder, a .csv, .tsv or .jsonl file, or a Hub id.")
        place = name
    elif local := _local_rows(place, split):
        if config_name is not None:
            raise ValueError(f"config_name must be None for a local folder, got {config_name!r} with {name}.")
        return from_rows(*local, audio_column_name=audio_column_name)
    elif next(place.rglob("*.parquet"), None) is None:
        there = sorted({path.stem for path in place.iterdir() if path.is_dir() or path.suffix in TABLE_SUFFIXES})
        raise ValueError(
            f"{name} has no split {split!r} with recordings; it holds {', '.join(there) or 'nothing'}. A split is a "
            "folder <split>/ with metadata.csv or with a folder of recordings for each label, a table <split>.csv, or "
            "a value in the column `split` of metadata.csv."
        )
    if split is None:
        raise ValueError(f"{name} has several splits: name one of them, as in split='train'.")
    dataset: Any = load_dataset(str(place), config_name, split=split)
    kinds = dataset.features
    wanted = audio_column_name or next((column for column in kinds if isinstance(kinds[column], Audio)), None)
    column = _audio_column(list(kinds), wanted)
    if not isinstance(kinds[column], Audio | dict) and kinds[column] not in (Value("string"), Value("large_string")):
        raise ValueError(f"The column {column!r} must hold recordings or paths, got {kinds[column]}.")
    if column != "audio":
        dataset = dataset.remove_columns("audio") if "audio" in kinds else dataset
        dataset = dataset.rename_column(column, "audio")
    return dataset.cast_column("audio", Audio(decode=False))


def from_rows(
    rows: Sequence[Mapping[str, Any]], folder: str | Path = "", *, audio_column_name: str | None = None
) -> Dataset:
    """Make a data set from rows that name a recording each.

    Args:
        rows: A mapping for each recording, from column to value.
        folder: The folder that relative paths of recordings count from.
        audio_column_name: As in `read_dataset`.

    Raises:
        ValueError: There are no rows, or they have no column of recordings.

    Examples:
        >>> from_rows([{"path": "a.wav", "label": "yes"}], folder="calls").column_names
        ['audio', 'label']
    """
    if not rows:
        raise ValueError("A data set must have at least one recording, got no rows.")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    found = _audio_column(columns, audio_column_name)
    paths = [str(Path(folder, row[found]).absolute()) if row.get(found) else None for row in rows]
    others = {column: [row.get(column) for row in rows] for column in columns if column not in (found, "audio")}
    return Dataset.from_dict({"audio": paths, **others}).cast_column("audio", Audio(decode=False))


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a `.csv`, `.tsv` or `.jsonl` file, each as a dictionary from column to value.

    Raises:
        ValueError: A row has more or fewer fields than the header, or is not a JSON object.
    """
    path, rows = Path(path), []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        found = map(json.loads, filter(str.strip, file)) if path.suffix == ".jsonl" else reader
        try:
            for row in found:
                if not isinstance(row, dict):
                    raise ValueError("it is not a JSON object")
                if path.suffix != ".jsonl" and (None in row or None in row.values()):
                    raise ValueError("its number of fields is not that of the header; quote fields with separators")
                rows.append(row)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"Row {len(rows) + 1} of {path} cannot be read: {error}.") from error
    return rows


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
        raise ValueError(f"on_bad_audio must be 'error' or 'skip', got {on_bad_audio!r}.")
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
        message = f"{len(dataset) - len(good)} of {len(dataset)} recordings cannot be used: {counts}."
        message += _listed([detail for detail in findings["detail"] if detail is not None])
        if on_bad_audio == "error" or not good:
            raise ValueError(f"{message}\nRepair them, change the limits, or leave them out with on_bad_audio='skip'.")
        warnings.warn(f"{message}\nThey are left out.", stacklevel=2)
    rates = Counter(rate for rate, reason in zip(findings["rate_hz"], reasons, strict=True) if reason is None)
    if other_rates := ", ".join(f"{rates[rate]} of {rate:,} Hz" for rate in sorted(rates) if rate != rate_hz):
        warnings.warn(f"Decoding resamples recordings to {rate_hz:,} Hz: {other_rates}.", stacklevel=2)
    if "duration_s" in dataset.column_names:
        dataset = dataset.remove_columns("duration_s")
    return dataset.add_column("duration_s", list(findings["duration_s"])).select(good)  # pyright: ignore[reportCallIssue]


def read_column(dataset: Dataset, column: str) -> list[str]:
    """Return the values of a column as text, and classes as their names.

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
    if blank := [index for index, text in enumerate(texts) if not text.strip()]:
        raise ValueError(
            f"{len(blank)} of {len(texts)} rows have no value in the column {column!r}; the first is row {blank[0]}. "
            f"Leave these rows out, or name another column: {', '.join(dataset.column_names)}."
        )
    return texts


def find_column(dataset: Dataset, kind: Literal["label", "speaker", "text"], wanted: str | None = None) -> str:
    """Return the column with the labels, speakers or texts: the one that is wanted, or the only one with a usual name.

    Raises:
        ValueError: There is no such column, or there are several.

    Examples:
        >>> find_column(from_rows([{"path": "a.wav", "emotion": "calm"}]), "label")
        'emotion'
    """
    found = [name for name in ([wanted] if wanted else COLUMNS[kind]) if name in dataset.column_names]
    if len(found) == 1:
        return found[0]
    problem = f"Several columns may hold the {kind}: {', '.join(found)}" if found else f"No column holds the {kind}"
    problem = f"There is no column {wanted!r}" if wanted else problem
    raise ValueError(
        f"{problem}; the data set has {', '.join(dataset.column_names)}. Name it, in a recipe with "
        "--label_column_name, --group_column_name or --text_column_name."
    )


def label_names(train: Dataset, *others: Dataset, column: str = "label") -> list[str]:
    """Return the names of the classes in the training data, sorted.

    Raises:
        ValueError: There are fewer than two classes, or one of `others` has a class that training does not have.

    Examples:
        >>> label_names(from_rows([{"path": "a.wav", "label": "yes"}, {"path": "b.wav", "label": "no"}]))
        ['no', 'yes']
    """
    names = sorted(set(read_column(train, column)))
    if len(names) < 2:
        raise ValueError(f"Training needs at least two classes; the column {column!r} holds only {names[0]!r}.")
    if unknown := sorted({name for other in others for name in read_column(other, column)} - set(names)):
        raise ValueError(
            f"{len(unknown)} classes in the column {column!r} are not among the {len(names)} classes of training. "
            f"Leave them out, or choose other splits.{_listed(unknown)}"
        )
    return names


def check_disjoint(train: Dataset, test: Dataset, column: str = "speaker") -> None:
    """Check that no value of a column, such as a speaker, is both in training and in test.

    Raises:
        ValueError: A value of the column is in both. The error names the first few.

    Examples:
        >>> check_disjoint(*(from_rows([{"path": "a.wav", "speaker": name}]) for name in ("Ann", "Bob")))
    """
    if both := sorted(set(read_column(train, column)) & set(read_column(test, column))):
        raise ValueError(
            f"{len(both)} values of the column {column!r} are both in training and in test.{_listed(both)}"
        )


def leave_one_group_out(dataset: Dataset, column: str) -> Iterator[tuple[str, list[int], list[int]]]:
    """Split into folds of cross-validation, each with one session or speaker held out, as `LeaveOneGroupOut` does.

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


def read_trials(path: str | Path, folder: str | Path | None = None) -> list[Trial]:
    """Read the trials of speaker verification in a list, with the paths of their recordings.

    Args:
        path: A text file with lines `label file file`, as VoxCeleb publishes them, or a table with columns label,
            file_a and file_b.
        folder: The folder that paths in the list count from; None is the folder of the list. For VoxCeleb1 it is
            `<root>/wav`.

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
        if absent := [column for column in Trial._fields if table and column not in table[0]]:
            raise ValueError(f"{path} has no column {', '.join(absent)}; it has {', '.join(table[0])}.")
        rows = [[str(row[column]) for column in Trial._fields] for row in table]
    else:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if wrong := next((row for row in rows if len(row) != 3 or row[0] not in ("0", "1")), None):
        raise ValueError(f"A trial in {path} must be a label, 0 or 1, and two files, got {' '.join(wrong)!r}.")
    if {row[0] for row in rows} != {"0", "1"}:
        raise ValueError(f"{path} must have trials with label 1 and with label 0; its {len(rows)} trials do not.")
    folder = path.parent if folder is None else Path(folder)
    trials = [Trial(int(label), *(str(folder / file) for file in files)) for label, *files in rows]
    files = dict.fromkeys(file for trial in trials for file in trial[1:])
    if missing := [file for file in files if not Path(file).is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} recordings in {path} do not exist in {folder}.{_listed(missing)}"
        )
    return trials


def _local_rows(place: Path, split: str | None) -> tuple[list[dict[str, Any]], Path] | None:
    """Return the rows of a split and the folder of their paths; None if no layout has such a split."""
    if split and not place.is_file():
        if table := _find_table(place / split / "metadata") or _find_table(place / split):
            return read_table(table), table.parent
        if labelled := _labelled_files(place / split):
            return labelled, place / split
    table = place if place.is_file() else _find_table(place / "metadata")
    if table is None:
        if split or any((place / name).exists() or _find_table(place / name) for name in SPLITS):
            return None
        labelled = [] if next(place.rglob("*.parquet"), None) else _labelled_files(place)
        return (labelled, place) if labelled else None
    rows = read_table(table)
    if split is not None:
        splits = [str(row.get("split") or "").strip() for row in rows]
        if split not in splits:
            there = ", ".join(sorted({*splits} - {""})) or "nothing"
            raise ValueError(f"{table} has no rows with {split!r} in a column `split`, but {there}.")
        if "" in splits:
            raise ValueError(f"{splits.count('')} of {len(rows)} rows of {table} have nothing in the column `split`.")
        rows = [row for row, name in zip(rows, splits, strict=True) if name == split]
    return rows, table.parent


def _labelled_files(folder: Path) -> list[dict[str, Any]]:
    """Return an example for each file in `<folder>/<label>/` that is neither hidden nor text; `check_audio` reads it.

    Files that all lie in `<label>/<speaker>/` have a speaker as well.
    """
    inside = map(Path, sorted(glob.glob("**/*", root_dir=folder, recursive=True)))  # follows links, dangling ones too
    files = [file for file in inside if file.suffix and not (folder / file).is_dir() and not _is_text(file)]
    loose = [str(file) for file in files if len(file.parts) == 1]
    if loose and len(loose) < len(files):
        raise ValueError(f"{len(loose)} files of {folder} are not in the folder of a label.{_listed(loose)}")
    if loose:
        return []
    inner = "speaker" if all(len(file.parts) == 3 for file in files) else None
    return [
        {"audio": str(file), "label": file.parts[0], **({inner: file.parts[1]} if inner else {})} for file in files
    ]


def _is_text(file: Path) -> bool:
    kind = mimetypes.guess_type(file)[0] or ""
    return kind.startswith("text/") or kind == "application/json"


def _find_table(stem: Path) -> Path | None:
    found = [path for suffix in TABLE_SUFFIXES if (path := stem.with_name(stem.name + suffix)).is_file()]
    if len(found) > 1:
        raise ValueError(f"There are two tables, {' and '.join(map(str, found))}. Remove one.")
    return found[0] if found else None


def _audio_column(columns: Sequence[str], wanted: str | None) -> str:
    names = [wanted] if wanted else AUDIO_COLUMNS
    found = next((name for name in names if name in columns), None)
    if found is None:
        raise ValueError(f"audio_column_name must be one of {', '.join(columns)}, got {' or '.join(names)}.")
    return found


def _inspect(row: dict[str, Any], index: int, least_s: float, most_s: float) -> dict[str, Any]:
    """Return the findings of `check_audio` about one recording."""
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
