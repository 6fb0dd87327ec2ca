"""The pretrained encoder of a recipe, with the head of the task."""

from typing import Any

import torch
from transformers import AutoConfig, AutoFeatureExtractor
from transformers.utils import logging

from peft_elp import find_encoder, speed_up_frozen

from .arguments import ModelArguments


def load_config(model_name_or_path: str, **settings: Any) -> Any:
    """Load the configuration of an encoder, without LayerDrop.

    An L-adapter reads every layer, so no layer may be skipped; the other methods are trained the same way, so that
    they can be compared.

    Args:
        model_name_or_path: A Hub id or folder.
        settings: Values that replace those of the configuration, such as `id2label`.
    """
    config: Any = AutoConfig.from_pretrained(model_name_or_path, **settings)
    for part in (config, getattr(config, "encoder", None)):
        for name in ("layerdrop", "encoder_layerdrop"):
            if getattr(part, name, 0.0):
                setattr(part, name, 0.0)
    return config


def load_feature_extractor(model_args: ModelArguments) -> Any:
    """Load the feature extractor of an encoder, which pads to the shorter window where `--chunk_length` sets one."""
    settings = {} if model_args.chunk_length is None else {"chunk_length": model_args.chunk_length}
    return AutoFeatureExtractor.from_pretrained(model_args.model_name_or_path, **settings)


def load_model(auto_class: Any, model_args: ModelArguments, config: Any) -> Any:
    """Load a pretrained encoder with the head of a task; prints which modules are new, instead of a report by tensor.

    A head of another size than in the checkpoint is made new.

    Args:
        auto_class: A class such as `AutoModelForAudioClassification`.
        model_args: The model arguments, which name the checkpoint and the data type of the weights.
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
            dtype="auto" if model_args.dtype == "auto" else getattr(torch, model_args.dtype),
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
            f"{type(model).__name__}, such as {inside[0]}. Check that the checkpoint and its config.json belong "
            "together."
        )
    if modules := sorted({key.split(".")[0] for key in new}):
        print(f"New in {type(model).__name__}: {', '.join(modules)}")  # noqa: T201
    return speed_up_frozen(model)  # whatever the method, so that their times can be compared
