"""The page to try adapters on a voice, and the files of a Space."""

import ast
import gc
import json
import re
import shutil
import sys
import warnings

import pytest
import torch
import yaml
from on_disk import LABELS, adapted, record, save_base, save_tokenizer

from peft_elp.cli import main
from peft_elp.speech import demo
from peft_elp.speech.inference import SpeechAdapter

# gradio leaves event loops and sockets open.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning"
)
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
COMMANDS = {"ForCTC": "transcribe", "ForSequenceClassification": "classify", "ForXVector": "verify"}


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    with warnings.catch_warnings():  # Else what gradio leaves open would be reported later, in another test.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    base = save_base(folder / "base")
    for head in COMMANDS:
        model = adapted(base, head)
        model.peft_config["default"].verification_threshold = 0.25 if head == "ForXVector" else None
        model.save_pretrained(folder / head)
    save_tokenizer(folder / "ForCTC")
    for seed in range(2):
        record(folder / f"{seed}.wav", 3000 - 500 * seed, seed)
    return folder


@pytest.fixture
def adapters(folder):
    return {head: SpeechAdapter.from_pretrained(folder / head) for head in COMMANDS}


def answers(page):
    """What the buttons of a page do, by the name of their endpoint."""
    return {function.api_name: function.fn for function in page.fns.values()}


def test_the_page_gives_the_answers_of_the_adapters(folder, adapters):
    pytest.importorskip("gradio")
    one, other = str(folder / "0.wav"), str(folder / "1.wav")
    expected = {head: SpeechAdapter.from_pretrained(folder / head) for head in COMMANDS}
    found = answers(demo.make_page(adapters))
    assert found["transcribe"](one) == expected["ForCTC"].transcribe(one)
    labels = found["classify"](one)
    assert list(labels) == [label["label"] for label in expected["ForSequenceClassification"].classify(one)]
    assert sorted(labels) == sorted(LABELS)
    score, verdict = found["verify"](one, other)
    comparison = expected["ForXVector"].verify(one, other)
    assert score == pytest.approx(comparison.score, abs=1e-6)
    assert verdict == f"{'the same voice' if comparison.same else 'different voices'}, threshold 0.25"


def test_adapters_on_one_base_have_one_backbone_in_memory(adapters, folder):
    other = SpeechAdapter.from_pretrained(folder / "ForCTC", base=save_base(folder / "other", num_hidden_layers=3))
    with torch.no_grad():
        other.model.get_base_model().wavlm.feature_projection.projection.bias.add_(1)
    demo.share_backbones([*adapters.values(), other])
    places = {
        name: adapter.model.get_base_model().wavlm.feature_projection.projection.weight.data_ptr()
        for name, adapter in {**adapters, "other": other}.items()
    }
    assert len({places[head] for head in COMMANDS}) == 1
    assert places["other"] not in {places[head] for head in COMMANDS}


def test_what_is_wrong_with_a_recording_is_shown(adapters, folder, tmp_path):
    gradio = pytest.importorskip("gradio")
    found = answers(demo.make_page(adapters))
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    with pytest.raises(gradio.Error, match="Record or upload a voice first"):
        found["verify"](str(folder / "0.wav"), None)
    with pytest.raises(gradio.Error, match=r"broken\.wav"):
        found["classify"](str(tmp_path / "broken.wav"))


def test_the_page_keeps_voices_to_itself_and_reads_no_html_of_others(adapters, tmp_path):
    gradio = pytest.importorskip("gradio")
    page = demo.make_page(adapters)
    assert not page.analytics_enabled
    assert page.delete_cache
    (tmp_path / "<b>.wav").write_bytes(b"RIFF")
    with pytest.raises(gradio.Error, match=r"&lt;b&gt;\.wav"):
        answers(page)["classify"](str(tmp_path / "<b>.wav"))


