"""Replace the weights of a loaded adapter by those of a saved one, in the same tensors."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, PeftType, get_peft_model_state_dict, load_peft_weights
from torch import nn

from peft_elp.config import ELPConfig, differing_fields
from peft_elp.saved.weights import SavedTensor
from peft_elp.wording import brief, unknown_adapter

from .misfits import find_misfits


def hotswap_adapter(model: nn.Module, model_name_or_path: str, adapter_name: str = "default", **hub: Any) -> None:
    """Put the weights of a saved adapter, head included, into the tensors of a loaded adapter.

    The tensors stay the same objects: a compiled model is not compiled again, and an optimizer still holds them. The
    adapter keeps its name and, for training, its dropout. `peft.utils.hotswap` does the same for LoRA alone.

    Args:
        model: A model with ELP-adapters, as `get_peft_model` or `PeftModel.from_pretrained` returns it, or that model
            from `torch.compile`.
        model_name_or_path: Folder or Hub name of the saved adapter.
        adapter_name: Name of the loaded adapter whose weights are replaced.
        hub: `subfolder`, `revision`, `token`, `cache_dir`: as in `PeftModel.from_pretrained`.

    Raises:
        ValueError: The model has no ELP-adapter of that name; or the saved adapter is not an ELP-adapter, computes
            something else, or has tensors with other names or shapes or with non-finite values. Nothing is changed
            then.

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
    loaded = {k: known for k, known in getattr(model, "peft_config", {}).items() if isinstance(known, ELPConfig)}
    if adapter_name not in loaded:
        raise ValueError(
            f"{unknown_adapter(adapter_name, loaded)} Load a first ELP-adapter with PeftModel.from_pretrained, then "
            "others can replace it."
        )
    config = loaded[adapter_name]
    saved = PeftConfig.from_pretrained(model_name_or_path, **hub)
    if not isinstance(saved, ELPConfig):
        raise ValueError(
            f"{model_name_or_path!r} holds an adapter of {PeftType(saved.peft_type).value}, which cannot replace the "
            f"ELP-adapter {adapter_name!r}. Pass a saved ELP-adapter."
        )
    new = load_peft_weights(model_name_or_path, device="cpu", **hub)
    # These tensors share their storage with the parameters and buffers of the model.
    old = get_peft_model_state_dict(model, None, adapter_name, unwrap_compiled=True, save_embedding_layers=False)
    differences = [
        f"{name} is {brief(there)}, here {brief(here)}"
        for name, (there, here) in differing_fields(saved, config, "computation").items()
    ]
    misfits = find_misfits(old, {name: SavedTensor.of(tensor) for name, tensor in new.items()})
    if differences or misfits:
        raise ValueError(
            f"The adapter in {model_name_or_path!r} cannot replace {adapter_name!r}, which was left as it is: "
            f"{'; '.join([*differences, misfits]).removesuffix('; ')}. Load it as a further adapter: "
            f"model.load_adapter({model_name_or_path!r}, adapter_name=...), then model.set_adapter(...)."
        )
    with torch.no_grad():
        for name, tensor in new.items():
            old[name].copy_(tensor)
    config.verification_threshold = saved.verification_threshold
