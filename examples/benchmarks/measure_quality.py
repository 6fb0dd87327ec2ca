"""Measure what eleven methods reach on tasks of speech, with one protocol for all of them.

    python examples/benchmarks/measure_quality.py run --model_name_or_path openai/whisper-tiny.en \
        --name "Whisper tiny.en" --recordings recordings --tasks voices emotions orders
    python examples/benchmarks/measure_quality.py collect --json measured.json

`run` trains what is missing in `--output_dir`, with one small file for each training, so that it can be stopped and
continued, and extended by further tasks and methods. Trainings are small: `--processes` runs several side by side,
also on one GPU. `collect` joins the files, and `report_quality.py` makes tables and figures of them.
docs/reference/measured.md has them, and describes the protocol.

The recordings are folders in `audiofolder` layout, with a table `metadata.csv` in each split.
"""

import argparse
import itertools
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import common
import jiwer
import numpy as np
import torch
from accelerate.utils import send_to_device
from common import HEAD, L_ONLY, Row
from sklearn.metrics import balanced_accuracy_score
from tqdm.auto import tqdm
from transformers import AutoModelForAudioClassification, AutoModelForCTC, set_seed
from transformers.utils import logging

from peft_elp import FeatureCache, recipes
from peft_elp.adapters import LAdapter
from peft_elp.speech.speakers import speaker_embeddings

Splits = dict[str, list[Row]]  # "train", "validation" and "test"
DoAll = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]  # as `map`, perhaps side by side

# Tasks ---------------------------------------------------------------------------------------------------------------


def speaker_folds(rows: Splits) -> Iterator[Splits]:
    """Yield folds: one speaker is the test, the next one the validation, and the others are for training."""
    everything = [row for split in ("train", "validation", "test") for row in rows[split]]
    speakers = list(dict.fromkeys(row["speaker_id"] for row in everything))
    for number in reversed(range(len(speakers))):
        kind = {speakers[number]: "test", speakers[number - 1]: "validation"}
        fold: Splits = {"test": [], "validation": [], "train": []}
        for row in everything:
            fold[kind.get(row["speaker_id"], "train")].append(row)
        yield fold


class Classes:
    """The classes of one column or several. One head has those of all columns, one after the other."""

    auto_class: Any = AutoModelForAudioClassification
    trainer_cls: type[recipes.RecipeTrainer] = recipes.RecipeTrainer

    def __init__(self, task: "Task", splits: Splits, recordings: Path, scratch: Path) -> None:
        self.columns = task.columns
        self.known = [sorted({row[column] for row in splits["train"]}) for column in self.columns]
        names = [f"{column}: {name}" for column, known in zip(self.columns, self.known, strict=True) for name in known]
        names = names if len(self.columns) > 1 else self.known[0]
        self.settings = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        self.trainer_options: dict[str, Any] = {"compute_loss_func": self.loss}
        self.others: list[Row] = []  # recordings that are answered beside those of the test split

    def label(self, row: Row) -> Any:
        """Return the number of the class in each column, or -100 for one that training lacks."""
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
        """Return 100 minus the accuracy in per cent, as the mean over columns and for each column."""
        same = np.array([[row[column] for column in self.columns] for row in rows]) == np.array(answers)
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

    def __init__(self, task: "Task", splits: Splits, recordings: Path, scratch: Path) -> None:
        super().__init__(task, splits, recordings, scratch)
        self.trainer_options = {}
        lists = {"": recordings / task.folder / "trials.csv", " across sets": recordings / str(task.cross_trials)}
        self.lists = {what: file for what, file in lists.items() if file.is_file()}
        files = {file for trials in self.lists.values() for pair in common.read_pairs(trials)[1] for file in pair}
        unread = sorted(files - {row["file"] for row in splits["test"]})
        self.others = [common.read_recording(file, task.seconds) for file in unread]

    def label(self, row: Row) -> Any:
        return super().label(row)[0]

    def answer(self, model: Any, batch: Mapping[str, Any]) -> Any:
        return speaker_embeddings(model, **batch)[0].float().cpu().numpy()

    def errors(self, rows: Sequence[Row], answers: Sequence[Any], split: str) -> dict[str, float]:
        """Return equal error rates: of the lists of trials on test, else of all pairs."""
        embeddings = {row["file"]: answer for row, answer in zip(rows, answers, strict=True)}
        if split != "test":
            return {"": common.pair_error(embeddings, rows)}
        return {what: common.trial_error(embeddings, file) for what, file in self.lists.items()}


