"""Measure what methods of training reach on three tasks of speech, with one protocol for all of them.

    python examples/benchmarks/measure_quality.py run --recordings recordings \
        --model_name_or_path openai/whisper-tiny.en
    python examples/benchmarks/measure_quality.py collect --recordings recordings --json measured.json

`run` trains what is missing in `--output_dir`, with one small file for each training, so that it can be stopped and
continued. `collect` chooses a setting for each method on validation, and makes intervals and p-values of its answers
on test. `report_quality.py` makes tables and a figure of them. docs/reference/measured.md has them, with the protocol.

The encoder has a fixed window, as Whisper's. Recordings are in `audiofolder` layout, with a table in each split.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import numpy as np
import soundfile
import torch
from common import BESIDE, FULL, HEAD, L_ONLY, SEARCH, SUM, Row
from common import SOME_LORA as LORA
from sklearn.model_selection import GroupKFold
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize, one_hot
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForAudioClassification, set_seed
from transformers.utils import logging

from peft_elp import ELPConfig, FeatureCache, count_parameters, create_optimizer, recipes, train
from peft_elp.speech.speakers import speaker_embeddings

# Tasks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """One division of the recordings. Each pair of parts is used as validation and test; emotions use both orders."""

    train: list[int]
    parts: dict[str, list[int]]
    uses: tuple[tuple[str, str], ...] = (("validation", "test"),)


@dataclass(frozen=True)
class Task:
    """A task, and the longest training."""

    folder: str
    columns: tuple[str, ...]  # what is learned; voices are compared instead of named
    error: str  # what is measured
    groups: str  # the column whose values a fold keeps together
    seconds: int  # where recordings are cut; also the window of an encoder with a fixed one
    steps: int
    batch_size: int
    verify: bool = False
    balanced: bool = False  # Whether the accuracy is the mean over classes.
    swapped: bool = False  # Whether two groups are held out instead of a test split: each tests the other's choice.


SLOTS = ("label", "slot_size", "slot_roast", "slot_shots", "slot_milk", "slot_sugar")
TASKS = {
    "voices": Task("commands_ar", ("speaker_id",), "equal error rate", "speaker_id", 1, 300, 16, verify=True),
    "emotions": Task(
        "emotion_emodb", ("emotion",), "100 - unweighted accuracy", "speaker_id", 2, 240, 8,
        balanced=True, swapped=True,
    ),
    "orders": Task("intent_coffee", SLOTS, "100 - accuracy, mean of six slots", "group", 5, 400, 4),
}  # fmt: skip
FOLDS, TRAINED_FOLDS, CHECKS, PATIENCE = 5, 3, 10, 3
FROZEN_TIMES = 3  # A method that reads a frozen encoder may take so many times the steps.


class Data:
    """The recordings of a task and their folds."""

    def __init__(self, name: str, recordings: Path) -> None:
        self.task = task = TASKS[name]
        splits = {split: common.read_rows(recordings / task.folder, split, task.seconds) for split in common.SPLITS}
        self.rows: list[Row] = [row for held in splits.values() for row in held]
        self.trials = recordings / task.folder / "trials.csv" if task.verify else None
        count = len(self.rows) - len(splits["test"])
        known, test = list(range(count)), list(range(count, len(self.rows)))
        groups = [row[task.groups] for row in self.rows]
        self.classes = np.array([row[task.columns[0]] for row in self.rows])
        self.folds: list[Fold] = []
        if task.swapped:
            names = list(dict.fromkeys(groups))
            of = {name: [number for number, group in enumerate(groups) if group == name] for name in names}
            pairs = [(name, names[number - 1]) for number, name in enumerate(names)]
            for pair in pairs:
                train = [i for i, group in enumerate(groups) if group not in pair]
                self.folds.append(Fold(train, {name: of[name] for name in pair}, (pair, pair[::-1])))
        else:
            cuts = GroupKFold(FOLDS, shuffle=True, random_state=0).split(known, groups=groups[:count])
            self.folds = [Fold(list(train), {"validation": list(held), "test": test}) for train, held in cuts]
            self.folds = self.folds[:TRAINED_FOLDS]

    @property
    def tests(self) -> dict[str, list[int]]:
        """The recordings that are tested, once each: the test split, or one group after the other."""
        return {part: held for fold in self.folds for part, held in fold.parts.items() if part != "validation"}

    def names(self, fold: Fold) -> list[list[str]]:
        """Return the classes of each column that training knows."""
        return [sorted({self.rows[i][column] for i in fold.train}) for column in self.task.columns]

    def labels(self, fold: Fold) -> Tensor:
        """Return the number of the class of each recording in each column, -100 for one that training lacks."""
        names = self.names(fold)
        pairs = list(zip(self.task.columns, names, strict=True))
        return torch.tensor([[n.index(row[c]) if row[c] in n else -100 for c, n in pairs] for row in self.rows])

    def loss(self, model: Any, batch: dict[str, Any], labels: Tensor, fold: Fold) -> Tensor:
        """Return the loss of a batch: AM-Softmax for voices, else cross-entropy, summed over columns."""
        if self.task.verify:
            weight = recipes.get_base_model(model).classifier.weight
            embeddings = speaker_embeddings(model, **batch).float()
            cosines = linear(normalize(embeddings), normalize(weight.float()))
            return cross_entropy(30 * (cosines - 0.2 * one_hot(labels[:, 0], len(weight))), labels[:, 0])
        parts = model(**batch).logits.float().split([len(n) for n in self.names(fold)], dim=-1)
        return torch.stack([cross_entropy(*part) for part in zip(parts, labels.unbind(-1), strict=True)]).sum()

    def wrong(self, numbers: Sequence[int], outputs: Tensor, fold: Fold) -> list[float]:
        """Return for each recording which share of its columns is answered wrongly."""
        parts = outputs.split([len(n) for n in self.names(fold)], dim=-1)
        answers = torch.stack([part.argmax(-1) for part in parts], dim=-1)
        return (answers != self.labels(fold)[list(numbers)]).float().mean(-1).tolist()

    def error(self, numbers: Sequence[int], outputs: Tensor, fold: Fold) -> float:
        """Return the error on validation in per cent."""
        rows = [self.rows[i] for i in numbers]
        if self.task.verify:
            return common.pair_error(dict(zip((row["file"] for row in rows), outputs.numpy(), strict=True)), rows)
        wrong = np.array(self.wrong(numbers, outputs, fold))
        return 100 * float(class_mean(wrong, self.classes[list(numbers)]) if self.task.balanced else wrong.mean())

    def test(self, numbers: Sequence[int], outputs: Tensor, fold: Fold) -> dict[str, Any]:
        """Return what the error on test, and its interval over clips, is made of."""
        names = [Path(self.rows[i]["file"]).name for i in numbers]
        if self.trials is None:
            return dict(zip(names, self.wrong(numbers, outputs, fold), strict=True))
        embeddings = {self.rows[i]["file"]: x for i, x in zip(numbers, normalize(outputs).numpy(), strict=True)}
        pairs = common.read_pairs(self.trials)[1]
        return {"scores": [round(float(embeddings[a] @ embeddings[b]), 5) for a, b in pairs]}


def class_mean(wrong: np.ndarray, classes: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return the mean over classes of the weighted mean in each; a class without weight does not count."""
    weight = np.ones(len(wrong)) if weight is None else weight
    held = [classes == name for name in sorted(set(classes))]
    return float(np.mean([np.average(wrong[c], weights=weight[c]) for c in held if weight[c].sum()]))


