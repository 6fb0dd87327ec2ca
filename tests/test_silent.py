"""What used to give a wrong answer without a word is right now, or an error."""

from functools import partial

import pytest
import torch
import transformers
from backbones import ELP, answer, build, shaken, waveforms, with_norms_moved
from families import FAMILIES, SPEECH_T5
from family import wave
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    SpeechT5Config,
    SpeechT5ForSpeechToSpeech,
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperForAudioClassification,
)

from peft_elp import Backbone, ELPConfig, FeatureCache, find_encoder, register_backbone

READS_ONLY = {"adapters": "L", "l_dim": 10, "train_layer_norms": False}


class Siamese(nn.Module):
    """Compares the first recording with the second: two calls of the encoder in one forward pass."""

    def __init__(self):
        super().__init__()
        self.wavlm = build("wavlm", "Model")
        self.config = self.wavlm.config
        self.head = nn.Linear(24, 4)

    def forward(self, speech, other=None):
        one = self.head(self.wavlm(speech).last_hidden_state.mean(1))
        two = one if other is None else self.head(self.wavlm(other).last_hidden_state.mean(1))
        return {"logits": nn.functional.cosine_similarity(one, two)[:, None]}


class Single(Siamese):
    def forward(self, speech):
        return {"logits": self.head(self.wavlm(speech).last_hidden_state.mean(1))}


def adapted(base, **options):
    return shaken(get_peft_model(base, ELPConfig(**READS_ONLY | options))).eval()


# The shared pass and the cache --------------------------------------------------------------------------------------


def test_a_pass_is_not_shared_by_two_calls_of_the_encoder():
    model = adapted(Siamese())
    first, second = torch.randn(2, 2, 2000)
    with pytest.raises(
        RuntimeError, match=r"calls its feature encoder more than once.*Call the model once per adapter"
    ):
        model.forward_all(["default"], first, second)


def test_features_are_not_cached_for_two_calls_of_the_encoder(tmp_path):
    cache = FeatureCache(adapted(Siamese()), tmp_path)
    rows = [{"speech": torch.randn(1, 2000), "other": torch.randn(1, 2000)}]
    with pytest.raises(ValueError, match=r"Siamese does not run from cached features.*more than once"):
        cache.read(rows, lambda rows: rows[0], progress=False)


def collate(rows):
    return {"speech": torch.stack([row["audio"] for row in rows])}


def test_every_input_counts_for_the_features_of_a_recording(tmp_path):
    torch.manual_seed(0)
    rows = [{"audio": torch.randn(2000)} for _ in range(3)]
    model = adapted(Single(), l_output="residual")
    cache = FeatureCache(model, tmp_path, dtype=torch.float32)
    read = cache.read(rows, collate, progress=False)
    for row, held in zip(rows, read, strict=True):
        live, cached = model(**collate([row]))["logits"], model(**cache.collate([held]))["logits"]
        torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-5)


def test_a_model_that_uses_its_inputs_besides_the_encoder_is_not_cached(tmp_path):
    class Louder(Single):
        def forward(self, speech):
            return {"logits": super().forward(speech)["logits"] * speech.abs().mean()}

    cache = FeatureCache(adapted(Louder()), tmp_path)
    with pytest.raises(ValueError, match="Louder answers differently with cached features"):
        cache.read([{"audio": torch.randn(2000)}], collate, progress=False)


