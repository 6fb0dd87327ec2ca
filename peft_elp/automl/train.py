"""From a folder of labelled recordings to an adapter with a report."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import EvalResult
from torch import Tensor

from peft_elp.saved.card import describe
from peft_elp.speech.inference import SpeechAdapter
from peft_elp.speech.metrics import equal_error_threshold
from peft_elp.wording import shortened

from . import report as measured
from .features import Base
from .look import Recordings, look, printable
from .measures import METRICS, trials_of
from .reader import Problem, answer, place, train_reader
from .search import Candidate, Search, choose
from .split import make_folds

TASKS = ("classify", "verify")
SHOWN = 20  # candidates in the report


@dataclass(frozen=True)
class Trained:
    """What `train` made.

    Args:
        folder: The folder of the adapter.
        report: What it is worth.
        base: The base, as `train` was given it.

    Examples:
        >>> trained = Trained(Path("my-adapter"), measured.Report({"verdict": "Better.", "notes": []}), "base")
        >>> trained.report.summary()
        'Better.'
    """

    folder: Path
    report: measured.Report
    base: str

    @cached_property
    def adapter(self) -> SpeechAdapter:
        """The adapter, loaded for use."""
        return SpeechAdapter.from_pretrained(self.folder, base=self.base)


def train(
    recordings: str | Path,
    base: str,
    output: str | Path,
    *,
    task: str | None = None,
    label: str | None = None,
    speaker: str | None = None,
    minutes: float = 10.0,
    trials: int | None = None,
    jobs: int = 1,
    metric: str = "unweighted_accuracy",
    seed: int = 0,
    device: str | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Trained:
    """Train an adapter on a folder of labelled recordings, and report what it is worth.

    The encoder reads each recording once. A search then trains many settings of an L-adapter without layer norms on
    its features, by folds, and chooses the smallest one within one standard error of the best. The adapter is trained
    on everything but the test split, which is answered once, at the end.

    Beside `output` lies `<output>.search` with the features and the trials: a search that was stopped goes on there,
    and a second one finds the features. Delete it when you no longer need it.

    Args:
        recordings: A folder `<label>/*.wav`, one with splits, or one with a table; see `peft_elp.automl.look.look`.
        base: The encoder: a Hub id or folder.
        output: The folder for the adapter, `report.html` and `report.json`. It must not exist.
        task: "classify" names classes, "verify" compares voices. None: "classify" if there are labels.
        label: The column of the classes. None finds it.
        speaker: The column of the speakers. None finds it.
        minutes: How long the search may take, without the time for the features and the report.
        trials: How many candidates at most. The same number with the same seed and one job gives the same adapter.
        jobs: How many processes search side by side.
        metric: "unweighted_accuracy", "accuracy" or "f1": what candidates are chosen by.
        seed: The seed of the folds, the search and the trainings.
        device: Where the encoder runs. Default: a CUDA device if there is one, else the CPU.
        skip_bad: Whether recordings that cannot be read are left out.
        overwrite: Whether `output` may be replaced.
        progress: Print what is done, with progress bars.

    Returns:
        The folder, the report, and the adapter, ready for recordings.

    Raises:
        ValueError: An argument or the data are wrong, or the base cannot be used.
        FileExistsError: `output` holds something.
        KeyboardInterrupt: Ctrl-C before the first candidate was trained. Later, the best candidate so far is saved.

    Examples:
        >>> trained = train("recordings", "microsoft/wavlm-base-plus", "my-adapter")  # doctest: +SKIP
        >>> print(trained.report.summary())  # doctest: +SKIP
        >>> trained.adapter.classify("new.wav", top_k=1)  # doctest: +SKIP
        [{'label': 'happy', 'score': 0.93}]
    """
    start, say, folder = time.monotonic(), print if progress else _silent, Path(output)
    _check(task, metric, minutes, trials, jobs, folder, overwrite)
    Base.check(base)
    verify = task == "verify"
    found = look(recordings, label, speaker, verify, skip_bad, progress)
    show(found, verify, say)
    names = found.names
    folds, how = make_folds(found, seed, verify)
    say(f"Held out: {how}")
    encoder = Base(base, names, max(found.durations_s), device)
    for warning in encoder.cut(found.durations_s):
        found.warnings.append(warning)
        say(f"Warning: {warning}")
    work = folder.with_name(f"{folder.name}.search")
    say(f"Features: {encoder.layers} layers, {encoder.size(found.rows) / 1e9:.2g} GB in {work / 'features'}")
    features = encoder.read(found.rows, work / "features", progress)
    numbers = {name: number for number, name in enumerate(names)}
    labels = torch.tensor([numbers.get(name, -1) for name in found.labels])
    problem = Problem(features, labels, len(names), verify, encoder.width, seed)
    search = Search(problem, folds, encoder.layers, encoder.hidden, metric, 60 * minutes, trials)
    candidates, interrupted = search.run(work / "trials.log", _fingerprint(search), jobs, progress)
    chosen, head = choose(candidates, encoder.hidden), _head(candidates, encoder.layers)
    say(f"Chosen among {len(candidates)}: {_in_words(chosen, encoder.layers)}. Training it on everything but test.")
    final = _finish(search, found, chosen, head)
    facts = _facts(search, found, final, chosen, head, candidates, interrupted, how)
    facts |= {"base": base, "seed": seed, "minutes": minutes, "jobs": jobs, "seconds": time.monotonic() - start}
    result = measured.Report(facts)
    _save(encoder, chosen, final, result, folder, overwrite)
    say(f"{result.summary()}\nSaved in {folder}: report.html tells the rest.")
    return Trained(folder, result, base)


def show(found: Recordings, verify: bool, say: Any) -> None:
    """Print what was found in a folder."""
    say(found.table())
    columns = ", ".join(f"{what} from {column!r}" for what, column in found.columns.items())
    say(f"Task: {'compare voices' if verify else 'name classes'} ({printable(columns)}).")
    for warning in found.warnings:
        say(f"Warning: {printable(warning)}")


def _silent(*_: Any) -> None: ...


def _check(
    task: str | None, metric: str, minutes: float, trials: int | None, jobs: int, folder: Path, overwrite: bool
) -> None:
    if task == "transcribe":
        raise ValueError("Recognition is not trained here: use examples/run_speech_recognition.py.")
    for name, value, known in (("task", task, (None, *TASKS)), ("metric", metric, METRICS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}.")
    if not 0 < minutes < float("inf"):
        raise ValueError(f"minutes must be above 0, got {minutes!r}.")
    for name, value in (("trials", trials), ("jobs", jobs)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}.")
    if folder.exists() and not overwrite and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists. Choose another output, or replace it with overwrite (--overwrite).")


def _fingerprint(search: Search) -> str:
    """Return a name for a search: what its trials depend on."""
    facts = [search.folds, search.problem.labels.tolist(), search.metric, search.problem.seed, search.problem.verify]
    found = hashlib.sha256(repr([*facts, search.sizes()]).encode())
    found.update(search.problem.features.pooled.numpy().tobytes())
    return found.hexdigest()[:16]


def _head(candidates: Sequence[Candidate], layers: int) -> Candidate:
    """Return the best candidate that reads the last layer alone, without matrices."""
    complete = [one for one in candidates if one.complete]
    heads = [one for one in complete if one.setting.layers == (layers - 1,) and not one.setting.l_dim]
    return max(heads or complete, key=lambda one: one.score)


def _in_words(one: Candidate, layers: int) -> str:
    setting = one.setting
    which = (
        "all layers"
        if len(setting.layers) == layers
        else f"layer{'s' * (len(setting.layers) > 1)} {shortened(setting.layers, 12)}"
    )
    if setting.layers == (layers - 1,):
        which = "the last layer"
    return f"{which}, {f'taps of width {setting.l_dim}' if setting.l_dim else 'no matrices'}"


@dataclass(frozen=True)
class _Final:
    """The trained adapter, and answers for the recordings that it is measured on."""

    state: dict[str, Tensor]
    rows: list[int]
    answers: Tensor
    head: Tensor
    where: str
    losses: list[float]
    layer_weights: list[float]
    temperature: float
    threshold: float | None
    folds: Tensor  # the chosen setting's answers for held-out recordings, before the temperature


def _finish(search: Search, found: Recordings, chosen: Candidate, head: Candidate) -> _Final:
    problem = search.problem
    held_out = [i for fold in search.folds for i in fold.held_out]
    folds, folds_head = _out_of_fold(search, chosen), _out_of_fold(search, head)
    temperature, threshold = 1.0, None
    if problem.verify:
        parts = folds.split([len(part) for fold in search.folds for part in fold.parts])
        speakers = problem.labels[held_out].split([len(part) for part in parts])
        pairs = [trials_of(who.numpy(), part) for who, part in zip(speakers, parts, strict=True)]
        threshold = float(np.mean([equal_error_threshold(*pair) for pair in pairs]))
    else:
        temperature = measured.fit_temperature(folds, problem.labels[held_out])
    rows = found.where("train", "validation")
    reader, _, losses = train_reader(problem, chosen.setting, rows, stop=chosen.stop)
    test = found.where("test")
    if test:
        alone, _, _ = train_reader(problem, head.setting, rows, stop=head.stop)
        answers, answers_head = answer(problem, reader, test), answer(problem, alone, test)
    else:
        answers, answers_head = folds, folds_head
    return _Final(
        state=reader.folded(temperature),
        rows=test or held_out,
        answers=answers / temperature if not problem.verify else answers,
        head=answers_head,
        where="test" if test else "held-out",
        losses=losses,
        layer_weights=reader.shares.tolist(),
        temperature=temperature,
        threshold=threshold,
        folds=folds,
    )


def _out_of_fold(search: Search, one: Candidate) -> Tensor:
    """Return a candidate's answers for all recordings that were held out, in the order of the folds."""
    answers = []
    for fold in search.folds:
        reader, _, _ = train_reader(search.problem, one.setting, fold.train, stop=one.stop)
        answers.append(answer(search.problem, reader, fold.held_out))
    return torch.cat(answers)


