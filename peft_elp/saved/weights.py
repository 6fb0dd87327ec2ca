"""The file with the tensors of a saved adapter: where it is, and what it says of them without reading their values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_elp.wording import brief, shortened

# The names that PEFT gives the file, in the order in which it looks for them.
FILES = ("adapter_model.safetensors", "adapter_model.bin")
# The dtypes that an adapter may be saved in, under their names in a safetensors file.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find_weights(name_or_path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> Path | None:
    """The file with the weights of a saved adapter, downloaded if it is on the Hub.

    Args:
        name_or_path: A folder, or the name of a repository on the Hub.
        subfolder: The folder inside of it.
        **hub: What `huggingface_hub.hf_hub_download` takes, such as `token` and `revision`.

    Returns:
        The file, or None for a folder without one.

    Raises:
        ValueError: The repository has no such file.
        OSError: The download failed. Other errors of the Hub are passed on as they are.
    """
    folder = Path(name_or_path, subfolder or "")
    if Path(name_or_path).is_dir():
        return next((folder / name for name in FILES if (folder / name).exists()), None)
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


def described_tensors(path: Path, adapter: str) -> dict[str, Tensor]:
    """The names, shapes and dtypes of the tensors in a file of weights, as tensors on the meta device.

    Of a safetensors file this reads the header alone, which also tells whether the file is complete.

    Args:
        path: The file.
        adapter: The folder or repository that it belongs to, for the errors.

    Raises:
        ValueError: The file is broken, or holds something other than floating-point tensors by name.
        pickle.UnpicklingError: A `.bin` file holds more than tensors. Nothing of it is run.
    """
    if path.suffix != ".safetensors":
        # A file in PyTorch's zip format is mapped, so that its values are not read.
        tensors = torch.load(path, map_location="meta", weights_only=True, mmap=is_zipfile(path))
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError(
                f"{path.name} of the adapter {adapter!r} does not hold tensors by name. Save the adapter again."
            )
        refuse_dtypes({name: str(tensor.dtype) for name, tensor in tensors.items() if not is_accepted(tensor)})
        return tensors
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            refuse_dtypes({name: held.get_dtype() for name, held in slices.items() if held.get_dtype() not in DTYPES})
            return {
                name: torch.empty(held.get_shape(), dtype=DTYPES[held.get_dtype()], device="meta")
                for name, held in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"The weights of the adapter {adapter!r} are broken or cut short ({brief(str(error))}). From the "
            "Hub, download them again with force_download=True. In a folder, save them again."
        ) from error


def is_accepted(tensor: Tensor) -> bool:
    """Whether the tensor has a dtype that an adapter may be saved in."""
    return tensor.dtype in DTYPES.values()


def refuse_dtypes(dtypes: dict[str, str]) -> None:
    """Refuse tensors of dtypes that no adapter is saved in.

    Args:
        dtypes: The dtypes, by the name of the tensor.

    Raises:
        ValueError: There are any.
    """
    if dtypes:
        raise ValueError(
            "An adapter is saved in float64, float32, float16 or bfloat16, and these tensors are not: "
            f"{shortened((f'{name} ({dtype})' for name, dtype in dtypes.items()), shown=4)}. Save the adapter again."
        )
