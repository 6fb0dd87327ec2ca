"""The life cycle of an adapter on PEFT's terms: guards, the head, saving, switching."""

import json
import subprocess
import sys

import pytest
import torch
from backbones import ELP, TwoEncoders, answer, build, trained, waveforms
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, Wav2Vec2BertConfig, Wav2Vec2BertForCTC
from untouched import assert_untouched, snapshot

from peft_elp import ELPConfig, count_parameters

# Guards -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)),
         {}, "BertModel contains no speech encoder that ELP can adapt.*WavLMEncoder.*AutoModelForCTC"),
        (TwoEncoders, {}, r"several speech encoders: left.encoder \(WavLMEncoder\), right.encoder \(HubertEncoder\)"),
        (lambda: build("wavlm", "ForSequenceClassification", use_weighted_layer_sum=True), {"adapters": "EL"},
         "use_weighted_layer_sum=True.*past the L-adapter.*use_weighted_layer_sum=False"),
        (build, {"e_layers": [0, 3, 7]}, "e_layers names 3, 7, and WavLMForCTC has 3 layers: 0 to 2"),
        (build, {"l_layers": [3]}, "l_layers names 3"),
        (build, {"modules_to_save": ["nothing"]}, r"names 'nothing'.*no such module.*\['lm_head'\]"),
        (build, {"modules_to_save": ["wavlm"]}, "around or inside the encoder 'wavlm.encoder'"),
        (build, {"modules_to_save": ["layers.0.feed_forward"]}, "around or inside the encoder"),
        (build, {"modules_to_save": [], "l_output": "head"}, "needs.*modules_to_save does not hold.*lm_head"),
        (lambda: build("wavlm", "Model"), {"l_output": "head"}, "WavLMModel is a bare encoder"),
        (lambda: build("wavlm", num_hidden_layers=1), {}, "No E-adapter would be placed.*1 layer"),
        (build, {"exclude_modules": r".*feed_forward"}, "No E-adapter would be placed"),
        (build, {"exclude_modules": r".*layers\.0\..*", "l_layers": [0], "l_output": "head"},
         "No E-adapter would be placed.*behind the last tapped one"),
        (build, {"exclude_modules": "("}, r"exclude_modules='\(' is not a regular expression: missing \)"),
        (build, {"e_layers": [0, 1], "l_layers": [0], "l_output": "head"},
         r"e_layers=\[0, 1\] names \[1\].*nothing reads the layers behind the last tapped one, 0.*'residual'"),
        (build, {"adapter_name": "encoder"}, "cannot be named 'encoder'"),
        (build, {"adapter_name": "weight"}, "cannot be named 'weight'"),
        (build, {"adapter_name": "a.b"}, "cannot be named 'a.b', which is not a valid module name"),
        (build, {"adapter_name": "keys"}, "cannot be named 'keys', which is not a valid module name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(make, options, message):
    model = make()
    before = snapshot(model)
    options = dict(options)
    name = options.pop("adapter_name", "default")
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, ELPConfig(**options), adapter_name=name)
    assert_untouched(model, before)
    assert not hasattr(model, "peft_config")


def test_layers_that_are_one_module_are_refused():
    model = build("hubert", "ForCTC")
    layers = model.hubert.encoder.layers
    layers[1] = layers[0]  # shared, as some compressed encoders are
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers.1.feed_forward' and .*layers.0.feed_forward' are the same module"):
        get_peft_model(model, ELPConfig(**ELP))
    assert_untouched(model, before)


def with_convolutions():
    return build("wav2vec2", "ForCTC", add_adapter=True, output_hidden_size=24, num_adapter_layers=1)


def with_convolutions_and_feed_forward():
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    new = {"add_adapter": True, "use_intermediate_ffn_before_adapter": True, "output_hidden_size": 24}
    return Wav2Vec2BertForCTC(Wav2Vec2BertConfig(**size, **new, vocab_size=9, layerdrop=0.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            with_convolutions,
            r"'wav2vec2.adapter' of .* stay frozen.*modules_to_save=\['lm_head', 'wav2vec2.adapter'\]",
        ),
        (
            with_convolutions_and_feed_forward,
            r"'wav2vec2_bert.adapter', 'wav2vec2_bert.intermediate_ffn' of .* stay frozen",
        ),
    ],
)
def test_new_modules_of_the_backbone_behind_the_encoder_are_named_when_they_stay_frozen(make, message):
    base = make()
    for name, parameter in base.named_parameters():
        if not name.split(".")[1].startswith(("adapter", "intermediate_ffn")):
            parameter._is_hf_initialized = True  # as Transformers marks what it has loaded
    with pytest.warns(UserWarning, match=message):
        model = get_peft_model(base, ELPConfig(**ELP))
    assert model.peft_config["default"].l_output == "residual"


