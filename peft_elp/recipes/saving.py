"""What a recipe leaves behind: adapter, metrics, tables, figures and a card."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers import Trainer

from peft_elp.saved.card import describe
from peft_elp.speech.plots import plot_layer_weights
from peft_elp.wording import spreadsheet_cell

from .arguments import ModelArguments
from .methods import count_trained, has_elp

# The metrics that a card lists.
CARD_METRICS = ("wer", "cer", "eer", "min_dcf", "unweighted_accuracy", "weighted_accuracy", "accuracy")


def write_table(trainer: Trainer, name: str, columns: Mapping[str, Iterable[Any]]) -> None:
    """Write columns of values as a `.csv` file into the output folder of a trainer, once for all processes."""
    if trainer.is_world_process_zero():
        rows = [columns, *zip(*columns.values(), strict=True)]
        with Path(trainer.args.output_dir or ".", name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([spreadsheet_cell(cell) for cell in row] for row in rows)


def save_results(
    trainer: Any, metrics: dict[str, Any], model_args: ModelArguments, data_args: Any, task: str, protocol: str
) -> dict[str, Any]:
    """Save everything that is needed to use the trained adapter, with its metrics, figures and card.

    Args:
        trainer: The trainer, after training.
        metrics: The metrics; they are saved and returned with `eval_` before their names.
        model_args: The model arguments.
        data_args: The data arguments.
        task: "asr", "asv", "er" or "ic".
        protocol: How the metrics were measured, for the card.

    Returns:
        The metrics, with method, seed, steps and numbers of trained parameters.
    """
    folder, model, args = Path(trainer.args.output_dir or "."), trainer.model, trainer.args
    values = {name: round(metrics[name], 4) for name in CARD_METRICS if name in metrics}
    metrics = {f"eval_{name}": value for name, value in metrics.items()}
    metrics |= {"method": model_args.method, "seed": args.seed, **count_trained(model)}
    metrics["train_steps"] = trainer.state.global_step
    trainer.log({name: value for name, value in metrics.items() if isinstance(value, (int, float))})
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if has_elp(model) and trainer.is_world_process_zero():
        if "L" in model.peft_config["default"].adapters:
            plot_layer_weights({task: model}).savefig(folder / "layer_weights.png")
        trainer.processing_class.save_pretrained(folder)  # before the card, which looks for it
        is_local = Path(data_args.dataset_name).exists()
        name = Path(data_args.dataset_name).name if is_local else data_args.dataset_name
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        kind = "automatic-speech-recognition" if task == "asr" else "audio-classification"
        about = {"dataset_type": name, "dataset_name": name, "dataset_split": data_args.eval_split_name}
        results = [EvalResult(kind, **about, metric_type=name, metric_value=value) for name, value in values.items()]
        describe(
            model,
            # The trainer's id includes the name of the user.
            repo_id=getattr(trainer, "hub_model_id", None) or args.hub_model_id,
            datasets=[] if is_local else [name],
            metrics=results,
            protocol=f"{protocol} Trained for {metrics['train_steps']} steps of {batch_size} utterances.",
            seed=args.seed,
            training={"epochs": trainer.state.epoch, **{f"rate of {part}": x for part, x in trainer.rates.items()}},
        )
    trainer.save_model()
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics
