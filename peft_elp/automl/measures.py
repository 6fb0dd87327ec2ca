"""The measures of answers: of classes that are named, of voices that are compared, of texts that are written.

A measure is a function of answers and of the numbers of the recordings that count, each as often as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jiwer
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_elp.speech.metrics import equal_error_rate, min_dcf

METRICS = ("unweighted_accuracy", "accuracy", "f1")
Measure = Callable[[NDArray[Any], NDArray[Any]], dict[str, float]]


def confusion_matrix(right: Any, answered: Any, classes: int) -> NDArray[np.int64]:
    """Return how often each class (rows) was answered as each class (columns)."""
    pairs = np.asarray(right) * classes + np.asarray(answered)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def metrics_of(confusion: NDArray[Any]) -> dict[str, float]:
    """Return accuracy, unweighted accuracy and macro F1 of a confusion matrix, over the classes that occur.

    Examples:
        >>> metrics_of(np.array([[3, 1], [0, 4]]))["accuracy"]
        0.875
    """
    there, hits = confusion.sum(1) > 0, np.diag(confusion)
    recall = hits[there] / confusion.sum(1)[there]
    f1 = 2 * hits[there] / (confusion.sum(1) + confusion.sum(0))[there]
    return {
        "unweighted_accuracy": float(recall.mean()),
        "accuracy": float(hits.sum() / confusion.sum()),
        "f1": float(f1.mean()),
    }


def of_classes(right: Any, classes: int) -> Measure:
    """Return the measure of answered classes, `(recordings,)`."""
    right = np.asarray(right)
    return lambda answered, rows: metrics_of(confusion_matrix(right[rows], answered[rows], classes))


def of_voices(speakers: Any) -> Measure:
    """Return the measure of the cosines of all pairs of recordings, `(recordings, recordings)`.

    It is NaN where all pairs are of one speaker, or none is.
    """

    def measure(cosines: NDArray[Any], rows: NDArray[Any]) -> dict[str, float]:
        trials = trials_of(speakers, cosines, rows)
        if len(set(trials[0])) < 2:  # A draw may hold one speaker alone.
            return {"eer": float("nan"), "min_dcf": float("nan")}
        return {"eer": equal_error_rate(*trials), "min_dcf": min_dcf(*trials)}

    return measure


def of_texts(errors: NDArray[Any], rows: NDArray[Any]) -> dict[str, float]:
    """Return word and character error rates of what `text_errors` counts."""
    words, of_words, characters, of_characters = errors[rows].sum(0).tolist()
    return {"wer": words / of_words, "cer": characters / of_characters}


def text_errors(right: Sequence[str], written: Sequence[str]) -> NDArray[np.int64]:
    """Return for each text the wrong words, the words, the wrong characters and the characters, `(recordings, 4)`.

    Examples:
        >>> text_errors(["one two"], ["one too"]).tolist()
        [[1, 2, 1, 7]]
    """
    rows = []
    for texts in zip(right, written, strict=True):
        row = []
        for found in (jiwer.process_words(*texts), jiwer.process_characters(*texts)):
            missed = found.substitutions + found.deletions
            row += [missed + found.insertions, missed + found.hits]
        rows.append(row)
    return np.array(rows)


def cosines_of(embeddings: Tensor) -> NDArray[Any]:
    """Return the cosines of all pairs of embeddings, `(recordings, recordings)`."""
    directions = torch.nn.functional.normalize(embeddings.float())
    return (directions @ directions.T).numpy()


def trials_of(speakers: Any, cosines: NDArray[Any], rows: Any = slice(None)) -> tuple[Any, Any]:
    """Return for all pairs of different recordings whether they are of one speaker, and their cosines."""
    rows = np.arange(len(cosines))[rows]
    first, second = (rows[side] for side in np.triu_indices(len(rows), 1))
    first, second = first[first != second], second[first != second]
    speakers = np.asarray(speakers)
    return (speakers[first] == speakers[second]).astype(int), cosines[first, second]
