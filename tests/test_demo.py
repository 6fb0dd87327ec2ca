"""The page to try adapters on a voice, and the files of a Space."""

import gc
import json
import re
import shutil
import sys
import warnings

import pytest
import torch
import yaml
from on_disk import LABELS

from peft_elp.serving import demo
from peft_elp.serving.engine import Engine
from peft_elp.speech.inference import SpeechAdapter
from peft_elp_command import main

pytest_plugins = ["saved_adapters"]
# gradio leaves event loops and sockets open.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning"
)
BROWSERS = ("chromium", "google-chrome", "chromium-browser")


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    with warnings.catch_warnings():  # Else what gradio leaves open would be reported later, in another test.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def engine(folders):
    return Engine(folders, device="cpu")


def answers(page):
    """What the buttons of a page do, by the name of their endpoint."""
    return {function.api_name: function.fn for function in page.fns.values()}


def test_a_page_needs_all_adapters_in_memory(folders):
    pytest.importorskip("gradio")
    with pytest.raises(ValueError, match=f"limit must be at least {len(folders)} for a page .* got 1"):
        demo.make_page(Engine(folders, limit=1, device="cpu"))


def test_the_page_gives_the_answers_of_the_adapters(files, engine, loaded):
    pytest.importorskip("gradio")
    found = answers(demo.make_page(engine))
    assert found["transcribe"](files[0]) == loaded("ForCTC").transcribe(files[0])
    labels = found["classify"](files[0])
    assert list(labels) == [label["label"] for label in loaded("ForSequenceClassification").classify(files[0])]
    assert sorted(labels) == sorted(LABELS)
    score, verdict = found["verify"](*files[:2])
    comparison = loaded("ForXVector").verify(*files[:2])
    assert score == pytest.approx(comparison.score, abs=1e-6)
    assert verdict == f"{'the same voice' if comparison.same else 'different voices'}, threshold 0.25"
    scores = list(labels.values())
    engine._loaded["ForSequenceClassification"].labels.update(dict.fromkeys(range(3), "yes"))
    assert found["classify"](files[0]) == dict(zip(["yes", "yes #2", "yes #3"], scores, strict=True))


def test_what_is_wrong_with_a_recording_is_one_sentence_without_the_paths_of_the_server(
    engine, files, folder, tmp_path, monkeypatch
):
    gradio = pytest.importorskip("gradio")
    engine._loaded["ForXVector"].speech.max_duration_s = 0.2
    monkeypatch.setattr(SpeechAdapter, "_decode", lambda *_: torch.empty(2**60))
    page = demo.make_page(engine)
    found = answers(page)
    assert not page.analytics_enabled
    assert page.delete_cache
    shown = json.dumps(page.get_config_file(), default=str)
    assert '"value": "base"' in shown
    assert str(folder) not in shown
    (tmp_path / "<b>.wav").write_bytes(b"RIFF")
    for command, recordings, message in (
        ("verify", (files[1], None), r"Upload or record a voice first\."),
        ("verify", files[:2], r"0\.wav: it is too long, 0\.25 s; at most 0\.2 s [^/]*\."),
        ("classify", (str(tmp_path / "<b>.wav"),), r"&lt;b&gt;\.wav: [^/]*"),  # The page reads HTML.
        ("transcribe", (files[0],), r"The recording could not be answered\."),
    ):
        with pytest.raises(gradio.Error) as raised:
            found[command](*recordings)
        assert re.fullmatch(message, raised.value.message)
        assert raised.value.print_exception == (
            command == "transcribe"
        )  # The terminal says what is not the visitor's.


def test_the_command_serves_this_machine_alone(folders, monkeypatch):
    gradio = pytest.importorskip("gradio")
    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: launched.append((answers(self), options)))
    assert main(["demo", folders["ForCTC"], folders["ForXVector"], "--port", "7999"]) == 0
    ((found, options),) = launched
    assert {*found} >= {"transcribe", "verify"}
    limits = {"share": False, "max_file_size": demo.MAX_UPLOAD}
    assert options == {"server_name": "127.0.0.1", "server_port": 7999, **limits}


def test_a_visitor_gets_answers_in_a_real_browser(engine, loaded, files):
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    program = next((program for name in BROWSERS if (program := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"none of {BROWSERS} is installed")
    page = demo.make_page(engine)
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
                    tab.locator("input[type=file]").first.set_input_files(upload)
                    tab.get_by_label("Play").nth(place).wait_for()
                tab.get_by_role("button", name=button).click()
                return tab

            expect, (one, other) = sync_api.expect, files[:2]
            tab = answer("ForCTC", "Transcribe", one)
            expect(tab.get_by_role("textbox", name="Text")).to_have_value(loaded("ForCTC").transcribe(one))
            tab = answer("ForSequenceClassification", "Classify", one)
            best = loaded("ForSequenceClassification").classify(one)[0]
            expect(tab).to_contain_text(re.compile(rf"{best['label']}\s*{100 * best['score']:.0f}%"))
            tab = answer("ForXVector", "Compare", one, other)
            same = loaded("ForXVector").verify(one, other).same
            verdict = f"{'the same voice' if same else 'different voices'}, threshold 0.25"
            expect(tab.get_by_role("textbox", name="Answer")).to_have_value(verdict)
            expect(tab).to_contain_text("Layer weights")
    finally:
        page.close()


def test_without_gradio_the_extra_is_named(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", folders["ForCTC"]]) == 1
    assert "pip install 'peft-elp[demo]'" in capsys.readouterr().err


def test_a_space_is_written_and_quotes_what_others_wrote(folders, tmp_path, capsys):
    pytest.importorskip("gradio")
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
    assert (space / "requirements.txt").read_text() == f"./{demo.wheel_name()}[demo]\n"
    assert main(["demo", "me/emotions", "--space", str(space)]) == 1
    assert "already has README.md" in capsys.readouterr().err
    (space / "adapters.json").write_text(json.dumps({"words": folders["ForSequenceClassification"]}))
    names = {"__file__": str(space / "app.py"), "__name__": "app"}
    exec(compile((space / "app.py").read_text(), space / "app.py", "exec"), names)
    assert "classify" in answers(names["page"])
    assert "page.launch(max_file_size=MAX_UPLOAD)" in (space / "app.py").read_text()
