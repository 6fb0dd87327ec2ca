"""Speech encoders inside larger models: a decoder, a language model, two towers, a model of one's own."""

import pytest
import torch
import transformers as t
from backbones import ELP, TwoEncoders, build, shaken, trained, with_adapters
from families import FAMILIES, OF_WHISPER, SPEECH_T5, WHISPER
from family import WIDTH, Around, features, wave
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from peft_elp import Backbone, ELPConfig, backbones, register_backbone

SMALL_TEXT = WIDTH | {"num_key_value_heads": 2, "vocab_size": 40}


def audio_language_model():
    torch.manual_seed(0)
    config = t.Qwen2AudioConfig(
        audio_config=OF_WHISPER | {"encoder_layers": 2, "num_mel_bins": 8, "max_source_positions": 20},
        text_config=SMALL_TEXT | {"model_type": "qwen2"},
        audio_token_index=39,
    )
    return t.Qwen2AudioForConditionalGeneration(config)


@pytest.mark.parametrize("adapters", ["E", "L", "P", "ELP"])
def test_the_text_loss_of_an_audio_language_model_reaches_the_adapters_and_nothing_else(adapters):
    model = shaken(get_peft_model(audio_language_model(), ELPConfig(adapters=adapters, **ELP))).train()
    config = model.peft_config["default"]
    assert config.modules_to_save == []
    assert config.l_output == ("residual" if "L" in adapters else None)
    audio_tokens = 10  # 40 mel frames, halved by the convolution and by the pooling
    ids = torch.tensor([[1, *[39] * audio_tokens, 5, 6, 7]])
    output = model(
        input_ids=ids,
        input_features=features(8, 40, False)["input_features"][:1],
        feature_attention_mask=torch.ones(1, 40, dtype=torch.long),
        attention_mask=torch.ones_like(ids),
        labels=ids.masked_fill(ids == 39, -100),
    )
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".elp_" in name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


def test_the_speech_tower_of_an_encoder_decoder_is_adapted_and_the_decoder_left_alone():
    torch.manual_seed(0)
    decoder = t.BertConfig(**WIDTH, vocab_size=30, is_decoder=True, add_cross_attention=True)
    base = t.SpeechEncoderDecoderModel(encoder=build("wav2vec2", "Model"), decoder=t.BertLMHeadModel(decoder))
    base.config.decoder_start_token_id, base.config.pad_token_id = 1, 0
    model = get_peft_model(base, ELPConfig(**ELP)).train()
    inputs = FAMILIES["wav2vec2-conformer"].inputs
    model(**inputs, labels=torch.tensor([[4, 5, 6], [7, 8, 9]])).loss.backward()
    for name, parameter in model.named_parameters():
        # What was made new to join the two parts trains as well.
        assert parameter.requires_grad == (".elp_" in name or "enc_to_dec_proj.modules_to_save" in name), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert model.peft_config["default"].modules_to_save == ["enc_to_dec_proj"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: t.WhisperModel(t.WhisperConfig(**WHISPER)),
        lambda: t.Speech2TextModel(t.Speech2TextConfig(**WHISPER, input_feat_per_channel=8, conv_channels=16)),
        lambda: audio_language_model().model,
    ],
    ids=["WhisperModel", "Speech2TextModel", "Qwen2AudioModel"],
)
def test_a_bare_model_has_no_head_and_its_decoder_or_language_model_stays_frozen(make):
    model = get_peft_model(make(), ELPConfig(**ELP))
    assert model.peft_config["default"].modules_to_save == []
    assert all(".elp_" in name for name in trained(model))


@pytest.mark.skipif(not FAMILIES["qwen3_asr"].available, reason="new in Transformers 5.13")
def test_the_head_on_an_audio_language_model_is_trained_without_the_language_model():
    audio = OF_WHISPER | {"num_mel_bins": 8, "output_dim": 16, "downsample_hidden_size": 4}
    config = t.Qwen3ASRConfig(audio_config=audio, text_config=SMALL_TEXT, num_labels=3)
    model = get_peft_model(t.Qwen3ASRForTokenClassification(config), ELPConfig(adapters="EL", e_dim=8, l_dim=10))
    assert model.peft_config["default"].modules_to_save == ["score"]


