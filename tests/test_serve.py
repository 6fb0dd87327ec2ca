"""Many adapters behind one engine and one server: each answer is the one that the adapter gives alone."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from backbones import FAMILIES, shaken
from on_disk import record, save_base, save_tokenizer, save_whisper
from peft import get_peft_model

from peft_elp import ELPConfig
from peft_elp.serving.engine import Engine, NotLoadedError, Request, UnknownAdapterError
from peft_elp.speech.inference import SpeechAdapter

TASKS = {"ForCTC": ["transcribe"], "ForSequenceClassification": ["classify", "embed"], "ForXVector": ["embed"]}
SHAPES = [{"adapters": "ELP", "p_length": 3}, {"adapters": "ELP", "p_length": 2}, {"adapters": "E"}, {"adapters": "L"}]


def save(folder, base, head, family="wavlm", labels=3, seed=0, **config):
    """Save an adapter that does something."""
    torch.manual_seed(0)
    names = {number: f"{folder.name}{number}" for number in range(labels)}
    options = {"id2label": names} if head == "ForSequenceClassification" else {}
    model = getattr(transformers, FAMILIES[family] + head).from_pretrained(base, **options)
    if head == "ForXVector":  # Transformers 5.0 leaves whatever was in memory
        torch.nn.init.normal_(model.objective.weight)
    adapter = get_peft_model(model, ELPConfig(**{"e_dim": 6, "l_dim": 8} | config))
    shaken(adapter, seed=seed).save_pretrained(folder)
    if head == "ForCTC":
        save_tokenizer(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Twenty adapters with three heads on two bases, one of which feels padding; two of Whisper; and recordings."""
    folder = tmp_path_factory.mktemp("serve")
    bases = {
        "wavlm": save_base(folder / "wavlm"),
        "hubert": save_base(folder / "hubert", "hubert", feat_extract_norm="group"),
    }
    tasks: dict[str, list[str]] = {}
    for family, heads in [("wavlm", list(TASKS)), ("hubert", list(TASKS)[:2])]:
        for head in heads:
            for number, shape in enumerate(SHAPES):
                name = f"{family}{head}{number}"
                save(folder / name, bases[family], head, family, labels=2 + number % 2, seed=number, **shape)
                tasks[name] = TASKS[head]
    files = [record(folder / f"{n}.wav", samples, n) for n, samples in enumerate([4000, 2600, 2600, 3100, 9000, 4000])]
    broken = folder / "broken.wav"
    broken.write_bytes(b"RIFF")
    return SimpleNamespace(folder=folder, bases=bases, tasks=tasks, files=files, broken=str(broken))


def alone(saved):
    """Answer requests with one `SpeechAdapter` each."""
    loaded: dict[str, SpeechAdapter] = {}

    def answer(request):
        name = request.adapter
        loaded[name] = loaded.get(name) or SpeechAdapter.from_pretrained(saved.folder / name, device="cpu")
        return getattr(loaded[name], request.task)(request.recording)

    return answer


def assert_same(found, right):
    if isinstance(right, list):
        assert [one["label"] for one in found] == [one["label"] for one in right]
        found, right = ([one["score"] for one in labels] for labels in (found, right))
    if isinstance(right, str):
        assert found == right
    else:
        np.testing.assert_allclose(found, right, atol=2e-5, rtol=1e-3)


def some_requests(saved, count, seed=0):
    draw = random.Random(seed)
    names = [draw.choice(list(saved.tasks)) for _ in range(count)]
    return [Request(name, draw.choice(saved.tasks[name]), draw.choice(saved.files)) for name in names]


def test_mixed_requests_are_answered_as_each_adapter_answers_alone_and_a_broken_recording_fails_alone(saved):
    engine = Engine({name: saved.folder / name for name in saved.tasks}, device="cpu")
    passes = []
    run = engine._pass
    engine._pass = lambda batch, task: passes.append(len({one[0].key for one in batch})) or run(batch, task)
    requests = [*some_requests(saved, 80), Request("wavlmForCTC0", "transcribe", saved.broken)]
    *answers, failed = engine.answer(requests)
    right = alone(saved)
    for request, answer in zip(requests[:-1], answers, strict=True):
        assert_same(answer, right(request))
    assert isinstance(failed, ValueError)
    assert "broken.wav" in str(failed)
    assert max(passes) > 1  # several adapters in one pass
    assert len(passes) < len(requests) * 2 / 3
    models = {id(loaded.speech.model): loaded.speech.model for loaded in engine._loaded.values()}.values()
    weights = {one.data_ptr() for m in models for name, one in m.named_parameters() if "q_proj.weight" in name}
    assert (len(models), len(weights)) == (5, 2 * 3)  # a model for each head, the tensors of two bases of three layers


def test_whisper_writes_for_several_adapters_in_one_pass(tmp_path):
    base = save_whisper(tmp_path / "base")
    for seed, name in enumerate(["one", "two"]):
        model = transformers.WhisperForConditionalGeneration.from_pretrained(base, dtype="float32")
        adapter = get_peft_model(model, ELPConfig(adapters="EL", e_dim=4, l_dim=6, modules_to_save=[]))
        shaken(adapter, 0.5, seed).save_pretrained(tmp_path / name)
    names = {name: tmp_path / name for name in ("one", "two")}
    engine = Engine(names, dtype="float32", device="cpu")
    sounds = [np.random.default_rng(n).normal(size=9000 + 1000 * n).astype(np.float32) for n in range(5)]
    entries = [{"array": sound, "sampling_rate": 16000} for sound in sounds]
    requests = [Request(name, "transcribe", entry) for entry in entries for name in names]
    batches = []
    run = engine._pass
    engine._pass = lambda batch, task: batches.append(len(batch)) or run(batch, task)
    answers = engine.answer(requests)
    right = {name: SpeechAdapter.from_pretrained(path, dtype="float32", device="cpu") for name, path in names.items()}
    assert answers == [right[request.adapter].transcribe(request.recording) for request in requests]
    assert len(set(answers)) > 2
    assert batches == [10]
