"""What version 0.1 saved still loads and gives the same answers.

Version 0.1 wrote `data/saved_by_0_1` with PyTorch 2.13 on a CPU: tiny bases, adapters with random weights, inputs, and
the logits that it computed from them.
"""

import json
import pickle
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from backbones import ELP, build, shaken, waveforms
from packaging.version import Version
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import peft_elp

SAVED = Path(__file__).parent / "data" / "saved_by_0_1"
CLASSES = {"ctc": "Wav2Vec2ForCTC", "classification": "WavLMForSequenceClassification", "x-vector": "WavLMForXVector"}


@pytest.mark.parametrize("name", CLASSES)
def test_adapters_of_version_0_1_give_the_same_logits(name):
    base = getattr(transformers, CLASSES[name]).from_pretrained(SAVED / name / "base")
    model = PeftModel.from_pretrained(base, str(SAVED / name / "adapter")).eval()
    answer = load_file(SAVED / name / "answer.safetensors")
    with torch.inference_mode():
        logits = model(answer["input_values"], attention_mask=answer["attention_mask"]).logits
    # Bit-equal where the CPU is of the same kind; other kernels round differently.
    torch.testing.assert_close(logits, answer["logits"], rtol=1e-5, atol=1e-6)


def test_configurations_pickled_by_version_0_1_load():
    config = pickle.loads((SAVED / "pickles" / "config.pkl").read_bytes())
    assert type(config) is peft_elp.ELPConfig
    assert config.adapters == "ELP"
    assert config.l_output == "head"
    assert config.l_input_norm is False


def test_a_tap_of_version_0_1_reads_a_pre_norm_layer_as_it_did(tmp_path):
    base = build("wavlm", "ForCTC", do_stable_layer_norm=True)
    model = shaken(get_peft_model(base, peft_elp.ELPConfig(adapters="EL", l_input_norm=False, **ELP))).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    del saved["l_input_norm"], saved["config_format"]
    file.write_text(json.dumps(saved))
    waveform, mask = waveforms()
    with torch.inference_mode():
        logits = model(waveform, attention_mask=mask).logits
        loaded = PeftModel.from_pretrained(build("wavlm", "ForCTC", do_stable_layer_norm=True), str(tmp_path)).eval()
        assert torch.equal(loaded(waveform, attention_mask=mask).logits, logits)
    assert PeftConfig.from_pretrained(str(tmp_path)).l_input_norm is False


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="pickled with Transformers 5.23")
def test_models_pickled_by_version_0_1_give_the_same_logits():
    model = torch.load(SAVED / "pickles" / "model.pt", weights_only=False)
    answer = load_file(SAVED / "pickles" / "answer.safetensors")
    with torch.inference_mode():
        logits = model(answer["input_features"]).logits
    torch.testing.assert_close(logits, answer["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "path",
    [
        "card.write_card",
        "call.trim_hidden_states",
        "guards.receptive_field",
        "heads.Head",
        "layer.ELPStack",
        "model.ELPModel",
        "parts.count_parameters",
        "plan.find_parts",
        "saved.read_adapter",
        "inference.speaker_embeddings",
    ],
)
def test_names_of_version_0_1_are_still_found(path):
    module, name = path.split(".")
    assert getattr(import_module(f"peft_elp.{module}"), name).__name__ in (name, "find_encoder")


def test_an_unknown_name_in_a_module_of_version_0_1_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"peft_elp\.layer' has no attribute 'Nothing'"):
        getattr(peft_elp.layer, "Nothing")  # noqa: B009
