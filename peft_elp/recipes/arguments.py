"""The options of a recipe: dataclasses that Transformers' `HfArgumentParser` turns into a command line."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from peft import PeftConfig
from transformers import HfArgumentParser, TrainingArguments, set_seed

from peft_elp.config import ELPConfig
from peft_elp_options import DataArguments as DataArguments
from peft_elp_options import MethodArguments, TrainingOptions, refuse_unused
from peft_elp_options import option as option

LOWER_IS_BETTER = ("loss", "wer", "cer", "eer", "min_dcf")


def _elp_options() -> Iterator[tuple[str, Any, Any]]:
    """Yield name, type and field of an option for each setting of `ELPConfig` that a command line can express."""
    hints = get_type_hints(ELPConfig)
    for setting in fields(ELPConfig)[len(fields(PeftConfig)) :]:
        hint = hints[setting.name]
        kind = next(kind for kind in get_args(hint) or [hint] if kind is not NoneType)
        kind = list[get_args(kind)[0]] if get_origin(kind) in (Sequence, list) else kind
        if kind in (str, int, float, bool) or get_origin(kind) is list:
            yield setting.name, kind | None, option(None, setting.metadata["help"])


# None means that the option was not given: ELPConfig decides.
ELPArguments = make_dataclass("ELPArguments", _elp_options(), kw_only=True)


@dataclass(kw_only=True)
class ModelArguments(MethodArguments, ELPArguments):
    """The encoder, the method that trains it, and the learning rates. Settings of `ELPConfig` are options too."""

    def elp_config(self) -> ELPConfig:
        """Return the configuration of the ELP-adapters."""
        names = [known.name for known in fields(ELPArguments)]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return ELPConfig.preset(self.preset, **given) if self.preset else ELPConfig(**given)


@dataclass  # Some types differ from Transformers' own, since the rates may be left open.
class RecipeTrainingArguments(TrainingOptions, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Transformers' own training arguments, with defaults for small data sets."""

    # Not options: a recipe always trains, reads recordings in its collator, and measures all of them.
    do_train: bool = field(default=True, init=False)
    remove_unused_columns: bool = field(default=False, init=False)
    dataloader_drop_last: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and metric in LOWER_IS_BETTER:
            self.greater_is_better = False  # Transformers assumes it for losses only.
        super().__post_init__()
        if not self.load_best_model_at_end:
            refuse_unused(self, ["early_stopping_patience"], "--load_best_model_at_end", "it is not given")
        self.label_names = ["labels"]
        self.length_column_name = "duration_s"  # what --train_sampling_strategy group_by_length reads
        self.dataloader_pin_memory &= torch.cuda.is_available()


def parse_arguments(
    argv: Sequence[str] | None, data_arguments: type, training_arguments: type = RecipeTrainingArguments
) -> tuple[ModelArguments, Any, Any]:
    """Parse and check the options of a recipe, and set the seed.

    Args:
        argv: The command line, or None for the one of the process. A single word that ends in `.json` is a file with
            the options.
        data_arguments: `DataArguments` or a subclass with the options of one script.
        training_arguments: `RecipeTrainingArguments` or a subclass.

    Raises:
        ValueError: An option is unknown, or has no effect next to the others.
    """
    classes: Any = (ModelArguments, data_arguments, training_arguments)
    parser = HfArgumentParser(classes, allow_abbrev=False)
    words = ["--help" if word == "--help-all" else word for word in (sys.argv[1:] if argv is None else argv)]
    if len(words) == 1 and words[0].endswith(".json"):
        model_args, data_args, args = parser.parse_json_file(words[0])
    else:
        model_args, data_args, args = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    # PEFT 0.21 asks Transformers 5 for gradient checkpointing by its old name.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    if args.eval_strategy.value == "no":
        needed = "--eval_strategy steps or --eval_strategy epoch"
        refuse_unused(data_args, ["validation_split_name"], needed, "--eval_strategy is no")
    elif not getattr(data_args, "validation_split_name", None):
        raise ValueError(
            f"--eval_strategy {args.eval_strategy.value} evaluates during training, and the test split must not "
            "choose anything. Name another split with --validation_split_name, where the script has that option."
        )
    set_seed(args.seed)
    return model_args, data_args, args
