"""The command `peft-elp`: look at a saved adapter, and try it on recordings.

It lies beside the package: importing any module of `peft_elp` imports PyTorch, for which a help text should not wait.
"""

from __future__ import annotations

import csv
import inspect
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from peft_elp.speech.inference import SpeechAdapter

BAR = 40  # characters, for the largest layer weight
SHOWN = 100  # labels
HIGHEST = 1 - 1e-6  # threshold that a configuration takes
LONGEST = 2000  # characters of an error
TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
COLUMNS = {"text": ["text"], "labels": ["label", "score"]}

Answer = Callable[[Sequence[str]], Sequence[Any]]
Write = Callable[[str, Any, str | None], None]
say = partial(print, flush=True)

app = typer.Typer(
    help="Look at a saved ELP-adapter, and try it on recordings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --batch_size is --batch-size
    },
)


def _option(group: str, help_text: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=group, **options)


def _table(path: str | None) -> str | None:
    if path is not None and Path(path).suffix not in (".csv", ".jsonl"):
        raise typer.BadParameter(f"a .csv or .jsonl file is needed, got {path!r}")
    return path


def _version(wanted: bool) -> None:
    if wanted:
        say(f"peft-elp {version('peft-elp')}")
        raise typer.Exit


Adapter = Annotated[str, typer.Argument(help="The folder of an adapter, or its name on the Hub.", show_default=False)]
Files = Annotated[
    list[str],
    typer.Argument(help="Recordings (WAV, FLAC, MP3, OGG, ...), folders of them, or patterns.", metavar="FILE..."),
]
Recording = Annotated[str, typer.Argument(help="A recording.", show_default=False)]
Subfolder = Annotated[str | None, _option("Adapter", "The folder inside of it, if it holds several adapters.")]
Revision = Annotated[str | None, _option("Adapter", "A branch or a commit on the Hub.")]
Base = Annotated[str | None, _option("Model", "Folder or Hub name of the base, if it is not where the adapter says.")]
Device = Annotated[str | None, _option("Model", "Such as cpu, cuda or mps. Default: cuda if there is one, else cpu.")]
Dtype = Annotated[
    str | None, _option("Model", "Such as bfloat16. Default: float32 on a CPU, else as in the base's checkpoint.")
]
MaxDuration = Annotated[
    float | None, _option("Model", "Seconds above which a recording is too long. Default: 120, or the base's window.")
]
OnLongAudio = Annotated[
    str | None, _option("Model", "What to do with one: error, skip, crop, or split and average the answers.")
]
BatchSize = Annotated[int, _option("Answers", "How many to answer at a time.", min=1)]
AsJson = Annotated[bool, _option("Answers", "Print JSON, one object on each line.", "--json")]
Output = Annotated[
    str | None, _option("Answers", "Write the answers to a .csv or .jsonl file instead of printing.", callback=_table)
]


def _with_loading(command: Callable[..., None]) -> Callable[..., None]:
    """Put the options of `_load` in the place of `**loading`."""
    *own, _ = inspect.signature(command, eval_str=True).parameters.values()
    shared = {"base": Base, "device": Device, "dtype": Dtype, "max_duration": MaxDuration}
    shared |= {"on_long_audio": OnLongAudio, "subfolder": Subfolder, "revision": Revision}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
        for name, hint in shared.items()
    ]
    command.__signature__ = inspect.Signature([*own, *added])  # pyright: ignore[reportFunctionMemberAccess]
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments. Default: those of the process.

    Returns:
        0; 1 if something could not be answered, and standard error says what, or if the reader of a pipe stopped
        reading; 2 for wrong arguments.

    Examples:
        >>> main(["info", "./nowhere"])
        1
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # These are for programmers.
            warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")  # Transformers' WavLM
            warnings.filterwarnings("ignore", ".*it is silent, all samples are 0")  # An error says so as well.
            warnings.showwarning = lambda message, *_: _complain(message)
            app(argv, prog_name="peft-elp")
    except SystemExit as left:
        return int(left.code or 0)
    except (ValueError, ImportError, OSError, RuntimeError, MemoryError) as error:
        _complain(error)
    return 1


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None: ...


