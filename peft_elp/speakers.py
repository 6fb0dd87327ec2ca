"""What makes a voice comparable: speaker embeddings, and batches whose padding changes no answer."""

from __future__ import annotations

import threading
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from peft_elp.backbones import has_fixed_window


def is_padding_invariant(model: nn.Module, feature_extractor: Any) -> bool:
    """Whether what a model answers for a recording is known not to depend on longer ones in the same batch.

    It is not for convolutions normalised over time, for heads that count frames of padding, as x-vectors do, and where
    there is no attention mask. Then put recordings of one length into a batch, or one at a time.

    Args:
        model: Of Transformers, with its head, or a model with adapters around one.
        feature_extractor: What pads.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return (
        getattr(base.config, "feat_extract_norm", None) != "group"
        and not type(base).__name__.endswith("ForXVector")
        and (has_fixed_window(base) or hasattr(base, "_get_feature_vector_attention_mask"))
        and ("input_features" in feature_extractor.model_input_names or feature_extractor.return_attention_mask)
    )


def speaker_embeddings(model: nn.Module, **inputs: Any) -> Tensor:
    """What a model makes of each utterance before it names the speaker.

    Of an x-vector model, its embeddings. Of a model for sequence classification, what its classifier reads: the mean,
    over the valid frames, of what the projector makes of them. Gradients flow, so a loss may be computed on them.

    Args:
        model: A model of either kind, with or without an adapter around it.
        **inputs: What the model is called with.

    Returns:
        `(batch, width)`, not normalised.

    Raises:
        ValueError: The model is of another kind.
    """
    if any(type(module).__name__.endswith("ForXVector") for module in model.modules()):
        return model(**inputs).embeddings
    classifier = next((module for name, module in model.named_modules() if name.split(".")[-1] == "classifier"), None)
    read: list[Tensor] = []
    here = threading.get_ident()

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == here:  # others may be calling the same model
            read.append(args[0])

    if classifier is not None:
        hook = classifier.register_forward_pre_hook(keep)
        try:
            model(**inputs)
        finally:
            hook.remove()
    if len(read) != 1 or read[0].ndim != 2:
        raise ValueError(
            f"{type(model).__name__} has no speaker embeddings: it is neither an x-vector model nor one for sequence "
            "classification. Load it with AutoModelForAudioXVector or AutoModelForAudioClassification."
        )
    return read[0]
