r"""Train an adapted speech encoder for speaker verification, as in the paper on VoxCeleb1.

    python examples/make_demo_data.py
    python examples/run_speaker_verification.py --model_name_or_path demo/encoder --dataset_name demo/speakers \
        --trials demo/speakers/trials.csv --num_train_epochs 6 --learning_rate 1e-3 --output_dir outputs/speakers

Training tells the training speakers apart; the test speakers have to be others. The embedding of an utterance is the
mean over its frames after the projector (`--head mean`) or an x-vector (`--head xvector`). The score of a trial is the
cosine of two embeddings.

Measured: `eer`, the equal error rate, and `min_dcf` (p_target 0.01, costs 1), as shares of 1; with `--s_norm_cohort
train` also after s-norm with all training utterances as the cohort. `scores.csv` has every trial, `det.png` the curve.
"""

from dataclasses import dataclass

from peft_elp_options import DataArguments, check_command_line, option, refuse_unused

MIN_CROP_S = 0.5  # SpecAugment and the context of an x-vector need it.


@dataclass
class VerificationArguments(DataArguments):
    """The recordings, their speakers, and how two recordings are compared."""

    label_column_name: str | None = option(None, "Column with the speaker. Default: speaker or speaker_id.")
    head: str = option("mean", "How frames become an embedding.", choices=("mean", "xvector"))
    loss: str = option("amsoftmax", "Loss over the training speakers.", choices=("amsoftmax", "softmax"))
    margin: float = option(0.2, "Margin of AM-Softmax. Our choice: the published code has it off, and 0.4.")
    classifier_proj_size: int | None = option(
        None, "Width of the embeddings of --head mean; 768 in the published code. Default: that of the encoder."
    )
    scale: float = option(30.0, "Scale of AM-Softmax.")
    trials: str | None = option(None, "A list of trials; see docs/how-to/data.md. Default: all pairs of test.")
    trials_folder: str | None = option(None, "Folder that the paths in --trials start from. Default: its own folder.")
    crop_length_in_seconds: float | None = option(
        None, "Train on a random piece of this length of each longer recording. Default: on the whole recording."
    )
    s_norm_cohort: str = option(
        "none", "'train': also score with s-norm by all training utterances.", choices=("none", "train")
    )
    s_norm_top_k: int | None = option(None, "Utterances of the cohort that count, the closest ones. Default: all.")

    def __post_init__(self) -> None:
        if self.trials is None:
            refuse_unused(self, ["trials_folder"], "--trials", "there is none")
        else:
            refuse_unused(self, ["max_eval_samples"], "no --trials", f"--trials is {self.trials}")
        if self.loss != "amsoftmax":
            refuse_unused(self, ["margin", "scale"], "--loss amsoftmax", f"--loss is {self.loss}")
        if self.head != "mean":
            refuse_unused(self, ["classifier_proj_size"], "--head mean", f"--head is {self.head}")
        if self.s_norm_cohort != "train":
            refuse_unused(self, ["s_norm_top_k"], "--s_norm_cohort train", "the cohort is none")
        if (crop_s := self.crop_length_in_seconds) is not None and crop_s < MIN_CROP_S:
            raise ValueError(
                f"--crop_length_in_seconds must be at least {MIN_CROP_S}, got {crop_s:g}. 2 to 4 are usual."
            )


if __name__ == "__main__":
    check_command_line(VerificationArguments, __doc__)  # before PyTorch is imported, which takes seconds

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForAudioClassification, AutoModelForAudioXVector

