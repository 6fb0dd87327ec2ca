"""Several adapters on one backbone: averages of them, and all of their answers from one pass."""

import pytest
import torch
from backbones import ELP, build, shaken, waveforms
from peft import get_peft_model, get_peft_model_state_dict

from peft_elp import ELPConfig


def adapted(head="ForCTC", family="wavlm", **adapters):
    """A model with adapters of the given options by name, each one moved from where it starts."""
    model = None
    for name, options in adapters.items():
        config = ELPConfig(**ELP | options)
        if model is None:
            model = get_peft_model(build(family, head), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        shaken(model)
    return model.eval()


def tensors(model, name):
    return get_peft_model_state_dict(model, adapter_name=name)


# Averages -----------------------------------------------------------------------------------------------------------


def test_an_average_is_the_weighted_sum_of_all_tensors_the_heads_included():
    model = adapted(one={}, two={"e_dropout": 0.1})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # of "two"; both were moved alike
                parameter.mul_(1.5).add_(0.1)
    model.add_weighted_adapter(["one", "two"], [0.25, 0.75], "soup")
    one, two, soup = (tensors(model, name) for name in ("one", "two", "soup"))
    assert soup.keys() == one.keys() == two.keys()
    assert any("lm_head" in name for name in soup)
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, 0.25 * one[name] + 0.75 * two[name])
    assert model.active_adapters == ["two"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".soup." in n)
    model.set_adapter("soup")
    model(waveforms()[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["one", "other"], [0.5, 0.5], "soup"), "different make: e_dim is 8 and 4"),
        ((["one", "third"], [0.5, 0.5], "soup"), r"names \['third'\], and the model has 'one', 'other', 'two'"),
        ((["one", "two"], [1.0, 1.0], "soup"), r"weights that add up to 1: got \[1.0, 1.0\]"),
        ((["one", "two"], [1.0], "soup"), r"one weight for each adapter.*got \[1.0\]"),
        ((["one", "two"], [0.5, 0.5], "one"), "There is an adapter 'one' already"),
        ((["one", "two"], [0.5, 0.5], "soup", "svd"), "combination_type='svd' combines low-rank factors"),
        ((["one", "two"], [0.5, 0.5], "norm"), "cannot be named 'norm'"),
    ],
)
def test_what_cannot_be_averaged_is_refused(arguments, message):
    model = adapted(one={}, two={}, other={"e_dim": 4})
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.state_dict()) == before
    assert list(model.peft_config) == ["one", "two", "other"]