@app.command(rich_help_panel="Look")
def info(adapter: Adapter, subfolder: Subfolder = None, revision: Revision = None, as_json: AsJson = False) -> None:
    """Print what an adapter consists of; loads no model."""
    from peft_elp.saved.card import read_metadata, read_results
    from peft_elp.saved.folder import find_adapter, read_adapter
    from peft_elp.wording import shortened

    saved = read_adapter(find_adapter(adapter, subfolder, revision))
    card = read_metadata(saved.folder)
    results = [
        {"data": one.dataset_name, "split": one.dataset_split, "metric": one.metric_type, "value": one.metric_value}
        for one in read_results(saved.folder)
    ]
    facts = {"base": saved.base, "model": saved.model_class, "task": saved.task}
    facts |= {"adapters": saved.config.get("adapters"), "license": card.get("license")}
    facts |= {name: saved.config.get(name) for name in ("chunk_length", "verification_threshold", "peft_version")}
    facts["training"] = training = card.get("training") if isinstance(card.get("training"), dict) else None
    if as_json:
        parts = {"parameters": saved.counts, "labels": saved.labels, "layer_weights": saved.layer_weights}
        say(_in_json({**facts, **parts, "results": results}))
        return
    words: dict[str, Any] = {name: facts[name] or "unknown" for name in ("base", "model", "task", "adapters")}
    words["labels"] = shortened(saved.labels, SHOWN) or (saved.num_labels and f"{saved.num_labels:,}, without names")
    words["window"] = facts["chunk_length"] and f"{facts['chunk_length']} s"
    words |= {"threshold": facts["verification_threshold"], "licence": facts["license"]}
    words["training"] = training and ", ".join(f"{name} {value}" for name, value in training.items())
    words |= {"PEFT": facts["peft_version"], "computes in": "float32 on a CPU, else the dtype of the base (--dtype)"}
    for name, value in words.items():
        if value is not None:
            say(f"{name:12}{_shown(str(value))}")
    say("\nparameters")
    for part, what in saved.sizes().items():
        say(f"  {part:11}{saved.counts[part]:>12,}  {_shown(what)}")
    say(f"  {'all':11}{sum(saved.counts.values()):>12,}")
    if saved.layer_weights:
        say("\nlayer weights")
        largest = max(share for _, share in saved.layer_weights)
        for layer, share in saved.layer_weights:
            say(f"  {layer:3} {share:.3f} {'#' * round(BAR * share / largest)}")
    if results:
        say("\nresults, according to its card")
        for one in results:
            say(" ", *(_shown(value) for value in one.values() if value is not None))


@app.command(rich_help_panel="Answer for recordings")
@_with_loading
def transcribe(
    adapter: Adapter,
    files: Files,
    batch_size: BatchSize = 1,
    output: Output = None,
    as_json: AsJson = False,
    **loading: Any,
) -> None:
    """Write down what is said."""
    loaded = _load(adapter, **loading)
    _each(files, loaded, partial(loaded.transcribe, batch_size=batch_size), "text", batch_size, output, as_json)


@app.command(rich_help_panel="Answer for recordings")
@_with_loading
def classify(
    adapter: Adapter,
    files: Files,
    top_k: Annotated[int, _option("Answers", "How many labels.", min=1)] = 1,
    batch_size: BatchSize = 1,
    output: Output = None,
    as_json: AsJson = False,
    **loading: Any,
) -> None:
    """Name the labels of recordings."""
    loaded = _load(adapter, **loading)
    answer = partial(loaded.classify, batch_size=batch_size, top_k=top_k)
    _each(files, loaded, answer, "labels", batch_size, output, as_json)


@app.command(rich_help_panel="Compare voices")
@_with_loading
def verify(
    adapter: Adapter,
    file_a: Recording,
    file_b: Recording,
    threshold: Annotated[float | None, _option("Answers", "The score of one voice. Default: the adapter's.")] = None,
    as_json: AsJson = False,
    **loading: Any,
) -> None:
    """Compare the voices of two recordings."""
    loaded = _load(adapter, **loading)
    found = loaded.verify(file_a, file_b, threshold=threshold)
    if loaded.saved.labels and loaded.saved.config.get("verification_threshold") is None:
        _complain("a warning: this adapter was trained to name labels, maybe not to tell voices apart.")
    if as_json:
        say(_in_json({"score": found.score, "threshold": found.threshold, "same": found.same}))
    elif found.same is None:
        say(f"{found.score:.3f}\tthe adapter names no threshold; give one with --threshold")
    else:
        say(f"{found.score:.3f}\t{'same voice' if found.same else 'different voices'}, threshold {found.threshold}")


