"""What an adapter is worth: numbers with their uncertainty, as a page and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from torch import Tensor

from peft_elp.speech.metrics import equal_error_rate, min_dcf

from .measures import confusion_matrix, metrics_of, trials_of

DRAWS = 1000  # of the bootstrap
DRAWS_OF_PAIRS = 200
LEAST_SPEAKERS = 5  # With fewer, the bootstrap draws recordings.
BINS = 10
WRONG = 20
METRIC_NAMES = {"unweighted_accuracy": "unweighted accuracy", "accuracy": "accuracy", "f1": "macro F1"}


@dataclass(frozen=True)
class Report:
    """What was measured.

    Args:
        facts: Everything that `report.json` holds.

    Examples:
        >>> Report({"verdict": "Better than chance.", "notes": []}).summary()
        'Better than chance.'
    """

    facts: dict[str, Any]

    def summary(self) -> str:
        """Return the verdict and what to know about it, in a few lines."""
        return "\n".join([self.facts["verdict"], *self.facts["notes"]])

    def save(self, folder: Path, place: Path | None = None) -> None:
        """Write `report.json` and `report.html`.

        Args:
            folder: Where to write them.
            place: The folder that links to recordings count from, if the files are moved later.
        """
        text = json.dumps(self.facts, ensure_ascii=False, indent=1, allow_nan=False, default=float)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
        environment.filters.update(percent=percent, line=line, link=lambda file: link(file, place or folder))
        template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
        (folder / "report.html").write_text(environment.from_string(template).render(self.facts), encoding="utf-8")


def draws(count: int, groups: Sequence[str] | None, seed: int) -> tuple[list[NDArray[np.int64]], str]:
    """Return samples of recordings for a bootstrap, and what was drawn: speakers where there are enough of them."""
    generator = np.random.default_rng(seed)
    if groups is None or len(set(groups)) < LEAST_SPEAKERS:
        return [generator.integers(count, size=count) for _ in range(DRAWS)], "recordings"
    of = [np.flatnonzero(np.asarray(groups) == name) for name in sorted(set(groups))]
    return [
        np.concatenate([of[i] for i in generator.integers(len(of), size=len(of))]) for _ in range(DRAWS)
    ], "speakers"


def interval(value: float, drawn: Sequence[float]) -> dict[str, float]:
    """Return a value with the 95 % interval of its bootstrap."""
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def classification(
    right: Sequence[int],
    logits: Tensor,
    head: Tensor,
    names: Sequence[str],
    groups: Sequence[str] | None,
    metric: str,
    seed: int,
) -> dict[str, Any]:
    """Measure named classes.

    Args:
        right: The number of the right class of each recording.
        logits: The answers, calibrated.
        head: The answers of the head alone.
        names: The classes.
        groups: The speaker of each recording.
        metric: The metric of the verdict.
        seed: The seed of the bootstrap.
    """
    truth, answered, other = np.asarray(right), logits.argmax(-1).numpy(), head.argmax(-1).numpy()
    classes = len(names)
    confusion = confusion_matrix(truth, answered, classes)
    samples, unit = draws(len(truth), groups, seed)
    drawn = [metrics_of(confusion_matrix(truth[rows], answered[rows], classes)) for rows in samples]
    beside = [metrics_of(confusion_matrix(truth[rows], other[rows], classes)) for rows in samples]
    own, alone = metrics_of(confusion), metrics_of(confusion_matrix(truth, other, classes))
    common = metrics_of(confusion_matrix(truth, np.full_like(truth, np.bincount(truth).argmax()), classes))
    chance = {"unweighted_accuracy": 1 / classes, "accuracy": 1 / classes, "f1": 1 / classes}
    gain = [one[metric] - two[metric] for one, two in zip(drawn, beside, strict=True)]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(np.diag(confusion) / confusion.sum(0))
        recall = np.nan_to_num(np.diag(confusion) / confusion.sum(1))
    probability = logits.softmax(-1).numpy()
    return {
        "unit": unit,
        "metrics": {key: interval(own[key], [one[key] for one in drawn]) for key in own},
        "chance": chance,
        "commonest": common,
        "head": {key: interval(alone[key], [one[key] for one in beside]) for key in alone},
        "gain": interval(own[metric] - alone[metric], gain),
        "confusion": confusion.tolist(),
        "names": list(names),
        "classes": [
            {
                "class": name,
                "clips": int(confusion[i].sum()),
                "precision": float(precision[i]),
                "recall": float(recall[i]),
            }
            for i, name in enumerate(names)
        ],
        "calibration": calibration(truth, probability),
        "rejection": rejection(truth, probability),
        "wrong": most_wrong(truth, probability),
    }


def verification(right: Sequence[str], embeddings: Tensor, head: Tensor, seed: int) -> dict[str, Any]:
    """Measure comparisons of voices, over all pairs of recordings."""
    speakers = np.asarray(right)
    labels, scores = trials_of(speakers, embeddings)
    _, beside = trials_of(speakers, head)
    first, second = np.triu_indices(len(speakers), 1)
    of = [np.flatnonzero(speakers == name) for name in sorted(set(speakers.tolist()))]
    generator = np.random.default_rng(seed)
    eers: list[float] = []
    costs: list[float] = []
    gains: list[float] = []
    alone: list[float] = []
    for _ in range(DRAWS_OF_PAIRS):
        times = np.zeros(len(speakers))
        for group in generator.integers(len(of), size=len(of)):
            times[of[group]] += 1
        kept = np.repeat(np.arange(len(labels)), (times[first] * times[second]).astype(int))
        if 0 < labels[kept].sum() < len(kept):
            eers.append(equal_error_rate(labels[kept], scores[kept]))
            costs.append(min_dcf(labels[kept], scores[kept]))
            alone.append(equal_error_rate(labels[kept], beside[kept]))
            gains.append(alone[-1] - eers[-1])
    eer, head_eer = equal_error_rate(labels, scores), equal_error_rate(labels, beside)
    return {
        "unit": "speakers",
        "metrics": {"eer": interval(eer, eers), "min_dcf": interval(min_dcf(labels, scores), costs)},
        "chance": {"eer": 0.5, "min_dcf": 1.0},
        "head": {"eer": interval(head_eer, alone)},
        "gain": interval(head_eer - eer, gains),
        "trials": len(labels),
    }


def fit_temperature(logits: Tensor, right: Tensor) -> float:
    """Return the number by which logits are divided so that their softmax fits the right answers best.

    Examples:
        >>> sure, right = torch.tensor([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 0, 0, 1])
        >>> fit_temperature(sure, right) > 5
        True
    """
    log = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = torch.nn.functional.cross_entropy(logits / log.exp(), right)
        found.backward()
        return found

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return min(100.0, max(0.01, math.exp(float(log.detach()))))


def calibration(right: NDArray[Any], probability: NDArray[Any]) -> dict[str, Any]:
    """Return the expected calibration error, and for each bin of the largest score how many answers are right."""
    score, hit = probability.max(1), probability.argmax(1) == right
    bins = np.minimum((score * BINS).astype(int), BINS - 1)
    found = [
        {
            "clips": int((bins == b).sum()),
            "score": float(score[bins == b].mean()),
            "right": float(hit[bins == b].mean()),
        }
        for b in range(BINS)
        if (bins == b).any()
    ]
    error = sum(one["clips"] * abs(one["score"] - one["right"]) for one in found) / len(right)
    return {"error": float(error), "bins": found}


def rejection(right: NDArray[Any], probability: NDArray[Any]) -> list[dict[str, float]]:
    """Return thresholds below which an answer counts as unknown, with the share that is answered and that is right."""
    score, hit = probability.max(1), probability.argmax(1) == right
    order = np.argsort(-score, kind="stable")
    rows = []
    for share in (1.0, 0.95, 0.9, 0.8, 0.7, 0.5):
        kept = order[: max(1, round(share * len(order)))]
        rows.append(
            {"threshold": float(score[kept[-1]]), "answered": len(kept) / len(order), "right": float(hit[kept].mean())}
        )
    return rows


def most_wrong(right: NDArray[Any], probability: NDArray[Any]) -> list[dict[str, Any]]:
    """Return the wrong answers with the largest scores."""
    answered, score = probability.argmax(1), probability.max(1)
    wrong = [row for row in np.argsort(-score, kind="stable") if answered[row] != right[row]]
    return [
        {"row": int(row), "answer": int(answered[row]), "score": float(score[row]), "right": int(right[row])}
        for row in wrong[:WRONG]
    ]


def verdict(measured: Mapping[str, Any], metric: str, clips: int, where: str, is_head: bool) -> str:
    """Say in one sentence what the adapter is worth: against chance, and against the head alone."""
    value, chance, gain = measured["metrics"][metric], measured["chance"][metric], measured["gain"]
    lower = metric in ("eer", "min_dcf")
    beats = value["high"] < chance if lower else value["low"] > chance
    name = "equal error rate" if lower else METRIC_NAMES[metric]
    text = (
        f"{'Better' if beats else 'Not clearly better'} than chance ({percent(chance)}): {name} {percent(value)} on "
        f"{clips} {where} recordings"
    )
    if is_head:
        return f"{text}; the head alone was chosen, since more layers gave no clear gain."
    points = f"{100 * gain['value']:+.1f} points, 95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
    if gain["low"] > 0:
        return f"{text}; better than the head alone ({points})."
    if gain["high"] < 0:
        return f"{text}; worse than the head alone ({points})."
    return f"{text}; not clearly different from the head alone ({points})."


def percent(value: Any) -> str:
    """Format a share, or one with its interval.

    Examples:
        >>> percent(0.5)
        '50.0 %'
        >>> percent({"value": 0.5, "low": 0.4, "high": 0.625})
        '50.0 % (40.0 to 62.5)'
    """
    if isinstance(value, Mapping):
        return f"{100 * value['value']:.1f} % ({100 * value['low']:.1f} to {100 * value['high']:.1f})"
    return f"{100 * value:.1f} %"


def line(values: Sequence[float], width: int = 300, height: int = 100) -> str:
    """Return the points of a line through values, for a `polyline` of SVG."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    step = width / max(1, len(values) - 1)
    return " ".join(f"{i * step:.1f},{height - height * (x - low) / span:.1f}" for i, x in enumerate(values))


def link(file: str, folder: Path) -> str:
    """Return the address of a file from a page in a folder."""
    try:
        return quote(Path(os.path.relpath(file, folder)).as_posix())
    except ValueError:  # another drive
        return Path(file).absolute().as_uri()
