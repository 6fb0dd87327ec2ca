r"""Train an adapted speech encoder for emotion recognition, as in the paper on IEMOCAP.

    python examples/make_demo_data.py
    python examples/run_emotion_recognition.py --model_name_or_path demo/encoder --dataset_name demo/emotions \
        --folds 2 --num_train_epochs 4 --learning_rate 1e-3 --output_dir outputs/emotions

Each fold holds one speaker (or session, `--group_column_name session`) out of training and measures on that speaker.
`--train_split_name` names what is divided into folds, with "+" between several splits; without it, it is all of one
table, or of a folder with a folder for each emotion and in it one for each speaker. With `--measure_on validation`
each fold is measured on another held-out speaker, to choose rates and sizes. `--final` trains one adapter to use on
everything after the folds. With `--eval_split_name` there is one fold instead: these two splits, whose speakers have
to differ.

Measured: `unweighted_accuracy`, the mean recall of the classes that the held-out speaker has, and `weighted_accuracy`,
the share of utterances that are right, each as mean and `_sd` over folds. `confusion.png` is summed over folds.
"""

from dataclasses import dataclass

from peft_elp_options import DataArguments, check_command_line, option, refuse_unused


@dataclass
class EmotionArguments(DataArguments):
    """The recordings, their emotions, and the folds."""

    train_split_name: str | None = option(
        None, "What is divided into folds, such as 'train+test'. Default: one table."
    )
    eval_split_name: str | None = option(None, "Measure on this split, instead of on folds.")
    label_column_name: str | None = option(None, "Column with the emotion. Default: label, emotion or class.")
    group_column_name: str | None = option(None, "Column of which a fold holds one value out. Default: the speaker.")
    measure_on: str = option(
        "test",
        "'validation': hold the next speaker out of each fold as well, and measure on that one, to choose settings.",
        choices=("test", "validation"),
    )
    final: bool = option(False, "After the folds, train one adapter on all recordings, in the folder final.")
    folds: int | None = option(None, "Run only the first folds, this many. Default: all.")
    reference_split: int | None = option(
        None, "Divide shuffled utterances into this many folds, as older code did: speakers are then in both parts."
    )

    def __post_init__(self) -> None:
        if (split := self.eval_split_name) is not None:
            names = ["folds", "reference_split", "measure_on", "final"]
            refuse_unused(self, names, "no --eval_split_name", f"--eval_split_name is {split}")


if __name__ == "__main__":
    check_command_line(EmotionArguments, __doc__)  # before PyTorch is imported, which takes seconds

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from sklearn.metrics import accuracy_score, recall_score
from sklearn.model_selection import KFold
from transformers import AutoModelForAudioClassification, set_seed

from peft_elp import recipes
from peft_elp.speech.data import check_disjoint, find_column, label_names, leave_one_group_out, read_column
from peft_elp.speech.plots import plot_confusion

Fold = tuple[str, Dataset, Dataset]


def read_folds(dataset: Dataset, data_args: EmotionArguments, config: Any, seed: int) -> Iterator[Fold]:
    """The name of each fold with its training and test part.

    Raises:
        ValueError: A speaker is in both of the two splits that are named.
    """
    if data_args.eval_split_name is not None:
        test = recipes.read_split(data_args, data_args.eval_split_name, config, seed)
        check_disjoint(dataset, test, find_column(dataset, "speaker", data_args.group_column_name))
        yield data_args.eval_split_name, dataset, test
    elif data_args.reference_split is not None:
        warnings.warn(
            "--reference_split divides utterances, not speakers: test speakers are in training as well, and "
            "accuracies are higher than for an unknown voice. Compare them only with numbers measured the same way.",
            stacklevel=2,
        )
        folds = KFold(data_args.reference_split, shuffle=True, random_state=seed).split(range(len(dataset)))
        for number, (train, test) in enumerate(folds):
            yield str(number), dataset.select(train), dataset.select(test)
    else:
        column = find_column(dataset, "speaker", data_args.group_column_name)
        held_out = list(leave_one_group_out(dataset, column))
        following = [*held_out[1:], held_out[0]]
        for (group, train, test), (other, _, validation) in zip(held_out, following, strict=True):
            if data_args.measure_on == "validation":
                group, train, test = other, sorted({*train} - {*validation}), validation
            yield group, dataset.select(train), dataset.select(test)


