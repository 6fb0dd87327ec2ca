"""Saving and loading, through folders and state dicts."""

import json
import warnings

import pytest
import torch
from backbones import trained
from peft import (
    AutoPeftModel,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from steps import adapted, answer, differ, loss_of, nudged, of_adapter, pair, same


def test_saved_folder_holds_the_adapter_alone(peft_model, method, tmp_path):
    peft_model.save_pretrained(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len([name for name in tensors if "settings" not in name]) == len(of_adapter(peft_model, method, "default"))
    assert not any("default" in name for name in tensors)


def test_model_card_names_peft_and_the_base(method, model, tmp_path):
    base = model.make()
    base.save_pretrained(tmp_path / "tiny-base")
    base = type(base).from_pretrained(tmp_path / "tiny-base")
    adapted_base = get_peft_model(base, method.config(model))
    adapted_base.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "tiny-base" in card  # ELP: without its path, which is the writer's own
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "tiny-base")


def test_saved_adapter_answers_alike(peft_model, model, tmp_path):
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.make(), tmp_path)
    same(answer(loaded, model), answer(peft_model, model))
    state, again = peft_model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor), name
    assert not loaded.training
    assert not trained(loaded)


def test_pickled_weights_are_saved_and_loaded(peft_model, model, tmp_path):
    peft_model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    same(answer(PeftModel.from_pretrained(model.make(), tmp_path), model), answer(peft_model, model))


def test_loaded_adapter_can_train_on(method, model, tmp_path):
    adapted(method, model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.make(), tmp_path, is_trainable=True)
    assert not loaded.peft_config["default"].inference_mode
    assert trained(loaded) == set(of_adapter(loaded, method, "default"))
    loss_of(loaded, model).backward()
    loaded.load_adapter(tmp_path, "second", is_trainable=True)
    loaded.set_adapter("second")
    assert trained(loaded) == set(of_adapter(loaded, method, "second"))


def test_adapter_is_loaded_under_another_name(method, model, tmp_path):
    peft_model = adapted(method, model, adapter_name="mine")
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.make(), tmp_path / "mine", adapter_name="yours")
    assert list(loaded.peft_config) == ["yours"]
    same(answer(loaded, model), answer(peft_model, model))


def test_adapters_are_loaded_beside_each_other(paired, model, tmp_path):
    first = answer(paired, model)
    paired.set_adapter("other")
    second = answer(paired, model)
    paired.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.make(), tmp_path)
    for name in ("other", "yet-another"):
        outcome = loaded.load_adapter(tmp_path / "other", adapter_name=name)
        assert outcome.missing_keys == outcome.unexpected_keys == []
    same(answer(loaded, model), first)
    loaded.set_adapter("yet-another")
    same(answer(loaded, model), second)


def test_selected_adapters_are_saved(paired, tmp_path):
    paired.save_pretrained(tmp_path, selected_adapters=["default"])
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        paired.save_pretrained(tmp_path, selected_adapters=["nobody"])
    paired.save_pretrained(tmp_path, selected_adapters=["other"])
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()


def test_adapters_with_overlapping_names_are_told_apart(peft_model, method, model, tmp_path):
    expected = len(get_peft_model_state_dict(peft_model))
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        peft_model.add_adapter(name, method.config(model))
    peft_model.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "default2", tmp_path / "efaul"):
        assert len(load_file(place / "adapter_model.safetensors")) == expected


def test_adapter_is_loaded_without_memory_for_two(peft_model, model, tmp_path):
    expected = answer(peft_model, model)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.make(), tmp_path, low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    same(answer(loaded, model), expected)
    loaded.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    loaded.set_adapter("other")
    same(answer(loaded, model), expected)


@pytest.mark.does_not_hold("LN-Tuning", "it copies modules of the base")
def test_adapter_is_injected_without_memory(method, model):
    base = inject_adapter_in_model(method.config(model), model.make(), low_cpu_mem_usage=True)
    # PEFT asks for no more: what is a copy of a part of the base, such as a layer norm, has its values from there.
    assert "meta" in {p.device.type for key, p in base.named_parameters() if method.prefix in key}


def test_device_of_a_loaded_adapter_can_be_chosen(method, model, tmp_path):
    adapted(method, model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.make(), tmp_path, device_map={"": "cpu"}, torch_device="cpu")
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


