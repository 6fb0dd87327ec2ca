"""Hidden states in the memory layout in which frozen layers are fast.

PyTorch multiplies a transposed batch with a weight that needs no gradient frame by frame, and with a trainable weight
in one product. So a frozen WavLM, whose attention transposes its input, is slower than a trainable one: see
[pytorch#161564](https://github.com/pytorch/pytorch/issues/161564).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from peft_elp.backbones import Backbone

from .find import find_encoder
from .wrapper import Wrapper


def lay_out_time_first(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: the same hidden states `(batch, frames, hidden)`, with time as the first axis in memory."""
    if args:
        return (_time_first(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _time_first(kwargs["hidden_states"])}


def _time_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def time_first_parts(layers: Iterable[nn.Module], family: Backbone) -> list[nn.Module]:
    """The modules of some encoder layers that take hidden states laid out time-first."""
    found = [layer.get_submodule(path) for layer in layers for path in family.time_first]
    return [module.base_layer if isinstance(module, Wrapper) else module for module in found]


def lay_out(parts: Iterable[nn.Module], hook: Callable[..., Any], on: bool) -> None:
    """Put a hook on modules where it is missing, or take it off."""
    for part in parts:
        # The dictionary of hooks is private to PyTorch; see `undo_patches`.
        held = [key for key, other in part._forward_pre_hooks.items() if other is hook]
        if on and not held:
            part.register_forward_pre_hook(hook, with_kwargs=True)
        for key in held if not on else ():
            del part._forward_pre_hooks[key]
            part._forward_pre_hooks_with_kwargs.pop(key, None)


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
    lay_out(time_first_parts(encoder.layers, encoder.family), _by_user, on=True)
    return model


def _by_user(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Another function than the hook of the tuner, which `unload()` removes.
    return lay_out_time_first(module, args, kwargs)
