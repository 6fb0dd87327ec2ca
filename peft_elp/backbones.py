"""The speech encoders that ELP supports: a table, keyed by the class of the encoder stack in Transformers.

The stack is the module that runs the encoder layers. It is found by its class and not by its path: paths differ
between heads and change between versions of Transformers, and class names do not. To support a new family, add a row
here, or call `register_backbone` for a model that is not in Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Backbone:
    """The parts of one encoder stack. Paths are relative to the stack, or to a layer where stated.

    Args:
        layers: The list of encoder layers.
        feed_forward: In a layer, the feed-forward modules whose output is added to the residual stream. They get
            E-adapters. If a layer calls its linear layers directly, this is the last of them.
        feed_forward_before: In a layer that calls the linear layers of its feed-forward directly, the earlier ones.
        attention: In a layer, the attention modules whose output is added to the residual stream.
        norms: In a layer, its layer norms. The first one has the width of the hidden states.
        layerdrop: Attribute of the stack that holds the probability of skipping a layer in training, or None.
        feature_encoder: In the model that holds the stack, the convolutions over the waveform, or None.
        reentrant_checkpointing: Whether re-entrant gradient checkpointing works. Where it does not, it never returns.
        front_end_inside: False: the stack is called with hidden states and a mask of frames, and pseudo features join
            them there. True: the stack turns audio features into hidden states itself, with positions for a fixed
            number of frames, and pseudo features are carried through the layers beside the frames.
        taps_end: What the sum of taps replaces: the output of the "stack", or of the "last layer" if the stack pools
            or up-samples after its layers.
        positions: In a stack with its front end inside, the module that computes relative positions for the layers
            (`position_embeddings`) from hidden states, or None.
        rotary: As `positions`, for a module that also takes the frame numbers.
        squeeze: Attribute of the stack that holds the number of frames that the layers take as one, or None.
        attention_chunk: Attribute of the stack that holds the number of frames that attention sees, or None.
        inside: The class of the module that has to call the stack, if other callers do not pass it speech.
        window: In a stack that takes audio features of one fixed length, to which the feature extractor pads: the
            embedding with the positions of the frames. None where the length may vary.
        unreached_in: Class of a model whose loss does not reach the stack inside it, or None.
        tap_in_place: Whether the stack writes into the output of a layer, so that a tap has to copy it.
        pre_norm: Whether a layer ends in its residual sum, so that its output is not normalised. False if it ends in a
            norm, as post-norm layers and conformers do.
        transposing: In a layer, the modules that transpose hidden states to `(frames, batch, hidden)`. Frozen layers
            are faster if the memory is laid out so beforehand.
        feels_padding: Whether frames depend on the padded frames behind them, which convolutions over time read.
        no_l: Why this family takes no L-adapter. Empty if it does.
        no_p: Why this family takes no P-adapter. Empty if it does.

    Examples:
        >>> Backbone(layers="blocks", feed_forward=("mlp",), norms=("norm1", "norm2"), layerdrop=None).squeeze is None
        True
    """

    layers: str = "layers"
    feed_forward: tuple[str, ...] = ("feed_forward",)
    feed_forward_before: tuple[str, ...] = ()
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
    window: str | None = None
    unreached_in: str | None = None
    tap_in_place: bool = False
    pre_norm: bool = False
    transposing: tuple[str, ...] = ()
    feels_padding: bool = False
    no_l: str = ""
    no_p: str = ""


_WAV2VEC2 = Backbone()
_WAV2VEC2_STABLE = replace(_WAV2VEC2, pre_norm=True)
# A layer returns position_bias, which the next layer takes by keyword: each recomputation walks its graph again.
# Its attention transposes hidden states and calls `torch.nn.functional.multi_head_attention_forward`.
_WAVLM = replace(_WAV2VEC2, reentrant_checkpointing=False, transposing=("attention",))
_CONFORMER = Backbone(
    feed_forward=("ffn1", "ffn2"),
    attention=("self_attn",),
    norms=("ffn1_layer_norm", "self_attn_layer_norm", "ffn2_layer_norm", "final_layer_norm"),
)
_SEAMLESS = replace(_CONFORMER, layerdrop="config.speech_encoder_layerdrop", feature_encoder=None)
_FC = Backbone(
    feed_forward=("fc2",),
    feed_forward_before=("fc1",),
    attention=("self_attn",),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    layerdrop="layerdrop",
    feature_encoder=None,
    front_end_inside=True,
    pre_norm=True,
)
# These pool after their layers, so the sum of taps has to enter before.
_WHISPER = replace(_FC, window="embed_positions")
_WHISPER_POOLED = replace(_WHISPER, taps_end="last layer")
_PRE_NORM = Backbone(
    feed_forward=("mlp",),
    attention=("self_attn",),
    norms=("input_layernorm", "post_attention_layernorm"),
    layerdrop=None,
    feature_encoder=None,
    front_end_inside=True,
    pre_norm=True,
)
_MOONSHINE = replace(_PRE_NORM, rotary="rotary_emb")
_NEMOTRON = replace(_MOONSHINE, norms=("layer_norm1", "layer_norm2"))
_MACARON = Backbone(
    feed_forward=("feed_forward1", "feed_forward2"),
    attention=("self_attn",),
    norms=("norm_feed_forward1", "norm_self_att", "norm_feed_forward2", "norm_out"),
    layerdrop="layerdrop",
    feature_encoder=None,
    front_end_inside=True,
)
_PARAKEET = replace(_MACARON, positions="encode_positions")
_SLIDING = "its attention sees a sliding window of frames, so that most would never see the pseudo features"
_CAUSAL = "its attention is causal, so that no frame would see the pseudo features behind it"
_BLOCKS = "its attention works in blocks of frames, so that only the last block would see the pseudo features"
_PACKED = "it packs all utterances into one sequence without a batch axis"
_PACKED_WHISPER = replace(_FC, layerdrop=None, no_p=_PACKED)
# The norms before its feed-forward and attention modules are inside of them.
_GRANITE = Backbone(
    feed_forward=("ff1", "ff2"),
    attention=("attn",),
    norms=("post_norm", "ff1.pre_norm", "attn.pre_norm", "ff2.pre_norm"),
    layerdrop=None,
    feature_encoder=None,
    front_end_inside=True,
    tap_in_place=True,
    no_p=_BLOCKS,
)


def _gemma(halves: tuple[str, str], norms: tuple[str, ...], **parts: Any) -> Backbone:
    """Return the row of a macaron whose feed-forward and attention modules hold the residual sum, or a norm before."""
    return Backbone(
        feed_forward=tuple(f"{half}.ffw_layer_2" for half in halves),
        feed_forward_before=tuple(f"{half}.ffw_layer_1" for half in halves),
        norms=(*norms, *(f"{half}.{norm}" for half in halves for norm in ("pre_layer_norm", "post_layer_norm"))),
        layerdrop=None,
        feature_encoder=None,
        front_end_inside=True,
        taps_end="last layer",
        no_p=_SLIDING,
        **parts,
    )


BACKBONES: dict[str, Backbone] = {
    "Wav2Vec2Encoder": _WAV2VEC2,
    "Wav2Vec2EncoderStableLayerNorm": _WAV2VEC2_STABLE,
    "HubertEncoder": _WAV2VEC2,
    "HubertEncoderStableLayerNorm": _WAV2VEC2_STABLE,
    "UniSpeechEncoder": _WAV2VEC2,
    "UniSpeechEncoderStableLayerNorm": _WAV2VEC2_STABLE,
    "UniSpeechSatEncoder": _WAV2VEC2,
    "UniSpeechSatEncoderStableLayerNorm": _WAV2VEC2_STABLE,
    "Data2VecAudioEncoder": replace(_WAV2VEC2, feels_padding=True),
    "WavLMEncoder": _WAVLM,
    "WavLMEncoderStableLayerNorm": replace(_WAVLM, pre_norm=True),
    "Wav2Vec2ConformerEncoder": replace(_CONFORMER, feels_padding=True),
    "Wav2Vec2BertEncoder": replace(_CONFORMER, feature_encoder=None),
    "SeamlessM4TConformerEncoder": _SEAMLESS,
    "SeamlessM4Tv2ConformerEncoder": replace(
        _SEAMLESS, attention_chunk="config.speech_encoder_chunk_size", feels_padding=True
    ),
    "SpeechT5Encoder": replace(
        _WAV2VEC2,
        layerdrop="layerdrop",
        feature_encoder="prenet.feature_encoder",
        inside="SpeechT5EncoderWithSpeechPrenet",
    ),
    "SEWEncoder": replace(_WAV2VEC2, taps_end="last layer", squeeze="config.squeeze_factor", feels_padding=True),
    "SEWDEncoder": replace(
        _WAV2VEC2,
        layers="encoder.layer",
        feed_forward=("output.dense",),
        feed_forward_before=("intermediate.dense",),
        attention=("attention.output.dense",),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        layerdrop=None,
        taps_end="last layer",
        squeeze="config.squeeze_factor",
        feels_padding=True,
    ),
    "WhisperEncoder": _WHISPER,
    "Speech2TextEncoder": _FC,
    "MossTranscribeDiarizeAudioModel": replace(_WHISPER, layerdrop=None),
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
        pre_norm=True,
    ),
    "OmniASRAudioModel": replace(_WAV2VEC2_STABLE, layerdrop="layerdrop", feature_encoder=None, front_end_inside=True),
    "ParakeetEncoder": _PARAKEET,
    "LasrEncoder": replace(_MACARON, rotary="rotary_emb"),
    "MoonshineEncoder": _MOONSHINE,
    "GlmAsrEncoder": _MOONSHINE,
    # Its layers see one token more than its output has frames.
    "PeAudioEncoder": replace(_MOONSHINE, taps_end="last layer"),
    # What follows it reads a projection that the stack makes itself.
    "Dots3NoteAudioModel": replace(_MOONSHINE, rotary="rotary_embedding", taps_end="last layer"),
    # Its head calls it once for each chunk of a recording; the pseudo features join every call.
    # Nemotron 3.5 Transcribe compares its output with a threshold, which no gradient passes.
    "Nemotron3DiarizationAudioModel": replace(_NEMOTRON, unreached_in="Nemotron3_5TranscribeAudioModel"),
    "Nemotron3_5TranscribeAsrAudioModel": _NEMOTRON,
    "MoonshineStreamingEncoder": replace(_PRE_NORM, no_p=_SLIDING),
    "VoxtralRealtimeEncoder": replace(_PRE_NORM, norms=("self_attn_layer_norm", "final_layer_norm"), no_p=_CAUSAL),
    "NemotronAsrStreamingEncoder": replace(
        _MACARON,
        no_p="its attention sees no chunk of frames after its own, so that most would never see the pseudo features",
    ),
    # These two change the width after their layers, and the first one pools as well.
    "Qwen2_5OmniAudioEncoder": replace(_PACKED_WHISPER, taps_end="last layer"),
    "Qwen3OmniMoeAudioEncoder": replace(_PACKED_WHISPER, taps_end="last layer"),
    "Qwen3ASREncoder": _PACKED_WHISPER,
    "GraniteSpeechCTCEncoder": _GRANITE,
    # It may put the outputs of inner layers beside that of the last one.
    "GraniteSpeechPlusCTCEncoder": replace(_GRANITE, taps_end="last layer"),
    "GraniteSpeech5Encoder": replace(
        _MACARON,
        layerdrop=None,
        no_l="some of its layers halve the frame rate, so that the outputs of its layers cannot be summed",
        no_p=_BLOCKS,
    ),
    # Its first layer takes stacked audio features, which input_layernorm is as wide as.
    "FunAsrNanoEncoder": replace(
        _PRE_NORM,
        norms=("post_attention_layernorm", "input_layernorm"),
        no_p="its first layer takes stacked audio features, which are of another width than the hidden states",
    ),
    # It folds long audio into pieces before its layers, and unfolds it after them.
    "Phi4MultimodalAudioModel": Backbone(
        layers="encoders",
        feed_forward=("feed_forward_in", "feed_forward_out"),
        attention=("self_attn",),
        norms=("layer_norm_att", "layer_norm", "feed_forward_in.layer_norm", "feed_forward_out.layer_norm"),
        layerdrop=None,
        feature_encoder=None,
        front_end_inside=True,
        taps_end="last layer",
        no_p="its layers share a bias of attention by distance that is computed for the frames alone",
    ),
    # The first one keeps every fourth frame after its layers, the second one changes the width.
    "Gemma3nAudioEncoder": _gemma(
        ("ffw_layer_start", "ffw_layer_end"),
        norms=("norm", "attention.pre_attn_norm", "attention.post_norm"),
        layers="conformer",
        attention=("attention.post",),
    ),
    "Gemma4AudioModel": _gemma(
        ("feed_forward1", "feed_forward2"),
        norms=("norm_out", "norm_pre_attn", "norm_post_attn"),
        attention=("self_attn",),
    ),
}

_NO_GRADIENT = "it runs its encoder of speech without gradients, so that nothing in there could be trained"
_OVER_CODES = "it decodes over the codes of a codec and has no encoder of speech"
_SPEAKS = "it speaks: what it encodes is text"
_MAKES_SOUND = "it generates sound and has no encoder of speech"
_STAGES = "its encoder is a stack of convolutions whose width and frame rate change from stage to stage"
_NO_LAYERS = "it passes audio features on to its language model without encoder layers"
# Audio models and encoders that ELP cannot adapt: a class that identifies them, and the reason.
REFUSED: dict[str, str] = {
    "XcodecModel": _NO_GRADIENT,
    "Xcodec2Model": _NO_GRADIENT,
    "NeuCodecModel": _NO_GRADIENT,
    "HiggsAudioV2TokenizerModel": _NO_GRADIENT,
    "ClapAudioEncoder": "CLAP's encoder changes width and resolution from stage to stage: its layers cannot be summed",
    "SpeechT5EncoderWithTextPrenet": "this SpeechT5 reads text; ELP adapts the one that reads speech, as in "
    "SpeechT5ForSpeechToText",
    "EncodecEncoder": "EnCodec is a codec of convolutions and an LSTM, without encoder layers",
    "DacEncoder": "DAC is a codec of convolutions, without encoder layers",
    "WavTokenizerEncoder": "WavTokenizer is a codec of convolutions and an LSTM, without encoder layers",
    "Apertus1p5Model": "it reads the codes of a codec and has no encoder of speech",
    "MimiEncoder": "Mimi's quantiser lets no gradient through to its encoder",
    "PocketTTSAudioTokenizerEncoderModel": "it belongs to the codec of a speech synthesiser",
    "VibeVoiceAcousticTokenizerEncoderModel": _STAGES,
    "MuseSparkAudioModel": _STAGES,
    "InklingAudioModel": _NO_LAYERS,
    "Gemma4UnifiedModel": _NO_LAYERS,
    "Pop2PianoStack": "its encoder and its decoder share one class, by which ELP cannot tell the one that hears audio",
    "WhisperDecoderWrapper": "it is the decoder of Whisper without the encoder",
    "SpeechT5EncoderWithoutPrenet": "this SpeechT5 has no front end for speech; ELP adapts SpeechT5ForSpeechToText",
    "KyutaiSpeechToTextModel": _OVER_CODES,
    "MoshiModel": _OVER_CODES,
    "HiggsAudioV2Model": _OVER_CODES,
    "BarkModel": _SPEAKS,
    "ClvpModelForConditionalGeneration": _SPEAKS,
    "GradiumPhononTTSModel": _SPEAKS,
    "PocketTTSModel": _SPEAKS,
    "Qwen2_5OmniTalkerForConditionalGeneration": _MAKES_SOUND,
    "Qwen2_5OmniToken2WavDiTModel": _MAKES_SOUND,
    "UnivNetModel": _MAKES_SOUND,
    "DiaEncoder": _SPEAKS,
    "FastSpeech2ConformerModel": _SPEAKS,
    "VitsTextEncoder": _SPEAKS,
}


# Layers between the encoder and the decoder of a generating model. They are new if two pre-trained models are joined.
BRIDGES = ("enc_to_dec_proj",)


# Rows of encoders that are not in Transformers, by class.
_REGISTERED: dict[type, Backbone] = {}


def register_backbone(stack_class: type, backbone: Backbone) -> None:
    """Describe a speech encoder that ELP does not know, so that it can be adapted like any other.

    Args:
        stack_class: The class of the module that runs the encoder layers. Classes that derive from it are described
            with it.
        backbone: Where it keeps its parts.

    Raises:
        TypeError: `stack_class` is not a class.
        ValueError: The class has been described differently before.

    Examples:
        >>> class MyEncoder: ...
        >>> register_backbone(MyEncoder, Backbone(layers="blocks", feed_forward=("mlp",), norms=("norm1", "norm2")))
    """
    if not isinstance(stack_class, type):
        raise TypeError(
            f"register_backbone takes a class, got {stack_class!r}. Pass the class of the module that runs the "
            "encoder layers, such as type(model.encoder)."
        )
    known = family(stack_class)
    if known is not None and known != backbone:
        raise ValueError(f"{stack_class.__name__} has been described differently before: {known}.")
    _REGISTERED[stack_class] = backbone


def family(stack_class: type) -> Backbone | None:
    """Return the row of an encoder stack's class, or of the nearest class that it derives from; None without a row.

    A class of another library has no row because it is called like a class of Transformers.
    """
    for base in stack_class.__mro__:
        if base in _REGISTERED:
            return _REGISTERED[base]
        if base.__module__.startswith("transformers.") and base.__name__ in BACKBONES:
            return BACKBONES[base.__name__]
    return None


def refusal(module_class: type) -> str | None:
    """Return the reason why ELP cannot adapt a class of Transformers; None if there is no such reason."""
    return REFUSED.get(module_class.__name__) if module_class.__module__.startswith("transformers.") else None


def receptive_field(config: Any) -> int:
    """Return how many samples the convolutions over the waveform need for one frame; 400 (25 ms) in wav2vec 2.0."""
    samples = 1
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        samples = (samples - 1) * stride + kernel
    return samples


def window_s(feature_extractor: Any) -> float:
    """Return the seconds to which a feature extractor cuts every recording; infinity where it cuts none."""
    if hasattr(feature_extractor, "n_samples"):
        return feature_extractor.n_samples / feature_extractor.sampling_rate
    frames = getattr(feature_extractor, "max_length", None)
    return frames / 100 if isinstance(frames, int) else float("inf")  # AST counts frames of 10 ms.


def has_fixed_window(model: Any) -> bool:
    """Whether the encoder of a model takes audio features of one fixed length, to which its extractor has to pad."""
    rows = (family(type(module)) for module in model.modules())
    return any(row is not None and row.window is not None for row in rows)
