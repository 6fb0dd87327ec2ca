"""Four methods to train a speech encoder for a task: ELP-adapters, LoRA, all encoder layers, or the head alone."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_elp import ELPConfig, find_encoder, pool_own_frames, shorten_window
from peft_elp.heads import head_input
from peft_elp.tuner.head_modules import find_head

from .arguments import ModelArguments


def adapt(model: PreTrainedModel, model_args: ModelArguments) -> Any:
    """Prepare a model for training by one of the methods, and freeze everything else.

    | `method` | trained besides the head |
    |---|---|
    | "elp" | ELP-adapters |
    | "lora" | LoRA in the linear layers of the feed-forward modules |
    | "full" | all encoder layers |
    | "head" | nothing |

    The CNN feature encoder is frozen in each of them, and heads average over a recording's own frames. A model that
    generates text has a pretrained decoder instead of a head: only "full" trains it.

    Args:
        model: A pretrained model with the head of the task.
        model_args: The method and its settings.

    Returns:
        A `PeftModel` for "elp" and "lora", else the model itself.

    Raises:
        ValueError: The settings do not fit the model.
    """
    encoder, model_class = find_encoder(model), type(model).__name__
    if model_args.method != "elp":  # ELPConfig does the following itself.
        if not encoder.backbone_path:
            raise ValueError(f"{model_class} is a bare encoder without a head. Load it with the head of the task.")
        shorten_window(model, model_args.chunk_length)
        pool_own_frames(model)
        freeze: Any = getattr(model, "freeze_feature_encoder", None)
        if freeze is not None:
            freeze()  # Else the convolutions record a graph in training, even when frozen.
    if model_args.method in ("elp", "lora"):
        config = model_args.elp_config() if model_args.method == "elp" else _lora_config(model, model_args)
        adapted = get_peft_model(model, config)
        # Where the vocabulary is new, PEFT would look for the embeddings of its tokens; speech encoders have none.
        adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)  # pyright: ignore
        return adapted
    if model_args.method == "head" and _generates(model):
        raise ValueError(
            f"--method head has nothing to train in {model_class}, whose decoder is pretrained. Choose another method."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(f"{encoder.backbone_path}."))
    if model_args.method == "full":
        nn.ModuleList(encoder.layers).requires_grad_(True)
    return model


def _lora_config(model: PreTrainedModel, model_args: ModelArguments) -> LoraConfig:
    encoder, model_class = find_encoder(model), type(model).__name__
    head = [] if _generates(model) else find_head(model, encoder.backbone_path)  # A decoder stays frozen.
    if head and (bare := [name for name, _ in model.named_parameters(recurse=False)]):
        raise ValueError(
            f"PEFT trains modules, so LoRA would leave {bare[0]} of {model_class} frozen. Set "
            "use_weighted_layer_sum=False in the configuration of the encoder, or choose another method."
        )
    names = [name for name, _ in model.named_modules()]
    if shared := [path for path in head if sum(f".{name}".endswith(f".{path}") for name in names) > 1]:
        raise ValueError(
            f"PEFT finds modules_to_save by the end of their names. Both the head and the encoder of {model_class} "
            f"have a {shared[0]!r}, so LoRA would train both. Choose another head or method."
        )
    parts = (*encoder.family.feed_forward_before, *encoder.family.feed_forward)
    linear_layers = [
        encoder.layer_path(number, name)
        for number, layer in enumerate(encoder.layers)
        for part in parts
        for name, module in layer.get_submodule(part).named_modules(prefix=part)
        if isinstance(module, nn.Linear)
    ]
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        target_modules=model_args.lora_target_modules or linear_layers,
        modules_to_save=head or None,
    )


def _generates(model: PreTrainedModel) -> bool:
    """Return whether a pretrained decoder follows the encoder, instead of the head of a task."""
    return model.can_generate() and head_input(type(model)) is None


def get_base_model(model: Any) -> Any:
    """Return the Transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def without_adapter(model: Any) -> AbstractContextManager[None]:
    """Return a context in which the model answers as before its adapter was added, if it has one."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def has_elp(model: Any) -> bool:
    """Return whether the model was adapted by method "elp"."""
    return isinstance(getattr(model, "peft_config", {}).get("default"), ELPConfig)


def trained_parameters(model: Any) -> dict[str, dict[str, nn.Parameter]]:
    """Return the trained parameters by name, under "encoder" and "head"."""
    backbone = f"{find_encoder(model).backbone_path}."
    parts: dict[str, dict[str, nn.Parameter]] = {"encoder": {}, "head": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts["encoder" if name.startswith(backbone) else "head"][name] = parameter
    return parts


def count_trained(model: Any) -> dict[str, int]:
    """Return the numbers of trained parameters, as `trained_parameters_encoder` and `trained_parameters_head`."""
    return {
        f"trained_parameters_{part}": sum(parameter.numel() for parameter in held.values())
        for part, held in trained_parameters(model).items()
    }
