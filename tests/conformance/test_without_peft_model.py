"""Adapters that are injected, or placed by Transformers."""

import warnings

import pytest
import transformers
from backbones import trained
from packaging.version import Version
from peft import (
    PeftModel,
    convert_to_lora,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from steps import adapted, answer, differ, nudged, of_adapter, same, second_time, was_active
from transformers.integrations.peft import PeftAdapterMixin

HEADS = ("wav2vec2-ctc", "wavlm-classification")


def injected_twice(method, model):
    """A model with the adapters "default" and "other" in it."""
    base = inject_adapter_in_model(method.config(model), model.make(), adapter_name="default")
    with second_time():
        inject_adapter_in_model(method.config(model), base, adapter_name="other")
    return base


def added_twice(method, model):
    """A model with the adapters "mine" and "other" of Transformers, and the answer of the first."""
    base = model.make()
    base.add_adapter(method.config(model), adapter_name="mine")
    first = answer(nudged(base, 3), model)
    with second_time():
        base.add_adapter(method.config(model), adapter_name="other")
    return base, first


def test_adapters_are_injected_in_place(method, model):
    base = injected_twice(method, model)
    assert type(base) is type(model.make())
    assert list(base.peft_config) == ["default", "other"]
    set_adapter(base, "default")
    nudged(base, 3)
    first = answer(base, model)
    differ(first, answer(model.make(), model))
    set_adapter(base, "other")
    nudged(base, 7)
    differ(first, answer(base, model))
    set_adapter(base, "default")
    same(answer(base, model), first)


@pytest.mark.does_not_hold("LN-Tuning", "PEFT finds no other copy of the head", models=HEADS)
@pytest.mark.does_not_hold("LoRA", "PEFT finds no other copy of the head", models=HEADS)
def test_injected_adapters_are_frozen_cast_and_deleted(method, model):
    base = injected_twice(method, model)
    set_requires_grad(base, ["default", "other"], requires_grad=False)
    assert not trained(base)
    set_requires_grad(base, "other")
    assert trained(base) == set(of_adapter(base, method, "other"))
    cast_adapter_dtype(base, "default")
    with was_active():
        delete_adapter(base, adapter_name="other", prefix=method.prefix)
    assert not any(method.prefix in key for key in of_adapter(base, method, "other"))
    answer(base, model)


def test_injected_state_dict_is_taken_and_given(method, model):
    base = nudged(inject_adapter_in_model(method.config(model), model.make()), 3)
    state = get_peft_model_state_dict(base)
    fresh = inject_adapter_in_model(method.config(model), model.make(), state_dict=state).eval()
    outcome = set_peft_model_state_dict(fresh, state)
    assert outcome.unexpected_keys == []
    same(answer(fresh, model), answer(base, model))


def test_transformers_adds_and_saves_adapters(method, model, tmp_path):
    base = model.make()
    base.add_adapter(method.config(model), adapter_name="mine")
    expected = answer(nudged(base, 3), model)
    assert base.active_adapters() == ["mine"]
    assert trained(base) == set(of_adapter(base, method, "mine"))
    state = base.get_adapter_state_dict()
    assert len([name for name in state if "settings" not in name]) == len(of_adapter(base, method, "mine"))
    base.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "model.safetensors").exists()
    same(answer(PeftModel.from_pretrained(model.make(), tmp_path), model), expected)


@pytest.mark.does_not_hold("LN-Tuning", "the head of the waiting adapter stays trainable", models=HEADS)
@pytest.mark.does_not_hold("LoRA", "the head of the waiting adapter stays trainable", models=HEADS)
def test_transformers_switches_adapters(method, model):
    base, first = added_twice(method, model)
    differ(answer(nudged(base, 7), model), first)
    base.set_adapter("mine")
    same(answer(base, model), first)
    base.disable_adapters()
    same(answer(base, model), answer(model.make(), model))


def test_transformers_deletes_adapters(method, model):
    base, first = added_twice(method, model)
    with was_active():
        base.delete_adapter("other")
    same(answer(base, model), first)
    base.delete_adapter("mine")
    same(answer(base, model), answer(model.make(), model))


@pytest.mark.does_not_hold("LN-Tuning", "Transformers does not switch the head's copies on again", models=HEADS)
@pytest.mark.does_not_hold("LoRA", "Transformers does not switch the head's copies on again", models=HEADS)
def test_transformers_switches_adapters_on_again(method, model):
    base = model.make()
    base.add_adapter(method.config(model), adapter_name="mine")
    expected = answer(nudged(base, 3), model)
    base.disable_adapters()
    base.enable_adapters()
    same(answer(base, model), expected)


def test_transformers_loads_adapters(method, model, tmp_path):
    if Version(transformers.__version__) < Version("5.20"):
        pytest.skip("Transformers loads adapters with a head from 5.20 on, of whatever method")
    peft_model = adapted(method, model)
    peft_model.save_pretrained(tmp_path)
    base = model.make()
    PeftAdapterMixin.load_adapter(base, str(tmp_path), adapter_name="mine")  # Wav2Vec2ForCTC has another load_adapter
    same(answer(base.eval(), model), answer(peft_model, model))


def test_adapter_is_converted_to_lora(peft_model, refusal):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a PEFT adapter to LoRA that is already a LoRA", UserWarning)
        with refusal("ELP", "LN-Tuning", match="do not support LoRA conversion", error=TypeError) as refused:
            convert_to_lora(peft_model, rank=2)
    assert peft_model.supports_lora_conversion() != refused.happened
