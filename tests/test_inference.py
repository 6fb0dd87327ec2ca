"""A saved adapter answers for recordings: one file, many, arrays; or says in one line why it cannot."""

import json
import pickle
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from backbones import ELP, build, shaken, waveforms
from on_disk import LABELS, adapted, record, save_base, save_tokenizer
from packaging import version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    Wav2Vec2FeatureExtractor,
    WavLMForCTC,
    WavLMForSequenceClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
    pipeline,
)

from peft_elp import ELPConfig
from peft_elp.speech.audio import decode
from peft_elp.speech.inference import SpeechAdapter
from peft_elp.speech.speakers import speaker_embeddings

LENGTHS = (4000, 2600, 900, 4000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inference")


@pytest.fixture(scope="module")
def base(folder):
    return save_base(folder / "base")


@pytest.fixture(scope="module")
def saved(folder, base):
    """An adapter's folder by the head of its model."""
    for head in ("ForCTC", "ForSequenceClassification", "ForXVector", "Model"):
        adapted(base, head).save_pretrained(folder / head)
    save_tokenizer(folder / "ForCTC")
    return lambda head: str(folder / head)


@pytest.fixture(scope="module")
def files(folder):
    return [record(folder / f"{seed}.wav", samples, seed) for seed, samples in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def writer(saved):
    return SpeechAdapter.from_pretrained(saved("ForCTC"), device="cpu")


@pytest.fixture(scope="module")
def namer(saved):
    return SpeechAdapter.from_pretrained(saved("ForSequenceClassification"), device="cpu")


@pytest.fixture(scope="module")
def comparer(saved):
    return SpeechAdapter.from_pretrained(saved("ForXVector"), device="cpu")


# Answers ------------------------------------------------------------------------------------------------------------


def test_a_transcription_is_what_the_trained_model_writes(base, files, writer):
    model = adapted(base, "ForCTC")
    inputs = writer.feature_extractor(decode(files[0]), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        tokens = model(**inputs).logits.argmax(-1)[0]
    text = writer.transcribe(files[0])
    assert text == writer.tokenizer.decode(tokens)
    assert set(text) & set("abcd")


def test_labels_are_those_of_transformers_pipeline(files, namer):
    theirs = pipeline(
        "audio-classification", model=namer.model.get_base_model(), feature_extractor=namer.feature_extractor
    )
    for file in files:
        ours, expected = namer.classify(file), theirs(decode(file))
        assert [one["label"] for one in ours] == [one["label"] for one in expected]
        assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in expected], abs=1e-6)
    assert {one["label"] for one in ours} == set(LABELS)
    assert len(namer.classify(files[0], top_k=1)) == 1
    assert [len(labels) for labels in namer.classify(files[:2], top_k=2)] == [2, 2]


def test_the_parts_go_into_transformers_pipeline_which_cuts_long_recordings(files, writer):
    theirs = pipeline(
        "automatic-speech-recognition",
        model=writer.model.get_base_model(),
        feature_extractor=writer.feature_extractor,
        tokenizer=writer.tokenizer,
    )
    assert theirs(decode(files[0]))["text"] == writer.transcribe(files[0])
    assert theirs(decode(files[0]), chunk_length_s=0.1)["text"]


@pytest.mark.parametrize("batch_size", [2, 3, 10])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feat_extract_norm": "group"},
        {"return_attention_mask": False},
        {"feat_extract_norm": "group", "return_attention_mask": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification", "ForXVector"])
def test_how_many_are_answered_at_a_time_changes_no_answer(tmp_path, files, head, options, batch_size):
    adapted(save_base(tmp_path / "base", **options), head).save_pretrained(tmp_path / "adapter")
    save_tokenizer(tmp_path / "adapter")
    adapter = SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu")
    if head == "ForCTC":
        assert adapter.transcribe(files, batch_size=batch_size) == [adapter.transcribe(file) for file in files]
    else:
        embeddings = adapter.embed(files, batch_size=batch_size)
        for file, embedding in zip(files, embeddings, strict=True):
            np.testing.assert_allclose(embedding, adapter.embed(file), atol=1e-5)


def test_files_that_can_share_a_pass_do(files, namer):
    assert list(namer._batches([decode(file) for file in files])) == [[0, 1, 2, 3]]


def test_a_recording_is_a_file_or_an_array(tmp_path, files, namer):
    waveform = decode(files[1])
    expected = namer.classify(files[1])
    entry = {"path": "never/read.wav", "bytes": Path(files[1]).read_bytes()}
    assert namer.classify(entry) == expected
    assert namer.classify(waveform, sampling_rate=16000) == expected
    assert namer.classify(torch.from_numpy(waveform), sampling_rate=16000) == expected
    assert namer.classify([files[1], entry]) == [expected, expected]
    assert namer.classify([]) == []


def test_recordings_are_mixed_down_and_resampled(tmp_path, namer):
    file = record(tmp_path / "stereo.wav", 3000, seed=1, rate_hz=8000, channels=2)
    channels, rate_hz = soundfile.read(file, dtype="float32")
    assert len(namer.read(file)) == 6000
    np.testing.assert_allclose(namer.read(file), namer.read(channels.mean(axis=1), rate_hz))


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.20"),
    reason="the pipeline of earlier versions takes no Whisper in pieces of one second",
)
def test_a_model_that_generates_text_writes_with_the_tokenizer_of_its_base(tmp_path, files):
    sizes = {"d_model": 16, "vocab_size": 10, "num_mel_bins": 8, "max_source_positions": 50, "init_std": 0.4}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 24}
    tokens = {"pad_token_id": 8, "eos_token_id": 8, "bos_token_id": 9, "decoder_start_token_id": 9}
    torch.manual_seed(0)
    backbone = WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens))
    backbone.generation_config.update(min_new_tokens=6, max_new_tokens=6, suppress_tokens=[8, 9])
    backbone.save_pretrained(tmp_path / "base")
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path / "base")
    symbols = [*"abcdefgh", "<|endoftext|>", "<|startoftranscript|>"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>").save_pretrained(tmp_path / "base")
    backbone = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    config = ELPConfig(l_output="project", l_input_norm=False, **ELP)  # with these weights the texts differ
    shaken(get_peft_model(backbone, config), std=1.0).save_pretrained(tmp_path / "adapter")
    adapter = SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu")
    texts = [adapter.transcribe(file) for file in files]
    assert all(re.fullmatch("[a-h]{6}", text) for text in texts)
    assert len(set(texts)) > 1
    assert adapter.transcribe(files, batch_size=3) == texts


# Voices -------------------------------------------------------------------------------------------------------------


def test_the_embedding_of_a_classifier_is_the_mean_over_valid_frames_of_what_its_projector_makes(base):
    model = adapted(base, "ForSequenceClassification")
    waveform, mask = waveforms()
    inner = model.get_base_model()
    frames = inner.projector(inner.wavlm(waveform, attention_mask=mask).last_hidden_state)
    valid = inner._get_feature_vector_attention_mask(frames.shape[1], mask)
    expected = torch.stack([one[keep].mean(dim=0) for one, keep in zip(frames, valid, strict=True)])
    got = speaker_embeddings(model, input_values=waveform, attention_mask=mask)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "elp_" in name)


