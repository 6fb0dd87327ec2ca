"""Many adapters behind one engine and one server: each answer is the one that the adapter gives alone."""

import base64
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from socket import socket
from types import SimpleNamespace

import httpx
import numpy as np
import psutil
import pytest
import soundfile
import torch
import transformers
import uvicorn
from backbones import FAMILIES, shaken
from on_disk import record, save_base, save_tokenizer, save_whisper
from peft import get_peft_model

import peft_elp.serving
from peft_elp import ELPConfig
from peft_elp.serving.app import Limits, make_app
from peft_elp.serving.engine import Engine, NotLoadedError, Request, UnknownAdapterError
from peft_elp.speech.inference import SpeechAdapter
from peft_elp_command import main

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


@pytest.mark.parametrize("how", ["crop", "split", "skip"])
def test_long_recordings_are_cropped_split_or_skipped(saved, how):
    options = {"device": "cpu", "max_duration_s": 0.5, "on_long_audio": how}
    names = [name for name in saved.tasks if name.endswith("1")]
    engine = Engine({name: saved.folder / name for name in names}, **options)
    long, short = saved.files[4], saved.files[0]
    requests = [Request(name, task, file) for name in names for task in saved.tasks[name] for file in (long, short)]
    for request, answer in zip(requests, engine.answer(requests), strict=True):
        right = getattr(SpeechAdapter.from_pretrained(saved.folder / request.adapter, **options), request.task)
        if (how, request.recording) == ("skip", long):
            assert "too long, and was skipped" in str(answer)
        else:
            assert_same(answer, right(request.recording))


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


def test_adapters_come_go_and_are_replaced_in_a_folder_and_leave_memory(saved, tmp_path):
    first, second, third = (saved.folder / f"wavlmForSequenceClassification{number}" for number in (0, 2, 3))
    put = partial(shutil.copytree, dirs_exist_ok=True)
    put(first, tmp_path / "a")
    engine = Engine({}, folder=tmp_path, limit=2, device="cpu")

    def ask(*names):
        return engine.answer([Request(name, "classify", saved.files[0]) for name in names])

    right = {
        path: SpeechAdapter.from_pretrained(path, device="cpu").classify(saved.files[0]) for path in (first, second)
    }
    assert_same(ask("a")[0], right[first])
    put(second, tmp_path / "a")  # in place
    put(third, tmp_path / "b")
    engine.look()
    assert_same(ask("a")[0], right[first])  # It may be half copied.
    assert engine.adapters == ["a"]
    engine.look()
    assert engine.adapters == ["a", "b"]
    assert_same(ask("a")[0], right[second])
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"half")
    engine.look()
    engine.look()
    assert_same(ask("a")[0], right[second])  # What cannot be loaded replaces nothing.
    put(saved.folder / "wavlmForCTC0", tmp_path / "c")
    engine.look()
    engine.look()
    assert len(ask("b", "a", "b")) == 3
    engine.answer([Request("c", "transcribe", saved.files[0])])
    assert list(engine._loaded) == ["b", "c"]  # The least recently used one left memory.
    assert isinstance(ask("a")[0], NotLoadedError)  # Its folder is broken.
    shutil.rmtree(tmp_path / "b")
    engine.look()
    engine.look()
    assert engine.adapters == ["a", "c"]
    assert isinstance(ask("b")[0], UnknownAdapterError)


# The server ---------------------------------------------------------------------------------------------------------


@contextmanager
def served(engine, **limits):
    """Serve in this process, in a thread."""
    app = make_app(engine, Limits(**limits), api_key="secret")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": "Bearer secret"}) as client:
        yield client
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def engine(saved):
    return Engine({name: saved.folder / name for name in saved.tasks}, device="cpu")


def post(client, path, file, **fields):
    names = ("file",) if isinstance(file, str) else ("file_a", "file_b")
    paths = [Path(one) for one in ([file] if isinstance(file, str) else file)]
    files = {name: (path.name, path.read_bytes()) for name, path in zip(names, paths, strict=True)}
    return client.post(path, files=files, data=fields)


def test_the_server_answers_as_the_command_prints(saved, engine):
    file, other = saved.files[:2]
    words, voices = "wavlmForSequenceClassification1", "wavlmForXVector0"
    speech = {name: SpeechAdapter.from_pretrained(saved.folder / name, device="cpu") for name in (words, voices)}
    with served(engine) as client:
        found = post(client, "/classify", file, model=words, top_k=1).json()
        assert found["file"] == "0.wav"
        assert_same(found["labels"], speech[words].classify(file, top_k=1))
        encoded = {"model": words, "file": base64.b64encode(Path(file).read_bytes()).decode(), "top_k": 1}
        assert client.post("/classify", json=encoded).json()["labels"] == found["labels"]
        assert_same(post(client, "/embed", file, model=voices).json()["embedding"], speech[voices].embed(file))
        right = speech[voices].verify(file, other, threshold=0.2)
        found = post(client, "/verify", (file, other), model=voices, threshold=0.2).json()
        assert found == {"score": pytest.approx(right.score, abs=1e-5), "threshold": 0.2, "same": right.same}
        assert client.get("/healthz").json() == {"status": "ok", "adapters": 20}
        assert {"/classify", "/verify", "/v1/models"} <= client.get("/openapi.json").json()["paths"].keys()


