"""Measure what eleven methods reach on tasks of speech, with one protocol for all of them.

    python examples/measure_quality.py run --model_name_or_path openai/whisper-tiny.en --name "Whisper tiny.en" \
        --recordings recordings --tasks voices emotions orders
    python examples/measure_quality.py collect --json measured.json

`run` trains what is missing in `--output_dir`, with one small file for each training, so that it can be stopped and
continued, and extended by further tasks and methods. Trainings are small: `--processes` runs several side by side,
also on one GPU. `collect` joins the files, and `report_quality.py` makes tables and figures of them.
docs/reference/measured.md has them, and describes the protocol.

The recordings are folders in `audiofolder` layout, with a table `metadata.csv` in each split.
"""

import argparse
import csv
import itertools
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
import torch
from accelerate.utils import send_to_device
from sklearn.metrics import balanced_accuracy_score
from tqdm.auto import tqdm
from transformers import AutoModelForAudioClassification, AutoModelForCTC, set_seed
from transformers.utils import logging

from peft_elp import FeatureCache, recipes
from peft_elp.adapters import LAdapter
from peft_elp.speech.data import read_trials
from peft_elp.speech.metrics import cosine_scores, equal_error_rate
from peft_elp.speech.speakers import speaker_embeddings

RATE_HZ = 16_000
Row = dict[str, Any]
Splits = dict[str, list[Row]]  # "train", "validation" and "test"
DoAll = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]

# Recordings ----------------------------------------------------------------------------------------------------------


def read_split(folder: Path, split: str, seconds: float | None) -> list[Row]:
    """The rows of a split with their samples, of which the first `seconds` are kept."""
    with open(folder / split / "metadata.csv", encoding="utf-8") as table:
        rows: list[Row] = list(csv.DictReader(table))
    for row in rows:
        row["file"] = str((folder / split / row["file_name"]).resolve())
        row["audio"] = read_samples(row["file"], seconds)
    return rows


def read_samples(file: str, seconds: float | None) -> np.ndarray:
    samples = soundfile.read(file, dtype="float32")[0]
    return samples if seconds is None else samples[: int(seconds * RATE_HZ)]


def given_splits(rows: Splits) -> Iterator[Splits]:
    yield rows


def speaker_folds(rows: Splits) -> Iterator[Splits]:
    """In each fold one speaker is the test, the next one the validation, and the others are for training."""
    everything = [row for split in ("train", "validation", "test") for row in rows[split]]
    speakers = list(dict.fromkeys(row["speaker_id"] for row in everything))
    for test in range(len(speakers) - 1, -1, -1):
        held = {"test": speakers[test], "validation": speakers[test - 1]}
        yield {name: [row for row in everything if row["speaker_id"] == held[name]] for name in held} | {
            "train": [row for row in everything if row["speaker_id"] not in held.values()]
        }


# Tasks ---------------------------------------------------------------------------------------------------------------


class Classes:
    """The classes of one column or several. One head has those of all columns, one after the other."""

    auto_class: Any = AutoModelForAudioClassification
    trainer_cls: type[recipes.RecipeTrainer] = recipes.RecipeTrainer

    def __init__(self, task: "Task", splits: Splits, recordings: Path) -> None:
        self.columns, self.test = task.columns, splits["test"]
        self.known = [sorted({row[column] for row in splits["train"]}) for column in self.columns]
        names = [f"{column}: {name}" for column, known in zip(self.columns, self.known, strict=True) for name in known]
        names = names if len(self.columns) > 1 else self.known[0]
        self.settings = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        self.trainer_options: dict[str, Any] = {"compute_loss_func": self.loss}

    def label(self, row: Row) -> Any:
        """The number of the class in each column, or -100 for one that training lacks."""
        pairs = zip(self.columns, self.known, strict=True)
        return [known.index(row[column]) if row[column] in known else -100 for column, known in pairs]

    def split(self, logits: torch.Tensor) -> Sequence[torch.Tensor]:
        return logits.split([len(known) for known in self.known], dim=-1)

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        parts = zip(self.split(outputs.logits), labels.unbind(-1), strict=True)
        return sum((torch.nn.functional.cross_entropy(*part) for part in parts), torch.zeros(()))

    def answer(self, model: Any, batch: Mapping[str, Any]) -> Any:
        parts = self.split(model(**batch).logits[0])
        return [known[int(part.argmax())] for known, part in zip(self.known, parts, strict=True)]

    def errors(self, rows: Sequence[Row], answers: Sequence[Any], split: str) -> dict[str, float]:
        """100 minus the accuracy in per cent, as the mean over columns."""
        right = [[row[column] for column in self.columns] for row in rows]
        same = np.array(right) == np.array(answers)
        found = {"": 100 - 100 * float(same.mean())}
        if len(self.columns) > 1:
            found |= {f" {column}": 100 - 100 * float(same[:, i].mean()) for i, column in enumerate(self.columns)}
        return found