def test_the_embedding_of_an_x_vector_model_is_its_own(base):
    model = adapted(base, "ForXVector")
    waveform, _ = waveforms()
    torch.testing.assert_close(
        speaker_embeddings(model, input_values=waveform), model(input_values=waveform).embeddings
    )


def test_a_model_without_an_adapter_has_embeddings_too_and_keeps_no_hook():
    model = build("wavlm", "ForSequenceClassification")
    assert speaker_embeddings(model, input_values=waveforms()[0]).shape == (3, 12)
    assert not model.classifier._forward_pre_hooks


@pytest.mark.parametrize("head", ["ForCTC", "ForAudioFrameClassification", "Model"])
def test_other_models_have_no_speaker_embeddings(head):
    with pytest.raises(ValueError, match=f"WavLM{head} has no speaker embeddings"):
        speaker_embeddings(build("wavlm", head), input_values=waveforms()[0])


@pytest.mark.parametrize("kind", ["comparer", "namer"])
def test_two_voices_are_compared_by_the_cosine_of_their_embeddings(request, files, kind):
    adapter = request.getfixturevalue(kind)
    first, second = adapter.embed(files[:2])
    found = adapter.verify(files[0], files[1])
    assert found.score == pytest.approx(first @ second / np.linalg.norm(first) / np.linalg.norm(second), abs=1e-6)
    assert adapter.verify(files[1], files[0]).score == pytest.approx(found.score)
    assert adapter.verify(files[0], files[0]).score == pytest.approx(1)
    assert (found.threshold, found.same) == (None, None)
    assert adapter.verify(files[0], files[1], threshold=found.score).same is True
    assert adapter.verify(files[0], files[1], threshold=found.score + 1e-6).same is False