def accuracies(right: Sequence[str], answered: Sequence[str]) -> dict[str, float]:
    recall = recall_score(right, answered, labels=sorted({*right}), average="macro")
    return {"unweighted_accuracy": float(recall), "weighted_accuracy": float(accuracy_score(right, answered))}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure with a command line, by default that of the process; return the metrics."""
    model_args, data_args, args = recipes.parse_arguments(argv, EmotionArguments)
    one_split = data_args.eval_split_name is not None
    if not one_split and (args.push_to_hub or args.resume_from_checkpoint):
        raise ValueError("Folds make several adapters: --push_to_hub and --resume_from_checkpoint need one split.")
    leaks = "" if data_args.reference_split is None else "Utterances were shuffled: test speakers are in training."
    config = recipes.load_config(model_args.model_name_or_path)
    feature_extractor = recipes.load_feature_extractor(model_args, data_args)

    # Data: all folds are read before the first one is trained.
    splits = (data_args.train_split_name or "").split("+")
    dataset = concatenate_datasets(
        [recipes.read_split(data_args, split or None, config, args.seed) for split in splits]
    )
    column = find_column(dataset, "label", data_args.label_column_name)
    folds = []
    for fold, train, test in islice(read_folds(dataset, data_args, config, args.seed), data_args.folds):
        train = recipes.limit_rows(train, data_args.max_train_samples, args.seed)
        test = recipes.limit_rows(test, data_args.max_eval_samples, args.seed)
        folds.append((fold, train, test, label_names(train, test, column=column)))
    tests = [test for _, _, test, _ in folds]
    feature_extractor = recipes.fit_window(feature_extractor, model_args, data_args, dataset, *tests)

    def train_on(train: Dataset, emotions: list[str], folder: str | Path) -> Any:
        """Train an adapter, save it in the folder, and return its trainer."""
        train_args = copy.copy(args)
        train_args.output_dir = str(folder)
        set_seed(args.seed)
        config.update({"id2label": dict(enumerate(emotions)), "label2id": {n: i for i, n in enumerate(emotions)}})
        model = recipes.load_model(AutoModelForAudioClassification, model_args, config)
        data = recipes.training_columns(train, [emotions.index(name) for name in read_column(train, column)])
        trainer = recipes.make_trainer(
            model, model_args, train_args, "er", feature_extractor, data_args=data_args, train_dataset=data
        )
        trainer.train_and_save()
        return trainer

    by_fold: dict[str, dict[str, Any]] = {}
    all_right, all_answered = [], []
    for fold, train, test, emotions in folds:
        print(f"Fold {fold}: {len(train)} utterances in training, {len(test)} measured; {', '.join(emotions)}")
        trainer = train_on(train, emotions, args.output_dir if one_split else Path(args.output_dir, f"fold-{fold}"))
        logits = trainer.predict(test.select_columns(["audio", "duration_s"])).predictions
        right, answered = read_column(test, column), [emotions[best] for best in logits.argmax(-1)]
        all_right += right
        all_answered += answered
        files = [audio["path"] for audio in test["audio"]]
        recipes.write_table(trainer, "predictions.csv", {"file": files, column: right, "predicted": answered})
        protocol = f"{len(right)} utterances of {fold}. As shares of 1; unweighted is the mean recall. {leaks}".strip()
        measured = accuracies(right, answered)
        by_fold[fold] = recipes.save_results(trainer, measured, model_args, data_args, "er", protocol)

    summary: dict[str, Any] = {"eval_folds": ", ".join(by_fold)} | ({"eval_protocol": leaks} if leaks else {})
    for name in ("eval_unweighted_accuracy", "eval_weighted_accuracy"):
        values = [metrics[name] for metrics in by_fold.values()]
        summary[name] = float(np.mean(values))
        if len(values) > 1:
            summary[f"{name}_sd"] = float(np.std(values, ddof=1))
    last = next(reversed(by_fold.values()))
    summary |= {key: last[key] for key in last if not key.startswith("eval_")}
    if data_args.final:
        print(f"Final: all {len(dataset)} utterances in training")
        trainer = train_on(dataset, label_names(dataset, column=column), Path(args.output_dir, "final"))
        protocol = (
            f"Mean of {len(by_fold)} adapters, each measured on a fold that it was not trained on: "
            f"{summary['eval_folds']}. This adapter was trained on all {len(dataset)} utterances, and is not measured "
            f"itself. As shares of 1; unweighted is the mean recall. {leaks}"
        ).strip()
        figures = {name.removeprefix("eval_"): value for name, value in summary.items() if "accuracy" in name}
        recipes.save_results(trainer, figures, model_args, data_args, "er", protocol)
    plot_confusion(all_right, all_answered).savefig(Path(args.output_dir, "confusion.png"))
    for name in ("all_results.json", "eval_results.json"):
        Path(args.output_dir, name).write_text(json.dumps(summary, indent=4) + "\n", encoding="utf-8")
    return summary


if __name__ == "__main__":
    print(json.dumps(main()))
