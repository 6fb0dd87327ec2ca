"""A page in the browser to try adapters on one's own voice, and the files of a Hugging Face Space with such a page.

Needs gradio: `pip install 'peft-elp[demo]'`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from peft_elp.saved.card import wheel_name
from peft_elp.saved.folder import is_hub_id
from peft_elp.speech.inference import SpeechAdapter
from peft_elp.speech.plots import layer_weights

from .engine import Engine, Request, compare

MAX_UPLOAD = "50mb"  # 13 minutes of 16-bit stereo at 32 kHz; `max_duration_s` of the adapters limits the duration
ONE_AT_A_TIME = "adapters"  # The tabs share a backbone, and the cores of one machine.
APP = '''"""Try the adapters on a recording."""

import json
from pathlib import Path

from peft_elp.serving.demo import MAX_UPLOAD, make_page
from peft_elp.serving.engine import Engine

adapters = json.loads(Path(__file__).with_name("adapters.json").read_text(encoding="utf-8"))
page = make_page(Engine(adapters))

if __name__ == "__main__":
    page.launch(max_file_size=MAX_UPLOAD)
'''


def import_gradio() -> Any:
    """Import gradio.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return import_module("gradio")
    except ImportError as error:
        raise ImportError(f"The demo page needs gradio ({error}): pip install 'peft-elp[demo]'") from error