def test_an_adapter_may_say_from_which_score_two_voices_are_one(base, tmp_path, files):
    model = adapted(base, "ForXVector")
    model.peft_config["default"].verification_threshold = 0.25
    model.save_pretrained(tmp_path)
    adapter = SpeechAdapter.from_pretrained(tmp_path, device="cpu")
    found = adapter.verify(files[0], files[1])
    assert (found.threshold, found.same) == (0.25, found.score >= 0.25)
    assert adapter.verify(files[0], files[1], threshold=-1).same is True


# What cannot be answered --------------------------------------------------------------------------------------------


def test_the_wrong_task_is_named_with_the_right_one(saved, files, writer, namer, comparer):
    with pytest.raises(ValueError, match=r"cannot classify: it was trained with the head of WavLMForCTC.*transcribe"):
        writer.classify(files[0])
    with pytest.raises(ValueError, match=r"cannot verify.*can transcribe"):
        writer.verify(files[0], files[1])
    with pytest.raises(ValueError, match=r"cannot transcribe.*WavLMForSequenceClassification.*classify and verify"):
        namer.transcribe(files[0])
    with pytest.raises(ValueError, match=r"cannot classify.*WavLMForXVector, which can verify"):
        comparer.classify(files[0])
    with pytest.raises(ValueError, match=r"cannot classify.*WavLMModel\. For that head, use its model directly"):
        SpeechAdapter.from_pretrained(saved("Model"), device="cpu").classify(files[0])


def test_text_needs_a_tokenizer_beside_the_adapter(base, tmp_path, files):
    adapted(base, "ForCTC").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer.*tokenizer\.save_pretrained\(folder\)"):
        SpeechAdapter.from_pretrained(tmp_path, device="cpu").transcribe(files[0])


def test_a_bad_recording_is_named_with_what_is_wrong(tmp_path, files, namer, comparer):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "cut.wav").write_bytes(Path(files[0]).read_bytes()[:-100])
    short = record(tmp_path / "short.wav", 20, seed=0)
    for file, message in {
        "nowhere.wav": "nowhere.wav: there is no such file",
        tmp_path / "empty.wav": "empty.wav: the file is empty",
        tmp_path / "text.wav": "text.wav: ",
        tmp_path / "cut.wav": "cut.wav: it is cut off",
        short: r"short.wav: too short, 0\.001 s\. The model needs 0\.003 s or more",
    }.items():
        with pytest.raises(ValueError, match=message):
            namer.classify([files[0], file], batch_size=2)


def test_the_shortest_recording_that_a_model_can_answer_is_answered(namer, comparer):
    for adapter, least in ((namer, 45), (comparer, 185)):
        noise = np.random.default_rng(0).normal(size=least).astype(np.float32)
        assert np.isfinite(adapter.embed(noise, sampling_rate=16000)).all()
        with pytest.raises(ValueError, match="The array: too short"):
            adapter.embed(noise[1:], sampling_rate=16000)
    with pytest.warns(
        UserWarning, match="degrees of freedom"
    ):  # of the frames that are left no deviation can be taken
        embeddings = speaker_embeddings(comparer.model, input_values=torch.from_numpy(noise[None, 1:]))
    assert embeddings.isnan().any()


@pytest.mark.parametrize(
    ("array", "sampling_rate", "message"),
    [
        (np.zeros(4000, dtype=np.float32), None, "needs its sampling rate. Write for example sampling_rate=16"),
        (np.zeros(4000, dtype=np.float32), 0, "samples per second, got 0"),
        (np.zeros(4000, dtype=np.int16), 16000, "got int16 of shape"),
        (np.zeros((2, 4000), dtype=np.float32), 16000, r"got float32 of shape \(2, 4000\)"),
        (np.full(4000, np.nan, dtype=np.float32), 16000, "not finite numbers"),
    ],
)
def test_an_array_that_could_be_misread_is_refused(namer, array, sampling_rate, message):
    with pytest.raises(ValueError, match=message):
        namer.classify(array, sampling_rate)


