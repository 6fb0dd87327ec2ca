"""Error rates against hand-worked cases and plain loops, scores against the written formulas."""

import itertools
import math
import random
import statistics
import sys

import numpy as np
import pytest
import torch

from peft_elp.speech.metrics import cosine_scores, equal_error_rate, equal_error_threshold, min_dcf, s_norm_scores


def rates(labels, scores):
    """P_fa and P_miss at every threshold, from the highest, by counting."""
    targets = [s for s, label in zip(scores, labels, strict=True) if label]
    others = [s for s, label in zip(scores, labels, strict=True) if not label]
    return [
        (sum(s >= t for s in others) / len(others), sum(s < t for s in targets) / len(targets))
        for t in [math.inf, *sorted(set(scores), reverse=True)]
    ]


def crossing(points):
    """Where the line through the points meets P_fa = P_miss."""
    for (fa, miss), (next_fa, next_miss) in itertools.pairwise(points):
        if next_fa >= next_miss:
            share = (miss - fa) / ((miss - fa) + (next_fa - next_miss))
            return fa + share * (next_fa - fa)
    raise AssertionError("the last point accepts every trial")


def trials(seed, count=200, ties=False):
    generator = random.Random(seed)
    labels = [generator.random() < 0.3 for _ in range(count)]
    scores = [generator.gauss(1.0 * label, 1.0) for label in labels]
    return labels, [round(score, 1) for score in scores] if ties else scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_rates_and_costs_are_those_of_a_plain_loop_over_thresholds(seed, ties):
    labels, scores = trials(seed, ties=ties)
    points = rates(labels, scores)
    assert equal_error_rate(labels, scores) == pytest.approx(crossing(points), abs=1e-12)
    for p_target, c_miss, c_fa in ((0.01, 1, 1), (0.05, 1, 1), (0.5, 1, 1), (0.01, 10, 1), (0.9, 1, 5)):
        cost = min(c_miss * p_target * miss + c_fa * (1 - p_target) * fa for fa, miss in points)
        expected = cost / min(c_miss * p_target, c_fa * (1 - p_target))
        found = min_dcf(labels, scores, p_target=p_target, c_miss=c_miss, c_fa=c_fa)
        assert found == pytest.approx(expected, abs=1e-12)
        assert 0 < found <= 1


@pytest.mark.parametrize(
    ("labels", "scores", "rate", "costs"),  # the costs at p_target 0.5, at 0.05, and at 0.5 with misses of cost 10
    [
        ([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9], 1.0, (1.0, 1.0, 1.0)),  # nothing is better than to accept none
        ([1, 1, 0, 0], [0.5, 0.5, 0.5, 0.5], 0.5, (1.0, 1.0, 1.0)),  # all tied: the line from (0, 1) to (1, 0)
        ([1, 0, 1, 0], [0.9, 0.5, 0.5, 0.1], 0.25, (0.5, 0.5, 0.5)),  # one of each tied: from (0, 1/2) to (1/2, 0)
        ([1, 0, 0, 0], [0.5, 0.5, 0.2, 0.1], 0.25, (1 / 3, 1.0, 1 / 3)),  # from (0, 1) to (1/3, 0)
        ([1, 1, 1, 0, 0], [4, 3, 1, 2, 0], 1 / 3, (1 / 3, 1 / 3, 0.5)),  # from (0, 1/3) to (1/2, 1/3), flat
    ],
)
def test_error_rates_and_costs_of_cases_worked_by_hand(labels, scores, rate, costs):
    assert equal_error_rate(labels, scores) == pytest.approx(rate, abs=1e-15)
    found = [min_dcf(labels, scores, p_target, c_miss) for p_target, c_miss in ((0.5, 1), (0.05, 1), (0.5, 10))]
    assert found == pytest.approx(costs, abs=1e-12)


@pytest.mark.parametrize("metric", [equal_error_rate, equal_error_threshold, min_dcf])
def test_trials_of_one_kind_are_refused_and_containers_do_not_count(metric):
    with pytest.raises(ValueError, match="need trials with label 1 and with label 0"):
        metric([1, 1], [0.5, 0.1])
    labels, scores = trials(3)
    assert metric(torch.tensor(labels), torch.tensor(scores, dtype=torch.float64)) == metric(labels, scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p_target": math.nan}, "p_target must be between 0 and 1, got nan"),
        ({"c_miss": 0}, "c_miss must be above 0 and finite, got 0"),
        ({"c_fa": math.inf}, "c_fa must be above 0 and finite, got inf"),
    ],
)
def test_costs_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        min_dcf([1, 0], [1.0, 0.0], **options)


