"""A fresh adapter leaves a working model working, and trains."""

import copy
import csv
from pathlib import Path

import pytest
import torch
import transformers
from backbones import ELP, build, labels_for, result, waveforms
from families import FAMILIES as OTHERS
from peft import get_peft_model
from transformers import AutoModelForAudioClassification, AutoModelForCTC

from peft_elp import ELPConfig
from peft_elp.adapters import EAdapter, PAdapter

load = AutoModelForCTC.from_pretrained
SHARED = Path(__file__).parents[2] / "shared"


def modules(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def l_output(model, **options):
    return get_peft_model(model, ELPConfig(**ELP | options)).peft_config["default"].l_output


@pytest.fixture
def checkpoint(tmp_path):
    """A CTC model that was trained, on disk."""
    build("wavlm", "ForCTC").save_pretrained(tmp_path)
    return tmp_path


def test_a_head_from_the_checkpoint_keeps_its_first_layer(checkpoint):
    base = load(checkpoint).eval()
    waveform, mask = waveforms()
    with torch.no_grad():
        before = base(waveform, attention_mask=mask).logits
        model = get_peft_model(base, ELPConfig(adapters="L", **ELP)).eval()
        assert model.peft_config["default"].l_output == "residual"
        assert model.peft_config["default"].modules_to_save == ["lm_head"]
        torch.testing.assert_close(model(waveform, attention_mask=mask).logits, before)


BASES = {
    "in float16": lambda checkpoint: load(checkpoint, dtype=torch.float16),
    "cast to float64": lambda checkpoint: load(checkpoint).to(torch.float64),
    "copied, so that nothing tells what was loaded": lambda checkpoint: copy.deepcopy(load(checkpoint)),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_it_does_so_in_a_model(base, checkpoint):
    assert l_output(base(checkpoint)) == "residual"


def test_it_does_so_for_a_second_adapter(checkpoint):
    model = get_peft_model(load(checkpoint), ELPConfig(adapters="E", **ELP))
    model.add_adapter("second", ELPConfig(adapters="L", **ELP))
    assert model.peft_config["second"].l_output == "residual"


def test_a_head_that_is_new_or_meant_to_be_is_replaced(checkpoint):
    assert l_output(AutoModelForAudioClassification.from_pretrained(checkpoint)) == "head"  # not in the checkpoint
    assert l_output(load(checkpoint, vocab_size=5, ignore_mismatched_sizes=True)) == "head"
    assert l_output(load(checkpoint), head_config={"vocab_size": 5}) == "head"  # the adapter brings it
    assert l_output(load(checkpoint), l_output="head") == "head"


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("family", ["wavlm", "wav2vec2"])
def test_a_fresh_e_adapter_is_exactly_the_identity(family, stable):
    waveform, mask = waveforms()
    options = {"do_stable_layer_norm": stable}
    with torch.no_grad():
        before = result(build(family, "ForCTC", **options)(waveform, attention_mask=mask))
        model = get_peft_model(build(family, "ForCTC", **options), ELPConfig(adapters="E", **ELP)).eval()
        torch.testing.assert_close(result(model(waveform, attention_mask=mask)), before)
        for adapter in modules(model, EAdapter):
            z = torch.randn(2, 5, 24)
            assert torch.equal(adapter(z), z)


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2-stable", "whisper"])
def test_every_parameter_of_a_fresh_adapter_moves_within_a_few_steps(name):
    if name == "whisper":
        base = OTHERS["whisper"].model()
        inputs = {**OTHERS["whisper"].inputs, "labels": torch.tensor([[5, 6, 2], [7, 8, 2]])}
        del inputs["decoder_input_ids"]
    else:
        base = build("wav2vec2", "ForCTC", do_stable_layer_norm=name.endswith("stable"))
        waveform, mask = waveforms()
        inputs = {"input_values": waveform, "attention_mask": mask, "labels": labels_for(base, 3, 0)}
    model = get_peft_model(base, ELPConfig(l_output="residual", **ELP)).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.isfinite()
    assert [name for name, p in trained.items() if torch.equal(p.detach(), start[name])] == []
    (pseudo,) = modules(model, PAdapter)
    assert torch.unique(pseudo.rows.detach(), dim=0).shape == pseudo.rows.shape  # they do not move as one


def test_fresh_pseudo_features_are_next_to_nothing_after_the_first_norm():
    (pseudo,) = modules(get_peft_model(build(), ELPConfig(p_length=64)), PAdapter)
    assert 0 < torch.nn.functional.layer_norm(pseudo.rows, pseudo.rows.shape[-1:]).std() < 0.05


def test_a_preset_starts_as_the_paper_does():
    model = get_peft_model(build(hidden_size=96), ELPConfig.preset("paper", p_length=64))
    for adapter in modules(model, EAdapter):
        assert adapter.down.weight.std().item() == pytest.approx(1e-3, rel=0.1)
        assert adapter.up.weight.std().item() == pytest.approx(1e-3, rel=0.1)
        assert not adapter.down.bias.any()
        assert (adapter.norm.weight == 1).all()
    (pseudo,) = modules(model, PAdapter)
    assert pseudo.rows.std().item() == pytest.approx(0.02, rel=0.1)


def test_pytorchs_start_can_be_had():
    model = get_peft_model(build(), ELPConfig(init_weights=False, **ELP))
    for adapter in modules(model, EAdapter):
        assert adapter.down.bias.any()
        assert (adapter.norm.weight == 1).all()


@pytest.mark.skipif(not SHARED.is_dir(), reason="there is no real encoder beside the repository")
@pytest.mark.parametrize("adapters", ["E", "L", "P", "ELP"])
def test_a_fresh_adapter_costs_whisper_nothing(adapters):
    soundfile = pytest.importorskip("soundfile")
    checkpoint, folder = SHARED / "models" / "whisper-tiny.en", SHARED / "data" / "asr_kathleen" / "test"
    with open(folder / "metadata.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:4]
    clips = [soundfile.read(folder / row["file_name"], dtype="float32")[0] for row in rows]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(checkpoint)
    features = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    texts = tokenizer([f" {row['transcription']}" for row in rows], padding=True, return_tensors="pt")
    labels = texts.input_ids.masked_fill(texts.attention_mask == 0, -100)[:, 1:]
    base = transformers.WhisperForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        before = base(features, labels=labels).loss
        after = get_peft_model(base, ELPConfig(adapters=adapters)).eval()(features, labels=labels).loss
    assert after < 1.01 * before
