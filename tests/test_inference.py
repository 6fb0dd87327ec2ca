"""A saved adapter answers for recordings: one file, many, arrays; or says in one line why it cannot."""

import json
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import transformers
from backbones import ELP, build, call, shaken, waveforms
from families import FAMILIES
from on_disk import LABELS, adapted, record, save_base, save_tokenizer, save_whisper
from packaging import version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2FeatureExtractor, WavLMForSequenceClassification, WhisperForConditionalGeneration

from peft_elp import ELPConfig
from peft_elp.speech.audio import decode
from peft_elp.speech.inference import SpeechAdapter
from peft_elp.speech.speakers import is_padding_invariant, speaker_embeddings

pytest_plugins = ["saved_adapters"]
GENERATES = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.20"), reason="its pipeline fails with Whisper"
)


def load(folder, **options):
    return SpeechAdapter.from_pretrained(folder, device="cpu", **options)


def in_memory(model, feature_extractor, tokenizer=None):
    """A SpeechAdapter of a model that was never saved."""
    saved = SimpleNamespace(config={}, folder=Path("memory"))
    return SpeechAdapter(model, saved, feature_extractor, tokenizer)


def noise(samples, seed=0):
    return np.random.default_rng(seed).normal(scale=0.1, size=samples).astype(np.float32)


def refuses(message, call, *args, **options):
    with pytest.raises(ValueError, match=message):
        call(*args, **options)


# Answers ------------------------------------------------------------------------------------------------------------


