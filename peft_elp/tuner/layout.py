"""Hidden states in the memory layout in which frozen layers are fast.

PyTorch multiplies a transposed batch with a weight that needs no gradient frame by frame, and with a trainable weight
in one product. So a frozen WavLM, whose attention transposes its input, is slower than a trainable one: see
[pytorch#161564](https://github.com/pytorch/pytorch/issues/161564).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from peft_elp.backbones import Backbone

from .find import find_encoder
from .wrapper import Wrapper

FASTER = "_elp_faster"  # Attribute of a module that `speed_up_frozen` has changed.


def lay_out_time_first(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: the same hidden states `(batch, frames, hidden)`, with time as the first axis in memory."""
    if args:
        return (_time_first(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _time_first(kwargs["hidden_states"])}


def _time_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def transposing_parts(layers: Iterable[nn.Module], family: Backbone) -> list[nn.Module]:
    """Return the modules of some encoder layers that transpose hidden states."""
    found = [layer.get_submodule(path) for layer in layers for path in family.transposing]
    return [module.base_layer if isinstance(module, Wrapper) else module for module in found]


def speed_up_frozen(model: nn.Module) -> nn.Module:
    """Make a model with a frozen encoder as fast as it is when its weights are trainable.

    A model with ELP-adapters does not need it. Call this for one without, before you compare their speed: with LoRA,
    with a head alone, or for inference. Only WavLM changes, and its results stay the same. Calling it again changes
    nothing.

    Args:
        model: A model that contains one supported speech encoder. It is changed in place.

    Returns:
        The model.

    Raises:
        ValueError: The model has no supported encoder, or several.

    Examples:
        >>> from transformers import WavLMConfig, WavLMModel
        >>> model = WavLMModel(WavLMConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        >>> speed_up_frozen(model.requires_grad_(False)) is model
        True
    """
    encoder = find_encoder(model)
    for part in transposing_parts(encoder.layers, encoder.family):
        if not getattr(part, FASTER, False):
            part.register_forward_pre_hook(lay_out_time_first, with_kwargs=True)
            setattr(part, FASTER, True)
    return model