@app.command(rich_help_panel="Compare voices")
@_with_loading
def trials(
    adapter: Adapter,
    list_file: Annotated[
        str, typer.Argument(help="Lines of `label file file`, or a .csv, .tsv or .jsonl table.", metavar="LIST")
    ],
    folder: Annotated[str | None, _option("Answers", "The folder of its paths. Default: its own folder.")] = None,
    save_threshold: Annotated[
        bool, _option("Answers", "Save the threshold at the equal error rate with the adapter.", "--save-threshold")
    ] = False,
    batch_size: BatchSize = 1,
    as_json: AsJson = False,
    **loading: Any,
) -> None:
    """Compare the voices of all pairs in a list, and measure the error rates."""
    from peft_elp import ELPConfig
    from peft_elp.speech.data import read_trials
    from peft_elp.speech.metrics import cosine_scores, equal_error_rate, equal_error_threshold, min_dcf

    pairs = read_trials(list_file, folder)
    files = sorted({file for trial in pairs for file in trial[1:]})
    loaded = _load(adapter, **loading)
    answer = partial(loaded.embed, batch_size=batch_size)
    answer([])
    found = _answers(files, answer, batch_size)
    voices: dict[Any, Any] = {file: voice for file, voice, _ in found if voice is not None}
    scored = [trial for trial in pairs if trial.file_a in voices and trial.file_b in voices]
    scores = cosine_scores(voices, [trial[1:] for trial in scored]) if scored else []
    for trial, score in zip(scored, map(float, scores), strict=True):
        if as_json:
            say(_in_json({**trial._asdict(), "score": score}))
        else:
            say(f"{score:.3f}", *map(_shown, trial), sep="\t")
    if lost := len(pairs) - len(scored):
        raise ValueError(f"{lost} of {len(pairs)} trials have no score, so no error rate is given.")
    labels = [trial.label for trial in pairs]
    rates = {"trials": len(pairs), "eer": equal_error_rate(labels, scores), "min_dcf": min_dcf(labels, scores)}
    rates["threshold"] = threshold = equal_error_threshold(labels, scores)
    text = "{trials:,} trials: equal error rate {eer:.2%} at the threshold {threshold:.3f}, minDCF {min_dcf:.3f}"
    say(_in_json(rates) if as_json else text.format(**rates))
    if save_threshold:
        config: Any = ELPConfig.from_pretrained(str(loaded.saved.folder))
        config.verification_threshold = max(-1.0, min(HIGHEST, threshold))
        config.save_pretrained(str(loaded.saved.folder))


@app.command(rich_help_panel="Answer for recordings")
@_with_loading
def demo(
    adapters: Annotated[list[str], typer.Argument(help="Folders of adapters, or their names on the Hub.")],
    host: Annotated[str, _option("Page", "Where to serve it. Default: for this machine alone.")] = "127.0.0.1",
    port: Annotated[int | None, _option("Page", "At which port. Default: a free one from 7860.", min=1)] = None,
    space: Annotated[str | None, _option("Page", "Write the files of a Hugging Face Space there instead.")] = None,
    **loading: Any,
) -> None:
    """Try adapters on your own voice, in the browser."""
    from peft_elp.serving import demo
    from peft_elp.serving.engine import Engine

    names = _names(adapters)
    if space:
        demo.write_space(space, names)
        say(f"Wrote a Space to {_shown(space)}. Put {demo.wheel_name()} beside its files: pip wheel --no-deps .")
        say(f"Then upload the folder: hf upload me/my-space {_shown(space)} . --repo-type space")
        return
    demo.import_gradio()  # Before the models, which take a while to load.
    page = demo.make_page(Engine(**_engine(names, **loading)))
    page.launch(server_name=host, server_port=port, share=False, max_file_size=demo.MAX_UPLOAD)


