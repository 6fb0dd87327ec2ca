import dataclasses
import json

import pytest
from peft import PeftConfig, PeftType

from peft_elp import ELPConfig
from peft_elp.adapters.modules import ACTIVATIONS
from peft_elp.config import E_PLACES, L_OUTPUTS, P_POSITIONS
from peft_elp.heads import HEAD_SETTINGS


def test_the_defaults_are_those_of_the_method():
    config = ELPConfig()
    assert (config.adapters, config.e_dim, config.l_dim, config.p_length) == ("ELP", None, None, None)
    assert (config.e_activation, config.l_activation) == ("gelu", "gelu")
    assert (config.e_after, config.p_position, config.p_init_std) == (("feed_forward",), "append", 1e-4)
    assert (config.train_layer_norms, config.init_weights, config.init_std) == (True, True, 1e-3)
    assert config.e_layers is config.l_layers is config.l_output is config.modules_to_save is None
    assert config.task_type is None
    assert config.peft_type is PeftType.ELP  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_has_a_help_text_that_names_its_choices():
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(ELPConfig)}
    assert all(len(text) > 20 for name, text in helps.items() if name not in PeftConfig.__dataclass_fields__)
    assert helps["l_layers"] == "0-based layers that the L-adapter taps. None: all."
    choices = {
        "e_activation": ACTIVATIONS,
        "l_activation": ACTIVATIONS,
        "e_after": E_PLACES,
        "l_output": L_OUTPUTS,
        "p_position": P_POSITIONS,
        "head_config": HEAD_SETTINGS,
    }
    for name, known in choices.items():
        assert [choice for choice in known if choice not in helps[name]] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": "ELX"}, "got 'ELX'. Write adapters='EL'"),
        ({"adapters": ""}, "non-empty subset of the letters E, L and P.*got ''. Write adapters='ELP'"),
        ({"adapters": "EE"}, "each at most once, got 'EE'. Write adapters='E'"),
        ({"adapters": "el"}, "got 'el'. Write adapters='EL'"),
        ({"adapters": None}, "got None"),
        ({"e_dim": 0}, "e_dim must be an integer from 1 to 16384, got 0"),
        ({"l_dim": 1.5}, "l_dim must be an integer from 0 to 16384, got 1.5"),
        ({"l_dim": -1}, "l_dim must be an integer from 0 to 16384, got -1"),
        ({"pool_own_frames": "yes"}, "pool_own_frames must be one of None, False, True, got 'yes'"),
        ({"p_length": 0}, "p_length must be an integer from 1 to 16384, got 0"),
        ({"chunk_length": 0}, "chunk_length must be an integer from 1 to 16384, got 0"),
        ({"e_layers": [-1]}, r"e_layers must hold integers, counted from 0, got \[-1\]"),
        ({"e_layers": ["0"]}, r"e_layers must hold integers, counted from 0, got \['0'\]"),
        ({"e_layers": 1.5}, "e_layers must hold integers, counted from 0, got 1.5"),
        ({"l_layers": [0, 0, 2]}, r"l_layers must not name a layer twice, got \[0, 0, 2\]"),
        ({"e_layers": []}, "e_layers must not be empty. Leave it at None, or drop E from adapters"),
        ({"e_activation": "swish"}, "e_activation must be one of.*'gelu'.*got 'swish'"),
        ({"l_activation": "swish"}, "l_activation must be one of.*'relu'.*got 'swish'"),
        ({"e_dropout": 1.0}, "e_dropout must be at least 0 and less than 1, got 1.0"),
        ({"l_dropout": -0.1}, "l_dropout must be at least 0 and less than 1, got -0.1"),
        ({"p_init_std": -1}, "p_init_std must be at least 0 and finite, got -1"),
        ({"init_std": float("inf")}, "init_std must be at least 0 and finite, got inf"),
        ({"verification_threshold": 2}, "verification_threshold must be at least -1 and less than 1, got 2"),
        ({"l_output": "sum"}, "l_output must be one of .*'head', 'project', 'residual', got 'sum'"),
        ({"init_weights": "paper start"}, "init_weights must be one of True, False, .paper., got .paper start."),
        ({"l_input_norm": "yes"}, "l_input_norm must be one of None, False, True, got 'yes'"),
        ({"e_after": "ffn"}, "e_after must be 'feed_forward', 'attention' or both.*got 'ffn'"),
        ({"e_after": []}, r"e_after must be .*got \[\]"),
        ({"e_after": 3}, "e_after must be .*got 3"),
        ({"p_position": "middle"}, "p_position must be one of 'append', 'prepend', got 'middle'"),
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


def test_a_config_survives_its_file_which_may_be_alone_in_a_folder(tmp_path):
    config = ELPConfig(adapters="EP", e_layers=[2, 1], e_after=("attention",), exclude_modules={"b", "a"})
    config.save_pretrained(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["adapter_config.json"]
    assert json.loads((tmp_path / "new/adapter_config.json").read_text())["peft_type"] == "ELP"
    assert PeftConfig.from_pretrained(tmp_path / "new") == ELPConfig.from_pretrained(tmp_path / "new") == config
