"""A head that averages over a fixed window averages over a recording's own frames, in every way of calling it."""

import numpy as np
import pytest
import torch
import transformers
from backbones import shaken
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification

from peft_elp import ELPConfig, FeatureCache, count_parameters, pool_own_frames
from peft_elp.speech.inference import SpeechAdapter

pytestmark = [
    pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="older heads drop the mask"),
]
OWN = (60, 100, 24)  # steps of features, two for each frame


def whisper():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    config = WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=50, num_labels=3, classifier_proj_size=6)
    return WhisperForAudioClassification(config).eval()


def batch():
    torch.manual_seed(1)
    mask = (torch.arange(100) < torch.tensor(OWN)[:, None]).long()
    return {"input_features": torch.randn(3, 8, 100), "attention_mask": mask}


def one(inputs, row):
    return {name: x[row : row + 1] for name, x in inputs.items()}


def expected(model, inputs):
    """The plain loop: encode, project, average over the frames of each recording, classify."""
    x = model.encoder(inputs["input_features"]).last_hidden_state
    means = [model.projector(x[row, : steps // 2]).mean(0) for row, steps in enumerate(OWN)]
    return model.classifier(torch.stack(means))


def adapted(**options):
    options = {"adapters": "L", "train_layer_norms": False, "l_dim": 10} | options
    return shaken(get_peft_model(whisper(), ELPConfig(**options))).eval()


def test_a_model_without_adapters_pools_its_own_frames():
    inputs = batch()
    with torch.no_grad():
        reference, before = expected(whisper(), inputs), whisper()(inputs["input_features"]).logits
        model = pool_own_frames(pool_own_frames(whisper()))
        torch.testing.assert_close(model(**inputs).logits, reference)
        assert torch.equal(model(inputs["input_features"]).logits, before)
        assert not torch.allclose(reference, before, atol=1e-4)


POOLED = [{}, {"l_dim": 0}, {"adapters": "EL", "e_dim": 4}, {"adapters": "ELP", "e_dim": 4}]


@pytest.mark.filterwarnings("ignore:The head averages over the padding:UserWarning")
@pytest.mark.parametrize("options", POOLED)
def test_an_adapter_pools_its_own_frames_and_tells_its_file(options, tmp_path):
    model, inputs = adapted(**options), batch()
    with torch.no_grad():
        answer = model(**inputs).logits
        assert not torch.allclose(answer, model(inputs["input_features"]).logits, atol=1e-4)
        for row in range(3):
            torch.testing.assert_close(model(**one(inputs, row)).logits, answer[row : row + 1], rtol=1e-5, atol=1e-6)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(whisper(), tmp_path).eval()
        assert loaded.peft_config["default"].pool_own_frames is True
        assert torch.equal(loaded(**inputs).logits, answer)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, whisper()(inputs["input_features"]).logits)


def test_a_fresh_residual_adapter_is_the_pooled_model():
    model, inputs = get_peft_model(whisper(), ELPConfig(adapters="L", l_output="residual", l_dim=4)).eval(), batch()
    base = model.get_base_model()
    base.projector.original_module.load_state_dict(base.projector.modules_to_save["default"].state_dict())
    base.classifier.original_module.load_state_dict(base.classifier.modules_to_save["default"].state_dict())
    with torch.no_grad():
        answer = model(**inputs).logits
        torch.testing.assert_close(answer, expected(model.unload(), inputs), rtol=1e-5, atol=1e-6)


def test_mixed_batches_and_shared_passes_pool_for_the_adapters_that_do():
    model, inputs = adapted(), batch()
    model.add_adapter("window", ELPConfig(adapters="L", train_layer_norms=False, l_dim=10, pool_own_frames=False))
    with torch.no_grad():
        alone = {}
        for name in ("default", "window"):
            model.set_adapter(name)
            alone[name] = model(**inputs).logits
        assert torch.equal(alone["window"], model(inputs["input_features"]).logits)
        names = ["default", "window", "default"]
        mixed = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-5, atol=1e-6)
        together = model.forward_all(["default", "window"], **inputs)
        for name, answer in alone.items():
            torch.testing.assert_close(together[name].logits, answer, rtol=1e-5, atol=1e-6)


def test_cached_features_are_pooled_alike(tmp_path):
    model, inputs = adapted(l_dim=0, l_output="head"), batch()
    cache = FeatureCache(model, tmp_path, dtype=torch.float32)
    rows = cache.read([one(inputs, row) for row in range(3)], lambda rows: rows[0], progress=False)
    with torch.no_grad():
        answer = model(**cache.collate([rows[row] for row in range(3)])).logits
        torch.testing.assert_close(answer, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_normalised_sum_of_layers_trains_one_number_a_layer():
    model, inputs = adapted(l_dim=0, l_output="head"), batch()
    assert count_parameters(model)["L"] == 3
    base = model.get_base_model()
    with torch.no_grad():
        base.encoder.disable_adapters or base.encoder.enable_adapters(False)
        layers = base.encoder(inputs["input_features"], output_hidden_states=True).hidden_states[1:]
        base.encoder.enable_adapters(True)
        shares = base.encoder.elp_l["default"].layer_weights.softmax(0)
        y = sum(share * nn.functional.layer_norm(x, x.shape[-1:]) for share, x in zip(shares, layers, strict=True))
        means = [base.projector(y[row, : steps // 2]).mean(0) for row, steps in enumerate(OWN)]
        torch.testing.assert_close(model(**inputs).logits, base.classifier(torch.stack(means)), rtol=1e-4, atol=1e-5)


def test_a_saved_adapter_answers_by_the_recordings_own_frames(tmp_path):
    base = whisper()
    base.save_pretrained(tmp_path / "base")
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    extractor.save_pretrained(tmp_path / "base")
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    speech = np.random.default_rng(0).normal(size=6000).astype(np.float32) / 10
    inputs = extractor([speech], sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(-1).sort(descending=True).values[0]
    found = SpeechAdapter.from_pretrained(tmp_path / "adapter").classify(speech, 16_000)
    assert [label["score"] for label in found] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_missing_mask_is_told_once(training, recwarn):
    model, inputs = adapted().train(training), batch()
    for _ in range(2):
        model(inputs["input_features"])
    told = [str(warning.message) for warning in recwarn if "averages over the padding" in str(warning.message)]
    assert len(told) == 1
    assert "return_attention_mask=True" in told[0]


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"multiple of 50 steps.*got \(3, 75\)"):
        adapted()(batch()["input_features"], attention_mask=torch.ones(3, 75))


def test_other_heads_take_no_such_pooling():
    from backbones import build

    with pytest.raises(ValueError, match="pool_own_frames=True needs a head that averages over a fixed window"):
        get_peft_model(build("wavlm", "ForSequenceClassification"), ELPConfig(pool_own_frames=True))
    model = get_peft_model(build("wavlm", "ForSequenceClassification"), ELPConfig())
    assert model.peft_config["default"].pool_own_frames is False