@app.command(rich_help_panel="Answer for recordings")
@_with_loading
def serve(
    adapters: Annotated[list[str] | None, typer.Argument(help="Adapters, served under the names of folders.")] = None,
    adapters_folder: Annotated[str | None, _option("Adapters", "A folder whose adapters come and go.")] = None,
    max_adapters: Annotated[int | None, _option("Adapters", "How many are in memory. Default: all.", min=1)] = None,
    host: Annotated[str, _option("Server", "The address. Default: for this machine alone.")] = "127.0.0.1",
    port: Annotated[int, _option("Server", "The port.", min=1)] = 8000,
    batch_size: Annotated[int, _option("Limits", "Recordings that are answered at a time.", min=1)] = 16,
    queue: Annotated[int, _option("Limits", "Requests that are under way at most.", min=1)] = 64,
    timeout: Annotated[float, _option("Limits", "Seconds that a request may take.", min=0.001)] = 60,
    max_upload: Annotated[float, _option("Limits", "Megabytes that a request may have.", min=0.001)] = 50,
    replicas: Annotated[int, _option("Ray Serve", "Processes that answer. More than one needs Ray.", min=1)] = 1,
    gpus: Annotated[float, _option("Ray Serve", "GPUs of each process; 0.5 lets two share one.", min=0)] = 0,
    **loading: Any,
) -> None:
    """Answer requests over HTTP, for many adapters on one backbone.

    If the environment has PEFT_ELP_API_KEY, clients have to send it.
    """
    from peft_elp.serving import run
    from peft_elp.serving.app import Limits

    engine = _engine(_names(adapters or []), **loading) | {"folder": adapters_folder, "limit": max_adapters}
    limits = Limits(batch_size=batch_size, queue=queue, timeout_s=timeout, upload_bytes=round(1e6 * max_upload))
    if replicas > 1 or gpus:
        run.serve_with_ray(engine, limits, host, port, replicas, gpus)
    else:
        run.serve(engine, limits, host, port)


@app.command(rich_help_panel="Train")
def train(
    recordings: Annotated[str, typer.Argument(help="A folder <label>/*.wav, one with splits, or a table.")],
    base: Annotated[str | None, _option("Model", "Folder or Hub name of the encoder.")] = None,
    output: Annotated[str | None, _option("Output", "The folder for the adapter and its report.")] = None,
    task: Annotated[
        str | None, _option("Data", "classify, verify or transcribe. Default: what the data have.")
    ] = None,
    label: Annotated[
        str | None, _option("Data", "The column of classes or texts. Default: found by its name.")
    ] = None,
    speaker: Annotated[str | None, _option("Data", "The column of the speakers. Default: found by its name.")] = None,
    check_only: Annotated[bool, _option("Data", "Look at the recordings and stop.", "--check-only")] = False,
    skip_bad: Annotated[bool, _option("Data", "Leave out recordings that cannot be read.", "--skip-bad")] = False,
    on_long_audio: Annotated[str, _option("Data", "Beyond the encoder's window: error, skip or crop.")] = "error",
    minutes: Annotated[float, _option("Search", "How long to search.")] = 10,
    trials: Annotated[int | None, _option("Search", "How many candidates at most. Default: as time allows.")] = None,
    jobs: Annotated[int, _option("Search", "How many processes search side by side.")] = 1,
    engine: Annotated[str, _option("Search", "Where they run: local, or ray for Ray's cluster.")] = "local",
    metric: Annotated[str, _option("Search", "unweighted_accuracy, accuracy or f1.")] = "unweighted_accuracy",
    seed: Annotated[int, _option("Search", "Seed of folds, search and trainings.")] = 0,
    live: Annotated[
        bool | None,
        _option("Search", "Train further on the recordings, if it helps. Default: on a GPU.", "--live/--no-live"),
    ] = None,
    device: Device = None,
    dtype: Annotated[str, _option("Model", "Of the encoder, such as bfloat16.")] = "float32",
    chunk_length: Annotated[
        int | None, _option("Model", "Whisper's window in seconds. Default: that of the longest recording.")
    ] = None,
    language: Annotated[str | None, _option("Model", "Of the texts, for a multilingual Whisper.")] = None,
    overwrite: Annotated[bool, _option("Output", "Replace the output if it exists.", "--overwrite")] = False,
) -> None:
    """Train an adapter on a folder of labelled recordings, and report what it is worth."""
    options = dict(locals())  # by the names that `Training` has for them
    if not options.pop("check_only") and not (base and output):
        raise typer.BadParameter("training needs --base and --output; --check-only needs neither")
    from transformers.utils import logging

    from peft_elp.automl.features import check_base, fit_window
    from peft_elp.automl.look import look
    from peft_elp.automl.train import train as run

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if check_only:
        found = look(recordings, task=task, label=label, speaker=speaker, skip_bad=skip_bad)
        (fit_window(found, check_base(base)[1], "warn") if base else found).show(say)
        return
    try:
        run(**options)
    except KeyboardInterrupt:
        raise RuntimeError("interrupted before there was an adapter. The same command goes on from here.") from None