class Texts(Classes):
    """Characters, recognised with CTC."""

    auto_class = AutoModelForCTC

    def __init__(self, task: "Task", splits: Splits, recordings: Path, scratch: Path) -> None:
        self.columns, self.trainer_options, self.others = task.columns, {}, []
        self.tokenizer = recipes.make_tokenizer([row[task.columns[0]] for row in splits["train"]], scratch)
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
    """A task, and how long every method is trained for it."""

    kind: type[Classes]  # what a model answers, and how wrong that is
    folder: str
    columns: tuple[str, ...]  # what is learned
    error: str  # what is measured
    published: str  # its name in `peft_elp.published_rates`
    seconds: int  # where recordings are cut; also the window of an encoder with a fixed one
    steps: int
    batch_size: int
    bf16: bool = False  # Whether training computes in bfloat16, from weights in float32.
    folds: Callable[[Splits], Iterable[Splits]] = lambda rows: [rows]
    cross_trials: str | None = None  # a further list of trials, with recordings of another set


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


@dataclass(frozen=True)
class Method:
    """One way to train."""

    options: dict[str, Any]  # of `recipes.ModelArguments`
    # What it chooses from: the rate of the head where nothing else is trained, else of everything else.
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2)
    seeds: int = 3  # after the choice
    weighted: bool = False  # Whether the head reads a weighted sum of the layers.
    cached: bool = False  # Whether the hidden states of the encoder are computed only once.
    times: int = 1  # How many times the steps of the task it is trained.


METHODS = {name: Method(options) for name, options in common.METHODS.items()}
METHODS[L_ONLY] = replace(METHODS[L_ONLY], seeds=5, cached=True)
METHODS[common.FULL] = replace(METHODS[common.FULL], rates=(3e-5, 1e-4, 3e-4, 1e-3))
METHODS[common.WEIGHTED] = replace(METHODS[common.WEIGHTED], weighted=True)


def changed(name: str, **options: Any) -> tuple[str, Method]:
    """Return a method with other options, and its name."""
    words = ", ".join(f"`{option}={value!r}`" for option, value in options.items())
    return f"{name}, {words}", replace(METHODS[name], options=METHODS[name].options | options)


# What one choice changes.
CHOICES = dict(
    [
        *(changed(L_ONLY, l_dim=width) for width in (32, 64, 128, 512)),
        changed(L_ONLY, l_input_norm=False),
        changed(L_ONLY, layer_weights_ratio=1.0),
        changed(L_ONLY, dtype="bfloat16"),
        changed(L_ONLY, l_layers=[0, 1]),
        changed(L_ONLY, l_layers=[2, 3]),
        (f"{L_ONLY}, 5 times the steps", replace(METHODS[L_ONLY], times=5)),
        *(changed("E+L", e_dim=width) for width in (16, 256)),
        changed("E+L", train_layer_norms=False),
        *(changed(name, init_weights="paper") for name in ("E", "E+L")),
        *(changed("E+L+P", p_length=length) for length in (4, 16)),
    ]
)


@dataclass
class Training:
    """One training of the grid."""

    encoder: str
    task: str
    method: str
    rate: float  # the one that the method chooses
    head_rate: float
    seed: int  # 0 chooses the rate
    fold: int

    def file(self, folder: Path) -> Path:
        """Return where its result is stored."""
        words = f"{self.method}-{self.rate:g}-{self.head_rate:g}-{self.seed}-{self.fold}"
        return folder / self.encoder / self.task / (re.sub(r"[^\w=+.-]+", "_", words) + ".json")


@dataclass
class Result(Training):
    """What one training reached."""

    errors: dict[str, float]  # in per cent, by split; "test" only after the choice
    trained: tuple[int, int]  # parameters in the encoder and in the head
    loss: float  # the mean over the training
    seconds: float
    shares: dict[str, float] = field(default_factory=dict)  # of the layers in an L-adapter
    device: str = "cpu"  # or the name of the GPU
    bf16: bool = False


def quality(results: Sequence[Result]) -> tuple[float, float]:
    """Return what a choice of rates minimises, in all folds: the mean error on validation, then the loss."""
    errors = [result.errors["validation"] for result in results]
    return statistics.mean(errors), statistics.mean(result.loss for result in results)


@lru_cache
def read_folds(name: str, recordings: Path) -> list[Splits]:
    """Read the folds of a task, once in each process."""
    task, names = TASKS[name], ("train", "validation", "test")
    return list(
        task.folds({split: common.read_rows(recordings / task.folder, split, task.seconds) for split in names})
    )


# Training ------------------------------------------------------------------------------------------------------------