def _facts(
    search: Search,
    found: Recordings,
    final: _Final,
    chosen: Candidate,
    head: Candidate,
    candidates: Sequence[Candidate],
    interrupted: bool,
    how: str,
) -> dict[str, Any]:
    problem, names = search.problem, found.names
    metric = "eer" if problem.verify else search.metric
    if problem.verify:
        right = [found.labels[i] for i in final.rows]
        result = measured.verification(right, final.answers, final.head, problem.seed)
    else:
        groups = [found.speakers[i] for i in final.rows] if found.speakers else None
        right = problem.labels[final.rows].tolist()
        result = measured.classification(right, final.answers, final.head, names, groups, metric, problem.seed)
        for one in result["wrong"]:
            one |= {"file": found.file(final.rows[one["row"]])}
            one |= {"answer": names[one["answer"]], "right": names[one["right"]]}
    notes = []
    if final.where != "test":
        notes.append(
            "There is no test split: the figures are of recordings that were held out in turn. The setting was "
            f"chosen among {len(candidates)} by the same recordings, so they are somewhat too good."
        )
    if interrupted:
        notes.append("The search was interrupted; this is the best candidate so far.")
    best = sorted((one for one in candidates if one.complete), key=lambda one: -one.score)
    return {
        "verdict": measured.verdict(result, metric, len(final.rows), final.where, chosen.number == head.number),
        "notes": notes,
        "task": "verify" if problem.verify else "classify",
        "metric": metric,
        "measured_on": final.where,
        "clips": len(final.rows),
        "result": result,
        "data": {
            "classes": found.classes(),
            "columns": found.columns,
            "held_out": how,
            "speakers": len(set(found.speakers)) if found.speakers else None,
            "clips": len(found.labels),
            "seconds": sum(found.durations_s),
        },
        "warnings": found.warnings,
        "chosen": _row(chosen, search),
        "head": _row(head, search),
        "tried": len(candidates),
        "complete": len(best),
        "candidates": [_row(one, search) for one in best[:SHOWN]],
        "layer_weights": [
            {"layer": layer, "share": share}
            for layer, share in zip(chosen.setting.layers, final.layer_weights, strict=True)
        ],
        "curve": [1 - x if problem.verify else x for x in chosen.curve],
        "losses": final.losses,
        "temperature": final.temperature,
        "threshold": final.threshold,
        "peak_memory_mb": _peak_memory_mb(),
    }


