"""The options of the training scripts, their help, and what can be checked of them at once.

It lies beside the package: importing any module of `peft_elp` imports PyTorch, for which help and mistakes should not
wait. `peft_elp.recipes` has the public names as well.
"""

import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from textwrap import fill
from typing import Any

METHODS = ("elp", "lora", "full", "head")
DTYPES = ("float32", "bfloat16", "float16", "auto")
NEEDED = "%(prog)s --model_name_or_path ENCODER --dataset_name DATA [options]; --help lists them"
MORE = """The settings of ELPConfig are options too, such as --adapters L and --e_dim 64, and so are those of
Transformers' TrainingArguments, such as --eval_strategy and --bf16: --help-all lists them, after some seconds. A
single argument that ends in .json is a file with the options."""


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a field of a dataclass that becomes an option of the command line.

    `metadata` are arguments of argparse, such as `choices`.

    Examples:
        >>> @dataclass
        ... class SongArguments(DataArguments):
        ...     singer_column_name: str = option("singer", "Column with the name of the singer.")
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(kw_only=True)
class MethodArguments:
    """The encoder, the method that trains it, and the learning rates."""

    model_name_or_path: str = field(metadata={"help": "A speech encoder: Hub id or folder."})
    dtype: str = option("float32", "Data type of the weights; 'auto': as in the checkpoint.", choices=DTYPES)
    method: str = option("elp", "What is trained besides the head.", choices=METHODS)
    chunk_length: int | None = option(
        None,
        "Cut a fixed window, such as Whisper's 30 s, to this many whole seconds, for classification and verification. "
        "Default: to the longest recording.",
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
            of_elp = {one.name for one in fields(self)} - {one.name for one in fields(MethodArguments)}
            refuse_unused(self, {*of_elp, "preset", "cache_features"}, "--method elp", f"--method is {self.method}")
        if self.cache_features is None:
            refuse_unused(self, ["cache_dtype"], "--cache_features", "there is none")
        if self.method != "lora":
            lora = ["lora_r", "lora_alpha", "lora_target_modules"]
            refuse_unused(self, lora, "--method lora", f"--method is {self.method}")


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
class TextArguments(DataArguments):
    """The recordings and their texts."""

    text_column_name: str | None = option(None, "Column with the text. Default: text, transcription or sentence.")
    chunk_length_in_seconds: float | None = option(
        None,
        "Recognise longer test recordings in overlapping pieces. Default: --max_duration_in_seconds refuses them.",
    )
    on_long_audio: str = option("error", "Stop at a longer recording, or leave it out.", choices=("error", "skip"))
    validation_split_name: str | None = option(None, "Split that --eval_strategy evaluates on during training.")


@dataclass
class TrainingOptions:
    """The training: the first of Transformers' TrainingArguments, with defaults for small data sets."""

    output_dir: str = option("outputs", "Folder for the adapter, its metrics and figures.")
    learning_rate: float | None = option(
        None, "One rate for everything. Default: the published rates, or 1e-4 with a pretrained decoder."
    )
    num_train_epochs: float = option(10.0, "Number of epochs.")
    max_steps: int = option(-1, "Number of steps, instead of epochs, if it is above 0.")
    per_device_train_batch_size: int = option(8, "Recordings in a batch, on each device.")
    warmup_steps: float = option(0.1, "Steps over which the rates rise; a value below 1 is a share of all steps.")
    early_stopping_patience: int | None = option(
        None, "Stop when so many evaluations in a row are not better. Needs --load_best_model_at_end."
    )
    logging_steps: float = option(50, "Steps between two lines of the log.")
    report_to: str = option("none", "Where logs go, such as 'tensorboard'.")
    seed: int = option(42, "Seed of everything random.")


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


def check_command_line(data_arguments: type, about: str | None) -> None:
    """Answer `--help`, and leave with status 2 if an option is wrong; what imports PyTorch is imported after this.

    Call it where a script is the program. `peft_elp.recipes.parse_arguments` then reads all options.

    Args:
        data_arguments: `DataArguments` or a subclass with the options of one script.
        about: The docstring of the script.
    """
    words, classes = sys.argv[1:], [TrainingOptions, MethodArguments, data_arguments]
    if {"-h", "--help"} & {*words}:
        print("\n\n".join([(about or "").strip(), *map(_help, classes), MORE]))  # noqa: T201
        sys.exit()
    if "--help-all" in words or (len(words) == 1 and words[0].endswith(".json")):
        return
    from transformers import HfArgumentParser  # Only old versions import PyTorch with it.

    parser = HfArgumentParser(classes, usage=NEEDED, add_help=False, allow_abbrev=False)
    try:
        _, model_args, data_args, others = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
        _check_names([word for word in others if word.startswith("--")], classes)
        for name in (model_args.model_name_or_path, data_args.dataset_name):
            _check_place(name)
        _check_split(Path(data_args.dataset_name).expanduser(), data_args.train_split_name)
    except ValueError as error:
        parser.error(str(error))


def _help(options: Any) -> str:
    lines = [options.__doc__.rstrip(".") + ":"]
    for known in fields(options):
        text = known.metadata["help"]
        if "choices" in known.metadata:
            text += f" One of {', '.join(known.metadata['choices'])}."
        if known.default is MISSING and known.default_factory is MISSING:
            text += " Required."
        elif known.default not in (None, MISSING, False) and "Default:" not in text:
            text += f" Default: {known.default}."
        lines.append(fill(f"--{known.name:30} {text}", 119, initial_indent="  ", subsequent_indent=35 * " "))
    return "\n".join(lines)


def _check_names(words: Collection[str], classes: Sequence[Any]) -> None:
    """Refuse what is not an option of ELPConfig or TrainingArguments either, by their source: importing takes long."""
    import transformers

    files = [Path(__file__).parent / "peft_elp/config.py", *Path(transformers.__file__).parent.glob("training_args*")]
    known = {name for file in files for name in re.findall(r"^    (\w+):", file.read_text("utf-8"), re.MULTILINE)}
    known |= {one.name for options in classes for one in fields(options)}
    for word in words:
        name = word[2:].partition("=")[0].replace("-", "_").removeprefix("no_")
        if name not in known:
            close = get_close_matches(name, known, 1)
            raise ValueError(f"{word} is not an option." + (f" Did you mean --{close[0]}?" if close else ""))


def _check_place(name: str) -> None:
    """Refuse a path that does not exist and cannot be a name on the Hub."""
    place = Path(name).expanduser()
    if place.exists():
        return
    is_path = place.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path or place.suffix in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{name} does not exist. Pass a folder, a table, or the name of one on the Hub.")
    if "/" in name and place.parent.is_dir():
        inside = ", ".join(sorted(one.name for one in place.parent.iterdir())[:10])
        print(f"There is no folder {name}, so the Hub is asked. {place.parent} holds {inside}.")  # noqa: T201


def _check_split(folder: Path, split: str | None) -> None:
    """Refuse a folder in which nothing can be the split."""
    places = [f"{one}{end}" for one in (split or "").split("+") for end in ("", ".*")]
    if folder.is_dir() and split and not any(any(folder.glob(one)) for one in (*places, "metadata.*", "**/*.parquet")):
        inside = ", ".join(sorted(one.name for one in folder.iterdir())[:10]) or "nothing"
        raise ValueError(f"{folder} has no split {split}; it holds {inside}. Name one with --train_split_name.")