def test_choices_out_of_range_are_refused(files, namer):
    with pytest.raises(ValueError, match="batch_size is 1 or more, got 0"):
        namer.classify(files, batch_size=0)
    with pytest.raises(ValueError, match="top_k is 1 or more, got 0"):
        namer.classify(files, top_k=0)


def test_a_folder_without_an_adapter_is_refused(saved, base, tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder '\./nowhere'"):
        SpeechAdapter.from_pretrained("./nowhere")
    with pytest.raises(ValueError, match=r"no folder 'me/nothing', and no adapter of that name .* from the Hub"):
        SpeechAdapter.from_pretrained("me/nothing")
    with pytest.raises(ValueError, match=r"holds no adapter: there is no adapter_config\.json in it"):
        SpeechAdapter.from_pretrained(base)
    shutil.copytree(saved("ForXVector"), tmp_path / "several/calls")
    with pytest.raises(ValueError, match=r"These folders inside of it do: calls\."):
        SpeechAdapter.from_pretrained(tmp_path / "several")
    assert SpeechAdapter.from_pretrained(tmp_path / "several", subfolder="calls", device="cpu")


def test_a_broken_adapter_is_refused(saved, tmp_path):
    shutil.copytree(saved("ForXVector"), tmp_path / "cut")
    weights = tmp_path / "cut/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="broken or cut short"):
        SpeechAdapter.from_pretrained(tmp_path / "cut")
    weights.unlink()
    with pytest.raises(ValueError, match=r"no weights: adapter_model\.safetensors is missing"):
        SpeechAdapter.from_pretrained(tmp_path / "cut")
    (tmp_path / "cut/adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json in .* is broken"):
        SpeechAdapter.from_pretrained(tmp_path / "cut")


def test_an_adapter_of_another_method_is_refused(base, tmp_path):
    model = WavLMForCTC.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["intermediate_dense"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of the method 'LORA', not of ELP"):
        SpeechAdapter.from_pretrained(tmp_path)


def test_a_base_that_moved_can_be_named(folder, tmp_path, files):
    base = save_base(tmp_path / "old")
    adapted(base, "ForSequenceClassification").save_pretrained(tmp_path / "adapter")
    expected = SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu").classify(files[0])
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(
        ValueError, match=rf"The base '{re.escape(base)}' .*: there is no such folder\. .*base=\.\.\. in Python"
    ):
        SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu")
    moved = SpeechAdapter.from_pretrained(tmp_path / "adapter", base=tmp_path / "new", device="cpu")
    assert moved.classify(files[0]) == expected


def test_a_device_that_is_not_there_is_refused(saved):
    with pytest.raises(ValueError, match="The device 'gpu' cannot be used"):
        SpeechAdapter.from_pretrained(saved("ForXVector"), device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="The device 'cuda' cannot be used"):
            SpeechAdapter.from_pretrained(saved("ForXVector"), device="cuda")


def test_an_adapter_of_transformers_own_door_is_loaded_with_its_head(base, tmp_path, files):
    model = WavLMForSequenceClassification.from_pretrained(base, num_labels=3)
    model.add_adapter(ELPConfig(**ELP))
    model.save_pretrained(tmp_path)
    assert len(SpeechAdapter.from_pretrained(tmp_path, device="cpu").classify(files[0])) == 3


# Bases, files and formats -------------------------------------------------------------------------------------------


@pytest.fixture
def own_base(tmp_path):
    """A base that a test may break, and an adapter for it."""
    base = save_base(tmp_path / "base")
    adapted(base, "ForSequenceClassification").save_pretrained(tmp_path / "adapter")
    return tmp_path / "base"


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (lambda tensors: {name: x for name, x in tensors.items() if ".layers.1." not in f".{name}"}, 19),
        (lambda tensors: {f"other.{name}": x for name, x in tensors.items()}, 75),
    ],
    ids=["a layer is missing", "another family"],
)
def test_a_base_that_lacks_weights_is_refused(own_base, tmp_path, change, count):
    change_weights(own_base, change)
    message = rf"The base .* lacks {count} weights .*: [\w.]+, [\w.]+, [\w.]+ and {count - 3} more\. Was it trained on"
    with pytest.raises(ValueError, match=message):
        SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu")


def test_a_base_of_another_depth_is_refused(own_base, tmp_path):
    config = json.loads((own_base / "config.json").read_text())
    (own_base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"lacks 19 weights .*encoder\.layers\.3"):
        SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu")


