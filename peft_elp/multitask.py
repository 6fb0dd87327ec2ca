"""Many tasks on one frozen backbone, with as few passes through it as their adapters allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .tuner.find import Encoder
from .tuner.one_pass import Task, adapted_encoder, refuse_idle_labels, refuse_reports, run_tasks
from .tuner.paths import canonical
from .wording import shortened


class MultiTaskModel(nn.Module):
    """Models for several tasks, with heads of any kind, that share the tensors of one frozen backbone.

    Each is an ordinary PEFT model with its own head, adapters and active adapter, as it was trained and loaded alone.
    The backbone is in memory once. In a call, the convolutions over the waveform run once. Models whose active adapter
    is an L-adapter without trained layer norms share one pass through the encoder layers. Each other model has its
    own.

    Args:
        models: PEFT models with ELP-adapters by task, on the same base checkpoint. The tensors of their backbones are
            replaced by those of the first.

    Shape:
        Takes what each of the models takes, and returns the output of each model by task.

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
        found = {task: adapted_encoder(model.base_model) for task, model in models.items()}
        (first, (encoder, _)), *others = found.items()
        for task, (other, _) in others:
            share_tensors(encoder, other, first, task)
        self.models = nn.ModuleDict(models)
        # `models` registers these modules. Here they are only looked up.
        self._encoders = {task: (encoder.backbone, stack) for task, (encoder, stack) in found.items()}

    def forward(
        self, *args: Any, tasks: Iterable[str] | None = None, labels: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Run the models of several tasks on the same input.

        Args:
            args: What each of the models takes.
            tasks: Names of the tasks to run. None: all.
            labels: Labels by task, for the tasks whose loss is wanted.
            kwargs: What each of the models takes.

        Returns:
            The output of each task's model, by task.

        Raises:
            ValueError: A task is unknown, its model has no or several active adapters, or hidden states or
                `adapter_names` are asked for.
        """
        names = list(self.models) if tasks is None else list(tasks)
        unknown = [name for name in (*names, *(labels or ())) if name not in self.models]
        if unknown:
            raise ValueError(f"There is no task {unknown[0]!r}; the tasks are {shortened(map(repr, self.models))}.")
        if "adapter_names" in kwargs:
            raise ValueError(
                "adapter_names mixes the adapters of one model in a batch, and here each model has one active "
                "adapter. Call set_adapter(name) on that model, or call it alone with adapter_names."
            )
        refuse_idle_labels(names, labels)
        chosen: dict[str, Task] = {}
        for name in names:
            model: Any = self.models[name]
            refuse_reports(model, kwargs)
            backbone, stack = self._encoders[name]
            if len(model.active_adapters) != 1:
                raise ValueError(
                    f"The model of {name!r} has the active adapters {model.active_adapters}, and a task needs exactly "
                    "one. Call set_adapter(name) on that model."
                )
            inputs = kwargs if name not in (labels or {}) else kwargs | {"labels": (labels or {})[name]}
            chosen[name] = Task(backbone, stack, model.active_adapters[0], partial(model, *args, **inputs))
        return run_tasks(chosen)


def share_tensors(encoder: Encoder, other: Encoder, task: str, other_task: str) -> None:
    """Replace the tensors of `other` by those of `encoder`, which have to be equal; the tasks are for the error."""
    kept, replaced = _backbone_tensors(encoder.backbone), _backbone_tensors(other.backbone)
    differing = sorted(kept.keys() ^ replaced.keys()) or [
        name
        for name, (_, _, tensor) in kept.items()
        if tensor.shape != replaced[name][2].shape or not torch.equal(tensor, replaced[name][2].to(tensor))
    ]
    if differing:
        raise ValueError(
            f"The backbones of {task!r} and {other_task!r} differ in {len(differing)} of {len(kept)} tensors: "
            f"{shortened(differing, shown=3)}. Load both models from the same base checkpoint."
        )
    for name, (module, attribute, _) in replaced.items():
        holder, held, tensor = kept[name]
        tensors: dict[str, Any] = module._parameters if held in holder._parameters else module._buffers
        tensors[attribute] = tensor


def _backbone_tensors(backbone: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Return the tensors of the backbone by name: the module of each, its name in that module, and the tensor."""
    found: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for path, module in backbone.named_modules():
        if ".elp_" in f".{path}" or ".modules_to_save" in f".{path}":
            continue
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found[canonical(f"{path}.{name}")] = (module, name, tensor)
    return found
