"""Whether saved tensors are those of an adapter in the model, before any of them is written into it."""

from __future__ import annotations

from torch import Tensor, nn

from peft_elp.parameters import belongs_to

from .head import Head

SHOWN = 4


def with_head(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with those of the head under the names of the adapter's own copies in the model."""
    named = dict(state_dict)
    for path, head in model.named_modules():
        if isinstance(head, Head) and adapter_name in head.modules_to_save:
            for name in head.modules_to_save[adapter_name].state_dict():
                if f"{path}.{name}" in named:
                    named[f"{path}.modules_to_save.{adapter_name}.{name}"] = named.pop(f"{path}.{name}")
    return named


def misfits(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> str:
    """What tells saved tensors from those of an adapter, but for their shapes; empty if nothing does.

    Args:
        model: The model that has the adapter.
        adapter_name: Its name.
        state_dict: The saved tensors, by their names in the model.
    """
    tensors = model.state_dict()
    own = {name: tensor for name, tensor in tensors.items() if belongs_to(adapter_name, name)}
    return _listed(
        {
            "missing": [f"{name} {_shape(tensor)}" for name, tensor in own.items() if name not in state_dict],
            "left over": [
                f"{name} {_shape(tensor)}"
                for name, tensor in state_dict.items()
                if name not in tensors and name.removeprefix("base_model.model.") not in tensors
            ],
            "not finite": [name for name in own if name in state_dict and not is_finite(state_dict[name])],
        }
    )


def mismatches(model: nn.Module, state_dict: dict[str, Tensor]) -> str:
    """Which of some tensors are of another shape than those of that name in the model; empty if none is."""
    own = model.state_dict()
    return _listed(
        {
            "of another shape": [
                f"{name} {_shape(tensor)} in place of {_shape(own[name])}"
                for name, tensor in state_dict.items()
                if name in own and _shape(tensor) != _shape(own[name])
            ]
        }
    )


def misfit_error(model: nn.Module, adapter_name: str, what: str) -> ValueError:
    """The error about an adapter that was not loaded."""
    return ValueError(
        f"The saved tensors are not those of adapter {adapter_name!r} in {type(model).__name__}: {what}. Nothing was "
        "loaded. Load the adapter into the backbone that it was trained on (base_model_name_or_path in its "
        "adapter_config.json), from the folder as save_pretrained wrote it."
    )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))  # DeepSpeed's ZeRO-3 keeps the parts elsewhere


def is_finite(tensor: Tensor) -> bool:
    """Whether all of its values are finite numbers."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    low, high = tensor.aminmax()  # both are NaN where one value is; half the time of isfinite().all()
    return bool(low.isfinite() & high.isfinite())


def _listed(problems: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for what, names in problems.items()
        if names
    )
