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
from accelerate.utils import send_to_device
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .call.shared_pass import CACHED
from .heads import head_row
from .tuner.one_pass import Task, adapted_encoder
from .wording import unknown_adapter

Collate = Callable[[Sequence[Any]], Mapping[str, Any]]
RECORDINGS_PER_FILE = 128
ENCODER = "cached_encoder"  # In a row: which encoder its features are of.
# How far an answer from saved features may be from the live one, relative to its largest value.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(eq=False)
class FeatureCache:
    """The features of an L-adapter, in a folder.

    The hidden states are computed in evaluation mode, one recording at a time, so without dropout and without padding.
    They are found again by the content of a recording and of the encoder: another encoder, another window or another
    choice of layers adds its own files to the folder. `read` compares the answer from saved features with the live
    one, and refuses models whose answer differs.

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
            raise ValueError(f"dtype must be torch.float32, float16 or bfloat16, got {self.dtype}.")
        if self.adapter_name not in self.model.peft_config:
            raise ValueError(unknown_adapter(self.adapter_name, self.model.peft_config))
        self._encoder, self._stack = adapted_encoder(self.model)
        self._refuse()
        self.layers: list[int] = self._stack.tapped_layers[self.adapter_name]
        self._folder = self._find_folder()
        # PeftModel takes these arguments out before it calls the model.
        self.model.special_peft_forward_args = {*self.model.special_peft_forward_args, CACHED}

    def _refuse(self) -> None:
        """Refuse an adapter whose features differ from step to step, or whose answer needs more than features."""
        name, encoder = self.adapter_name, self._encoder
        if not Task(encoder.backbone, self._stack, name, lambda: None).leaves_layers_alone():
            raise ValueError(
                f"Adapter {name!r} changes what the encoder computes, so its features differ from step to step. Cache "
                "features for ELPConfig(adapters='L', train_layer_norms=False) that trains nothing of the encoder."
            )
        if encoder.family.taps_end != "stack":
            raise ValueError(
                f"{type(self._stack.base_layer).__name__} goes on after its layers. Its features cannot be cached."
            )
        self._refuse_masking()
        adapter: Any = self._stack.elp_l[name]
        if adapter.residual and self._stack.tapped_layers[name][-1] != self._stack.depth - 1:
            raise ValueError("l_output='residual' also reads the last layer. Tap it (l_layers) to cache its features.")

    def _refuse_masking(self) -> None:
        config = self._encoder.backbone.config
        masked = [key for key in ("mask_time_prob", "mask_feature_prob") if getattr(config, key, 0)]
        if masked and getattr(config, "apply_spec_augment", True):
            raise ValueError(
                f"The encoder masks its features at random in training ({masked[0]}={getattr(config, masked[0])}), "
                "and cached features are not masked. Load it with apply_spec_augment=False."
            )

    def read(self, dataset: Sequence[Any], collate: Collate, progress: bool = True) -> CachedRows:
        """Return the rows of a data set with the features of each recording, computed where they are not saved yet.

        If the work is interrupted, the next call goes on where this one was.

        Args:
            dataset: Rows. They have to be the same every time they are read: no random crops or noise.
            collate: Makes a batch for the model from a list of rows.
            progress: Show a progress bar, with the size that the files will have.

        Returns:
            A data set for `Trainer`. It needs `self.collate` as `data_collator`, and `remove_unused_columns=False`.

        Raises:
            ValueError: A row is different when it is read twice, features overflow in `dtype`, or the model answers
                differently with saved features.
        """
        self._folder = self._find_folder()
        self._files = {}
        for file in sorted(self._folder.glob("*.safetensors")):
            with safe_open(file, "pt") as saved:
                self._files |= dict.fromkeys(saved.keys(), file)
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
            if number == 0:
                found = new if key in new else {key: CachedRows(rows, self._files, self._folder.name)[0][CACHED]}
                self._compare(batch, {CACHED: found[key], ENCODER: self._folder.name, **rows[0][1]})
        self._save(new)
        return CachedRows(rows, self._files, self._folder.name)

    def _compare(self, batch: Mapping[str, Tensor], row: Mapping[str, Any]) -> None:
        """Refuse a model whose answer from saved features is not the live one."""
        live = self._answer(batch)
        try:
            cached = self._answer(self.collate([row]))
            difference = float((cached - live).abs().max() / live.abs().max().clamp(min=1e-6))
        except Exception as error:  # Whatever a model does with inputs that hold no values.
            raise ValueError(
                f"{self._name()} does not run from cached features ({error}). Train it without a cache."
            ) from error
        if not difference <= TOLERANCE[self.dtype]:  # it may be NaN
            raise ValueError(
                f"{self._name()} answers differently with cached features: by {difference:.2g} of its largest output. "
                "It uses its inputs in another way than once through the encoder. Train it without a cache."
            )

    def _name(self) -> str:
        return type(self.model.get_base_model()).__name__

    def _answer(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the first floating-point output of the model for a batch, in evaluation mode."""
        outputs: Any = self._call(batch)
        tensors = [outputs] if isinstance(outputs, Tensor) else getattr(outputs, "values", lambda: outputs)()
        return next(x for x in tensors if isinstance(x, Tensor) and x.is_floating_point() and x.dim()).float().cpu()

    @torch.no_grad()
    def _call(self, batch: Mapping[str, Any]) -> Any:
        """Call the model with the adapter, in evaluation mode and without labels that it does not need."""
        tuner: Any = self.model.base_model
        training, active = self.model.training, list(self.model.active_adapters)
        device = next(self.model.parameters()).device
        row = head_row(type(self.model.get_base_model()))
        # A decoder needs the labels. A head does not, and its own loss may not fit them.
        needed = {
            name: x for name, x in batch.items() if name != "labels" or (row and row.output == "generated_tokens")
        }
        try:
            self.model.eval()
            if active != [self.adapter_name]:
                tuner.set_adapter(self.adapter_name)
            return self.model(**send_to_device(needed, device))
        finally:
            self.model.train(training)
            if active != [self.adapter_name]:
                tuner.set_adapter(active)

    def _features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the taps read of one recording, `(layers, frames, hidden)`."""
        adapter: Any = self._stack.elp_l[self.adapter_name]
        seen: dict[int, Tensor] = {}
        handles = [
            tap.register_forward_pre_hook(lambda _, args, number=number: seen.__setitem__(number, args[0][0]))
            for number, tap in enumerate(adapter.taps)
        ]
        try:
            self._call(batch)
        finally:
            for handle in handles:
                handle.remove()
        features = torch.stack([seen[number] for number in range(len(self.layers))]).to("cpu", self.dtype)
        if not features.isfinite().all():
            raise ValueError(
                f"The hidden states of {self._name()} overflow in {self.dtype}. Pass dtype=torch.bfloat16 or "
                "torch.float32 to FeatureCache."
            )
        return features

    def _find_folder(self) -> Path:
        """Return the folder for features of the encoder as it is now, which the model takes from now on."""
        name = self._fingerprint()
        self._stack.cacheable.setdefault(self.adapter_name, set()).add(f"encoder {name}")
        return Path(self.folder, name)

    def _fingerprint(self) -> str:
        """Return a name for the frozen encoder as it is now, its settings and the layers that are read."""
        backbone: Any = self._encoder.backbone
        config: Any = self._stack.window.config or backbone.config
        settings = {key: value for key, value in config.to_diff_dict().items() if "label" not in key}
        facts = [settings, self.layers, self._stack.windows.get(self.adapter_name), str(self.dtype)]
        found = hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode())
        for name, tensor in sorted(backbone.state_dict().items()):
            if "elp_" not in name and "modules_to_save" not in name:
                found.update(name.encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:32]

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
        """Return a batch for the model from rows of `read`: features and labels, and inputs that only tell lengths.

        Raises:
            ValueError: The features are of another encoder, or the encoder masks its features in training.
        """
        if {row[ENCODER] for row in rows} != {self._folder.name}:
            raise ValueError(
                "These rows hold features of another encoder, another window or other layers. Read the data set with "
                "this cache."
            )
        self._refuse_masking()
        features = [row[CACHED] for row in rows]
        batch: dict[str, Any] = {
            CACHED: {
                str(layer): pad_sequence([x[tap] for x in features], batch_first=True)
                for tap, layer in enumerate(self.layers)
            }
            # One number for each recording, since batches are split along the first axis.
            | {f"encoder {self._folder.name}": torch.zeros(len(rows))}
        }
        for name in rows[0].keys() - {CACHED, ENCODER}:
            values = [row[name] for row in rows]
            if _is_input(name, values[0]):
                longest = [max(sizes) for sizes in zip(*(x.shape for x in values), strict=True)]
                batch[name] = values[0].new_full((), torch.nan).expand(len(values), *longest)
            elif values[0].dim():
                batch[name] = pad_sequence(values, batch_first=True, padding_value=0 if "mask" in name else -100)
            else:
                batch[name] = torch.stack(values)
        return batch


class CachedRows(torch.utils.data.Dataset):
    """The rows of a data set with cached features instead of recordings, as `FeatureCache.read` returns them."""

    def __init__(self, rows: Sequence[tuple[str, dict[str, Tensor]]], files: Mapping[str, Path], encoder: str) -> None:
        self.rows = rows  # the key of each recording, labels, and inputs without their values
        self.files, self.encoder = dict(files), encoder  # the file of each key; whose features they are
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
        return {CACHED: self._open[file].get_tensor(key), ENCODER: self.encoder, **rest}


def _is_input(name: str, x: Tensor) -> bool:
    """Whether a tensor of a batch is taken for an input of the encoder. `FeatureCache.read` finds out if it is not."""
    return name != "labels" and x.is_floating_point()


def _without_values(name: str, x: Tensor) -> Tensor:
    """Return an input of the encoder without memory: its shape tells the length. What it computes is NaN."""
    if _is_input(name, x):
        return x.new_full((), torch.nan).expand(x.shape)
    return x.new_ones(()).expand(x.shape) if "mask" in name and x.all() else x


def _content(batch: Mapping[str, Any]) -> str:
    """Return a key for the content of a recording: all tensors of its batch but the labels."""
    found = hashlib.sha256()
    for name, value in sorted(batch.items()):
        if isinstance(value, Tensor) and name != "labels":
            x = value.detach().cpu().contiguous()
            found.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
            found.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
