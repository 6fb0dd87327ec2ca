"""Compare saved tensors with those of an adapter, before any of them is written into the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_elp.saved.weights import SavedTensor
from peft_elp.wording import shortened

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # an adapter may be saved in these


def find_misfits(expected: Mapping[str, Tensor], given: Mapping[str, SavedTensor], shapes: bool = True) -> str:
    """Say how saved tensors differ from those of an adapter.

    Returns:
        The differences in words; empty if there are none.
    """
    both = [(name, expected[name], tensor) for name, tensor in given.items() if name in expected]
    found = {
        "missing": [f"{name} {_shape(tensor)}" for name, tensor in expected.items() if name not in given],
        "left over": [f"{name} {tensor.shape}" for name, tensor in given.items() if name not in expected],
        "of another shape": [
            f"{name} {saved.shape} in place of {_shape(own)}"
            for name, own, saved in both
            if shapes and saved.shape != _shape(own)
        ],
        "of a wrong dtype": [
            f"{name} {saved.dtype}" for name, own, saved in both if (saved.dtype in FLOATS) != own.is_floating_point()
        ],
        "not finite or too large": [
            name
            for name, own, saved in both
            if saved.dtype in FLOATS and own.is_floating_point() and not saved.largest <= _limit(own.dtype)
        ],
    }
    return "; ".join(f"{len(names)} {what} ({shortened(names, shown=4)})" for what, names in found.items() if names)


def refuse_misfits(
    model: nn.Module,
    adapter_name: str,
    expected: Mapping[str, Tensor],
    given: Mapping[str, SavedTensor],
    shapes: bool = True,
) -> None:
    """Refuse saved tensors that are not those of an adapter; see `find_misfits`.

    Raises:
        ValueError: They differ.
    """
    found = find_misfits(expected, given, shapes)
    if found:
        raise ValueError(
            f"The saved tensors are not those of adapter {adapter_name!r} in {type(model).__name__}: {found}. Nothing "
            "was loaded. Load the adapter into the backbone that it was trained on (base_model_name_or_path in its "
            "adapter_config.json), from the folder that save_pretrained wrote."
        )


def _limit(dtype: torch.dtype) -> float:
    """Return the largest value that a tensor may have: its square, as in a norm, is finite in float32."""
    return min(torch.finfo(dtype).max, 1e18)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))  # DeepSpeed's ZeRO-3 keeps the full shape there.
