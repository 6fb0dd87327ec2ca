"""Intent classification with an adapted speech encoder, as in the paper on Fluent Speech Commands.

    python examples/make_demo_data.py
    python examples/run_intent_classification.py --model_name_or_path demo/encoder --dataset_name demo/intents \
        --slot_column_names action object location --learning_rate 1e-3 --output_dir outputs/intents

The intent is one column, or the combination of several slots. With `--slot_heads joint`, each combination that
training meets is a class; with `separate` each slot has classes of its own, and any combination can be answered.

Measured: `accuracy`, the share of utterances with the right intent. With slots, that is the exact match of all of
them, also given as `exact_match`, beside `accuracy_<slot>` for each. `predictions.csv` has every utterance.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from recipe import DataArguments, load_config, make_trainer, option, parse, read_split, save, with_labels, write_rows
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from peft_elp.data import read_column

NOT_SAID = "(none)"
Answer = tuple[str, ...]  # the value of each column


@dataclass
class IntentArguments(DataArguments):
    """The recordings, and where their intents are."""

    label_column_name: str = option("label", "The intent, where it is in one column.")
    slot_column_names: list[str] = field(
        default_factory=list, metadata={"help": "The slots whose combination is the intent, in place of a label."}
    )
    slot_heads: str = option("joint", "Classes of combinations, or of each slot.", choices=("joint", "separate"))
    allow_unseen: bool = option(False, "Count what training does not meet as wrong, rather than refuse it.")
    validation_split_name: str | None = option(None, "What --eval_strategy evaluates on while training.")


def read_answers(dataset: Dataset, columns: Sequence[str]) -> list[Answer]:
    """What is right for each utterance: its label, or the value of each slot, "(none)" where it is blank."""
    if len(columns) > 1:
        for column in set(columns) & set(dataset.column_names):
            filled = [str(value or "").strip() or NOT_SAID for value in dataset.with_format(None)[column]]
            dataset = dataset.remove_columns(column).add_column(column, filled)  # pyright: ignore[reportCallIssue]
    return list(zip(*(read_column(dataset, column) for column in columns), strict=True))


def accuracies(right: Sequence[Answer], answered: Sequence[Answer], columns: Sequence[str]) -> dict[str, float]:
    same = np.array(right) == np.array(answered)
    metrics = {"accuracy": float(same.all(axis=1).mean())}
    if len(columns) > 1:
        metrics["exact_match"] = metrics["accuracy"]
        metrics |= {f"accuracy_{column}": float(same[:, i].mean()) for i, column in enumerate(columns)}
    return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure with a command line, by default that of the process; returns the metrics."""
    model_args, data_args, args = parse(argv, IntentArguments)
    config = load_config(model_args)
    train = read_split(data_args, data_args.train_split_name, config, args.seed, data_args.max_train_samples)
    test = read_split(data_args, data_args.eval_split_name, config, args.seed, data_args.max_eval_samples)
    validation = read_split(data_args, name, config, args.seed) if (name := data_args.validation_split_name) else None

    columns = data_args.slot_column_names or [data_args.label_column_name]
    answers = {id(rows): read_answers(rows, columns) for rows in (train, test, validation) if rows is not None}
    # A head is a range of the classifier's outputs: one for all columns together, or one for each.
    joint = data_args.slot_heads == "joint"
    heads = [range(len(columns))] if joint else [range(i, i + 1) for i in range(len(columns))]
    classes = [sorted({tuple(answer[i] for i in head) for answer in answers[id(train)]}) for head in heads]
    sizes = [len(known) for known in classes]
    if max(sizes) < 2:
        raise ValueError(f"Training has one intent in {', '.join(columns)}: {classes[0][0]}. Two are needed.")
    names = [", ".join(known) for known in classes[0]]
    if not joint:
        names = [f"{column}: {value}" for column, known in zip(columns, classes, strict=True) for (value,) in known]
    print(f"{len(train)} utterances in training, {len(test)} in test; {len(names)} classes")

    def labels_of(rows: Dataset) -> list[list[int]]:
        """The number of the class under each head; -100 for one that training does not meet."""
        numbers = [{answer: number for number, answer in enumerate(known)} for known in classes]
        found = [
            [number.get(tuple(answer[i] for i in head), -100) for head, number in zip(heads, numbers, strict=True)]
            for answer in answers[id(rows)]
        ]
        if unseen := [answer for answer, labels in zip(answers[id(rows)], found, strict=True) if -100 in labels]:
            message = (
                f"{len(unseen)} of {len(found)} utterances have an intent, or a value of a slot, that training does "
                f"not meet, such as {', '.join(unseen[0])}."
            )
            if not data_args.allow_unseen:
                raise ValueError(
                    f"{message} --allow_unseen True counts them as wrong; with slots, --slot_heads separate takes new "
                    "combinations of known values."
                )
            warnings.warn(f"{message} They count as wrong.", stacklevel=2)
        return found

    def answers_to(logits: np.ndarray) -> list[Answer]:
        best = [part.argmax(-1) for part in np.split(logits, np.cumsum(sizes)[:-1], axis=-1)]
        return [sum((known[i] for known, i in zip(classes, row, strict=True)), ()) for row in zip(*best, strict=True)]

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        parts = zip(outputs.logits.split(sizes, dim=-1), labels.unbind(-1), strict=True)
        total = sum(torch.nn.functional.cross_entropy(part, label, reduction="sum") for part, label in parts)
        return total / (num_items_in_batch or (labels >= 0).sum().clamp(min=1))

    config.update({"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}})
    feature_extractor = AutoFeatureExtractor.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForAudioClassification.from_pretrained(model_args.model_name_or_path, config=config)
    trainer = make_trainer(
        model,
        model_args,
        args,
        "ic",
        feature_extractor,
        train_dataset=with_labels(train, labels_of(train)),
        eval_dataset=with_labels(validation, labels_of(validation)) if validation is not None else None,
        compute_loss_func=loss,
        compute_metrics=lambda found: accuracies(answers[id(validation)], answers_to(found.predictions), columns),  # pyright: ignore
    )
    trainer.fit()

    trainer.compute_metrics = None
    predicted = trainer.predict(with_labels(test, labels_of(test)), metric_key_prefix="eval")
    answered = answers_to(predicted.predictions)
    right = answers[id(test)]
    scores = accuracies(right, answered, columns)
    metrics = predicted.metrics | {f"eval_{name}": score for name, score in scores.items()}
    write_rows(
        trainer,
        "predictions.csv",
        ["file", *columns, *(f"predicted_{column}" for column in columns)],
        [(row["path"], *x, *y) for row, x, y in zip(test["audio"], right, answered, strict=True)],
    )
    protocol = f"Intent: {', '.join(columns)}; {len(names)} classes. As shares of 1."
    return save(trainer, metrics, model_args, data_args, "ic", protocol)


if __name__ == "__main__":
    print(json.dumps(main()))
