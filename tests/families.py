"""Tiny random models of the families beyond the wav2vec 2.0 line, with inputs for them."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TSpeechEncoder
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder

with contextlib.suppress(ImportError):  # a Transformers older than the model, which is left out then
    from transformers.models.dots3_note.modeling_dots3_note import Dots3NoteAudioModel

WIDTH = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
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


class Around(nn.Module):
    """A model that holds a bare encoder, as an audio language model holds its tower."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.tower, self.config = encoder, encoder.config

    def forward(self, **inputs: Any) -> Any:
        return self.tower(**inputs)


def features(bands: int, frames: int, time_first: bool, lengths: tuple[int, ...] = ()) -> dict[str, Tensor]:
    torch.manual_seed(1)
    values = torch.randn(2, frames, bands)
    inputs = {"input_features": values if time_first else values.transpose(1, 2)}
    if lengths:
        mask = (torch.arange(frames) < torch.tensor(lengths)[:, None]).long()
        inputs = {"input_features": inputs["input_features"] * mask[:, :, None], "attention_mask": mask}
    return inputs


def wave(lengths: tuple[int, ...] = (1900, 1230)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_values": torch.randn(mask.shape) * mask, "attention_mask": mask}


def decoded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"decoder_input_ids": torch.tensor([[3, 5, 6], [3, 7, 8]])}


@dataclass
class Family:
    """One tiny model: how it is built, what it takes, and what can be asked of it."""

    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    adapters: str = "ELP"
    checkpointing: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def model(self, attention: str = "eager") -> nn.Module:
        torch.manual_seed(0)
        model = self.build()
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._attn_implementation = attention
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name.lower():
                torch.nn.init.normal_(parameter, mean=float("norm" in name.lower() and "weight" in name), std=0.3)
        return model.eval()


