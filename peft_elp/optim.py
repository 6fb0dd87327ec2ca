"""A learning rate for each part: head, L, E, P and layer norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_pt_utils import get_parameter_names

from .parameters import parameters_by_part
from .wording import shortened

LAYER_WEIGHTS = "layer weights"  # a separate part for optimizers; everywhere else they count as L
LAYER_WEIGHTS_RATIO = 30.0  # their default learning rate, as a multiple of the rate of L
# Besides `nn.LayerNorm`, Trainer does not decay parameters with these names. It keeps the patterns in a method.
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def parameter_groups(
    model: nn.Module, rates: Mapping[str, float], adapter_name: str = "default", weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Group the trainable parameters of an adapter for an optimizer by part, each part with its learning rate.

    Args:
        model: A model with ELP-adapters, as `get_peft_model` returns it.
        rates: The learning rate of each trained part: "head", "L", "layer weights" (the layer weights of L; by default
            30 times the rate of L), "E", "P" and "layer norms". `published_rates` returns the published ones.
        adapter_name: The adapter.
        weight_decay: Weight decay. As in Transformers' `Trainer`, biases and the weights of norms have none.

    Returns:
        One group for each part in the order of `rates`, or two with weight decay. Besides PyTorch's keys, each group
        has the key "part" with the name of its part.

    Raises:
        ValueError: `rates` has an unknown part or one that is not trained, or lacks a trained part; a rate is not a
            positive number; a trainable parameter belongs to no part; or the model has no such adapter.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
        >>> from peft_elp import ELPConfig
        >>> size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> config = ELPConfig(adapters="L", l_dim=8, train_layer_norms=False)
        >>> model = get_peft_model(Wav2Vec2ForCTC(Wav2Vec2Config(**size, layerdrop=0.0)), config)
        >>> [(group["part"], group["lr"]) for group in parameter_groups(model, {"head": 1e-3, "L": 1e-4})]
        [('head', 0.001), ('L', 0.0001), ('layer weights', 0.003)]
    """
    parts = _trained_by_part(model, adapter_name)
    trained = [part for part in parts if parts[part]]
    if "L" in rates and LAYER_WEIGHTS in trained:
        rates = {**rates, LAYER_WEIGHTS: rates.get(LAYER_WEIGHTS, LAYER_WEIGHTS_RATIO * rates["L"])}
        if "L" not in trained:  # With l_dim=0 there is nothing else in L.
            del rates["L"]
    for part, rate in rates.items():
        if part not in trained:
            raise ValueError(
                f"rates has {part!r}, which adapter {adapter_name!r} does not train. It trains "
                f"{', '.join(map(repr, trained)) or 'no part (in inference mode?)'}. Remove {part!r} from rates."
            )
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise ValueError(f"The learning rate of {part!r} must be a positive number, got {rate!r}. Write 1e-4.")
    for part in trained:
        if part not in rates:
            raise ValueError(
                f"rates has no {part!r}, but adapter {adapter_name!r} trains {len(parts[part])} tensors of that part, "
                f"such as {next(iter(parts[part]))}. Add a rate for {part!r}, or freeze them."
            )
    covered = {name for held in parts.values() for name in held}
    others = [name for name, p in model.named_parameters() if p.requires_grad and name not in covered]
    if others:
        raise ValueError(
            f"{len(others)} trainable tensors belong to no part of adapter {adapter_name!r}: "
            f"{shortened(others, shown=3)}. Freeze them, or name their module in modules_to_save."
        )

    decayed = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY)) if weight_decay else set()
    groups = [
        {
            "params": [p for name, p in parts[part].items() if (name in decayed) == bool(decay)],
            "lr": rate,
            "weight_decay": decay,
            "part": part,
        }
        for part, rate in rates.items()
        for decay in dict.fromkeys((weight_decay, 0.0))  # one of them where they are the same
    ]
    return [group for group in groups if group["params"]]