def test_openais_client_is_served(saved, engine):
    openai = pytest.importorskip("openai")
    name = "wavlmForCTC0"
    with served(engine) as http:
        client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="secret", max_retries=0)
        assert [model.id for model in client.models.list()] == sorted(saved.tasks)
        for form in ("json", "text"):
            with open(saved.files[0], "rb") as file:
                found = client.audio.transcriptions.create(model=name, file=file, response_format=form)
            text = found if form == "text" else found.text
            assert (
                text.strip() == SpeechAdapter.from_pretrained(saved.folder / name).transcribe(saved.files[0]).strip()
            )
        with open(saved.files[0], "rb") as file, pytest.raises(openai.NotFoundError, match="no adapter 'whisper-1'"):
            client.audio.transcriptions.create(model="whisper-1", file=file)
        with open(saved.files[0], "rb") as file, pytest.raises(openai.UnprocessableEntityError, match="'prompt'"):
            client.audio.transcriptions.create(model=name, file=file, prompt="numbers")


def test_what_cannot_be_answered_has_a_status_and_a_sentence(saved, engine, tmp_path):
    words = "wavlmForSequenceClassification1"
    broken = {"noise": b"no audio", "empty": b""}
    soundfile.write(tmp_path / "nan.wav", np.full(4000, np.nan, np.float32), 16000, subtype="FLOAT")
    broken["nan"] = (tmp_path / "nan.wav").read_bytes()
    with served(engine, upload_bytes=100_000) as client:

        def refused(status, message, path="/classify", **options):
            answer = client.post(path, **options)
            assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text

        for name, content in broken.items():
            (tmp_path / name).write_bytes(content)
            answer = post(client, "/classify", str(tmp_path / name), model=words)
            assert (answer.status_code, name in answer.json()["error"]["message"]) == (422, True), answer.text
        sound = {"file": base64.b64encode(Path(saved.files[0]).read_bytes()).decode()}
        refused(404, "no adapter '../one'", json=sound | {"model": "../one"})
        refused(422, "cannot transcribe", "/v1/audio/transcriptions", json=sound | {"model": words})
        refused(422, "'model' is missing", json=sound)
        refused(422, "'file' is missing or is not a file", json={"model": words})
        refused(422, "'paht' is not supported", json=sound | {"model": words, "paht": 1})
        refused(422, "top_k must be a number from 1, got 0", json=sound | {"model": words, "top_k": 0})
        refused(422, "cannot be read", json={"model": words, "file": "not base64!"})
        refused(422, "must be a JSON object", json=[1])
        refused(413, "larger than 100,000 bytes", content=b"x" * 200_000)
        refused(
            413,
            "larger than 100,000 bytes",
            content=iter([b"x" * 60_000] * 3),
            headers={"content-type": "application/json"},
        )
        refused(401, "API key", headers={"authorization": "Bearer wrong"})
        assert client.get("/v1/models", headers={"authorization": ""}).status_code == 401
        assert post(client, "/classify", saved.files[0], model=words).status_code == 200


def test_too_many_requests_and_slow_ones_are_refused_and_none_is_lost(saved):
    slow = SimpleNamespace(check=lambda *_: None, adapters=["a"], look=lambda: None)

    def answer(requests):
        time.sleep(0.1)
        return [[{"label": "yes", "score": 1.0}]] * len(requests)

    slow.answer = answer
    with served(slow, queue=5, batch_size=2) as client, ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda _: post(client, "/classify", saved.files[0], model="a").status_code, range(20)))
        assert set(found) == {200, 429}
        assert found.count(200) >= 5
    with served(slow, timeout_s=0.05) as client:
        assert post(client, "/classify", saved.files[0], model="a").status_code == 504
        with pytest.raises(httpx.ReadTimeout):  # The client hangs up.
            client.post("/classify", json={"model": "a", "file": ""}, timeout=0.01)
        assert client.get("/healthz").status_code == 200


