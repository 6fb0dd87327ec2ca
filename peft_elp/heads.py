"""The heads of Transformers: a table, keyed by the end of a model's class name.

Each row holds the first layer of the head, the name of the task on the Hub, the commands that work with such a head,
and the settings of the model's configuration that the head is built from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Output = Literal["hidden_states", "labels", "frame_labels", "frame_tokens", "generated_tokens", "embedding"]


@dataclass(frozen=True)
class HeadRow:
    """One kind of head.

    Examples:
        >>> HEADS["ForCTC"].input_layer
        'lm_head'
    """

    task: str  # the name of the task on the Hub
    output: Output  # what the model returns for a recording
    input_layer: str | None = None  # the first linear layer of the head, if it reads the encoder frame by frame
    commands: tuple[str, ...] = ()  # what `SpeechAdapter` and `peft-elp` can do: "transcribe", "classify", "verify"
    settings: tuple[str, ...] = ()  # of the model's configuration, that the head is built from


_RECOGNITION, _CLASSIFICATION = "automatic-speech-recognition", "audio-classification"
_LABELS = ("num_labels", "id2label", "label2id", "problem_type")  # setting num_labels resets the names of the labels

HEADS: dict[str, HeadRow] = {
    "ForSequenceClassification": HeadRow(
        _CLASSIFICATION, "labels", "projector", ("classify", "verify"), (*_LABELS, "classifier_proj_size")
    ),
    "ForAudioClassification": HeadRow(
        _CLASSIFICATION, "labels", "projector", ("classify", "verify"), (*_LABELS, "classifier_proj_size")
    ),
    "ForAudioFrameClassification": HeadRow(_CLASSIFICATION, "frame_labels", "classifier", (), _LABELS),
    "ForCTC": HeadRow(_RECOGNITION, "frame_tokens", "lm_head", ("transcribe",), ("vocab_size",)),
    "ForConditionalGeneration": HeadRow(_RECOGNITION, "generated_tokens", None, ("transcribe",)),
    "ForSpeechSeq2Seq": HeadRow(_RECOGNITION, "generated_tokens", None, ("transcribe",)),
    "ForXVector": HeadRow(
        _CLASSIFICATION,
        "embedding",
        "projector",
        ("verify",),
        (*_LABELS, "tdnn_dim", "tdnn_kernel", "tdnn_dilation", "xvector_output_dim"),
    ),
    "Model": HeadRow("feature-extraction", "hidden_states"),
}

HEAD_SETTINGS: tuple[str, ...] = tuple(dict.fromkeys(setting for row in HEADS.values() for setting in row.settings))


def head_row(model_class: type | str | None) -> HeadRow | None:
    """Return the row of a model's class, or of the name of one; None for a class without a known head.

    Examples:
        >>> head_row("WavLMForCTC").task
        'automatic-speech-recognition'
    """
    return next(_rows(model_class), None)


def head_input(model_class: type) -> str | None:
    """Return the name of the first linear layer of the head that reads the encoder, or None without such a layer."""
    return next((row.input_layer for row in _rows(model_class) if row.input_layer), None)


def _rows(model_class: type | str | None) -> Iterator[HeadRow]:
    names = [base.__name__ for base in model_class.__mro__] if isinstance(model_class, type) else [model_class or ""]
    return (row for name in names for ending, row in HEADS.items() if name.endswith(ending))
