"""What the conformance tests do with an adapted model, and compare of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import result, shaken
from methods import Method, Model
from peft import PeftModel, get_peft_model
from torch import Tensor, nn


def adapted(
    method: Method, model: Model, *, adapter_name: str = "default", seed: int = 3, **options: Any
) -> PeftModel:
    """The model with one adapter that does something."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(model.make(), method.config(model, **options), adapter_name=adapter_name)
    return nudged(peft_model, seed)


def nudged(peft_model: Any, seed: int) -> Any:
    """The model with its trainable parameters moved, differently for each seed."""
    return shaken(peft_model, seed=seed).eval()


def pair(method: Method, model: Model, **options: Any) -> PeftModel:
    """The model with two different adapters, "default", which is active, and "other"."""
    peft_model = adapted(method, model, **options)
    peft_model.add_adapter("other", method.config(model, **options))
    peft_model.set_adapter("other")
    nudged(peft_model, 7)
    peft_model.set_adapter("default")
    return peft_model


def answer(module: Any, model: Model, **extra: Any) -> Tensor:
    """The output of a model for its inputs."""
    with torch.no_grad():
        return result(module(**model.inputs(), **extra))


def loss_of(module: Any, model: Model) -> Tensor:
    """A loss that every element of the output takes part in."""
    output = result(module(**model.inputs())).float()
    torch.manual_seed(5)
    return (output * torch.randn_like(output)).sum()


def of_adapter(module: nn.Module, method: Method, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, its copy of the head included."""
    return {
        key: parameter
        for key, parameter in module.named_parameters()
        if (method.prefix in key or ".modules_to_save." in key) and name in key.split(".")
    }


def same(one: Tensor, other: Tensor, **tolerance: float) -> None:
    """Assert that two answers agree."""
    torch.testing.assert_close(one, other, **tolerance or {"atol": 1e-6, "rtol": 1e-6})


def differ(*answers: Tensor) -> None:
    """Assert that no two of the answers agree."""
    for place, one in enumerate(answers):
        for other in answers[:place]:
            assert not torch.allclose(one, other, atol=1e-4), "two answers that should differ are alike"


def was_active() -> Any:
    """What PEFT says where the active adapter is deleted."""
    return pytest.warns(UserWarning, match="was active which is now deleted. Setting active adapter to")


def second_time() -> Any:
    """What PEFT says where a model is not adapted for the first time."""
    return pytest.warns(UserWarning, match="Already found a `peft_config` attribute")
