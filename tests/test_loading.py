"""What does not fit is refused with names and shapes, and the model stays as it was."""

import json
import os
import pickle

import pytest
import torch
from backbones import ELP, build, shaken
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_life_cycle import assert_untouched, logits, snapshot

from peft_elp import ELPConfig

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
    with pytest.raises(pickle.UnpicklingError):
        PeftModel.from_pretrained(build("wavlm", "ForCTC"), folder)
    assert not (tmp_path / "executed").exists()
