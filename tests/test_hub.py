"""An adapter goes to the Hub and comes back as any other of PEFT's: the real client, a server on this machine."""

import os
import re
import tempfile
from itertools import count
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from backbones import ELP, build, result, shaken, waveforms
from hub import TOKEN, USER, client, left, serving
from huggingface_hub import HfApi, ModelCard, constants, try_to_load_from_cache
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForAudioClassification, Wav2Vec2FeatureExtractor
from untouched import assert_untouched, snapshot

from peft_elp import ELPConfig
from peft_elp.speech.inference import SpeechAdapter

BASE = "microsoft/wavlm-base-plus"  # a tiny one of that name
WEIGHTS = "adapter_model.safetensors"
HUNG_UP = "RemoteProtocolError: Server disconnected|(Write|Read)Error: "
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def hub():
    with serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("client")


@pytest.fixture(scope="module")
def there(hub, home):
    """Runs a function where the client's Hub is ours."""
    with client(hub, home) as there:
        hub.create(BASE, files=there(base_files))
        yield there
        assert there(left) == [], "the client tried to leave this machine"
        assert set(hub.unknown) <= {"GET /api/agent-harnesses"}, "the server did not know what to answer"


@pytest.fixture(scope="module")
def pushed(there):
    """A pushed adapter, and what it answers."""
    return f"{USER}/pushed", there(push, f"{USER}/pushed")


@pytest.fixture
def healed(hub):
    yield
    hub.faults.clear()


# In the client's process --------------------------------------------------------------------------------------------


def base_files():
    with tempfile.TemporaryDirectory() as folder:
        build("wavlm", "Model").save_pretrained(folder)
        Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


SEEDS = count()


def backbone():
    """The base from the Hub, which holds no head: the head is another one each time."""
    torch.manual_seed(next(SEEDS))
    return AutoModelForAudioClassification.from_pretrained(BASE, num_labels=4)


def adapted(config=None, name="default", std=0.2):
    return shaken(get_peft_model(backbone(), config or ELPConfig(**ELP), adapter_name=name), std)


def answer(model):
    waveform, mask = waveforms()
    with torch.no_grad():
        return result(model.eval()(waveform, attention_mask=mask)).tolist()


def push(repo, std=0.2, name="default", config=None, token=TOKEN, **options):
    model = adapted(config, name, std)
    model.push_to_hub(repo, token=token, **options)
    return answer(model)


def push_in_vain(repo):
    model = adapted()
    before = snapshot(model)
    error = said(model.push_to_hub, repo, token=TOKEN)
    assert_untouched(model, before)
    return error


def push_folder(repo, config=None):
    """What PEFT wrote, as it is."""
    with tempfile.TemporaryDirectory() as folder:
        model = adapted(config)
        model.save_pretrained(folder)
        api = HfApi(token=TOKEN)
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=folder)
    return answer(model)


def load(repo, **options):
    return answer(PeftModel.from_pretrained(backbone(), repo, **options))


def load_without_a_base(repo):
    return answer(AutoPeftModel.from_pretrained(repo, num_labels=4))


def load_for_recordings(repo):
    return answer(SpeechAdapter.from_pretrained(repo, device="cpu").model)


def load_two(repo, first, second):
    model = PeftModel.from_pretrained(backbone(), repo, subfolder=first, adapter_name=first)
    model.load_adapter(repo, subfolder=second, adapter_name=second)
    answers = [answer(model)]
    model.set_adapter(second)
    return [*answers, answer(model)]


def load_offline(repo):
    constants.HF_HUB_OFFLINE = True
    try:
        return load(repo)
    finally:
        constants.HF_HUB_OFFLINE = False


def card(repo):
    loaded = ModelCard.load(repo)
    return loaded.data.to_dict(), loaded.text


def said(function, *args, **options):
    """The error with its causes, as a traceback would show them."""
    try:
        function(*args, **options)
    except Exception as error:
        chain = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        return " <- ".join(f"{type(error).__name__}: {error}" for error in chain)
    raise AssertionError("no error")


def load_broken(repo, beside):
    """Load in vain; the error, when nothing of it is left. Then again: the answer."""

    def attempt():
        if not beside:
            return PeftModel.from_pretrained(model, repo)
        model.load_adapter(repo, adapter_name="new")
        model.set_adapter("new")
        return model

    model = adapted() if beside else backbone()
    expected, before = answer(model), snapshot(model)
    error = said(attempt)
    assert_untouched(model, before)
    assert hasattr(model, "peft_config") == beside
    assert not beside or list(model.peft_config) == ["default"]
    assert answer(model) == expected
    incomplete = [str(path) for path in Path(constants.HF_HUB_CACHE).rglob("*.incomplete")]
    return error, try_to_load_from_cache(repo, WEIGHTS), incomplete, answer(attempt())