def test_state_dict_of_an_adapter_is_taken_and_given(paired, method, model):
    paired.set_adapter("other")
    expected = answer(paired, model)
    state = get_peft_model_state_dict(paired, adapter_name="other")
    assert len([name for name in state if "settings" not in name]) == len(of_adapter(paired, method, "other"))
    assert not any("other" in key.split(".") for key in state)
    fresh = get_peft_model(model.make(), method.config(model), adapter_name="fresh").eval()
    outcome = set_peft_model_state_dict(fresh, state, adapter_name="fresh")
    assert outcome.unexpected_keys == []
    assert not set(outcome.missing_keys) & set(of_adapter(fresh, method, "fresh"))
    same(answer(fresh, model), expected)
    again = get_peft_model_state_dict(fresh, adapter_name="fresh")
    assert again.keys() == state.keys()


def test_missing_weights_are_reported(method, model, tmp_path):
    adapted(method, model).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if method.prefix in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file, metadata={"format": "pt"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            PeftModel.from_pretrained(model.make(), tmp_path)
            report = " ".join(str(warning.message) for warning in caught)
        except ValueError as error:  # ELP refuses what PEFT warns of
            report = str(error)
    assert "missing" in report
    assert gone.rpartition(".")[2] in report


def test_weights_of_another_size_are_refused_or_passed_over(peft_model, method):
    state = {key: value.clone() for key, value in get_peft_model_state_dict(peft_model).items()}
    name = next(key for key in state if method.prefix in key and key.endswith("weight"))
    state[name] = torch.zeros([size + 1 for size in state[name].shape])
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|of another shape"):
        set_peft_model_state_dict(peft_model, state)
    with pytest.warns(UserWarning, match="mismatched"):
        set_peft_model_state_dict(peft_model, state, ignore_mismatched_sizes=True)


def test_state_dict_of_the_whole_model_is_loaded(peft_model, method, model):
    fresh = get_peft_model(model.make(), method.config(model)).eval()
    fresh.load_state_dict(peft_model.state_dict())
    same(answer(fresh, model), answer(peft_model, model))


def test_state_dict_of_the_base_is_taken_and_given(method, model):
    original = model.make().state_dict()
    peft_model = adapted(method, model)
    expected = answer(peft_model, model)
    state = get_base_model_state_dict(peft_model)
    assert state.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        for name, parameter in peft_model.get_base_model().named_parameters():
            if not parameter.requires_grad and method.prefix not in name:
                parameter.add_(0.1)
    differ(answer(peft_model, model), expected)
    outcome = set_base_model_state_dict(peft_model, original, strict=False)
    assert not outcome.missing_keys
    assert not outcome.unexpected_keys
    same(answer(peft_model, model), expected)


def test_saved_weights_are_read_without_a_model(peft_model, tmp_path):
    peft_model.save_pretrained(tmp_path)
    weights = load_peft_weights(str(tmp_path), device="cpu")
    state = get_peft_model_state_dict(peft_model)
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) for name in state)


def test_folder_is_known_for_an_adapter(peft_model, model, tmp_path):
    peft_model.save_pretrained(tmp_path / "adapter")
    model.make().save_pretrained(tmp_path / "base")
    assert check_if_peft_model(str(tmp_path / "adapter"))
    assert not check_if_peft_model(str(tmp_path / "base"))


def test_auto_class_finds_the_base(method, model, tmp_path):
    model.make().save_pretrained(tmp_path / "base")
    base = type(model.make()).from_pretrained(tmp_path / "base")
    peft_model = nudged(get_peft_model(base, method.config(model)), 3)
    peft_model.save_pretrained(tmp_path / "adapter")
    same(answer(AutoPeftModel.from_pretrained(tmp_path / "adapter"), model), answer(peft_model, model))


def test_weights_are_swapped(method, model, tmp_path, refusal):
    peft_model = pair(method, model, **method.joint)
    before = answer(peft_model, model)
    peft_model.set_adapter("other")
    expected = answer(peft_model, model)
    peft_model.save_pretrained(tmp_path)
    peft_model.set_adapter("default")
    # PEFT's function knows LoRA alone; ELP has peft_elp.hotswap_adapter.
    only_lora = f"only supports LORA but {method.config(model).peft_type.value}"
    with refusal("ELP", "LN-Tuning", match=only_lora) as refused:
        hotswap_adapter(peft_model, str(tmp_path / "other"), adapter_name="default", torch_device="cpu")
    same(answer(peft_model, model), before if refused.happened else expected)