def _trained_by_part(model: nn.Module, adapter_name: str) -> dict[str, dict[str, nn.Parameter]]:
    """Return the trainable parameters of an adapter by part, the layer weights apart from the rest of L."""
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for part, held in parameters_by_part(model, adapter_name).items():
        trained = {name: p for name, p in held.items() if p.requires_grad}
        parts[part] = {name: p for name, p in trained.items() if not name.endswith(".layer_weights")}
        if part == "L":
            parts[LAYER_WEIGHTS] = {name: p for name, p in trained.items() if name not in parts[part]}
    return parts


def create_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = AdamW,
    *,
    rates: Mapping[str, float],
    adapter_name: str = "default",
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """Create an optimizer for an adapter, with a learning rate for each part.

    Pass it to Transformers as `Trainer(..., optimizers=(optimizer, None))`. The trainer adds its own schedule.

    Args:
        model: A model with ELP-adapters, as `get_peft_model` returns it.
        optimizer_cls: The optimizer. AdamW without weight decay, the default, is the Adam of the publications.
        rates: The learning rate of each trained part, as for `parameter_groups`.
        adapter_name: The adapter.
        weight_decay: Weight decay. As in `Trainer`, biases and the weights of norms have none.
        kwargs: Further arguments of `optimizer_cls`, such as `betas`.

    Raises:
        ValueError: `rates` does not fit the adapter; see `parameter_groups`.
        TypeError: `lr` is among `kwargs`.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import WavLMConfig, WavLMForCTC
        >>> from peft_elp import ELPConfig, create_optimizer, published_rates
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, layerdrop=0.0)
        >>> model = get_peft_model(WavLMForCTC(WavLMConfig(vocab_size=8, **size)), ELPConfig.preset("e+l"))
        >>> optimizer = create_optimizer(model, rates=published_rates("e+l", "asr"))
        >>> [(group["part"], group["lr"]) for group in optimizer.param_groups]
        [('head', 0.002), ('L', 0.001), ('layer weights', 0.001), ('E', 0.001), ('layer norms', 0.001)]
    """
    if "lr" in kwargs:
        raise TypeError(f"lr={kwargs['lr']!r} would have no effect: pass the learning rate of each part in rates.")
    return optimizer_cls(parameter_groups(model, rates, adapter_name, weight_decay), **kwargs)


def get_epochwise_schedule(
    optimizer: Optimizer, factors: Sequence[float], num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """Create a schedule that divides the training into equal parts, each with one factor for all learning rates.

    At step `s` of `S` the factor is `factors[floor(s * len(factors) / S)]`. With as many epochs as factors, each epoch
    has one factor; a longer or shorter training keeps the shape. `published_factors` returns the published ones.

    Args:
        optimizer: The optimizer, with the learning rates that belong to a factor of 1.
        factors: One or more numbers of at least 0.
        num_training_steps: Steps of the optimizer in the whole training, at least 1. `Trainer` takes
            `epochs * ceil(len(train_dataset) / (batch size * devices * gradient_accumulation_steps))`, or `max_steps`.
        last_epoch: To resume a training, the number of finished steps minus one.

    Raises:
        ValueError: `factors` is empty, a factor is negative or not finite, or `num_training_steps` is below 1.

    Examples:
        >>> optimizer = AdamW(nn.Linear(1, 1).parameters(), lr=1.0)
        >>> schedule = get_epochwise_schedule(optimizer, [0.5, 1.0], num_training_steps=4)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates += schedule.get_last_lr()
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.5, 0.5, 1.0, 1.0]
    """
    if not len(factors) or not all(0 <= factor < math.inf for factor in factors):
        raise ValueError(f"factors must be one or more numbers of at least 0, got {factors!r}. Write [1.0, 0.1].")
    if num_training_steps < 1:
        raise ValueError(
            f"num_training_steps must be at least 1, got {num_training_steps!r}: the steps of all epochs."
        )
    return LambdaLR(optimizer, partial(_factor_at, factors=tuple(factors), steps=num_training_steps), last_epoch)


def _factor_at(step: int, *, factors: tuple[float, ...], steps: int) -> float:
    return factors[min(step * len(factors) // steps, len(factors) - 1)]