SPEAKING = SPEECH_T5 | {
    "speech_decoder_prenet_units": 8, "speech_decoder_postnet_units": 8, "speech_decoder_postnet_layers": 2,
    "num_mel_bins": 8,
}  # fmt: skip


def test_a_speech_to_speech_model_keeps_its_decoder_and_hears_speaker_embeddings():
    torch.manual_seed(0)
    base = t.SpeechT5ForSpeechToSpeech(t.SpeechT5Config(**SPEAKING, speaker_embedding_dim=6)).eval()
    inputs = wave() | {"decoder_input_values": torch.randn(2, 4, 8)}
    voices = torch.zeros(2, 6), torch.randn(2, 6)

    def spoken(model, voice):
        torch.manual_seed(0)  # the decoder's prenet drops inputs while evaluating too
        with torch.no_grad():
            return model(**inputs, speaker_embeddings=voice).spectrogram

    expected = spoken(base, voices[1])
    model = shaken(get_peft_model(base, ELPConfig(**ELP)))
    assert model.peft_config["default"].modules_to_save == []
    assert not torch.allclose(spoken(model, voices[0]), spoken(model, voices[1]), atol=1e-4)
    assert not torch.allclose(spoken(model, voices[1]), expected, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(spoken(model, voices[1]), expected)


@pytest.mark.parametrize("target", ["right.encoder", "HubertEncoder"])
def test_one_of_two_towers_is_named(target):
    model = get_peft_model(TwoEncoders(), ELPConfig(target=target, modules_to_save=[], **ELP))
    assert trained(model)
    assert all(".right.encoder." in name for name in trained(model))
    with pytest.raises(ValueError, match=r"several speech encoders: .*ELPConfig\(target="):
        get_peft_model(TwoEncoders(), ELPConfig(**ELP))


def test_each_of_two_towers_gets_an_adapter_of_its_own():
    base = TwoEncoders()
    base.left.feature_extractor._requires_grad = False
    modules = [(name, type(module)) for name, module in base.named_modules()]
    model = with_adapters(base, one={"target": "left.encoder"}, two={"target": "right.encoder"})
    assert model.peft_config["one"].modules_to_save == []
    assert all(".right." in name for name in trained(model))
    unloaded = model.unload()
    assert [(name, type(module)) for name, module in unloaded.named_modules()] == modules
    assert not unloaded.left.feature_extractor._requires_grad
    assert unloaded.right.feature_extractor._requires_grad


# A model of one's own ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states):
        x = hidden_states + self.attn(self.norm1(hidden_states))
        return x + self.mlp(self.norm2(x))


class OwnEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, hidden_states, attention_mask=None):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head, self.config = OwnEncoder(), nn.Linear(8, 2), t.PreTrainedConfig()

    def forward(self, x):
        return self.head(self.encoder(x))


@pytest.fixture(autouse=True)
def described(monkeypatch):
    monkeypatch.setattr(backbones, "_REGISTERED", {})


class HearsFeatures(OwnEncoder):
    def forward(self, input_features):
        return super().forward(input_features)


class WhisperEncoder(OwnEncoder):
    """Called like a class of Transformers, which has a row."""


