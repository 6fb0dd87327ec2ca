"""Scores and error rates of speaker verification.

Other libraries have the metrics of the other tasks. Word and character error rates are `jiwer.wer` and `jiwer.cer`.
Weighted and unweighted accuracy of emotion recognition are `accuracy_score` and `balanced_accuracy_score` of
`sklearn.metrics`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peft_elp.wording import shortened

Trial = tuple[Hashable, Hashable]
Scores = NDArray[np.float64]
BLOCK = 256  # utterances at a time, which takes 20 MB for a cohort of 10,000


def equal_error_rate(labels: ArrayLike, scores: ArrayLike) -> float:
    """Return the error rate at which false alarms are as frequent as misses.

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
        ValueError: All labels are the same, or scikit-learn's `roc_curve` refuses the labels or the scores.
        ImportError: scikit-learn is not installed.

    Examples:
        >>> equal_error_rate([1, 1, 0, 0], [0.9, 0.4, 0.6, 0.1])
        0.5
    """
    false_alarms, misses, _ = _operating_points(labels, scores)
    return float(np.interp(0.0, false_alarms - misses, false_alarms))


def equal_error_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """Return the threshold at which the rates of false alarms and of misses are closest to each other.

    Measure it on trials of speakers that the model does not meet later, and save it as `verification_threshold`.

    Arguments and errors are those of `equal_error_rate`.

    Returns:
        One of the scores: a trial with that score or a higher one is accepted.

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
    """Return the least normalised detection cost over all thresholds, as in NIST's speaker recognition evaluations.

    Computes `min_t (a P_miss(t) + b P_fa(t)) / min(a, b)` with `a = c_miss p_target`, `b = c_fa (1 - p_target)`, and
    thresholds and shares as in `equal_error_rate`. The better of accepting all trials and accepting none costs 1.

    Args:
        labels: As for `equal_error_rate`.
        scores: As for `equal_error_rate`.
        p_target: Prior probability of a target trial, in (0, 1). Papers on VoxCeleb1 take 0.01 or 0.05.
        c_miss: Cost of a miss, above 0.
        c_fa: Cost of a false alarm, above 0.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: `p_target` or a cost is out of its range, or as for `equal_error_rate`.

    Examples:
        >>> min_dcf([1, 1, 0, 0], [0.9, 0.4, 0.6, 0.1], p_target=0.5)
        0.5
    """
    if not 0 < p_target < 1:
        raise ValueError(f"p_target must be between 0 and 1, got {p_target!r}.")
    for name, cost in (("c_miss", c_miss), ("c_fa", c_fa)):
        if not 0 < cost < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, got {cost!r}.")
    false_alarms, misses, _ = _operating_points(labels, scores)
    miss, false_alarm = c_miss * p_target, c_fa * (1 - p_target)
    return float((miss * misses + false_alarm * false_alarms).min() / min(miss, false_alarm))


def cosine_scores(embeddings: Mapping[Hashable, ArrayLike], trials: Sequence[Trial]) -> Scores:
    """Return the cosine of the angle between the two embeddings of each trial.

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
    directions, pairs, _ = _directions_of(embeddings, trials)
    return np.array([directions[first] @ directions[second] for first, second in pairs])


def s_norm_scores(
    embeddings: Mapping[Hashable, ArrayLike], trials: Sequence[Trial], cohort: ArrayLike, top_k: int | None = None
) -> Scores:
    """Return cosine scores after symmetric normalisation by a cohort of other speakers, adaptive with `top_k`.

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
    directions, pairs, names = _directions_of(embeddings, trials)
    others = np.asarray(cohort, dtype=np.float64)
    if others.ndim != 2 or others.shape[1] != directions.shape[1]:
        raise ValueError(f"cohort must have the shape (cohort, {directions.shape[1]}), got {others.shape}.")
    others = _scaled(others, [f"row {number} of the cohort" for number in range(len(others))])
    top_k = len(others) if top_k is None else top_k
    if not 2 <= top_k <= len(others):
        raise ValueError(f"top_k must be from 2 to the size of the cohort, {len(others)}, got {top_k!r}.")
    mean, deviation = np.empty((2, len(names)))
    for start in range(0, len(names), BLOCK):
        block = slice(start, start + BLOCK)
        closest = np.partition(directions[block] @ others.T, -top_k, axis=1)[:, -top_k:]
        mean[block], deviation[block] = closest.mean(axis=1), closest.std(axis=1, ddof=1)
    if flat := [names[row] for row in np.flatnonzero(deviation < 1e-12)]:
        raise ValueError(
            f"The cosine scores with the cohort do not vary for {len(flat)} utterances: {shortened(flat, 3)}. Check "
            "that the cohort does not repeat one embedding."
        )
    scores = np.array([directions[first] @ directions[second] for first, second in pairs])
    return ((scores[:, None] - mean[pairs]) / deviation[pairs]).mean(axis=1)


def _operating_points(labels: ArrayLike, scores: ArrayLike) -> tuple[Scores, Scores, Scores]:
    """Return `P_fa`, `P_miss` and the thresholds, from the highest threshold to the lowest."""
    try:
        from sklearn.metrics import roc_curve
    except ImportError as error:
        raise ImportError("Error rates need scikit-learn: pip install 'peft-elp[recipes]'") from error

    if len(np.unique(np.asarray(labels))) < 2:
        raise ValueError("Error rates need trials with label 1 and with label 0, got labels that are all the same.")
    false_alarms, hits, thresholds = roc_curve(labels, np.asarray(scores, dtype=np.float64), drop_intermediate=False)
    return false_alarms, 1 - hits, thresholds


def _directions_of(
    embeddings: Mapping[Hashable, ArrayLike], trials: Sequence[Trial]
) -> tuple[Scores, NDArray[np.int64], list[Hashable]]:
    """Return the embeddings at length 1, `(trials, 2)` with the rows of each trial, and the names of the rows."""
    if not len(trials):
        raise ValueError("trials must hold at least one pair of utterances, got none.")
    rows: dict[Hashable, int] = {}
    pairs = [(rows.setdefault(first, len(rows)), rows.setdefault(second, len(rows))) for first, second in trials]
    if missing := [name for name in rows if name not in embeddings]:
        raise ValueError(f"{len(missing)} of {len(rows)} utterances have no embedding: {shortened(missing, 3)}.")
    vectors = np.stack([np.asarray(embeddings[name], dtype=np.float64) for name in rows])
    if vectors.ndim != 2:
        raise ValueError(f"An embedding must have the shape (width,), got {vectors.shape[1:]}.")
    return _scaled(vectors, [f"the embedding of {name!r}" for name in rows]), np.array(pairs), list(rows)


def _scaled(vectors: Scores, names: Sequence[str]) -> Scores:
    """Scale each row to length 1."""
    lengths = np.linalg.norm(vectors, axis=1)
    for name, length in zip(names, lengths, strict=True):
        if not 0 < length < float("inf"):
            raise ValueError(f"The length of {name} must be above 0 and finite, got {length}.")
    return vectors / lengths[:, None]