@app.command(rich_help_panel="Train")
@_with_loading
def check(
    adapter: Adapter,
    folder: Annotated[str, typer.Argument(help="Labelled recordings, as for `peft-elp train`.", show_default=False)],
    other: Annotated[str | None, _option("Check", "Another adapter, to compare with on the same recordings.")] = None,
    noise: Annotated[str | None, _option("Check", "A folder of noise. Default: white noise.")] = None,
    at_least: Annotated[float | None, _option("Check", "Status 1 below this accuracy.")] = None,
    at_most: Annotated[float | None, _option("Check", "Status 1 above this error rate.")] = None,
    report: Annotated[str | None, _option("Check", "Write a page in HTML to this file as well.")] = None,
    task: Annotated[str | None, _option("Data", "classify, verify or transcribe. Default: the adapter's.")] = None,
    label: Annotated[str | None, _option("Data", "The column of the classes. Default: found by its name.")] = None,
    speaker: Annotated[str | None, _option("Data", "The column of the speakers. Default: found by its name.")] = None,
    batch_size: BatchSize = 16,
    as_json: AsJson = False,
    **loading: Any,
) -> None:
    """Measure an adapter on labelled recordings: as they are, with noise, by telephone, and more."""
    from peft_elp.automl import check

    both = [_load(name, **loading) for name in (adapter, other) if name]
    data: dict[str, Any] = {"task": task, "label": label, "speaker": speaker, "noise": noise}
    data |= {"at_least": at_least, "at_most": at_most, "batch_size": batch_size}
    found = check.check(both[0], folder, *both[1:], **data)
    if as_json:
        say(_in_json(found.facts))
    else:
        for row in found.table():
            say("{:16}{:24}{}".format(*map(_shown, row)).rstrip())
        for one in found.facts.get("classes", ()):
            say("{class}: {clips} clips, precision {precision:.1%}, recall {recall:.1%}".format(**one))
        if "calibration" in found.facts:
            say(f"calibration error {found.facts['calibration']['error']:.1%}")
        say(f"{found.facts['recordings']} recordings; 95 % intervals by a bootstrap over {found.facts['unit']}")
    if report:
        found.save_page(report)
    if not found.good:
        raise typer.Exit(1)


def _names(adapters: Sequence[str]) -> dict[str, str]:
    """Name adapters by the last part of their paths, where that is unique."""
    last = [Path(name).name or name for name in adapters]
    return {tab if last.count(tab) == 1 else name: name for tab, name in zip(last, adapters, strict=True)}


def _load(adapter: str, **loading: Any) -> SpeechAdapter:
    from peft_elp.speech.inference import SpeechAdapter

    return SpeechAdapter.from_pretrained(adapter, **_options_of_loading(**loading))


def _engine(
    adapters: Mapping[str, str], subfolder: str | None, revision: str | None, **loading: Any
) -> dict[str, Any]:
    """Return the arguments of an engine."""
    from peft_elp.saved.folder import find_adapter

    if (subfolder or revision) and not adapters:
        raise typer.BadParameter("--subfolder and --revision are of adapters that are named, and none is")
    sources: dict[str, Any] = dict(adapters)
    if subfolder or revision:  # Without them the engine finds an adapter, on its own machine where Ray has several.
        sources = {name: find_adapter(source, subfolder, revision) for name, source in adapters.items()}
    return {"adapters": sources, **_options_of_loading(**loading)}


def _options_of_loading(max_duration: float | None, on_long_audio: str | None, **options: Any) -> dict[str, Any]:
    from transformers.utils import logging

    from peft_elp.speech.inference import MAX_DURATION_S

    logging.set_verbosity_error()  # A base that comes with a new head is meant here.
    logging.disable_progress_bar()
    return {
        "max_duration_s": max_duration or MAX_DURATION_S,
        "on_long_audio": on_long_audio or "error",
        **options,
    }


