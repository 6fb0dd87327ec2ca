"""The options of a recipe: dataclasses that Transformers' `HfArgumentParser` turns into a command line."""

import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from peft import PeftConfig
from transformers import HfArgumentParser, TrainingArguments, set_seed

from peft_elp.config import ELPConfig

METHODS = ("elp", "lora", "full", "head")
DTYPES = ("float32", "bfloat16", "float16", "auto")
LOWER_IS_BETTER = ("loss", "wer", "cer", "eer", "min_dcf")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a field of a dataclass that becomes an option of the command line.

    `metadata` are arguments of argparse, such as `choices`.

    Examples:
        >>> @dataclass
        ... class SongArguments(DataArguments):
        ...     singer_column_name: str = option("singer", "Column with the name of the singer.")
    """
    return field(default=default, metadata={"help": help, **metadata})


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
class ModelArguments(ELPArguments):
    """The encoder, the method that trains it, and the learning rates. Settings of `ELPConfig` are options too."""

    model_name_or_path: str = field(metadata={"help": "A speech encoder: Hub id or folder."})
    dtype: str = option("float32", "Data type of the weights; 'auto': as in the checkpoint.", choices=DTYPES)
    method: str = option("elp", "What is trained besides the head.", choices=METHODS)
    chunk_length: int | None = option(
        None,
        "Cut a fixed window, such as Whisper's 30 s, to this many whole seconds, for classification and verification.",
    )
    preset: str | None = option(
        None,
        "A published setting, such as 'e+l'; see ELPConfig.preset. For verification and emotions, the published code "
        "also has --e_activation relu --l_activation relu.",
    )
    lora_r: int = option(16, "Rank of LoRA.")
    lora_alpha: int = option(32, "Scale of LoRA.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get LoRA. Default: the linear layers of feed-forward modules."}
    )
    head_learning_rate: float | None = option(None, "Rate of the head. Default: the published one.")
    e_learning_rate: float | None = option(None, "Rate of the E-adapters. Default: the published one.")
    l_learning_rate: float | None = option(None, "Rate of the L-adapter. Default: the published one.")
    layer_weights_learning_rate: float | None = option(
        None, "Rate of the layer weights of L. Default: the published one; 30 times a given rate of L."
    )
    p_learning_rate: float | None = option(None, "Rate of the P-adapter. Default: the rate of the E-adapters.")
    layer_norms_learning_rate: float | None = option(None, "Rate of the layer norms. Default: the published one.")
    encoder_learning_rate: float | None = option(None, "Rate of LoRA, or of the encoder layers with --method full.")
    cache_features: str | None = option(
        None,
        "With --adapters L --train_layer_norms False: run the encoder once, and keep its features in this folder.",
    )
    cache_dtype: str = option("float16", "Data type of these features.", choices=("float32", "float16", "bfloat16"))
    published_schedule: bool = option(
        False,
        "Multiply the rates by the published factors, stretched over this training, instead of --lr_scheduler_type.",
    )

    def __post_init__(self) -> None:
        if self.method != "elp":
            names = {known.name for known in fields(ELPArguments)} - {"chunk_length"}
            refuse_unused(self, names | {"preset", "cache_features"}, "--method elp", f"--method is {self.method}")
        if self.cache_features is None:
            refuse_unused(self, ["cache_dtype"], "--cache_features", "there is none")
        if self.method != "lora":
            lora = ["lora_r", "lora_alpha", "lora_target_modules"]
            refuse_unused(self, lora, "--method lora", f"--method is {self.method}")

    def elp_config(self) -> ELPConfig:
        """Return the configuration of the ELP-adapters."""
        names = [known.name for known in fields(ELPArguments)]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return ELPConfig.preset(self.preset, **given) if self.preset else ELPConfig(**given)


@dataclass
class DataArguments:
    """The recordings."""

    dataset_name: str = field(metadata={"help": "A data set: Hub id, folder or table; see docs/how-to/data.md."})
    dataset_config_name: str | None = option(None, "Configuration of a data set on the Hub.")
    train_split_name: str | None = option("train", "Split to train on.")
    eval_split_name: str | None = option("test", "Split to measure on, once, after training.")
    audio_column_name: str | None = option(None, "Column with the recordings. Default: found automatically.")
    max_train_samples: int | None = option(None, "Train on this many recordings, drawn with --seed.")
    max_eval_samples: int | None = option(None, "Measure on this many recordings of a split, drawn with --seed.")
    min_duration_in_seconds: float = option(0.0, "Refuse shorter recordings.")
    max_duration_in_seconds: float = option(20.0, "The longest recording, or the window of the encoder if shorter.")
    on_bad_audio: str = option("error", "Stop at a bad recording, or leave it out.", choices=("error", "skip"))
    on_long_audio: str = option(
        "error",
        "What to do with longer recordings: stop, leave them out, read only their beginning, or average over pieces.",
        choices=("error", "skip", "crop", "split"),
    )

    def durations(self) -> dict[str, Any]:
        """Return the bounds of durations, as `peft_elp.speech.data.check_audio` takes them."""
        names = ("min_duration_in_seconds", "max_duration_in_seconds", "on_bad_audio")
        return {name: getattr(self, name) for name in names}


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """Transformers' own training arguments, with defaults for small data sets."""

    output_dir: str = option("outputs", "Folder for the adapter, its metrics and figures.")  # pyright: ignore
    learning_rate: float | None = option(None, "One rate for everything, instead of the published rates.")  # pyright: ignore
    num_train_epochs: float = option(10.0, "Number of epochs; --max_steps counts in steps instead.")
    warmup_steps: float = option(0.1, "Steps over which the rates rise; a value below 1 is a share of all steps.")
    logging_steps: float = option(50, "Steps between two lines of the log.")
    report_to: str = option("none", "Where logs go, such as 'tensorboard'.")  # pyright: ignore
    # Not options: a recipe always trains, reads recordings in its collator, and measures every row.
    do_train: bool = field(default=True, init=False)
    remove_unused_columns: bool = field(default=False, init=False)
    dataloader_drop_last: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and metric in LOWER_IS_BETTER:
            self.greater_is_better = False  # Transformers assumes it for losses only.
        super().__post_init__()
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
    parser = HfArgumentParser((ModelArguments, data_arguments, training_arguments))  # pyright: ignore[reportArgumentType]
    words = list(sys.argv[1:] if argv is None else argv)
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


def refuse_unused(arguments: Any, names: Collection[str], used_with: str, given: str) -> None:
    """Refuse options that have no effect next to the others.

    Args:
        arguments: The dataclass that holds the options.
        names: The options without an effect. Names that `arguments` lacks are skipped.
        used_with: What they are used with, for the message.
        given: What was given instead, for the message.

    Raises:
        ValueError: One of them does not have its default value.
    """
    for known in fields(arguments):
        default = known.default if known.default_factory is MISSING else known.default_factory()
        if known.name in names and getattr(arguments, known.name) != default:
            raise ValueError(f"--{known.name} is used only with {used_with}, and {given}. Remove one of them.")