def test_a_transcription_is_what_the_trained_model_writes(base, files, loaded):
    model, writer = adapted(base, "ForCTC"), loaded("ForCTC")
    inputs = writer.feature_extractor(decode(files[0]), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        tokens = model(**inputs).logits.argmax(-1)[0]
    text = writer.transcribe(files[0])
    assert text == writer.tokenizer.decode(tokens)
    assert set(text) & set("abcd")


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_labels_are_scored_as_the_trained_model_does(base, files, loaded, problem):
    model, namer = adapted(base, "ForSequenceClassification"), load_copy(loaded("ForSequenceClassification"))
    namer.model.get_base_model().config.problem_type = problem
    inputs = namer.feature_extractor(decode(files[0]), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    scores = {"single": logits.softmax(0), "multi_": logits.sigmoid(), "regres": logits}[problem[:6]].tolist()
    expected = sorted(zip(scores, LABELS, strict=True), reverse=True)
    found = namer.classify(files[0])
    assert [one["label"] for one in found] == [label for _, label in expected]
    assert [one["score"] for one in found] == pytest.approx([score for score, _ in expected], abs=1e-6)
    assert namer.classify(files[0], top_k=1) == found[:1]
    assert [len(labels) for labels in namer.classify(files[:2], top_k=2)] == [2, 2]


def load_copy(adapter):
    return pickle.loads(pickle.dumps(adapter))


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("return_attention_mask", [True, False])
@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification", "ForXVector"])
def test_how_many_are_answered_at_a_time_changes_no_answer(tmp_path, files, head, return_attention_mask, norm, loaded):
    model = adapted(save_base(tmp_path, feat_extract_norm=norm), head)
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=return_attention_mask)
    adapter = in_memory(model, extractor, loaded("ForCTC").tokenizer)
    answer = adapter.transcribe if head == "ForCTC" else adapter.embed
    alone = [answer(file) for file in files]
    for batch_size in (2, 3, 10):
        for one, other in zip(answer(files, batch_size=batch_size), alone, strict=True):
            assert one == other if head == "ForCTC" else np.allclose(one, other, atol=1e-5)


CTC = [
    name
    for name, family in FAMILIES.items()
    if hasattr(getattr(transformers, family.model_class, None), "_get_feature_vector_attention_mask")
    and family.model_class.endswith("ForCTC")
]


@pytest.mark.parametrize("name", CTC)
def test_what_padding_changes_is_known_of_each_encoder(name, loaded):
    model = shaken(FAMILIES[name].adapted(adapters="EL"), std=0.3).eval()
    key, x = next(iter(FAMILIES[name].inputs.items()))
    if key == "input_features":
        extractor = transformers.SeamlessM4TFeatureExtractor(feature_size=5, num_mel_bins=5)
    else:
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    worst, length = 0.0, x.shape[1]
    for shorter in range(length // 2, length, max(1, length // 20)):
        padded, mask = x[:1].repeat(2, *[1] * (x.ndim - 1)), torch.ones(2, length).long()
        padded[1, shorter:], mask[1, shorter:] = 0, 0
        together = call(model, **{key: padded, "attention_mask": mask}).logits[1]
        alone = call(model, **{key: padded[1:, :shorter], "attention_mask": mask[1:, :shorter]}).logits[0]
        frames = min(len(alone), len(together))
        worst = max(worst, (together[:frames] - alone[:frames]).abs().max().item())
    assert is_padding_invariant(model, extractor) == (worst < 1e-4)
    adapter = in_memory(model, extractor, loaded("ForCTC").tokenizer)
    recordings = [noise(samples, seed) for seed, samples in enumerate((6000, 4321, 3333, 5000))]
    alone = [adapter.transcribe(recording, 16000) for recording in recordings]
    assert adapter.transcribe(recordings, 16000, batch_size=4) == alone


def test_files_that_can_share_a_pass_do(files, loaded):
    waveforms = [decode(file) for file in files]
    namer = loaded("ForSequenceClassification")
    assert list(namer._batches(waveforms, 4)) == [[0, 1, 2, 3]]
    assert list(namer._batches(waveforms, 3)) == [[0, 1, 2], [3]]
    assert list(loaded("ForXVector")._batches(waveforms, 4)) == [[0, 3], [1], [2]]


def test_a_recording_is_a_file_or_an_array(files, loaded):
    namer, waveform = loaded("ForSequenceClassification"), decode(files[1])
    expected = namer.classify(files[1])
    entry = {"path": "never/read.wav", "bytes": Path(files[1]).read_bytes()}
    decoded = {"path": files[0], "array": waveform, "sampling_rate": 16000}
    for recording in (entry, decoded):
        assert namer.classify(recording) == expected
    assert namer.classify(waveform, sampling_rate=16000) == expected
    assert namer.classify(torch.from_numpy(waveform), sampling_rate=16000) == expected
    assert namer.classify([files[1], entry]) == [expected, expected]
    assert namer.classify([]) == []


@GENERATES
def test_a_model_that_generates_text_writes_with_the_tokenizer_of_its_base(tmp_path, files):
    backbone = WhisperForConditionalGeneration.from_pretrained(save_whisper(tmp_path / "base"), dtype=torch.float32)
    config = ELPConfig(l_output="project", l_input_norm=False, **ELP)  # with these weights the texts differ
    shaken(get_peft_model(backbone, config), std=1.0).save_pretrained(tmp_path / "adapter")
    writer = load(tmp_path / "adapter")
    texts = [writer.transcribe(file) for file in files]
    assert len(set(texts)) > 1
    assert writer.transcribe(files, batch_size=3) == texts


@GENERATES
def test_whisper_writes_a_recording_that_is_longer_than_its_window_beside_short_ones(tmp_path):
    symbols = [*"abcdefgh", "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    symbols += [f"<|{0.02 * frame:.2f}|>" for frame in range(51)]
    sizes = {"d_model": 16, "num_mel_bins": 8, "max_source_positions": 50, "init_std": 0.4, "vocab_size": len(symbols)}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 24}
    tokens = dict.fromkeys(["pad_token_id", "eos_token_id", "bos_token_id"], 8) | {"decoder_start_token_id": 9}
    torch.manual_seed(0)
    whisper = WhisperForConditionalGeneration(
        transformers.WhisperConfig(**sizes, **tokens, begin_suppress_tokens=None)
    ).eval()
    whisper.generation_config.max_new_tokens, whisper.generation_config.no_timestamps_token_id = 6, 10
    special = dict.fromkeys(["bos_token", "eos_token", "pad_token", "unk_token"], "<|endoftext|>")
    tokenizer = transformers.WhisperTokenizer(
        vocab={symbol: n for n, symbol in enumerate(symbols)}, merges=[], **special
    )
    config = ELPConfig(l_output="project", l_input_norm=False, **ELP)
    model = shaken(get_peft_model(whisper, config), std=1.0)
    writer = in_memory(model, transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer)
    recordings = [noise(40_000), noise(9_000), noise(16_000), noise(30_000)]
    alone = [writer.transcribe(recording, 16000) for recording in recordings]
    assert alone[0]
    assert writer.transcribe(recordings, 16000, batch_size=4) == alone


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


def test_the_embedding_of_an_x_vector_model_is_its_own_and_other_heads_have_none(base):
    model, waveform = adapted(base, "ForXVector"), waveforms()[0]
    torch.testing.assert_close(speaker_embeddings(model, input_values=waveform), model(waveform).embeddings)
    assert speaker_embeddings(build("wavlm", "ForSequenceClassification"), input_values=waveform).shape == (3, 12)
    for head in ("ForCTC", "ForAudioFrameClassification", "Model"):
        message = f"WavLM{head} has no speaker embeddings"
        refuses(message, speaker_embeddings, build("wavlm", head), input_values=waveform)


@pytest.mark.parametrize("head", ["ForXVector", "ForSequenceClassification"])
def test_two_voices_are_compared_by_the_cosine_of_their_embeddings(files, loaded, head):
    adapter, own = loaded(head), 0.25 if head == "ForXVector" else None  # the threshold that was saved with it
    first, second = adapter.embed(files[:2])
    found = adapter.verify(files[0], files[1])
    assert found.score == pytest.approx(first @ second / np.linalg.norm(first) / np.linalg.norm(second), abs=1e-6)
    assert adapter.verify(files[1], files[0]).score == pytest.approx(found.score)
    assert adapter.verify(files[0], files[0]).score == pytest.approx(1)
    assert (found.threshold, found.same) == (own, own and found.score >= own)
    assert adapter.verify(files[0], files[1], threshold=found.score).same is True
    assert adapter.verify(files[0], files[1], threshold=found.score + 1e-6).same is False


# What cannot be answered --------------------------------------------------------------------------------------------


def test_the_wrong_task_is_named_with_the_right_one(base, tmp_path, files, loaded):
    writer, namer, comparer = map(loaded, ("ForCTC", "ForSequenceClassification", "ForXVector"))
    refuses(r"cannot classify: it was trained with the head of WavLMForCTC.*transcribe", writer.classify, files[0])
    refuses(r"cannot transcribe.*WavLMForSequenceClassification.*classify and verify", namer.transcribe, [])
    refuses(r"cannot classify.*WavLMForXVector, which can verify", comparer.classify, files[0])
    for head, message in (("Model", r"WavLMModel\. For that head, use its"), ("ForCTC", "has no tokenizer.*Save the")):
        adapted(base, head).save_pretrained(tmp_path / head)
        refuses(message, load(tmp_path / head).transcribe, files[0])


@pytest.mark.filterwarnings("ignore:.*it is silent")
def test_a_bad_recording_is_named_with_what_is_wrong(tmp_path, files, loaded):
    (tmp_path / "text.wav").write_text("no sound")
    short, silent = record(tmp_path / "short.wav", 20, seed=0), tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(4000), 16000)
    for file, message in {
        tmp_path / "text.wav": "text.wav: soundfile cannot read it",
        short: r"short.wav: it is too short to judge, 0\.001 s; at least 0\.003 s are needed\.",
        silent: r"silent.wav: it is silent, all samples are 0\.",
        "x" * 5000 + ".wav": "there is no such file",
        "a\0b.wav": "there is no such file",
        "": "no recording is given",
    }.items():
        refuses(message, loaded("ForSequenceClassification").classify, [files[0], file], batch_size=2)


def test_the_shortest_recording_that_a_model_can_answer_is_answered(loaded):
    for head, least in (("ForSequenceClassification", 45), ("ForXVector", 185)):
        assert np.isfinite(loaded(head).embed(noise(least), sampling_rate=16000)).all()
        refuses("The array: it is too short", loaded(head).embed, noise(least - 1), sampling_rate=16000)


def test_a_recording_over_the_limit_is_refused_before_memory_is_gone(files, folders, monkeypatch):
    assert load(folders["ForCTC"]).max_duration_s == 120
    adapter = load_copy(load(folders["ForCTC"], max_duration_s=0.2))
    adapter.transcribe(files[1])
    monkeypatch.setattr("soundfile.SoundFile.read", pytest.fail)
    message = (
        r"0\.wav: it is too long, 0\.25 s; at most 0\.2 s .* on_long_audio \(--on-long-audio\) can be skip, crop,"
    )
    refuses(message, adapter.transcribe, files[0])


@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification", "ForXVector"])
def test_long_recordings_are_cropped_split_or_skipped(files, folders, loaded, head):
    """Each recording on its own: of the files, 0.25, 0.16, 0.06 and 0.25 seconds long, two are too long."""
    task = {"ForCTC": "transcribe", "ForSequenceClassification": "classify", "ForXVector": "embed"}[head]
    whole = getattr(loaded(head), task)
    first, half, samples = decode(files[0]), 2000, 2600

    def answers(on_long_audio):
        adapter = load_copy(load(folders[head], max_duration_s=samples / 16000, on_long_audio=on_long_audio))
        return [flat(one) for one in getattr(adapter, task)(files, batch_size=3)]

    def flat(one):
        return [x["score"] for x in sorted(one, key=lambda x: x["label"])] if isinstance(one, list) else one

    def close(one, other):
        return one == other if head == "ForCTC" else np.allclose(one, other, atol=1e-5)

    alone = [flat(one) for one in whole(files)]
    skipped, cropped, split = map(answers, ("skip", "crop", "split"))
    for found in (skipped, cropped, split):
        assert all(map(close, found[1:3], alone[1:3]))
    assert (skipped[0], skipped[3]) == (None, None)
    assert close(cropped[0], flat(whole(first[:samples], 16000)))
    parts = [flat(whole(part, 16000)) for part in (first[:half], first[half:])]
    assert close(split[0], " ".join(parts) if head == "ForCTC" else np.mean(parts, axis=0))
    refuses("on_long_audio must be one of error, skip, crop, split, got 'cut'", load, "nowhere", on_long_audio="cut")
    if head == "ForXVector":
        skipping = load(folders[head], max_duration_s=0.2, on_long_audio="skip")
        refuses("no two voices to compare", skipping.verify, *files[:2])


def test_a_recording_longer_than_the_window_is_refused_where_its_rest_would_be_cut_off(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    ast = transformers.ASTForAudioClassification(
        transformers.ASTConfig(**sizes, num_mel_bins=16, max_length=64, patch_size=8)
    )
    save_whisper(tmp_path)  # windows of one second
    whisper = transformers.WhisperForAudioClassification.from_pretrained(tmp_path, dtype=torch.float32)
    cases = [(whisper, transformers.WhisperFeatureExtractor(8, chunk_length=1, return_attention_mask=True), 1)]
    if FAMILIES["audio-spectrogram-transformer"].available:
        cases.append((ast, transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=64), 0.64))
    for model, extractor, window_s in cases:
        adapter = in_memory(get_peft_model(model.eval(), ELPConfig(**ELP)), extractor)
        samples = round(window_s * 16000)
        assert len(adapter.classify(noise(samples), 16000)) == 2
        refuses("too short to judge, 0.025 s; at least 0.025 s", adapter.classify, noise(399), 16000)
        long = [noise(800), noise(samples + 16000)]
        refuses(rf"too long, [\d.]+ s; the model reads a window of {window_s} s\..*split", adapter.embed, long, 16000)
        adapter.on_long_audio = "split"
        assert len(adapter.embed(long, 16000)) == 2


@pytest.mark.parametrize(
    ("array", "sampling_rate", "message"),
    [
        (noise(4000), None, "its sampling rate must be at least 1 Hz, got None. Pass sampling_rate=16000"),
        (np.zeros(4000, dtype=np.int16), 16000, "got int16 of shape"),
        (np.zeros((2, 4000), dtype=np.float32), 16000, r"got float32 of shape \(2, 4000\)"),
    ],
)
def test_an_array_that_could_be_misread_is_refused(loaded, array, sampling_rate, message):
    refuses(f"The array: .*{message}", loaded("ForSequenceClassification").classify, array, sampling_rate)


def test_choices_out_of_range_are_refused(files, folders, loaded):
    for choice in ("batch_size", "top_k"):
        message = f"{choice} must be at least 1, got 0"
        refuses(message, loaded("ForSequenceClassification").classify, files, **{choice: 0})
    for dtype in ("int8", "Tensor", "half a byte"):
        refuses(r"The base .* cannot be used: .*", load, folders["ForXVector"], dtype=dtype)


def test_a_folder_without_an_adapter_is_refused(folders, base, tmp_path):
    refuses(r"There is no folder '\./nowhere'", load, "./nowhere")
    refuses(r"no folder 'me/nothing', and no adapter of that name .* from the Hub", load, "me/nothing")
    refuses(r"holds no adapter: there is no adapter_config\.json in it", load, base)
    shutil.copytree(folders["ForXVector"], tmp_path / "several/calls")
    refuses(r"These folders inside of it do: calls\.", load, tmp_path / "several")
    assert load(tmp_path / "several", subfolder="calls")
    model = transformers.WavLMForCTC.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["intermediate_dense"])).save_pretrained(tmp_path / "lora")
    refuses("of the method 'LORA', not of ELP", load, tmp_path / "lora")


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_a_device_that_is_not_there_is_refused(folders, device):
    message = rf"The device '{device}' cannot be used: .*[^.]\.$"
    refuses(message, SpeechAdapter.from_pretrained, folders["ForXVector"], device=device)