def _each(
    names: Sequence[str],
    loaded: SpeechAdapter,
    answer: Answer,
    what: str,
    batch_size: int,
    output: str | None,
    as_json: bool,
) -> None:
    """Write the answer for each file, and count them."""
    from tqdm import tqdm

    from peft_elp.speech.audio import find_recordings

    files, ignored = find_recordings(names)
    answer([])  # A head for another task is one error.
    counts = Counter(ignored=ignored)
    # Without a terminal there is no bar.
    bar = partial(tqdm, total=len(files), disable=None if output else True, unit="file", leave=False)
    with _writer(output, as_json, what) as write:
        for file, one, error in bar(_answers(files, answer, batch_size)):
            if one is None and error is None:
                counts["skipped"] += 1
                write(file, None, "skipped, it is too long")
                continue
            counts["refused" if error else "answered"] += 1
            if what == "labels" and one:
                one = [label | {"score": round(label["score"], 4)} for label in one]
            write(file, one, error)
    if output or 1 < len(files) + ignored != counts["answered"]:
        said = ", ".join(f"{counts[word]:,} {word}" for word in ("answered", "refused", "skipped", "ignored"))
        dtype = str(loaded.model.get_base_model().dtype).removeprefix("torch.")
        say(f"peft-elp: {said}; in {dtype} on {loaded.model.device}", file=sys.stderr)
    if counts["refused"]:
        raise typer.Exit(1)


def _answers(files: Sequence[str], answer: Answer, batch_size: int) -> Iterator[tuple[str, Any, str | None]]:
    """Return each file with its answer or its error. A file that fails is named, and costs no other its answer."""
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        try:
            yield from ((file, one, None) for file, one in zip(batch, answer(batch), strict=True))
        except Exception as error:
            if len(batch) > 1:  # It may be one recording, or their number.
                yield from _answers(batch, answer, batch_size=1)
            else:
                told = _in_words(error).removeprefix(f"{batch[0]}: ")
                _complain(f"{batch[0]}: {told}")
                yield batch[0], None, told


@contextmanager
def _writer(output: str | None, as_json: bool, what: str) -> Iterator[Write]:
    """Make a function that writes one answer or error, to where and in the form that the options ask for."""
    from peft_elp.wording import spreadsheet_cell

    is_csv = str(output).endswith(".csv")
    with nullcontext(sys.stdout) if output is None else open(output, "w", **TEXT) as table:
        rows = csv.DictWriter(table, ["file", *COLUMNS[what], "error"], restval="")
        if is_csv:
            rows.writeheader()

        def write(file: str, one: Any, error: str | None) -> None:
            if is_csv:
                for found in [{}] if error else [{"text": one}] if what == "text" else one:
                    row = {"file": file, **found, "error": error or ""}
                    rows.writerow({column: spreadsheet_cell(value) for column, value in row.items()})
                table.flush()
            elif output or as_json:
                say(_in_json({"file": file, what: one, "error": error}), file=table)
            elif not error:
                say(_line(file, one))

        yield write


def _line(file: str, one: Any) -> str:
    words = [one] if isinstance(one, str) else [f"{label['label']} {label['score']:.3f}" for label in one]
    return "\t".join(map(_shown, [file, *words]))


def _in_words(problem: object) -> str:
    """Return a problem as one line."""
    message = " ".join(str(problem).split())[:LONGEST] or type(problem).__name__
    if isinstance(problem, Exception) and not isinstance(problem, (ValueError, ImportError, OSError, Warning)):
        return f"{type(problem).__name__}: {message}"
    return message


def _complain(problem: object) -> None:
    """Say on one line of standard error what went wrong, above a progress bar."""
    from tqdm import tqdm

    tqdm.write(f"peft-elp: {_shown(_in_words(problem))}", file=sys.stderr)


def _shown(value: Any) -> str:
    """Escape what would not print on a terminal, such as the start of a command to it."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in str(value))


def _in_json(value: Mapping[str, Any]) -> str:
    """Return JSON, also where a number is not finite, and without characters that act on a terminal."""
    ascii_alone = not (sys.stdout.encoding or "").lower().startswith("utf")
    finite = json.loads(json.dumps(value, default=str), parse_constant=lambda constant: None)
    text = json.dumps(finite, ensure_ascii=ascii_alone)
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in text)
