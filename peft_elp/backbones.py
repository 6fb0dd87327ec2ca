"""Where each family of speech encoders keeps its parts: a table, keyed by the class of the encoder stack.

The stack is the module that runs the encoder layers. It is found by its class, not by its path: paths differ between
heads and drift between versions of Transformers, class names stay. A new family is a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Backbone:
    """Where one encoder stack keeps its parts; paths are relative to the stack, or to a layer where it says so.

    Args:
        layers: The list of encoder layers.
        feed_forward: In a layer, the modules whose output the residual sum takes.
        attention: In a layer, the attention whose output the residual sum takes.
        norms: In a layer, its layer norms.
        layerdrop: Attribute that holds the probability of skipping a layer in training, or None.
        feature_encoder: In the model around the stack, the convolutions over the waveform.
        reentrant_checkpointing: Whether re-entrant gradient checkpointing ends.
    """

    layers: str = "layers"
    feed_forward: tuple[str, ...] = ("feed_forward",)
    attention: tuple[str, ...] = ("attention",)
    norms: tuple[str, ...] = ("layer_norm", "final_layer_norm")
    layerdrop: str | None = "config.layerdrop"
    feature_encoder: str | None = "feature_extractor"
    reentrant_checkpointing: bool = True


_WAV2VEC2 = Backbone()
# A layer returns position_bias, which the next one takes by keyword: its graph is walked again in every recomputation.
_WAVLM = replace(_WAV2VEC2, reentrant_checkpointing=False)

BACKBONES: dict[str, Backbone] = {
    "Wav2Vec2Encoder": _WAV2VEC2,
    "Wav2Vec2EncoderStableLayerNorm": _WAV2VEC2,
    "HubertEncoder": _WAV2VEC2,
    "HubertEncoderStableLayerNorm": _WAV2VEC2,
    "UniSpeechEncoder": _WAV2VEC2,
    "UniSpeechEncoderStableLayerNorm": _WAV2VEC2,
    "UniSpeechSatEncoder": _WAV2VEC2,
    "UniSpeechSatEncoderStableLayerNorm": _WAV2VEC2,
    "Data2VecAudioEncoder": _WAV2VEC2,
    "WavLMEncoder": _WAVLM,
    "WavLMEncoderStableLayerNorm": _WAVLM,
}

# The first linear layer of each head that reads the encoder's output frame by frame, by the end of its class name.
HEAD_INPUTS: dict[str, str] = {
    "ForCTC": "lm_head",
    "ForSequenceClassification": "projector",
    "ForAudioFrameClassification": "classifier",
    "ForXVector": "projector",
}


def family(cls: type) -> Backbone | None:
    """The row of an encoder stack's class, or of the nearest class it derives from; None if there is none."""
    return next((BACKBONES[base.__name__] for base in cls.__mro__ if base.__name__ in BACKBONES), None)


def head_input(cls: type) -> str | None:
    """The name of the first linear layer in a head model of this class, None for a head that is not known."""
    names = (base.__name__ for base in cls.__mro__)
    return next((layer for name in names for end, layer in HEAD_INPUTS.items() if name.endswith(end)), None)
