"""The search for a setting: candidates trained on folds, until the time is over or a number of trials is reached.

Optuna proposes candidates, keeps them in a journal file and stops poor ones after two folds. The proposal depends on
the seed and on the trials so far alone, so that a search with one process gives the same trials again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from joblib import Parallel, delayed, parallel_config
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.study import MaxTrialsCallback
from torch import Tensor

from peft_elp.speech.metrics import equal_error_rate
from peft_elp.wording import shortened

from .measures import confusion_matrix, cosines_of, metrics_of, trials_of
from .reader import BATCH, FRAMES, Problem, Setting, train_reader
from .split import Fold

OPERATIONS_PER_S = 1e10  # of one CPU core, at a guess: candidates that would take too long are left out
SHARE = 0.04  # of the time that one candidate may take
ENGINES = ("local", "ray")
SINGLE = 24  # encoders with more layers are tried at every second one


@dataclass(frozen=True)
class Candidate:
    """A setting and how it did."""

    setting: Setting
    stop: int  # after which check of the schedule its answers were best, 1 to `CHECKS`
    scores: list[float]  # of each part that was held out, at that check
    curve: list[float]  # the mean score at each check
    seconds: float  # that its trainings took
    number: int  # of its trial
    complete: bool = True  # whether all folds were trained

    @property
    def score(self) -> float:
        """The mean score."""
        return float(np.mean(self.scores))


@dataclass(frozen=True)
class Search:
    """What is searched, and by which measure."""

    problem: Problem
    folds: list[Fold]
    layers: int  # of the encoder
    hidden: int  # its width
    metric: str = "unweighted_accuracy"  # a key of `metrics_of`; voices: 1 minus the equal error rate
    seconds: float = 600.0  # of wall-clock time
    trials: int | None = None  # at most; None: as many as the time allows

    def always(self) -> Iterator[dict[str, Any]]:
        """Yield the parameters of the candidates that come first: the head alone, sums of layers, single layers."""
        singles = range(self.layers) if self.layers <= SINGLE else range(1, self.layers, 2)
        last = f"{self.layers - 1}"
        names = [last, "all", "lower", "upper", *(str(layer) for layer in singles if str(layer) != last)]
        start = {"rate": 2e-3, "steps": 300, "dropout": 0.2, "weight_decay": 0.01, "l_dim": 0}
        if not self.problem.verify:
            start["smoothing"] = 0.0
        for name in dict.fromkeys(names):
            yield {**start, "layers": name}

    def sizes(self) -> list[int]:
        """Return the widths of taps whose candidates fit into the time."""
        default = round(self.hidden * 2 / 3)
        budget = SHARE * (self.seconds if self.trials is None else 600.0) * OPERATIONS_PER_S
        rows = BATCH * FRAMES * 300 * len(self.folds)
        wanted = [size for size in dict.fromkeys((32, 128, default)) if size <= default]
        return [0, *(size for size in wanted if 6 * rows * self.layers * self.hidden * size < budget)]

    def suggest(self, trial: Any) -> Setting:
        """Return the setting that Optuna chooses for a trial."""
        half = -(-self.layers // 2)
        layers: dict[str, Sequence[int]] = {
            "all": range(self.layers),
            "lower": range(half),
            "upper": range(self.layers - half, self.layers),
            **{str(layer): [layer] for layer in range(self.layers)},
        }
        return Setting(
            layers=tuple(layers[trial.suggest_categorical("layers", list(layers))]),
            l_dim=trial.suggest_categorical("l_dim", self.sizes()),
            rate=trial.suggest_float("rate", 3e-4, 2e-2, log=True),
            steps=trial.suggest_categorical("steps", [100, 300, 600]),
            dropout=trial.suggest_categorical("dropout", [0.0, 0.2, 0.4, 0.6]),
            weight_decay=trial.suggest_float("weight_decay", 1e-3, 3.0, log=True),
            smoothing=0.0 if self.problem.verify else trial.suggest_categorical("smoothing", [0.0, 0.1, 0.2]),
        )

    def score(self, rows: Sequence[int], answers: Tensor) -> float:
        """Return the score of answers for some recordings, a share of 1."""
        right = self.problem.labels[list(rows)].numpy()
        if self.problem.verify:
            return 1 - equal_error_rate(*trials_of(right, cosines_of(answers)))
        return metrics_of(confusion_matrix(right, answers.argmax(-1).numpy(), self.problem.classes))[self.metric]

    def evaluate(self, setting: Setting, go_on: Callable[[int, float], bool] = lambda *_: True) -> Candidate:
        """Train a candidate on all folds, unless `go_on` says no to the number of folds and the score so far."""
        start, scores, curve, done = time.monotonic(), [], np.zeros(0), 0
        for fold in self.folds:
            done += 1
            _, answers, _ = train_reader(self.problem, setting, fold.train, fold.held_out)
            ends = np.cumsum([len(part) for part in fold.parts])
            for part, end in zip(fold.parts, ends, strict=True):
                scores.append([self.score(part, answer[end - len(part) : end]) for answer in answers])
            curve = np.mean(scores, axis=0)
            if done < len(self.folds) and not go_on(done, float(curve.max())):
                break
        stop = int(curve.argmax())
        parts = [float(one[stop]) for one in scores]
        took = time.monotonic() - start
        return Candidate(setting, stop + 1, parts, curve.tolist(), took, -1, complete=done == len(self.folds))

    def head(self, found: Sequence[Candidate]) -> Candidate:
        """Return the best candidate that reads the last layer alone, without matrices."""
        complete = [one for one in found if one.complete]
        heads = [one for one in complete if one.setting.layers == (self.layers - 1,) and not one.setting.l_dim]
        return max(heads or complete, key=lambda one: one.score)

    def in_words(self, one: Candidate) -> str:
        """Return what a candidate reads, and how."""
        layers, l_dim = one.setting.layers, one.setting.l_dim
        which = f"layer{'s' * (len(layers) > 1)} {shortened(layers, 12)}"
        which = "all layers" if len(layers) == self.layers else which
        which = "the last layer" if layers == (self.layers - 1,) else which
        return f"{which}, {f'taps of width {l_dim}' if l_dim else 'no matrices'}"

    def row(self, one: Candidate) -> dict[str, Any]:
        """Return what a report says of a candidate."""
        spread = float(np.std(one.scores, ddof=1)) / len(one.scores) ** 0.5 if len(one.scores) > 1 else 0.0
        return asdict(one.setting) | {
            "trial": one.number,
            "reads": self.in_words(one),
            "parameters": one.setting.size(self.hidden),
            "steps": round(one.setting.steps * one.stop / len(one.curve)),
            "score": 1 - one.score if self.problem.verify else one.score,
            "standard_error": spread,
            "seconds": one.seconds,
        }

    def run(
        self, journal: Path, name: str, jobs: int = 1, engine: str = "local", progress: bool = True
    ) -> tuple[list[Candidate], bool]:
        """Search, and go on where an earlier search of the same name stopped by what is in its journal.

        Returned are the candidates in the order of their trials, and whether the search was interrupted by Ctrl-C.

        Raises:
            KeyboardInterrupt: It was interrupted before the first candidate was complete.
        """
        end, state = time.time() + self.seconds, optuna.trial.TrialState
        study = _study(journal, name, len(self.folds))
        for trial in study.get_trials(states=(state.RUNNING,)):  # of a process that was killed
            study.tell(trial.number, state=state.FAIL)
        there = {trial.user_attrs.get("always") for trial in study.trials if trial.state != state.FAIL}
        for number, params in enumerate(self.always()):
            if number not in there:
                study.enqueue_trial(params, user_attrs={"always": number})
        interrupted = False
        try:
            with _engine(engine):
                work = (delayed(_work)(self, journal, name, end, job, progress and not job) for job in range(jobs))
                Parallel(n_jobs=jobs)(work)
        except KeyboardInterrupt:
            interrupted = True
        found = candidates(study)
        if interrupted and not any(one.complete for one in found):
            raise KeyboardInterrupt
        return found, interrupted


def _engine(name: str) -> Any:
    if name == "local":
        return nullcontext()
    try:
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise ImportError(f"The engine ray is not installed ({error}): pip install 'peft-elp[train,ray]'") from error
    register_ray()
    return parallel_config(backend="ray")


def candidates(study: Any) -> list[Candidate]:
    """Return the candidates that a search has trained, in the order of their trials."""
    found = []
    for trial in study.trials:
        if kept := trial.user_attrs.get("candidate"):
            setting = {**kept["setting"], "layers": tuple(kept["setting"]["layers"])}
            found.append(Candidate(**{**kept, "setting": Setting(**setting), "number": trial.number}))
    return found


def choose(found: Sequence[Candidate], hidden: int) -> Candidate:
    """Return the smallest candidate whose score is within one standard error of the best, the better one of equals.

    The standard error is that of the difference to the best candidate over the parts that were held out.

    Examples:
        >>> small = Candidate(Setting((3,)), 10, [0.8, 0.9], [], 1.0, 0)
        >>> large = Candidate(Setting((3,), l_dim=32), 10, [0.9, 0.9], [], 1.0, 1)
        >>> choose([small, large], hidden=384).number
        0
    """
    complete = [one for one in found if one.complete]
    best = max(complete, key=lambda one: (one.score, -one.setting.size(hidden)))
    close = []
    for one in complete:
        behind = np.subtract(best.scores, one.scores)
        error = float(behind.std(ddof=1)) / len(behind) ** 0.5 if len(behind) > 1 else 0.0
        if behind.mean() <= error:
            close.append(one)
    return min(close, key=lambda one: (one.setting.size(hidden), -one.score, one.number))


def _study(journal: Path, name: str, folds: int) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2)
    pruner = halving if folds > 2 else optuna.pruners.NopPruner()
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return optuna.create_study(
        storage=storage, study_name=name, direction="maximize", pruner=pruner, load_if_exists=True
    )


def _work(search: Search, journal: Path, name: str, end: float, job: int, progress: bool) -> None:
    """Train candidates until the time is over or there are enough."""
    study, state = _study(journal, name, len(search.folds)), optuna.trial.TrialState
    finished = (state.COMPLETE, state.PRUNED, state.FAIL)
    # A search that goes on must not draw again what it has drawn.
    seed = 100_003 * search.problem.seed + 1009 * job + len(study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=20)
    enough: list[Any] = []
    if search.trials is not None:
        if len(study.get_trials(states=finished)) >= search.trials:
            return
        enough = [MaxTrialsCallback(search.trials, states=finished)]
    options: dict[str, Any] = {"timeout": end - time.time(), "callbacks": enough, "show_progress_bar": progress}
    study.optimize(partial(_objective, search), **options)


def _objective(search: Search, trial: Any) -> float:
    def go_on(folds: int, score: float) -> bool:
        trial.report(score, folds)
        return is_fixed or not trial.should_prune()

    is_fixed = trial.user_attrs.get("always") in (0, 1)  # The head alone and all layers are in every report.
    candidate = search.evaluate(search.suggest(trial), go_on)
    trial.set_user_attr("candidate", {key: value for key, value in asdict(candidate).items() if key != "number"})
    if not candidate.complete:
        raise optuna.TrialPruned
    return candidate.score
