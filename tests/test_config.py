import dataclasses
import json

import pytest
from peft import PeftConfig, PeftType

from peft_elp import ELPConfig


def test_the_defaults_are_those_of_the_method():
    config = ELPConfig()
    assert (config.adapters, config.e_dim, config.l_dim, config.p_length) == ("ELP", 256, 512, None)
    assert (config.e_activation, config.l_activation) == ("gelu", "gelu")
    assert (config.e_after, config.p_position, config.p_init_std) == (("feed_forward",), "append", 1e-4)
    assert (config.train_layer_norms, config.init_weights, config.init_std) == (True, True, 1e-3)
    assert config.e_layers is config.l_layers is config.l_output is config.modules_to_save is None
    assert config.task_type is None


def test_every_field_has_a_help_text():
    own = {f.name: f for f in dataclasses.fields(ELPConfig)}.keys() - {f.name for f in dataclasses.fields(PeftConfig)}
    assert len(own) > 15
    for field in dataclasses.fields(ELPConfig):
        if field.name in own:
            assert len(field.metadata["help"]) > 20, field.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": "ELX"}, "got 'ELX'. Write adapters='EL'"),
        ({"adapters": ""}, "non-empty subset of the letters E, L and P.*got ''. Write adapters='ELP'"),
        ({"adapters": "EE"}, "each at most once, got 'EE'. Write adapters='E'"),
        ({"adapters": "el"}, "got 'el'. Write adapters='EL'"),
        ({"adapters": None}, "got None"),
        ({"e_dim": 0}, "e_dim is a whole number from 1 to 16384, got 0"),
        ({"l_dim": -3}, "l_dim is a whole number from 1 to 16384, got -3"),
        ({"l_dim": 1.5}, "got 1.5"),
        ({"p_length": 0}, "p_length is a whole number from 1 to 16384, got 0"),
        ({"e_layers": [-1]}, r"e_layers counts layers from 0.*got \[-1\]"),
        ({"l_layers": [0, 0, 2]}, r"l_layers names a layer twice, got \[0, 0, 2\]. Write l_layers=\[0, 2\]"),
        ({"e_layers": []}, "e_layers is empty"),
        ({"e_layers": ["0"]}, "holds whole numbers"),
        ({"e_activation": "swish"}, "e_activation is one of.*'gelu'.*got 'swish'"),
        ({"l_activation": "swish"}, "l_activation is one of.*'relu'.*got 'swish'"),
        ({"e_dropout": 1.0}, "e_dropout is at least 0 and less than 1, got 1.0"),
        ({"l_dropout": -0.1}, "l_dropout is at least 0 and less than 1, got -0.1"),
        ({"p_init_std": -1}, "p_init_std is at least 0"),
        ({"l_output": "sum"}, "l_output is one of 'head', 'project', 'residual', got 'sum'"),
        ({"init_weights": "paper start"}, "init_weights is one of True, False, .paper., got .paper start."),
        ({"l_input_norm": "yes"}, "l_input_norm is one of None, False, True, got 'yes'"),
        ({"e_after": "ffn"}, "e_after takes 'feed_forward', 'attention' or both.*got 'ffn'"),
        ({"e_after": []}, "e_after takes"),
        ({"e_after": 3}, "e_after takes.*got 3"),
        ({"e_layers": 1.5}, "e_layers holds whole numbers, got 1.5"),
        ({"init_std": float("inf")}, "init_std is at least 0 and finite, got inf"),
        ({"p_position": "middle"}, "p_position is one of 'append', 'prepend', got 'middle'"),
        ({"modules_to_save": "lm_head"}, r"Write modules_to_save=\['lm_head'\]"),
    ],
)
def test_a_bad_value_is_refused_with_value_range_and_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        ELPConfig(**options)


def test_one_place_may_be_a_string_and_order_does_not_matter():
    assert ELPConfig(e_after="attention").e_after == ("attention",)
    assert ELPConfig(e_after=["attention", "feed_forward"]).e_after == ("feed_forward", "attention")
    assert ELPConfig(adapters="PLE").adapters == "ELP"
    assert ELPConfig(e_layers=(2, 0)).e_layers == [0, 2]


def test_a_config_survives_its_file(tmp_path):
    config = ELPConfig(adapters="EP", e_layers=[2, 1], e_after=("attention",), exclude_modules={"b", "a"})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ELP"
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_a_field_from_a_newer_version_is_reported_and_dropped(tmp_path):
    ELPConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"q_dim": 3}))
    with pytest.warns(UserWarning, match="q_dim"):
        assert PeftConfig.from_pretrained(tmp_path) == ELPConfig()


def test_the_type_is_a_member_of_the_enumeration():
    assert ELPConfig().peft_type is PeftType.ELP  # pyright: ignore[reportAttributeAccessIssue]


def test_a_folder_may_hold_a_configuration_alone(tmp_path):
    config = ELPConfig(adapters="EL", e_dim=64)
    config.save_pretrained(tmp_path)
    assert ELPConfig.from_pretrained(tmp_path) == config


def test_broken_weights_are_noticed_with_the_configuration(tmp_path):
    ELPConfig().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=f"weights of the adapter '{tmp_path}' are broken.*force_download=True"):
        ELPConfig.from_pretrained(tmp_path)
