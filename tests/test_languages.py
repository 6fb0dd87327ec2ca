"""Transformers' adapters for the languages of MMS are loaded below ELP-adapters."""

import pytest
import torch
from backbones import ELP, build, result, waveforms
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file

from peft_elp import ELPConfig

MMS = {"do_stable_layer_norm": True, "adapter_attn_dim": 4}


@pytest.fixture
def languages(tmp_path):
    """A folder with adapters for a language with the base's vocabulary, and for one with a larger vocabulary."""
    for seed, (language, vocabulary) in enumerate({"fra": 9, "kat": 12}.items(), start=7):
        other = build("wav2vec2", "ForCTC", seed=seed, vocab_size=vocabulary, **MMS)
        weights = {name: tensor.detach() + 0.1 for name, tensor in other._get_adapters().items()}
        save_file(weights, tmp_path / f"adapter.{language}.safetensors")
    return tmp_path


def base(folder, language=None):
    model = build("wav2vec2", "ForCTC", **MMS)
    model.config._name_or_path = str(folder)
    if language:
        model.load_adapter(language)
    return model


def logits(model):
    with torch.no_grad():
        return result(model(waveforms()[0]))


@pytest.mark.parametrize("language", ["fra", "kat"])
@pytest.mark.parametrize("door", ["PEFT", "Transformers"])
@pytest.mark.parametrize("trained", [[], None], ids=["without a head", "with a head"])
def test_a_language_is_loaded_below_an_adapter_as_into_the_base(language, door, trained, languages, tmp_path):
    config = {"modules_to_save": trained, "l_output": "residual", **ELP}
    there, plain = base(languages, language), base(languages)
    torch.manual_seed(0)
    expected = get_peft_model(there, ELPConfig(**config)).eval()
    torch.manual_seed(0)
    if door == "PEFT":
        model = get_peft_model(plain, ELPConfig(**config)).eval()
    else:
        plain.add_adapter(ELPConfig(**config))
        model = plain.eval()
    before = [name for name, _ in model.named_modules()]
    plain.load_adapter(language)

    assert [name for name, _ in model.named_modules()] == before
    assert all(".elp_" in n or "modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)
    if trained is None:  # The adapter keeps the head that it was made with.
        assert logits(model).shape[-1] == plain.config.vocab_size == 9
        assert not torch.equal(logits(model), logits(get_peft_model(base(languages), ELPConfig(**config)).eval()))
    else:
        assert torch.equal(logits(model), logits(expected))
        assert plain.config.vocab_size == {"fra": 9, "kat": 12}[language]
    if door == "PEFT":
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(base(languages, language)))
            assert plain.config.vocab_size == {"fra": 9, "kat": 12}[language]
        model.save_pretrained(tmp_path / "saved")
        loaded = PeftModel.from_pretrained(base(languages, language), tmp_path / "saved").eval()
        assert torch.equal(logits(loaded), logits(model))
        unloaded = model.unload()
        assert torch.equal(logits(unloaded), logits(base(languages, language)))
        assert "load_adapter" not in vars(unloaded)


def test_a_language_that_is_not_there_leaves_the_model_as_it_was(languages):
    model = get_peft_model(base(languages), ELPConfig(**ELP)).eval()
    before, answer = [name for name, _ in model.named_modules()], logits(model)
    with pytest.raises(OSError, match=r"adapter\.deu"):
        model.get_base_model().load_adapter("deu")
    assert [name for name, _ in model.named_modules()] == before
    assert torch.equal(logits(model), answer)
