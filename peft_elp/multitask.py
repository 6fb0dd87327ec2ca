"""Many tasks on one frozen backbone, with as few passes through it as their adapters allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .tuner.find import Encoder
from .tuner.one_pass import Task, parts_of, refuse_idle_labels, refuse_reports, run
from .tuner.paths import canonical


class MultiTaskModel(nn.Module):
    """Models for several tasks, with heads of any kind, that share the tensors of one frozen backbone.

    Each is an ordinary PEFT model with its own head, adapters and active adapter, as trained and loaded on its own. In
    memory there is one backbone. In a call the convolutions over the waveform run once; models whose active adapter is
    an L-adapter without trained layer norms share one pass through the layers; each other one has its own.

    Args:
        models: PEFT models with ELP-adapters by task, on the same base checkpoint. Their backbones' tensors are
            replaced by those of the first.

    Raises:
        ValueError: The backbones differ, or a model has no ELP-adapters.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import WavLMConfig, WavLMForCTC, WavLMForSequenceClassification
        >>> from peft_elp import ELPConfig
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, layerdrop=0.0, vocab_size=8)
        >>> asr, emotion = WavLMForCTC(WavLMConfig(**size)), WavLMForSequenceClassification(WavLMConfig(**size))
        >>> _ = emotion.wavlm.load_state_dict(asr.wavlm.state_dict())  # as two from_pretrained of one checkpoint are
        >>> config = ELPConfig(adapters="L", train_layer_norms=False)
        >>> tasks = MultiTaskModel({"asr": get_peft_model(asr, config), "emotion": get_peft_model(emotion, config)})
        >>> outputs = tasks.eval()(torch.zeros(1, 16000))
        >>> outputs["asr"].logits.shape, outputs["emotion"].logits.shape
        (torch.Size([1, 49, 8]), torch.Size([1, 2]))
    """

    def __init__(self, models: Mapping[str, PeftModel]) -> None:
        super().__init__()
        if not models:
            raise ValueError("MultiTaskModel needs at least one model, by the name of its task.")
        found = {task: parts_of(model.base_model) for task, model in models.items()}
        (first, (parts, _)), *others = found.items()
        for task, (other, _) in others:
            share_tensors(parts, other, first, task)
        self.models = nn.ModuleDict(models)
        self._parts = {task: (parts.backbone, stack) for task, (parts, stack) in found.items()}  # registered already

    def forward(
        self, *args: Any, tasks: Iterable[str] | None = None, labels: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The output of each task's model, by task.

        Args:
            args: What each of the models takes.
            tasks: Names of the tasks to run. None: all.
            labels: For each task that is to have a loss, its labels.
            kwargs: What each of the models takes.

        Raises:
            ValueError: A task is unknown, its model has no active adapter, or hidden states or `adapter_names` are
                asked for.
        """
        names = list(self.models) if tasks is None else list(tasks)
        unknown = [name for name in (*names, *(labels or ())) if name not in self.models]
        if unknown:
            raise ValueError(f"There is no task {unknown[0]!r}; there are {', '.join(map(repr, self.models))}.")
        if "adapter_names" in kwargs:
            raise ValueError(
                "adapter_names mixes the adapters of one model in a batch, and here each model has one active "
                "adapter. Call set_adapter(name) on it, or the model by itself with adapter_names."
            )
        refuse_idle_labels(names, labels)
        chosen: dict[str, Task] = {}
        for name in names:
            model: Any = self.models[name]
            refuse_reports(model, kwargs)
            encoder, stack = self._parts[name]
            if len(model.active_adapters) != 1:
                raise ValueError(
                    f"The model of {name!r} has the active adapters {model.active_adapters}; tasks share a pass with "
                    "one each. Call set_adapter(name) on it."
                )
            own = kwargs if name not in (labels or {}) else kwargs | {"labels": (labels or {})[name]}
            call = partial(model, *args, **own)
            chosen[name] = Task(encoder, stack, model.active_adapters[0], call)
        return run(chosen)


def share_tensors(parts: Encoder, other: Encoder, first: str, task: str) -> None:
    """Put the tensors of one backbone in place of another's, which have to be equal.

    Raises:
        ValueError: The backbones are of different make, or have different weights.
    """
    tensors, others = _tensors(parts.backbone), _tensors(other.backbone)
    differ = sorted(tensors.keys() ^ others.keys()) or [
        name
        for name, (_, _, tensor) in tensors.items()
        if tensor.shape != others[name][2].shape or not torch.equal(tensor, others[name][2].to(tensor))
    ]
    if differ:
        raise ValueError(
            f"The backbones of {first!r} and {task!r} differ, in {len(differ)} of {len(tensors)} tensors (such as "
            f"{', '.join(differ[:3])}). Load both models from the same base checkpoint."
        )
    for name, (module, attribute, _) in others.items():
        holder, own, _ = tensors[name]
        kind = "_parameters" if own in holder._parameters else "_buffers"
        getattr(module, kind)[attribute] = getattr(holder, kind)[own]


def _tensors(encoder: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """The backbone's own tensors: for each name, the module that holds it, its name there, and itself."""
    found: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for path, module in encoder.named_modules():
        if ".elp_" in f".{path}" or ".modules_to_save" in f".{path}":
            continue
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found[canonical(f"{path}.{name}")] = (module, name, tensor)
    return found
