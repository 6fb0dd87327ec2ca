"""One split of a data set, checked, shortened and labelled for a trainer."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from peft_elp.speech.data import check_audio, read_dataset


def read_split(
    data_args: Any, split: str | None, config: Any, seed: int, max_samples: int | None = None, **bounds: Any
) -> Dataset:
    """Read one split, and decode every recording once to check it.

    Args:
        data_args: The data arguments, which name the data set.
        split: Name of the split. None takes all rows of one table.
        config: Configuration of the encoder, which may need recordings of a minimal length.
        seed: Seed for `max_samples`.
        max_samples: Keep this many rows, drawn at random.
        bounds: `min_duration_in_seconds` and `max_duration_in_seconds`, where they differ from `data_args`.

    Raises:
        ValueError: The split is missing, or recordings cannot be used.
    """
    dataset = read_dataset(
        data_args.dataset_name, split, data_args.dataset_config_name, audio_column_name=data_args.audio_column_name
    )
    return check_audio(limit_rows(dataset, max_samples, seed), config, **data_args.durations() | bounds)


def limit_rows(dataset: Dataset, max_samples: int | None, seed: int) -> Dataset:
    """Draw at most `max_samples` rows at random with `seed`; None keeps all rows."""
    if max_samples is None or max_samples >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(max_samples))


def training_columns(dataset: Dataset, labels: Sequence[Any]) -> Dataset:
    """Select the columns that a trainer reads: `audio`, `duration_s`, and `labels` as numbers."""
    return dataset.select_columns(["audio", "duration_s"]).add_column("labels", list(labels))  # pyright: ignore