from peft_elp import recipes
from peft_elp.speech.data import Trial, check_disjoint, find_column, label_names, read_column
from peft_elp.speech.metrics import cosine_scores, equal_error_rate, min_dcf, s_norm_scores
from peft_elp.speech.plots import plot_det


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure with a command line, by default that of the process; return the metrics."""
    model_args, data_args, args = recipes.parse_arguments(argv, VerificationArguments)
    config = recipes.load_config(model_args.model_name_or_path)
    bounds = {}
    if data_args.crop_length_in_seconds is not None:  # Then training has no piece over the window of the encoder.
        bounds["max_duration_in_seconds"] = data_args.max_duration_in_seconds
    feature_extractor = recipes.load_feature_extractor(model_args, data_args)

    # Data
    top_k, most = data_args.s_norm_top_k, data_args.max_train_samples
    train = recipes.read_split(data_args, data_args.train_split_name, config, args.seed, most, **bounds)
    test = recipes.read_split(data_args, data_args.eval_split_name, config, args.seed)
    column = find_column(train, "speaker", data_args.label_column_name)
    check_disjoint(train, test, column)
    test = recipes.limit_rows(test, data_args.max_eval_samples, args.seed)
    if top_k is not None and not 2 <= top_k <= len(train):
        raise ValueError(f"--s_norm_top_k must be from 2 to the {len(train)} training utterances, got {top_k}.")
    if data_args.trials is None:
        trials, recordings = recipes.pair_up(test, column), test
        trial_list = f"all pairs of the split {data_args.eval_split_name}"
    else:
        trials, recordings = recipes.read_pairs(data_args, train, test, config)
        trial_list = Path(data_args.trials).name
    feature_extractor = recipes.fit_window(feature_extractor, model_args, data_args, train, recordings)
    speakers = label_names(train, column=column)
    print(f"{len(train)} utterances of {len(speakers)} speakers in training")
    print(f"{len(trials):,} trials ({trial_list}) of {len(recordings)} utterances")

    # Model
    config.update({"id2label": dict(enumerate(speakers)), "label2id": {name: i for i, name in enumerate(speakers)}})
    if data_args.classifier_proj_size is not None:
        config.classifier_proj_size = data_args.classifier_proj_size
    auto = AutoModelForAudioXVector if data_args.head == "xvector" else AutoModelForAudioClassification
    model = recipes.load_model(auto, model_args, config)
    if data_args.head == "xvector":
        # Some versions of Transformers leave these weights uninitialised where a checkpoint lacks them.
        torch.nn.init.normal_(model.objective.weight)

    # Train
    labels = [speakers.index(name) for name in read_column(train, column)]
    options = {"loss": data_args.loss, "margin": data_args.margin, "scale": data_args.scale}
    options |= {"crop_s": data_args.crop_length_in_seconds, "trainer_cls": recipes.SpeakerTrainer}
    rows = recipes.training_columns(train, labels)
    trainer = recipes.make_trainer(
        model, model_args, args, "asv", feature_extractor, data_args=data_args, train_dataset=rows, **options
    )
    trainer.train_and_save()

    # Metric
    def embed(dataset: Dataset) -> np.ndarray:
        return trainer.predict(dataset.select_columns(["audio", "duration_s"])).predictions

    names = recipes.recording_names(recordings)
    embeddings: dict[Hashable, Any] = dict(zip(names, embed(recordings), strict=True))
    truth, pairs = [trial.label for trial in trials], [(trial.file_a, trial.file_b) for trial in trials]
    scores = {"": cosine_scores(embeddings, pairs)}
    metrics: dict[str, Any] = {"trials": len(trials)}
    if data_args.s_norm_cohort == "train":
        scores["_s_norm"] = s_norm_scores(embeddings, pairs, embed(train), top_k)
        metrics["s_norm_cohort"] = f"{len(train)} training utterances, top {top_k or len(train)}"
    for kind, values in scores.items():
        metrics |= {f"eer{kind}": equal_error_rate(truth, values), f"min_dcf{kind}": min_dcf(truth, values)}

    # Save
    table = dict(zip(Trial._fields, zip(*trials, strict=True), strict=True))
    recipes.write_table(trainer, "scores.csv", table | {f"score{kind}": values for kind, values in scores.items()})
    systems = {"s-norm" if kind else "cosine": (truth, values) for kind, values in scores.items()}
    plot_det(systems).savefig(Path(args.output_dir, "det.png"))
    protocol = (
        f"Compare voices with it; its classes are the training speakers. {data_args.loss} over {len(speakers)} "
        f"training speakers, none of them in test; embeddings of the head {data_args.head!r}, cosine scores of "
        f"{len(trials):,} trials ({trial_list}). As shares of 1; min_dcf with p_target 0.01 and costs of 1."
    )
    return recipes.save_results(trainer, metrics, model_args, data_args, "asv", protocol)


if __name__ == "__main__":
    print(json.dumps(main()))