def test_an_adapter_of_transformers_own_door_is_loaded_with_its_head(base, tmp_path, files):
    model = WavLMForSequenceClassification.from_pretrained(base, num_labels=3)
    model.add_adapter(ELPConfig(**ELP))
    model.save_pretrained(tmp_path)
    assert len(load(tmp_path).classify(files[0])) == 3


# Bases, files and formats -------------------------------------------------------------------------------------------


@pytest.fixture
def own_base(tmp_path):
    """A base that a test may break, and an adapter for it."""
    base = save_base(tmp_path / "base")
    adapted(base, "ForSequenceClassification").save_pretrained(tmp_path / "adapter")
    return tmp_path / "base"


def change_config(folder, name="config.json", **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def without(text):
    return lambda tensors: {name: x for name, x in tensors.items() if text not in f".{name}"}


def of_class(name):
    mapping = {"base_model_class": name}
    return lambda place: change_config(place / "adapter", "adapter_config.json", auto_mapping=mapping)


def at_rate(rate):
    return lambda place: change_config(place / "base", "preprocessor_config.json", sampling_rate=rate)


LACKS = r"The base .* lacks {} weights .*: [\w.]+, [\w.]+, [\w.]+ and {} more\. Was it trained on"
NO_CLASS = "names the class .*, which is not a model class of Transformers"
CLASSES = ("pipeline", "AutoModelForCTC", "logging", "WavLMConfig", "PreTrainedModelX", None)
NO_RATE = "must be from 1,000 to 1,000,000 Hz, got"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: change_weights(place / "base", without(".layers.1.")), LACKS.format(19, 16)),
        (lambda place: change_config(place / "base", num_hidden_layers=4), LACKS.format(19, 16)),
        *((of_class(name), NO_CLASS) for name in CLASSES),
        *((at_rate(rate), NO_RATE) for rate in (0, -1, 10**12, "16000", None, [], 1.5)),
    ],
)
def test_a_base_that_does_not_fit_its_adapter_is_refused(own_base, tmp_path, change, message):
    change(tmp_path)
    refuses(message, load, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:'projector' of .* newly initialised and stay frozen:UserWarning")
def test_what_an_adapter_does_not_bring_the_base_must_have(base, tmp_path, files):
    model = WavLMForSequenceClassification.from_pretrained(base, num_labels=4)
    config = ELPConfig(**ELP, l_output="project", modules_to_save=["classifier"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    refuses(r"lacks 2 weights .*: projector\.bias, projector\.weight\. Was", load, tmp_path / "adapter")
    WavLMForSequenceClassification.from_pretrained(base, num_labels=4).save_pretrained(tmp_path / "whole")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / "whole")
    assert len(load(tmp_path / "adapter", base=tmp_path / "whole").classify(files[0])) == 4


@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification", "ForXVector"])
def test_a_cpu_computes_in_float32_unless_told_otherwise(tmp_path, folders, files, head):
    dtype = torch.bfloat16
    build("wavlm", "Model").to(dtype).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path)
    assert load(folders[head], base=tmp_path)._dtype == torch.float32
    answers = []
    for options in ({}, {"base": tmp_path, "dtype": dtype}):
        adapter = load(folders[head], **options)
        assert adapter._dtype == options.get("dtype", torch.float32)
        if head == "ForCTC":
            assert all(set(text) <= set("abcd <>/spadunk") for text in adapter.transcribe(files, batch_size=2))
        else:
            answers.append(adapter.embed(files, batch_size=2))
    if answers:
        np.testing.assert_allclose(answers[1], answers[0], atol=0.1 * np.abs(answers[0]).max())


def test_answers_that_are_not_numbers_are_errors(folders, files):
    for head, task in (("ForCTC", "transcribe"), ("ForSequenceClassification", "classify"), ("ForXVector", "embed")):
        adapter = load(folders[head])
        with torch.no_grad():
            adapter.model.get_base_model().wavlm.feature_projection.projection.weight.fill_(float("nan"))
        refuses("values that are not finite", getattr(adapter, task), files[0])


def test_a_base_is_looked_for_beside_the_adapter_and_can_be_named(own_base, tmp_path, files, monkeypatch):
    expected = load(tmp_path / "adapter").classify(files[0])
    change_weights(own_base, without("masked_spec"))  # Only training needs them.
    change_config(own_base, mask_time_prob=0.05)
    monkeypatch.chdir("/")
    for name in ("base", "./base", "../somewhere/base", "/nowhere/base"):
        change_config(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=name)
        assert load(tmp_path / "adapter").classify(files[0]) == expected
    own_base.rename(tmp_path / "new")
    message = r"The base '/nowhere/base' .* cannot be used: there is no such folder\. .*base=\.\.\. in Python"
    refuses(message, load, tmp_path / "adapter")
    assert load(tmp_path / "adapter", base=tmp_path / "new").classify(files[0]) == expected


# Files by strangers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer_config.json", "base"])
def test_no_code_beside_an_adapter_or_a_base_is_run(own_base, tmp_path, monkeypatch, files, name):
    adapted(str(own_base), "ForCTC").save_pretrained(tmp_path / "adapter")
    save_tokenizer(tmp_path / "adapter")
    monkeypatch.setattr("builtins.input", lambda *args: "y")  # as a list of files on standard input might
    folder = own_base if name == "base" else tmp_path / "adapter"
    path = folder / ("config.json" if name == "base" else name)
    fields = json.loads(path.read_text()) if path.exists() else {}
    fields.pop("feature_extractor_type", None)
    fields["auto_map"] = dict.fromkeys(["AutoFeatureExtractor", "AutoConfig", "AutoModelForCTC"], "code.Payload")
    fields["auto_map"]["AutoTokenizer"] = ["code.Payload", None]
    path.write_text(json.dumps(fields))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Payload: pass\n")
    with suppress(ValueError):
        load(tmp_path / "adapter").transcribe(files[0])
    assert not (tmp_path / "executed").exists()


def test_a_speech_adapter_travels_by_its_folder(folders, files, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(folders["ForSequenceClassification"]).parent)
    adapter = load("ForSequenceClassification", token="hf_secret")
    content = pickle.dumps(adapter)
    assert len(content) < 5000
    assert b"hf_secret" not in content
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        elsewhere = process.submit(adapter.classify, files).result()
    for one, other in zip(elsewhere, adapter.classify(files), strict=True):
        assert [label["label"] for label in one] == [label["label"] for label in other]
        assert [label["score"] for label in one] == pytest.approx([label["score"] for label in other], abs=1e-5)
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(content).classify(files[0]) == adapter.classify(files[0])
