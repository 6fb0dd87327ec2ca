"""Unloading and merging."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from steps import adapted, answer, nudged, same

HEADS = ("wav2vec2-ctc", "wavlm-classification")


@pytest.mark.does_not_hold("LN-Tuning", "the head stays wrapped", models=HEADS)
@pytest.mark.does_not_hold("LoRA", "the head stays the trained one", models=HEADS)
def test_unloading_gives_the_base_back(method, model):
    base = model.make()
    names, expected = list(base.state_dict()), answer(base, model)
    unloaded = nudged(get_peft_model(base, method.config(model)), 3).unload()
    assert not any(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in unloaded.modules())
    assert not hasattr(unloaded, "peft_config")
    assert list(unloaded.state_dict()) == names
    same(answer(unloaded, model), expected)


@pytest.mark.does_not_hold("LN-Tuning", "the head stays the trained one", models=HEADS)
@pytest.mark.does_not_hold("LoRA", "the head stays the trained one", models=HEADS)
def test_unloaded_base_takes_another_adapter(method, model):
    bases = adapted(method, model).unload(), model.make()
    answers = []
    for base in bases:
        torch.manual_seed(3)
        answers.append(answer(nudged(get_peft_model(base, method.config(model)), 3), model))
    same(*answers)


def test_merging_keeps_the_answer(peft_model, model, refusal):
    expected = answer(peft_model, model)
    with refusal("ELP", match="cannot be merged") as refused:
        peft_model.merge_adapter()
    same(answer(peft_model, model), expected, atol=1e-4, rtol=1e-4)
    if not refused.happened:
        peft_model.unmerge_adapter()
        same(answer(peft_model, model), expected, atol=1e-4, rtol=1e-4)


def test_merged_model_is_a_plain_one(peft_model, model, refusal):
    expected = answer(peft_model, model)
    with refusal("ELP", match="cannot be merged") as refused:
        merged = peft_model.merge_and_unload()
    if refused.happened:
        same(answer(peft_model, model), expected)
    else:
        assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
        same(answer(merged, model), expected, atol=1e-4, rtol=1e-4)
