"""Transformers' `Trainer` with a learning rate for each part."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer

from peft_elp import FeatureCache, check_gradients
from peft_elp.feature_cache import CACHED
from peft_elp.optim import create_optimizer, get_epochwise_schedule
from peft_elp.speech.speakers import is_padding_invariant

from .arguments import ModelArguments
from .collator import Collator
from .methods import adapt, count_trained, has_elp, trained_parameters
from .rates import learning_rates, schedule_factors


class RecipeTrainer(Trainer):
    """A `Trainer` with a learning rate for each part, whose predictions keep the order of the data set.

    Where the encoder or the head reads the padding of a batch, recordings are evaluated one at a time, as
    `SpeechAdapter` does. The first training step checks that every trained parameter of an adapter gets a gradient.

    Args:
        args: Arguments of `Trainer`.
        rates: The learning rate of each part, as `learning_rates` returns it.
        factors: Factors of the rates over the training, for `get_epochwise_schedule`. None: `--lr_scheduler_type`.
        kwargs: Arguments of `Trainer`; `processing_class` is the feature extractor.

    Raises:
        ValueError: Several devices in one process would share a padded batch that the encoder must not see.
        RuntimeError: In training: parameters of an adapter got no gradient.
    """

    def __init__(
        self, *args: Any, rates: Mapping[str, float], factors: Sequence[float] | None = None, **kwargs: Any
    ) -> None:
        self.rates, self.factors = rates, factors
        super().__init__(*args, **kwargs)
        self.eval_collator = self.data_collator
        # Trainer concludes from the models' **kwargs that they divide the loss by the size of the whole step. They do
        # not, and the gradients of accumulated batches would be too large.
        self.model_accepts_loss_kwargs = False
        self.unchecked = hasattr(self.model, "peft_config") and not self.is_deepspeed_enabled  # It keeps gradients.
        assert self.model is not None
        if not is_padding_invariant(self.model, self.processing_class):
            if self.args.n_gpu > 1:
                raise ValueError(
                    f"This encoder or head reads the padding of a batch, and {self.args.n_gpu} devices in one process "
                    "share batches. Start one process per device with `accelerate launch`, or use one device."
                )
            print("Evaluated one recording at a time: the encoder or head reads the padding of a batch.")  # noqa: T201
            self.args.per_device_eval_batch_size = 1

    def train_and_save(self) -> None:
        """Train, and save the result before it is evaluated."""
        trained = self.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        self.save_metrics("train", trained.metrics)
        self.save_model()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        args[1].pop("pieces", None)
        loss = super().training_step(*args, **kwargs)
        if self.unchecked:
            assert self.model is not None
            check_gradients(self.model)
            self.unchecked = False
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        pieces = inputs.pop("pieces", None)
        loss, answers, labels = self.answer(model, inputs, *args, **kwargs)
        if pieces is not None:  # Answers are averaged over the pieces of a recording.
            if answers is not None:
                answers = torch.stack([piece.mean(0) for piece in answers.split(pieces.tolist())])
            labels = labels if labels is None else labels[pieces.cumsum(0) - 1]
        return loss, answers, labels

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """Return loss, answers and labels of a batch, one for each piece of a recording."""
        return super().prediction_step(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            model: Any = self.model
            optimizer_cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)  # --optim
            options.pop("lr")
            if has_elp(model):
                options |= {"rates": self.rates, "weight_decay": self.args.weight_decay}
                self.optimizer = create_optimizer(model, optimizer_cls, **options)
            else:
                decayed = set(self.get_decay_parameter_names(model))
                groups = [
                    {"params": held, "lr": self.rates[part], "weight_decay": self.args.weight_decay * decay}
                    for part, named in trained_parameters(model).items()
                    for decay in (True, False)
                    if (held := [p for name, p in named.items() if (name in decayed) == decay])
                ]
                self.optimizer = optimizer_cls(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.factors is not None and self.lr_scheduler is None:
            self.lr_scheduler = get_epochwise_schedule(optimizer or self.optimizer, self.factors, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if not has_elp(self.model):  # ELPConfig writes a card of its own.
            super().create_model_card(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        # Trainer would group the recordings of evaluation by length, as it does in training.
        dataset, args = self.eval_dataset if eval_dataset is None else eval_dataset, self.args
        options = {"num_workers": args.dataloader_num_workers, "pin_memory": args.dataloader_pin_memory}
        loader = DataLoader(dataset, args.eval_batch_size, collate_fn=self.eval_collator, **options)  # pyright: ignore
        return self.accelerator.prepare(loader)

    get_test_dataloader: Any = get_eval_dataloader


def long_audio(data_args: Any) -> dict[str, Any]:
    """Return the options of `Collator` that `--on_long_audio` sets."""
    if data_args is None or data_args.on_long_audio not in ("crop", "split"):
        return {}
    return {"on_long_audio": data_args.on_long_audio, "longest_s": data_args.max_duration_in_seconds}


def make_trainer(
    model: PreTrainedModel,
    model_args: ModelArguments,
    args: Any,
    task: str,
    feature_extractor: Any,
    trainer_cls: type[RecipeTrainer] = RecipeTrainer,
    data_args: Any = None,
    **options: Any,
) -> Any:
    """Adapt a model by `--method` and make its trainer; prints the trained parameters and their rates.

    Call `train_and_save()` next.

    Args:
        model: A pretrained model with the head of the task.
        model_args: The model arguments.
        args: The training arguments.
        task: "asr", "asv", "er" or "ic", as in `peft_elp.published_rates`.
        feature_extractor: The feature extractor, which is saved with the adapter.
        trainer_cls: `RecipeTrainer` or a subclass.
        data_args: The data arguments, which tell what to do with long recordings. None: they are refused.
        options: Further arguments of the trainer, such as `train_dataset`.

    Raises:
        ValueError: The settings do not fit the model or each other.
    """
    if task == "asr" and args.label_smoothing_factor:
        raise ValueError("--label_smoothing_factor smooths classes, and is not used for recognition. Remove it.")
    adapted = adapt(model, model_args)
    rates = learning_rates(adapted, model_args, args, task)
    print(f"Trained: {count_trained(adapted)}, at rates {rates}")  # noqa: T201
    collate: Any = Collator(feature_extractor, adapted, **long_audio(data_args))
    if model_args.cache_features is not None:
        if options.get("crop_s") is not None:
            raise ValueError("--cache_features needs whole recordings. Remove it, or --crop_length_in_seconds.")
        if collate.on_long_audio == "split":
            raise ValueError("--cache_features takes no pieces of recordings. Choose another --on_long_audio.")
        if getattr(adapted.config, "apply_spec_augment", False):
            print("SpecAugment is off: cached features are not masked.")  # noqa: T201
            adapted.config.apply_spec_augment = False
        cache = FeatureCache(adapted, model_args.cache_features, getattr(torch, model_args.cache_dtype))
        options["train_dataset"], whole = cache.read(options["train_dataset"], collate), collate
        collate = lambda examples: cache.collate(examples) if CACHED in examples[0] else whole(examples)  # noqa: E731
    options |= {"data_collator": collate, "processing_class": feature_extractor, "rates": rates}
    if args.early_stopping_patience is not None:
        options["callbacks"] = [EarlyStoppingCallback(args.early_stopping_patience)]
    factors = schedule_factors(adapted, task) if model_args.published_schedule else None
    return trainer_cls(adapted, args, factors=factors, **options)
