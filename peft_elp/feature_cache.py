"""What the taps of an L-adapter read, computed once for a data set and kept in files.

An L-adapter without trained layer norms changes nothing that the frozen encoder computes. So the hidden states that
its taps read are the same in every epoch, and a training step needs only the taps, their sum and the head.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .call.shared_pass import CACHED
from .heads import head_row
from .tuner.one_pass import Task, adapted_encoder
from .wording import unknown_adapter

Collate = Callable[[Sequence[Any]], Mapping[str, Any]]
RECORDINGS_PER_FILE = 128
INPUTS = ("input_values", "input_features", "attention_mask")


@dataclass(eq=False)
class FeatureCache:
    """The features of an L-adapter, in a folder.

    The hidden states are computed in evaluation mode, one recording at a time, so without dropout and without padding.
    They are found again by the content of a recording and of the encoder: another encoder, or another choice of
    layers, adds its own files to the folder.

    Args:
        model: A `PeftModel` with the adapter. Its calls take `cached_features` from now on.
        folder: Where the files are. It is made if it does not exist.
        dtype: Of what is saved: torch.float32, torch.float16 or torch.bfloat16.
        adapter_name: The adapter.

    Raises:
        ValueError: The adapter changes what the encoder layers compute, the model masks its features at random in
            training, or the encoder goes on after its layers.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from peft import get_peft_model
        >>> from transformers import WavLMConfig, WavLMForSequenceClassification
        >>> from peft_elp import ELPConfig, FeatureCache
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, layerdrop=0.0)
        >>> base = WavLMForSequenceClassification(WavLMConfig(mask_time_prob=0.0, **size))
        >>> model = get_peft_model(base, ELPConfig(adapters="L", train_layer_norms=False))
        >>> def collate(rows):
        ...     return {"input_values": torch.stack(rows), "attention_mask": torch.ones(len(rows), 4000).long()}
        >>> with TemporaryDirectory() as folder:
        ...     cache = FeatureCache(model, folder)
        ...     rows = cache.read([torch.zeros(4000)], collate, progress=False)
        ...     model(**cache.collate([rows[0]])).logits.shape
        torch.Size([1, 2])
    """

    model: PeftModel
    folder: str | Path
    dtype: torch.dtype = torch.float16
    adapter_name: str = "default"
    _files: dict[str, Path] = field(default_factory=dict, init=False)  # By the content of a recording.

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"Features are saved as torch.float32, float16 or bfloat16, got dtype={self.dtype}.")
        if self.adapter_name not in self.model.peft_config:
            raise ValueError(unknown_adapter(self.adapter_name, self.model.peft_config))
        encoder, self._stack = adapted_encoder(self.model)
        self._refuse(encoder)
        self.layers: list[int] = self._stack.tapped_layers[self.adapter_name]
        self._folder = Path(self.folder, _fingerprint(encoder.backbone, self.layers, self._stack, self.dtype))
        self._stack.cacheable.add(self.adapter_name)
        # PeftModel takes these arguments out before it calls the model.
        self.model.special_peft_forward_args = {*self.model.special_peft_forward_args, CACHED}

    def _refuse(self, encoder: Any) -> None:
        name, config = self.adapter_name, encoder.backbone.config
        if not Task(encoder.backbone, self._stack, name, lambda: None).leaves_layers_alone():
            raise ValueError(
                f"Adapter {name!r} changes what the encoder computes, so that its features differ from step to step. "
                "Features can be cached for ELPConfig(adapters='L', train_layer_norms=False) that trains nothing of "
                "the encoder."
            )
        if encoder.family.taps_end != "stack":
            raise ValueError(
                f"{type(self._stack.base_layer).__name__} goes on after its layers. Its features cannot be cached."
            )
        masked = [key for key in ("mask_time_prob", "mask_feature_prob") if getattr(config, key, 0)]
        if masked and getattr(config, "apply_spec_augment", True):
            raise ValueError(
                f"The encoder masks its features at random in training ({masked[0]}={getattr(config, masked[0])}), "
                "and cached features are not masked. Load it with apply_spec_augment=False."
            )
        adapter: Any = self._stack.elp_l[name]
        if adapter.residual and self._stack.tapped_layers[name][-1] != self._stack.depth - 1:
            raise ValueError("l_output='residual' also reads the last layer. Tap it (l_layers) to cache its features.")

    def read(self, dataset: Sequence[Any], collate: Collate, progress: bool = True) -> CachedRows:
        """The rows of a data set with the features of each recording, which are computed where they are not saved yet.

        If the work is interrupted, the next call goes on where this one was.

        Args:
            dataset: Rows. They have to be the same every time they are read: no random crops or noise.
            collate: Makes a batch for the model from a list of rows.
            progress: Show a progress bar, with the size that the files will have.

        Returns:
            A data set for `Trainer`. It needs `self.collate` as `data_collator`, and `remove_unused_columns=False`.

        Raises:
            ValueError: A row is different when it is read twice.
        """
        self._find_files()
        rows: list[tuple[str, dict[str, Tensor]]] = []
        new: dict[str, Tensor] = {}
        bar = tqdm(range(len(dataset)), desc="Features", unit="clip", disable=not progress)
        for number in bar:
            batch = {name: x for name, x in collate([dataset[number]]).items() if isinstance(x, Tensor)}
            key = _content(batch)
            if key not in self._files and key not in new:
                if _content(collate([dataset[number]])) != key:
                    raise ValueError(
                        f"Row {number} differs when it is read twice. Cache features without augmentation or crops."
                    )
                new[key] = self._features(batch)
                bar.set_postfix_str(f"{len(dataset) * new[key].nbytes / 1e9:.2g} GB if all are like this one")
                if len(new) == RECORDINGS_PER_FILE:
                    new = self._save(new)
            rows.append((key, {name: _without_values(name, x[0]) for name, x in batch.items()}))
        self._save(new)
        return CachedRows(rows, self._files, self.layers)

    @torch.no_grad()
    def _features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the taps read of one recording, `(layers, frames, hidden)`."""
        adapter: Any = self._stack.elp_l[self.adapter_name]
        tuner: Any = self.model.base_model
        seen: dict[int, Tensor] = {}
        handles = [
            tap.register_forward_pre_hook(lambda _, args, number=number: seen.__setitem__(number, args[0][0]))
            for number, tap in enumerate(adapter.taps)
        ]
        training, active = self.model.training, list(self.model.active_adapters)
        device = next(self.model.parameters()).device
        row = head_row(type(self.model.get_base_model()))
        # A decoder needs the labels. A head does not, and its own loss may not fit them.
        needed = [name for name in batch if name != "labels" or (row and row.output == "generated_tokens")]
        try:
            self.model.eval()
            if active != [self.adapter_name]:
                tuner.set_adapter(self.adapter_name)
            self.model(**{name: batch[name].to(device) for name in needed})
        finally:
            for handle in handles:
                handle.remove()
            if active != [self.adapter_name]:
                tuner.set_adapter(active)
            self.model.train(training)
        return torch.stack([seen[number] for number in range(len(self.layers))]).to("cpu", self.dtype)

    def _find_files(self) -> None:
        for file in sorted(self._folder.glob("*.safetensors")):
            with safe_open(file, "pt") as saved:
                self._files |= dict.fromkeys(saved.keys(), file)

    def _save(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        if new:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / f"{hashlib.sha256(''.join(new).encode()).hexdigest()[:16]}.safetensors"
            unfinished = file.with_suffix(f".{os.getpid()}.unfinished")  # Another process may save the same.
            save_file(new, unfinished)
            unfinished.replace(file)
            self._files |= dict.fromkeys(new, file)
        return {}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch for the model from rows of `read`: features and labels, and inputs that only tell lengths."""
        features = [row[CACHED] for row in rows]
        batch: dict[str, Any] = {
            CACHED: {
                str(layer): pad_sequence([x[tap] for x in features], batch_first=True)
                for tap, layer in enumerate(self.layers)
            }
        }
        for name in rows[0].keys() - {CACHED}:
            values = [row[name] for row in rows]
            if name in INPUTS:
                batch[name] = _padded(values, name)
            elif values[0].dim():
                batch[name] = pad_sequence(values, batch_first=True, padding_value=-100)
            else:
                batch[name] = torch.stack(values)
        return batch


class CachedRows(torch.utils.data.Dataset):
    """The rows of a data set with cached features instead of recordings, as `FeatureCache.read` returns them.

    Args:
        rows: The key of each recording, and what the model takes besides: labels, and inputs without their values.
        files: The file of each key.
        layers: The layers whose features are cached.
    """

    def __init__(self, rows: Sequence[tuple[str, dict[str, Tensor]]], files: Mapping[str, Path], layers: list[int]):
        self.rows, self.files, self.layers = rows, dict(files), layers
        self._open: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}  # Each process opens the files itself.

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, rest = self.rows[index]
        file = self.files[key]
        if file not in self._open:
            self._open[file] = safe_open(file, "pt")
        return {CACHED: self._open[file].get_tensor(key), **rest}


def _without_values(name: str, x: Tensor) -> Tensor:
    """An input of the encoder that takes no memory: its shape tells the length. A mask with zeros and labels stay."""
    if name not in INPUTS:
        return x
    if name != "attention_mask":
        return x.new_zeros(()).expand(x.shape)
    return x.new_ones(()).expand(x.shape) if x.all() else x


def _padded(values: Sequence[Tensor], name: str) -> Tensor:
    """Inputs without values, or masks, padded to the longest along the axis in which they differ."""
    if name == "attention_mask":
        return pad_sequence(list(values), batch_first=True)
    longest = [max(sizes) for sizes in zip(*(x.shape for x in values), strict=True)]
    return values[0].new_zeros(()).expand(len(values), *longest)


def _content(batch: Mapping[str, Any]) -> str:
    """A key for the content of a recording."""
    found = hashlib.sha256()
    for name in INPUTS:
        if isinstance(batch.get(name), Tensor):
            x = batch[name].detach().cpu().contiguous()
            found.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
            found.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _fingerprint(backbone: nn.Module, layers: list[int], stack: Any, dtype: torch.dtype) -> str:
    """A name for the frozen encoder, its settings and the layers that are read."""
    config: Any = backbone.config
    settings = {key: value for key, value in config.to_diff_dict().items() if "label" not in key}
    windows = list(stack.windows.values())
    found = hashlib.sha256(json.dumps([settings, layers, windows, str(dtype)], default=str, sort_keys=True).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        if "elp_" not in name and "modules_to_save" not in name:
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]
