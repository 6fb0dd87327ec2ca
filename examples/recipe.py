"""What the four recipes share: arguments, the four methods, a learning rate for each part, and what is saved.

Each recipe trains one encoder for one task by `--method`:

    elp    ELP-adapters and the head
    lora   LoRA in the feed-forward modules, and the head
    full   all encoder layers and the head
    head   the head alone, on the frozen encoder

All are given the same data, batches and steps. The CNN feature encoder is frozen in each of them.
"""

import csv
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import EvalResult
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments, set_seed

from peft_elp import (
    ELPConfig,
    count_parameters,
    create_optimizer,
    describe,
    get_epochwise_schedule,
    published_factors,
    published_rates,
)
from peft_elp.audio import decode
from peft_elp.data import check_audio, read_dataset
from peft_elp.plots import plot_layer_weights, plot_pseudo_features
from peft_elp.speakers import is_padding_invariant
from peft_elp.tuner.find import find_encoder

# Fields of `ELPConfig` that a recipe takes, with their help.
ELP = {known.name: {"help": known.metadata["help"]} for known in fields(ELPConfig) if known.metadata}
MEASURES = ("wer", "cer", "eer", "min_dcf", "unweighted_accuracy", "weighted_accuracy", "accuracy")
LESS_IS_BETTER = ("loss", "wer", "cer", "eer", "min_dcf")
METHODS = ("elp", "lora", "full", "head")
SETTINGS = {"ELP": "e+l+p", "EL": "e+l", "E": "e-only", "L": "l-only"}
# Of full fine-tuning, published with the rates of `peft_elp.published`.
FULL_RATES = {
    "asv": {"head": 5e-4, "encoder": 1e-4},
    "er": {"head": 5e-4, "encoder": 5e-5},
    "asr": {"head": 1e-2, "encoder": 1e-4},
    "ic": {"head": 5e-4, "encoder": 1e-4},
}
LORA_RATE = 5e-4  # Our choice: none was published for these tasks.
# Options that mean something only where another one has one of these values; without values, any.
ONLY_WITH: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(ELP, ("method", "elp")),
    "preset": ("method", "elp"),
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_target_modules"), ("method", "lora")),
    "validation_split_name": ("eval_strategy", "steps", "epoch"),
}


def option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass
class ModelArguments:
    """The encoder, what of it is trained, and at which rates."""

    model_name_or_path: str = field(metadata={"help": "A speech encoder: Hub id or folder."})
    method: str = option("elp", "What is trained with the head.", choices=METHODS)
    preset: str | None = option(None, "A published setting of ELP-adapters, such as 'e+l'; see ELPConfig.preset.")
    adapters: str | None = field(default=None, metadata=ELP["adapters"])
    e_dim: int | None = field(default=None, metadata=ELP["e_dim"])
    e_dropout: float | None = field(default=None, metadata=ELP["e_dropout"])
    e_activation: str | None = field(default=None, metadata=ELP["e_activation"])
    e_layers: list[int] | None = field(default=None, metadata=ELP["e_layers"])
    e_after: list[str] | None = field(default=None, metadata=ELP["e_after"])
    l_dim: int | None = field(default=None, metadata=ELP["l_dim"])
    l_dropout: float | None = field(default=None, metadata=ELP["l_dropout"])
    l_activation: str | None = field(default=None, metadata=ELP["l_activation"])
    l_layers: list[int] | None = field(default=None, metadata=ELP["l_layers"])
    l_output: str | None = field(default=None, metadata=ELP["l_output"])
    p_length: int | None = field(default=None, metadata=ELP["p_length"])
    p_position: str | None = field(default=None, metadata=ELP["p_position"])
    train_layer_norms: bool | None = field(default=None, metadata=ELP["train_layer_norms"])
    lora_r: int = option(16, "Rank of LoRA.")
    lora_alpha: int = option(32, "Scale of LoRA.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["intermediate_dense", "output_dense"],
        metadata={"help": "Where LoRA goes. Default: the feed-forward modules of wav2vec 2.0 and its relatives."},
    )
    head_learning_rate: float | None = option(None, "Of the head. Default: the published one.")
    e_learning_rate: float | None = option(None, "Of the E-adapters. Default: the published one.")
    l_learning_rate: float | None = option(None, "Of the L-adapter. Default: the published one.")
    p_learning_rate: float | None = option(None, "Of the P-adapter. Default: that of the E-adapters.")
    layer_norms_learning_rate: float | None = option(None, "Of the layer norms. Default: the published one.")
    encoder_learning_rate: float | None = option(None, "Of LoRA, or of the encoder layers with --method full.")
    published_schedule: bool = option(
        False, "Multiply the rates by the published factors, stretched over this training, instead of a schedule of "
        "--lr_scheduler_type."
    )  # fmt: skip