# Methods -------------------------------------------------------------------------------------------------------------

FROZEN = {"adapters": "L", "train_layer_norms": False}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
# Settings that a method chooses from: options of `recipes.ModelArguments`, and the rate of what is trained besides
# the head. Where the encoder is frozen, the head has that rate too, else HEAD_RATE.
HEAD_RATE = 3e-3
METHODS: dict[str, list[dict[str, Any]]] = {
    HEAD: [{"method": "head", "rate": rate} for rate in (1e-3, 3e-3, 1e-2)],
    SUM: [{**FROZEN, "l_dim": 0, "rate": rate} for rate in (1e-3, 3e-3, 1e-2)],
    L_ONLY: [{**FROZEN, "l_dim": size, "rate": rate} for size in (64, 256) for rate in (1e-3, 3e-3)],
    BESIDE: [{**FROZEN, "l_dim": 256, "l_output": "residual", "rate": rate} for rate in (1e-3, 3e-3)],
    "E+L": [{"adapters": "EL", "e_dim": 64, "l_dim": 256, "rate": rate} for rate in (1e-3, 3e-3)],
    LORA: [
        {"method": "lora", "lora_r": 36, "lora_alpha": 72, "rate": 1e-3},
        {"method": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ALL_LINEAR, "rate": 3e-3},
    ],
    FULL: [{"method": "full", "rate": rate} for rate in (1e-4, 3e-4)],
}
# A setting that is worse than the best by so many points, over the folds so far, is not trained further.
MARGIN_FROZEN, MARGIN = 4.0, 2.0


