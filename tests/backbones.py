"""Tiny random backbones of every family, and waveforms for them."""

from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from peft_elp import ELPConfig

FAMILIES = {
    "wav2vec2": "Wav2Vec2",
    "hubert": "Hubert",
    "wavlm": "WavLM",
    "unispeech": "UniSpeech",
    "unispeech-sat": "UniSpeechSat",
    "data2vec-audio": "Data2VecAudio",
}
HEADS = ("Model", "ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector")
AUTO = {
    "Model": transformers.AutoModel,
    "ForCTC": transformers.AutoModelForCTC,
    "ForSequenceClassification": transformers.AutoModelForAudioClassification,
    "ForAudioFrameClassification": transformers.AutoModelForAudioFrameClassification,
    "ForXVector": transformers.AutoModelForAudioXVector,
}
# Data2VecAudio has no do_stable_layer_norm: its encoder is of one kind.
NORMS = [
    (family, stable) for family in FAMILIES for stable in (False, True) if not (family == "data2vec-audio" and stable)
]

TINY = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 4), "conv_bias": True,
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    "conv_pos_kernel_size": 5, "feat_extract_norm": "layer", "vocab_size": 9, "num_labels": 4,
    "classifier_proj_size": 12, "tdnn_dim": (12, 12, 20), "tdnn_kernel": (5, 3, 1), "xvector_output_dim": 12,
    "tdnn_dilation": (1, 1, 1),  # the head counts its frames without dilation, so that it lets padding in with one
    "layerdrop": 0.0, "mask_time_prob": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0,
    "num_clusters": 4, "num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8,
}  # fmt: skip
ELP: dict[str, Any] = {"e_dim": 8, "l_dim": 10, "p_length": 3}


def has(family: str, head: str) -> bool:
    return hasattr(transformers, FAMILIES[family] + head)


def build(family: str = "wavlm", head: str = "ForCTC", seed: int = 0, **options: Any) -> PreTrainedModel:
    """A tiny random model, in evaluation mode, whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    config_cls = getattr(transformers, FAMILIES[family] + "Config")
    model = getattr(transformers, FAMILIES[family] + head)(config_cls(**TINY | options))
    return with_norms_moved(model).eval()


def with_norms_moved(model: Any) -> Any:
    """The model with norms and biases that are not where they start: a test must see each of them."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name.lower():
            torch.nn.init.normal_(parameter, mean=float("norm" in name.lower() and "weight" in name), std=0.3)
    return model


class TwoEncoders(torch.nn.Module):
    """A model with two encoders, of one class or of two."""

    def __init__(self, left: str = "wavlm", right: str = "hubert") -> None:
        super().__init__()
        self.left: Any = build(left, "Model")
        self.right: Any = build(right, "Model", seed=1)
        self.config = self.left.config

    def forward(self, *args: Any, **inputs: Any) -> BaseModelOutput:
        left, right = (encoder(*args, **inputs).last_hidden_state for encoder in (self.left, self.right))
        return BaseModelOutput(last_hidden_state=left + 2 * right)


def waveforms(lengths: tuple[int, ...] = (2000, 1300, 900), seed: int = 1) -> tuple[Tensor, Tensor]:
    """A padded batch of noise `(batch, samples)` and its attention mask."""
    torch.manual_seed(seed)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return torch.randn(mask.shape) * mask, mask


def labels_for(model: PreTrainedModel, batch: int, frames: int) -> Tensor:
    """Labels of the shape that the model's head takes."""
    torch.manual_seed(2)
    head = type(model).__name__
    if head.endswith("ForCTC"):
        return torch.randint(1, model.config.vocab_size, (batch, 5))
    if head.endswith("ForAudioFrameClassification"):
        return torch.nn.functional.one_hot(
            torch.randint(0, model.config.num_labels, (batch, frames)), model.config.num_labels
        )
    return torch.randint(0, model.config.num_labels, (batch,))


def result(output: Any) -> Tensor:
    """What a user of the model looks at."""
    return output.logits if "logits" in output else output.last_hidden_state


def encoded(output: Any) -> Tensor:
    """What the encoder gives, which is no more than the result where a decoder follows it."""
    return output.encoder_last_hidden_state if "encoder_last_hidden_state" in output else result(output)


def shaken(model: torch.nn.Module, std: float = 0.2, seed: int = 3) -> torch.nn.Module:
    """The model with adapters that do something: every trainable parameter moved from where it starts."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    return model


def adapted(
    head: str | PreTrainedModel = "ForCTC",
    family: str = "wavlm",
    base: dict[str, Any] | None = None,
    std: float = 0.2,
    **options: Any,
) -> PeftModel:
    """A tiny model with one adapter that does something, in evaluation mode.

    Args:
        head: The head, or the model itself.
        family: The family of a model that is built here.
        base: Options of a model that is built here.
        std: How far the adapter is from where it starts.
        options: Fields of `ELPConfig`.
    """
    model = build(family, head, **base or {}) if isinstance(head, str) else head
    return shaken(get_peft_model(model, ELPConfig(**ELP | options)), std).eval()  # pyright: ignore[reportReturnType]


def with_adapters(base: torch.nn.Module, **adapters: dict[str, Any]) -> PeftModel:
    """A model with adapters of the given options by name, each one moved differently; the last one is active."""
    model: Any = None
    for name, options in adapters.items():
        config = ELPConfig(**ELP | options)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        shaken(model, seed=len(model.peft_config))
    return model.eval()


def call(model: Any, name: str | None = None, **inputs: Any) -> Any:
    """The output of a model, with one of its adapters if named; by default for the usual batch of noise."""
    inputs = inputs or dict(zip(("input_values", "attention_mask"), waveforms(), strict=True))
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return model(**inputs)
        if name is not None:
            model.set_adapter(name)
        return model(**inputs)


def answer(model: Any, name: str | None = None, **inputs: Any) -> Tensor:
    """What a user of the model looks at; see `call`."""
    return result(call(model, name, **inputs))


def trained(model: torch.nn.Module) -> set[str]:
    """The names of the parameters that require a gradient."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
