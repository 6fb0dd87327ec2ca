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
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy

from .measures import METRICS, Measure, confusion_matrix, cosines_of, of_classes, of_voices, trials_of

DRAWS_OF_PAIRS = 200  # of the bootstrap
LEAST_SPEAKERS = 5  # With fewer, the bootstrap draws recordings.
BINS = 10
WRONG = 20
LOWER = ("eer", "min_dcf", "wer", "cer")  # is better
METRIC_NAMES = {"unweighted_accuracy": "unweighted accuracy", "accuracy": "accuracy", "f1": "macro F1"}
METRIC_NAMES |= {"eer": "equal error rate", "wer": "word error rate"}
CHANCE = {"wer": "writing nothing"}


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
        (folder / "report.html").write_text(self.page(place or folder), encoding="utf-8")

    def page(self, place: Path) -> str:
        """Return the page in HTML, for a folder that its links to recordings count from."""
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
        environment.filters.update(percent=percent, line=line, link=lambda file: link(file, place))
        template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
        return environment.from_string(template).render(self.facts)


def compare(
    measure: Measure,
    own: NDArray[Any],
    other: NDArray[Any],
    metric: str,
    groups: Sequence[str] | None,
    seed: int,
    draws: int = 1000,
) -> dict[str, Any]:
    """Measure answers and others that a metric compares them with, with the 95 % intervals of a bootstrap.

    It draws speakers (`groups`) where there are five or more, else recordings.
    """
    random, count = np.random.default_rng(seed), len(own)
    of = [np.array([row]) for row in range(count)]
    unit = "recordings"
    if groups is not None and len(set(groups)) >= LEAST_SPEAKERS:
        unit, of = "speakers", [np.flatnonzero(np.asarray(groups) == name) for name in sorted(set(groups))]
    samples = [np.concatenate([of[i] for i in random.integers(len(of), size=len(of))]) for _ in range(draws)]
    everything, sign = np.arange(count), -1 if metric in LOWER else 1
    found = {}
    for name, answers in (("metrics", own), ("head", other)):
        drawn = [measure(answers, rows) for rows in samples]
        found[name] = {key: (x, [one[key] for one in drawn]) for key, x in measure(answers, everything).items()}
    (value, drawn), (beside, drawn_beside) = found["metrics"][metric], found["head"][metric]
    gains = [sign * (x - y) for x, y in zip(drawn, drawn_beside, strict=True)]
    return {
        "unit": unit,
        **{name: {key: _interval(*x) for key, x in metrics.items()} for name, metrics in found.items()},
        "gain": _interval(sign * (value - beside), gains),
    }


def _interval(value: float, drawn: Sequence[float]) -> dict[str, float]:
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"value": value + 0.0, "low": float(low) + 0.0, "high": float(high) + 0.0}  # -0.0 becomes 0.0.


def classification(
    right: Sequence[int],
    logits: Tensor,
    head: Tensor,
    names: Sequence[str],
    groups: Sequence[str] | None,
    metric: str,
    seed: int,
) -> dict[str, Any]:
    """Measure named classes by calibrated logits, beside those of the head alone; `groups` are the speakers."""
    truth, answered, classes = np.asarray(right), logits.argmax(-1).numpy(), len(names)
    measure, confusion = of_classes(truth, classes), confusion_matrix(truth, answered, classes)
    commonest = np.full_like(truth, np.bincount(truth).argmax())
    hits, clips, answers = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    columns = (names, clips, hits / np.maximum(answers, 1), hits / np.maximum(clips, 1))
    probability = logits.softmax(-1).numpy()
    return compare(measure, answered, head.argmax(-1).numpy(), metric, groups, seed) | {
        "chance": dict.fromkeys(METRICS, 1 / classes),
        "commonest": measure(commonest, np.arange(len(truth))),
        "confusion": confusion.tolist(),
        "names": list(names),
        "classes": [
            {"class": name, "clips": int(count), "precision": float(precision), "recall": float(recall)}
            for name, count, precision, recall in zip(*columns, strict=True)
        ],
        "calibration": calibration(truth, probability),
        "rejection": rejection(truth, probability),
        "wrong": most_wrong(truth, probability, names),
    }


def verification(right: Sequence[str], embeddings: Tensor, head: Tensor, seed: int) -> dict[str, Any]:
    """Measure comparisons of voices, over all pairs of recordings."""
    cosines = cosines_of(embeddings)
    found = compare(of_voices(right), cosines, cosines_of(head), "eer", right, seed, draws=DRAWS_OF_PAIRS)
    return found | {"chance": {"eer": 0.5, "min_dcf": 1.0}, "wrong": [], "trials": len(trials_of(right, cosines)[0])}


def fit_temperature(logits: Tensor, right: Tensor) -> float:
    """Return the number by which logits are divided so that their softmax fits the right answers best.

    Examples:
        >>> import torch
        >>> sure, right = torch.tensor([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 0, 0, 1])
        >>> fit_temperature(sure, right) > 5
        True
    """
    logits, right = logits.double(), right.long()

    def loss(log: float) -> float:
        return float(cross_entropy(logits / math.exp(log), right))

    bounds = (math.log(0.01), math.log(100.0))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)  # pyright: ignore[reportAttributeAccessIssue]


def calibration(right: NDArray[Any], probability: NDArray[Any]) -> dict[str, Any]:
    """Return the expected calibration error, and for each bin of the largest score how many answers are right."""
    score, hit = probability.max(1), probability.argmax(1) == right
    bins = np.minimum((score * BINS).astype(int), BINS - 1)
    found = [
        {"clips": int(there.sum()), "score": float(score[there].mean()), "right": float(hit[there].mean())}
        for there in (bins == b for b in np.unique(bins))
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


def most_wrong(right: NDArray[Any], probability: NDArray[Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the wrong answers with the largest scores."""
    answered, score = probability.argmax(1), probability.max(1)
    wrong = [row for row in np.argsort(-score, kind="stable").tolist() if answered[row] != right[row]]
    return [
        {"row": row, "answer": names[int(answered[row])], "score": float(score[row]), "right": names[int(right[row])]}
        for row in wrong[:WRONG]
    ]


def verdict(facts: Mapping[str, Any]) -> str:
    """Say in one sentence what an adapter is worth: against chance, and against other answers."""
    metric, result, other = facts["metric"], facts["result"], facts["beside"]
    value, chance, gain = result["metrics"][metric], result["chance"][metric], result["gain"]
    beats = value["high"] < chance if metric in LOWER else value["low"] > chance
    text = (
        f"{'Better' if beats else 'Not clearly better'} than {CHANCE.get(metric, 'chance')} ({percent(chance)}): "
        f"{METRIC_NAMES[metric]} {percent(value)} on {facts['clips']} {facts['measured_on']} recordings"
    )
    if facts.get("is_head"):
        return f"{text}; {other} was chosen, since more layers gave no clear gain."
    points = f"{100 * gain['value']:+.1f} points, 95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
    found = "better than" if gain["low"] > 0 else "worse than" if gain["high"] < 0 else "not clearly different from"
    return f"{text}; {found} {other} ({points})."


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
