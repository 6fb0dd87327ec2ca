"""Adapters that are switched off, removed or refused leave no trace, in every family and with every set of letters."""

import warnings
from typing import Any

import pytest
import torch
from backbones import ELP, build, encoded, shaken
from families import FAMILIES, cases
from peft import get_peft_model
from torch import nn

from peft_elp import ELPConfig, find_encoder, speed_up_frozen
from peft_elp.backbones import has_fixed_window
from peft_elp.tuner.wrapper import Wrapper

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),  # LASR's own
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning"),
]


def heard(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return encoded(model(**FAMILIES[name].inputs))


def seen(value: Any) -> Any:
    """Something that tells whether a value is another one, or was written to."""
    if isinstance(value, torch.Tensor):
        return id(value), value._version, value.requires_grad
    if isinstance(value, dict):
        return {key: seen(inner) for key, inner in value.items() if not str(key).startswith(("_modules", "cached"))}
    return repr(value)


def state(model: Any) -> tuple[list[Any], dict[str, Any]]:
    """Classes, attributes, hooks and tensors of every module, and the configuration."""
    # Without submodules, and without what some backbones keep for the next call, such as positions.
    return [
        (name, type(module), id(module), seen(vars(module))) for name, module in model.named_modules()
    ], model.config.to_dict()


def start(name: str) -> tuple[Any, Any, torch.Tensor]:
    """A base with LayerDrop, its state and what its encoder gives."""
    base: Any = FAMILIES[name].model()
    if getattr(base.config, "layerdrop", None) == 0.0:
        base.config.layerdrop = 0.1
    base.requires_grad_(False)
    expected = heard(base, name)  # first, since Transformers hooks some models in their first call
    return base, state(base), expected


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("way", ["switched off", "unloaded", "deleted", "deleted by Transformers"])
def test_adapters_leave_no_trace(name, way):
    family = FAMILIES[name]
    base, before, expected = start(name)
    for letters in (*family.adapters, family.adapters):
        config = family.config(adapters=letters)
        if way == "deleted by Transformers":
            if not hasattr(base, "delete_adapter") or find_encoder(base).stack_path == "":
                pytest.skip("Transformers adds no adapters to it")
            base.add_adapter(config, "one")
            base.add_adapter(family.config(), "two")
            model, inner = base, base
        else:
            model: Any = get_peft_model(base, config, adapter_name="one")
            model.add_adapter("two", family.config())
            inner = model.get_base_model()
        assert shaken(model) is model
        changed = heard(model.eval(), name)
        assert any(isinstance(module, Wrapper) for module in inner.modules())
        if way == "switched off":
            with model.disable_adapter():
                torch.testing.assert_close(heard(model, name), expected, atol=1e-5, rtol=1e-5)
            assert torch.equal(heard(model, name), changed)
            model.unload()
        elif way == "unloaded":
            assert model.unload() is base
        else:
            model.delete_adapter("one")
            assert any(isinstance(module, Wrapper) for module in inner.modules())
            model.delete_adapter("two")
            vars(base).pop("peft_config", None)  # PEFT's own, which the PeftModel still has
        if way == "deleted by Transformers":  # which knows nothing of the tuner
            assert not any(".elp_" in key for key in base.state_dict())
            assert torch.equal(heard(base, name), expected), letters
            base = start(name)[0]
            continue
        assert state(base) == before, letters
        assert torch.equal(heard(base, name), expected), letters


def test_a_shorter_window_a_shared_pass_and_a_head_of_ones_own_leave_no_trace():
    base, before, expected = start("whisper-classification")
    assert has_fixed_window(base)
    reader = {"adapters": "L", "train_layer_norms": False, "head_config": {"num_labels": 5}}
    model: Any = get_peft_model(base, ELPConfig(**ELP | reader))
    with torch.no_grad():
        model.forward_all(["default"], **FAMILIES["whisper-classification"].inputs)
    model.unload()
    assert state(base) == before
    assert torch.equal(heard(base, "whisper-classification"), expected)


def test_the_layout_of_frozen_layers_is_taken_back_to_what_it_was():
    plain = build().requires_grad_(False)
    sped_up = speed_up_frozen(build().requires_grad_(False))
    for base in (plain, sped_up):
        before = [(name, len(module._forward_pre_hooks)) for name, module in base.named_modules()]
        with warnings.catch_warnings():
            get_peft_model(base, ELPConfig(**ELP)).unload()
        assert [(name, len(module._forward_pre_hooks)) for name, module in base.named_modules()] == before


def test_a_call_that_fails_leaves_no_trace():
    model: Any = FAMILIES["wavlm"].adapted().eval()
    shaken(model)
    before = heard(model, "wavlm")
    handle = model.get_base_model().wavlm.encoder.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        heard(model, "wavlm")
    handle.remove()
    assert torch.equal(heard(model, "wavlm"), before)
