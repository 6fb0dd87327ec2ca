"""Transformers' own door to adapters: add_adapter, load_adapter, from_pretrained and pipelines."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from backbones import AUTO, ELP, HEADS, adapted, answer, build, result, shaken, waveforms
from families import OF_WHISPER
from on_disk import save_tokenizer, save_whisper
from packaging.version import Version
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperTokenizer,
    pipeline,
)
from transformers.integrations.peft import PeftAdapterMixin

from peft_elp import ELPConfig
from peft_elp.speech.inference import SpeechAdapter

pytestmark = [
    # PEFT says so of every second adapter that comes without a PeftModel.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
LOADS = Version(transformers.__version__) >= Version("5.20")
needs_loading = pytest.mark.skipif(not LOADS, reason="Transformers loads the head of an adapter from 5.20 on")
ANGER = {0: "neutral", 1: "anger", 2: "joy", 3: "fear", 4: "disgust", 5: "sadness", 6: "surprise"}
EMOTIONS = {"num_labels": 7, "id2label": ANGER, "label2id": {label: number for number, label in ANGER.items()}}


def logits(model):
    waveform, mask = waveforms()
    with torch.no_grad():
        return result(model.eval()(waveform.to(model.dtype), attention_mask=mask))


def based(folder, family="wavlm", head="ForCTC", **options):
    """A base checkpoint on disk, loaded the usual way."""
    build(family, head).save_pretrained(folder / "base")
    model = AUTO[head].from_pretrained(folder / "base", ignore_mismatched_sizes=bool(options), **options)
    if head == "ForXVector" and options:  # Transformers 5.0 leaves whatever was in memory
        torch.nn.init.normal_(model.objective.weight)
    return model


def peft_folder(folder, family="wavlm", head="ForCTC", **options):
    """The folder of a trained adapter on such a base, saved by a PeftModel, and its answer."""
    model = adapted(based(folder, family, head, **options))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", logits(model)


# Adding and saving --------------------------------------------------------------------------------------------------


def test_the_backbone_keeps_the_names_of_its_tensors():
    model, other = build("wavlm", "Model"), build("wavlm", "Model", seed=1)
    names = set(model.state_dict())
    for one in (model, other):
        one.add_adapter(ELPConfig(**ELP))
    assert {name for name in model.state_dict() if "elp_" not in name} == names
    other.load_state_dict(shaken(model).state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("door", ["Transformers", "PEFT"])
def test_a_new_vocabulary_can_be_saved(door, tmp_path):
    # PEFT saves resized embeddings along; the encoder of a speech model has none.
    model = based(tmp_path, vocab_size=17)
    if door == "PEFT":
        model = get_peft_model(model, ELPConfig(**ELP))
    else:
        model.add_adapter(ELPConfig(**ELP))
    expected = logits(shaken(model))
    model.save_pretrained(tmp_path / "adapter")
    assert expected.shape[-1] == 17
    base = AutoModelForCTC.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)


# Loading ------------------------------------------------------------------------------------------------------------


@needs_loading
@pytest.mark.parametrize("head", HEADS)
def test_a_folder_loads_as_through_peft(head, saved, tmp_path):
    there = saved(head)
    model = there.load_base()
    model.load_adapter(there.adapter)
    assert torch.equal(logits(model), there.logits)
    model = there.auto.from_pretrained(there.adapter)
    assert torch.equal(logits(model), there.logits)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == (
        load_file(there.adapter / "adapter_model.safetensors").keys()
    )
    assert torch.equal(logits(there.auto.from_pretrained(tmp_path)), there.logits)


@needs_loading
def test_a_second_folder_loads_beside_the_first_and_goes_on_training(saved):
    model = AutoModelForCTC.from_pretrained(saved().adapter, adapter_name="first")
    model.load_adapter(saved().adapter, adapter_name="second", is_trainable=True)
    model.set_adapter("second")
    shaken(model)
    assert not torch.equal(logits(model), saved().logits)
    model.set_adapter("first")
    assert torch.equal(logits(model), saved().logits)


@needs_loading
def test_wav2vec2_loads_a_folder_through_the_method_that_its_own_one_hides(saved):
    there = saved("ForCTC", "wav2vec2")
    with pytest.raises(ValueError, match=r"Cannot load_adapter for .*adapter_attn_dim"):
        AutoModelForCTC.from_pretrained(there.adapter)
    model = there.load_base()
    PeftAdapterMixin.load_adapter(model, there.adapter)
    assert torch.equal(logits(model), there.logits)


@pytest.mark.skipif(LOADS, reason="this Transformers loads adapters")
def test_a_transformers_that_cannot_load_an_adapter_does_not_answer_with_a_fresh_one(saved):
    model = AutoModelForCTC.from_pretrained(saved().adapter)
    with pytest.raises(RuntimeError, match=r"never loaded.*Before 5.20, Transformers.*PeftModel.from_pretrained"):
        logits(model)


BIAS = "base_model.model.lm_head.bias"
MISFITS = {
    "missing": lambda tensors: tensors.pop(BIAS),
    "the backbone's": lambda tensors: tensors.update({"wavlm.feature_projection.projection.bias": torch.ones(24)}),
    "the original head's": lambda tensors: tensors.update({"lm_head.original_module.bias": torch.ones(9)}),
    "another adapter's": lambda tensors: tensors.update({"wavlm.encoder.elp_p.first.rows": torch.ones(3, 24)}),
    "of another shape": lambda tensors: tensors.update({BIAS: torch.ones(2)}),
    "not finite": lambda tensors: tensors[BIAS].fill_(float("nan")),
}


@needs_loading
@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("door", ["load_adapter", "beside another", "from_pretrained"])
def test_a_model_with_tensors_that_are_not_the_adapters_raises_instead_of_answering(change, door, saved, tmp_path):
    folder = shutil.copytree(saved().adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model = saved().load_base()
    if door == "beside another":
        model.add_adapter(ELPConfig(**ELP), "first")

    def load_and_call():
        logits(AutoModelForCTC.from_pretrained(folder) if door == "from_pretrained" else load_into(model))

    def load_into(model):
        model.load_adapter(folder, adapter_name="second")
        return model

    if change is MISFITS["another adapter's"] and door != "beside another":
        load_and_call()  # Transformers logs a tensor without a place in the model, and nothing is changed.
        return
    with pytest.raises((ValueError, RuntimeError), match=r"adapter|mismatch|shape"):
        load_and_call()
    if door != "from_pretrained":
        with pytest.raises(RuntimeError):
            logits(model)


@needs_loading
def test_files_that_do_not_belong_in_an_adapters_folder_are_an_error_not_another_model(saved, tmp_path):
    folder = shutil.copytree(saved().adapter, tmp_path / "adapter")
    saved().load_base().config.save_pretrained(folder)
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        AutoModelForCTC.from_pretrained(folder)
    (folder / "config.json").unlink()
    save_tokenizer(folder)
    assert torch.equal(logits(AutoModelForCTC.from_pretrained(folder)), saved().logits)
    with pytest.raises(NotImplementedError, match="get_input_embeddings"):
        AutoPeftModel.from_pretrained(folder)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=["dtype", "device_map"])
def test_adapters_stay_in_float32_wherever_the_backbone_goes(options, saved):
    expected = logits(PeftModel.from_pretrained(saved().load_base(**options), saved().adapter))
    model = AutoModelForCTC.from_pretrained(saved().adapter, **options)
    assert all(p.dtype is torch.float32 for name, p in model.named_parameters() if "elp_" in name)
    assert model.wavlm.feature_projection.projection.weight.dtype is options.get("dtype", torch.float32)
    if LOADS:
        assert torch.equal(logits(model), expected)


# The head's settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "options", "part"),
    [
        ("ForSequenceClassification", EMOTIONS, "classifier"),
        ("ForAudioFrameClassification", {"num_labels": 7}, "classifier"),
        ("ForXVector", {"num_labels": 11, "tdnn_dim": [12, 12, 22]}, "feature_extractor"),
        ("ForCTC", {"vocab_size": 17}, "lm_head"),
    ],
)
def test_an_adapter_brings_its_own_head_into_a_base_with_another(head, options, part, tmp_path):
    folder, expected = peft_folder(tmp_path, "wavlm", head, **options)
    base = AUTO[head].from_pretrained(tmp_path / "base")
    before = base.config.to_dict()
    own = base.get_submodule(part)
    model = PeftModel.from_pretrained(base, folder)
    loaded = [model, AutoPeftModel.from_pretrained(folder)]
    loaded += [AUTO[head].from_pretrained(folder)] if LOADS else []
    for one in loaded:
        assert torch.equal(logits(one), expected)
        for name, value in options.items():
            assert getattr(one.config, name) == value
    with model.disable_adapter():
        assert model.config.to_dict() == before
    base = model.unload()
    assert base.config.to_dict() == before
    assert base.get_submodule(part) is own


def test_a_fresh_head_of_its_own_starts_as_transformers_starts_one():
    torch.manual_seed(0)
    model = build("wavlm", "ForSequenceClassification")
    model.add_adapter(ELPConfig(head_config={"num_labels": 300}, **ELP))
    classifier = model.classifier.modules_to_save["default"]
    assert classifier.weight.shape == (300, 12)
    assert classifier.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert not classifier.bias.any()
    kept = build("wavlm", "ForSequenceClassification")
    kept.add_adapter(ELPConfig(adapters="E", e_dim=4, head_config={"num_labels": 5}))
    # What the settings make alike is the model's, as without them.
    assert torch.equal(kept.projector.modules_to_save["default"].weight, kept.projector.original_module.weight)


def test_labels_that_somebody_names_later_are_left_alone(tmp_path):
    model = build("wavlm", "ForSequenceClassification", num_labels=7)
    model.add_adapter(ELPConfig(**ELP), "first")
    model.config.id2label = ANGER
    model.add_adapter(ELPConfig(adapters="E", e_dim=4), "second")
    model.set_adapter("first")
    model.disable_adapters()
    model.enable_adapters()
    assert model.config.id2label == ANGER


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (build, {"labels": 3}, r"got \['labels'\]. The settings are num_labels, id2label"),
        (build, ["num_labels"], r"must be a dictionary .* got \['num_labels'\]"),
        (lambda: build("wavlm", "Model"), {"num_labels": 3}, "WavLMModel has none that ELP knows.*AutoModelForCTC"),
    ],
)
def test_settings_that_make_no_head_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make(), ELPConfig(head_config=settings, **ELP))


def test_the_saved_settings_are_those_of_the_head_alone(tmp_path):
    folder, _ = peft_folder(tmp_path, "wavlm", "ForSequenceClassification", **EMOTIONS)
    saved = json.loads((folder / "adapter_config.json").read_text())["head_config"]
    assert saved["num_labels"] == 7
    assert saved["id2label"]["1"] == "anger"
    assert "hidden_size" not in saved
    assert ELPConfig.from_pretrained(folder).head_config["id2label"] == ANGER
    bare, _ = peft_folder(tmp_path, "wavlm", "Model")
    assert json.loads((bare / "adapter_config.json").read_text())["head_config"] is None


# Pipelines ----------------------------------------------------------------------------------------------------------

EXTRACTOR, HEAR = Wav2Vec2FeatureExtractor(), "automatic-speech-recognition"


def audio():
    return waveforms()[0][0].numpy()


def three_ways(folder, head, base):
    """The adapted model as a PeftModel, as the model inside, and, where Transformers can load it, as its folder."""
    peft_model = PeftModel.from_pretrained(AUTO[head].from_pretrained(base), folder)
    return [peft_model, peft_model.get_base_model(), *([str(folder)] if LOADS else [])]


def test_an_audio_classification_pipeline_answers_with_the_adapters_labels(tmp_path):
    folder, _ = peft_folder(tmp_path, "wavlm", "ForSequenceClassification", **EMOTIONS)
    scores = []
    for model in three_ways(folder, "ForSequenceClassification", tmp_path / "base"):
        classify = pipeline("audio-classification", model=model, feature_extractor=EXTRACTOR, device="cpu")
        scores.append({part["label"]: part["score"] for part in classify(audio(), top_k=None)})
        assert scores[-1].keys() == set(ANGER.values())
        assert scores[-1] == pytest.approx(scores[0])


def test_a_speech_recognition_pipeline_transcribes_with_the_adapter(tmp_path):
    folder, _ = peft_folder(tmp_path)
    inputs = EXTRACTOR(audio(), sampling_rate=16000, return_tensors="pt").input_values
    spoken = answer(AutoPeftModel.from_pretrained(folder).eval(), input_values=inputs).argmax(-1)[0]
    save_tokenizer(tmp_path)
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(spoken).strip()
    parts = {"tokenizer": tokenizer, "feature_extractor": EXTRACTOR, "device": "cpu"}
    for model in three_ways(folder, "ForCTC", tmp_path / "base"):
        assert pipeline(HEAR, model=model, **parts)(audio())["text"] == tokenizer.decode(spoken)


@needs_loading  # the pipeline of earlier versions takes no Whisper in pieces of one second
def test_a_speech_recognition_pipeline_generates_with_the_adapter(tmp_path):
    base = AutoModelForSpeechSeq2Seq.from_pretrained(save_whisper(tmp_path / "base"), dtype=torch.float32)
    model = shaken(get_peft_model(base, ELPConfig(**ELP)), std=1.0).eval()
    model.save_pretrained(tmp_path / "adapter")
    parts = {
        "tokenizer": WhisperTokenizer.from_pretrained(tmp_path / "base"),
        "feature_extractor": WhisperFeatureExtractor.from_pretrained(tmp_path / "base"),
    }
    options = {"generate_kwargs": {"max_new_tokens": 6}, "device": "cpu", "dtype": torch.float32}
    sound = np.float32(np.resize(audio(), 16000))
    texts = [
        pipeline(HEAR, model=either, **parts, **options)(sound)["text"]
        for either in (model, model.get_base_model(), str(tmp_path / "adapter"), str(tmp_path / "base"))
    ]
    assert texts[0]
    assert texts[0] == texts[1] == texts[2] != texts[3]


@needs_loading
def test_a_pipeline_does_not_cut_a_recording_to_the_window_of_the_adapter(tmp_path):
    config = WhisperConfig(**OF_WHISPER, num_mel_bins=8, num_labels=3)
    WhisperForAudioClassification(config).save_pretrained(tmp_path / "base")
    WhisperFeatureExtractor(feature_size=8).save_pretrained(tmp_path / "base")
    base = WhisperForAudioClassification.from_pretrained(tmp_path / "base")
    model = shaken(get_peft_model(base, ELPConfig(adapters="L", chunk_length=2))).eval()
    model.save_pretrained(tmp_path / "adapter")
    own = SpeechAdapter.from_pretrained(tmp_path / "adapter")
    own.feature_extractor.save_pretrained(tmp_path / "adapter")  # as the recipes do
    folder, sound = str(tmp_path / "adapter"), np.float32(np.resize(audio(), 16000))
    classify = partial(pipeline, "audio-classification", model=folder, device="cpu")
    with pytest.raises(ValueError, match=r"window of 2 s.*length 200, got 3000.*chunk_length=2.*feature_extractor="):
        classify()(sound)
    assert classify(feature_extractor=folder)(sound) == own.classify(sound, 16000)
    own.feature_extractor.return_attention_mask = False
    with pytest.warns(UserWarning, match="averages over the padding"):
        classify(feature_extractor=own.feature_extractor)(sound)