FAMILIES: dict[str, Family] = {
    "wav2vec2-conformer": Family(lambda: t.Wav2Vec2ConformerForCTC(t.Wav2Vec2ConformerConfig(**WAVE)), wave()),
    "wav2vec2-conformer-rotary": Family(
        lambda: t.Wav2Vec2ConformerForSequenceClassification(
            t.Wav2Vec2ConformerConfig(**WAVE, position_embeddings_type="rotary")
        ),
        wave(),
    ),
    "wav2vec2-bert": Family(
        lambda: t.Wav2Vec2BertForCTC(
            t.Wav2Vec2BertConfig(**WIDTH, **STILL, vocab_size=9, feature_projection_input_dim=10)
        ),
        features(10, 24, True, (24, 15)),
    ),
    "seamless_m4t": Family(
        lambda: SeamlessM4TSpeechEncoder(t.SeamlessM4TConfig(**SEAMLESS)), features(10, 24, True, (24, 15))
    ),
    "seamless_m4t_v2": Family(
        lambda: SeamlessM4Tv2SpeechEncoder(t.SeamlessM4Tv2Config(**SEAMLESS)), features(10, 24, True, (24, 15))
    ),
    "speecht5": Family(
        lambda: t.SpeechT5ForSpeechToText(
            t.SpeechT5Config(
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
    "sew": Family(lambda: t.SEWForCTC(t.SEWConfig(**WAVE, squeeze_factor=2)), wave(), options={"p_length": 4}),
    "sew-odd": Family(
        lambda: t.SEWForCTC(t.SEWConfig(**WAVE, squeeze_factor=3)), wave(), options={"p_length": 3}
    ),
    "sew-d": Family(
        lambda: t.SEWDForCTC(t.SEWDConfig(**WAVE, squeeze_factor=2)), wave(), options={"p_length": 4}
    ),
    "whisper": Family(
        lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**WHISPER)), decoded(features(8, 40, False))
    ),
    "whisper-classification": Family(
        lambda: t.WhisperForAudioClassification(t.WhisperConfig(**WHISPER, num_labels=3)), features(8, 40, False)
    ),
    "speech_to_text": Family(
        lambda: t.Speech2TextForConditionalGeneration(
            t.Speech2TextConfig(**WHISPER, input_feat_per_channel=8, conv_channels=16)
        ),
        decoded(features(8, 40, True, (40, 23))),
    ),
    "qwen2_audio": Family(
        lambda: Around(AutoModel.from_config(t.Qwen2AudioEncoderConfig(**TOWER_OF_WHISPER))),
        features(8, 40, False),
    ),
    "voxtral": Family(lambda: Around(AutoModel.from_config(t.VoxtralEncoderConfig(**TOWER))), features(8, 40, False)),
    "voxtral-bare": Family(lambda: AutoModel.from_config(t.VoxtralEncoderConfig(**TOWER)), features(8, 40, False)),
    "moss_transcribe_diarize": Family(
        lambda: Around(t.MossTranscribeDiarizeAudioModel(t.MossTranscribeDiarizeAudioConfig(**TOWER))),
        features(8, 40, False),
    ),
    "dots3_note": Family(
        lambda: Around(
            Dots3NoteAudioModel(
                t.Dots3NoteAudioConfig(
                    **WIDTH, feature_size=16, downsample_hidden_size=8, adapter_input_size=16, adapter_out_dim=12
                )
            )
        ),
        {**features(16, 64, False), "chunk_sample_lengths": torch.tensor([64 * 160, 40 * 160])},
    ),
    "wav2vec2-conformer-frames": Family(
        lambda: t.Wav2Vec2ConformerForAudioFrameClassification(t.Wav2Vec2ConformerConfig(**WAVE)), wave()
    ),
    "audioflamingo3": Family(
        lambda: Around(AutoModel.from_config(t.AudioFlamingo3EncoderConfig(**TOWER))),
        {**features(8, 40, False), "input_features_mask": (torch.arange(40) < torch.tensor([40, 24])[:, None]).long()},
    ),
    "audio-spectrogram-transformer": Family(
        lambda: t.ASTForAudioClassification(
            t.ASTConfig(
                **WIDTH, patch_size=4, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=8, num_labels=3
            )
        ),
        {"input_values": features(8, 16, True)["input_features"]},
    ),
    "parakeet": Family(
        lambda: t.ParakeetForCTC(
            t.ParakeetCTCConfig(
                vocab_size=9,
                pad_token_id=0,
                encoder_config=WIDTH | SUBSAMPLED,
            )
        ),
        features(16, 64, True, (64, 40)),
    ),
    "lasr": Family(
        lambda: t.LasrForCTC(
            t.LasrCTCConfig(
                vocab_size=9,
                pad_token_id=0,
                encoder_config=WIDTH | SUBSAMPLED,
            )
        ),
        features(16, 64, True, (64, 40)),
    ),
    "moonshine": Family(
        lambda: t.MoonshineForConditionalGeneration(
            t.MoonshineConfig(
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
        lambda: Around(
            AutoModel.from_config(t.GlmAsrEncoderConfig(**WIDTH, num_mel_bins=8, max_position_embeddings=20))
        ),
        features(8, 40, False),
        adapters="ELP",
    ),
}  # fmt: skip


def _available(family: Family) -> bool:
    """Whether the installed Transformers has the family, laid out as in the newest, and with finite outputs."""
    used = [name for name in family.build.__code__.co_names if name[0].isupper()]
    if not all(name in globals() or hasattr(t, name) for name in used):
        return False
    model = family.model()
    if isinstance(model, t.ASTForAudioClassification):  # Transformers 5.0 kept its layers in an encoder of their own
        return hasattr(model.audio_spectrogram_transformer, "layers")
    if isinstance(model, t.ParakeetForCTC):  # that of Transformers 5.0 gives NaN for padded input
        with torch.no_grad():
            return bool(model(**family.inputs).logits.isfinite().all())
    return True


FAMILIES = {name: family for name, family in FAMILIES.items() if _available(family)}