def test_a_backbone_whose_weights_are_elsewhere_is_refused():
    model = build()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)  # as DeepSpeed's ZeRO-3 leaves them
    with pytest.raises(ValueError, match="zero3_init_flag to false"):
        get_peft_model(model, ELPConfig())


@pytest.mark.parametrize("letters", ["E", "L", "P"])
def test_no_layer_is_skipped_while_an_adapter_is_active(letters):
    model = get_peft_model(build("wav2vec2", layerdrop=0.9), ELPConfig(**ELP | {"adapters": letters})).train()
    calls = []
    model.get_base_model().wav2vec2.encoder.layers[1].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(5):
        model(waveforms()[0])
    assert len(calls) == 5
    with model.disable_adapter():
        assert model.config.layerdrop == 0.9
    assert model.config.layerdrop == 0.0
    model.config.layerdrop = 0.7  # by the user, who means the backbone's
    model.set_adapter("default")
    assert model.config.layerdrop == 0.0
    model.config.layerdrop = 0.8
    model.delete_adapter("default")
    assert model.config.layerdrop == 0.8
    model = get_peft_model(build("wav2vec2", layerdrop=0.9), ELPConfig(**ELP | {"adapters": letters}))
    assert model.unload().config.layerdrop == 0.9


@pytest.mark.parametrize("skipped", [0, 1])
def test_a_layer_skipped_all_the_same_is_noticed(skipped, monkeypatch):
    model = get_peft_model(build("wav2vec2", "ForCTC"), ELPConfig(**ELP)).train()
    model.config.layerdrop = 0.5
    draws = iter([float(layer != skipped) for layer in range(3)])
    monkeypatch.setattr("torch.rand", lambda *size: torch.tensor(next(draws)))
    with pytest.raises(RuntimeError, match="layerdrop at 0"):
        model(waveforms()[0])


# Of the frozen convolutions, which Transformers checkpoints too.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("adapters", ["E", "L", "P"])
def test_wavlm_with_reentrant_checkpointing_raises_rather_than_hangs(adapters):
    model = get_peft_model(build(), ELPConfig(adapters=adapters, **ELP)).train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match=r"WavLMEncoder never returns.*'use_reentrant': False"):
        model(waveforms()[0])


@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification"])
def test_an_utterance_without_a_frame_is_refused_with_the_least_length(head):
    model = get_peft_model(build(head=head), ELPConfig(**ELP))
    least = (8 - 1) * 5 + 10
    waveform, mask = waveforms((2000, least))
    model(waveform, attention_mask=mask)
    mask[1, least - 1] = 0
    with pytest.raises(ValueError, match=f"utterance of {least - 1} samples is too short.*at least {least} samples"):
        model(waveform, attention_mask=mask)
    with pytest.raises(ValueError, match="utterance of 20 samples"):
        model(waveform[:, :20])
    with pytest.raises(ValueError, match="utterance of 20 samples"):
        model(input_values=waveform[:, :20])


def test_weighted_layer_sum_without_l_says_what_stays_frozen():
    model = build("wavlm", "ForSequenceClassification", use_weighted_layer_sum=True)
    with pytest.warns(
        UserWarning, match="layer_weights of WavLMForSequenceClassification stay frozen.*use an L-adapter"
    ):
        model = get_peft_model(model, ELPConfig(adapters="EP", **ELP))
    waveform, mask = waveforms()
    alone = answer(model, input_values=waveform[2:, :900], attention_mask=mask[2:, :900])
    torch.testing.assert_close(answer(model)[2:], alone, atol=1e-5, rtol=1e-5)


# The head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("Model", []),
        ("ForCTC", ["lm_head"]),
        ("ForSequenceClassification", ["projector", "classifier"]),
        ("ForAudioFrameClassification", ["classifier"]),
        ("ForXVector", ["projector", "tdnn.0", "tdnn.1", "tdnn.2", "feature_extractor", "classifier", "objective"]),
    ],
)
def test_the_head_is_everything_outside_the_base_encoder(head, expected):
    model = get_peft_model(build("wavlm", head), ELPConfig(**ELP))
    assert model.peft_config["default"].modules_to_save == expected
    trained = {name for name, p in model.get_base_model().named_parameters() if p.requires_grad and "elp_" not in name}
    assert {name.partition(".modules_to_save")[0] for name in trained} == set(expected)
    assert model.peft_config["default"].l_output == ("residual" if head == "Model" else "head")


def test_a_list_is_exactly_that_by_full_path_or_ending():
    model = get_peft_model(
        build("wavlm", "ForXVector"), ELPConfig(modules_to_save=["tdnn", "feature_extractor"], **ELP)
    )
    config = model.peft_config["default"]
    assert config.modules_to_save == ["tdnn.0", "tdnn.1", "tdnn.2", "feature_extractor"]
    assert config.l_output == "residual"
    cnn = model.get_base_model().wavlm.feature_extractor
    assert not any(p.requires_grad for p in cnn.parameters())
    model = get_peft_model(
        build("wavlm", "ForCTC"), ELPConfig(modules_to_save=["feature_projection.projection"], **ELP)
    )
    assert model.peft_config["default"].modules_to_save == ["wavlm.feature_projection.projection"]


