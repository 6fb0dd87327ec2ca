"""Tiny random models of every family, with inputs for them."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from backbones import FAMILIES as LINE
from backbones import HEADS, NORMS, TINY, has
from family import WIDTH, Around, AroundTensor, Family, batch, decoded, features, packed, wave

# Sizes that several families share ----------------------------------------------------------------------------------

CONVOLUTIONS = {
    "conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 4), "conv_bias": True,
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4, "feat_extract_norm": "layer",
}  # fmt: skip
STILL = {
    "layerdrop": 0.0, "mask_time_prob": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0,
    "conformer_conv_dropout": 0.0, "ffn_dropout": 0.0,
}  # fmt: skip
WAVE = WIDTH | CONVOLUTIONS | STILL | {"vocab_size": 9, "num_labels": 4, "classifier_proj_size": 12}
SEAMLESS = {
    "hidden_size": 16, "speech_encoder_layers": 3, "speech_encoder_attention_heads": 2, "speech_encoder_dropout": 0.0,
    "speech_encoder_intermediate_size": 24, "feature_projection_input_dim": 10, "speech_encoder_layerdrop": 0.0,
    "add_adapter": False,
}  # fmt: skip
OF_WHISPER = {"d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
WHISPER = OF_WHISPER | {
    "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "num_mel_bins": 8, "dropout": 0.0,
    "max_source_positions": 20, "vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3,
}  # fmt: skip
SPEECH_T5 = {
    "hidden_size": 16, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "encoder_layerdrop": 0.0, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16,
    "decoder_layerdrop": 0.0, "positional_dropout": 0.0, "vocab_size": 12,
} | CONVOLUTIONS | {name: value for name, value in STILL.items() if name != "layerdrop"}  # fmt: skip
TOWER = WIDTH | {"num_mel_bins": 8, "max_source_positions": 20}
SUBSAMPLED = WIDTH | {
    "num_mel_bins": 16, "subsampling_conv_channels": 8, "layerdrop": 0.0, "dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "dropout_positions": 0.0,
}  # fmt: skip
CTC_OF_SUBSAMPLED = {"vocab_size": 9, "pad_token_id": 0, "encoder_config": SUBSAMPLED}
OMNI = OF_WHISPER | {"num_mel_bins": 8, "output_dim": 12, "n_window_infer": 100, "downsample_hidden_size": 4}
OMNIASR = (
    WIDTH
    | {"hidden_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
    | {name: value for name, value in CONVOLUTIONS.items() if name.startswith(("conv_", "num_conv"))}
)
OMNIASR_LM = {"audio_config": OMNIASR, "audio_token_id": 29, "text_config": WIDTH | {"model_type": "llama",
    "vocab_size": 30, "num_key_value_heads": 2}}  # fmt: skip
GRANITE = {
    "input_dim": 10, "num_layers": 3, "hidden_dim": 16, "feedforward_mult": 2, "num_heads": 2, "output_dim": 6,
    "context_size": 8, "max_pos_emb": 8, "dropout": 0.0, "conv_kernel_size": 3,
}  # fmt: skip
NEMOTRON = WIDTH | {"num_mel_bins": 8, "subsampling_factor": 2, "initializer_range": 0.2}
DIARIZATION = {
    "audio_config": NEMOTRON,
    "head_config": {"hidden_size": 12, "num_speakers": 3, "audio_hidden_size": 16, "subsampling_factor": 2},
    "streaming_config": {"num_speakers": 3, "subsampling_factor": 2, "speaker_cache_length": 9},
    "chunk_length": 6, "chunk_right_context": 2, "fifo_length": 4, "speaker_cache_update_period": 4,
    "initializer_range": 0.2,
}  # fmt: skip

FRAMES = features(10, 24, True, (24, 15))
MEL = features(8, 40, False)
MEL_MASKED = features(16, 64, True, (64, 40))
SPEECH = wave((2000, 1300, 900))
HEARD = {"input_values": SPEECH["input_values"][:, None], "padding_mask": SPEECH["attention_mask"]}
# One token 29 stands for each frame.
HEARD_LM = HEARD | {"input_ids": torch.where(torch.arange(100) < torch.tensor([98, 63, 43])[:, None], 29, 5)}

# The wav2vec 2.0 line: every encoder with one head, and all heads on one post-norm and one pre-norm encoder.
NAMES = {"ForCTC": "", "Model": "-bare", "ForSequenceClassification": "-classes", "ForXVector": "-xvector"}
NAMES |= {"ForAudioFrameClassification": "-frames"}
ALL_HEADS = {("wavlm", False), ("wav2vec2", True)}
WAVES = {
    f"{line}{'-stable' * stable}{NAMES[head]}": Family(
        LINE[line] + head, TINY | {"do_stable_layer_norm": stable}, SPEECH
    )
    for line, stable in NORMS
    for head in (HEADS if (line, stable) in ALL_HEADS else ("ForCTC",))
    if has(line, head)
}

# Whole models -------------------------------------------------------------------------------------------------------

# fmt: off
WHOLE = {
    "wav2vec2-conformer": Family("Wav2Vec2ConformerForCTC", WAVE, wave()),
    "wav2vec2-conformer-rotary": Family("Wav2Vec2ConformerForSequenceClassification",
        WAVE | {"position_embeddings_type": "rotary"}, wave()),
    "wav2vec2-conformer-frames": Family("Wav2Vec2ConformerForAudioFrameClassification", WAVE, wave()),
    "wav2vec2-bert": Family("Wav2Vec2BertForCTC",
        WIDTH | STILL | {"vocab_size": 9, "feature_projection_input_dim": 10}, FRAMES),
    "seamless_m4t": Family("models.seamless_m4t.modeling_seamless_m4t.SeamlessM4TSpeechEncoder", SEAMLESS, FRAMES),
    "seamless_m4t_v2": Family("models.seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2SpeechEncoder",
        SEAMLESS, FRAMES),
    "speecht5": Family("SpeechT5ForSpeechToText", SPEECH_T5, decoded(wave())),
    "sew": Family("SEWForCTC", WAVE | {"squeeze_factor": 2}, wave(), options={"p_length": 4}),
    "sew-odd": Family("SEWForCTC", WAVE | {"squeeze_factor": 3}, wave(), options={"p_length": 3}),
    "sew-d": Family("SEWDForCTC", WAVE | {"squeeze_factor": 2}, wave(), options={"p_length": 4}),
    "whisper": Family("WhisperForConditionalGeneration", WHISPER, decoded(MEL)),
    # Its mask tells which frames the head averages over.
    "whisper-classification": Family("WhisperForAudioClassification",
        WHISPER | {"num_labels": 3, "classifier_proj_size": 12},
        MEL | {"attention_mask": (torch.arange(40) < torch.tensor([40, 24])[:, None]).long()}),
    "omniasr": Family("OmniASRForCTC", {"vocab_size": 9, "audio_config": OMNIASR}, HEARD, since="5.24"),
    "omniasr-bare": Family("OmniASRCTCModel", {"vocab_size": 9, "audio_config": OMNIASR}, HEARD, since="5.24"),
    "omniasr-model": Family("OmniASRModel", OMNIASR_LM, HEARD_LM, since="5.24"),
    "omniasr-generation": Family("OmniASRForConditionalGeneration", OMNIASR_LM, HEARD_LM, since="5.24"),
    "speech_to_text": Family("Speech2TextForConditionalGeneration",
        WHISPER | {"input_feat_per_channel": 8, "conv_channels": 16}, decoded(features(8, 40, True, (40, 23)))),
    # In older versions its layers were in an encoder of their own.
    "audio-spectrogram-transformer": Family("ASTForAudioClassification",
        WIDTH | {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}
        | {"num_labels": 3}, {"input_values": features(8, 16, True)["input_features"]}, since="5.9"),
    # In older versions padding gave NaN.
    "parakeet": Family("ParakeetForCTC", CTC_OF_SUBSAMPLED, MEL_MASKED, since="5.18"),
    "lasr": Family("LasrForCTC", CTC_OF_SUBSAMPLED, MEL_MASKED),
    "moonshine": Family("MoonshineForConditionalGeneration",
        {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 30, "attention_dropout": 0.0}
        | {f"{part}_num_attention_heads": 2 for part in ("encoder", "decoder")} | {"encoder_num_hidden_layers": 3,
        "decoder_num_hidden_layers": 2}, decoded(wave((9000, 7000)))),
    "voxtral-bare": Family("VoxtralEncoder", TOWER, MEL),
    "nemotron3_diarization": Family("Nemotron3DiarizationModel",
        DIARIZATION, features(8, 24, True, (24, 15)), since="5.18"),
    # The stack is called once for each chunk, with the frames of a speaker cache before it.
    "nemotron3_diarization-chunks": Family("Nemotron3DiarizationForAudioFrameClassification",
        DIARIZATION, features(8, 60, True, (60, 37)), since="5.18", options={"modules_to_save": ["classifier"]}),
    # Its diarizer is passed over: what follows compares the output with a threshold, which lets no gradient through.
    "nemotron3_5_transcribe": Family("Nemotron3_5TranscribeAudioModel",
        {"asr_config": NEMOTRON, "diarization_config": DIARIZATION | {"model_type": "nemotron3_diarization",
        "chunk_left_context": 2}}, batch(8, (24, 16), "input_features", "input_features_mask"), since="5.22"),
}
# fmt: on

# The towers of audio language models and of streaming recognisers ---------------------------------------------------


def tower(model_class: str, sizes: dict[str, Any], inputs: dict[str, torch.Tensor], **facts: Any) -> Family:
    return Family(model_class, sizes, inputs, around=facts.pop("around", Around), **facts)


# fmt: off
TOWERS = {
    "qwen2_audio": tower("Qwen2AudioEncoder", OF_WHISPER | {"num_mel_bins": 8, "max_source_positions": 20}, MEL),
    "voxtral": tower("VoxtralEncoder", TOWER, MEL),
    "omniasr-tower": tower("OmniASRAudioModel", OMNIASR, HEARD, since="5.24"),
    "moss_transcribe_diarize": tower("MossTranscribeDiarizeAudioModel", TOWER, MEL, since="5.20"),
    "dots3_note": tower("Dots3NoteAudioModel",
        WIDTH | {"feature_size": 16, "downsample_hidden_size": 8, "adapter_input_size": 16, "adapter_out_dim": 12},
        features(16, 64, False) | {"chunk_sample_lengths": torch.tensor([64 * 160, 40 * 160])}, since="5.23"),
    "audioflamingo3": tower("AudioFlamingo3Encoder",
        TOWER, MEL | {"input_features_mask": (torch.arange(40) < torch.tensor([40, 24])[:, None]).long()}),
    "glmasr": tower("GlmAsrEncoder", WIDTH | {"num_mel_bins": 8, "max_position_embeddings": 20}, MEL),
    "pe_audio": tower("PeAudioEncoder",
        WIDTH | {"head_dim": 8} | {"dac_config": {"downsampling_ratios": [2, 4], "encoder_hidden_size": 4,
        "codebook_dim": 6}},
        {"input_values": wave((160, 96))["input_values"][:, None], "padding_mask": wave((160, 96))["attention_mask"]}),
    "moonshine_streaming": tower("models.moonshine_streaming.modeling_moonshine_streaming.MoonshineStreamingEncoder",
        WIDTH | {"num_key_value_heads": 2, "sliding_windows": ((4, 2), (4, 0), (4, 2))}, wave((3200, 2000)),
        since="5.2", adapters="EL"),
    "voxtral_realtime": tower("VoxtralRealtimeEncoder",
        WIDTH | {"num_mel_bins": 8, "head_dim": 8, "sliding_window": 6, "max_position_embeddings": 40}, MEL,
        since="5.2", adapters="EL"),
    "nemotron_asr_streaming": tower("NemotronAsrStreamingEncoder",
        {name: value for name, value in SUBSAMPLED.items() if name != "dropout_positions"} | {"sliding_window": 5,
        "default_num_lookahead_tokens": 1}, features(16, 96, True, (96, 60)), since="5.13", adapters="EL"),
    "qwen2_5_omni": tower("models.qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniAudioEncoder",
        OF_WHISPER | {"num_mel_bins": 8, "max_source_positions": 20, "n_window": 10, "output_dim": 12},
        packed(8, (40, 26)), since="5.9", adapters="EL"),
    "qwen3_omni_moe": tower("models.qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeAudioEncoder",
        OMNI, packed(8, (200, 130)), since="5.13", adapters="EL"),
    "qwen3_asr": tower("Qwen3ASREncoder",
        OMNI, batch(8, (200, 130), "input_features", "input_features_mask", time_first=False), since="5.13",
        adapters="EL"),
    "granite_speech": tower("GraniteSpeechCTCEncoder",
        GRANITE, {"hidden_states": features(10, 20, True)["input_features"]}, adapters="EL", checkpointing=False),
    "granite_speech_plus": tower("GraniteSpeechPlusCTCEncoder",
        GRANITE | {"cat_hidden_layers": [1]}, {"hidden_states": features(10, 20, True)["input_features"]}, since="5.8",
        adapters="EL", checkpointing=False),
    "granite_speech5": tower("GraniteSpeech5Encoder",
        WIDTH | {"vocab_size": 9, "num_mel_bins": 4, "max_position_embeddings": 8, "context_size": 8,
        "conv_kernel_size": 3} | {"subsample_layers": [0]}, features(16, 40, True, (40, 24)), since="5.16",
        adapters="E"),
    "fun_asr_nano": tower("FunAsrNanoEncoder",
        WIDTH | {"num_mel_bins": 8, "num_stacked_frames": 3, "num_timestamp_prediction_layers": 1,
        "fsmn_kernel_size": 3} | {"max_position_embeddings": 40, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        batch(24, (20, 12), "input_features", "input_features_mask"), since="5.17", adapters="EL"),
    "phi4_multimodal": tower("Phi4MultimodalAudioModel",
        {"hidden_size": 16, "intermediate_size": 24, "num_blocks": 3, "num_attention_heads": 2, "input_size": 8}
        | {"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "time_reduction": 2}
        | {"bias_max_distance": 10, "nemo_conv_channels": 4}, batch(8, (40, 25), "hidden_states", "mask"),
        around=AroundTensor, adapters="EL"),
    # Its mask is true where there is padding.
    "gemma3n": tower("Gemma3nAudioEncoder",
        {"hidden_size": 16, "input_feat_size": 16, "conf_num_hidden_layers": 3, "conf_num_attention_heads": 2}
        | {"conf_attention_chunk_size": 4, "conf_attention_context_left": 5, "conf_conv_kernel_size": 3}
        | {"sscp_conv_channel_size": (8, 4)},
        {"audio_mel": MEL_MASKED["input_features"], "audio_mel_mask": MEL_MASKED["attention_mask"] == 0},
        adapters="EL", checkpointing=False),
    # Older versions offered sdpa, which gave another result than eager attention.
    "gemma4": tower("Gemma4AudioModel",
        {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "subsampling_conv_channels": [16, 4]}
        | {"conv_kernel_size": 3, "attention_chunk_size": 4, "attention_context_left": 5, "output_proj_dims": 12},
        features(16, 40, True, (40, 24)), since="5.20", adapters="EL", checkpointing=False),
}
# fmt: on

FAMILIES: dict[str, Family] = WAVES | WHOLE | TOWERS


def cases(which: Iterable[str] | Callable[[Family], bool] = FAMILIES) -> list[Any]:
    """Parameters of a test, one for each family; what the installed Transformers is too old for is skipped by name."""
    names = [name for name, family in FAMILIES.items() if which(family)] if callable(which) else which
    return [
        pytest.param(
            name, marks=[] if FAMILIES[name].available else pytest.mark.skip(f"new in {FAMILIES[name].since}")
        )
        for name in sorted(names)
    ]