@dataclass
class DataArguments:
    """The recordings."""

    dataset_name: str = field(metadata={"help": "A data set: Hub id, folder or table; see docs/how-to/data.md."})
    dataset_config_name: str | None = option(None, "Configuration of a data set on the Hub.")
    train_split_name: str | None = option("train", "What to train on.")
    eval_split_name: str | None = option("test", "What to measure on, once, after training.")
    audio_column_name: str | None = option(None, "Where the recordings are. Default: found by itself.")
    max_train_samples: int | None = option(None, "Train on so many, drawn with --seed.")
    max_eval_samples: int | None = option(None, "Measure on so many, drawn with --seed.")
    min_duration_in_seconds: float = option(0.0, "A shorter recording is refused.")
    max_duration_in_seconds: float = option(20.0, "A longer recording is refused.")
    on_bad_audio: str = option("error", "What becomes of a refused recording.", choices=("error", "skip"))


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """Transformers' own arguments; some defaults are those of small data sets."""

    output_dir: str = option("outputs", "Folder for the adapter, its metrics and figures.")  # pyright: ignore
    learning_rate: float | None = option(None, "One rate for all parts, instead of the published ones.")  # pyright: ignore
    do_train: bool = option(True, "Stays on: a recipe trains, measures and saves.")
    num_train_epochs: float = option(10.0, "Epochs; --max_steps counts in steps instead.")
    warmup_steps: float = option(0.1, "Steps over which the rates rise; below 1, their share.")
    logging_steps: float = option(50, "Steps between two lines of the log.")
    remove_unused_columns: bool = option(False, "Stays off: recordings are read from a column by the collator.")
    report_to: str = option("none", "Where logs go, such as 'tensorboard'.")  # pyright: ignore

    def __post_init__(self) -> None:
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and metric in LESS_IS_BETTER:
            self.greater_is_better = False  # Transformers knows that of losses alone
        super().__post_init__()


def parse(
    argv: Sequence[str] | None, data_arguments: type, only_with: Mapping[str, tuple[Any, ...]] | None = None
) -> tuple[ModelArguments, Any, RecipeTrainingArguments]:
    """The arguments of a recipe, from a command line or from one .json file, checked; `only_with` adds to ours."""
    parser = HfArgumentParser((ModelArguments, data_arguments, RecipeTrainingArguments))  # pyright: ignore[reportArgumentType]
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) == 1 and words[0].endswith(".json"):
        model_args, data_args, args = parser.parse_json_file(words[0])
    else:
        model_args, data_args, args = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    # PEFT 0.21 asks Transformers 5 by the old name.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    args.label_names = ["labels"]
    args.length_column_name = "duration_s"  # what --train_sampling_strategy group_by_length reads
    args.dataloader_pin_memory &= torch.cuda.is_available()
    if not args.do_train:
        raise ValueError("A recipe trains, and then measures. What is saved answers with the command peft-elp.")
    if args.dataloader_drop_last:
        raise ValueError("--dataloader_drop_last would leave rows out of what is measured as well. Leave it out.")
    check_options([model_args, data_args, args], ONLY_WITH | dict(only_with or {}))
    if args.eval_strategy.value != "no" and not getattr(data_args, "validation_split_name", None):
        raise ValueError(
            f"--eval_strategy {args.eval_strategy.value} evaluates while training, and would do so on the test split, "
            "by which nothing may be chosen. Name a third split with --validation_split_name, where the recipe has it."
        )
    set_seed(args.seed)
    return model_args, data_args, args