@pytest.fixture
def cached(tmp_path):
    waveform, _ = waveforms((2000, 2000))
    rows = [{"input_values": x, "attention_mask": torch.ones(2000).long()} for x in waveform]
    model = adapted(build("wavlm", "ForSequenceClassification"))
    cache = FeatureCache(model, tmp_path)

    def together(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    return model, cache, rows, together


def test_a_cached_batch_is_not_answered_past_its_cache(cached):
    model, cache, rows, together = cached
    batch = cache.collate([cache.read(rows, together, progress=False)[0]])
    with pytest.raises(ValueError, match="cached features holds the features of one adapter"):
        model(**batch, adapter_names=["default"])
    with pytest.raises(ValueError, match="cached features holds the features of one adapter"):
        model.forward_all(["default"], **batch)
    # The placeholders of the recordings make every answer NaN that is computed from them.
    inputs = {name: batch[name] for name in ("input_values", "attention_mask")}
    assert model(**inputs).logits.isnan().all()


def test_features_are_those_of_the_encoder_as_it_is_now(cached):
    model, cache, rows, together = cached
    before = cache.read(rows, together, progress=False)
    other = build("wavlm", "ForSequenceClassification", seed=9).wavlm.state_dict()
    find_encoder(model.get_base_model()).backbone.load_state_dict(other, strict=False)
    for name, parameter in model.get_base_model().wavlm.named_parameters():
        plain = name.replace("base_layer.", "")
        if plain in other:
            parameter.data.copy_(other[plain])
    after = cache.read(rows, together, progress=False)
    assert not torch.equal(before[0]["cached_features"], after[0]["cached_features"])
    with pytest.raises(ValueError, match="features of another encoder"):
        cache.collate([before[0]])


def test_features_of_another_model_of_the_same_shape_are_refused(cached, tmp_path):
    _, cache, rows, together = cached
    batch = cache.collate([cache.read(rows, together, progress=False)[0]])
    other, same = (adapted(build("wavlm", "ForSequenceClassification", seed=seed)) for seed in (9, 0))
    for model in (other, same):
        FeatureCache(model, tmp_path)
    with pytest.raises(ValueError, match=r"cached features are of another encoder.*FeatureCache of this model"):
        other(**batch)
    assert same(**batch).logits.isfinite().all()


def test_masking_that_is_switched_on_later_is_refused(cached):
    model, cache, rows, together = cached
    row = cache.read(rows, together, progress=False)[0]
    model.get_base_model().config.mask_time_prob = 0.5
    with pytest.raises(ValueError, match="masks its features at random"):
        cache.collate([row])


def test_features_that_overflow_are_refused(cached):
    model, cache, rows, together = cached
    with torch.no_grad():
        model.get_base_model().wavlm.encoder.layers[0].final_layer_norm.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"overflow in torch.float16.*dtype=torch.bfloat16"):
        cache.read(rows, together, progress=False)


# Weights for an adapter that is there already ------------------------------------------------------------------------

NO_YES = {"head_config": {"id2label": {0: "no", 1: "yes"}}}
YES_NO = {"head_config": {"id2label": {0: "yes", 1: "no"}}}


def classifier(**options):
    return get_peft_model(build("wavlm", "ForSequenceClassification"), ELPConfig(**ELP | options))


@pytest.mark.parametrize(
    ("here", "there", "what"),
    [
        ({}, {"e_activation": "relu"}, "settings"),
        ({}, {"l_activation": "tanh"}, "settings"),
        ({}, {"l_input_norm": True}, "settings"),
        ({"l_output": "project"}, {"l_output": "residual"}, "settings"),
        ({"l_layers": [0, 2]}, {"l_layers": [1, 2]}, "settings"),
        ({}, {"p_position": "prepend"}, "settings"),
        (NO_YES, YES_NO, "labels"),
    ],
)
@pytest.mark.parametrize("way", ["load_adapter", "set_peft_model_state_dict"])
def test_weights_of_an_adapter_with_other_settings_are_refused_under_a_taken_name(here, there, what, way, tmp_path):
    here, there = ({"e_layers": [0], "train_layer_norms": False} | options for options in (here, there))
    shaken(classifier(**there)).save_pretrained(tmp_path / "there")
    classifier(**here).save_pretrained(tmp_path / "here")
    model = PeftModel.from_pretrained(build("wavlm", "ForSequenceClassification"), tmp_path / "here")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load = partial(model.load_adapter, tmp_path / "there", "default")
    if way == "set_peft_model_state_dict":
        load = partial(set_peft_model_state_dict, model, load_file(tmp_path / "there" / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match=f"other {what} than 'default'.*another name, or call delete_adapter"):
        load()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.load_adapter(tmp_path / "there", "another")


def test_a_training_is_not_resumed_with_other_labels(tmp_path):
    def trainer(labels, steps):
        arguments = TrainingArguments(tmp_path, max_steps=steps, save_steps=1, report_to="none", use_cpu=True)
        rows = [{"input_values": torch.ones(1000), "labels": 0}] * 2
        return Trainer(classifier(**labels), arguments, train_dataset=rows)

    trainer(NO_YES, 1).train()
    trainer(NO_YES, 2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="other labels than 'default'"):
        trainer(YES_NO, 3).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", ["alike", "in half precision", "averaged", "older", "labels without names"])
def test_weights_of_an_adapter_with_the_same_settings_are_taken(kind, tmp_path):
    model, other = classifier(adapters="L", **NO_YES), classifier(adapters="L", e_activation="relu", **NO_YES)
    if kind == "labels without names":
        other = classifier(adapters="L", head_config={"num_labels": 2})
    states = get_peft_model_state_dict(shaken(other))
    (name,) = (name for name in states if "settings" in name)
    if kind == "in half precision":
        states = {name: tensor.half() for name, tensor in states.items()}
    elif kind == "averaged":
        states = {name: 0.3 * tensor + 0.7 * tensor for name, tensor in states.items()}
    elif kind == "older":
        del states[name]
    outcome = set_peft_model_state_dict(model, states)
    assert not [name for name in outcome.missing_keys if "elp_" in name]
    torch.testing.assert_close(answer(model.eval()), answer(other.eval()), atol=1e-2, rtol=1e-2)


# Derivatives and hooks ----------------------------------------------------------------------------------------------


def test_derivatives_of_every_kind_agree():
    base = build("hubert", "ForSequenceClassification")
    base.set_attn_implementation("eager")
    model = shaken(get_peft_model(base, ELPConfig(**ELP))).eval()
    x = waveforms((1000,))[0]
    rows = torch.autograd.functional.jacobian(lambda x: model(x).logits[0], x)
    parts = [p for name, p in model.named_parameters() if "elp_" in name]
    logits = model(x).logits
    batched = torch.autograd.grad(logits, parts, torch.eye(4)[:, None], is_grads_batched=True, retain_graph=True)
    for row in range(4):
        one = torch.autograd.grad(logits[0, row], parts, retain_graph=True)
        for together, alone in zip(batched, one, strict=True):
            torch.testing.assert_close(together[row], alone)
    vectorised = torch.autograd.functional.jacobian(lambda x: model(x).logits[0], x, vectorize=True)
    torch.testing.assert_close(vectorised, rows)
    direction = torch.randn_like(x)
    _, forward = torch.func.jvp(lambda x: model(x).logits[0], (x,), (direction,))
    torch.testing.assert_close(forward, rows.flatten(1) @ direction[0], rtol=1e-3, atol=1e-5)


def test_global_hooks_see_every_module_of_an_adapter():
    model, seen = adapted(build("hubert"), adapters="ELP", e_dim=4), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    model(waveforms()[0])
    handle.remove()
    parts = ("down", "activation", "dropout", "up", "norm")
    unseen = {name for name, module in model.named_modules() if ".elp_" in name and module not in seen}
    assert not {name for name in unseen if name.endswith(parts)}


# Averages, heads, batch norms, windows ------------------------------------------------------------------------------


@pytest.mark.skipif(not FAMILIES["audio-spectrogram-transformer"].available, reason="new in Transformers 5.9")
def test_a_head_with_several_labels_at_a_time_is_saved_as_one(tmp_path):
    family = FAMILIES["audio-spectrogram-transformer"]
    model = family.adapted()
    model(
        **family.inputs, labels=torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    )  # Transformers guesses from floats.
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.model(), tmp_path)
    assert again.get_base_model().config.problem_type == "multi_label_classification"