@pytest.mark.filterwarnings("ignore:'projector' of .* newly initialised and stay frozen:UserWarning")
def test_what_an_adapter_does_not_bring_the_base_must_have(base, tmp_path, files):
    model = WavLMForSequenceClassification.from_pretrained(base, num_labels=4)
    get_peft_model(model, ELPConfig(**ELP, l_output="project", modules_to_save=["classifier"])).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(ValueError, match=r"lacks 2 weights .*: projector\.bias, projector\.weight\. Was"):
        SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu")
    WavLMForSequenceClassification.from_pretrained(base, num_labels=4).save_pretrained(tmp_path / "whole")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / "whole")
    adapter = SpeechAdapter.from_pretrained(tmp_path / "adapter", base=tmp_path / "whole", device="cpu")
    assert len(adapter.classify(files[0])) == 4


def test_weights_that_only_training_needs_may_be_missing(own_base, tmp_path, files):
    expected = SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu").classify(files[0])
    change_weights(own_base, lambda tensors: {name: x for name, x in tensors.items() if "masked_spec" not in name})
    config = json.loads((own_base / "config.json").read_text())
    (own_base / "config.json").write_text(json.dumps(config | {"mask_time_prob": 0.05}))
    assert SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu").classify(files[0]) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification", "ForXVector"])
def test_a_base_in_half_precision_answers_much_as_in_full(tmp_path, files, head, dtype):
    full = build("wavlm", "Model")
    full.save_pretrained(tmp_path / "full")
    full.to(dtype).save_pretrained(tmp_path / "half")
    for base in ("full", "half"):
        Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / base)
    adapted(str(tmp_path / "full"), head).save_pretrained(tmp_path / "adapter")
    save_tokenizer(tmp_path / "adapter")
    answers = []
    for options in (
        {"base": tmp_path / "full"},
        {"base": tmp_path / "half"},
        {"base": tmp_path / "full", "dtype": dtype},
    ):
        adapter = SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu", **options)
        assert adapter._dtype == (torch.float32 if not answers else dtype)
        if head == "ForCTC":
            assert all(set(text) <= set("abcd <>/spadunk") for text in adapter.transcribe(files, batch_size=2))
            answers.append([[0.0]])
        elif head == "ForXVector":
            answers.append(adapter.embed(files, batch_size=2))
        else:
            scores = [
                {one["label"]: one["score"] for one in answer} for answer in adapter.classify(files, batch_size=2)
            ]
            answers.append([[one[label] for label in LABELS] for one in scores])
    scale = np.abs(answers[0]).max()
    np.testing.assert_allclose(answers[1], answers[0], atol=0.1 * scale)
    np.testing.assert_allclose(answers[2], answers[1], atol=0.02 * scale)


WHISPER = Path(__file__).parent.parent.parent / "shared/models/whisper-tiny.en"


@pytest.mark.slow
@pytest.mark.skipif(not WHISPER.is_dir(), reason="needs Whisper tiny.en")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_whisper_in_half_precision_writes_and_names(tmp_path, files, dtype):
    options = {"device": "cpu", "dtype": dtype}
    writer = WhisperForConditionalGeneration.from_pretrained(WHISPER)
    get_peft_model(writer, ELPConfig(adapters="E", e_dim=8)).save_pretrained(tmp_path / "writer")
    assert isinstance(SpeechAdapter.from_pretrained(tmp_path / "writer", **options).transcribe(files[0]), str)
    namer = WhisperForAudioClassification.from_pretrained(WHISPER, num_labels=3)
    get_peft_model(namer, ELPConfig(**ELP)).save_pretrained(tmp_path / "namer")
    answers = SpeechAdapter.from_pretrained(tmp_path / "namer", **options).classify(files[:2], batch_size=2)
    assert [sum(one["score"] for one in answer) for answer in answers] == pytest.approx([1, 1], abs=1e-2)


def test_a_dtype_is_one_of_floating_point(saved):
    for dtype in ("int8", "Tensor", "half a byte"):
        with pytest.raises(ValueError, match=f"The dtype '{dtype}' is not one of floating point"):
            SpeechAdapter.from_pretrained(saved("ForXVector"), dtype=dtype)


