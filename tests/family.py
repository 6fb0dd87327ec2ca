"""What a tiny random model of one family of speech encoders is, and batches of inputs for such models."""

from __future__ import annotations

import pydoc
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
import transformers
from backbones import ELP, waveforms, with_norms_moved
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from peft_elp import ELPConfig, find_encoder

WIDTH = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


class Around(nn.Module):
    """A model that holds a bare encoder, as an audio language model holds its tower."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.tower, self.config = encoder, encoder.config

    def forward(self, **inputs: Any) -> Any:
        return self.tower(**inputs)


class AroundTensor(Around):
    """A model that holds an encoder whose output is a bare tensor."""

    def forward(self, **inputs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.tower(**inputs))


def features(bands: int, frames: int, time_first: bool, lengths: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Two utterances of audio features, padded where `lengths` says so."""
    torch.manual_seed(1)
    values = torch.randn(2, frames, bands)
    inputs = {"input_features": values if time_first else values.transpose(1, 2)}
    if lengths:
        mask = (torch.arange(frames) < torch.tensor(lengths)[:, None]).long()
        inputs = {"input_features": inputs["input_features"] * mask[:, :, None], "attention_mask": mask}
    return inputs


def batch(bands: int, lengths: tuple[int, ...], values: str, mask: str, time_first: bool = True) -> dict[str, Tensor]:
    """A padded batch of features under the names that an encoder gives them."""
    inputs = features(bands, max(lengths), True, lengths)
    x = inputs["input_features"]
    return {values: x if time_first else x.transpose(1, 2), mask: inputs["attention_mask"]}


def packed(bands: int, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Utterances one after the other along time, without padding."""
    torch.manual_seed(1)
    return {"input_features": torch.randn(bands, sum(lengths)), "feature_lens": torch.tensor(lengths)}


def wave(lengths: tuple[int, ...] = (1900, 1230)) -> dict[str, Tensor]:
    """A padded batch of waveforms."""
    return dict(zip(("input_values", "attention_mask"), waveforms(lengths), strict=True))


def decoded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, with the first tokens of a decoder."""
    return inputs | {"decoder_input_ids": torch.tensor([[3, 5, 6], [3, 7, 8]])}


@dataclass(frozen=True)
class Family:
    """One tiny model: its class and sizes, what it takes, and what can be asked of it.

    Args:
        model_class: The class of the model in Transformers.
        sizes: The fields of its configuration.
        inputs: A batch of two utterances or more.
        around: The module that holds the model, where the model is a bare encoder.
        since: The lowest version of Transformers that has the family as it is tested here.
        adapters: The adapters that it takes.
        checkpointing: Whether Transformers has gradient checkpointing for it.
        options: Fields of `ELPConfig` that it needs.
    """

    model_class: str
    sizes: dict[str, Any]
    inputs: dict[str, Tensor]
    around: type[Around] | None = None
    since: str = "5.0"
    adapters: str = "ELP"
    checkpointing: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def available(self) -> bool:
        """Whether the installed version of Transformers has to have the family."""
        return Version(transformers.__version__).release >= Version(self.since).release

    def plain(self) -> nn.Module:
        """The model as Transformers makes it, always with the same weights."""
        cls: Any = pydoc.locate(f"transformers.{self.model_class}")
        torch.manual_seed(0)
        model = cls(cls.config_class(**self.sizes))
        return self.around(model) if self.around else model

    def model(self, attention: str = "eager") -> nn.Module:
        """The model in evaluation mode, with norms and biases that are not where they start."""
        model = self.plain()
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._attn_implementation = attention
        return with_norms_moved(model).eval()

    def shallow(self) -> nn.Module:
        """The model with two encoder layers, for what takes its time with each layer, such as tracing."""
        model = self.model()
        encoder = find_encoder(model)
        del attrgetter(encoder.family.layers)(encoder.stack)[2:]
        return model

    def config(self, **options: Any) -> ELPConfig:
        """The small adapters that the family takes."""
        fields: dict[str, Any] = ELP | {"adapters": self.adapters} | self.options | options
        return ELPConfig(**fields)

    def adapted(self, attention: str = "eager", **options: Any) -> PeftModel:
        """The model with a fresh adapter."""
        return get_peft_model(self.model(attention), self.config(**options))

    def has_sdpa(self) -> bool:
        """Whether Transformers has more than eager attention for it."""
        return all(m._supports_sdpa for m in self.plain().modules() if isinstance(m, PreTrainedModel))
