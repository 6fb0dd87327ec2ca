"""Emotion recognition with an adapted speech encoder, as in the paper on IEMOCAP.

    python examples/make_demo_data.py
    python examples/run_emotion_recognition.py --model_name_or_path demo/encoder --dataset_name demo/emotions \
        --folds 2 --num_train_epochs 4 --learning_rate 1e-3 --output_dir outputs/emotions

Each fold holds one speaker (or session, `--group_column_name session`) out of training and measures on it; the
numbers are means over folds. `--train_split_name` names what is divided, several splits joined by "+"; left out, it is
all of one table. With `--eval_split_name` there is one fold instead: these two splits, whose speakers have to differ.

Measured: `unweighted_accuracy`, the mean recall of the classes that the held-out speaker has, and `weighted_accuracy`,
the share of utterances that are right, each as mean and `_sd` over folds. `confusion.png` is summed over folds.
"""

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from matplotlib.figure import Figure
from recipe import (
    DataArguments,
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
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, recall_score
from sklearn.model_selection import KFold
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, set_seed

from peft_elp.data import check_disjoint, label_names, leave_one_group_out, read_column

Fold = tuple[str, Dataset, Dataset]
ONLY_WITH = {"folds": ("eval_split_name", None), "reference_split": ("eval_split_name", None)}


@dataclass
class EmotionArguments(DataArguments):
    """The recordings, their emotions, and how they are divided."""

    train_split_name: str | None = option(
        None, "What is divided into folds, such as 'train+test'. Default: one table."
    )
    eval_split_name: str | None = option(None, "Measure on this split, in place of folds.")
    label_column_name: str = option("emotion", "The emotion.")
    group_column_name: str = option("speaker_id", "Each fold holds one value of it out.")
    folds: int | None = option(None, "Run the first so many folds. Default: all.")
    reference_split: int | None = option(
        None, "Divide shuffled utterances into so many folds, as older code did: speakers are then in both parts."
    )


def read_folds(data_args: EmotionArguments, config: Any, seed: int) -> Iterator[Fold]:
    """The name of each fold, and its training and test part.

    Raises:
        ValueError: Somebody is in both parts of the two splits that are named.
    """
    splits = (data_args.train_split_name or "").split("+")
    dataset = concatenate_datasets([read_split(data_args, split or None, config, seed) for split in splits])
    if data_args.eval_split_name is not None:
        test = read_split(data_args, data_args.eval_split_name, config, seed)
        check_disjoint(dataset, test, data_args.group_column_name)
        yield data_args.eval_split_name, dataset, test
    elif data_args.reference_split is not None:
        warnings.warn(
            "--reference_split divides utterances, not speakers: those of test are in training as well, and "
            "accuracies come out higher than for a voice that was never heard. Compare like with like only.",
            stacklevel=2,
        )
        folds = KFold(data_args.reference_split, shuffle=True, random_state=seed).split(range(len(dataset)))
        for number, (train, test) in enumerate(folds):
            yield str(number), dataset.select(train), dataset.select(test)
    else:
        for held_out, train, test in leave_one_group_out(dataset, data_args.group_column_name):
            yield held_out, dataset.select(train), dataset.select(test)


def accuracies(right: Sequence[str], answered: Sequence[str]) -> dict[str, float]:
    recall = recall_score(right, answered, labels=sorted({*right}), average="macro")
    return {"unweighted_accuracy": float(recall), "weighted_accuracy": float(accuracy_score(right, answered))}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure with a command line, by default that of the process; returns the metrics."""
    model_args, data_args, args = parse(argv, EmotionArguments, ONLY_WITH)
    one_split, column = data_args.eval_split_name is not None, data_args.label_column_name
    if not one_split and (args.push_to_hub or args.resume_from_checkpoint):
        raise ValueError("Folds make several adapters: --push_to_hub and --resume_from_checkpoint need one split.")
    config = load_config(model_args)
    feature_extractor = AutoFeatureExtractor.from_pretrained(model_args.model_name_or_path)
    most = (data_args.max_train_samples, data_args.max_eval_samples)
    folds = [
        (fold, *(at_most(part, limit, args.seed) for part, limit in zip(parts, most, strict=True)))
        for fold, *parts in islice(read_folds(data_args, config, args.seed), data_args.folds)
    ]
    names = {
        fold: label_names(train, test, column=column) for fold, train, test in folds
    }  # all, before any is trained

    by_fold: dict[str, dict[str, Any]] = {}
    all_right, all_answered = [], []
    for fold, train, test in folds:
        emotions = names[fold]
        print(f"Fold {fold}: {len(train)} utterances in training, {len(test)} in test; {', '.join(emotions)}")
        fold_args = copy.copy(args)
        fold_args.output_dir = args.output_dir if one_split else str(Path(args.output_dir, f"fold-{fold}"))
        set_seed(args.seed)
        config.update(
            {"id2label": dict(enumerate(emotions)), "label2id": {name: i for i, name in enumerate(emotions)}}
        )
        model = AutoModelForAudioClassification.from_pretrained(model_args.model_name_or_path, config=config)
        train, test = (
            (rows, with_labels(rows, [emotions.index(name) for name in read_column(rows, column)]))
            for rows in (train, test)
        )
        trainer = make_trainer(model, model_args, fold_args, "er", feature_extractor, train_dataset=train[1])
        trainer.fit()
        predicted = trainer.predict(test[1], metric_key_prefix="eval")
        right = read_column(test[0], column)
        answered = [emotions[best] for best in predicted.predictions.argmax(-1)]  # pyright: ignore
        all_right += right
        all_answered += answered
        write_rows(
            trainer,
            "predictions.csv",
            ["file", column, "predicted"],
            [(audio["path"], *row) for audio, *row in zip(test[0]["audio"], right, answered, strict=True)],
        )
        metrics = predicted.metrics | {f"eval_{name}": value for name, value in accuracies(right, answered).items()}
        protocol = f"Measured on {len(right)} utterances of {fold}. As shares of 1; unweighted is the mean recall."
        if data_args.reference_split is not None and not one_split:
            protocol += " Utterances were shuffled: speakers of test are in training."
        by_fold[fold] = save(trainer, metrics, model_args, data_args, "er", protocol)

    summary: dict[str, Any] = {"eval_folds": ", ".join(by_fold)}
    for name in ("eval_unweighted_accuracy", "eval_weighted_accuracy"):
        values = [metrics[name] for metrics in by_fold.values()]
        summary[name] = float(np.mean(values))
        if len(values) > 1:
            summary[f"{name}_sd"] = float(np.std(values, ddof=1))
    if data_args.reference_split is not None and not one_split:
        summary["eval_protocol"] = "shuffled utterances: speakers of test are in training"
    last = next(reversed(by_fold.values()))
    summary |= {key: last[key] for key in last if not key.startswith("eval_")}
    folder = Path(args.output_dir)
    figure = Figure(figsize=(4.8, 4.8), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(
        all_right, all_answered, ax=figure.subplots(), xticks_rotation="vertical", colorbar=False
    )
    figure.savefig(folder / "confusion.png")
    for name in ("all_results.json", "eval_results.json"):
        (folder / name).write_text(json.dumps(summary, indent=4) + "\n", encoding="utf-8")
    return summary


if __name__ == "__main__":
    print(json.dumps(main()))
