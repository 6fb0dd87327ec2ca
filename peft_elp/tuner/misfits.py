"""Compare saved tensors with those of an adapter, before any of them is written into the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from zlib import crc32

import torch
from torch import Tensor, nn

from peft_elp.config import ELPConfig, differing_fields
from peft_elp.parameters import SETTINGS
from peft_elp.saved.weights import SavedTensor
from peft_elp.wording import shortened

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # an adapter may be saved in these


class Settings(nn.Module):
    """What an adapter computes beyond the shapes of its tensors, and the names of its labels, as two checksums.

    PEFT passes no configuration when it loads weights into an adapter that is there already, so the weights tell. The
    checksums are integers from 0 to 255, which no cast to half precision changes; without names they are 0.
    """

    def __init__(self, config: ELPConfig) -> None:
        super().__init__()
        chosen = {name: value for name, (value, _) in differing_fields(config, ELPConfig(), "computation").items()}
        head = chosen.pop("head_config", None) or {}
        used = {name: x for name, x in chosen.items() if name[1] != "_" or name[0].upper() in config.adapters}
        facts = ({**used, "tdnn_dilation": head.get("tdnn_dilation")}, head.get("id2label"))
        sums = [crc32(json.dumps(fact, sort_keys=True).encode()) if fact else 0 for fact in facts]
        self.register_buffer("checksums", torch.tensor([[*one.to_bytes(4, "big")] for one in sums]).float())


def refuse_other_settings(adapter_name: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse the weights of an adapter with other settings. What holds no checksums, as older files, is accepted."""
    for name in (name for name in own if SETTINGS in name and name in given):
        for one, other, what in zip(own[name].cpu(), given[name].cpu(), ("settings", "labels"), strict=False):
            whole = bool(((other - other.round()).abs() < 1e-2).all())  # else it was computed with
            if whole and one.any() and other.any() and not torch.equal(one.float(), other.float().round()):
                raise ValueError(
                    f"The weights are of an adapter with other {what} than {adapter_name!r}, which would answer "
                    "wrongly with them. Load them under another name, or call delete_adapter first."
                )


def find_misfits(expected: Mapping[str, Tensor], given: Mapping[str, SavedTensor], shapes: bool = True) -> str:
    """Say how saved tensors differ from those of an adapter; nothing if they do not."""
    both = [(name, expected[name], tensor) for name, tensor in given.items() if name in expected]
    found = {
        "missing": [
            f"{name} {_shape(tensor)}"
            for name, tensor in expected.items()
            if name not in given and SETTINGS not in name  # older files have none
        ],
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
            if saved.dtype in FLOATS and own.is_floating_point() and not is_usable(saved, own.dtype)
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
    """Refuse saved tensors that are not those of an adapter; see `find_misfits`."""
    found = find_misfits(expected, given, shapes)
    if found:
        raise ValueError(
            f"The saved tensors are not those of adapter {adapter_name!r} in {type(model).__name__}: {found}. Nothing "
            "was loaded. Load the adapter into the backbone that it was trained on (base_model_name_or_path in its "
            "adapter_config.json), from the folder that save_pretrained wrote."
        )


def is_usable(saved: SavedTensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite in a floating-point dtype, and their squares, as in a norm, in float32."""
    return saved.largest <= min(torch.finfo(dtype).max, 1e18)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))  # DeepSpeed's ZeRO-3 keeps the full shape there.
