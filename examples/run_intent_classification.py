r"""Train an adapted speech encoder for intent classification, as in the paper on Fluent Speech Commands.

    python examples/make_demo_data.py
    python examples/run_intent_classification.py --model_name_or_path demo/encoder --dataset_name demo/intents \
        --slot_column_names action object location --learning_rate 1e-3 --output_dir outputs/intents

The intent is one column, or the combination of several slots. With `--slot_heads joint`, each combination in training
is a class; with `separate` each slot has classes of its own, and the model can answer any combination.

Measured: `accuracy`, the share of utterances with the right intent. With slots, this is the exact match of all of
them, also given as `exact_match`, beside `accuracy_<slot>` for each. `predictions.csv` has every utterance.
"""

from dataclasses import dataclass, field

from peft_elp_options import DataArguments, check_command_line, option


@dataclass
class IntentArguments(DataArguments):
    """The recordings and their intents."""

    label_column_name: str | None = option(None, "Column with the intent. Default: label, intent or command.")
    slot_column_names: list[str] = field(
        default_factory=list, metadata={"help": "The slots whose combination is the intent, instead of a label."}
    )
    slot_heads: str = option("joint", "Classes of combinations, or of each slot.", choices=("joint", "separate"))
    allow_unseen: bool = option(False, "Count intents that training lacks as wrong, instead of refusing them.")
    validation_split_name: str | None = option(None, "Split that --eval_strategy evaluates on during training.")


if __name__ == "__main__":
    check_command_line(IntentArguments, __doc__)  # before PyTorch is imported, which takes seconds

import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForAudioClassification

from peft_elp import recipes
from peft_elp.speech.data import find_column, read_column

EMPTY_SLOT = "(none)"
Answer = tuple[str, ...]  # the value of each column


def read_answers(dataset: Dataset, columns: Sequence[str]) -> list[Answer]:
    """The right answer to each utterance: its label, or the value of each slot, "(none)" where it is empty."""
    if len(columns) > 1:
        for column in set(columns) & set(dataset.column_names):
            filled = [str(value or "").strip() or EMPTY_SLOT for value in dataset.with_format(None)[column]]
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
    """Train and measure with a command line, by default that of the process; return the metrics."""
    model_args, data_args, args = recipes.parse_arguments(argv, IntentArguments)
    config = recipes.load_config(model_args.model_name_or_path)
    feature_extractor = recipes.load_feature_extractor(model_args, data_args)

    # Data
    train = recipes.read_split(data_args, data_args.train_split_name, config, args.seed, data_args.max_train_samples)
    test = recipes.read_split(data_args, data_args.eval_split_name, config, args.seed, data_args.max_eval_samples)
    columns = data_args.slot_column_names or [find_column(train, "label", data_args.label_column_name)]
    answers, test_answers = read_answers(train, columns), read_answers(test, columns)
    # A head is a group of columns that share classes: all columns, or one head per column.
    joint = data_args.slot_heads == "joint"
    heads = [range(len(columns))] if joint else [range(i, i + 1) for i in range(len(columns))]
    classes = [sorted({tuple(answer[i] for i in head) for answer in answers}) for head in heads]
    sizes = [len(known) for known in classes]
    if max(sizes) < 2:
        raise ValueError(f"Training has one intent in {', '.join(columns)}: {classes[0][0]}. Two are needed.")
    names = [", ".join(known) for known in classes[0]]
    if not joint:
        names = [f"{column}: {value}" for column, known in zip(columns, classes, strict=True) for (value,) in known]
    print(f"{len(train)} utterances in training, {len(test)} in test; {len(names)} classes")

    def labelled(dataset: Dataset, answers: list[Answer]) -> Dataset:
        """With the number of the class in each head, or -100 for a class that training lacks."""
        numbers = [{answer: number for number, answer in enumerate(known)} for known in classes]
        labels = [
            [number.get(tuple(answer[i] for i in head), -100) for head, number in zip(heads, numbers, strict=True)]
            for answer in answers
        ]
        if unseen := [answer for answer, row in zip(answers, labels, strict=True) if -100 in row]:
            message = (
                f"{len(unseen)} of {len(labels)} utterances have an intent or slot value that training lacks, such as "
                f"{', '.join(unseen[0])}."
            )
            if not data_args.allow_unseen:
                raise ValueError(
                    f"{message} --allow_unseen True counts them as wrong; --slot_heads separate accepts new "
                    "combinations of known values."
                )
            warnings.warn(f"{message} They count as wrong.", stacklevel=2)
        return recipes.training_columns(dataset, labels)

    validation, validation_answers = None, []
    if (name := data_args.validation_split_name) is not None:
        rows = recipes.read_split(data_args, name, config, args.seed, data_args.max_eval_samples)
        validation_answers = read_answers(rows, columns)
        validation = labelled(rows, validation_answers)

    # Model
    used = [rows for rows in (train, test, validation) if rows is not None]
    feature_extractor = recipes.fit_window(feature_extractor, model_args, data_args, *used)
    config.update({"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}})
    model = recipes.load_model(AutoModelForAudioClassification, model_args, config)

    # Metric
    def answers_to(logits: np.ndarray) -> list[Answer]:
        best = [part.argmax(-1) for part in np.split(logits, np.cumsum(sizes)[:-1], axis=-1)]
        return [sum((known[i] for known, i in zip(classes, row, strict=True)), ()) for row in zip(*best, strict=True)]

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        parts = zip(outputs.logits.split(sizes, dim=-1), labels.unbind(-1), strict=True)
        cross_entropy = torch.nn.CrossEntropyLoss(reduction="sum", label_smoothing=args.label_smoothing_factor)
        total = sum(cross_entropy(*part) for part in parts)
        return total / (num_items_in_batch or (labels >= 0).sum().clamp(min=1))

    # Train
    options = {"train_dataset": labelled(train, answers), "eval_dataset": validation, "compute_loss_func": loss}
    options["compute_metrics"] = lambda found: accuracies(validation_answers, answers_to(found.predictions), columns)
    trainer = recipes.make_trainer(model, model_args, args, "ic", feature_extractor, data_args=data_args, **options)
    test = labelled(test, test_answers)  # before the training, because it may be refused
    trainer.train_and_save()

    # Measure and save
    answered = answers_to(trainer.predict(test.remove_columns("labels")).predictions)
    table: dict[str, Any] = {"file": [audio["path"] for audio in test["audio"]]}
    table |= dict(zip(columns, zip(*test_answers, strict=True), strict=True))
    table |= zip((f"predicted_{column}" for column in columns), zip(*answered, strict=True), strict=True)
    recipes.write_table(trainer, "predictions.csv", table)
    metrics = accuracies(test_answers, answered, columns)
    protocol = f"Intent: {', '.join(columns)}; {len(names)} classes. As shares of 1."
    return recipes.save_results(trainer, metrics, model_args, data_args, "ic", protocol)


if __name__ == "__main__":
    print(json.dumps(main()))