def test_a_missing_scikit_learn_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'peft-elp\[recipes\]'"):
        equal_error_rate([1, 0], [1.0, 0.0])


def voices(seed=0, speakers=5, utterances=3, width=6):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(speakers, width))
    return {
        f"{speaker}/{utterance}": centres[speaker] + 0.4 * generator.normal(size=width)
        for speaker in range(speakers)
        for utterance in range(utterances)
    }


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_cosine_scores_are_the_cosines_of_the_pairs_in_the_order_of_trials():
    embeddings = voices()
    pairs = list(itertools.combinations(embeddings, 2))
    expected = [cosine(embeddings[a], embeddings[b]) for a, b in pairs]
    assert cosine_scores(embeddings, pairs).tolist() == pytest.approx(expected)
    labels = [a[0] == b[0] for a, b in pairs]
    assert equal_error_rate(labels, cosine_scores(embeddings, pairs)) < 0.2


@pytest.mark.parametrize("top_k", [None, 4, 2])
def test_s_norm_is_its_formula_over_the_closest_of_the_cohort(top_k, monkeypatch):
    monkeypatch.setattr("peft_elp.speech.metrics.BLOCK", 4)  # several blocks, the last one not full
    embeddings, cohort = voices(0), list(voices(1).values())
    pairs = list(itertools.combinations(embeddings, 2))[::3]

    def normalised(score, name):
        closest = sorted((cosine(embeddings[name], other) for other in cohort), reverse=True)[:top_k]
        return (score - statistics.mean(closest)) / statistics.stdev(closest)

    expected = []
    for a, b in pairs:
        score = cosine(embeddings[a], embeddings[b])
        expected.append((normalised(score, a) + normalised(score, b)) / 2)
    assert s_norm_scores(embeddings, pairs, np.stack(cohort), top_k).tolist() == pytest.approx(expected)
    turned = [(b, a) for a, b in pairs]
    assert s_norm_scores(embeddings, turned, cohort, top_k).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "pairs", "message"),
    [
        ({}, [], "trials must hold at least one pair of utterances, got none"),
        ({}, [("a", "x"), ("y", "b")], "2 of 4 utterances have no embedding: x, y"),
        ({"a": [[1.0, 2.0]], "b": [[1.0, 2.0]]}, [("a", "b")], r"must have the shape \(width,\), got \(1, 2\)"),
        ({"b": [0.0, 0.0]}, [("a", "b")], r"The length of the embedding of 'b' must be above 0 and finite, got 0\.0"),
        ({"b": [1.0, math.nan]}, [("a", "b")], "The length of the embedding of 'b' .* got nan"),
    ],
)
def test_embeddings_that_have_no_angle_are_named(changes, pairs, message):
    embeddings = {"a": [1.0, 2.0], "b": [2.0, 1.0]} | changes
    cohort = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    for scores in (lambda: cosine_scores(embeddings, pairs), lambda: s_norm_scores(embeddings, pairs, cohort)):
        with pytest.raises(ValueError, match=message):
            scores()


@pytest.mark.parametrize(
    ("cohort", "top_k", "message"),
    [
        ([[1.0, 0.0]], None, "top_k must be from 2 to the size of the cohort, 1, got 1"),
        ([[1.0, 0.0], [0.0, 1.0]], 1, "got 1"),
        ([[1.0, 0.0, 0.0]], None, r"cohort must have the shape \(cohort, 2\), got \(1, 3\)"),
        ([[1.0, 0.0], [0.0, 0.0]], None, r"The length of row 1 of the cohort must be above 0 and finite, got 0\.0"),
        ([[1.0, 0.0], [2.0, 0.0]], None, "scores with the cohort do not vary for 2 utterances: a, b"),
    ],
)
def test_a_cohort_that_cannot_normalise_is_refused(cohort, top_k, message):
    with pytest.raises(ValueError, match=message):
        s_norm_scores({"a": [1.0, 2.0], "b": [2.0, 1.0]}, [("a", "b")], cohort, top_k)