def test_a_thousand_mixed_requests_by_32_clients_are_answered_as_alone_while_adapters_come(saved, tmp_path):
    engine = Engine({name: saved.folder / name for name in saved.tasks}, folder=tmp_path, device="cpu")
    requests = some_requests(saved, 1000, seed=1)
    right, known = alone(saved), {}
    paths = {"transcribe": "/v1/audio/transcriptions", "classify": "/classify", "embed": "/embed"}
    fields = {"transcribe": "text", "classify": "labels", "embed": "embedding"}
    with served(engine) as client, ThreadPoolExecutor(32) as pool:
        coming = [pool.submit(post, client, paths[one.task], one.recording, model=one.adapter) for one in requests]
        shutil.copytree(saved.folder / "wavlmForXVector1", tmp_path / "new")
        for request, answer in zip(requests, coming, strict=True):
            known[request] = known.get(request) or [right(request)]
            assert answer.result().status_code == 200
            assert_same(answer.result().json()[fields[request.task]], known[request][0])
        assert "new" in engine.adapters


def test_the_command_answers_what_it_has_taken_on_before_it_stops(saved):
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = "wavlmForSequenceClassification1"
    command = [sys.executable, "-m", "peft_elp", "serve", str(saved.folder / name), "--port", str(port)]
    with subprocess.Popen(command) as process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        until_up(client, process)
        with ThreadPoolExecutor(8) as pool:
            coming = [pool.submit(post, client, "/classify", saved.files[4], model=name) for _ in range(8)]
            time.sleep(0.1)
            process.terminate()
            assert [answer.result().status_code for answer in coming] == [200] * 8
        assert process.wait(30) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("missing", "options", "extra"), [("fastapi", [], "serve"), ("ray.serve", ["--replicas", "2"], "serve,ray")]
)
def test_the_command_names_the_extra_that_is_missing(saved, monkeypatch, capsys, missing, options, extra):
    for name in ("app", "run"):
        monkeypatch.delitem(sys.modules, f"peft_elp.serving.{name}", raising=False)
        monkeypatch.delattr(peft_elp.serving, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["serve", str(saved.folder / "wavlmForCTC0"), *options]) == 1
    assert f"pip install 'peft-elp[{extra}]'" in capsys.readouterr().err


def test_the_handler_of_inference_endpoints_answers_in_json(saved, tmp_path):
    path = Path(__file__).parents[1] / "examples" / "handler.py"
    tasks = {"wavlmForCTC0": "transcribe", "wavlmForSequenceClassification1": "classify", "wavlmForXVector0": "embed"}
    for name in tasks:
        shutil.copytree(saved.folder / name, tmp_path / name)
    handler = runpy.run_path(str(path))["EndpointHandler"](str(tmp_path))
    sound = base64.b64encode(Path(saved.files[0]).read_bytes()).decode()
    right = alone(saved)
    for name, task in tasks.items():
        answer = json.loads(json.dumps(handler({"inputs": {"model": name, "task": task, "file": sound}})))["answer"]
        assert_same(answer, right(Request(name, task, saved.files[0])))
    with pytest.raises(ValueError, match="no adapter 'other'"):
        handler({"inputs": {"model": "other", "task": "classify", "file": sound}})


def until_up(client, process):
    for _ in range(600):
        assert process.poll() is None
        try:
            return client.get("/healthz").raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.1)
    raise TimeoutError("The server did not start.")


@pytest.mark.filterwarnings("ignore")  # Ray uses its own deprecated settings, and leaves files open.
def test_a_replica_that_is_killed_is_replaced_and_every_request_has_a_status(saved, monkeypatch):
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    from peft_elp.serving.run import deployment

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # Else Ray writes a token into the home folder.
    name = "wavlmForSequenceClassification1"
    engine = {"adapters": {name: str(saved.folder / name)}, "device": "cpu"}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1"}})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8765})
        serve.run(deployment({"engine": engine, "replicas": 2}), route_prefix="/")
        with httpx.Client(base_url="http://127.0.0.1:8765", timeout=60) as client, ThreadPoolExecutor(4) as pool:
            coming = [pool.submit(post, client, "/classify", saved.files[0], model=name) for _ in range(40)]
            replicas = [one for one in psutil.process_iter(["cmdline"]) if is_replica(one)]
            replicas[0].kill()
            found = [answer.result() for answer in coming]
            assert {answer.status_code for answer in found} <= {200, 500, 503}
            right = SpeechAdapter.from_pretrained(saved.folder / name, device="cpu").classify(saved.files[0])
            good = [answer.json()["labels"] for answer in found if answer.status_code == 200]
            assert len(good) >= 20
            for labels in good:
                assert_same(labels, right)
    finally:
        serve.shutdown()
        ray.shutdown()


def is_replica(process):
    mine = os.getpid() in [parent.pid for parent in process.parents()]
    return mine and any("ServeReplica" in word for word in process.info["cmdline"] or ())
