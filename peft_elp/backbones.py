"""Where each family of speech encoders keeps its parts: a table, keyed by the class of the encoder stack.

The stack is the module that runs the encoder layers. It is found by its class, not by its path: paths differ between
heads and drift between versions of Transformers, class names stay. A new family is a row, here or, for a model that is
not in Transformers, through `register_backbone`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Backbone:
    """Where one encoder stack keeps its parts; paths are relative to the stack, or to a layer where it says so.

    Args:
        layers: The list of encoder layers.
        feed_forward: In a layer, the modules whose output the residual sum takes; they get E-adapters. Where a layer
            calls its linear layers itself, the last of them.
        attention: In a layer, the attention modules whose output the residual sum takes.
        norms: In a layer, its layer norms, the first one as wide as the hidden states.
        layerdrop: Attribute of the stack that holds the probability of skipping a layer in training, or None.
        feature_encoder: In the model around the stack, the convolutions over the waveform, or None.
        reentrant_checkpointing: Whether re-entrant gradient checkpointing ends.
        front_end_inside: False: the stack is called with hidden states and a mask of frames, and pseudo features join
            them there. True: the stack turns audio features into hidden states itself, with positions for a fixed
            number of frames, and pseudo features are carried through the layers beside the frames.
        taps_end: Where the sum of taps takes the signal's place: "stack", the stack's output, or "last layer", where
            the stack pools or up-samples after its layers.
        positions: In a stack with its front end inside, the module that computes relative positions for the layers
            (`position_embeddings`) from hidden states, or None.
        rotary: The same for a module that takes the numbers of the frames as well.
        squeeze: Attribute of the stack that holds how many frames the layers take as one, or None.
        attention_chunk: Attribute of the stack that holds the number of frames that attention sees, or None.
        inside: Class that the stack has to be called by, where other callers feed it something else than speech.
        tap_in_place: Whether the stack writes into the output of a layer, so that a tap has to copy it.
        no_l: Why there is no L-adapter for this family; empty if there is.
        no_p: Why there is no P-adapter for this family; empty if there is.

    Example:
        >>> Backbone(layers="blocks", feed_forward=("mlp",), norms=("norm1", "norm2"), layerdrop=None).squeeze is None
        True
    """

    layers: str = "layers"
    feed_forward: tuple[str, ...] = ("feed_forward",)
    attention: tuple[str, ...] = ("attention",)
    norms: tuple[str, ...] = ("layer_norm", "final_layer_norm")
    layerdrop: str | None = "config.layerdrop"
    feature_encoder: str | None = "feature_extractor"
    reentrant_checkpointing: bool = True
    front_end_inside: bool = False
    taps_end: str = "stack"
    positions: str | None = None
    rotary: str | None = None
    squeeze: str | None = None
    attention_chunk: str | None = None
    inside: str | None = None
    tap_in_place: bool = False
    no_l: str = ""
    no_p: str = ""


_WAV2VEC2 = Backbone()
# A layer returns position_bias, which the next one takes by keyword: its graph is walked again in every recomputation.
_WAVLM = replace(_WAV2VEC2, reentrant_checkpointing=False)
_CONFORMER = Backbone(
    feed_forward=("ffn1", "ffn2"),
    attention=("self_attn",),
    norms=("ffn1_layer_norm", "self_attn_layer_norm", "ffn2_layer_norm", "final_layer_norm"),
)
_SEAMLESS = replace(_CONFORMER, layerdrop="config.speech_encoder_layerdrop", feature_encoder=None)
_WHISPER = Backbone(
    feed_forward=("fc2",),
    attention=("self_attn",),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    layerdrop="layerdrop",
    feature_encoder=None,
    front_end_inside=True,
)
# These pool after their layers: the sum of taps has to take its place before.
_WHISPER_POOLED = replace(_WHISPER, taps_end="last layer")
_PARAKEET = Backbone(
    feed_forward=("feed_forward1", "feed_forward2"),
    attention=("self_attn",),
    norms=("norm_feed_forward1", "norm_self_att", "norm_feed_forward2", "norm_out"),
    layerdrop="layerdrop",
    feature_encoder=None,
    front_end_inside=True,
    positions="encode_positions",
)
_MOONSHINE = Backbone(
    feed_forward=("mlp",),
    attention=("self_attn",),
    norms=("input_layernorm", "post_attention_layernorm"),
    layerdrop=None,
    feature_encoder=None,
    front_end_inside=True,
    rotary="rotary_emb",
)

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
    "Wav2Vec2ConformerEncoder": _CONFORMER,
    "Wav2Vec2BertEncoder": replace(_CONFORMER, feature_encoder=None),
    "SeamlessM4TConformerEncoder": _SEAMLESS,
    "SeamlessM4Tv2ConformerEncoder": replace(_SEAMLESS, attention_chunk="config.speech_encoder_chunk_size"),
    "SpeechT5Encoder": replace(
        _WAV2VEC2,
        layerdrop="layerdrop",
        feature_encoder="prenet.feature_encoder",
        inside="SpeechT5EncoderWithSpeechPrenet",
    ),
    "SEWEncoder": replace(_WAV2VEC2, taps_end="last layer", squeeze="config.squeeze_factor"),
    "SEWDEncoder": replace(
        _WAV2VEC2,
        layers="encoder.layer",
        feed_forward=("output.dense",),
        attention=("attention.output.dense",),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        layerdrop=None,
        taps_end="last layer",
        squeeze="config.squeeze_factor",
    ),
    "WhisperEncoder": _WHISPER,
    "Speech2TextEncoder": _WHISPER,
    "MossTranscribeDiarizeAudioModel": _WHISPER,
    "VoxtralEncoder": _WHISPER,
    "Qwen2AudioEncoder": _WHISPER_POOLED,
    "AudioFlamingo3Encoder": _WHISPER_POOLED,
    # Its head reads a mean of two tokens, which the stack takes itself.
    "ASTModel": Backbone(
        feed_forward=("mlp",),
        norms=("layernorm_before", "layernorm_after"),
        layerdrop=None,
        feature_encoder=None,
        front_end_inside=True,
        taps_end="last layer",
    ),
    "ParakeetEncoder": _PARAKEET,
    "LasrEncoder": replace(_PARAKEET, positions=None, rotary="rotary_emb"),
    "MoonshineEncoder": _MOONSHINE,
    "GlmAsrEncoder": _MOONSHINE,
}

# Encoders of audio that ELP cannot adapt, by the class that gives them away, and why.
REFUSED: dict[str, str] = {
    "ClapAudioEncoder": "CLAP's encoder changes width and resolution from stage to stage: its layers cannot be summed",
    "SpeechT5EncoderWithTextPrenet": "this SpeechT5 reads text; ELP adapts the one that reads speech, as in "
    "SpeechT5ForSpeechToText",
    "EncodecEncoder": "EnCodec is a codec of convolutions and an LSTM, without encoder layers",
    "DacEncoder": "DAC is a codec of convolutions, without encoder layers",
    "MimiEncoder": "Mimi's quantiser lets no gradient through to its encoder",
    "VitsTextEncoder": "VITS speaks; it has no encoder of speech",
}

# The first linear layer of each head that reads the encoder's output frame by frame, by the end of its class name.
HEAD_INPUTS: dict[str, str] = {
    "ForCTC": "lm_head",
    "ForSequenceClassification": "projector",
    "ForAudioFrameClassification": "classifier",
    "ForAudioClassification": "projector",
    "ForXVector": "projector",
}


def register_backbone(stack_class: str, backbone: Backbone) -> None:
    """Describe a speech encoder that ELP does not know, so that it can be adapted like any other.

    Args:
        stack_class: Name of the class of the module that runs the encoder layers.
        backbone: Where it keeps its parts.

    Raises:
        ValueError: The class is described already, in another way.

    Example:
        >>> register_backbone("MyEncoder", Backbone(layers="blocks", feed_forward=("mlp",), norms=("norm1", "norm2")))
        >>> del BACKBONES["MyEncoder"]
    """
    known = BACKBONES.get(stack_class)
    if known is not None and known != backbone:
        raise ValueError(
            f"{stack_class} is described already, as {known}. Give your encoder stack a class name of its own."
        )
    BACKBONES[stack_class] = backbone


def family(cls: type) -> Backbone | None:
    """The row of an encoder stack's class, or of the nearest class it derives from; None if there is none."""
    return next((BACKBONES[base.__name__] for base in cls.__mro__ if base.__name__ in BACKBONES), None)


def head_input(cls: type) -> str | None:
    """The name of the first linear layer in a head model of this class, None for a head that is not known."""
    names = (base.__name__ for base in cls.__mro__)
    return next((layer for name in names for end, layer in HEAD_INPUTS.items() if name.endswith(end)), None)
