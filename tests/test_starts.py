"""A fresh adapter leaves a working model working, and trains."""

import copy

import pytest
import torch
from backbones import ELP, build, waveforms
from peft import get_peft_model
from transformers import AutoModelForAudioClassification, AutoModelForCTC

from peft_elp import ELPConfig


def l_output(model, **options):
    return get_peft_model(model, ELPConfig(**ELP | options)).peft_config["default"].l_output


@pytest.fixture
def checkpoint(tmp_path):
    """A CTC model that was trained, on disk."""
    build("wavlm", "ForCTC").save_pretrained(tmp_path)
    return tmp_path


def test_a_head_from_the_checkpoint_keeps_its_first_layer(checkpoint):
    base = AutoModelForCTC.from_pretrained(checkpoint).eval()
    waveform, mask = waveforms()
    with torch.no_grad():
        before = base(waveform, attention_mask=mask).logits
        model = get_peft_model(base, ELPConfig(adapters="L", **ELP)).eval()
        assert model.peft_config["default"].l_output == "residual"
        assert model.peft_config["default"].modules_to_save == ["lm_head"]
        torch.testing.assert_close(model(waveform, attention_mask=mask).logits, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_it_does_so_in_another_dtype(checkpoint, dtype):
    assert l_output(AutoModelForCTC.from_pretrained(checkpoint, dtype=dtype)) == "residual"
    assert l_output(AutoModelForCTC.from_pretrained(checkpoint).to(dtype)) == "residual"


def test_it_does_so_in_a_copy_in_which_nothing_tells_what_was_loaded(checkpoint):
    assert l_output(copy.deepcopy(AutoModelForCTC.from_pretrained(checkpoint))) == "residual"


def test_it_does_so_for_a_second_adapter(checkpoint):
    model = get_peft_model(AutoModelForCTC.from_pretrained(checkpoint), ELPConfig(adapters="E", **ELP))
    model.add_adapter("second", ELPConfig(adapters="L", **ELP))
    assert model.peft_config["second"].l_output == "residual"


def test_a_head_that_the_checkpoint_lacks_is_re_made_for_the_taps(checkpoint):
    assert l_output(AutoModelForAudioClassification.from_pretrained(checkpoint)) == "head"
    assert l_output(AutoModelForCTC.from_pretrained(checkpoint, vocab_size=5, ignore_mismatched_sizes=True)) == "head"


def test_a_head_that_the_adapter_brings_is_re_made_for_the_taps(checkpoint):
    assert l_output(AutoModelForCTC.from_pretrained(checkpoint), head_config={"vocab_size": 5}) == "head"


def test_a_head_from_the_checkpoint_is_re_made_where_that_is_asked_for(checkpoint):
    assert l_output(AutoModelForCTC.from_pretrained(checkpoint), l_output="head") == "head"