def test_answers_that_are_not_numbers_are_errors(base, tmp_path, files):
    for head, task in (("ForCTC", "transcribe"), ("ForSequenceClassification", "classify"), ("ForXVector", "embed")):
        adapted(base, head).save_pretrained(tmp_path / head)
        save_tokenizer(tmp_path / head)
        adapter = SpeechAdapter.from_pretrained(tmp_path / head, device="cpu")
        with torch.no_grad():
            adapter.model.get_base_model().wavlm.feature_projection.projection.weight.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"values that are not finite, in torch\.float32"):
            getattr(adapter, task)(files[0])


def test_a_base_is_looked_for_beside_the_adapter(own_base, tmp_path, files, monkeypatch):
    expected = SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu").classify(files[0])
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    monkeypatch.chdir("/")
    for name in ("base", "./base", "../somewhere/base", "/nowhere/base"):
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        assert SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu").classify(files[0]) == expected


# Files by strangers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer_config.json", "base"])
def test_no_code_beside_an_adapter_or_a_base_is_run(own_base, tmp_path, monkeypatch, files, name):
    adapted(str(own_base), "ForCTC").save_pretrained(tmp_path / "adapter")
    save_tokenizer(tmp_path / "adapter")
    monkeypatch.setattr("builtins.input", lambda *args: "y")  # as a list of files on standard input might
    folder = own_base if name == "base" else tmp_path / "adapter"
    for auto_class in ("AutoFeatureExtractor", "AutoTokenizer", "AutoConfig", "AutoModelForCTC"):
        changed = "config.json" if name == "base" else name
        path = folder / changed
        fields = json.loads(path.read_text()) if path.exists() else {}
        fields.pop("feature_extractor_type", None)
        fields["auto_map"] = {
            **fields.get("auto_map", {}),
            auto_class: ["code.Payload", None] if "Tok" in auto_class else "code.Payload",
        }
        path.write_text(json.dumps(fields))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Payload: pass\n")
    with suppress(ValueError):
        SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu").transcribe(files[0])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name", ["pipeline", "AutoModelForCTC", "logging", "WavLMConfig", "os", "PreTrainedModelX", None]
)
def test_the_class_of_the_base_is_a_model_class_of_transformers(saved, tmp_path, name):
    shutil.copytree(saved("ForCTC"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["auto_mapping"]["base_model_class"] = name
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"names the class {name!r}, which is not a model class of Transformers"):
        SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize("rate", [0, -1, 10**12, "16000", None, [], 1.5])
def test_a_sampling_rate_without_meaning_is_refused(saved, tmp_path, rate):
    shutil.copytree(saved("ForCTC"), tmp_path / "adapter")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sampling_rate": rate}))
    with pytest.raises(ValueError, match=r"has the sampling rate .*, where a number of samples per second belongs"):
        SpeechAdapter.from_pretrained(tmp_path / "adapter", device="cpu")


def test_the_meta_device_is_refused(saved):
    with pytest.raises(ValueError, match="The device 'meta' cannot be used"):
        SpeechAdapter.from_pretrained(saved("ForXVector"), device="meta")


def test_a_recording_that_does_not_fit_into_memory_is_named(tmp_path, namer, files, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    for place in ("soundfile.SoundFile.read", "soxr.resample"):
        with monkeypatch.context() as patched:
            patched.setattr(place, fail)
            with pytest.raises(ValueError, match=r"8k\.wav: it is too long to be re"):
                namer.classify(record(tmp_path / "8k.wav", 3000, seed=1, rate_hz=8000))


@pytest.mark.parametrize("name", ["x" * 5000 + ".wav", "a\0b.wav", ""])
def test_a_name_that_no_file_can_have_is_no_file(namer, name):
    with pytest.raises(ValueError, match=r"there is no such file|no recording is given"):
        namer.read(name)


def test_a_speech_adapter_travels_by_its_folder(saved, files, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(saved("ForSequenceClassification")).parent)
    adapter = SpeechAdapter.from_pretrained("ForSequenceClassification", device="cpu")
    content = pickle.dumps(adapter)
    assert len(content) < 5000
    assert b"hf_secret" not in pickle.dumps(
        SpeechAdapter.from_pretrained("ForSequenceClassification", device="cpu", token="hf_secret")
    )
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        elsewhere = process.submit(adapter.classify, files).result()
    for one, other in zip(elsewhere, adapter.classify(files), strict=True):
        assert [label["label"] for label in one] == [label["label"] for label in other]
        assert [label["score"] for label in one] == pytest.approx([label["score"] for label in other], abs=1e-5)
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(content).classify(files[0]) == adapter.classify(files[0])