@dataclass
class Result:
    """One use of one training: which recordings chose the step, and the answers on others."""

    task: str
    method: str
    setting: dict[str, Any]
    fold: int
    chosen_on: str
    tested_on: str
    curve: list[float]  # errors on validation at each check, in per cent
    steps: int  # where the error on validation was lowest
    test: dict[str, Any]
    trained: int  # parameters in the encoder
    seconds: float


class Grid:
    """The trainings of one task."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.args, self.name, self.data = args, name, Data(name, args.recordings)
        self.task, self.known = self.data.task, {}

    def model(self, setting: dict[str, Any], names: Sequence[Sequence[str]]) -> Any:
        """Return a new model, adapted by one setting."""
        options = {key: value for key, value in setting.items() if key != "rate"}
        source, labels = self.args.model_name_or_path, {str(i): i for i in range(sum(map(len, names)))}
        config = recipes.load_config(source, label2id=labels, id2label={i: label for label, i in labels.items()})
        config.apply_spec_augment = False
        chunk = {"chunk_length": self.task.seconds} if hasattr(config, "max_source_positions") else {}
        arguments = recipes.ModelArguments(model_name_or_path=source, **options, **chunk)
        model = recipes.load_model(AutoModelForAudioClassification, arguments, config)
        self.extractor = recipes.load_feature_extractor(arguments)
        return recipes.adapt(model, arguments)

    def rows(self, model: Any, setting: dict[str, Any]) -> tuple[list[Any], Callable[..., dict[str, Any]]]:
        """Return what a model takes of each recording, computed once, and how to make a batch of it."""
        collate = recipes.Collator(self.extractor, model)
        rows = self.computed("inputs", lambda: [collate([row]) for row in self.data.rows])
        if setting.get("adapters") == "L":
            cache = FeatureCache(model, self.args.output_dir / "features", torch.float32)
            held = cache.read(rows, join, progress=False)
            cached = self.computed("layers", lambda: [held[i] for i in range(len(held))])
            return cached, cache.collate
        if setting.get("method") == "head":
            # A linear layer and the mean over frames come first, so that the mean of the frames is enough.
            encode = lambda row: model.encoder(**row).last_hidden_state.mean(1, keepdim=True)  # noqa: E731
            with torch.no_grad():
                states = self.computed("outputs", lambda: [encode(row) for row in rows])
            return states, lambda rows: {"encoder_outputs": (torch.cat(list(rows)),)}
        return rows, join

    def computed(self, what: str, compute: Callable[[], Any]) -> Any:
        if what not in self.known:
            self.known[what] = compute()
        return self.known[what]

    def train(self, method: str, setting: dict[str, Any], number: int) -> list[dict[str, Any]]:
        """Train until the errors on validation have not fallen for some checks, and answer the test at the best."""
        start, data, fold = time.perf_counter(), self.data, self.data.folds[number]
        set_seed(number)
        model = self.model(setting, data.names(fold))
        frozen = is_frozen(setting)
        rows, collate = self.rows(model, setting)
        labels, steps = data.labels(fold), (FROZEN_TIMES if frozen else 1) * (self.args.steps or self.task.steps)
        optimizer = make_optimizer(model, setting["rate"], setting["rate"] if frozen else HEAD_RATE)
        warm = max(1, steps // 10)
        schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm + 1)))
        best: dict[tuple[str, str], tuple[float, int, Tensor]] = {}
        curves: dict[tuple[str, str], list[float]] = {use: [] for use in fold.uses}
        checks = sorted({max(1, round(steps * check / CHECKS)) for check in range(1, CHECKS + 1)})
        order: list[int] = []
        for step in range(1, steps + 1):
            if len(order) < self.task.batch_size:
                order = torch.tensor(fold.train)[torch.randperm(len(fold.train))].tolist()
            numbers, order = order[: self.task.batch_size], order[self.task.batch_size :]
            with torch.autocast("cpu", torch.bfloat16):
                loss = data.loss(model.train(), collate([rows[i] for i in numbers]), labels[numbers], fold)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step in checks:
                answer = lru_cache(lambda part: self.answers(model, collate, [rows[i] for i in fold.parts[part]]))
                for use, curve in curves.items():
                    curve.append(data.error(fold.parts[use[0]], answer(use[0]), fold))
                    if curve[-1] < min([*curve[:-1], 101]):
                        best[use] = curve[-1], step, answer(use[1])
                if all(len(curve) - curve.index(min(curve)) > PATIENCE for curve in curves.values()):
                    break
        count = recipes.count_trained(model)["trained_parameters_encoder"]
        found = []
        for use, (_, step, outputs) in best.items():
            test = data.test(fold.parts[use[1]], outputs, fold)
            took = time.perf_counter() - start
            found.append(vars(Result(self.name, method, setting, number, *use, curves[use], step, test, count, took)))
        return found

    @torch.no_grad()
    def answers(self, model: Any, collate: Callable[..., Any], rows: Sequence[Any]) -> Tensor:
        model.eval()
        batches = [collate(rows[i : i + 16]) for i in range(0, len(rows), 16)]
        if self.task.verify:
            return torch.cat([speaker_embeddings(model, **batch).float() for batch in batches])
        return torch.cat([model(**batch).logits.float() for batch in batches])

    def run(self, methods: Sequence[str]) -> None:
        """Train what is missing. A setting that is clearly worse than the best one of its method is given up."""
        for method in methods:
            if method == SEARCH:
                # It learns one column, and refuses classes that training lacks, as the slots of orders have.
                for seed in range(SEARCHES if len(self.task.columns) == 1 else 0):
                    self.once(f"{SEARCH}-{seed}", {"minutes": SEARCH_MINUTES}, partial(search, self, seed))
                continue
            errors: dict[str, list[float]] = {json.dumps(setting): [] for setting in METHODS[method]}
            for number in range(len(self.data.folds)):
                means = {key: statistics.mean(found) for key, found in errors.items() if found}
                margin = MARGIN_FROZEN if is_frozen(METHODS[method][0]) else MARGIN
                going = [key for key in errors if not means or means[key] <= min(means.values()) + margin]
                errors = {key: errors[key] for key in going}
                for key in going:
                    told = {"model": self.args.model_name_or_path, "steps": self.args.steps or self.task.steps}
                    make = partial(self.train, method, json.loads(key), number)
                    errors[key] += [min(one["curve"]) for one in self.once(f"{method}-{number}-{key}", told, make)]

    def once(self, name: str, told: dict[str, Any], make: Callable[[], Any]) -> list[dict[str, Any]]:
        file = self.args.output_dir / self.name / (re.sub(r"[^\w=+.-]+", "_", name) + ".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        print(f"{self.name}: {name}", flush=True)
        return common.train_once(file, told, make)


def is_frozen(setting: dict[str, Any]) -> bool:
    return setting.get("method") == "head" or setting.get("adapters") == "L"


def join(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def make_optimizer(model: Any, rate: float, head_rate: float) -> torch.optim.Optimizer:
    if isinstance(getattr(model, "peft_config", {}).get("default"), ELPConfig):
        parts = [part for part, count in count_parameters(model).items() if count]
        return create_optimizer(model, rates={part: head_rate if part == "head" else rate for part in parts})
    held, rates = recipes.trained_parameters(model), {"head": head_rate, "encoder": rate}
    groups = [{"params": list(held[part].values()), "lr": rates[part]} for part in held if held[part]]
    return torch.optim.AdamW(groups, weight_decay=0.0)


# peft-elp train ------------------------------------------------------------------------------------------------------

SEARCH_MINUTES, SEARCHES = 0.3, 2


def search(grid: Grid, seed: int) -> list[dict[str, Any]]:
    """Let `peft-elp train` choose and train, and answer the test. It makes folds of everything else by itself."""
    data, task, start, found = grid.data, grid.task, time.perf_counter(), []
    options: dict[str, Any] = {"label": task.columns[0], "minutes": SEARCH_MINUTES, "seed": seed, "progress": False}
    options |= {"task": "verify"} if task.verify else {"task": "classify", "speaker": task.groups}
    for part, held in data.tests.items():
        with TemporaryDirectory() as folder:
            columns = dict.fromkeys(("file_name", *task.columns, task.groups, "split"))
            table = [",".join(columns)]
            for number, row in enumerate(data.rows):
                soundfile.write(f"{folder}/{number}.wav", row["audio"], common.RATE_HZ)
                split = "test" if number in held else "train"
                table.append(",".join({**row, "file_name": f"{number}.wav", "split": split}[name] for name in columns))
            Path(folder, "metadata.csv").write_text("\n".join(table), encoding="utf-8")
            adapter = train(folder, grid.args.model_name_or_path, f"{folder}/adapter", **options).adapter
            files = [f"{folder}/{number}.wav" for number in held]
            if task.verify:
                test = data.test(held, torch.tensor(np.stack(adapter.embed(files))), data.folds[0])
            else:
                answers = [best[0]["label"] for best in adapter.classify(files, top_k=1)]
                names = [Path(data.rows[number]["file"]).name for number in held]
                wrong = [float(a != str(b)) for a, b in zip(answers, data.classes[held], strict=True)]
                test = dict(zip(names, wrong, strict=True))
            trained = count_parameters(adapter.model)["L"]
        took = time.perf_counter() - start
        found.append(vars(Result(grid.name, SEARCH, {"seed": seed}, seed, "folds", part, [], 0, test, trained, took)))
    return found


# Results -------------------------------------------------------------------------------------------------------------

REPLICATES = 5000
COMPARED = [(one, other) for one in (SUM, L_ONLY, BESIDE, "E+L", SEARCH) for other in (HEAD, LORA, FULL)]
COMPARED += [(L_ONLY, SUM)]


def choose(results: Sequence[Result]) -> list[list[Result]]:
    """Return the runs of a method with the setting that is best on validation, among those trained in all folds.

    Where speakers are the test in turn, each has a setting that was chosen on others, by trainings without it, and a
    run is one training for each of them.
    """
    runs: list[list[Result]] = []
    for tested_on in dict.fromkeys(result.tested_on for result in results):
        held: dict[str, list[Result]] = {}
        for result in sorted(results, key=lambda result: result.fold):
            if result.tested_on == tested_on:
                held.setdefault("" if result.method == SEARCH else json.dumps(result.setting), []).append(result)
        most = max(map(len, held.values()))
        complete = [found for found in held.values() if len(found) == most]
        runs.append(min(complete, key=lambda found: statistics.mean(min(one.curve, default=0.0) for one in found)))
    return [list(run) for run in zip(*runs, strict=False)]


class Bootstrap:
    """Errors on test under resampled recordings and runs; the first one is that of all, each once."""

    def __init__(self, data: Data) -> None:
        self.data, self.rng = data, np.random.default_rng(0)
        self.blocks = [[Path(data.rows[i]["file"]).name for i in held] for held in data.tests.values()]
        draws = [self.rng.multinomial(len(b), np.full(len(b), 1 / len(b)), REPLICATES) for b in self.blocks]
        self.weights = [np.vstack([np.ones(drawn.shape[1]), drawn]) for drawn in draws]
        self.classes = {Path(row["file"]).name: row[data.task.columns[0]] for row in data.rows}

    def run(self, run: Sequence[Result]) -> np.ndarray:
        """Return the errors of one run, in per cent."""
        if self.data.trials is not None:
            return self.voices(np.array(run[0].test["scores"]))
        test, errors = {name: wrong for result in run for name, wrong in result.test.items()}, []
        for block, weights in zip(self.blocks, self.weights, strict=True):
            wrong, classes = np.array([test[name] for name in block]), np.array([self.classes[name] for name in block])
            if self.data.task.balanced:
                errors.append([class_mean(wrong, classes, weight) for weight in weights])
            else:
                errors.append(weights @ wrong / weights.sum(1))
        return 100 * np.mean(errors, axis=0)

    def voices(self, scores: np.ndarray) -> np.ndarray:
        """Return equal error rates, with each trial as often as both of its recordings."""
        assert self.data.trials is not None
        labels, pairs = common.read_pairs(self.data.trials)
        place, order = {name: i for i, name in enumerate(self.blocks[0])}, np.argsort(scores)
        sides = np.array([[place[Path(file).name] for file in pair] for pair in pairs])[order]
        same, errors = np.array(labels, bool)[order], []
        for weight in self.weights[0]:
            weights = weight[sides[:, 0]] * weight[sides[:, 1]]
            missed, accepted = np.cumsum(weights * same), np.cumsum(weights * ~same)
            missed, accepted = missed / max(missed[-1], 1), 1 - accepted / max(accepted[-1], 1)
            cross = np.argmin(np.abs(missed - accepted))
            errors.append(50 * (missed[cross] + accepted[cross]))
        return np.array(errors)

    def mean(self, runs: Sequence[Sequence[Result]]) -> tuple[list[float], np.ndarray]:
        """Return the error of each run, and those of resampled runs."""
        errors = np.stack([self.run(run) for run in runs])
        drawn = np.random.default_rng(1).integers(len(runs), size=(REPLICATES, len(runs)))
        resampled = errors[:, 1:].T[np.arange(REPLICATES)[:, None], drawn].mean(1)
        return errors[:, 0].tolist(), np.concatenate([[errors[:, 0].mean()], resampled])


def interval(values: np.ndarray) -> list[float]:
    return [round(float(x), 2) for x in np.quantile(values[1:], (0.025, 0.975))]


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, by Holm's method."""
    order, corrected, highest = np.argsort(values), [0.0] * len(values), 0.0
    for rank, number in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[number]))
        corrected[number] = highest
    return corrected


