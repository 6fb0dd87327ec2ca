"""What does not fit is refused with names and shapes, and the model stays as it was."""

import json
import os
import pickle
import re
from functools import partial
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from backbones import ELP, build, shaken
from families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import WhisperForConditionalGeneration
from untouched import assert_untouched, logits, snapshot

from peft_elp import ELPConfig, hotswap_adapter

E = "base_model.model.wavlm.encoder.layers.0.feed_forward.elp_e.down.weight"
HEAD = "base_model.model.lm_head.bias"


def saved(folder, change=None, base=None, **options):
    """The folder of a trained adapter, with its tensors or configuration changed."""
    model = shaken(get_peft_model(base or build("wavlm", "ForCTC"), ELPConfig(**ELP | options)))
    model.save_pretrained(folder)
    if change is not None:
        tensors, config = load_file(folder / "adapter_model.safetensors"), folder / "adapter_config.json"
        settings = json.loads(config.read_text())
        change(tensors, settings)
        save_file(tensors, folder / "adapter_model.safetensors")
        config.write_text(json.dumps(settings))
    return folder


def without(name):
    return lambda tensors, settings: tensors.pop(name)


def with_value(name, value):
    return lambda tensors, settings: tensors[name].view(-1)[:1].fill_(value)


def with_more(tensors, settings):
    tensors["base_model.model.wavlm.encoder.layers.7.feed_forward.elp_e.down.weight"] = torch.ones(2, 3)


def with_narrow(tensors, settings):
    tensors[E] = torch.ones(4, 24)


def with_another_setting(tensors, settings):
    settings["e_dim"] = 5


MISFITS = [
    (without(E), r"1 missing \(.*elp_e\.default\.down\.weight \(8, 24\)\)"),
    (without(HEAD), r"1 missing \(.*lm_head.*bias \(9,\)\)"),
    (with_more, r"1 left over \(.*layers\.7.*\(2, 3\)\)"),
    (with_narrow, r"1 of another shape \(.*down\.weight \(4, 24\) in place of \(8, 24\)\)"),
    (with_another_setting, r"of another shape \(.*\(8, 24\) in place of \(5, 24\)"),
    (with_value(E, float("nan")), r"1 not finite \(.*down\.weight\)"),
    (with_value(HEAD, float("inf")), r"1 not finite \(.*lm_head.*bias\)"),
]


@pytest.mark.parametrize(("change", "message"), MISFITS)
def test_tensors_that_are_not_the_adapters_are_refused(change, message, tmp_path):
    folder = saved(tmp_path / "broken", change)
    base = build("wavlm", "ForCTC")
    before = snapshot(base)
    with pytest.raises(ValueError, match=message.replace("default", "[a-z]+")):
        PeftModel.from_pretrained(base, folder)
    assert_untouched(base, before)
    assert not hasattr(base, "peft_config")

    model = get_peft_model(base, ELPConfig(**ELP), adapter_name="first")
    before, answer = snapshot(model), logits(model)
    for is_trainable in (False, True):
        with pytest.raises(ValueError, match=message.replace("default", "[a-z]+")):
            model.load_adapter(folder, "second", is_trainable=is_trainable)
        assert list(model.peft_config) == ["first"]
        assert_untouched(model, before)
        assert torch.equal(logits(model), answer)
    model.load_adapter(saved(tmp_path / "whole"), "second")  # the name is free again


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: build("wavlm", "ForCTC", hidden_size=16), r"of another shape \(.*\(10, 24\) in place of \(10, 16\)"),
        (lambda: build("wavlm", "ForCTC", num_hidden_layers=2), r"names 2, and WavLMForCTC has 2 layers"),
        (lambda: build("wavlm", "ForCTC", num_hidden_layers=4), ""),
        (lambda: build("hubert", "ForCTC"), r"missing \(.*hubert.*left over \(.*wavlm"),
        (lambda: build("wavlm", "ForSequenceClassification"), r"has no such module"),
    ],
)
def test_an_adapter_of_another_backbone_is_refused(base, message, tmp_path):
    folder, base = saved(tmp_path), base()
    if not message:  # its layers are named one by one: a deeper backbone has a place for each of them
        PeftModel.from_pretrained(base, folder)
        return
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert_untouched(base, before)


