"""An adapter goes to the Hub and comes back as any other of PEFT's: the real client, a server on this machine."""

import re
import tempfile
from itertools import count
from pathlib import Path

import pytest
import torch
from backbones import ELP, shaken
from hub import TOKEN, USER, client, left, serving
from huggingface_hub import HfApi, ModelCard, constants, try_to_load_from_cache
from on_disk import save_base
from peft import AutoPeftModel, PeftModel, get_peft_model
from transformers import AutoModelForAudioClassification
from untouched import assert_untouched, logits, snapshot

from peft_elp import ELPConfig
from peft_elp.speech.inference import SpeechAdapter

BASE = "microsoft/wavlm-base-plus"  # a tiny one of that name
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def hub():
    with serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def there(hub, tmp_path_factory):
    """Runs a function where the client's Hub is ours."""
    with client(hub, tmp_path_factory.mktemp("client")) as there:
        hub.create(BASE, files=there(base_files))
        yield there
        assert there(left) == [], "the client tried to leave this machine"
        assert set(hub.unknown) <= {"GET /api/agent-harnesses"}, "the server did not know what to answer"


@pytest.fixture(scope="module")
def pushed(there):
    """A pushed adapter, and what it answers."""
    return f"{USER}/pushed", there(push, f"{USER}/pushed")


# In the client's process --------------------------------------------------------------------------------------------


def base_files():
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


SEEDS = count()


def backbone():
    """The base from the Hub, which holds no head: the head is another one each time."""
    torch.manual_seed(next(SEEDS))
    return AutoModelForAudioClassification.from_pretrained(BASE, num_labels=4)


def adapted(name="default", std=0.2):
    return shaken(get_peft_model(backbone(), ELPConfig(**ELP), adapter_name=name), std)


def answer(model):
    return logits(model.eval()).tolist()


def push(repo, std=0.2, name="default", **options):
    model = adapted(name, std)
    model.push_to_hub(repo, token=TOKEN, **options)
    return answer(model)


def push_folder(repo):
    """What PEFT wrote, as it is."""
    with tempfile.TemporaryDirectory() as folder:
        model = adapted()
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


def load_in_vain(repo, beside):
    """The error, when nothing of it is left."""
    model = adapted() if beside else backbone()
    expected, before = answer(model), snapshot(model)
    error = said(model.load_adapter, repo, "new") if beside else said(PeftModel.from_pretrained, model, repo)
    assert_untouched(model, before)
    assert list(getattr(model, "peft_config", {})) == (["default"] if beside else [])
    assert answer(model) == expected
    assert try_to_load_from_cache(repo, WEIGHTS) is None
    return error


def test_a_pushed_adapter_answers_the_same_its_head_included_and_later_without_a_network(hub, there, pushed):
    repo, expected = pushed
    assert set(hub.repos[repo].files()) == {".gitattributes", "README.md", "adapter_config.json", WEIGHTS}
    assert there(load, repo) == expected
    assert there(load_without_a_base, repo) == expected
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


def test_a_private_adapter_wants_a_token(there):
    repo = f"{USER}/private"
    expected = there(push, repo, private=True)
    for token in (None, False, "hf_another"):
        error = there(said, load, repo, token=token)
        assert re.search(f"Can't find 'adapter_config.json' at '{repo}'.*RepositoryNotFoundError", error, re.DOTALL)
    assert there(load, repo, token=TOKEN) == expected


def test_a_folder_that_is_uploaded_has_its_card_which_a_push_keeps(there):
    repo = f"{USER}/uploaded"
    expected = there(push_folder, repo)
    data, text = there(card, repo)
    assert data["pipeline_tag"] == "audio-classification"
    assert data["tags"] == [f"base_model:adapter:{BASE}", "elp", "peft-elp", "transformers"]
    assert f"[{BASE}](https://huggingface.co/{BASE})" in text
    assert there(load, repo) == expected
    expected = there(push, repo, std=0.4)
    assert there(card, repo) == (data, text)
    assert there(load, repo) == expected


def test_an_adapter_of_the_hub_is_used_by_its_name(there, pushed):
    repo, expected = pushed
    assert there(load_for_recordings, repo) == expected
    assert there(said, load_for_recordings, f"{USER}/nothing").startswith(
        f"ValueError: There is no folder '{USER}/nothing', and no adapter of that name could be fetched from the Hub: "
        "RepositoryNotFoundError"
    )


@pytest.mark.parametrize("beside", [False, True], ids=["onto a base", "beside an adapter"])
def test_a_download_that_fails_leaves_the_model_as_it_was_and_can_be_tried_again(hub, there, pushed, beside):
    repo = f"{USER}/fails-{beside}"
    hub.create(repo, files=hub.repos[pushed[0]].files())
    hub.faults = {f"GET /{repo}/resolve/.*/{WEIGHTS}"}
    assert "503 Service Unavailable" in there(load_in_vain, repo, beside)
    hub.faults = set()
    assert there(load, repo) == pushed[1]