@pytest.mark.parametrize("stack", [OwnEncoder, HearsFeatures, WhisperEncoder])
def test_an_unknown_encoder_is_described_and_adapted(stack):
    own = Own()
    own.encoder = stack()
    with pytest.raises(ValueError, match="no speech encoder that ELP can adapt") as refused:
        get_peft_model(own, ELPConfig())
    guess = str(refused.value).splitlines()[-1].strip()
    # What the error shows is what works.
    eval(guess, {"peft_elp": __import__("peft_elp"), "stack": own.encoder})
    row = backbones.family(stack)
    assert row is not None
    assert (row.layers, row.feed_forward, row.norms) == ("blocks", ("mlp",), ("norm1", "norm2"))
    assert row.front_end_inside == (stack is HearsFeatures)
    with pytest.raises(ValueError, match=f"{stack.__name__} has been described differently before"):
        register_backbone(stack, Backbone(layers="other"))
    if stack is HearsFeatures:
        return
    model = get_peft_model(own, ELPConfig(modules_to_save=["head"], **ELP)).train()
    model(torch.randn(2, 5, 8)).sum().backward()
    assert model(torch.randn(2, 5, 8)).shape == (2, 5, 2)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Backbone(layers="layers", norms=("norm1",)), r"description of OwnEncoder does not fit.*layers='layers'"),
        (
            Backbone(layers="blocks", feed_forward=("ffn",), norms=("norm1",), layerdrop=None, feature_encoder=None),
            r"described as having ffn, and a Block .* has not. It has norm1, norm2, attn",
        ),
    ],
)
def test_a_description_that_does_not_fit_is_named(row, message):
    register_backbone(OwnEncoder, row)
    model = Own()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, ELPConfig())
    assert type(model.encoder) is OwnEncoder


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: t.SpeechT5ForTextToSpeech(t.SpeechT5Config(**SPEAKING)), "this SpeechT5 reads text"),
        (lambda: t.WhisperForCausalLM(t.WhisperConfig(**WHISPER)), "it is the decoder of Whisper without the encoder"),
        (
            lambda: t.Pop2PianoForConditionalGeneration(
                t.Pop2PianoConfig(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2)
            ),
            "share one class.*found at encoder",
        ),
        (
            lambda: t.VitsModel(
                t.VitsConfig(
                    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, vocab_size=10,
                    upsample_initial_channel=16, flow_size=16, spectrogram_bins=9,
                )
            ),
            "it speaks: what it encodes is text .found at text_encoder",
        ),
    ],
)  # fmt: skip
def test_models_without_an_encoder_of_speech_are_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make(), ELPConfig())


def test_a_codec_that_lets_no_gradient_through_is_refused():
    class XcodecModel(Around):
        __module__ = "transformers.models.xcodec.modeling_xcodec"  # whose class holds a HuBERT, too

    with pytest.raises(ValueError, match="cannot adapt XcodecModel: it runs its encoder of speech without gradients"):
        get_peft_model(XcodecModel(build("hubert", "Model")), ELPConfig())


def test_an_attention_mask_that_cannot_take_pseudo_features_is_refused(monkeypatch):
    family = FAMILIES["speech_to_text"]
    model = get_peft_model(family.model(), ELPConfig(adapters="P", **ELP))
    module = "transformers.models.speech_to_text.modeling_speech_to_text"
    monkeypatch.setattr(f"{module}.create_bidirectional_mask", lambda **inputs: object())  # as flex attention has one
    with pytest.raises(ValueError, match=r"attention mask, a object, cannot be extended.*'sdpa' or 'eager'"):
        model(**family.inputs)


def test_a_bare_stack_is_wrapped_by_peft_and_refused_for_direct_injection():
    bare = FAMILIES["voxtral-bare"].model()
    with pytest.raises(ValueError, match=r"VoxtralEncoder is an encoder stack itself.*get_peft_model"):
        inject_adapter_in_model(ELPConfig(**ELP), bare)
    model = get_peft_model(bare, ELPConfig(**ELP))
    model.add_adapter("second", ELPConfig(adapters="EP", **ELP))
    model.set_adapter("second")
    assert shaken(model).unload() is bare


def test_attention_in_chunks_that_would_miss_the_pseudo_features_is_refused():
    family = FAMILIES["seamless_m4t_v2"]
    base = family.model()
    base.config.speech_encoder_chunk_size = 26
    model = get_peft_model(Around(base), ELPConfig(**ELP))
    with pytest.raises(ValueError, match=r"27 frames.*sees 26 at a time \(config.speech_encoder_chunk_size\)"):
        model(**family.inputs)
