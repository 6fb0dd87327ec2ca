"""Speaker verification: the pairs of recordings that are compared, and the trainer of the embeddings."""

import math
import warnings
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, linear, normalize, one_hot

from peft_elp.speech.data import Trial, check_audio, from_rows, read_column, read_trials
from peft_elp.speech.speakers import speaker_embeddings

from .collator import Collator
from .methods import get_base_model
from .trainer import RecipeTrainer, long_audio

MAX_PAIRS = 1_000_000


class SpeakerTrainer(RecipeTrainer):
    """Train embeddings on the speakers of the training split; `predict` returns embeddings.

    The embedding of an utterance is the mean over its frames after the projector, or an x-vector.

    Args:
        args: Arguments of `RecipeTrainer`.
        loss: "amsoftmax" ([Wang et al. 2018](https://arxiv.org/abs/1801.05599)) or "softmax".
        margin: Margin of AM-Softmax.
        scale: Scale of AM-Softmax.
        crop_s: Train on a random piece of this many seconds of each longer recording. None: on the whole recording.
        kwargs: Arguments of `RecipeTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        loss: str = "amsoftmax",
        margin: float = 0.2,
        scale: float = 30.0,
        crop_s: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loss, self.margin, self.scale = loss, margin, scale
        self.has_x_vector = hasattr(get_base_model(self.model), "objective")
        if loss == "amsoftmax" and not self.has_x_vector:
            get_base_model(self.model).classifier.bias.requires_grad_(False)  # Angles have no bias.
        if crop_s is not None:
            self.data_collator = Collator(self.processing_class, self.model, crop_s=crop_s)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        embeddings, head = speaker_embeddings(model, **inputs), get_base_model(self.model)
        if self.has_x_vector:
            features, weight, bias = head.classifier(embeddings), head.objective.weight.T, None
        else:
            features, weight, bias = embeddings, head.classifier.weight, head.classifier.bias
        # The loss is outside of autocast, which gave the embeddings its data type.
        features, weight, bias = features.float(), weight.float(), None if bias is None else bias.float()
        if self.loss == "amsoftmax":
            cosines = linear(normalize(features), normalize(weight))
            scores = self.scale * (cosines - self.margin * one_hot(labels, cosines.shape[-1]))
        else:
            scores = linear(features, weight, bias)
        options: Any = {"reduction": "sum", "label_smoothing": self.args.label_smoothing_factor}
        loss = cross_entropy(scores, labels, **options) / (num_items_in_batch or len(labels))
        return (loss, {"loss": loss, "embeddings": embeddings}) if return_outputs else loss

    def answer(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.pop("labels", None)
        with torch.no_grad():
            return None, speaker_embeddings(model, **inputs), labels


def recording_names(dataset: Dataset) -> list[str]:
    """Return the file of each recording, or the number of its row where the data set holds recordings, not files."""
    return [
        str(Path(audio["path"]).resolve()) if audio["bytes"] is None else f"row {row}"
        for row, audio in enumerate(dataset["audio"])
    ]


def pair_up(dataset: Dataset, speaker_column: str) -> list[Trial]:
    """Return all pairs of the recordings of a data set as trials.

    Raises:
        ValueError: A recording occurs twice, there are too many pairs, or all pairs are of one kind.
    """
    speakers, names = read_column(dataset, speaker_column), recording_names(dataset)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{len(twice)} test recordings occur more than once, such as {twice[0]}.")
    if math.comb(len(names), 2) > MAX_PAIRS:
        raise ValueError(f"{len(names)} test utterances make over {MAX_PAIRS:,} pairs. Give a list with --trials.")
    pairs = combinations(zip(speakers, names, strict=True), 2)
    trials = [Trial(int(x == y), file_a, file_b) for (x, file_a), (y, file_b) in pairs]
    if not 0 < (same := sum(trial.label for trial in trials)) < len(trials):
        raise ValueError(
            f"{len(names)} test utterances make {len(trials) - same} trials of two speakers and {same} of one. "
            "Error rates need both: use more utterances."
        )
    return trials


def read_pairs(data_args: Any, train: Dataset, test: Dataset, config: Any) -> tuple[list[Trial], Dataset]:
    """Read the trials that the data arguments name; return them with the recordings that they compare.

    Recordings outside of the test split, whose speakers are known to differ from those of training, give a warning.

    Raises:
        ValueError: A recording of a trial is in training, or cannot be used.
    """
    listed = read_trials(data_args.trials, data_args.trials_folder)
    trials = [Trial(label, *(str(Path(file).resolve()) for file in files)) for label, *files in listed]
    files = sorted({file for trial in trials for file in trial[1:]})
    if heard := sorted({*files} & {*recording_names(train)}):
        raise ValueError(f"{len(heard)} recordings of {data_args.trials} are in training, such as {heard[0]}.")
    if others := sorted({*files} - {*recording_names(test)}):
        warnings.warn(
            f"{len(others)} of the {len(files)} recordings of {data_args.trials} are not in the test split, such as "
            f"{others[0]}. Their speakers may be in training, which cannot be checked.",
            stacklevel=2,
        )
    bounds = data_args.durations() | ({"max_duration_in_seconds": None} if long_audio(data_args) else {})
    return trials, check_audio(from_rows([{"audio": file} for file in files]), config, **bounds)
