"""Adapters that are added, switched, combined, disabled and deleted by name."""

import pytest
import torch
from backbones import trained
from methods import METHODS
from peft import get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from steps import adapted, answer, differ, nudged, of_adapter, pair, same, was_active


def test_added_adapter_waits(peft_model, method, model):
    expected = answer(peft_model, model)
    peft_model.add_adapter("other", method.config(model))
    assert list(peft_model.peft_config) == ["default", "other"]
    assert peft_model.active_adapters == ["default"]
    assert trained(peft_model) == set(of_adapter(peft_model, method, "default"))
    same(answer(peft_model, model), expected)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda peft_model, config: peft_model.add_adapter("default", config), "'default' already exists"),
        (lambda peft_model, config: peft_model.set_adapter("nobody"), "Adapter nobody not found"),
        (lambda peft_model, config: peft_model.delete_adapter("nobody"), "Adapter nobody does not exist"),
    ],
    ids=["added", "switched to", "deleted"],
)
def test_name_that_is_taken_or_unknown_is_refused(peft_model, method, model, use, message):
    with pytest.raises(ValueError, match=message):
        use(peft_model, method.config(model))


def test_adapter_of_another_method_is_refused(peft_model, method, model):
    other = next(m for m in METHODS.values() if m.prefix != method.prefix).config(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        peft_model.add_adapter("other", other)
    assert list(peft_model.peft_config) == ["default"]


def test_adapters_are_switched(paired, method, model):
    first = answer(paired, model)
    paired.set_adapter("other")
    second = answer(paired, model)
    differ(first, second, answer(model.make(), model))
    assert paired.active_adapters == ["other"]
    assert trained(paired) == set(of_adapter(paired, method, "other"))
    paired.set_adapter("default", inference_mode=True)
    same(answer(paired, model), first)
    assert not trained(paired)


@pytest.mark.does_not_hold("LN-Tuning", "it runs one adapter at a time")
def test_several_adapters_are_active_together(method, model):
    peft_model = pair(method, model, **method.joint)
    first = answer(peft_model, model)
    peft_model.set_adapter("other")
    second = answer(peft_model, model)
    peft_model.base_model.set_adapter(["default", "other"])
    together = answer(peft_model, model)
    assert peft_model.active_adapters == ["default", "other"]
    differ(first, second, together, answer(model.make(), model))
    assert {name.rpartition(method.prefix)[2] for name in trained(peft_model)}
    with peft_model.disable_adapter():
        same(answer(peft_model, model), answer(model.make(), model))
    same(answer(peft_model, model), together)
    peft_model.set_adapter("default")
    same(answer(peft_model, model), first)


def test_disabled_adapters_give_the_base(method, model):
    expected = answer(model.make(), model)
    peft_model = adapted(method, model)
    with_adapter, before = answer(peft_model, model), trained(peft_model)
    with peft_model.disable_adapter():
        same(answer(peft_model, model), expected)
        assert not peft_model.has_active_enabled_adapter
    same(answer(peft_model, model), with_adapter)
    assert trained(peft_model) == before
    peft_model.base_model.disable_adapter_layers()
    same(answer(peft_model, model), expected)
    peft_model.base_model.enable_adapter_layers()
    same(answer(peft_model, model), with_adapter)


def assert_gone(peft_model, name, active):
    assert name not in peft_model.peft_config
    assert peft_model.active_adapters == active
    for module in peft_model.modules():
        if isinstance(module, BaseTunerLayer):
            for container in (*module.adapter_layer_names, *module.other_param_names):
                assert name not in getattr(module, container)
        if isinstance(module, AuxiliaryTrainingWrapper):
            assert name not in module._adapters
            assert module.active_adapters == active
        if isinstance(module, ModulesToSaveWrapper):
            assert name not in module.modules_to_save


def test_active_adapter_can_be_deleted(paired, method, model):
    expected = answer(paired, model)
    paired.set_adapter("other")
    with was_active():
        paired.delete_adapter("other")
    assert_gone(paired, "other", ["default"])
    same(answer(paired, model), expected)
    assert trained(paired) == set(of_adapter(paired, method, "default"))


def test_waiting_adapter_can_be_deleted(paired, model):
    expected = answer(paired, model)
    paired.delete_adapter("other")
    assert_gone(paired, "other", ["default"])
    same(answer(paired, model), expected)


def test_one_of_several_active_adapters_can_be_deleted(method, model):
    peft_model = pair(method, model, **method.joint)
    expected = answer(peft_model, model)
    peft_model.base_model.set_adapter(["default", "other"])
    peft_model.delete_adapter("other")
    assert_gone(peft_model, "other", ["default"])
    same(answer(peft_model, model), expected)


@pytest.mark.does_not_hold("LN-Tuning", "it asks each of its layers for each adapter")
@pytest.mark.does_not_hold("LoRA", "no adapter is active after the deletion")
def test_adapters_may_adapt_different_parts(method, model):
    peft_model = adapted(method, model, **method.one_layer(model))
    expected = answer(peft_model, model)
    peft_model.add_adapter("other", method.config(model))
    peft_model.set_adapter("other")
    nudged(peft_model, 7)
    peft_model.set_adapter("default")
    same(answer(peft_model, model), expected)
    peft_model.set_adapter("other")
    with was_active():
        peft_model.delete_adapter("other")
    assert peft_model.active_adapters == ["default"]
    same(answer(peft_model, model), expected)
    assert trained(peft_model) == set(of_adapter(peft_model, method, "default"))


def test_last_adapter_can_be_deleted(peft_model, model):
    peft_model.delete_adapter("default")
    assert_gone(peft_model, "default", [])
    same(answer(peft_model.base_model, model), answer(model.make(), model))


def test_deleted_name_can_be_used_again(paired, method, model):
    paired.delete_adapter("other")
    paired.add_adapter("other", method.config(model))
    paired.set_adapter("other")
    nudged(paired, 7)
    again = answer(paired, model)
    paired.set_adapter("default")
    differ(again, answer(paired, model))


def test_failed_addition_leaves_no_trace(peft_model, method, model):
    expected, names = answer(peft_model, model), list(peft_model.state_dict())
    with pytest.raises(ValueError):  # noqa: PT011, each method has words of its own
        peft_model.add_adapter("broken", method.config(model, **method.impossible))
    assert list(peft_model.peft_config) == ["default"]
    assert list(peft_model.state_dict()) == names
    same(answer(peft_model, model), expected)


@pytest.mark.does_not_hold("LN-Tuning", "it ignores adapter_names without a warning")
def test_mixed_batches_answer_row_by_row(paired, model):
    first = answer(paired, model)
    paired.set_adapter("other")
    second = answer(paired, model)
    mixed = answer(paired, model, adapter_names=["__base__", "default", "other"])
    expected = torch.stack([answer(model.make(), model)[0], first[1], second[2]])
    same(mixed, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="nobody"):
        answer(paired, model, adapter_names=["nobody"] * 3)


@pytest.mark.does_not_hold("LN-Tuning", "it has no add_weighted_adapter")
def test_weighted_adapters_are_made(method, model):
    peft_model = pair(method, model, **method.without_head)
    first = answer(peft_model, model)
    peft_model.add_weighted_adapter(["default"], [1.0], "same", combination_type="linear")
    peft_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean", combination_type="linear")
    peft_model.set_adapter("same")
    same(answer(peft_model, model), first, atol=1e-5, rtol=1e-4)
    peft_model.set_adapter("mean")
    differ(answer(peft_model, model), first, answer(model.make(), model))


def test_works_in_a_mixed_model(method, model, refusal):
    base, config = model.make(), method.config(model)
    original = answer(model.make(), model)
    with refusal("ELP", "LN-Tuning", match=f"{config.peft_type.value}.* is not compatible") as refused:
        peft_model = get_peft_model(base, config, mixed=True)
    if refused.happened:
        same(answer(base, model), original)
    else:
        differ(answer(nudged(peft_model, 3), model), original)


def test_every_adapter_has_its_own_head(method, model):
    if not model.head:
        pytest.skip("there is no head to train")
    peft_model = pair(method, model)
    for name in model.head:
        wrapper = peft_model.get_base_model().get_submodule(name)
        assert isinstance(wrapper, ModulesToSaveWrapper)
        assert set(wrapper.modules_to_save) == {"default", "other"}
        assert torch.equal(wrapper.original_module.weight, model.make().get_submodule(name).weight)
        assert not wrapper.original_module.weight.requires_grad
    assert set(model.head) == set(peft_model.modules_to_save)
    assert any(key.endswith(f"{model.head[0]}.weight") for key in get_peft_model_state_dict(peft_model))