def test_excluded_modules_get_nothing():
    config = ELPConfig(adapters="E", exclude_modules=["layers.0.feed_forward", "final_layer_norm"], e_dim=4)
    model = get_peft_model(build(), config)
    names = set(get_peft_model_state_dict(model))
    assert not any("layers.0.feed_forward" in name or "final_layer_norm" in name for name in names)
    assert any("layers.1.feed_forward.elp_e" in name for name in names)
    with pytest.warns(UserWarning, match="excludes nothing.*wavlm.encoder.layers.0.feed_forward"):
        get_peft_model(build(), ELPConfig(adapters="E", exclude_modules=["mlp"], e_dim=4))


# Saving and loading -------------------------------------------------------------------------------------------------


def test_a_fresh_process_with_another_seed_gives_the_same_bits(saved, tmp_path):
    there, (waveform, mask) = saved(), waveforms()
    torch.save({"waveform": waveform, "mask": mask, "logits": there.logits}, tmp_path / "expected.pt")
    code = f"""
import torch, peft_elp
from peft import AutoPeftModel
torch.set_num_threads(1)
torch.manual_seed(99)
expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoPeftModel.from_pretrained({str(there.adapter)!r})
with torch.no_grad():
    logits = model(expected["waveform"], attention_mask=expected["mask"]).logits
assert torch.equal(logits, expected["logits"]), (logits - expected["logits"]).abs().max()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_folder_holds_what_is_trained_and_nothing_else(tmp_path):
    model = get_peft_model(build("wavlm", "ForSequenceClassification"), ELPConfig(**ELP))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.pop("base_model.model.wavlm.encoder.elp_settings.checksums").shape == (2, 4)
    for name in tensors:
        assert ".elp_" in name or name.split(".")[2] in {"projector", "classifier"}, name
        assert "base_layer" not in name, name
        assert "default" not in name, name
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() for t in tensors.values()) == sum(count_parameters(model).values())
    with pytest.raises(ValueError, match="There is no adapter 'other'; the model has 'default'"):
        count_parameters(model, "other")


def test_every_open_choice_is_written_down(tmp_path):
    config = ELPConfig(**ELP)
    get_peft_model(build("wavlm", "ForCTC"), config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["e_layers"] == [0, 1]
    assert saved["l_layers"] == [0, 1, 2]
    assert saved["l_output"] == "head"
    assert saved["l_input_norm"] is False
    assert saved["modules_to_save"] == ["lm_head"]
    assert saved["peft_type"] == "ELP"
    assert config.e_layers is config.l_output is config.l_input_norm is None  # it can serve a second model


def test_names_of_saved_tensors_do_not_depend_on_the_other_adapters():
    alone = get_peft_model(build(), ELPConfig(adapters="E", **ELP), adapter_name="asr")
    beside = get_peft_model(build(), ELPConfig(**ELP), adapter_name="emotion")
    beside.add_adapter("asr", ELPConfig(adapters="E", **ELP))
    names = [set(get_peft_model_state_dict(model, adapter_name="asr")) for model in (alone, beside)]
    assert names[0] == names[1]


def test_switching_to_what_is_not_there_switches_nothing():
    model = get_peft_model(build("wavlm", "ForCTC"), ELPConfig(**ELP), adapter_name="one")
    model.add_adapter("two", ELPConfig(**ELP))
    for names, message in (
        (["one", "three"], "There is no adapter 'three'; the model has 'one', 'two'"),
        (["one", "two"], "Only one adapter can be set at a time"),
    ):
        with pytest.raises(ValueError, match=message):
            model.base_model.set_adapter(names)
        assert model.active_adapters == ["one"]
        assert {name.split(".")[-3] for name in trained(model) if "elp_e" in name} == {"one"}


def test_a_model_in_evaluation_stays_so():
    model = get_peft_model(build("wav2vec2", "ForXVector"), ELPConfig(e_dropout=0.5, l_dropout=0.5, **ELP))
    assert not any(module.training for module in model.get_base_model().modules())


def test_an_adapter_with_a_head_is_deleted_while_several_without_are_active():
    bare = {"adapters": "E", "train_layer_norms": False, "modules_to_save": []}
    model = get_peft_model(build(), ELPConfig(**ELP | bare), adapter_name="one").eval()
    model.add_adapter("two", ELPConfig(**ELP | bare))
    model.add_adapter("headed", ELPConfig(**ELP))
    model.base_model.set_adapter(["one", "two"])
    before = answer(model)
    model.delete_adapter("headed")
    assert model.active_adapters == ["one", "two"]
    assert not any(".headed." in name for name, _ in model.named_parameters())
    assert torch.equal(answer(model), before)