def test_the_guess_of_one_adapter_does_not_reach_another(tmp_path):
    model = get_peft_model(build("wav2vec2", "ForSequenceClassification"), ELPConfig(**ELP))
    model.add_adapter("other", ELPConfig(**ELP))
    model.get_base_model().config.problem_type = "multi_label_classification"
    model.set_adapter("other")
    assert model.get_base_model().config.problem_type is None
    model.set_adapter("default")
    assert model.get_base_model().config.problem_type == "multi_label_classification"


def speech_to_speech():
    """A SpeechT5 whose batch norms are behind its decoder."""
    torch.manual_seed(0)
    sizes = {f"speech_decoder_{part}net_units": 8 for part in ("pre", "post")}
    config = SpeechT5Config(**SPEECH_T5 | sizes, num_mel_bins=8, speaker_embedding_dim=6)
    return with_norms_moved(SpeechT5ForSpeechToSpeech(config)).eval()


def spoken(model):
    torch.manual_seed(1)
    speech = {"decoder_input_values": torch.randn(2, 10, 8), "speaker_embeddings": torch.randn(2, 6)}
    return model(**wave(), **speech).spectrogram


@pytest.mark.parametrize("door", ["PEFT", "Transformers"])
def test_batch_norms_outside_the_encoder_do_not_move_either(door, tmp_path):
    base = speech_to_speech()
    norms = [module for module in base.modules() if isinstance(module, nn.BatchNorm1d)]
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # SpeechT5's prenet drops at random in evaluation as well
    before, config = spoken(base), ELPConfig(**ELP)
    model = get_peft_model(base, config) if door == "PEFT" else base
    if door == "Transformers":
        model.add_adapter(config)
    shaken(model.train())
    spoken(model).square().mean().backward()
    assert norms
    assert not any(norm.training for norm in norms)
    trained = spoken(model.eval())
    assert not torch.allclose(trained, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(spoken(PeftModel.from_pretrained(speech_to_speech(), tmp_path)), trained)
    spoken(model.train())
    if door == "PEFT":
        base = model.unload()
    else:
        model.delete_adapter("default")
    assert all(norm.training for norm in norms)
    assert torch.equal(spoken(base.eval()), before)


def whisper():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    return WhisperForAudioClassification(
        WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=150, num_labels=3)
    )