@pytest.mark.parametrize("change", [change for change, _ in MISFITS if change is not with_another_setting])
def test_a_state_dict_that_does_not_fit_changes_no_tensor_of_the_adapter(change):
    model = shaken(get_peft_model(build("wavlm", "ForCTC"), ELPConfig(**ELP)))
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(tensors, {})
    with pytest.raises(ValueError, match="Nothing was loaded"):
        set_peft_model_state_dict(model, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(model.peft_config) == ["default"]


def test_an_adapter_that_was_used_stays_when_tensors_for_it_are_refused(tmp_path):
    config = ELPConfig.from_pretrained(saved(tmp_path))
    config.inference_mode = False
    model = get_peft_model(build("wavlm", "ForCTC"), config)
    trained = logits(model)
    with pytest.raises(ValueError, match="Nothing was loaded"):
        set_peft_model_state_dict(model, {E: torch.ones(2, 2)})
    assert torch.equal(logits(model), trained)


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PEFT_ELP_PAYLOAD"],)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_loading_runs_no_code_from_a_pickle(tmp_path, monkeypatch):
    folder = saved(tmp_path / "adapter")
    monkeypatch.setenv("PEFT_ELP_PAYLOAD", str(tmp_path / "executed"))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"base_model.model.lm_head.bias": Payload()}))
    with pytest.raises(ValueError, match="broken or cut short"):
        PeftModel.from_pretrained(build("wavlm", "ForCTC"), folder)
    assert not (tmp_path / "executed").exists()


# Files by strangers --------------------------------------------------------------------------------------------------


FOREIGN = {
    "the backbone's": "base_model.model.wavlm.feature_projection.projection.weight",
    "a wrapped module's": "base_model.model.wavlm.encoder.base_layer.layer_norm.weight",
    "the original head's": "base_model.model.classifier.original_module.weight",
    "another adapter's head's": "base_model.model.classifier.modules_to_save.other.weight",
    "another adapter's": "base_model.model.wavlm.encoder.elp_p.other.rows",
}


@pytest.mark.parametrize("name", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_a_tensor_that_is_not_the_adapters_is_refused_by_name(name, prefix, tmp_path):
    key = prefix + name.removeprefix("base_model.model.")

    def with_foreign(tensors, settings):
        tensors[key] = torch.ones(2)

    folder = saved(tmp_path, with_foreign, base=build("wavlm", "ForSequenceClassification"))
    model = get_peft_model(build("wavlm", "ForSequenceClassification"), ELPConfig(**ELP), adapter_name="other")
    assert name in model.state_dict()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"1 left over \(" + re.escape(key)) as error:
        model.load_adapter(folder, "new")
    assert len(str(error.value)) < 500
    assert_untouched(model, before)


def with_dtype(dtype):
    def change(tensors, settings):
        tensors[E] = tensors[E].to(dtype)

    return change


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_of_a_dtype_without_meaning_are_refused(dtype, tmp_path):
    folder, base = saved(tmp_path, with_dtype(dtype)), build("wavlm", "ForCTC")
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"float64, float32, float16 or bfloat16.*down\.weight"):
        PeftModel.from_pretrained(base, folder)
    assert_untouched(base, before)
    model = get_peft_model(base, ELPConfig(**ELP))
    tensors = load_file(folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1 not floating-point \(.*down\.weight"):
        set_peft_model_state_dict(model, tensors)
    with pytest.raises(ValueError, match=r"1 not floating-point \(.*down\.weight"):
        hotswap_adapter(model, str(folder))


@pytest.mark.parametrize(
    ("name", "dtype", "value", "base_dtype"),
    [
        (E, torch.float64, 1e300, torch.float32),
        (HEAD, torch.float32, 3e38, torch.float16),
        (HEAD, torch.bfloat16, 1e30, torch.float16),
    ],
    ids=["E", "head", "head of bfloat16"],
)
def test_values_that_overflow_in_the_model_are_refused(name, dtype, value, base_dtype, tmp_path):
    def change(tensors, settings):
        tensors[name] = torch.full_like(tensors[name], value, dtype=dtype)

    base = build("wavlm", "ForCTC").to(base_dtype)
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"1 not finite \("):
        PeftModel.from_pretrained(base, saved(tmp_path, change))
    assert_untouched(base, before)


def test_double_precision_is_loaded_if_it_fits(tmp_path):
    folder = saved(tmp_path / "double", with_dtype(torch.float64))
    model = PeftModel.from_pretrained(build("wavlm", "ForCTC"), folder)
    expected = PeftModel.from_pretrained(build("wavlm", "ForCTC"), saved(tmp_path / "single"))
    assert torch.equal(logits(model), logits(expected))


HUGE = [
    ({"e_dim": 16_000}, r"of another shape \(.*elp_e.*in place of \(16000"),
    ({"l_dim": 16_000}, r"of another shape \(.*elp_l.*in place of \(16000"),
    ({"p_length": 16_000}, r"of another shape \(.*elp_p.*in place of \(16000"),
    ({"head_config": {"vocab_size": 1_000_000}}, r"of another shape \(.*lm_head.*in place of \(1000000"),
    ({"e_dim": 10**9}, r"e_dim is a whole number from 1 to 16384, got 1000000000"),
    ({"head_config": {"vocab_size": 10**9}}, r"vocab_size in head_config is a whole number from 1 to 1048576"),
    ({"head_config": {"num_labels": 10**9}}, r"num_labels in head_config is a whole number from 1 to 1048576"),
    ({"e_layers": list(range(10**6))}, r"e_layers names 3, 4"),
    ({"e_layers": [0] * 10**6}, r"names a layer twice"),
    ({"l_layers": ["x"] * 10**6}, r"holds whole numbers"),
    ({"modules_to_save": ["x" * 10**6]}, r"modules_to_save names"),
    ({"adapters": "E" * 10**6}, r"adapters is"),
    ({"e_after": ["x"] * 10**6}, r"e_after takes"),
    ({"head_config": {str(i): 1 for i in range(10**6)}}, r"head_config is a dictionary"),
    ({"target": "x" * 10**6}, r"target="),
]


@pytest.mark.parametrize(("settings", "message"), HUGE, ids=[str(settings)[:30] for settings, _ in HUGE])
def test_sizes_without_sense_are_refused_before_memory_is_allocated(settings, message, tmp_path):
    folder, base = saved(tmp_path, lambda tensors, known: known.update(settings)), build("wavlm", "ForCTC")
    before = snapshot(base)
    largest = 0

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **kwargs or {})
            if isinstance(made, torch.Tensor) and not made.is_meta:
                largest = max(largest, made.numel())
            return made

    with Watch(), pytest.raises(ValueError, match=message) as error:
        PeftModel.from_pretrained(base, folder)
    assert len(str(error.value)) < 1500
    assert largest < 10**6
    assert_untouched(base, before)


