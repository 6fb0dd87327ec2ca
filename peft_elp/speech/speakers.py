"""Speaker embeddings, and whether padding changes the output for a recording."""

from __future__ import annotations

import threading
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from peft_elp.backbones import family, has_fixed_window
from peft_elp.heads import head_row


def is_padding_invariant(model: nn.Module, feature_extractor: Any) -> bool:
    """Tell whether a model's output for a recording is independent of longer recordings in the same batch.

    Where it is False, batch recordings of one length, or process them one by one: without an attention mask, for
    feature encoders that are normalised over time, for encoders whose convolutions read padded frames (data2vec-audio,
    wav2vec2-conformer, SEW, SEW-D, and all with `add_adapter`), and for x-vector heads, which count padded frames.

    Args:
        model: A model of Transformers with its head, or a model with adapters around one.
        feature_extractor: The feature extractor that pads the batch.

    Examples:
        >>> from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC
        >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = Wav2Vec2ForCTC(Wav2Vec2Config(feat_extract_norm="layer", **size))
        >>> is_padding_invariant(model, Wav2Vec2FeatureExtractor(return_attention_mask=True))
        True
        >>> is_padding_invariant(model, Wav2Vec2FeatureExtractor(return_attention_mask=False))
        False
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return (
        ("input_features" in feature_extractor.model_input_names or feature_extractor.return_attention_mask)
        and (has_fixed_window(base) or hasattr(base, "_get_feature_vector_attention_mask"))
        and getattr(base.config, "feat_extract_norm", None) != "group"
        and not getattr(base.config, "add_adapter", False)
        and not any(row and row.feels_padding for row in map(family, map(type, base.modules())))
        and not _has_embedding(type(base))
    )


def speaker_embeddings(model: nn.Module, **inputs: Any) -> Tensor:
    """Return one embedding of the speaker for each utterance.

    An x-vector model returns its embeddings. For a sequence classification model, this is the input of the
    classifier: the output of the projector, averaged over the valid frames. The embeddings carry gradients, so they
    can be part of a loss.

    Args:
        model: A model of either kind, with or without an adapter around it.
        **inputs: The arguments of the model.

    Returns:
        `(batch, width)`, not normalised.

    Raises:
        ValueError: The model is of another kind.

    Examples:
        >>> import torch
        >>> from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification
        >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, classifier_proj_size=16)
        >>> model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**size))
        >>> speaker_embeddings(model, input_values=torch.zeros(2, 16000)).shape
        torch.Size([2, 16])
    """
    if any(_has_embedding(type(module)) for module in model.modules()):
        return model(**inputs).embeddings
    classifier = next((module for name, module in model.named_modules() if name.split(".")[-1] == "classifier"), None)
    read: list[Tensor] = []
    here = threading.get_ident()

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == here:  # Other threads may be calling the same model.
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


def _has_embedding(model_class: type) -> bool:
    row = head_row(model_class)
    return row is not None and row.output == "embedding"
