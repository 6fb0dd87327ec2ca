"""Another adapter's weights take the place of a loaded one's, in the same tensors."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from peft import PeftConfig, PeftType, get_peft_model_state_dict, load_peft_weights
from torch import nn

from peft_elp.config import ELPConfig

from .fit import is_finite

# What an adapter computes does not depend on these, or the names of its tensors tell them already.
_FREE = {
    *(field.name for field in fields(PeftConfig)),
    "config_format",
    "e_dropout",
    "l_dropout",
    "init_weights",
    "init_std",
    "p_init_std",
    "modules_to_save",
    "target",
    "exclude_modules",
    "verification_threshold",
}
_SHOWN = 8


def hotswap_adapter(model: nn.Module, model_name_or_path: str, adapter_name: str = "default", **hub: Any) -> None:
    """Put the weights of a saved adapter, head included, into the tensors of a loaded one.

    The tensors stay the same objects: a compiled model runs on without compiling again, and an optimizer still holds
    them. The adapter keeps its name and, for training, its dropout. `peft.utils.hotswap` does this for LoRA alone.

    Args:
        model: A model with ELP-adapters, as `get_peft_model` or `PeftModel.from_pretrained` returns it, or that model
            from `torch.compile`.
        model_name_or_path: Folder or Hub name of the saved adapter.
        adapter_name: The loaded adapter whose weights give way.
        hub: `subfolder`, `revision`, `token`, `cache_dir`: as in `PeftModel.from_pretrained`.

    Raises:
        ValueError: The model has no such adapter, or the saved one does not fit into its place: it is no ELP-adapter,
            computes otherwise, or its tensors have other names or shapes. Nothing is changed then.

    Examples:
        >>> from tempfile import mkdtemp
        >>> import peft_elp
        >>> from peft import get_peft_model
        >>> from transformers import WavLMConfig, WavLMModel
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, layerdrop=0.0)
        >>> model = get_peft_model(WavLMModel(WavLMConfig(**size)), peft_elp.ELPConfig())
        >>> folder = mkdtemp()
        >>> model.save_pretrained(folder)
        >>> peft_elp.hotswap_adapter(model, folder)
    """
    base: Any = getattr(model, "_orig_mod", model)  # what torch.compile returns is a module around the model
    loaded = getattr(base, "peft_config", {})
    config = loaded.get(adapter_name)
    if not isinstance(config, ELPConfig):
        ours = sorted(name for name, known in loaded.items() if isinstance(known, ELPConfig))
        raise ValueError(
            f"No ELP-adapter named {adapter_name!r} is loaded into this {type(base).__name__}; it has "
            f"{', '.join(map(repr, ours)) or 'none'}. Load a first one with PeftModel.from_pretrained; others can "
            "take its place then."
        )
    saved = PeftConfig.from_pretrained(model_name_or_path, **hub)
    if not isinstance(saved, ELPConfig):
        raise ValueError(
            f"{model_name_or_path!r} holds an adapter of {PeftType(saved.peft_type).value}, which cannot take the "
            f"place of the ELP-adapter {adapter_name!r}. Name a saved ELP-adapter."
        )
    new = load_peft_weights(model_name_or_path, device="cpu", **hub)
    # These share their storage with the parameters and buffers of the model.
    old = get_peft_model_state_dict(base, adapter_name=adapter_name, save_embedding_layers=False)

    differences = [
        f"{field.name} is {getattr(saved, field.name)!r}, here {getattr(config, field.name)!r}"
        for field in fields(ELPConfig)
        if field.name not in _FREE and getattr(saved, field.name) != getattr(config, field.name)
    ]
    differences += [f"{name} is missing" for name in old if name not in new]
    differences += [f"{name} has no place here" for name in new if name not in old]
    differences += [
        f"{name} is {tuple(new[name].shape)}, here {tuple(x.shape)}"
        for name, x in old.items()
        if name in new and new[name].shape != x.shape
    ]
    differences += [f"{name} holds values that are no finite numbers" for name, x in new.items() if not is_finite(x)]
    if differences:
        more = len(differences) - _SHOWN
        raise ValueError(
            f"The adapter in {model_name_or_path!r} cannot take the place of {adapter_name!r}, which was left as it "
            f"is: {'; '.join(differences[:_SHOWN])}{f'; and {more} more' if more > 0 else ''}. Load it beside: "
            f"model.load_adapter({model_name_or_path!r}, adapter_name=...), then model.set_adapter(...)."
        )
    with torch.no_grad():
        for name, x in old.items():
            x.copy_(new[name])
    config.verification_threshold = saved.verification_threshold
