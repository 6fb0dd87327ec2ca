"""The file with the tensors of a saved adapter: where it is, and what is in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from peft_elp.wording import first_line, shortened

FILES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)  # in the order in which PEFT looks for them
# int64 is for the counters of batch norms in a head.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a file of weights, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    largest: float  # the largest absolute value; NaN or infinite if a value is

    @classmethod
    def of(cls, tensor: Tensor) -> SavedTensor:
        """Describe a tensor."""
        if tensor.dtype not in DTYPES or not tensor.numel() or tensor.is_meta:
            return cls(tuple(tensor.shape), tensor.dtype, 0.0)
        low, high = tensor.aminmax()  # Both are NaN if one value is NaN.
        return cls(tuple(tensor.shape), tensor.dtype, max(abs(low.item()), abs(high.item())))


def find_weights(name_or_path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> Path | None:
    """Find the weights of a saved adapter, and download them if they are on the Hub; None for a folder without any."""
    folder = Path(name_or_path, subfolder or "")
    if Path(name_or_path).is_dir():
        there = [folder / name for name in FILES if os.path.lexists(folder / name)]
        if len(there) > 1:
            raise ValueError(
                f"{str(folder)!r} holds both {FILES[0]} and {FILES[1]}, from two saves. Remove the older one."
            )
        return there[0] if there else None
    for name in FILES:
        # Without an answer of the Hub this is a LocalEntryNotFoundError, which says nothing about the file.
        try:
            return Path(hf_hub_download(str(name_or_path), name, subfolder=subfolder, **hub))
        except RemoteEntryNotFoundError:  # noqa: PERF203
            continue
    raise ValueError(
        f"{str(folder)!r} on the Hub has neither {FILES[0]} nor {FILES[1]}. Upload the folder that save_pretrained "
        "wrote."
    )


def open_tensors(path: Path, adapter: str) -> dict[str, Tensor]:
    """Open a file of weights, whose values are read when they are used. Code in a `.bin` file is not run."""
    if not path.is_file():
        raise ValueError(f"The weights of the adapter {adapter!r} cannot be read: {path.name} is not a regular file.")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except Exception as error:  # Anything may be wrong with a file by a stranger.
        raise ValueError(
            f"The weights of the adapter {adapter!r} are broken or cut short ({first_line(error)}). From the Hub, "
            "download them again with force_download=True. In a folder, save them again."
        ) from error
    refused = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in DTYPES]
    if refused:
        raise ValueError(
            "An adapter is saved in float64, float32, float16 or bfloat16, but these tensors are not: "
            f"{shortened(refused, shown=4)}. Save the adapter again."
        )
    return tensors


def _unpickled(path: Path) -> dict[str, Tensor]:
    options: dict[str, Any] = {"weights_only": True, "mmap": is_zipfile(path)}
    tensors = torch.load(path, map_location="meta", **options)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError("it does not hold tensors by name")
    # With strides of 0, a small file can describe a tensor of any size.
    if sum(tensor.nbytes for tensor in tensors.values()) > path.stat().st_size:
        raise ValueError("its tensors are larger than the file")
    return torch.load(path, map_location="cpu", **options)