def load_from_a_broken_cache(repo, beside):
    load(repo)
    cached = Path(try_to_load_from_cache(repo, WEIGHTS)).resolve()
    cached.write_bytes(cached.read_bytes()[:-100])
    model = adapted() if beside else backbone()
    before = snapshot(model)
    error = said(model.load_adapter, repo, "new") if beside else said(PeftModel.from_pretrained, model, repo)
    assert_untouched(model, before)
    return error, load(repo, force_download=True)


def run_snippets(page):
    os.environ["HF_TOKEN"] = TOKEN  # as after `hf auth login`
    here, names = os.getcwd(), {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
                exec(snippet, names)
        finally:
            os.chdir(here)
            del os.environ["HF_TOKEN"]


def call_home():
    error = said(urlopen, "https://huggingface.co", timeout=5)
    left().pop()  # the attempt that was meant to be made
    return error


# There and back -----------------------------------------------------------------------------------------------------


def test_a_pushed_adapter_answers_the_same_for_whoever_loads_it_its_head_included(hub, there, pushed):
    repo, expected = pushed
    assert set(hub.repos[repo].files()) == {".gitattributes", "README.md", "adapter_config.json", WEIGHTS}
    assert there(load, repo) == expected
    assert there(load_without_a_base, repo) == expected


def test_what_was_loaded_once_loads_without_a_network(there, pushed):
    repo, expected = pushed
    there(load, repo)
    assert there(load_offline, repo) == expected


def test_a_revision_is_a_commit_or_a_branch(hub, there):
    repo = f"{USER}/revisions"
    first = there(push, repo, std=0.2)
    commit = hub.repos[repo].branches["main"]
    trial = there(push, repo, std=0.3, revision="trial")
    second = there(push, repo, std=0.4)
    assert len({str(answer) for answer in (first, trial, second)}) == 3
    assert there(load, repo, revision=commit) == first
    assert there(load, repo, revision="trial") == trial
    assert there(load, repo, revision="main") == there(load, repo) == second
    error = there(said, load, repo, revision="nowhere")
    assert re.search("Can't find 'adapter_config.json'.*RevisionNotFoundError", error, re.DOTALL)


def test_one_repository_holds_several_adapters_each_in_a_folder_of_its_name(there):
    repo = f"{USER}/several"
    calm = there(push, repo, name="calm", std=0.2)
    wild = there(push, repo, name="wild", std=0.4)
    assert there(load, repo, subfolder="calm") == calm
    assert there(load_two, repo, "wild", "calm") == [wild, calm]


def test_a_private_adapter_wants_a_token_and_shows_it_to_the_hub_alone(hub, there):
    repo = f"{USER}/private"
    expected = there(push, repo, private=True)
    for token in (None, False, "hf_another"):
        error = there(said, load, repo, token=token)
        assert re.search(
            f"Can't find 'adapter_config.json' at '{repo}'.*RepositoryNotFoundError.*make sure you are authenticated",
            error,
            re.DOTALL,
        )
    assert there(load, repo, token=TOKEN) == expected
    storage = [token for _, host, _, token in hub.requests if host.startswith("localhost")]
    assert storage
    assert set(storage) == {None}


def test_a_push_without_a_token_is_refused(hub, there):
    error = there(said, push, f"{USER}/nobody", token=False)
    assert re.search("401 Unauthorized.*api/repos/create", error, re.DOTALL)
    assert f"{USER}/nobody" not in hub.repos


def test_a_folder_that_is_uploaded_has_its_card(hub, there):
    elp, lora = f"{USER}/with-elp", f"{USER}/with-lora"
    expected = there(push_folder, elp)
    there(push_folder, lora, LoraConfig(target_modules=["intermediate_dense"]))
    data, text = there(card, elp)
    lora_data, _ = there(card, lora)
    assert lora_data["tags"] == sorted([f"base_model:adapter:{BASE}", "lora", "transformers"])
    assert data == lora_data | {
        "pipeline_tag": "audio-classification",
        "tags": [f"base_model:adapter:{BASE}", "elp", "peft-elp", "transformers"],
    }
    assert f"[{BASE}](https://huggingface.co/{BASE})" in text
    assert there(load, elp) == expected


def test_an_adapter_of_the_hub_is_used_by_its_name(there, pushed):
    repo, expected = pushed
    assert there(load_for_recordings, repo) == expected
    assert there(said, load_for_recordings, f"{USER}/nothing").startswith(
        f"ValueError: There is no folder '{USER}/nothing', and no adapter of that name could be fetched from the Hub: "
        "RepositoryNotFoundError"
    )


def test_push_to_hub_keeps_a_card_that_is_there(hub, there):
    repo = f"{USER}/kept-card"
    there(push_folder, repo)
    before = there(card, repo)
    expected = there(push, repo, std=0.4, tags=["emotion"])
    data, text = there(card, repo)
    assert text == before[1]
    assert data == before[0] | {"tags": [*before[0]["tags"], "emotion"]}
    assert there(load, repo) == expected


def test_push_to_hub_writes_the_same_card_for_every_method_of_peft(hub, there, pushed):
    # Transformers' card in place of PEFT's, which is why the page on the Hub says how to keep the latter.
    there(push, f"{USER}/lora", config=LoraConfig(target_modules=["intermediate_dense"]))
    assert hub.repos[pushed[0]].files()["README.md"] == hub.repos[f"{USER}/lora"].files()["README.md"]


# What breaks on the way ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("healed")
@pytest.mark.parametrize(
    ("request_", "how", "message"),
    [
        (
            "PUT /storage/",
            500,
            "Error while uploading 'adapter_model.safetensors'.*500 Internal Server Error.*/storage/",
        ),
        ("PUT /storage/", "drop", f"Error while uploading 'adapter_model.safetensors'.*({HUNG_UP})"),
        ("POST .*/commit/", 500, "500 Internal Server Error.*/commit/main"),
        ("POST .*/commit/", "drop", HUNG_UP),
    ],
)
def test_an_upload_that_breaks_says_so_and_leaves_nothing_behind(hub, home, there, request_, how, message):
    repo = f"{USER}/broken-{re.sub('[^a-z]', '', request_.lower())}-{how}"
    hub.fail(request_, how, times=99)
    temporary = home / "temporary"
    before = set(temporary.iterdir())
    assert re.search(message, there(push_in_vain, repo), re.DOTALL)
    assert set(hub.repos[repo].files()) == {".gitattributes"}
    assert len(hub.repos[repo].commits) == 1
    assert set(temporary.iterdir()) == before
    hub.faults.clear()
    expected = there(push, repo)
    assert there(load, repo) == expected


def test_a_connection_that_breaks_once_is_taken_up_again(hub, there, pushed):
    repo = f"{USER}/hiccup"
    hub.create(repo, files=hub.repos[pushed[0]].files())
    hub.fail("GET /storage/", "cut")
    assert there(load, repo) == pushed[1]
    assert not any(fault.times for fault in hub.faults)


@pytest.mark.usefixtures("healed")
@pytest.mark.parametrize("beside", [False, True], ids=["onto a base", "beside an adapter"])
@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (("cut", 503), "HfHubHTTPError: .*503 Service Unavailable"),  # it tries to go on, and the server is gone
        (("short",), "OSError: Consistency check failed: file should be of size"),
    ],
)
def test_a_download_that_breaks_leaves_model_and_cache_as_they_were(hub, there, pushed, faults, message, beside):
    repo = f"{USER}/{faults[0]}-{beside}"
    hub.create(repo, files=hub.repos[pushed[0]].files())
    for how in faults:
        hub.fail("GET /storage/", how)
    error, cached, incomplete, answered = there(load_broken, repo, beside)
    assert re.search(message, error, re.DOTALL)
    assert cached is None
    assert incomplete == []
    assert answered == pushed[1]


@pytest.mark.parametrize("beside", [False, True], ids=["onto a base", "beside an adapter"])
def test_a_file_that_broke_in_the_cache_leaves_the_model_as_it_was_and_can_be_fetched_again(there, pushed, beside):
    repo, expected = pushed
    error, answered = there(load_from_a_broken_cache, repo, beside)
    assert re.search(f"ValueError: The weights of the adapter '{repo}' are broken or cut short.*force_download", error)
    assert answered == expected


# The page, and the machine ------------------------------------------------------------------------------------------


def test_the_snippets_of_the_page_run(hub, there):
    page = (DOCS / "how-to/share-on-the-hub.md").read_text()
    there(run_snippets, page)
    named = set(re.findall(rf'"({USER}/[\w-]+)"', page))
    assert named
    assert named <= hub.repos.keys()


def test_the_client_cannot_leave_this_machine(there):
    assert "PermissionError: a test reached for huggingface.co" in there(call_home)