def check_options(arguments: Sequence[Any], only_with: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse an option that would mean nothing beside the others; `only_with` is made like `ONLY_WITH`."""
    known = {known.name: (known, getattr(group, known.name)) for group in arguments for known in fields(group)}
    for name, (switch, *allowed) in only_with.items():
        if name not in known:
            continue
        option, value = known[name]
        chosen = getattr(known[switch][1], "value", known[switch][1])
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if value == default or (chosen in allowed if allowed else chosen is not None):
            continue
        needed = " or ".join(f"--{switch} {one}" if one is not None else f"no --{switch}" for one in allowed)
        raise ValueError(
            f"--{name} means something only with {needed or '--' + switch}, and --{switch} is {chosen}. Leave one out."
        )


def load_config(model_args: ModelArguments) -> Any:
    """The encoder's configuration, without LayerDrop: an L-adapter reads every layer, and methods are to compare."""
    config: Any = AutoConfig.from_pretrained(model_args.model_name_or_path)
    if getattr(config, "layerdrop", 0.0):
        config.layerdrop = 0.0
    return config


def elp_options(model_args: ModelArguments) -> dict[str, Any]:
    """The fields of `ELPConfig` that are chosen."""
    return {name: value for name in ELP if (value := getattr(model_args, name, None)) is not None}


def read_split(
    data_args: Any, split: str | None, config: Any, seed: int, max_samples: int | None = None, **bounds: Any
) -> Dataset:
    """One split, with every recording checked; see `peft_elp.data`."""
    dataset = read_dataset(
        data_args.dataset_name,
        split,
        data_args.dataset_config_name,
        audio_column_name=data_args.audio_column_name,
    )
    dataset = at_most(dataset, max_samples, seed)
    limits = {name: getattr(data_args, name) for name in ("min_duration_in_seconds", "max_duration_in_seconds")}
    return check_audio(dataset, config, on_bad_audio=data_args.on_bad_audio, **{**limits, **bounds})


def at_most(dataset: Dataset, max_samples: int | None, seed: int) -> Dataset:
    """So many rows, drawn at random."""
    if max_samples is None or max_samples >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(max_samples))


def with_labels(dataset: Dataset, labels: Sequence[Any]) -> Dataset:
    """What a model is trained on: recordings, their durations, and labels as numbers."""
    return dataset.select_columns(["audio", "duration_s"]).add_column("labels", list(labels))  # pyright: ignore


class Collator:
    """Reads the recordings of a batch when their turn comes; of longer ones than `crop_s` seconds, a random piece."""

    def __init__(self, feature_extractor: Any, crop_s: float | None = None) -> None:
        self.feature_extractor = feature_extractor
        self.most = sys.maxsize if crop_s is None else int(crop_s * feature_extractor.sampling_rate)

    def _read(self, row: dict[str, Any]) -> Any:
        waveform = decode(row["audio"], self.feature_extractor.sampling_rate)[slice(*row.get("samples", (None,)))]
        if len(waveform) <= self.most:
            return waveform
        start = int(torch.randint(len(waveform) - self.most + 1, ()))
        return waveform[start : start + self.most]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        rate_hz = self.feature_extractor.sampling_rate
        waveforms = [self._read(row) for row in rows]
        batch = self.feature_extractor(waveforms, sampling_rate=rate_hz, padding=True, return_tensors="pt")
        if "labels" in rows[0]:
            labels = [torch.as_tensor(row["labels"]) for row in rows]
            batch["labels"] = (
                pad_sequence(labels, batch_first=True, padding_value=-100) if labels[0].dim() else torch.stack(labels)
            )
        return dict(batch)