class Grid:
    """The trainings of one encoder, with the command line of `run`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.methods = args, METHODS | CHOICES

    def model_arguments(self, task: Task, method: Method, rate: float, head_rate: float) -> recipes.ModelArguments:
        """Return the arguments of a recipe for one training."""
        config = recipes.load_config(self.args.model_name_or_path)
        options: dict[str, Any] = {"method": "elp", **method.options}
        sizes = {"e_dim": config.hidden_size // 6, "l_dim": 2 * config.hidden_size // 3}
        rates = {"head": head_rate}
        if options["method"] == "elp":
            letters = options.get("adapters", "E").lower()
            options = {size: sizes[size] for size in sizes if size[0] in letters} | options
            rates |= dict.fromkeys(letters, rate)
            if options.get("train_layer_norms", True):
                rates["layer_norms"] = rate
            if (ratio := options.pop("layer_weights_ratio", None)) is not None:
                rates["layer_weights"] = ratio * rate
        elif options["method"] != "head":
            rates["encoder"] = rate
        if options["method"] == "lora" and "lora_r" not in options:
            # The heads of all tasks here are new, which a model made from its configuration does not show.
            rank = common.equal_rank(config, {**sizes, "adapters": "EL", "l_output": "head"})
            options |= {"lora_r": rank, "lora_alpha": 2 * rank}
        if getattr(config, "max_source_positions", None) is not None:
            options["chunk_length"] = task.seconds
        if method.cached:
            options |= {"cache_features": str(self.args.output_dir / "features"), "cache_dtype": "float32"}
        options |= {f"{part}_learning_rate": value for part, value in rates.items()}
        return recipes.ModelArguments(model_name_or_path=self.args.model_name_or_path, **options)

    def train(self, training: Training) -> Result:
        """Return the result of one training, which is trained unless it was before."""
        task, method = TASKS[training.task], self.methods[training.method]
        bf16 = (task.bf16 and not self.args.no_bf16) or method.options.get("dtype") == "bfloat16"
        file = training.file(self.args.output_dir)
        file.parent.mkdir(parents=True, exist_ok=True)
        steps = method.times * (self.args.steps or task.steps)
        settings = {"model": self.args.model_name_or_path, "steps": steps, "bf16": bf16}
        make = partial(self.train_now, training, file.with_suffix(""), steps, bf16)
        return Result(**common.train_once(file, settings, make))

    def train_now(self, training: Training, folder: Path, steps: int, bf16: bool) -> dict[str, Any]:
        start, task, method = time.perf_counter(), TASKS[training.task], self.methods[training.method]
        splits = read_folds(training.task, self.args.recordings)[training.fold]
        kind = task.kind(task, splits, self.args.recordings, folder.parent)
        set_seed(training.seed)
        arguments = self.model_arguments(task, method, training.rate, training.head_rate)
        config = recipes.load_config(self.args.model_name_or_path, **kind.settings)
        config.update({"use_weighted_layer_sum": method.weighted, "apply_spec_augment": False})
        extractor = recipes.load_feature_extractor(arguments)
        args = recipes.RecipeTrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=task.batch_size, bf16=bf16, seed=training.seed,
            use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        model = recipes.load_model(kind.auto_class, arguments, config)
        rows = [{"audio": row["audio"], "labels": kind.label(row)} for row in splits["train"]]
        trainer = recipes.make_trainer(
            model, arguments, args, task.published, extractor, kind.trainer_cls, train_dataset=rows,
            **kind.trainer_options,
        )  # fmt: skip
        loss, errors = trainer.train().training_loss, {}
        model = trainer.model.eval()
        for split in ("validation", "test") if training.seed else ("validation",):
            rows = [*splits[split], *(kind.others if split == "test" else [])]
            answers = answers_to(rows, model, arguments, extractor, kind.answer)
            errors |= {f"{split}{what}": error for what, error in kind.errors(rows, answers, split).items()}
        if training.seed and arguments.method == "elp":
            for part in (model, extractor, *([kind.tokenizer] if isinstance(kind, Texts) else [])):
                part.save_pretrained(folder)
        shares = [module.shares().tolist() for module in model.modules() if isinstance(module, LAdapter)][:1]
        counts = recipes.count_trained(model)
        return vars(training) | {
            "errors": errors,
            "trained": (counts["trained_parameters_encoder"], counts["trained_parameters_head"]),
            "loss": loss,
            "seconds": time.perf_counter() - start,
            "shares": {str(layer): round(share, 4) for held in shares for layer, share in enumerate(held)},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "bf16": bf16,
        }

    def train_all(
        self, choices: Iterable[tuple[str, str, float, float]], seeds: Sequence[int], what: str, do_all: DoAll
    ) -> list[Result]:
        """Train tasks and methods at their rates, with each seed in each fold."""
        trainings = [
            Training(self.args.name, *choice, seed, fold)
            for seed in seeds
            for choice in choices
            if seed <= (self.args.seeds or self.methods[choice[1]].seeds)
            for fold in range(len(read_folds(choice[0], self.args.recordings)))
        ]
        return list(tqdm(do_all(self.train, trainings), desc=f"{self.args.name}, {what}", total=len(trainings)))

    def choose(
        self, wanted: Sequence[tuple[str, str]], head_rates: Mapping[str, float], do_all: DoAll
    ) -> list[tuple[str, str, float, float]]:
        """Return each task and method with its rate and the rate of the head, chosen on validation with seed 0.

        Where the lowest or the highest rate is the best one, up to four rates beyond it are tried. A method that
        trains the head alone has one rate; the others have its rate for their heads.
        """
        rates = {pair: list(self.methods[pair[1]].rates) for pair in wanted}
        found: dict[tuple[str, str, float], list[Result]] = {}
        best: dict[tuple[str, str], float] = {}
        for _ in range(1 + FURTHER_RATES):
            missing = [
                (*pair, rate, rate if self.methods[pair[1]].options.get("method") == "head" else head_rates[pair[0]])
                for pair in wanted
                for rate in rates[pair]
                if (*pair, rate) not in found
            ]
            for result in self.train_all(missing, [0], "rates", do_all):
                found.setdefault((result.task, result.method, result.rate), []).append(result)
            best = {pair: min(tried, key=lambda rate: quality(found[(*pair, rate)])) for pair, tried in rates.items()}
            for pair, tried in rates.items():
                rate = best[pair]
                if len(tried) > 1 and rate == tried[-1]:
                    tried.append(float(f"{rate * rate / tried[-2]:.0e}"))
                elif len(tried) > 1 and rate == tried[0]:
                    tried.insert(0, float(f"{rate * rate / tried[1]:.0e}"))
        return [(*pair, rate, found[(*pair, rate)][0].head_rate) for pair, rate in best.items()]

    def run(self, do_all: DoAll = map) -> None:
        """Train what is missing: first the rates of each method are chosen, and then come the seeds."""
        head_rates: dict[str, Any] = dict.fromkeys(self.args.tasks, self.args.head_rate)
        if self.args.head_rate is None:
            heads = self.choose([(task, HEAD) for task in self.args.tasks], {}, do_all)
            head_rates = {task: rate for task, _, rate, _ in heads}
        wanted = [
            (task, method)
            for task, method in itertools.product(self.args.tasks, self.args.methods or list(self.methods))
            # Transformers has no weighted sum with CTC.
            if TASKS[task].kind is not Texts or not self.methods[method].weighted
        ]
        most = max(self.args.seeds or self.methods[method].seeds for _, method in wanted)
        self.train_all(self.choose(wanted, head_rates, do_all), range(1, 1 + most), "seeds", do_all)


@torch.no_grad()
def answers_to(
    rows: Sequence[Row], model: Any, arguments: recipes.ModelArguments, extractor: Any, answer: Callable[..., Any]
) -> list[Any]:
    """Return what the model says of each recording, one at a time."""
    collate = recipes.Collator(extractor, model)
    inputs: Any = [{"audio": row["audio"]} for row in rows]
    if arguments.cache_features is not None:
        cache = FeatureCache(model, arguments.cache_features, getattr(torch, arguments.cache_dtype))
        cached = cache.read(inputs, collate, progress=False)
        inputs, collate = [cached[number] for number in range(len(cached))], cache.collate
    return [answer(model, send_to_device(collate([one]), model.device)) for one in inputs]


def run_grid(args: argparse.Namespace) -> None:
    if args.processes == 1:
        Grid(args).run()
    else:  # CUDA cannot be used in a forked process.
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            Grid(args).run(pool.map)


def collect(args: argparse.Namespace) -> None:
    """Join the files of all trainings. Those with rates that are not the chosen ones any more are left out."""
    files = sorted(args.output_dir.glob("*/*/*-*-*-*-*.json"))
    found = [Result(**json.loads(file.read_text(encoding="utf-8"))["result"]) for file in files]
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
    run, joined = kinds.add_parser("run", help="Train what is missing."), kinds.add_parser("collect", help="Join it.")
    for kind, do in ((run, run_grid), (joined, collect)):
        kind.set_defaults(do=do)
        kind.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    option = run.add_argument
    option("--model_name_or_path", required=True, help="A speech encoder: Hub id or folder.")
    option("--name", required=True, help="Its name in the results.")
    option("--recordings", type=Path, required=True, help="Folder with the folders of the tasks.")
    option("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    option("--methods", nargs="+", choices=[*METHODS, *CHOICES])
    option("--steps", type=int, help="Training steps; default: the number of the task.")
    option("--head_rate", type=float, help="Rate of all heads beside something trained; default: of the head alone.")
    option("--seeds", type=int, help="Seeds after the choice of rates; default: those of the method.")
    option("--no_bf16", action="store_true", help="Compute in float32, on a CPU that has no bfloat16.")
    option("--processes", type=int, default=1, help="Trainings side by side.")
    joined.add_argument("--json", type=Path, required=True, help="File for all results.")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    args.do(args)


if __name__ == "__main__":
    main()
