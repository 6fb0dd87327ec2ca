"""Speaker verification with an adapted speech encoder, as in the paper on VoxCeleb1.

    python examples/make_demo_data.py
    python examples/run_speaker_verification.py --model_name_or_path demo/encoder --dataset_name demo/speakers \
        --trials demo/speakers/trials.csv --num_train_epochs 6 --learning_rate 1e-3 --output_dir outputs/speakers

Training tells the training speakers apart; test is on others, which is checked. The embedding of an utterance is the
mean over its frames after the projector (`--head mean`) or an x-vector (`--head xvector`). A trial is scored by the
cosine of two embeddings.

Measured: `eer`, the equal error rate, and `min_dcf` (p_target 0.01, costs 1), as shares of 1; with `--s_norm_cohort
train` also after s-norm with all training utterances as the cohort. `scores.csv` has every trial, `det.png` the curve.
"""

import json
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from recipe import (
    Collator,
    DataArguments,
    RecipeTrainer,
    at_most,
    load_config,
    make_trainer,
    option,
    parse,
    read_split,
    save,
    with_labels,
    write_rows,
)
from sklearn.metrics import DetCurveDisplay
from torch.nn.functional import cross_entropy, linear, normalize, one_hot
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, AutoModelForAudioXVector

from peft_elp.data import Trial, check_audio, check_disjoint, from_rows, label_names, read_column, read_trials
from peft_elp.metrics import cosine_scores, equal_error_rate, min_dcf, s_norm_scores
from peft_elp.speakers import speaker_embeddings

MOST_PAIRS = 1_000_000
LEAST_CROP_S = 0.5  # as SpecAugment and the context of an x-vector need
COHORTS = ("none", "train")
ONLY_WITH = {
    "trials_folder": ("trials",),
    "s_norm_top_k": ("s_norm_cohort", "train"),
    "margin": ("loss", "amsoftmax"),
    "scale": ("loss", "amsoftmax"),
    "max_eval_samples": ("trials", None),
}


@dataclass
class VerificationArguments(DataArguments):
    """The recordings, who speaks in them, and how two are compared."""

    label_column_name: str = option("speaker_id", "Who speaks.")
    head: str = option("mean", "What makes an embedding of frames.", choices=("mean", "xvector"))
    loss: str = option("amsoftmax", "Over the training speakers.", choices=("amsoftmax", "softmax"))
    margin: float = option(0.2, "Of AM-Softmax.")
    scale: float = option(30.0, "Of AM-Softmax.")
    trials: str | None = option(None, "A list of trials; see peft_elp.data.read_trials. Default: all pairs of test.")
    trials_folder: str | None = option(None, "What its paths count from. Default: its own folder.")
    crop_length_in_seconds: float | None = option(
        None, "Train on a random piece of this length of each longer recording. Default: on all of it."
    )
    s_norm_cohort: str = option("none", "'train': also score with s-norm by all training utterances.", choices=COHORTS)
    s_norm_top_k: int | None = option(None, "How many of the cohort count for an utterance. Default: all.")


