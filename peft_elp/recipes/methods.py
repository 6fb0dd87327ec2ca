"""Four methods to train a speech encoder for a task: ELP-adapters, LoRA, all encoder layers, or the head alone."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_elp import ELPConfig, find_encoder, shorten_window
from peft_elp.heads import head_input

from .arguments import ModelArguments


def adapt(model: PreTrainedModel, model_args: ModelArguments) -> Any:
    """Prepare a model for training by one of the methods, and freeze everything else.

    | `method` | trained besides the head |
    |---|---|
    | "elp" | ELP-adapters |
    | "lora" | LoRA in the linear layers of the feed-forward modules |
    | "full" | all encoder layers |
    | "head" | nothing |

    The CNN feature encoder is frozen in each of them. A model that generates text has a pretrained decoder instead of
    a head: "full" trains it with the encoder layers, the other methods leave it as it is.

    Args:
        model: A pretrained model with the head of the task.
        model_args: `ModelArguments` with the method and its settings.

    Returns:
        A `PeftModel` for "elp" and "lora", else the model itself.

    Raises:
        ValueError: The settings do not fit the model.

    Examples:
        >>> from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
        >>> size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = Wav2Vec2ForCTC(Wav2Vec2Config(**size))
        >>> count_trained(adapt(model, ModelArguments(model_name_or_path="", method="head")))
        {'trained_parameters_encoder': 0, 'trained_parameters_head': 544}
    """
    if model_args.method != "elp":  # ELPConfig does the following itself.
        shorten_window(model, model_args.chunk_length)
        freeze: Any = getattr(model, "freeze_feature_encoder", None)
        if freeze is not None:
            freeze()  # Else the convolutions record a graph in training, even when frozen.
    if model_args.method in ("elp", "lora"):
        config = _elp_config(model_args) if model_args.method == "elp" else _lora_config(model, model_args)
        adapted = get_peft_model(model, config)
        # Where the vocabulary is new, PEFT would look for the embeddings of its tokens; speech encoders have none.
        adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)  # pyright: ignore
        return adapted
    if model_args.method == "head" and _generates(model):
        raise ValueError(
            f"--method head has nothing to train in {type(model).__name__}, whose decoder is pretrained. Choose elp, "
            "lora or full."
        )
    model.requires_grad_(False)
    for name in head_modules(model):
        model.get_submodule(name).requires_grad_(True)
    for _, parameter in model.named_parameters(recurse=False):  # the weights of use_weighted_layer_sum
        parameter.requires_grad_(True)
    if model_args.method == "full":
        for layer in find_encoder(model).layers:
            layer.requires_grad_(True)
    return model


def _elp_config(model_args: ModelArguments) -> ELPConfig:
    settings = model_args.elp_settings()
    return ELPConfig.preset(model_args.preset, **settings) if model_args.preset else ELPConfig(**settings)


def _lora_config(model: PreTrainedModel, model_args: ModelArguments) -> LoraConfig:
    # A decoder is pretrained and stays frozen.
    head = [] if _generates(model) else head_modules(model)
    if head and (bare := [name for name, _ in model.named_parameters(recurse=False)]):
        raise ValueError(
            f"PEFT trains modules, so LoRA would leave {bare[0]} of {type(model).__name__} frozen. "
            "Set use_weighted_layer_sum=False in the configuration of the encoder, or choose another method."
        )
    names = [name for name, _ in model.named_modules()]
    if shared := [path for path in head if sum(f".{name}".endswith(f".{path}") for name in names) > 1]:
        raise ValueError(
            f"PEFT finds modules_to_save by the end of their names, and both the head and the encoder of "
            f"{type(model).__name__} have a {shared[0]!r}: LoRA would train both. Choose another head or method."
        )
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        target_modules=model_args.lora_target_modules or feed_forward_layers(model),
        modules_to_save=head or None,
    )


def _generates(model: PreTrainedModel) -> bool:
    """Whether a pretrained decoder follows the encoder, instead of the head of a task."""
    return model.can_generate() and head_input(type(model)) is None


def feed_forward_layers(model: nn.Module) -> list[str]:
    """The paths of the linear layers in the feed-forward modules of the encoder layers.

    Examples:
        >>> from transformers import WhisperConfig, WhisperForAudioClassification
        >>> size = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32)
        >>> feed_forward_layers(WhisperForAudioClassification(WhisperConfig(**size)))
        ['encoder.layers.0.fc1', 'encoder.layers.0.fc2']
    """
    encoder = find_encoder(model)
    row, paths = encoder.family, []
    for index, layer in enumerate(encoder.layers):
        for part in (*row.feed_forward_before, *row.feed_forward):
            inside = layer.get_submodule(part).named_modules(prefix=part)
            paths += [encoder.layer_path(index, name) for name, module in inside if isinstance(module, nn.Linear)]
    return paths


def head_modules(model: PreTrainedModel) -> list[str]:
    """The paths of the modules with parameters outside the speech encoder: a head, or a decoder.

    Examples:
        >>> from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
        >>> size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = Wav2Vec2ForCTC(Wav2Vec2Config(**size))
        >>> head_modules(model)
        ['lm_head']
    """
    path = find_encoder(model).backbone_path
    if not path:
        raise ValueError(
            f"{type(model).__name__} is a bare encoder without a head. Load it with the head of the task."
        )
    head, here, parent = [], model, ""
    for step in path.split("."):
        for name, child in here.named_children():
            if name != step and next(child.parameters(), None) is not None:
                head.append(f"{parent}{name}")
        here, parent = here.get_submodule(step), f"{parent}{step}."
    return head


def unwrap(model: Any) -> Any:
    """The Transformers model inside a `PeftModel`, or the model itself.

    Examples:
        >>> from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
        >>> size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = Wav2Vec2ForCTC(Wav2Vec2Config(**size))
        >>> unwrap(get_peft_model(model, ELPConfig(adapters="E", e_dim=4))) is model
        True
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def without_adapter(model: Any) -> AbstractContextManager[None]:
    """A context in which the model answers as before its adapter was added; a model without adapters is left alone.

    Examples:
        >>> from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
        >>> size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = Wav2Vec2ForCTC(Wav2Vec2Config(**size))
        >>> adapted = get_peft_model(model, ELPConfig(adapters="E", e_dim=4))
        >>> import torch
        >>> with without_adapter(adapted):
        ...     loss = adapted(torch.zeros(1, 4000), labels=torch.tensor([[1]])).loss
    """
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def has_elp(model: Any) -> bool:
    """Whether the model was adapted by method "elp"."""
    return isinstance(getattr(model, "peft_config", {}).get("default"), ELPConfig)


