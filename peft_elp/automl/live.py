"""The chosen setting, trained further on the recordings themselves: with E-adapters and augmentation."""

from __future__ import annotations

import hashlib
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EarlyStoppingCallback, TrainerCallback

from peft_elp import recipes
from peft_elp.speech.audio import decode

from .features import Base
from .look import Recordings
from .reader import answer, class_weights, place, train_reader
from .report import percent
from .search import Candidate, Search

EPOCHS = 100  # at most
PATIENCE = 10  # epochs without a better answer for what is held out
BATCH_SIZE = 16
RATES = {"head": 3e-4, "L": 3e-4, "layer weights": 3e-3, "E": 1e-3}
TELEPHONE_HZ = 8_000  # a rate that leaves the band of telephones


def augmented(waveform: NDArray[Any], rate_hz: int, random: np.random.Generator) -> NDArray[Any]:
    """Change speed, band, loudness and noise of a recording at random; it gets no longer.

    Speed changes by up to 5 % and loudness by up to 10 dB; every fourth recording gets the band of a telephone; white
    noise lies 10 to 40 dB below the recording.
    """
    x = soxr.resample(waveform, rate_hz * random.uniform(0.95, 1.05), rate_hz)[: len(waveform)]
    if random.random() < 0.25:
        x = soxr.resample(soxr.resample(x, rate_hz, TELEPHONE_HZ), TELEPHONE_HZ, rate_hz)[: len(waveform)]
    noise = random.normal(size=len(x)) * np.sqrt(np.square(x).mean()) * 10 ** (-random.uniform(10, 40) / 20)
    return ((x + noise) * 10 ** (random.uniform(-10, 10) / 20)).astype(np.float32)


def until_best(training: Any, metric: str, is_cpu: bool, what: Any, **options: Any) -> dict[str, Any]:
    """Return the training arguments with which a trainer keeps its best epoch, by a metric of what is held out.

    The name of the folder for checkpoints depends on `what` is trained.
    """
    settings = training.base, training.seed, training.dtype, training.chunk_length, training.language
    name = hashlib.sha256(repr((settings, what)).encode()).hexdigest()[:16]
    return {
        "output_dir": str(training.work / f"live-{name}"),
        "num_train_epochs": EPOCHS,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "seed": training.seed,
        "use_cpu": is_cpu,
        "disable_tqdm": not training.progress,
        **options,
    }


def is_better(after: float, before: float, count: int) -> bool:
    """Return whether a score of some recordings is better than another by more than one standard error.

    Examples:
        >>> is_better(0.6, 0.5, count=100), is_better(0.54, 0.5, count=100)
        (True, False)
    """
    return after > before + (before * (1 - before) / count) ** 0.5


class _Until(TrainerCallback):
    """Ends a training at a time; it is evaluated once more."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= time.monotonic() > self.end

    def stop(self, *_: Any) -> None:
        self.end = 0.0


def fit(trainer: Any, seconds: float) -> None:
    """Train until it gets no better, for some seconds or to Ctrl-C; the best epoch is kept.

    A training that was killed goes on from its last checkpoint.
    """
    folder = Path(trainer.args.output_dir)
    complete = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime_ns)
    until = _Until(seconds)
    trainer.add_callback(EarlyStoppingCallback(PATIENCE))
    trainer.add_callback(until)
    in_main = current_thread() is main_thread()  # Signals reach no other.
    before = signal.signal(signal.SIGINT, until.stop) if in_main else None
    try:
        with redirect_stdout(StringIO()):  # its log
            trainer.train(resume_from_checkpoint=str(complete[-1].parent) if complete else None)
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)
    shutil.rmtree(folder, ignore_errors=True)  # Another training with the same arguments starts anew.


def train_live(
    training: Any, search: Search, encoder: Base, found: Recordings, chosen: Candidate
) -> tuple[tuple[Any, Tensor, Tensor] | None, str]:
    """Train the chosen setting further on what the first fold trains on, and say what came of it.

    It has to be better than the chosen setting by more than one standard error on what the fold holds out. Returned
    are the model with its answers for what is held out and for the test split, or None where it is not better; and a
    sentence for the report.
    """
    problem, fold, setting = search.problem, search.folds[0], chosen.setting
    reader, _, _ = train_reader(problem, setting, fold.train, stop=chosen.stop)
    before = search.score(fold.held_out, answer(problem, reader, fold.held_out))
    strongest = setting.layers[int(reader.shares.argmax())]
    layers = list(range(strongest + 1))  # What is above it changes nothing that is read there.
    model = encoder.adapted(adapters="EL", e_dim=max(8, encoder.hidden // 6), e_layers=layers, **setting.elp())
    place(reader.folded(), model)

    def rows(numbers: Sequence[int]) -> Any:
        return recipes.training_columns(found.rows.select(numbers), problem.labels[list(numbers)].tolist())

    random, rate_hz = np.random.default_rng(training.seed), encoder.extractor.sampling_rate
    weight = class_weights(problem, fold.train).to(encoder.device)

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return cross_entropy(outputs.logits.float(), labels, weight, label_smoothing=setting.smoothing)

    def collate(batch: Sequence[Any]) -> dict[str, Any]:
        return encoder.collate(
            [{**row, "audio": augmented(decode(row["audio"], rate_hz), rate_hz, random)} for row in batch]
        )

    def measure(predicted: Any) -> dict[str, float]:
        return {"score": search.score(fold.held_out, torch.tensor(predicted.predictions))}

    what = found.table["digest"].tolist(), problem.labels.tolist(), fold, chosen.setting, chosen.stop
    options = until_best(training, "score", encoder.device.type == "cpu", what, per_device_train_batch_size=BATCH_SIZE)
    more: dict[str, Any]
    kind, more = (
        (recipes.SpeakerTrainer, {}) if problem.verify else (recipes.RecipeTrainer, {"compute_loss_func": loss})
    )
    with redirect_stdout(StringIO()):
        trainer = kind(
            model,
            recipes.RecipeTrainingArguments(**options),
            rates=RATES,
            train_dataset=rows(fold.train),
            eval_dataset=rows(fold.held_out),
            data_collator=collate,
            processing_class=encoder.extractor,
            compute_metrics=measure,
            **more,
        )
    trainer.eval_collator = encoder.collate  # Answers are for the recordings as they are.
    where = f"on the recordings themselves, with E-adapters in layers 0 to {strongest} and augmentation"
    training.say(f"Training it further {where}.")
    fit(trainer, 60 * training.minutes)
    trainer.compute_metrics = None  # It measures what is held out.
    asked = (rows(numbers) for numbers in (fold.held_out, found.where("test")) if numbers)
    answers = [torch.tensor(trainer.predict(one).predictions) for one in asked]
    after = search.score(fold.held_out, answers[0])
    said = f"Trained {where}: {percent(after)} against {percent(before)} on {len(fold.held_out)} held-out recordings"
    if not is_better(after, before, len(fold.held_out)):
        return None, f"{said}. That is not clearly better, and was not kept."
    return (model.eval(), answers[0], answers[-1]), f"{said}. That was kept."