class Emotions(Classes):
    """Classes whose accuracy is the mean over the classes."""

    def errors(self, rows: Sequence[Row], answers: Sequence[Any], split: str) -> dict[str, float]:
        right = [row[self.columns[0]] for row in rows]
        return {"": 100 - 100 * float(balanced_accuracy_score(right, [answer[0] for answer in answers]))}


class Voices(Classes):
    """Speakers in training, and pairs of recordings of other speakers afterwards."""

    trainer_cls = recipes.SpeakerTrainer

    def __init__(self, task: "Task", splits: Splits, recordings: Path) -> None:
        super().__init__(task, splits, recordings)
        self.trainer_options = {}
        lists = {"": recordings / task.folder / "trials.csv", " across sets": recordings / str(task.cross_trials)}
        self.trials = {what: read_trials(file, file.parent) for what, file in lists.items() if file.is_file()}
        known = {row["file"] for row in self.test}
        files = {str(Path(file).resolve()) for trials in self.trials.values() for _, *pair in trials for file in pair}
        self.others = [{"file": file, "audio": read_samples(file, task.seconds)} for file in sorted(files - known)]

    def label(self, row: Row) -> Any:
        return super().label(row)[0]

    def answer(self, model: Any, batch: Mapping[str, Any]) -> Any:
        return speaker_embeddings(model, **batch)[0].float().cpu().numpy()

    def errors(self, rows: Sequence[Row], answers: Sequence[Any], split: str) -> dict[str, float]:
        """Equal error rates: of the lists of trials, or of all pairs of another split."""
        embeddings: Any = {row["file"]: answer for row, answer in zip(rows, answers, strict=True)}
        if split == "test":
            found = {}
            for what, trials in self.trials.items():
                labels, pairs = [], []
                for label, *files in trials:
                    labels.append(label)
                    pairs.append(tuple(str(Path(file).resolve()) for file in files))
                found[what] = 100 * equal_error_rate(labels, cosine_scores(embeddings, pairs))
            return found
        speakers = {row["file"]: row["speaker_id"] for row in rows}
        pairs = list(itertools.combinations(speakers, 2))
        labels = [speakers[a] == speakers[b] for a, b in pairs]
        return {"": 100 * equal_error_rate(labels, cosine_scores(embeddings, pairs))}


class Texts(Classes):
    """Characters, recognised with CTC."""

    auto_class = AutoModelForCTC

    def __init__(self, task: "Task", splits: Splits, recordings: Path) -> None:
        self.columns, self.test, self.trainer_options = task.columns, splits["test"], {}
        self.tokenizer = recipes.make_tokenizer([row[task.columns[0]] for row in splits["train"]], task.scratch)
        self.settings = {"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id}
        self.settings |= {"ctc_loss_reduction": "mean", "ctc_zero_infinity": True}

    def label(self, row: Row) -> Any:
        return self.tokenizer(row[self.columns[0]]).input_ids

    def answer(self, model: Any, batch: Mapping[str, Any]) -> Any:
        return self.tokenizer.decode(model(**batch).logits[0].argmax(-1))

    def errors(self, rows: Sequence[Row], answers: Sequence[Any], split: str) -> dict[str, float]:
        right = [row[self.columns[0]] for row in rows]
        return {"": 100 * jiwer.cer(right, list(answers)), " of words": 100 * jiwer.wer(right, list(answers))}


@dataclass(frozen=True)
class Task:
    """A task, and how long every method is trained for it.

    Args:
        kind: What a model answers, and how wrong it is.
        folder: The folder of the recordings.
        columns: The columns of the table that are learned.
        error: What is measured.
        published: The name of the task in `peft_elp.published_rates`.
        seconds: The recordings are cut after this many seconds; also the window of an encoder with a fixed one.
        steps: Training steps.
        batch_size: Recordings in a step.
        bf16: Whether training computes in bfloat16, from weights in float32.
        folds: Makes the folds of the recordings.
        cross_trials: A further list of trials, with recordings of another set.
        scratch: Where a vocabulary is written.
    """

    kind: type[Classes]
    folder: str
    columns: tuple[str, ...]
    error: str
    published: str
    seconds: int
    steps: int
    batch_size: int
    bf16: bool = False
    folds: Callable[[Splits], Iterator[Splits]] = given_splits
    cross_trials: str | None = None
    scratch: Path = Path("outputs")


TASKS = {
    "voices": Task(
        Voices, "commands_ar", ("speaker_id",), "equal error rate", "asv", 1, 100, 16,
        cross_trials="emotion_emodb/trials_cross.csv",
    ),
    "emotions": Task(
        Emotions, "emotion_emodb", ("emotion",), "100 - unweighted accuracy", "er", 2, 60, 8, folds=speaker_folds
    ),
    "words": Task(Classes, "commands_ar", ("label",), "100 - accuracy", "ic", 1, 60, 16),
    "orders": Task(
        Classes, "intent_coffee", ("label", "slot_size", "slot_roast", "slot_shots", "slot_milk", "slot_sugar"),
        "100 - accuracy, mean of six slots", "ic", 5, 300, 4, bf16=True,
    ),
    "digits": Task(Texts, "digits_fsdd", ("transcription_norm",), "character error rate", "asr", 2, 300, 8),
}  # fmt: skip


# Methods -------------------------------------------------------------------------------------------------------------

FURTHER_RATES = 4  # A method tries at most so many beyond the lowest or the highest of its own.
ADAPTER_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
FULL_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
HEAD, FULL = "head only", "full fine-tuning"
LORA, L_ONLY = "LoRA, as many parameters as E+L", "L without layer norms"


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        options: Options of `recipes.ModelArguments`.
        rates: The rates that it chooses from: of the head where nothing else is trained, else of everything else.
        seeds: The number of seeds after the choice.
        weighted: Whether the head reads a weighted sum of the layers.
        cached: Whether the hidden states of the encoder are computed only once.
        times: How many times the steps of the task it is trained.
    """

    options: dict[str, Any]
    rates: Sequence[float] = ADAPTER_RATES
    seeds: int = 3
    weighted: bool = False
    cached: bool = False
    times: int = 1


METHODS = {
    HEAD: Method({"method": "head"}),
    L_ONLY: Method({"adapters": "L", "train_layer_norms": False}, seeds=5, cached=True),
    "E+L": Method({"adapters": "EL"}),
    LORA: Method({"method": "lora"}),
    FULL: Method({"method": "full"}, FULL_RATES),
    "E+L+P": Method({"adapters": "ELP"}),
    "weighted sum of layers + head": Method({"method": "head"}, weighted=True),
    "L": Method({"adapters": "L"}),
    "E": Method({"adapters": "E"}),
    "LoRA, r=8 on q and v": Method(
        {"method": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj", "v_proj"]}
    ),
    # With the start of the others: on Whisper the paper's diverges at these rates (docs/reference/starts.md).
    "conventional adapters": Method({"preset": "conventional", "init_weights": True}),
}


def _changed(name: str, **options: Any) -> dict[str, Method]:
    """A method with other options."""
    words = ", ".join(f"`{option}={value!r}`" for option, value in options.items())
    return {f"{name}, {words}": replace(METHODS[name], options=METHODS[name].options | options)}


# What one choice changes.
CHOICES = {
    **_changed(L_ONLY, l_dim=32),
    **_changed(L_ONLY, l_dim=64),
    **_changed(L_ONLY, l_dim=128),
    **_changed(L_ONLY, l_dim=512),
    **_changed(L_ONLY, l_input_norm=False),
    **_changed(L_ONLY, layer_weights_ratio=1.0),
    **_changed(L_ONLY, dtype="bfloat16"),
    **_changed(L_ONLY, l_layers=[0, 1]),
    **_changed(L_ONLY, l_layers=[2, 3]),
    f"{L_ONLY}, 5 times the steps": replace(METHODS[L_ONLY], times=5),
    **_changed("E+L", e_dim=16),
    **_changed("E+L", e_dim=256),
    **_changed("E+L", train_layer_norms=False),
    **_changed("E+L", init_weights="paper"),
    **_changed("E+L+P", p_length=16),
}


@dataclass
class Result:
    """What one training reached.

    Args:
        encoder: Name of the encoder.
        task: Name of the task.
        method: Name of the method.
        rate: The rate that the method chooses.
        head_rate: The rate of the head.
        seed: The seed; 0 chooses the rate.
        fold: Number of the fold.
        errors: In per cent, by split; "test" only after the choice.
        trained: Trained parameters in the encoder and in the head.
        loss: The mean training loss.
        seconds: How long the training took.
        shares: The shares of the layers in an L-adapter, by layer.
        device: "cpu", or the name of the GPU.
        bf16: Whether it was computed in bfloat16.
    """

    encoder: str
    task: str
    method: str
    rate: float
    head_rate: float
    seed: int
    fold: int
    errors: dict[str, float]
    trained: tuple[int, int]
    loss: float
    seconds: float
    shares: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    bf16: bool = False


def quality(results: Sequence[Result]) -> tuple[float, float]:
    """What a choice of rates minimises, of the results in all folds: the mean error on validation, then the loss."""
    errors = [result.errors["validation"] for result in results]
    return statistics.mean(errors), statistics.mean(result.loss for result in results)


@lru_cache
def read_folds(name: str, recordings: Path) -> list[Splits]:
    """The folds of a task, read once in each process."""
    task = TASKS[name]
    rows = {
        split: read_split(recordings / task.folder, split, task.seconds) for split in ("train", "validation", "test")
    }
    return list(task.folds(rows))


@dataclass(frozen=True)
class Training:
    """One training of the grid: a method on a task, with its rate and that of the head, a seed and a fold."""

    task: str
    method: str
    rate: float
    head_rate: float
    seed: int
    fold: int

    @property
    def name(self) -> str:
        """A name for its files."""
        words = f"{self.method}-{self.rate:g}-{self.head_rate:g}-{self.seed}-{self.fold}"
        return re.sub(r"[^\w=+.-]+", "_", words)


# Training ------------------------------------------------------------------------------------------------------------


class Grid:
    """The trainings of one encoder.

    Args:
        args: The command line of `run`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.output_dir
        self.methods = METHODS | CHOICES

    def model_arguments(self, task: Task, method: Method, rate: float, head_rate: float) -> recipes.ModelArguments:
        """The arguments of a recipe for one training."""
        name, options = self.args.model_name_or_path, dict(method.options)
        config = recipes.load_config(name)
        width = config.hidden_size
        sizes = {"e_dim": width // 6, "l_dim": 2 * width // 3}
        options.setdefault("method", "elp")
        if options["method"] == "elp":
            letters = options.get("adapters", "E")
            options = {key: sizes[key] for key in sizes if key[0].upper() in letters} | options
        ratio = options.pop("layer_weights_ratio", None)
        if options["method"] == "lora" and "lora_r" not in options:
            rank = self.equal_rank(task)
            options |= {"lora_r": rank, "lora_alpha": 2 * rank}
        rates = {"head": head_rate, "encoder": rate}
        if options["method"] == "elp":
            letters = options.get("adapters", "E")
            rates = {"head": head_rate} | {letter.lower(): rate for letter in letters}
            if options.get("train_layer_norms", True):
                rates["layer_norms"] = rate
            if ratio is not None:
                rates["layer_weights"] = ratio * rate
        elif options["method"] == "head":
            del rates["encoder"]
        options |= {f"{part}_learning_rate": value for part, value in rates.items()}
        if getattr(config, "max_source_positions", None) is not None:
            options["chunk_length"] = task.seconds
        if method.cached:
            options |= {"cache_features": str(self.folder / "features"), "cache_dtype": "float32"}
        return recipes.ModelArguments(model_name_or_path=name, **options)

    def equal_rank(self, task: Task) -> int:
        """The rank at which LoRA on the feed-forward modules trains as much as E+L."""
        counts = []
        # The heads of all tasks here are new, which a model made from its configuration does not show.
        new_head = METHODS["E+L"].options | {"l_output": "head"}
        for options in (new_head, {"method": "lora", "lora_r": 1, "lora_alpha": 1}):
            arguments = self.model_arguments(task, Method(options), 0.0, 0.0)
            config = recipes.load_config(self.args.model_name_or_path)
            with torch.device("meta"):
                model = recipes.adapt(AutoModelForAudioClassification.from_config(config), arguments)
            counts.append(recipes.count_trained(model)["trained_parameters_encoder"])
        return round(counts[0] / counts[1])

    def train(self, training: Training) -> Result:
        """One training, or its result if it ended before.

        Raises:
            ValueError: The stored result was trained in another precision.
        """
        name, seed = training.task, training.seed
        file = self.folder / self.args.name / name / f"{training.name}.json"
        task = replace(TASKS[name], scratch=file.parent)
        method = self.methods[training.method]
        bf16 = (task.bf16 and not self.args.no_bf16) or method.options.get("dtype") == "bfloat16"
        if file.is_file():
            result = Result(**json.loads(file.read_text()))
            if result.bf16 != bf16:
                kinds = ["float32", "bfloat16"]
                raise ValueError(
                    f"{file} was trained in {kinds[result.bf16]}, and this run trains in {kinds[bf16]}. Run both with "
                    "--no_bf16 or both without it, or give another --output_dir."
                )
            return result
        start = time.perf_counter()
        splits = read_folds(name, self.args.recordings)[training.fold]
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = task.kind(task, splits, self.args.recordings)
        set_seed(seed)
        arguments = self.model_arguments(task, method, training.rate, training.head_rate)
        config = recipes.load_config(self.args.model_name_or_path, **kind.settings)
        config.update({"use_weighted_layer_sum": method.weighted, "apply_spec_augment": False})
        extractor = recipes.load_feature_extractor(arguments)
        model = recipes.load_model(kind.auto_class, arguments, config)
        rows = [{"audio": row["audio"], "labels": kind.label(row)} for row in splits["train"]]
        settings = recipes.RecipeTrainingArguments(
            output_dir=str(file.parent / training.name),
            max_steps=method.times * (self.args.steps or task.steps),
            per_device_train_batch_size=task.batch_size,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = recipes.make_trainer(
            model, arguments, settings, task.published, extractor, kind.trainer_cls, train_dataset=rows,
            **kind.trainer_options,
        )  # fmt: skip
        loss = trainer.train().training_loss
        measured = ["validation"] if seed == 0 else ["validation", "test"]
        errors = {}
        for split in measured:
            held = [*splits[split], *(getattr(kind, "others", []) if split == "test" else [])]
            answers = self.answers(trainer.model.eval(), arguments, extractor, kind, held)
            errors |= {f"{split}{what}": error for what, error in kind.errors(held, answers, split).items()}
        counts = recipes.count_trained(trainer.model)
        result = Result(
            self.args.name, name, training.method, training.rate, training.head_rate, seed, training.fold, errors,
            (counts["trained_parameters_encoder"], counts["trained_parameters_head"]), loss,
            time.perf_counter() - start, shares_of(trainer.model),
            torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", bf16,
        )  # fmt: skip
        if seed and arguments.method == "elp":
            trainer.model.save_pretrained(settings.output_dir)
            extractor.save_pretrained(settings.output_dir)
            if isinstance(kind, Texts):
                kind.tokenizer.save_pretrained(settings.output_dir)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(vars(result)))
        unfinished.replace(file)
        return result

    @torch.no_grad()
    def answers(
        self, model: Any, arguments: recipes.ModelArguments, extractor: Any, kind: Classes, rows: Sequence[Row]
    ) -> list[Any]:
        """What the model says of each recording, one at a time."""
        collate = recipes.Collator(extractor, model)
        batches: Any = [[{"audio": row["audio"]}] for row in rows]
        if arguments.cache_features is not None:
            cache = FeatureCache(model, arguments.cache_features, getattr(torch, arguments.cache_dtype))
            cached = cache.read([batch[0] for batch in batches], collate, progress=False)
            batches, collate = [[cached[number]] for number in range(len(cached))], cache.collate
        return [kind.answer(model, send_to_device(collate(batch), model.device)) for batch in batches]

    def train_all(self, trainings: Sequence[Training], what: str, do_all: DoAll) -> list[Result]:
        """Train what is missing."""
        return list(tqdm(do_all(self.train, trainings), desc=f"{self.args.name}, {what}", total=len(trainings)))

    def choose(
        self, wanted: Sequence[tuple[str, str]], head_rates: Mapping[str, float], do_all: DoAll
    ) -> dict[tuple[str, str], tuple[float, float]]:
        """The rate and the rate of the head of each task and method, with the lowest mean error on validation, seed 0.

        Where the lowest or the highest rate is the best one, up to four rates beyond it are tried.
        """
        rates = {pair: list(self.methods[pair[1]].rates) for pair in wanted}
        found: dict[tuple[str, str, float], list[Result]] = {}
        chosen: dict[tuple[str, str], tuple[float, float]] = {}
        for _ in range(1 + FURTHER_RATES):
            missing = [(*pair, rate) for pair in wanted for rate in rates[pair] if (*pair, rate) not in found]
            trainings = [
                Training(task, method, rate, self.head_rate(task, method, rate, head_rates), 0, fold)
                for task, method, rate in missing
                for fold in range(len(read_folds(task, self.args.recordings)))
            ]
            for training, result in zip(trainings, self.train_all(trainings, "rates", do_all), strict=True):
                found.setdefault((training.task, training.method, training.rate), []).append(result)
            for pair, tried in rates.items():
                rate = min(tried, key=lambda rate: quality(found[(*pair, rate)]))
                chosen[pair] = rate, self.head_rate(*pair, rate, head_rates)
                if len(tried) > 1 and rate == tried[-1]:
                    tried.append(float(f"{rate * rate / tried[-2]:.0e}"))
                elif len(tried) > 1 and rate == tried[0]:
                    tried.insert(0, float(f"{rate * rate / tried[1]:.0e}"))
        return chosen

    def head_rate(self, task: str, method: str, rate: float, head_rates: Mapping[str, float]) -> float:
        """The rate of the head: that of the head alone, or the one rate of a method that trains nothing else."""
        return rate if self.methods[method].options.get("method") == "head" else head_rates[task]

    def run(self, do_all: DoAll = map) -> None:
        """Train what is missing: first the rates of each method are chosen, and then come the seeds.

        Args:
            do_all: Calls a function with each of some arguments, as `map` does, and may do so side by side.
        """
        tasks, methods = self.args.tasks, self.args.methods or list(self.methods)
        if self.args.head_rate is None:
            heads = self.choose([(task, HEAD) for task in tasks], {}, do_all)
            head_rates = {task: rate for (task, _), (rate, _) in heads.items()}
        else:
            head_rates = dict.fromkeys(tasks, float(self.args.head_rate))
        wanted = [
            (task, method)
            for task, method in itertools.product(tasks, methods)
            # Transformers has no weighted sum with CTC.
            if TASKS[task].kind is not Texts or not self.methods[method].weighted
        ]
        chosen = self.choose(wanted, head_rates, do_all)
        seeds = {pair: self.args.seeds or self.methods[pair[1]].seeds for pair in wanted}
        trainings = [
            Training(task, method, *chosen[task, method], seed, fold)
            for seed in range(1, 1 + max(seeds.values()))
            for task, method in wanted
            if seed <= seeds[task, method]
            for fold in range(len(read_folds(task, self.args.recordings)))
        ]
        self.train_all(trainings, "seeds", do_all)


def run_grid(args: argparse.Namespace) -> None:
    if args.processes == 1:
        Grid(args).run()
    else:  # CUDA cannot be used in a forked process.
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            Grid(args).run(pool.map)


def shares_of(model: Any) -> dict[str, float]:
    """The shares of the layers in the L-adapter of a model, if it has one."""
    shares = [module.shares().tolist() for module in model.modules() if isinstance(module, LAdapter)]
    return {str(layer): round(share, 4) for layer, share in enumerate(shares[0])} if shares else {}


def collect(args: argparse.Namespace) -> None:
    """Join the files of all trainings. Those with rates that are not the chosen ones any more are left out."""
    files = sorted(args.output_dir.glob("*/*/*-*-*-*-*.json"))
    found = [Result(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    tried: dict[tuple[str, str, str], dict[tuple[float, float], list[Result]]] = {}
    for result in found:
        if result.seed == 0:
            by_rates = tried.setdefault((result.encoder, result.task, result.method), {})
            by_rates.setdefault((result.rate, result.head_rate), []).append(result)
    kept = []
    for result in found:
        by_rates = tried[result.encoder, result.task, result.method]
        chosen = min(by_rates, key=lambda rates: quality(by_rates[rates]))
        if result.seed == 0 or (result.rate, result.head_rate) == chosen:
            kept.append(vars(result))
    args.json.write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n", encoding="utf-8")
    print(f"{len(kept)} trainings in {args.json}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    run = kinds.add_parser("run", help="Train what is missing.")
    run.set_defaults(do=run_grid)
    run.add_argument("--model_name_or_path", required=True, help="A speech encoder: Hub id or folder.")
    run.add_argument("--name", required=True, help="Its name in the results.")
    run.add_argument("--recordings", type=Path, required=True, help="Folder with the folders of the tasks.")
    run.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    run.add_argument("--methods", nargs="+", choices=[*METHODS, *CHOICES])
    run.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    run.add_argument("--steps", type=int, help="Training steps; default: those of the task.")
    run.add_argument(
        "--head_rate",
        type=float,
        help="Rate of the heads of all methods that train more; default: that of the head alone.",
    )
    run.add_argument("--seeds", type=int, help="Seeds after the choice of rates; default: those of the method.")
    run.add_argument("--no_bf16", action="store_true", help="Compute in float32, on a CPU that has no bfloat16.")
    run.add_argument("--processes", type=int, default=1, help="Trainings side by side.")
    joined = kinds.add_parser("collect", help="Join the results of `run`.")
    joined.set_defaults(do=collect)
    joined.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    joined.add_argument("--json", type=Path, required=True, help="File for all results.")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    args.do(args)


if __name__ == "__main__":
    main()
