"""Who is held out: folds by speaker where speakers are known, by class otherwise."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass

from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

from .look import Recordings

FOLDS = 5
LEAST = 100  # clips: a smaller validation split is added to training, and folds are made of both
LEAST_SPEAKERS = 4


@dataclass(frozen=True)
class Fold:
    """One training of a candidate."""

    train: list[int]  # the recordings to train on
    parts: list[list[int]]  # those to be answered, in parts that are measured one by one

    @property
    def held_out(self) -> list[int]:
        """All recordings to be answered."""
        return [number for part in self.parts for number in part]


def make_folds(found: Recordings, seed: int) -> tuple[list[Fold], str]:
    """Return the folds by which the search chooses, and a sentence that says how they were made.

    A validation split of its own is used as it is, unless it has fewer than 100 clips or fewer than four speakers.
    Recordings of the test split are in no fold. Where voices are compared, each fold holds speakers out.
    """
    train, validation, verify = found.where("train"), found.where("validation"), found.task == "verify"
    speakers = found.speakers
    known = None if speakers is None else Counter(speakers[i] for i in validation)
    if len(validation) >= LEAST and (known is None or len(known) >= LEAST_SPEAKERS) and not verify:
        missing = {found.labels[i] for i in validation} - {found.labels[i] for i in train}
        if not missing:
            blocks, by = _blocks(found, validation, seed)
            return [
                Fold(train, blocks)
            ], f"The validation split was used to choose, measured in {len(blocks)} parts {by}."
    rows = sorted(train + validation)
    blocks, by = _by_speaker(found, rows) if verify else _blocks(found, rows, seed)
    joined = " of training and validation together" if validation else ""
    folds = [Fold(sorted(set(rows) - set(block)), [block]) for block in blocks]
    return folds, f"{len(folds)} folds{joined}, {by}."


def _by_speaker(found: Recordings, rows: list[int]) -> tuple[list[list[int]], str]:
    labels = [found.labels[i] for i in rows]
    if (speakers := len(set(labels))) < LEAST_SPEAKERS:
        raise ValueError(f"Verification needs at least {LEAST_SPEAKERS} speakers to train on, got {speakers}.")
    folds = min(FOLDS, speakers // 2)  # Trials need two speakers.
    return [
        [rows[i] for i in held] for _, held in GroupKFold(folds).split(rows, groups=labels)
    ], "each with other speakers"


def _blocks(found: Recordings, rows: list[int], seed: int) -> tuple[list[list[int]], str]:
    """Cut recordings into parts with the classes in the same proportions, and no speaker in two parts if possible."""
    labels = [found.labels[i] for i in rows]
    folds = max(2, min(FOLDS, *Counter(labels).values()))
    if found.speakers is not None:
        speakers = [found.speakers[i] for i in rows]
        of: dict[str, set[str]] = defaultdict(set)
        for label, speaker in zip(labels, speakers, strict=True):
            of[label].add(speaker)
        fewest = min(map(len, of.values()))
        if fewest >= 2:
            folds = max(2, min(FOLDS, fewest))
            splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
            return [
                [rows[i] for i in held] for _, held in splitter.split(rows, labels, speakers) if len(held)
            ], "no speaker in two of them"
        reason = ", although speakers are known, because a class has a single speaker"
    else:
        reason = ", because no column or folder tells the speakers"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # A class with fewer recordings than folds is named by `look`.
        held = [
            [rows[i] for i in part]
            for _, part in StratifiedKFold(folds, shuffle=True, random_state=seed).split(rows, labels)
        ]
    return held, "by class" + reason