def make_page(engine: Engine) -> Any:
    """Make a page with a tab for each adapter, where a voice is uploaded or recorded and the answer is shown.

    A recogniser shows text, a classifier its labels with their scores, and an adapter for voices compares two of them.
    Beside the answer are the layer weights of the L-adapter.

    Args:
        engine: The engine with the adapters. Each adapter gets a tab with its name.

    Returns:
        A `gradio.Blocks`. Serve it with `launch(max_file_size=MAX_UPLOAD)`: without a limit, gradio takes uploads of
        any size. Recordings longer than the adapter's `max_duration_s` are refused before they are decoded.

    Raises:
        ImportError: gradio is not installed.
        ValueError: The page cannot show the head of an adapter, or `engine` does not keep all adapters in memory.

    Examples:
        >>> page = make_page(Engine({"emotions": "me/emotions"}))  # doctest: +SKIP
        >>> page.launch(max_file_size=MAX_UPLOAD)  # doctest: +SKIP
    """
    gradio = import_gradio()
    if len(engine._loaded) < (count := len(engine.adapters)):
        raise ValueError(f"limit must be at least {count} for a page with {count} adapters, got {engine.limit}.")
    tasks = {name: _task(name, engine._loaded[name].speech) for name in engine.adapters}
    # What is recorded stays here: nothing is reported, and uploaded voices are deleted after an hour.
    with gradio.Blocks(title="peft_elp", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown("# Try the adapter" if len(tasks) == 1 else "# Try the adapters")
        with gradio.Tabs():
            for name, task in tasks.items():
                with gradio.Tab(name), gradio.Row():
                    with gradio.Column():
                        task(gradio, engine, name)
                    with gradio.Column():
                        _show(gradio, engine, name)
    return page


def write_space(folder: str | Path, adapters: Mapping[str, str], title: str = "Speech adapters") -> None:
    """Write the files of a Hugging Face Space that shows adapters from the Hub.

    Args:
        folder: Where to write `README.md`, `app.py`, `adapters.json` and `requirements.txt`. It is made if need be.
            Until peft_elp is released, add the wheel that `requirements.txt` names.
        adapters: Names of the adapters on the Hub, or of folders beside `app.py`, by the name of their tab.
        title: Title of the Space.

    Raises:
        ValueError: The folder already has one of these files.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_space(folder, {"emotions": "me/emotions"})
        ...     sorted(file.name for file in Path(folder).iterdir())
        ['README.md', 'adapters.json', 'app.py', 'requirements.txt']
    """
    card: dict[str, Any] = {"title": title, "sdk": "gradio", "app_file": "app.py", "models": list(adapters.values())}
    files = {
        # JSON is YAML too, and quotes what comes from others.
        "README.md": "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in card.items()) + "\n---\n",
        "app.py": APP,
        "adapters.json": json.dumps(dict(adapters), indent=2) + "\n",
        "requirements.txt": f"./{wheel_name()}[demo]\n",
    }
    taken = [name for name in files if Path(folder, name).exists()]
    if taken:
        raise ValueError(f"{folder} already has {', '.join(taken)}. Name a new folder for the Space.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        Path(folder, name).write_text(text, encoding="utf-8")


def _task(name: str, adapter: SpeechAdapter) -> Callable[[Any, Engine, str], None]:
    if adapter.task != "classify" or adapter.saved.num_labels:
        return {"transcribe": _transcribing, "verify": _verifying, "classify": _classifying}[adapter.task]
    raise ValueError(
        f"Adapter {name!r} has the head of {adapter.saved.model_class} and no tokenizer, which no page can show. It "
        "has to recognise speech, name labels or compare voices."
    )


def _voice(gradio: Any, label: str) -> Any:
    return gradio.Audio(sources=["upload", "microphone"], type="filepath", label=label)


def _answering(
    gradio: Any, engine: Engine, name: str, task: Any, show: Callable[..., Any] = lambda answer: answer
) -> dict[str, Any]:
    """Return what a button does: it shows answers; what is wrong with a recording is told on the page alone."""

    def answered(*recordings: str | None) -> Any:
        if not all(recordings):
            raise gradio.Error("Upload or record a voice first.", print_exception=False)
        answers = engine.answer([Request(name, task, recording) for recording in recordings if recording])
        for error in answers:
            if isinstance(error, ValueError):  # It names the file on the server; the visitor knows the last part.
                message = str(error)
                for recording in filter(None, recordings):
                    message = message.replace(recording, Path(recording).name)
                raise gradio.Error(escape(message), print_exception=False)  # The page reads HTML.
            if isinstance(error, Exception):
                raise gradio.Error("The recording could not be answered.") from error  # The terminal tells why.
        return show(*answers)

    return {"fn": answered, "concurrency_id": ONE_AT_A_TIME}


def _transcribing(gradio: Any, engine: Engine, name: str) -> None:
    voice, text = _voice(gradio, "Voice"), gradio.Textbox(label="Text")
    run = gradio.Button("Transcribe", variant="primary")
    does = _answering(gradio, engine, name, "transcribe")
    run.click(inputs=voice, outputs=text, api_name="transcribe", **does)


def _classifying(gradio: Any, engine: Engine, name: str) -> None:
    voice, labels = _voice(gradio, "Voice"), gradio.Label(label="Labels", num_top_classes=10)
    run = gradio.Button("Classify", variant="primary")

    def show(answer: Any) -> dict[str, float]:
        scores: dict[str, float] = {}
        for one in answer:
            same = sum(label.split(" #")[0] == one["label"] for label in scores)
            scores[f"{one['label']} #{same + 1}" if same else one["label"]] = one["score"]
        return scores

    does = _answering(gradio, engine, name, "classify", show)
    run.click(inputs=voice, outputs=labels, api_name="classify", **does)


def _verifying(gradio: Any, engine: Engine, name: str) -> None:
    first, second = _voice(gradio, "First voice"), _voice(gradio, "Second voice")
    score, verdict = gradio.Number(label="Score, from -1 to 1", precision=3), gradio.Textbox(label="Answer")
    run = gradio.Button("Compare", variant="primary")

    def show(one: Any, other: Any) -> tuple[float, str]:
        found = compare(one, other, engine.threshold(name))
        if found.same is None:
            return found.score, "The adapter names no threshold."
        return found.score, f"{'the same voice' if found.same else 'different voices'}, threshold {found.threshold}"

    does = _answering(gradio, engine, name, "embed", show)
    run.click(inputs=[first, second], outputs=[score, verdict], api_name="verify", **does)


def _show(gradio: Any, engine: Engine, name: str) -> None:
    """Show what an adapter is: its base, and the layer weights of its L-adapter."""
    import pandas  # gradio brings it.

    loaded = engine._loaded[name]
    saved = loaded.speech.saved
    base = str(saved.base)
    gradio.Textbox(base if is_hub_id(base) else Path(base).name, label="Base", interactive=False)
    if "L" in str(saved.config.get("adapters")):
        weights = pandas.DataFrame(layer_weights(loaded.speech.model, loaded.key), columns=["layer", "share"])
        weights["layer"] = weights["layer"].astype(str)
        top = 1.1 * weights["share"].max()
        gradio.BarPlot(weights, x="layer", y="share", title="Layer weights", sort=None, y_lim=[0, top])
