"""Scores and error rates of speaker verification.

Other libraries have the metrics of the other tasks. Word and character error rates are `jiwer.wer` and `jiwer.cer`.
Weighted and unweighted accuracy of emotion recognition are `accuracy_score` and `balanced_accuracy_score` of
`sklearn.metrics`; its `DetCurveDisplay.from_predictions(labels, scores)` draws the curve behind the error rates below.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Trial = tuple[Hashable, Hashable]
Scores = NDArray[np.float64]
BLOCK = 256  # utterances at a time, which takes 20 MB for a cohort of 10,000


def equal_error_rate(labels: ArrayLike, scores: ArrayLike) -> float:
    """The error rate at which false alarms are as frequent as misses.

    A trial is accepted if its score is at or above a threshold `t`. Thresholds are all distinct scores, and one above
    them all. `P_fa(t)` is the share of non-target trials that are accepted, `P_miss(t)` the share of target trials
    that are not. Straight lines join these points in the order of thresholds, without a convex hull; the equal error
    rate is the value where they cross `P_fa = P_miss`. Trials with equal scores lie on one line, as if their order
    were drawn at random: if all scores are equal, the rate is 1/2.

    Args:
        labels: `(trials,)`, 1 or True for a target trial (same speaker), 0 or False for a non-target trial.
        scores: `(trials,)`, higher for more similar voices.

    Returns:
        A share in [0, 1]; multiply it by 100 for per cent.

    Raises:
        ValueError: Lengths differ, a label is neither 0 nor 1 or all are the same, or a score is NaN or infinite.
        ImportError: scikit-learn is not installed.

    Examples:
        >>> equal_error_rate([1, 1, 0, 0], [0.9, 0.4, 0.6, 0.1])
        0.5
    """
    false_alarms, misses, _ = _operating_points(labels, scores)
    return float(np.interp(0.0, false_alarms - misses, false_alarms))


def equal_error_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """The threshold at which the rates of false alarms and of misses are closest to each other.

    Measure it on trials of speakers that the model does not meet later, and save it as `verification_threshold`.

    Args:
        labels: As for `equal_error_rate`.
        scores: As for `equal_error_rate`.

    Returns:
        One of the scores: a trial with that score or a higher one is accepted.

    Raises:
        ValueError: As for `equal_error_rate`.
        ImportError: scikit-learn is not installed.

    Examples:
        >>> equal_error_threshold([1, 1, 0, 0], [0.9, 0.4, 0.6, 0.1])
        0.6
    """
    false_alarms, misses, thresholds = _operating_points(labels, scores)
    distances = np.abs(false_alarms - misses)
    return float(thresholds[1:][distances[1:].argmin()])  # The first one is infinite: it accepts no trial.


def min_dcf(
    labels: ArrayLike, scores: ArrayLike, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> float:
    """The least normalised detection cost over all thresholds, as in NIST's speaker recognition evaluations.

    Computes `min_t (a P_miss(t) + b P_fa(t)) / min(a, b)` with `a = c_miss p_target`, `b = c_fa (1 - p_target)`, and
    thresholds and shares as in `equal_error_rate`. The better of accepting all trials and accepting none costs 1.

    Args:
        labels: `(trials,)`, 1 or True for a target trial (same speaker), 0 or False for a non-target trial.
        scores: `(trials,)`, higher for more similar voices.
        p_target: Prior probability of a target trial, in (0, 1). Papers on VoxCeleb1 take 0.01 or 0.05.
        c_miss: Cost of a miss, above 0.
        c_fa: Cost of a false alarm, above 0.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: `p_target` or a cost is out of its range, lengths differ, a label is neither 0 nor 1 or all are the
            same, or a score is NaN or infinite.
        ImportError: scikit-learn is not installed.

    Examples:
        >>> min_dcf([1, 1, 0, 0], [0.9, 0.4, 0.6, 0.1], p_target=0.5)
        0.5
    """
    if not 0 < p_target < 1:
        raise ValueError(f"p_target is a probability between 0 and 1, got {p_target!r}. Papers take 0.01 or 0.05.")
    for name, cost in (("c_miss", c_miss), ("c_fa", c_fa)):
        if not 0 < cost < float("inf"):
            raise ValueError(f"{name} is a cost above 0, got {cost!r}. It is 1 in most evaluations.")
    false_alarms, misses, _ = _operating_points(labels, scores)
    miss, false_alarm = c_miss * p_target, c_fa * (1 - p_target)
    return float((miss * misses + false_alarm * false_alarms).min() / min(miss, false_alarm))


def cosine_scores(embeddings: Mapping[Hashable, ArrayLike], trials: Sequence[Trial]) -> Scores:
    """The cosine of the angle between the two embeddings of each trial.

    Args:
        embeddings: An embedding `(width,)` for each utterance.
        trials: Pairs of utterances, as keys of `embeddings`.

    Returns:
        `(trials,)`, in [-1, 1].

    Raises:
        ValueError: There is no trial, a trial is not a pair, an utterance has no embedding, widths differ, or an
            embedding is all zeros or not finite.

    Examples:
        >>> cosine_scores({"a": [1.0, 0.0], "b": [1.0, 1.0]}, [("a", "b")]).round(3)
        array([0.707])
    """
    directions = _directions(embeddings, trials)
    return np.array([directions[first] @ directions[second] for first, second in trials])


def s_norm_scores(
    embeddings: Mapping[Hashable, ArrayLike], trials: Sequence[Trial], cohort: ArrayLike, top_k: int | None = None
) -> Scores:
    """Cosine scores after symmetric normalisation by a cohort of other speakers, adaptive with `top_k`.

    Computes `((s - m_1) / d_1 + (s - m_2) / d_2) / 2` for a trial with cosine score `s`, where `m_i` and `d_i` are the
    mean and the standard deviation (of a sample, with `n - 1`) of the cosine scores between its utterance `i` and the
    `top_k` cohort embeddings that are closest to that utterance: S-norm over the whole cohort, or adaptive S-norm
    ("AS-norm 1" of [Matějka et al. 2017](https://doi.org/10.21437/Interspeech.2017-803)).

    Args:
        embeddings: An embedding `(width,)` for each utterance.
        trials: Pairs of utterances, as keys of `embeddings`.
        cohort: `(cohort, width)`, embeddings of speakers that are in no trial, such as training utterances or the mean
            of each training speaker. State their choice and their number with every result.
        top_k: How many embeddings of the cohort are used for an utterance, at least 2. None: all of them.

    Returns:
        `(trials,)`, in standard deviations: higher for more similar voices, not limited to [-1, 1].

    Raises:
        ValueError: As for `cosine_scores`, also for the cohort; `top_k` is below 2 or above the size of the cohort; or
            the embeddings used for an utterance are all equally close to it.

    Examples:
        >>> voices = {"a": [1.0, 0.0], "b": [0.8, 0.6]}
        >>> s_norm_scores(voices, [("a", "b")], cohort=[[0.0, 1.0], [-1.0, 0.0], [0.6, -0.8]]).round(3)
        array([1.194])
    """
    directions = _directions(embeddings, trials)
    names = list(directions)
    others = _cohort(cohort, width=len(directions[names[0]]))
    top_k = len(others) if top_k is None else top_k
    if not 2 <= top_k <= len(others):
        raise ValueError(f"top_k is from 2 to the size of the cohort, {len(others)}, got {top_k!r}.")
    mean: dict[Hashable, float] = {}
    deviation: dict[Hashable, float] = {}
    for start in range(0, len(names), BLOCK):
        block = names[start : start + BLOCK]
        scores = np.stack([directions[name] for name in block]) @ others.T
        closest = np.partition(scores, -top_k, axis=1)[:, -top_k:]
        mean.update(zip(block, closest.mean(axis=1), strict=True))
        deviation.update(zip(block, closest.std(axis=1, ddof=1), strict=True))
    flat = [name for name in names if deviation[name] < 1e-12]
    if flat:
        raise ValueError(
            f"{len(flat)} utterances, such as {flat[0]!r}, are equally close to all {top_k} embeddings of the cohort "
            "that are used for them, so there is no deviation to divide by. Does the cohort repeat one embedding?"
        )
    return np.array(
        [
            sum((directions[first] @ directions[second] - mean[side]) / deviation[side] for side in (first, second))
            / 2
            for first, second in trials
        ]
    )


def _operating_points(labels: ArrayLike, scores: ArrayLike) -> tuple[Scores, Scores, Scores]:
    """`P_fa`, `P_miss` and the thresholds, from the highest threshold to the lowest."""
    try:
        from sklearn.metrics import roc_curve
    except ImportError as error:
        raise ImportError("Error rates need scikit-learn: pip install 'peft-elp[recipes]'") from error

    truth, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != values.shape:
        raise ValueError(
            f"labels and scores have one entry for each trial, got shapes {truth.shape} and {values.shape}."
        )
    kinds = np.unique(truth)
    strange = [kind for kind in kinds.tolist() if kind not in (0, 1)]
    if strange:
        raise ValueError(
            f"labels are 1 for a target trial and 0 for a non-target trial, got {', '.join(map(repr, strange[:3]))}. "
            "The order of the arguments is labels, scores."
        )
    if len(kinds) < 2:
        raise ValueError(
            f"Error rates need target and non-target trials, got {len(truth)} trials"
            f"{f', all with label {int(kinds[0])}' if len(kinds) else ''}."
        )
    if not np.isfinite(values).all():
        first = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(
            f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are not finite; the first is number "
            f"{first}: {values[first]}. Does an embedding contain NaN?"
        )
    false_alarms, hits, thresholds = roc_curve(truth.astype(int), values, drop_intermediate=False)
    return false_alarms, 1 - hits, thresholds


def _directions(embeddings: Mapping[Hashable, ArrayLike], trials: Sequence[Trial]) -> dict[Hashable, Scores]:
    """The embeddings that the trials need, scaled to length 1."""
    if not len(trials):
        raise ValueError("trials is empty. It holds pairs of utterances, such as [('a', 'b')].")
    for number, trial in enumerate(trials):
        if isinstance(trial, str) or len(trial) != 2:
            raise ValueError(f"Trial {number} is {trial!r}. A trial is a pair of utterances, such as ('a', 'b').")
    names = list(dict.fromkeys(name for trial in trials for name in trial))
    missing = [name for name in names if name not in embeddings]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} utterances in the trials have no embedding: "
            f"{', '.join(map(repr, missing[:3]))}{', ...' if missing[3:] else ''}."
        )
    vectors = {name: np.asarray(embeddings[name], dtype=np.float64) for name in names}
    width = vectors[names[0]].size
    return {name: _scaled(f"The embedding of {name!r}", x, width) for name, x in vectors.items()}


def _cohort(cohort: ArrayLike, width: int) -> Scores:
    """The embeddings of the cohort, scaled to length 1."""
    rows = np.asarray(cohort, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"cohort is of shape (cohort, width), got {rows.shape}.")
    return np.stack([_scaled(f"Row {i} of the cohort", row, width) for i, row in enumerate(rows)])


def _scaled(what: str, x: Scores, width: int) -> Scores:
    if x.shape != (width,):
        raise ValueError(f"{what} has shape {x.shape}, and the first embedding has {width} numbers. Use one width.")
    length = np.linalg.norm(x)
    if not 0 < length < float("inf"):
        raise ValueError(f"{what} has length {length}, so it has no direction: it is all zeros, or not finite.")
    return x / length
