"""The model and its configuration."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from steps import adapted, answer, nudged, of_adapter, same
from torch import nn


def test_has_the_public_methods(peft_model):
    for name in ("save_pretrained", "from_pretrained", "push_to_hub", "load_adapter", "merge_and_unload", "unload"):
        assert callable(getattr(peft_model, name))


def test_peft_model_can_be_built_directly(method, model):
    torch.manual_seed(3)
    same(
        answer(nudged(PeftModel(model.make(), method.config(model)), 3), model), answer(adapted(method, model), model)
    )


def test_base_model_is_the_model_itself(method, model):
    base = model.make()
    assert get_peft_model(base, method.config(model)).get_base_model() is base


def test_adapter_name_is_in_parameter_names(method, model):
    peft_model = adapted(method, model, adapter_name="test-adapter")
    assert peft_model.active_adapters == ["test-adapter"]
    assert of_adapter(peft_model, method, "test-adapter")


def test_adapter_name_within_the_prefix_warns(method, model):
    name = method.prefix[:-1]
    with pytest.warns(UserWarning, match=f"'{name}' should not be contained in the prefix '{method.prefix}'"):
        get_peft_model(model.make(), method.config(model), adapter_name=name)


def test_config_is_active_and_knows_its_type(peft_model, method, model):
    config = peft_model.active_peft_config
    assert config is peft_model.peft_config["default"]
    assert config.peft_type == peft_model.peft_type == method.config(model).peft_type
    assert not config.is_prompt_learning
    assert not config.is_adaption_prompt


def test_config_survives_a_round_trip(method, model, tmp_path):
    for config in (method.config(model), adapted(method, model).peft_config["default"]):
        json.dumps({key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()})
        config.save_pretrained(tmp_path)
        assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()
        assert type(PeftConfig.from_pretrained(tmp_path)) is type(config)
        copied = copy.deepcopy(config)
        assert copied == config
        assert pickle.loads(pickle.dumps(config)) == config


def test_config_can_be_made_from_a_dict(method, model):
    fields = method.config(model).to_dict()
    config = get_peft_config({**fields, "peft_type": fields["peft_type"].value})
    assert type(config) is type(method.config(model))
    torch.manual_seed(3)
    assert torch.isfinite(answer(get_peft_model(model.make(), config), model)).all()


def test_config_of_a_newer_version_warns(method, model, tmp_path):
    adapted(method, model).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"field_of_tomorrow": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['field_of_tomorrow'\]"):
        PeftModel.from_pretrained(model.make(), tmp_path)


def test_config_that_is_passed_is_taken(method, model, tmp_path):
    adapted(method, model).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    peft_model = PeftModel.from_pretrained(model.make(), tmp_path, config=config, is_trainable=False)
    assert peft_model.peft_config["default"] is config
    assert config.inference_mode


@pytest.mark.does_not_hold(
    "ELP", "open choices are filled in on a copy, so that one configuration serves models of any depth"
)
def test_config_that_leaves_choices_open_is_passed_on_as_it_is(method, model, tmp_path):
    config = method.config(model)
    get_peft_model(model.make(), config).save_pretrained(tmp_path)
    peft_model = PeftModel.from_pretrained(model.make(), tmp_path, config=config)
    assert peft_model.peft_config["default"] is config


class Custom(nn.Module):
    """A model that is not from Transformers, around one that is."""

    def __init__(self, speech):
        super().__init__()
        self.speech, self.config = speech, {"model_type": "custom"}

    def forward(self, **inputs):
        return self.speech(**inputs)


def test_config_of_the_model_may_be_a_dict(method, model, tmp_path):
    peft_model = nudged(get_peft_model(Custom(model.make()), method.config(model)), 3)
    peft_model.save_pretrained(tmp_path)
    same(answer(PeftModel.from_pretrained(Custom(model.make()), tmp_path), model), answer(peft_model, model))


def test_parameters_are_counted(peft_model, method):
    own = sum(parameter.numel() for parameter in of_adapter(peft_model, method, "default").values())
    assert peft_model.get_nb_trainable_parameters() == (own, sum(p.numel() for p in peft_model.parameters()))
    peft_model.print_trainable_parameters()


def test_printed_model_names_the_tuner(method, model):
    assert f"{method.prefix[:-1]}." in repr(adapted(method, model))


def test_targeted_modules_are_named(peft_model):
    assert peft_model.targeted_module_names
    for name in peft_model.targeted_module_names:
        assert isinstance(peft_model.get_base_model().get_submodule(name), BaseTunerLayer), name


def test_status_tells_layers_and_adapters(paired):
    layers = paired.get_layer_status()
    tuned = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    assert len(layers) == sum(isinstance(module, tuned) for module in paired.modules())
    for layer in layers:
        assert layer.enabled
        assert layer.active_adapters == ["default"]
        assert layer.merged_adapters == []
        assert layer.available_adapters in (["default", "other"], [])
        assert layer.requires_grad in ({"default": True, "other": False}, {})
        assert all(devices == ["cpu"] for devices in layer.devices.values())
    status = paired.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert set(status.peft_types.values()) == {paired.peft_config["default"].peft_type.value}
    assert status.trainable_params == paired.get_nb_trainable_parameters()[0]
    with paired.disable_adapter():
        assert paired.get_model_status().enabled is False


def test_attributes_of_the_base_are_in_reach(peft_model):
    assert peft_model.base_model_torch_dtype == torch.float32
    assert peft_model.config is peft_model.get_base_model().config
    assert peft_model.device.type == "cpu"
    assert peft_model.has_active_enabled_adapter


def test_wrapping_twice_warns(method, model, refusal):
    base = get_peft_model(model.make(), method.config(model)).get_base_model()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with refusal("ELP", match="already has adapters") as refused:
            get_peft_model(base, method.config(model), adapter_name="second")
    assert refused.happened or any("with PEFT for a second time" in str(warning.message) for warning in said)


def test_excluded_modules_get_no_adapter(method, model):
    excluded = r".*encoder\.layers\.0\..*"
    names = adapted(method, model, exclude_modules=excluded).state_dict()
    adapters = [name for name in names if method.prefix in name]
    assert any("layers.1." in name for name in adapters)
    assert not any(".layers.0." in name.partition(method.prefix)[0] for name in adapters)
