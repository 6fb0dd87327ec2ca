"""The measures of answers: of classes that are named, and of voices that are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

METRICS = ("unweighted_accuracy", "accuracy", "f1")


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


def trials_of(speakers: Any, embeddings: Tensor) -> tuple[Any, Any]:
    """Return for all pairs of recordings whether they are of one speaker, and the cosines of their embeddings."""
    directions = torch.nn.functional.normalize(embeddings.float())
    first, second = torch.triu_indices(len(directions), len(directions), 1)
    cosines = (directions @ directions.T)[first, second]
    return (np.asarray(speakers)[first] == np.asarray(speakers)[second]).astype(int), cosines.numpy()
