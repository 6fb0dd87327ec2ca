"""Tiny random models of the towers of audio language models and of streaming recognisers, with inputs for them."""

from family import WIDTH, Around, AroundTensor, Family, batch, features, packed, wave
from torch import Tensor

OF_WHISPER = {"d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
OF_GRANITE = {
    "input_dim": 10,
    "num_layers": 3,
    "hidden_dim": 16,
    "feedforward_mult": 2,
    "num_heads": 2,
    "output_dim": 6,
    "context_size": 8,
    "max_pos_emb": 8,
    "dropout": 0.0,
    "conv_kernel_size": 3,
}
DIARIZATION = {
    "audio_config": WIDTH | {"num_mel_bins": 8, "subsampling_factor": 2, "initializer_range": 0.2},
    "head_config": {"hidden_size": 12, "num_speakers": 3, "audio_hidden_size": 16, "subsampling_factor": 2},
    "streaming_config": {"num_speakers": 3, "subsampling_factor": 2, "speaker_cache_length": 9},
    "chunk_length": 6,
    "chunk_right_context": 2,
    "fifo_length": 4,
    "speaker_cache_update_period": 4,
    "initializer_range": 0.2,
}


def _speech(lengths: tuple[int, ...], mask: str) -> dict[str, Tensor]:
    inputs = wave(lengths)
    return {"input_values": inputs["input_values"], mask: inputs["attention_mask"]}


TOWERS: dict[str, Family] = {
    "pe_audio": Family(
        "5.0",
        "pe_audio",
        "PeAudioEncoder",
        lambda m: Around(
            m.PeAudioEncoder(
                m.PeAudioEncoderConfig(
                    **WIDTH,
                    head_dim=8,
                    dac_config={"downsampling_ratios": [2, 4], "encoder_hidden_size": 4, "codebook_dim": 6},
                )
            )
        ),
        {k: v[:, None] if k == "input_values" else v for k, v in _speech((160, 96), "padding_mask").items()},
    ),
    "nemotron3_diarization": Family(
        "5.18",
        "nemotron3_diarization",
        "Nemotron3DiarizationAudioModel",
        lambda m: m.Nemotron3DiarizationModel(m.Nemotron3DiarizationConfig(**DIARIZATION)),
        features(8, 24, True, (24, 15)),
    ),
    # The stack is called once for each chunk, with the frames of a speaker cache before it.
    "nemotron3_diarization-chunks": Family(
        "5.18",
        "nemotron3_diarization",
        "Nemotron3DiarizationAudioModel",
        lambda m: m.Nemotron3DiarizationForAudioFrameClassification(m.Nemotron3DiarizationConfig(**DIARIZATION)),
        features(8, 60, True, (60, 37)),
        options={"modules_to_save": ["classifier"]},
    ),
    # Its diarizer is passed over: what follows compares the output with a threshold, which lets no gradient through.
    "nemotron3_5_transcribe": Family(
        "5.22",
        "nemotron3_5_transcribe",
        "Nemotron3_5TranscribeAsrAudioModel",
        lambda m: m.Nemotron3_5TranscribeAudioModel(
            m.Nemotron3_5TranscribeAudioConfig(
                asr_config=WIDTH | {"num_mel_bins": 8, "subsampling_factor": 2, "initializer_range": 0.2},
                diarization_config=DIARIZATION | {"model_type": "nemotron3_diarization", "chunk_left_context": 2},
            )
        ),
        batch(8, (24, 16), "input_features", "input_features_mask"),
    ),
    "moonshine_streaming": Family(
        "5.2",
        "moonshine_streaming",
        "MoonshineStreamingEncoder",
        lambda m: Around(
            m.MoonshineStreamingEncoder(
                m.MoonshineStreamingEncoderConfig(
                    **WIDTH, num_key_value_heads=2, sliding_windows=((4, 2), (4, 0), (4, 2))
                )
            )
        ),
        wave((3200, 2000)),
        adapters="EL",
    ),
    "voxtral_realtime": Family(
        "5.2",
        "voxtral_realtime",
        "VoxtralRealtimeEncoder",
        lambda m: Around(
            m.VoxtralRealtimeEncoder(
                m.VoxtralRealtimeEncoderConfig(
                    **WIDTH, num_mel_bins=8, head_dim=8, sliding_window=6, max_position_embeddings=40
                )
            )
        ),
        features(8, 40, False),
        adapters="EL",
    ),
    "nemotron_asr_streaming": Family(
        "5.13",
        "nemotron_asr_streaming",
        "NemotronAsrStreamingEncoder",
        lambda m: Around(
            m.NemotronAsrStreamingEncoder(
                m.NemotronAsrStreamingEncoderConfig(
                    **WIDTH,
                    num_mel_bins=16,
                    subsampling_conv_channels=8,
                    sliding_window=5,
                    default_num_lookahead_tokens=1,
                    dropout=0.0,
                    layerdrop=0.0,
                    activation_dropout=0.0,
                    attention_dropout=0.0,
                )
            )
        ),
        features(16, 96, True, (96, 60)),
        adapters="EL",
    ),
    "qwen2_5_omni": Family(
        "5.9",
        "qwen2_5_omni",
        "Qwen2_5OmniAudioEncoder",
        lambda m: Around(
            m.Qwen2_5OmniAudioEncoder(
                m.Qwen2_5OmniAudioEncoderConfig(
                    **OF_WHISPER, num_mel_bins=8, max_source_positions=20, n_window=10, output_dim=12
                )
            )
        ),
        packed(8, (40, 26)),
        adapters="EL",
    ),
    "qwen3_omni_moe": Family(
        "5.13",
        "qwen3_omni_moe",
        "Qwen3OmniMoeAudioEncoder",
        lambda m: Around(
            m.Qwen3OmniMoeAudioEncoder(
                m.Qwen3OmniMoeAudioEncoderConfig(
                    **OF_WHISPER, num_mel_bins=8, output_dim=12, n_window_infer=100, downsample_hidden_size=4
                )
            )
        ),
        packed(8, (200, 130)),
        adapters="EL",
    ),
    "qwen3_asr": Family(
        "5.13",
        "qwen3_asr",
        "Qwen3ASREncoder",
        lambda m: Around(
            m.Qwen3ASREncoder(
                m.Qwen3ASREncoderConfig(
                    **OF_WHISPER, num_mel_bins=8, output_dim=12, n_window_infer=100, downsample_hidden_size=4
                )
            )
        ),
        batch(8, (200, 130), "input_features", "input_features_mask", time_first=False),
        adapters="EL",
    ),
    "granite_speech": Family(
        "5.0",
        "granite_speech",
        "GraniteSpeechCTCEncoder",
        lambda m: Around(m.GraniteSpeechCTCEncoder(m.GraniteSpeechEncoderConfig(**OF_GRANITE))),
        {"hidden_states": features(10, 20, True)["input_features"]},
        adapters="EL",
        checkpointing=False,
    ),
    "granite_speech_plus": Family(
        "5.8",
        "granite_speech_plus",
        "GraniteSpeechPlusCTCEncoder",
        lambda m: Around(
            m.GraniteSpeechPlusCTCEncoder(m.GraniteSpeechPlusEncoderConfig(**OF_GRANITE, cat_hidden_layers=[1]))
        ),
        {"hidden_states": features(10, 20, True)["input_features"]},
        adapters="EL",
        checkpointing=False,
    ),
    "granite_speech5": Family(
        "5.16",
        "granite_speech5",
        "GraniteSpeech5Encoder",
        lambda m: Around(
            m.GraniteSpeech5Encoder(
                m.GraniteSpeech5EncoderConfig(
                    **WIDTH,
                    vocab_size=9,
                    num_mel_bins=4,
                    max_position_embeddings=8,
                    context_size=8,
                    conv_kernel_size=3,
                    subsample_layers=[0],
                )
            )
        ),
        features(16, 40, True, (40, 24)),
        adapters="E",
    ),
    "fun_asr_nano": Family(
        "5.17",
        "fun_asr_nano",
        "FunAsrNanoEncoder",
        lambda m: Around(
            m.FunAsrNanoEncoder(
                m.FunAsrNanoEncoderConfig(
                    **WIDTH,
                    num_mel_bins=8,
                    num_stacked_frames=3,
                    num_timestamp_prediction_layers=1,
                    max_position_embeddings=40,
                    fsmn_kernel_size=3,
                    hidden_dropout=0.0,
                    attention_dropout=0.0,
                )
            )
        ),
        batch(24, (20, 12), "input_features", "input_features_mask"),
        adapters="EL",
    ),
    "phi4_multimodal": Family(
        "5.0",
        "phi4_multimodal",
        "Phi4MultimodalAudioModel",
        lambda m: AroundTensor(
            m.Phi4MultimodalAudioModel(
                m.Phi4MultimodalAudioConfig(
                    hidden_size=16,
                    intermediate_size=24,
                    num_blocks=3,
                    num_attention_heads=2,
                    ext_pw_out_channel=16,
                    depthwise_separable_out_channel=16,
                    input_size=8,
                    time_reduction=2,
                    bias_max_distance=10,
                    nemo_conv_channels=4,
                )
            )
        ),
        batch(8, (40, 25), "hidden_states", "mask"),
        adapters="EL",
    ),
    "gemma3n": Family(
        "5.0",
        "gemma3n",
        "Gemma3nAudioEncoder",
        lambda m: Around(
            m.Gemma3nAudioEncoder(
                m.Gemma3nAudioConfig(
                    hidden_size=16,
                    input_feat_size=16,
                    conf_num_hidden_layers=3,
                    conf_num_attention_heads=2,
                    conf_attention_chunk_size=4,
                    conf_attention_context_left=5,
                    conf_conv_kernel_size=3,
                    sscp_conv_channel_size=(8, 4),
                )
            )
        ),
        {  # its mask is true where there is padding
            k: v == 0 if k == "audio_mel_mask" else v
            for k, v in batch(16, (64, 40), "audio_mel", "audio_mel_mask").items()
        },
        adapters="EL",
        checkpointing=False,
    ),
    "gemma4": Family(
        "5.20",  # before, it offered sdpa, which gave another result than eager attention
        "gemma4",
        "Gemma4AudioModel",
        lambda m: Around(
            m.Gemma4AudioModel(
                m.Gemma4AudioConfig(
                    hidden_size=16,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    subsampling_conv_channels=[16, 4],
                    conv_kernel_size=3,
                    attention_chunk_size=4,
                    attention_context_left=5,
                    output_proj_dims=12,
                )
            )
        ),
        features(16, 40, True, (40, 24)),
        adapters="EL",
        checkpointing=False,
    ),
}
