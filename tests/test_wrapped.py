"""What a user writes to a wrapped module reaches the module that runs; switching and removing leave no trace."""

from typing import Any

import pytest
import torch
from backbones import ELP, build, result, shaken, waveforms
from peft import get_peft_model
from test_larger_models import whisper
from torch import nn

from peft_elp import ELPConfig
from peft_elp.tuner.patches import PATCHES
from peft_elp.tuner.wrapper import Wrapper

E_ONLY = {**ELP, "adapters": "E", "modules_to_save": []}


def logits(model):
    waveform, mask = waveforms()
    with torch.no_grad():
        return result(model(waveform, attention_mask=mask))


def replace_activation(encoder):
    for layer in encoder.layers:
        layer.feed_forward.intermediate_act_fn = nn.ReLU()


def replace_norm(encoder):
    encoder.layer_norm = nn.Identity()


def write_a_weight(encoder):
    encoder.layers[0].final_layer_norm.weight = nn.Parameter(torch.full((24,), 2.0))


@pytest.mark.parametrize("write", [replace_activation, replace_norm, write_a_weight])
def test_what_is_written_to_a_wrapped_module_changes_what_runs(write):
    base = build()
    write(base.wavlm.encoder)
    expected = logits(base)
    assert not torch.equal(expected, logits(build()))
    model: Any = get_peft_model(build(), ELPConfig(**E_ONLY))
    write(model.get_base_model().wavlm.encoder)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(model.unload()), expected)


def test_the_layerdrop_of_whisper_can_be_written():
    model: Any = get_peft_model(whisper(), ELPConfig(**E_ONLY))
    model.get_base_model().model.encoder.layerdrop = 0.5
    assert model.unload().model.encoder.layerdrop == 0.5


def test_a_wrappers_own_attributes_stay_its_own():
    model: Any = get_peft_model(build(), ELPConfig(**ELP)).get_base_model()
    encoder, plain = model.wavlm.encoder, model.wavlm.encoder.base_layer
    encoder.layers[1].compile(backend="eager")
    assert encoder.layers[1].base_layer._compiled_call_impl is None
    encoder.train()
    assert plain.training
    del encoder.dropout
    assert not hasattr(plain, "dropout")
    encoder.note, encoder.config.note = "wrapper", "shared"
    assert not hasattr(plain, "note")
    assert plain.config.note == "shared"
    with pytest.raises(AttributeError):
        encoder.active_adapter = "other"


@pytest.mark.parametrize("adapters", ["E", "L", "ELP"])
@pytest.mark.parametrize("in_place", [False, True])
def test_layers_that_are_cut_after_placing_are_refused(adapters, in_place, tmp_path):
    model: Any = get_peft_model(build(), ELPConfig(**{**ELP, "adapters": adapters}))
    encoder = model.get_base_model().wavlm.encoder
    if in_place:
        del encoder.layers[2]
    else:
        encoder.layers = encoder.layers[:2]
    message = "WavLMEncoder had 3 layers when its adapters were placed and has 2 now"
    with pytest.raises(RuntimeError, match=message):
        logits(model)
    with pytest.raises(RuntimeError, match=message):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    base = model.unload()
    assert len(base.wavlm.encoder.layers) == 2
    logits(get_peft_model(base, ELPConfig(**ELP)))


# Switching off


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_switching_adapters_off_and_on_trains_what_was_trained_before():
    model: Any = get_peft_model(build(), ELPConfig(**ELP), adapter_name="one")
    model.add_adapter("two", ELPConfig(**ELP))
    model.set_requires_grad(["one", "two"])
    both = trained(model)
    assert any(".two." in name for name in both)
    with model.disable_adapter():
        assert trained(model) == set()
    assert trained(model) == both
    model.set_adapter("one", inference_mode=True)
    with model.disable_adapter():
        pass
    assert trained(model) == set()
    model.set_adapter("one")
    half = next(p for name, p in model.named_parameters() if "elp_p" in name and ".one." in name)
    half.requires_grad_(False)
    before = trained(model)
    with model.disable_adapter():
        pass
    assert trained(model) == before


def test_an_adapter_that_is_chosen_while_all_are_off_is_the_one_that_is_trained():
    model: Any = get_peft_model(build(), ELPConfig(**ELP), adapter_name="one")
    model.add_adapter("two", ELPConfig(**ELP))
    with model.disable_adapter():
        model.set_adapter("two")
    assert trained(model) == {name for name, _ in model.named_parameters() if ".two." in name}


def test_a_model_of_transformers_trains_what_was_trained_before_too():
    model: Any = build()
    model.add_adapter(ELPConfig(**ELP))
    before = trained(model)
    model.disable_adapters()
    assert trained(model) == set()
    model.enable_adapters()
    assert trained(model) == before


# Removing


def state(model):
    """Classes, attributes and hooks of every module, and the configuration."""
    seen = []
    for name, module in model.named_modules():
        attributes = {key: repr(value) for key, value in vars(module).items() if key != "_modules"}
        seen.append((name, type(module), attributes))
    return seen, model.config.to_dict()


@pytest.mark.parametrize("adapters", ["E", "L", "P", "ELP"])
@pytest.mark.parametrize("head", ["Model", "ForCTC", "ForSequenceClassification"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_deleting_the_last_adapter_undoes_everything(alone, head, adapters):
    base: Any = build("wavlm", head).requires_grad_(False)
    logits(base)  # Transformers hooks some models in their first call.
    config = ELPConfig(**{**ELP, "adapters": adapters})
    before, expected = state(base), logits(base)
    if alone:
        base.add_adapter(config, "one")
        base.add_adapter(ELPConfig(**ELP), "two")
        model, inner = base, base
    else:
        model = get_peft_model(base, config, adapter_name="one")
        model.add_adapter("two", ELPConfig(**ELP))
        inner = model.get_base_model()
    shaken(model)
    model.delete_adapter("one")
    assert not torch.equal(logits(model), expected)
    assert any(isinstance(module, Wrapper) for module in inner.modules())
    model.delete_adapter("two")
    if alone:
        assert vars(base).pop("_hf_peft_config_loaded") is False  # Transformers' own, which it leaves.
    else:
        assert vars(base).pop("peft_config") == {}  # PEFT's own, which the PeftModel still has.
    assert state(base) == before
    assert torch.equal(logits(base), expected)


def test_every_patch_is_on_the_list():
    # A hook or an attribute that is not listed would not be undone.
    base: Any = build()
    before = dict(state(base)[0][0][2])
    base.add_adapter(ELPConfig(**ELP))
    added = {name for name in vars(base) if name not in before and name != "_modules"}
    listed = {name for name in PATCHES if isinstance(name, str)}
    assert {name for name in added if not name.startswith("_")} <= listed | {"peft_config"}
    for module in base.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            assert hook in PATCHES or not getattr(hook, "__module__", "").startswith("peft_elp")
