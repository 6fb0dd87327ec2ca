"""Adapters that an earlier version saved load and answer as they did. A warning is an error in these tests."""

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForAudioClassification, AutoModelForCTC

from peft_elp import ELPConfig
from peft_elp.saved.folder import read_adapter

DATA = Path(__file__).parent / "data" / "saved_by_0_2"
BASES = {
    "ctc": AutoModelForCTC,
    "classification": AutoModelForAudioClassification,
    "window": AutoModelForAudioClassification,
}


@pytest.mark.parametrize("name", BASES)
def test_a_saved_adapter_answers_as_it_did(name):
    base = BASES[name].from_pretrained(DATA / name / "base").eval()
    inputs = load_file(DATA / name / "answer.safetensors")
    expected = inputs.pop("logits")
    model = PeftModel.from_pretrained(base, DATA / name / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("read", [ELPConfig.from_pretrained, PeftConfig.from_pretrained])
def test_the_length_of_the_window_is_read_by_its_former_name(read):
    assert read(DATA / "window" / "adapter").chunk_length == 1
    assert read(DATA / "ctc" / "adapter").chunk_length is None
    assert "window_s" not in read(DATA / "window" / "adapter").to_dict()


def test_its_folder_is_read_without_a_model():
    assert read_adapter(DATA / "window" / "adapter").config["chunk_length"] == 1