@pytest.mark.filterwarnings("ignore:The head averages over the padding:UserWarning")
def test_a_shorter_window_takes_nothing_from_the_base(tmp_path):
    base = whisper().eval()
    positions = base.encoder.embed_positions.weight.detach().clone()
    model = get_peft_model(base, ELPConfig(**READS_ONLY, chunk_length=1)).eval()
    assert model(torch.zeros(1, 8, 100)).logits.shape == (1, 3)
    assert base.config.max_source_positions == 150
    states = model.state_dict()
    (name,) = (name for name in states if name.endswith("embed_positions.weight"))
    assert torch.equal(states[name], positions)
    base.save_pretrained(tmp_path)
    (saved,) = (x for name, x in load_file(tmp_path / "model.safetensors").items() if "embed_positions" in name)
    assert torch.equal(saved, positions)
    assert WhisperConfig.from_pretrained(tmp_path).max_source_positions == 150
    model.load_state_dict({**states, name: positions + 1})
    model.unload()
    assert torch.equal(base.encoder.embed_positions.weight, positions + 1)
    assert base.encoder.config is base.config
    assert base(torch.zeros(1, 8, 300)).logits.shape == (1, 3)


# Names, and models that have adapters already -----------------------------------------------------------------------


def test_no_adapter_is_called_like_the_backbone():
    with pytest.raises(ValueError, match="cannot be named '__base__'"):
        get_peft_model(build(), ELPConfig(**ELP), adapter_name="__base__")


@pytest.mark.parametrize(
    "other", [ELPConfig(**ELP), LoraConfig(target_modules=["intermediate_dense"])], ids=["ELP", "LoRA"]
)
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_model_with_adapters_gets_no_second_wrapper(other):
    model = get_peft_model(build("hubert"), other)
    kind = "lora" if isinstance(other, LoraConfig) else "ELP"
    with pytest.raises(ValueError, match=rf"already has adapters \({kind}\).*add_adapter.*unload"):
        get_peft_model(model.get_base_model(), ELPConfig(**ELP))


def test_a_class_is_not_known_by_its_name_alone():
    class WhisperEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = WhisperEncoder()

    with pytest.raises(ValueError, match=r"type\(stack\)"):
        find_encoder(Own())
    register_backbone(WhisperEncoder, Backbone(layers="blocks", norms=("",), layerdrop=None, feature_encoder=None))
    assert find_encoder(Own()).stack_path == "encoder"
    with pytest.raises(TypeError, match="takes a class, got 'WhisperEncoder'"):
        register_backbone("WhisperEncoder", Backbone())


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
def test_a_base_on_disk_is_refused_with_a_sentence(tmp_path):
    get_peft_model(build(), ELPConfig(**ELP)).save_pretrained(tmp_path / "adapter")
    build().save_pretrained(tmp_path / "base")
    parts = ("feature_extractor", "feature_projection", "masked_spec_embed")
    places = {"lm_head": "cpu", "wavlm.encoder": "disk"} | {f"wavlm.{part}": "cpu" for part in parts}
    options = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    base = transformers.WavLMForCTC.from_pretrained(tmp_path / "base", **options)
    with pytest.raises(ValueError, match=r"are on disk.*device_map"):
        PeftModel.from_pretrained(base, tmp_path / "adapter", offload_folder=str(tmp_path / "again"))


# Transformers' own door ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="it loads no head of an adapter")
@pytest.mark.parametrize("change", ["another tensor", "not finite", "too large"])
def test_what_transformers_loads_besides_an_adapter_is_an_error_at_the_first_call(change, tmp_path):
    build("wavlm", "ForSequenceClassification").save_pretrained(tmp_path / "base")
    shaken(get_peft_model(build("wavlm", "ForSequenceClassification"), ELPConfig(**ELP))).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    if change == "another tensor":
        tensors["base_model.model.wavlm.encoder.layer_norm.bias"] = torch.ones(24)
    else:
        value = torch.nan if change == "not finite" else 3e38
        tensors[next(name for name in tensors if "elp_e" in name)].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    model = type(build("wavlm", "ForSequenceClassification")).from_pretrained(tmp_path / "base")
    model.load_adapter(str(tmp_path))
    message = "overwritten" if change == "another tensor" else "not finite or too large"
    with pytest.raises(RuntimeError, match=rf"1 tensors .*{message}.*Load the base model again"):
        model(waveforms()[0])