class SpeakerTrainer(RecipeTrainer):
    """Trains on the embeddings of utterances, and predicts them."""

    verification: VerificationArguments

    def get_train_dataloader(self) -> Any:
        whole = self.data_collator
        self.data_collator = Collator(self.processing_class, self.verification.crop_length_in_seconds)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = whole

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """AM-Softmax ([Wang et al. 2018](https://arxiv.org/abs/1801.05599)) or softmax over the training speakers."""
        args, labels = self.verification, inputs.pop("labels")
        embeddings, head = speaker_embeddings(model, **inputs), inner(self.model)
        if args.head == "xvector":
            features, weight, bias = head.classifier(embeddings), head.objective.weight.T, None
        else:
            features, weight, bias = embeddings, head.classifier.weight, head.classifier.bias
        if args.loss == "amsoftmax":
            cosines = linear(normalize(features), normalize(weight))
            scores = args.scale * (cosines - args.margin * one_hot(labels, cosines.shape[-1]))
        else:
            scores = linear(features, weight, bias)
        loss = cross_entropy(scores, labels, reduction="sum") / (num_items_in_batch or len(labels))
        return (loss, {"loss": loss, "embeddings": embeddings}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return None, speaker_embeddings(model, **self._prepare_inputs(inputs)), None


def inner(model: Any) -> Any:
    """The Transformers model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def names_of(dataset: Dataset) -> list[str]:
    """The file of each recording, or the number of its row where a data set holds recordings, not files."""
    return [
        str(Path(audio["path"]).resolve()) if audio["bytes"] is None else f"row {row}"
        for row, audio in enumerate(dataset["audio"])
    ]


def read_pairs(args: VerificationArguments, train: Dataset, test: Dataset, config: Any) -> tuple[list[Trial], Dataset]:
    """The trials, and the recordings that they are about."""
    speakers = read_column(test, args.label_column_name)
    if args.trials is None:
        names = names_of(test)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{len(twice)} test recordings are there more than once, such as {twice[0]}.")
        if len(names) * (len(names) - 1) // 2 > MOST_PAIRS:
            raise ValueError(
                f"{len(names)} test utterances make over {MOST_PAIRS:,} pairs. Give a list with --trials."
            )
        pairs = combinations(zip(speakers, names, strict=True), 2)
        trials = [Trial(int(x == y), file_a, file_b) for (x, file_a), (y, file_b) in pairs]
        if not 0 < (same := sum(trial.label for trial in trials)) < len(trials):
            raise ValueError(
                f"{len(names)} test utterances make {len(trials) - same} trials of two speakers and {same} of one. "
                "Error rates need both: take more of them."
            )
        return trials, test
    listed = read_trials(args.trials, args.trials_folder)
    trials = [Trial(label, *(str(Path(file).resolve()) for file in files)) for label, *files in listed]
    files = sorted({file for trial in trials for file in trial[1:]})
    if heard := sorted({*files} & {*names_of(train)}):
        raise ValueError(f"{len(heard)} recordings of {args.trials} are in training, such as {heard[0]}.")
    if others := sorted({*files} - {*names_of(test)}):
        warnings.warn(
            f"{len(others)} of the {len(files)} recordings of {args.trials} are not in the test split, such as "
            f"{others[0]}: whether training has their speakers cannot be checked.",
            stacklevel=2,
        )
    bounds = {name: getattr(args, name) for name in ("min_duration_in_seconds", "max_duration_in_seconds")}
    return trials, check_audio(from_rows([{"audio": file} for file in files]), config, **bounds)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure with a command line, by default that of the process; returns the metrics."""
    model_args, data_args, args = parse(argv, VerificationArguments, ONLY_WITH)
    config = load_config(model_args)
    train = read_split(data_args, data_args.train_split_name, config, args.seed, data_args.max_train_samples)
    test = read_split(data_args, data_args.eval_split_name, config, args.seed)
    column = data_args.label_column_name
    check_disjoint(train, test, column)
    test = at_most(test, data_args.max_eval_samples, args.seed)
    if (crop_s := data_args.crop_length_in_seconds) is not None and crop_s < LEAST_CROP_S:
        raise ValueError(f"--crop_length_in_seconds is {LEAST_CROP_S} or more, got {crop_s:g}. 2 to 4 are usual.")
    if data_args.s_norm_top_k is not None and not 2 <= data_args.s_norm_top_k <= len(train):
        raise ValueError(
            f"--s_norm_top_k is from 2 to the {len(train)} utterances of training, got {data_args.s_norm_top_k}."
        )
    trials, recordings = read_pairs(data_args, train, test, config)
    speakers = label_names(train, column=column)
    trial_list = (
        Path(data_args.trials).name if data_args.trials else f"all pairs of the split {data_args.eval_split_name}"
    )
    print(f"{len(train)} utterances of {len(speakers)} speakers in training")
    print(f"{len(trials):,} trials ({trial_list}) of {len(recordings)} utterances")

    config.update({"id2label": dict(enumerate(speakers)), "label2id": {name: i for i, name in enumerate(speakers)}})
    auto = AutoModelForAudioXVector if data_args.head == "xvector" else AutoModelForAudioClassification
    model = auto.from_pretrained(model_args.model_name_or_path, config=config)
    if data_args.head == "xvector":
        # As it is made; some versions of Transformers leave memory as it was where a checkpoint has no such weights.
        torch.nn.init.normal_(model.objective.weight)
    feature_extractor = AutoFeatureExtractor.from_pretrained(model_args.model_name_or_path)
    labels = [speakers.index(name) for name in read_column(train, column)]
    trainer = make_trainer(
        model,
        model_args,
        args,
        "asv",
        feature_extractor,
        trainer_cls=SpeakerTrainer,
        train_dataset=with_labels(train, labels),
    )
    trainer.verification = data_args
    if data_args.head == "mean" and data_args.loss == "amsoftmax":
        inner(trainer.model).classifier.bias.requires_grad_(False)  # angles have none
    trainer.fit()

    def embed(dataset: Dataset) -> np.ndarray:
        return trainer.predict(dataset.select_columns(["audio", "duration_s"])).predictions  # pyright: ignore

    embeddings: dict[Hashable, Any] = dict(zip(names_of(recordings), embed(recordings), strict=True))
    truth, pairs = [trial.label for trial in trials], [(trial.file_a, trial.file_b) for trial in trials]
    scores = {"": cosine_scores(embeddings, pairs)}
    metrics: dict[str, Any] = {"eval_trials": len(trials)}
    if data_args.s_norm_cohort == "train":
        cohort = embed(train)
        scores["_s_norm"] = s_norm_scores(embeddings, pairs, cohort, data_args.s_norm_top_k)
        metrics["eval_s_norm_cohort"] = (
            f"{len(cohort)} training utterances, top {data_args.s_norm_top_k or len(cohort)}"
        )
    for kind, values in scores.items():
        metrics |= {f"eval_eer{kind}": equal_error_rate(truth, values), f"eval_min_dcf{kind}": min_dcf(truth, values)}

    columns = ["label", "file_a", "file_b", *(f"score{kind}" for kind in scores)]
    rows = ([*trial, *(values[row] for values in scores.values())] for row, trial in enumerate(trials))
    write_rows(trainer, "scores.csv", columns, rows)
    figure = Figure(figsize=(4.8, 4.8), layout="constrained")
    axes = figure.subplots()
    for kind, values in scores.items():
        DetCurveDisplay.from_predictions(truth, values, ax=axes, name="s-norm" if kind else "cosine")
    figure.savefig(Path(args.output_dir, "det.png"))
    protocol = (
        "Compare voices with it; its classes are the training speakers. "
        f"{data_args.loss} over {len(speakers)} training speakers, none of them in test; embeddings of the head "
        f"{data_args.head!r}, cosine scores of {len(trials):,} trials ({trial_list}). As shares of 1; min_dcf with "
        "p_target 0.01 and costs of 1."
    )
    return save(trainer, metrics, model_args, data_args, "asv", protocol)


if __name__ == "__main__":
    print(json.dumps(main()))