def head_modules(model: PreTrainedModel) -> list[str]:
    """The modules beside the encoder, by name."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and next(module.parameters(), None) is not None
    ]


def adapt(model: PreTrainedModel, model_args: ModelArguments) -> Any:
    """The model with what `--method` trains, and everything else frozen."""
    if model_args.method in ("elp", "lora"):
        adapted = get_peft_model(model, peft_config(model, model_args))
        # Where the vocabulary is new, PEFT would look for the embeddings of its tokens; speech encoders have none.
        adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)  # pyright: ignore
        return adapted
    model.requires_grad_(False)
    for name in head_modules(model):
        model.get_submodule(name).requires_grad_(True)
    if model_args.method == "full":
        for layer in find_encoder(model).layers:
            layer.requires_grad_(True)
    return model


def peft_config(model: PreTrainedModel, model_args: ModelArguments) -> ELPConfig | LoraConfig:
    """What PEFT places, for `--method elp` and `--method lora`."""
    if model_args.method == "elp":
        preset, options = model_args.preset, elp_options(model_args)
        return ELPConfig.preset(preset, **options) if preset else ELPConfig(**options)
    head = head_modules(model)
    inner = [name for name, _ in getattr(model, model.base_model_prefix).named_modules()]
    if shared := [name for name in head if any(path.split(".")[-1] == name for path in inner)]:
        raise ValueError(
            f"PEFT finds modules_to_save by the end of their names, and {shared[0]!r} is in the head of "
            f"{type(model).__name__} and in its encoder: LoRA would train both. Choose another head or method."
        )
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        target_modules=model_args.lora_target_modules,
        modules_to_save=head,
    )


def has_elp(model: Any) -> bool:
    return isinstance(getattr(model, "peft_config", {}).get("default"), ELPConfig)


def trained_parameters(model: Any) -> dict[str, dict[str, Any]]:
    """What is trained, by name: in the "encoder" and in the "head"."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = set(head_modules(base))
    parts: dict[str, dict[str, Any]] = {"encoder": {}, "head": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bare = name.removeprefix("base_model.model.")
            parts["head" if bare.split(".")[0] in head else "encoder"][name] = parameter
    return parts


def learning_rates(model: Any, model_args: ModelArguments, args: Any, task: str) -> dict[str, float]:
    """The rate of each part that is trained: those of the command line, or else the published ones.

    Raises:
        ValueError: A rate is given for a part that is not trained, or none is published and none is given.
    """
    given = {
        "head": model_args.head_learning_rate,
        "E": model_args.e_learning_rate,
        "L": model_args.l_learning_rate,
        "P": model_args.p_learning_rate,
        "layer norms": model_args.layer_norms_learning_rate,
        "encoder": model_args.encoder_learning_rate,
    }
    chosen: dict[str, float] = {part: rate for part, rate in given.items() if rate is not None}
    if model_args.method == "elp":
        trained = [part for part, count in count_parameters(model).items() if count]
        config = model.peft_config["default"]
        both = config.adapters == "E" and len(config.e_after) == 2
        if "E" in chosen and "P" in trained:
            chosen.setdefault("P", chosen["E"])
        published = published_rates("conventional" if both else SETTINGS.get(config.adapters, "e+l+p"), task)
    else:
        trained = [part for part, held in trained_parameters(model).items() if held]
        published = FULL_RATES[task] | ({} if model_args.method == "full" else {"encoder": LORA_RATE})
        if model_args.method != "full":
            published["head"] = published_rates("e+l", task)["head"]
    if strange := [part for part in chosen if part not in trained]:
        raise ValueError(
            f"A learning rate is given for {strange[0]!r}, and --method {model_args.method} trains "
            f"{', '.join(trained)}. Leave it out."
        )
    if args.learning_rate is not None:
        published = dict.fromkeys(trained, float(args.learning_rate))
    rates = published | chosen
    # The head first: the rate of the first group is the one that Trainer logs.
    return {part: rates[part] for part in sorted(trained, key="head".__ne__)}


class RecipeTrainer(Trainer):
    """Trainer with a learning rate for each part; predictions come in the order of the rows."""

    def __init__(self, *args: Any, rates: Mapping[str, float], factors: Sequence[float] | None, **kwargs: Any) -> None:
        self.rates, self.factors = rates, factors
        super().__init__(*args, **kwargs)
        # By their `**kwargs` Transformers takes it that the models divide the loss by what a whole step has; they
        # do not, and accumulated gradients would come out too large.
        self.model_accepts_loss_kwargs = False
        assert self.model is not None
        if not is_padding_invariant(self.model, self.processing_class):
            if self.args.n_gpu > 1:
                raise ValueError(
                    f"This encoder or head hears padding, and {self.args.n_gpu} devices in one process share a padded "
                    "batch. Start a process for each with `accelerate launch`, or show one: CUDA_VISIBLE_DEVICES=0."
                )
            print("Evaluated one recording at a time: this encoder or head hears the padding of a batch.")
            self.args.per_device_eval_batch_size = 1

    def fit(self) -> None:
        """Train, and save at once what can be saved before it is measured."""
        fitted = self.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        self.save_metrics("train", fitted.metrics)
        self.save_model()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            model: Any = self.model
            weight_decay = self.args.weight_decay
            optimizer_cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)  # what --optim says
            options.pop("lr")
            if has_elp(model):
                self.optimizer = create_optimizer(
                    model, optimizer_cls, rates=self.rates, weight_decay=weight_decay, **options
                )
            else:
                decayed = set(self.get_decay_parameter_names(model))
                groups = [
                    {"params": held, "lr": self.rates[part], "weight_decay": weight_decay * decay}
                    for part, named in trained_parameters(model).items()
                    for decay in (1, 0)
                    if (held := [p for name, p in named.items() if (name in decayed) == bool(decay)])
                ]
                self.optimizer = optimizer_cls(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.factors is not None and self.lr_scheduler is None:
            self.lr_scheduler = get_epochwise_schedule(optimizer or self.optimizer, self.factors, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if not has_elp(self.model):  # an ELP-adapter has been saved with a card of its own
            super().create_model_card(*args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # Transformers groups the rows of evaluation by length where those of training are.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


def make_trainer(
    model: PreTrainedModel,
    model_args: ModelArguments,
    args: Any,
    task: str,
    feature_extractor: Any,
    trainer_cls: Any = RecipeTrainer,
    **options: Any,
) -> Any:
    """Adapt the model by `--method` and give it to a trainer; prints what is trained, and at which rates.

    Args:
        model: With the head of the task.
        model_args: Of the command line.
        args: Of the command line.
        task: "asr", "asv", "er" or "ic", as in `peft_elp.published_rates`.
        feature_extractor: Saved with the adapter.
        trainer_cls: `RecipeTrainer` or a class of it.
        options: Further arguments of `Trainer`.
    """
    adapted = adapt(model, model_args)
    rates = learning_rates(adapted, model_args, args, task)
    config = adapted.peft_config["default"] if model_args.method == "elp" else None
    factors = published_factors(SETTINGS.get(getattr(config, "adapters", ""), "e+l"), task)
    print(f"Trained: {count_trained(adapted)}, at rates {rates}")
    return trainer_cls(
        adapted,
        args,
        data_collator=Collator(feature_extractor),
        processing_class=feature_extractor,
        rates=rates,
        factors=factors if model_args.published_schedule else None,
        **options,
    )


def count_trained(model: Any) -> dict[str, int]:
    """The numbers of trained parameters, of the encoder and of the head apart."""
    return {
        f"trained_parameters_{part}": sum(parameter.numel() for parameter in held.values())
        for part, held in trained_parameters(model).items()
    }


def write_rows(trainer: Trainer, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A .csv file in the output folder."""
    if trainer.is_world_process_zero():
        with Path(trainer.args.output_dir or ".", name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])


def save(
    trainer: Any,
    metrics: dict[str, Any],
    model_args: ModelArguments,
    data_args: Any,
    task: str,
    protocol: str,
) -> dict[str, Any]:
    """Save all that it takes to use what was trained, with metrics, figures and a card.

    Returns:
        The metrics with what they were reached by.
    """
    folder, model, args = Path(trainer.args.output_dir or "."), trainer.model, trainer.args
    metrics |= {"method": model_args.method, "seed": args.seed, **count_trained(model)}
    metrics["train_steps"] = trainer.state.global_step
    trainer.log({name: value for name, value in metrics.items() if isinstance(value, (int, float))})
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if has_elp(model) and trainer.is_world_process_zero():
        adapters = model.peft_config["default"].adapters
        if "L" in adapters:
            plot_layer_weights({task: model}).savefig(folder / "layer_weights.png")
        if "P" in adapters:
            plot_pseudo_features({task: model}).savefig(folder / "pseudo_feature_norms.png")
        trainer.processing_class.save_pretrained(folder)  # before the card, which looks for it
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        name, local = data_args.dataset_name, Path(data_args.dataset_name).exists()
        name = Path(name).name if local else name
        describe(
            model,
            repo_id=getattr(trainer, "hub_model_id", None) or args.hub_model_id,  # the former with the user's name
            datasets=[] if local else [name],
            metrics=[
                EvalResult(
                    task_type="automatic-speech-recognition" if task == "asr" else "audio-classification",
                    dataset_type=name,
                    dataset_name=name,
                    dataset_split=data_args.eval_split_name,
                    metric_type=metric,
                    metric_value=round(metrics[f"eval_{metric}"], 4),
                )
                for metric in MEASURES
                if f"eval_{metric}" in metrics
            ],
            protocol=f"{protocol} Trained for {metrics['train_steps']} steps of {batch} utterances.",
            seed=args.seed,
        )
    trainer.save_model()
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics
