"""Four methods to train a speech encoder for a task: ELP-adapters, LoRA, all encoder layers, or the head alone."""

from functools import partial
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_elp import ELPConfig, find_encoder

from .arguments import ModelArguments


def adapt(model: PreTrainedModel, model_args: ModelArguments) -> Any:
    """Prepare a model for training by one of the methods, and freeze everything else.

    | `method` | trained besides the head |
    |---|---|
    | "elp" | ELP-adapters |
    | "lora" | LoRA in the feed-forward modules |
    | "full" | all encoder layers |
    | "head" | nothing |

    The CNN feature encoder is frozen in each of them.

    Args:
        model: A pretrained model with the head of the task.
        model_args: `ModelArguments` with the method and its settings.

    Returns:
        A `PeftModel` for "elp" and "lora", else the model itself.

    Raises:
        ValueError: The settings do not fit the model.
    """
    if model_args.method in ("elp", "lora"):
        config = _elp_config(model_args) if model_args.method == "elp" else _lora_config(model, model_args)
        adapted = get_peft_model(model, config)
        # Where the vocabulary is new, PEFT would look for the embeddings of its tokens; speech encoders have none.
        adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)  # pyright: ignore
        return adapted
    model.requires_grad_(False)
    for name in head_modules(model):
        model.get_submodule(name).requires_grad_(True)
    if model_args.method == "full":
        for layer in find_encoder(model).layers:
            layer.requires_grad_(True)
    return model


def _elp_config(model_args: ModelArguments) -> ELPConfig:
    settings = model_args.elp_settings()
    return ELPConfig.preset(model_args.preset, **settings) if model_args.preset else ELPConfig(**settings)


def _lora_config(model: PreTrainedModel, model_args: ModelArguments) -> LoraConfig:
    head = head_modules(model)
    inner = [name for name, _ in getattr(model, model.base_model_prefix).named_modules()]
    if shared := [name for name in head if any(path.split(".")[-1] == name for path in inner)]:
        raise ValueError(
            f"PEFT finds modules_to_save by the end of their names, and both the head and the encoder of "
            f"{type(model).__name__} have a {shared[0]!r}: LoRA would train both. Choose another head or method."
        )
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        target_modules=model_args.lora_target_modules,
        modules_to_save=head,
    )


def head_modules(model: PreTrainedModel) -> list[str]:
    """The names of the modules with parameters beside the encoder."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and next(module.parameters(), None) is not None
    ]


def unwrap(model: Any) -> Any:
    """The Transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_elp(model: Any) -> bool:
    """Whether the model was adapted by method "elp"."""
    return isinstance(getattr(model, "peft_config", {}).get("default"), ELPConfig)


def trained_parameters(model: Any) -> dict[str, dict[str, nn.Parameter]]:
    """The trained parameters by name, under "encoder" and "head"."""
    head = set(head_modules(unwrap(model)))
    parts: dict[str, dict[str, nn.Parameter]] = {"encoder": {}, "head": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            child = name.removeprefix("base_model.model.").split(".")[0]
            parts["head" if child in head else "encoder"][name] = parameter
    return parts


def count_trained(model: Any) -> dict[str, int]:
    """The numbers of trained parameters, as `trained_parameters_encoder` and `trained_parameters_head`."""
    return {
        f"trained_parameters_{part}": sum(parameter.numel() for parameter in held.values())
        for part, held in trained_parameters(model).items()
    }
