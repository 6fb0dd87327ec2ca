"""What a recipe loads: the pretrained encoder with the head of the task, and the splits of the data."""

import math
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoFeatureExtractor
from transformers.utils import logging

from peft_elp import find_encoder, speed_up_frozen
from peft_elp.backbones import window_s
from peft_elp.speech.data import check_audio, read_dataset

from .arguments import ModelArguments


def load_config(model_name_or_path: str, **settings: Any) -> Any:
    """Load the configuration of an encoder, without LayerDrop.

    An L-adapter reads every layer, so no layer may be skipped; the other methods are trained the same way, so that
    they can be compared. `settings` replace those of the configuration, such as `id2label`.
    """
    config: Any = AutoConfig.from_pretrained(model_name_or_path, **settings)
    for part in (config, getattr(config, "encoder", None)):
        for name in ("layerdrop", "encoder_layerdrop"):
            if getattr(part, name, 0.0):
                setattr(part, name, 0.0)
    return config


def load_feature_extractor(
    model: ModelArguments | str, data_args: Any = None, *, longest_s: float | None = None
) -> Any:
    """Load the feature extractor of an encoder.

    Where it pads to a window, as Whisper's does, it also returns the mask of each recording's own frames, and the
    window may be shorter; `ELPConfig(chunk_length=...)` takes the same number of seconds.

    Args:
        model: The model arguments, whose `--chunk_length` sets the window; or the name of the encoder.
        data_args: The data arguments, whose `max_duration_in_seconds` is lowered to the window.
        longest_s: Seconds of the longest recording, to which the window is cut, rounded up.

    Examples:
        >>> extractor = load_feature_extractor("openai/whisper-tiny", longest_s=2.4)  # doctest: +SKIP
        >>> extractor.chunk_length  # doctest: +SKIP
        3
    """
    name, chunk_length = (model, None) if isinstance(model, str) else (model.model_name_or_path, model.chunk_length)
    feature_extractor: Any = AutoFeatureExtractor.from_pretrained(name)
    if longest_s is not None and math.ceil(longest_s) < window_s(feature_extractor):
        chunk_length = math.ceil(longest_s)
    if hasattr(feature_extractor, "n_samples"):
        if chunk_length is not None:
            feature_extractor = AutoFeatureExtractor.from_pretrained(name, chunk_length=chunk_length)
        feature_extractor.return_attention_mask = True  # A head averages over a recording's own frames.
    window = window_s(feature_extractor)
    if data_args is not None and window < data_args.max_duration_in_seconds:
        print(f"The encoder reads at most {window:g} s; --on_long_audio is {data_args.on_long_audio}.")  # noqa: T201
        data_args.max_duration_in_seconds = window
    return feature_extractor


def fit_window(feature_extractor: Any, model_args: ModelArguments, data_args: Any, *datasets: Dataset) -> Any:
    """Cut a window such as Whisper's to the longest recording, unless `--chunk_length` is given; prints that it does.

    Args:
        feature_extractor: The feature extractor, as `load_feature_extractor` returns it.
        model_args: The model arguments, whose `chunk_length` is set.
        data_args: The data arguments; longer recordings than their `max_duration_in_seconds` are cropped or split.
        datasets: All recordings that the model reads, as `read_split` returns them.

    Returns:
        The feature extractor with the window.
    """
    longest_s = math.ceil(min(data_args.max_duration_in_seconds, max(max(x["duration_s"]) for x in datasets)))
    whole_s = window_s(feature_extractor)
    if model_args.chunk_length or not hasattr(feature_extractor, "n_samples") or longest_s >= whole_s:
        return feature_extractor
    print(  # noqa: T201
        f"The window is cut to {longest_s} s, the longest recording; --chunk_length {whole_s:g} keeps it whole."
    )
    model_args.chunk_length = longest_s
    return load_feature_extractor(model_args)


def load_model(auto_class: Any, model_args: ModelArguments, config: Any) -> Any:
    """Load a pretrained encoder with the head of a task; prints which modules are new, instead of a report by tensor.

    A head of another size than in the checkpoint is made new.

    Args:
        auto_class: A class such as `AutoModelForAudioClassification`.
        model_args: The model arguments.
        config: The configuration, as `load_config` returns it, with the settings of the head.

    Raises:
        ValueError: The checkpoint does not fit the encoder.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # Transformers reports each tensor of a new head.
    try:
        model, report = auto_class.from_pretrained(
            model_args.model_name_or_path,
            config=config,
            dtype=model_args.dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    new = [*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])]
    layers = find_encoder(model).layer_path(0).removesuffix("0")
    if inside := [key for key in new if key.startswith(layers)]:
        raise ValueError(
            f"{model_args.model_name_or_path} has no weights that fit {len(inside)} tensors of the encoder layers of "
            f"{type(model).__name__}, such as {inside[0]}. Check whether its config.json belongs to its weights."
        )
    if modules := sorted({key.split(".")[0] for key in new}):
        print(f"New in {type(model).__name__}: {', '.join(modules)}")  # noqa: T201
    return speed_up_frozen(model)  # whatever the method, so that their times can be compared


def read_split(
    data_args: Any, split: str | None, config: Any, seed: int, max_samples: int | None = None, **bounds: Any
) -> Dataset:
    """Read one split, and decode every recording once to check it; longer ones are as `--on_long_audio` says.

    Args:
        data_args: The data arguments, which name the data set.
        split: Name of the split. None takes all of one table.
        config: Configuration of the encoder, which may need recordings of a minimal length.
        seed: Seed for `max_samples`.
        max_samples: Keep this many recordings, drawn at random.
        bounds: `min_duration_in_seconds` and `max_duration_in_seconds`, where they differ from `data_args`.

    Raises:
        ValueError: The split is missing, or recordings cannot be used.
    """
    dataset = read_dataset(
        data_args.dataset_name, split, data_args.dataset_config_name, audio_column_name=data_args.audio_column_name
    )
    bounds = data_args.durations() | bounds
    longest_s = bounds.pop("max_duration_in_seconds")
    dataset = check_audio(limit_rows(dataset, max_samples, seed), config, **bounds)
    longer = [] if longest_s is None else [i for i, x in enumerate(dataset["duration_s"]) if x > longest_s]
    if longer:
        durations = f"{len(longer)} of {len(dataset)} recordings are longer than {longest_s:g} s"
        first = dataset[longer[0]]
        durations += f", such as {first['audio']['path']} of {first['duration_s']:.4g} s"
        if data_args.on_long_audio == "error" or (len(longer) == len(dataset) and data_args.on_long_audio == "skip"):
            raise ValueError(f"{durations}. Choose what to do with --on_long_audio: crop, split or skip.")
        print(f"{durations}: {data_args.on_long_audio}.")  # noqa: T201
    return dataset.select(sorted({*range(len(dataset))} - {*longer})) if data_args.on_long_audio == "skip" else dataset


def limit_rows(dataset: Dataset, max_samples: int | None, seed: int) -> Dataset:
    """Draw at most `max_samples` recordings at random with `seed`; None keeps all of them."""
    if max_samples is None or max_samples >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(max_samples))


def training_columns(dataset: Dataset, labels: Sequence[Any]) -> Dataset:
    """Select the columns that a trainer reads: `audio`, `duration_s`, and `labels` as numbers."""
    return dataset.select_columns(["audio", "duration_s"]).add_column("labels", list(labels))  # pyright: ignore
