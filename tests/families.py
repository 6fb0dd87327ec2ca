"""Tiny random models of the families beyond the wav2vec 2.0 line, with inputs for them."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from families_towers import TOWERS
from family import WIDTH, Around, Family, decoded, features, wave

CONVOLUTIONS = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 8),
    "conv_stride": (5, 4),
    "conv_bias": True,
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
}
STILL = {
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "conformer_conv_dropout": 0.0,
    "ffn_dropout": 0.0,
}
WAVE = WIDTH | CONVOLUTIONS | STILL | {"vocab_size": 9, "num_labels": 4, "classifier_proj_size": 12}
SEAMLESS = {
    "hidden_size": 16,
    "speech_encoder_layers": 3,
    "speech_encoder_attention_heads": 2,
    "speech_encoder_intermediate_size": 24,
    "feature_projection_input_dim": 10,
    "speech_encoder_layerdrop": 0.0,
    "speech_encoder_dropout": 0.0,
    "add_adapter": False,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "dropout": 0.0,
    "vocab_size": 30,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
TOWER_OF_WHISPER = {
    key: value
    for key, value in WHISPER.items()
    if key.startswith(("d_model", "encoder", "num_mel", "max_source", "drop"))
}
SUBSAMPLED = {
    "num_mel_bins": 16,
    "subsampling_conv_channels": 8,
    "layerdrop": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "dropout_positions": 0.0,
}
TOWER = WIDTH | {"num_mel_bins": 8, "max_source_positions": 20}

FAMILIES: dict[str, Family] = {
    **TOWERS,
    "wav2vec2-conformer": Family(
        "5.0",
        "wav2vec2_conformer",
        "Wav2Vec2ConformerEncoder",
        lambda m: m.Wav2Vec2ConformerForCTC(m.Wav2Vec2ConformerConfig(**WAVE)),
        wave(),
    ),
    "wav2vec2-conformer-rotary": Family(
        "5.0",
        "wav2vec2_conformer",
        "Wav2Vec2ConformerEncoder",
        lambda m: m.Wav2Vec2ConformerForSequenceClassification(
            m.Wav2Vec2ConformerConfig(**WAVE, position_embeddings_type="rotary")
        ),
        wave(),
    ),
    "wav2vec2-bert": Family(
        "5.0",
        "wav2vec2_bert",
        "Wav2Vec2BertEncoder",
        lambda m: m.Wav2Vec2BertForCTC(
            m.Wav2Vec2BertConfig(**WIDTH, **STILL, vocab_size=9, feature_projection_input_dim=10)
        ),
        features(10, 24, True, (24, 15)),
    ),
    "seamless_m4t": Family(
        "5.0",
        "seamless_m4t",
        "SeamlessM4TConformerEncoder",
        lambda m: m.SeamlessM4TSpeechEncoder(m.SeamlessM4TConfig(**SEAMLESS)),
        features(10, 24, True, (24, 15)),
    ),
    "seamless_m4t_v2": Family(
        "5.0",
        "seamless_m4t_v2",
        "SeamlessM4Tv2ConformerEncoder",
        lambda m: m.SeamlessM4Tv2SpeechEncoder(m.SeamlessM4Tv2Config(**SEAMLESS)),
        features(10, 24, True, (24, 15)),
    ),
    "speecht5": Family(
        "5.0",
        "speecht5",
        "SpeechT5Encoder",
        lambda m: m.SpeechT5ForSpeechToText(
            m.SpeechT5Config(
                hidden_size=16,
                encoder_layers=3,
                encoder_attention_heads=2,
                encoder_ffn_dim=24,
                encoder_layerdrop=0.0,
                decoder_layers=2,
                decoder_attention_heads=2,
                decoder_ffn_dim=16,
                decoder_layerdrop=0.0,
                positional_dropout=0.0,
                vocab_size=12,
                **CONVOLUTIONS,
                **{k: v for k, v in STILL.items() if k != "layerdrop"},
            )
        ),
        decoded(wave()),
    ),
    "sew": Family(
        "5.0",
        "sew",
        "SEWEncoder",
        lambda m: m.SEWForCTC(m.SEWConfig(**WAVE, squeeze_factor=2)),
        wave(),
        options={"p_length": 4},
    ),
    "sew-odd": Family(
        "5.0",
        "sew",
        "SEWEncoder",
        lambda m: m.SEWForCTC(m.SEWConfig(**WAVE, squeeze_factor=3)),
        wave(),
        options={"p_length": 3},
    ),
    "sew-d": Family(
        "5.0",
        "sew_d",
        "SEWDEncoder",
        lambda m: m.SEWDForCTC(m.SEWDConfig(**WAVE, squeeze_factor=2)),
        wave(),
        options={"p_length": 4},
    ),
    "whisper": Family(
        "5.0",
        "whisper",
        "WhisperEncoder",
        lambda m: m.WhisperForConditionalGeneration(m.WhisperConfig(**WHISPER)),
        decoded(features(8, 40, False)),
    ),
    "whisper-classification": Family(
        "5.0",
        "whisper",
        "WhisperEncoder",
        lambda m: m.WhisperForAudioClassification(m.WhisperConfig(**WHISPER, num_labels=3, classifier_proj_size=12)),
        features(8, 40, False),
    ),
    "speech_to_text": Family(
        "5.0",
        "speech_to_text",
        "Speech2TextEncoder",
        lambda m: m.Speech2TextForConditionalGeneration(
            m.Speech2TextConfig(**WHISPER, input_feat_per_channel=8, conv_channels=16)
        ),
        decoded(features(8, 40, True, (40, 23))),
    ),
    "qwen2_audio": Family(
        "5.0",
        "qwen2_audio",
        "Qwen2AudioEncoder",
        lambda m: Around(m.Qwen2AudioEncoder(m.Qwen2AudioEncoderConfig(**TOWER_OF_WHISPER))),
        features(8, 40, False),
    ),
    "voxtral": Family(
        "5.0",
        "voxtral",
        "VoxtralEncoder",
        lambda m: Around(m.VoxtralEncoder(m.VoxtralEncoderConfig(**TOWER))),
        features(8, 40, False),
    ),
    "voxtral-bare": Family(
        "5.0",
        "voxtral",
        "VoxtralEncoder",
        lambda m: m.VoxtralEncoder(m.VoxtralEncoderConfig(**TOWER)),
        features(8, 40, False),
    ),
    "moss_transcribe_diarize": Family(
        "5.20",
        "moss_transcribe_diarize",
        "MossTranscribeDiarizeAudioModel",
        lambda m: Around(m.MossTranscribeDiarizeAudioModel(m.MossTranscribeDiarizeAudioConfig(**TOWER))),
        features(8, 40, False),
    ),
    "dots3_note": Family(
        "5.23",
        "dots3_note",
        "Dots3NoteAudioModel",
        lambda m: Around(
            m.Dots3NoteAudioModel(
                m.Dots3NoteAudioConfig(
                    **WIDTH, feature_size=16, downsample_hidden_size=8, adapter_input_size=16, adapter_out_dim=12
                )
            )
        ),
        {**features(16, 64, False), "chunk_sample_lengths": torch.tensor([64 * 160, 40 * 160])},
    ),
    "wav2vec2-conformer-frames": Family(
        "5.0",
        "wav2vec2_conformer",
        "Wav2Vec2ConformerEncoder",
        lambda m: m.Wav2Vec2ConformerForAudioFrameClassification(m.Wav2Vec2ConformerConfig(**WAVE)),
        wave(),
    ),
    "audioflamingo3": Family(
        "5.0",
        "audioflamingo3",
        "AudioFlamingo3Encoder",
        lambda m: Around(m.AudioFlamingo3Encoder(m.AudioFlamingo3EncoderConfig(**TOWER))),
        {**features(8, 40, False), "input_features_mask": (torch.arange(40) < torch.tensor([40, 24])[:, None]).long()},
    ),
    "audio-spectrogram-transformer": Family(
        "5.9",  # before, its layers were in an encoder of their own
        "audio_spectrogram_transformer",
        "ASTModel",
        lambda m: m.ASTForAudioClassification(
            m.ASTConfig(
                **WIDTH, patch_size=4, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=8, num_labels=3
            )
        ),
        {"input_values": features(8, 16, True)["input_features"]},
    ),
    "parakeet": Family(
        "5.18",  # before, padded input gave NaN
        "parakeet",
        "ParakeetEncoder",
        lambda m: m.ParakeetForCTC(
            m.ParakeetCTCConfig(
                vocab_size=9,
                pad_token_id=0,
                encoder_config=WIDTH | SUBSAMPLED,
            )
        ),
        features(16, 64, True, (64, 40)),
    ),
    "lasr": Family(
        "5.0",
        "lasr",
        "LasrEncoder",
        lambda m: m.LasrForCTC(
            m.LasrCTCConfig(
                vocab_size=9,
                pad_token_id=0,
                encoder_config=WIDTH | SUBSAMPLED,
            )
        ),
        features(16, 64, True, (64, 40)),
    ),
    "moonshine": Family(
        "5.0",
        "moonshine",
        "MoonshineEncoder",
        lambda m: m.MoonshineForConditionalGeneration(
            m.MoonshineConfig(
                hidden_size=16,
                intermediate_size=24,
                encoder_num_hidden_layers=3,
                decoder_num_hidden_layers=2,
                encoder_num_attention_heads=2,
                decoder_num_attention_heads=2,
                vocab_size=30,
                attention_dropout=0.0,
            )
        ),
        decoded(wave((9000, 7000))),
        adapters="ELP",
    ),
    "glmasr": Family(
        "5.0",
        "glmasr",
        "GlmAsrEncoder",
        lambda m: Around(m.GlmAsrEncoder(m.GlmAsrEncoderConfig(**WIDTH, num_mel_bins=8, max_position_embeddings=20))),
        features(8, 40, False),
        adapters="ELP",
    ),
}


def cases(names: Iterable[str] = FAMILIES) -> list[Any]:
    """Parameters of a test, one for each family; what the installed Transformers is too old for is skipped by name."""
    return [
        pytest.param(
            name, marks=[] if FAMILIES[name].available else pytest.mark.skip(f"new in {FAMILIES[name].since}")
        )
        for name in sorted(names)
    ]