def test_a_page_needs_adapters():
    pytest.importorskip("gradio")
    with pytest.raises(ValueError, match="at least one adapter"):
        demo.make_page({})


def test_the_command_serves_this_machine_alone(folder, monkeypatch, capsys):
    gradio = pytest.importorskip("gradio")
    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: launched.append((answers(self), options)))
    assert main(["demo", str(folder / "ForCTC"), str(folder / "ForXVector"), "--port", "7999"]) == 0
    ((found, options),) = launched
    assert {*found} >= {"transcribe", "verify"}
    assert options == {"server_name": "127.0.0.1", "server_port": 7999, "share": False}


def test_a_visitor_gets_answers_in_a_real_browser(adapters, folder):
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    program = next((program for name in BROWSERS if (program := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"none of {BROWSERS} is installed")
    page = demo.make_page(adapters)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        with sync_api.sync_playwright() as playwright:
            visit = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"]).new_page()
            visit.goto(address)

            def answer(head, button, *uploads):
                """The tab of an adapter, after recordings were uploaded and the button was pressed."""
                visit.get_by_role("tab", name=head).click()
                tab = visit.locator("[role=tabpanel]:visible")
                tab.get_by_role("button", name=button).wait_for()
                for place, upload in enumerate(uploads):
                    tab.get_by_label("Upload file").nth(place).click()
                    tab.locator("input[type=file]").first.set_input_files(folder / upload)
                    tab.get_by_label("Play").nth(place).wait_for()
                tab.get_by_role("button", name=button).click()
                return tab

            expect, one, other = sync_api.expect, folder / "0.wav", folder / "1.wav"
            tab = answer("ForCTC", "Transcribe", "0.wav")
            expect(tab.get_by_role("textbox", name="Text")).to_have_value(adapters["ForCTC"].transcribe(one))
            tab = answer("ForSequenceClassification", "Classify", "0.wav")
            best = adapters["ForSequenceClassification"].classify(one)[0]
            expect(tab).to_contain_text(re.compile(rf"{best['label']}\s*{100 * best['score']:.0f}%"))
            tab = answer("ForXVector", "Compare", "0.wav", "1.wav")
            same = adapters["ForXVector"].verify(one, other).same
            verdict = f"{'the same voice' if same else 'different voices'}, threshold 0.25"
            expect(tab.get_by_role("textbox", name="Answer")).to_have_value(verdict)
            expect(tab).to_contain_text("Layer weights")
    finally:
        page.close()


def test_without_gradio_the_extra_is_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(folder / "ForCTC")]) == 1
    assert "pip install 'peft-elp[demo]'" in capsys.readouterr().err


def test_a_space_is_written_and_quotes_what_others_wrote(folder, tmp_path, capsys):
    space, evil = tmp_path / "space", "me/x\n---\nsdk: static"
    assert main(["demo", "me/emotions", evil, "--space", str(space)]) == 0
    assert demo.wheel_name() in capsys.readouterr().out
    _, card, _ = (space / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(card) == {
        "title": "Speech adapters",
        "sdk": "gradio",
        "app_file": "app.py",
        "models": ["me/emotions", evil],
    }
    assert list(json.loads((space / "adapters.json").read_text()).values()) == ["me/emotions", evil]
    ast.parse((space / "app.py").read_text())
    assert (space / "requirements.txt").read_text() == f"./{demo.wheel_name()}[demo]\n"
    assert main(["demo", "me/emotions", "--space", str(space)]) == 1
    assert "already has README.md" in capsys.readouterr().err


def test_the_app_of_a_space_makes_the_page(folder, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    demo.write_space(tmp_path / "space", {"words": str(folder / "ForSequenceClassification")})
    names = {"__file__": str(tmp_path / "space" / "app.py"), "__name__": "app"}
    exec(compile((tmp_path / "space" / "app.py").read_text(), names["__file__"], "exec"), names)
    assert "classify" in answers(names["page"])
