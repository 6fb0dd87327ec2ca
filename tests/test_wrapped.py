"""What a user writes to a wrapped module reaches the module that runs; switching off and on changes nothing."""

from typing import Any

import pytest
import torch
from backbones import ELP, answer, build, trained
from peft import get_peft_model
from torch import nn, testing

from peft_elp import ELPConfig

E_ONLY = {**ELP, "adapters": "E", "modules_to_save": []}


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
    expected = answer(base)
    assert not torch.equal(expected, answer(build()))
    model: Any = get_peft_model(build(), ELPConfig(**E_ONLY))
    write(model.get_base_model().wavlm.encoder)
    testing.assert_close(answer(model, "__base__"), expected)
    testing.assert_close(answer(model.unload()), expected)


def test_a_wrappers_own_attributes_stay_its_own_and_those_of_the_part_stay_in_reach():
    model: Any = get_peft_model(build(), ELPConfig(**ELP)).get_base_model()
    encoder, plain = model.wavlm.encoder, model.wavlm.encoder.base_layer
    assert encoder.config is model.config
    assert len(encoder.layers) == 3
    assert encoder.layers[0].feed_forward.output_dense.out_features == 24
    assert encoder.layers[0].layer_norm.weight.shape == (24,)
    assert "elp.ELPStack" in repr(model)
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
    with pytest.raises(AttributeError, match="nonsense"):
        _ = encoder.nonsense


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
        answer(model)
    with pytest.raises(RuntimeError, match=message):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    base = model.unload()
    assert len(base.wavlm.encoder.layers) == 2
    answer(get_peft_model(base, ELPConfig(**ELP)))


# Switching off ------------------------------------------------------------------------------------------------------


def test_switching_adapters_off_and_on_trains_what_was_trained_before():
    model: Any = get_peft_model(build(), ELPConfig(**ELP), adapter_name="one")
    model.add_adapter("two", ELPConfig(**ELP))

    def trained_afterwards():
        with model.disable_adapter():
            assert trained(model) == set()
        return trained(model)

    model.set_requires_grad(["one", "two"])
    both = trained(model)
    assert any(".two." in name for name in both)
    assert trained_afterwards() == both
    model.set_adapter("one", inference_mode=True)
    assert trained_afterwards() == set()
    model.set_adapter("one")
    next(p for name, p in model.named_parameters() if "elp_p" in name and ".one." in name).requires_grad_(False)
    half = trained(model)
    assert trained_afterwards() == half
    with model.disable_adapter():
        model.set_adapter("two")  # chosen while all are off
    assert trained(model) == {name for name, _ in model.named_parameters() if ".two." in name}
    base: Any = build()
    base.add_adapter(ELPConfig(**ELP))
    before = trained(base)
    base.disable_adapters()
    assert trained(base) == set()
    base.enable_adapters()
    assert trained(base) == before