def collect(args: argparse.Namespace) -> None:
    """Choose, resample and compare."""
    methods, compared = [], []
    for task in args.tasks:
        data = Data(task, args.recordings)
        bootstrap, errors = Bootstrap(data), {}
        held: dict[str, list[Result]] = {}
        for file in sorted((args.output_dir / task).glob("*.json")):
            for one in json.loads(file.read_text(encoding="utf-8"))["result"]:
                held.setdefault(one["method"], []).append(Result(**one))
        for method in [name for name in (*METHODS, SEARCH) if name in held]:
            runs = choose(held[method])
            each, errors[method] = bootstrap.mean(runs)
            kept = [result for run in runs for result in run]
            measured = {"task": task, "method": method, "trained": sorted({result.trained for result in kept})}
            measured["settings"] = list({json.dumps(result.setting): result.setting for result in kept}.values())
            on_validation = [min(result.curve) for result in kept if result.curve]
            measured["validation"] = round(statistics.mean(on_validation), 2) if on_validation else None
            measured |= {"test": round(float(errors[method][0]), 2), "interval": interval(errors[method])}
            measured |= {"runs": [round(x, 2) for x in each], "steps": sorted(result.steps for result in kept)}
            methods.append(measured | {"seconds": round(statistics.median(result.seconds for result in kept))})
        for one, other in COMPARED:
            if one in errors and other in errors:
                difference = errors[one] - errors[other]
                above = float((difference[1:] >= 0).sum() + 1) / (REPLICATES + 1)
                p = min(1.0, 2 * min(above, 1 - above + 2 / (REPLICATES + 1)))
                told = {"difference": round(float(difference[0]), 2), "interval": interval(difference), "p": p}
                compared.append({"task": task, "method": one, "minus": other, **told})
    for row, p in zip(compared, holm([row["p"] for row in compared]), strict=True):
        row["p"] = round(p, 4)
    text = json.dumps({"methods": methods, "compared": compared}).replace('{"task"', '\n{"task"')
    args.json.write_text(text + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    run, joined = kinds.add_parser("run", help="Train what is missing."), kinds.add_parser("collect", help="Join it.")
    for kind in (run, joined):
        kind.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
        kind.add_argument("--recordings", type=Path, required=True, help="Folder with the folders of the tasks.")
        kind.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    run.add_argument("--model_name_or_path", required=True, help="A Whisper: Hub id or folder.")
    run.add_argument("--methods", nargs="+", choices=[*METHODS, SEARCH], default=[*METHODS, SEARCH])
    run.add_argument("--steps", type=int, help="Steps of the longest training; default: the number of the task.")
    joined.add_argument("--json", type=Path, required=True, help="File for the results.")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    if args.kind == "collect":
        collect(args)
    else:
        for task in args.tasks:
            Grid(args, task).run(args.methods)


if __name__ == "__main__":
    main()