def trained_parameters(model: Any) -> dict[str, dict[str, nn.Parameter]]:
    """The trained parameters by name, under "encoder" and "head".

    Examples:
        >>> from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
        >>> size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = Wav2Vec2ForCTC(Wav2Vec2Config(**size))
        >>> held = trained_parameters(adapt(model, ModelArguments(model_name_or_path="", method="head")))
        >>> {part: [*parameters] for part, parameters in held.items()}
        {'encoder': [], 'head': ['lm_head.weight', 'lm_head.bias']}
    """
    encoder = f"{find_encoder(unwrap(model)).backbone_path}."
    parts: dict[str, dict[str, nn.Parameter]] = {"encoder": {}, "head": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_inside = name.removeprefix("base_model.model.").startswith(encoder)
            parts["encoder" if is_inside else "head"][name] = parameter
    return parts


def count_trained(model: Any) -> dict[str, int]:
    """The numbers of trained parameters, as `trained_parameters_encoder` and `trained_parameters_head`.

    Examples:
        >>> from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
        >>> size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = Wav2Vec2ForCTC(Wav2Vec2Config(**size))
        >>> count_trained(get_peft_model(model, ELPConfig(adapters="E", e_dim=4)))
        {'trained_parameters_encoder': 488, 'trained_parameters_head': 544}
    """
    return {
        f"trained_parameters_{part}": sum(parameter.numel() for parameter in held.values())
        for part, held in trained_parameters(model).items()
    }