def _peak_memory_mb() -> float | None:
    """Return the most memory that the process has held; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _row(one: Candidate, search: Search) -> dict[str, Any]:
    setting = one.setting
    spread = float(np.std(one.scores, ddof=1)) / len(one.scores) ** 0.5 if len(one.scores) > 1 else 0.0
    return {
        "trial": one.number,
        "reads": _in_words(one, search.layers),
        "layers": list(setting.layers),
        "l_dim": setting.l_dim,
        "parameters": setting.size(search.hidden),
        "rate": setting.rate,
        "steps": round(setting.steps * one.stop / len(one.curve)),
        "dropout": setting.dropout,
        "weight_decay": setting.weight_decay,
        "smoothing": setting.smoothing,
        "score": 1 - one.score if search.problem.verify else one.score,
        "standard_error": spread,
        "seconds": one.seconds,
    }


def _save(
    encoder: Base, chosen: Candidate, final: _Final, result: measured.Report, folder: Path, overwrite: bool
) -> None:
    """Write the adapter and its report, all or nothing."""
    setting, facts = chosen.setting, result.facts
    adapted = encoder.adapted(
        l_dim=setting.l_dim,
        l_layers=list(setting.layers),
        l_input_norm=True,
        l_dropout=setting.dropout / 2,
        verification_threshold=final.threshold,
    )
    place(final.state, adapted)
    metric, value = facts["metric"], facts["result"]["metrics"][facts["metric"]]["value"]
    split = "test" if facts["measured_on"] == "test" else "held-out folds"
    describe(
        adapted,
        metrics=[
            EvalResult(
                "audio-classification", "folder", "own recordings", metric, round(100 * value, 1), dataset_split=split
            )
        ],
        protocol=f"Trained by `peft-elp train`; `report.html` has the details. {facts['verdict']}",
        seed=facts["seed"],
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        made = Path(beside, folder.name)
        adapted.save_pretrained(str(made))
        encoder.extractor.save_pretrained(str(made))
        result.save(made, folder)
        if folder.exists():
            if not overwrite and any(folder.iterdir()):
                raise FileExistsError(f"{folder} was made by something else in the meantime.")
            shutil.rmtree(folder)
        made.rename(folder)
