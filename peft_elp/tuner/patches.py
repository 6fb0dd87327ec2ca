"""What ELP changes on a user's model apart from the modules that it wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from peft_elp.call.hidden_states import trim_hidden_states

from .first_step import watch_when_trained
from .guards import refuse_short_utterances, refuse_unloaded
from .layout import lay_out_time_first

# Everything that is patched onto a user's model: a function is a hook, a string is an attribute of a module. All of it
# is undone when the last adapter leaves the model.
PATCHES: tuple[Callable[..., Any] | str, ...] = (
    trim_hidden_states,  # Forward hook of the backbone: its reported hidden states have no pseudo features.
    refuse_short_utterances,  # Forward pre-hook of the backbone: an utterance without a frame is an error.
    lay_out_time_first,  # Forward pre-hook of attention modules: they get hidden states in their own layout.
    refuse_unloaded,  # Forward pre-hook of the model, without a PeftModel: the adapter's tensors have been loaded.
    watch_when_trained,  # Forward pre-hook of the model, without a PeftModel: the first step reaches all parameters.
    "_requires_grad",  # Of the convolutions: Transformers' private flag that makes them record a graph in training.
    # Of the model, without a PeftModel. Saving asks for the embeddings, and most speech models raise.
    "get_input_embeddings",
    "get_output_embeddings",
    "load_adapter",  # Of a wav2vec 2.0 model: Transformers' method for languages, which needs plain names of modules.
    "generate_with_fallback",  # Of Whisper: its method for a segment of long recordings, which mixes adapters then.
    "_load_pretrained_model",  # Of the model, without a PeftModel: Transformers' way to read an adapter's file.
    "delete_adapter",  # Of the model, without a PeftModel: Transformers' method, which leaves wrappers in the model.
)
_KEPT = "_elp_"  # How the name starts under which a module keeps the attribute that it had before.


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of one module, and keep what it was."""
    assert name in PATCHES
    kept = _KEPT + name.lstrip("_")
    if kept not in vars(module):
        vars(module)[kept] = vars(module).get(name, ...)
    vars(module)[name] = value


def undo_patches(modules: Iterable[nn.Module]) -> None:
    """Take everything in `PATCHES` off some modules."""
    for module in modules:
        # The dictionaries of hooks are private to PyTorch. `register_forward_hook` returns a handle for removal, but a
        # handle would have to be kept somewhere, and would not survive a copy of the model.
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in PATCHES]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for name in (patch for patch in PATCHES if isinstance(patch, str)):
            kept = _KEPT + name.lstrip("_")
            if kept in vars(module):
                before = vars(module).pop(kept)
                vars(module).pop(name, None)
                if before is not ...:
                    vars(module)[name] = before