def test_the_weights_are_read_once(tmp_path, monkeypatch):
    folder, read = saved(tmp_path), []
    for module in (peft.utils.save_and_load, safetensors.torch):
        name = "safe_load_file" if hasattr(module, "safe_load_file") else "load_file"
        load = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, load=load, **kwargs: read.append(args) or load(*args, **kwargs)
        )
    PeftModel.from_pretrained(build("wavlm", "ForCTC"), folder)
    assert len(read) == 1


def test_an_adapter_may_be_started_from_the_configuration_of_a_saved_one(tmp_path):
    config = ELPConfig.from_pretrained(saved(tmp_path))
    config.inference_mode, config.e_dim = False, 30
    model = build("wavlm", "ForCTC")
    model.add_adapter(config)
    assert model.wavlm.encoder.layers[0].feed_forward.elp_e["default"].down.weight.shape == (30, 24)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_embeddings_of_a_resized_vocabulary_are_saved_if_they_are_trained(trained, tmp_path):
    FAMILIES["whisper"].model().save_pretrained(tmp_path / "base")
    base = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(34)
    config = ELPConfig(adapters="E", e_dim=4, modules_to_save=["proj_out"] if trained else None)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert ("base_model.model.proj_out.weight" in names) == trained
    assert not any("embed_tokens" in name for name in names)
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(34)
    PeftModel.from_pretrained(again, tmp_path / "adapter")


def test_adapters_behind_the_last_tapped_layer_are_loaded_if_a_former_version_saved_them(tmp_path):
    # A configuration that was saved names the class of its base.
    options = {"e_layers": [0, 1], "l_layers": [0], "l_output": "head"}
    config = ELPConfig(**ELP | options, auto_mapping={"base_model_class": "WavLMForCTC"})
    model = shaken(get_peft_model(build("wavlm", "ForCTC"), config)).eval()
    model.save_pretrained(tmp_path)
    assert any("layers.1.feed_forward.elp_e" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(build("wavlm", "ForCTC"), tmp_path)), logits(model))


@pytest.mark.parametrize("fault", ["missing", "dangling"])
@pytest.mark.parametrize("way", ["a configuration of one's own", "a second adapter", "the name of the first"])
def test_weights_that_are_not_there_leave_the_model_as_it_was(way, fault, tmp_path):
    folder = saved(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    if fault == "dangling":
        (folder / "adapter_model.safetensors").symlink_to(tmp_path / "gone")
    model: Any = build("wavlm", "ForCTC")
    if way == "a configuration of one's own":
        before = snapshot(model)
        with pytest.raises((ValueError, OSError)):
            PeftModel.from_pretrained(model, folder, config=ELPConfig(**ELP))
    else:
        model = get_peft_model(model, ELPConfig(**ELP))
        before = snapshot(model)
        with pytest.raises((ValueError, OSError)):
            model.load_adapter(folder, "default" if way == "the name of the first" else "other")
        assert list(model.peft_config) == model.active_adapters == ["default"]
    assert_untouched(model, before)


def test_the_loading_of_other_methods_is_left_to_peft(tmp_path):
    model: Any = get_peft_model(build("wavlm", "ForCTC"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    states = []
    for load in (PeftModel.from_pretrained, partial(PeftModel.from_pretrained.__func__.before_elp, PeftModel)):
        base = build("wavlm", "ForCTC")
        with pytest.raises(ValueError, match=r"Repo id|Can't find weights"):
            load(base, str(tmp_path))
        states.append([(name, type(module).__name__) for name, module in base.named_modules()])
    assert states[0] == states[1]
