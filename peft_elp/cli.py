# ruff: noqa: T201  # printing is what a command does
"""The command `peft-elp`: look at a saved adapter, and try it on recordings."""

from __future__ import annotations

import argparse
import csv
import glob
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from .speech.inference import SpeechAdapter

BAR = 40  # characters, for the largest layer weight
SHOWN = 100  # labels
HIGHEST = 1 - 1e-6  # threshold that a configuration takes
LONGEST = 2000  # characters of an error

Answer = Callable[[list[Any]], list[Any]]
Write = Callable[[str, Any], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments. Default: those of the process.

    Returns:
        0; or 1 if something could not be answered, and standard error says what, or if the reader of a pipe stopped
        reading. Wrong arguments exit with 2.

    Examples:
        >>> main(["info", "./nowhere"])
        1
    """
    args = _parser().parse_args(argv)
    from transformers.utils import logging  # only here: `--help` does not need it

    logging.set_verbosity_error()  # A base that comes with a new head is meant here.
    logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # These are for programmers.
            warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")  # Transformers' WavLM
            warnings.showwarning = lambda message, *_: _complain(message)
            status = args.run(args)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # The reader, such as `head`, has what it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end.
        return 1
    except (ValueError, ImportError, OSError, RuntimeError, MemoryError) as error:
        return _complain(error)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("peft-elp", description="Look at a saved ELP-adapter, and try it on recordings.")
    parser.add_argument("--version", action="version", version=f"peft-elp {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    saved = argparse.ArgumentParser(add_help=False)
    saved.add_argument("adapter", help="the folder of an adapter, or its name on the Hub")
    saved.add_argument("--subfolder", help="the folder inside of it, if it holds several adapters")
    saved.add_argument("--revision", help="a branch or a commit on the Hub")
    saved.add_argument("--json", action="store_true", help="print JSON, one object on each line")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--base", help="folder or Hub name of the base, if it is not where the adapter says")
    model.add_argument("--device", help="such as cpu, cuda or mps (default: cuda if there is one, else cpu)")
    model.add_argument("--dtype", help="such as float16 or bfloat16 (default: as in the checkpoint of the base)")

    files = argparse.ArgumentParser(add_help=False)
    files.add_argument(
        "files", nargs="+", metavar="FILE", help="recordings (WAV, FLAC, MP3, OGG, ...), folders of them, or patterns"
    )
    files.add_argument("--batch-size", type=_count, default=1, help="how many to answer at a time (default: 1)")
    files.add_argument(
        "--output", type=_table, metavar="TABLE", help="write the answers to a .csv or .jsonl file instead of printing"
    )

    info = commands.add_parser("info", parents=[saved], help="what an adapter consists of; loads no model")
    info.set_defaults(run=_info)
    transcribe = commands.add_parser("transcribe", parents=[saved, model, files], help="write down what is said")
    transcribe.set_defaults(run=_transcribe)
    classify = commands.add_parser("classify", parents=[saved, model, files], help="name the labels of recordings")
    classify.add_argument("--top-k", type=_count, default=1, help="how many labels (default: 1)")
    classify.set_defaults(run=_classify)
    verify = commands.add_parser("verify", parents=[saved, model], help="compare the voices of two recordings")
    verify.add_argument("file_a", metavar="FILE_A")
    verify.add_argument("file_b", metavar="FILE_B")
    verify.add_argument(
        "--threshold", type=float, help="the score from which they are one voice (default: the adapter's)"
    )
    verify.set_defaults(run=_verify)
    trials = commands.add_parser(
        "trials", parents=[saved, model], help="compare the voices of all pairs in a list, and measure the error rates"
    )
    trials.add_argument("list", metavar="LIST", help="lines of `label file file`, or a .csv, .tsv or .jsonl table")
    trials.add_argument("--folder", help="the folder that its paths count from (default: its own folder)")
    trials.add_argument("--batch-size", type=_count, default=1, help="how many to answer at a time (default: 1)")
    trials.add_argument(
        "--save-threshold", action="store_true", help="save the threshold at the equal error rate with the adapter"
    )
    trials.set_defaults(run=_trials)
    demo = commands.add_parser("demo", parents=[model], help="try adapters on your own voice, in the browser")
    demo.add_argument("adapters", nargs="+", metavar="ADAPTER", help="folders of adapters, or their names on the Hub")
    demo.add_argument("--host", default="127.0.0.1", help="where to serve the page (default: this machine alone)")
    demo.add_argument("--port", type=_count, help="at which port (default: a free one from 7860)")
    demo.add_argument("--space", metavar="FOLDER", help="write the files of a Hugging Face Space there instead")
    demo.set_defaults(run=_demo)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more is needed, got {text!r}")
    return int(text)


def _table(text: str) -> str:
    if Path(text).suffix not in (".csv", ".jsonl"):
        raise argparse.ArgumentTypeError(f"a .csv or .jsonl file is needed, got {text!r}")
    return text


def _info(args: argparse.Namespace) -> int:
    from .saved.card import read_results
    from .saved.folder import find_adapter, read_adapter

    saved = read_adapter(find_adapter(args.adapter, args.subfolder, args.revision))
    results = [
        {"data": one.dataset_name, "split": one.dataset_split, "metric": one.metric_type, "value": one.metric_value}
        for one in read_results(saved.folder)
    ]
    facts = {
        "base": saved.base,
        "model": saved.model_class,
        "task": saved.task,
        "adapters": saved.config.get("adapters"),
    }
    threshold = saved.config.get("verification_threshold")
    if args.json:
        parts = {"parameters": saved.counts, "labels": saved.labels, "layer_weights": saved.layer_weights}
        _print_json({**facts, **parts, "verification_threshold": threshold, "results": results})
        return 0
    for name, value in facts.items():
        print(f"{name:12}{_shown(value) if value else 'not said'}")
    if saved.labels:
        print(f"{'labels':12}{_shown(_listed(saved.labels))}")
    elif saved.num_labels:
        print(f"{'labels':12}{saved.num_labels:,}, without names")
    if threshold is not None:
        print(f"{'threshold':12}{threshold}")
    print("\nparameters")
    for part, what in saved.sizes().items():
        print(f"  {part:11}{saved.counts[part]:>12,}  {_shown(what)}")
    print(f"  {'all':11}{sum(saved.counts.values()):>12,}")
    if saved.layer_weights:
        print("\nlayer weights")
        largest = max(share for _, share in saved.layer_weights)
        for layer, share in saved.layer_weights:
            print(f"  {layer:3} {share:.3f} {'#' * round(BAR * share / largest)}")
    if results:
        print("\nresults, according to its card")
        for one in results:
            print(" ", *(_shown(value) for value in one.values() if value is not None))
    return 0


def _transcribe(args: argparse.Namespace) -> int:
    adapter = _load(args)
    return _each(args, adapter, "text", lambda heard: adapter.transcribe(heard, adapter.sampling_rate, len(heard)))


def _classify(args: argparse.Namespace) -> int:
    adapter = _load(args)
    return _each(
        args, adapter, "labels", lambda heard: adapter.classify(heard, adapter.sampling_rate, len(heard), args.top_k)
    )


def _verify(args: argparse.Namespace) -> int:
    adapter = _load(args)
    found = adapter.verify(args.file_a, args.file_b, threshold=args.threshold)
    if adapter.saved.labels and adapter.saved.config.get("verification_threshold") is None:
        _complain(
            f"a warning: this adapter was trained to tell {_listed(adapter.saved.labels)} apart, maybe not voices."
        )
    if args.json:
        _print_json({"score": found.score, "threshold": found.threshold, "same": found.same})
    elif found.same is None:
        print(f"{found.score:.3f}\tthe adapter names no threshold; give one with --threshold")
    else:
        print(f"{found.score:.3f}\t{'same voice' if found.same else 'different voices'}, threshold {found.threshold}")
    return 0


def _trials(args: argparse.Namespace) -> int:
    """Print the score of each trial and the error rates of all; without error rates if a recording failed."""
    from .speech.data import read_trials
    from .speech.metrics import cosine_scores, equal_error_rate, equal_error_threshold, min_dcf

    trials = read_trials(args.list, args.folder)
    files = sorted({file for trial in trials for file in trial[1:]})
    adapter = _load(args)
    voices: dict[Any, Any] = dict(
        _answers(args, adapter, files, lambda heard: adapter.embed(heard, adapter.sampling_rate, len(heard)))
    )
    scored = [trial for trial in trials if trial.file_a in voices and trial.file_b in voices]
    scores = cosine_scores(voices, [trial[1:] for trial in scored]) if scored else []
    for trial, score in zip(scored, map(float, scores), strict=True):
        if args.json:
            _print_json({**trial._asdict(), "score": score})
        else:
            print(f"{score:.3f}", *map(_shown, trial), sep="\t", flush=True)
    if len(scored) < len(trials):
        return _complain(
            f"{len(trials) - len(scored)} of {len(trials)} trials have no score, so no error rate is given."
        )
    labels = [trial.label for trial in trials]
    rates = {"trials": len(trials), "eer": equal_error_rate(labels, scores), "min_dcf": min_dcf(labels, scores)}
    threshold = equal_error_threshold(labels, scores)
    if args.json:
        _print_json({**rates, "threshold": threshold})
    else:
        print(
            f"{len(trials):,} trials: equal error rate {rates['eer']:.2%} at the threshold {threshold:.3f}, minDCF "
            f"{rates['min_dcf']:.3f}"
        )
    if args.save_threshold:
        from .config import ELPConfig

        config: Any = ELPConfig.from_pretrained(str(adapter.saved.folder))
        config.verification_threshold = max(-1.0, min(HIGHEST, threshold))
        config.save_pretrained(str(adapter.saved.folder))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .speech import demo

    names = {_tab(name, args.adapters): name for name in args.adapters}
    if args.space:
        demo.write_space(args.space, names)
        print(
            f"Wrote a Space to {_shown(args.space)}. Put {demo.wheel_name()} beside its files, which `pip wheel "
            "--no-deps .` makes in a clone of peft_elp, and upload the folder: "
            f"hf upload me/my-space {_shown(args.space)} . --repo-type space"
        )
        return 0
    demo.import_gradio()  # Before the models, which take a while to load.
    from .speech.inference import SpeechAdapter

    options = {"base": args.base, "device": args.device, "dtype": args.dtype}
    page = demo.make_page({tab: SpeechAdapter.from_pretrained(name, **options) for tab, name in names.items()})
    page.launch(server_name=args.host, server_port=args.port, share=False)
    return 0


def _tab(name: str, names: Sequence[str]) -> str:
    """A short name for an adapter: the last part of its path, if no other has the same."""
    last = Path(name).name or name
    return last if sum(Path(other).name == last for other in names) == 1 else name


def _load(args: argparse.Namespace) -> SpeechAdapter:
    from .speech.inference import SpeechAdapter  # only here: it needs models, and `info` does not

    return SpeechAdapter.from_pretrained(
        args.adapter,
        base=args.base,
        device=args.device,
        dtype=args.dtype,
        subfolder=args.subfolder,
        revision=args.revision,
    )


def _each(args: argparse.Namespace, adapter: SpeechAdapter, what: str, answer: Answer) -> int:
    """Write the answer for each file."""
    files = _recordings(args.files)
    count = 0
    with _writer(args, what) as write:
        for file, one in _answers(args, adapter, files, answer):
            write(file, one)
            count += 1
            if args.output and sys.stderr.isatty():
                print(f"\r{count:,} of {len(files):,}", end="\n" if count == len(files) else "", file=sys.stderr)
    return int(count < len(files))


def _answers(
    args: argparse.Namespace, adapter: SpeechAdapter, files: Sequence[str], answer: Answer
) -> Iterator[tuple[str, Any]]:
    """Each file with its answer. One that cannot be read or answered is named, and costs no other its answer."""
    for start in range(0, len(files), args.batch_size):
        read = [(file, _read(adapter, file)) for file in files[start : start + args.batch_size]]
        yield from _answer([(file, waveform) for file, waveform in read if waveform is not None], answer)


def _read(adapter: SpeechAdapter, file: str) -> Any:
    try:
        return adapter.read(file)
    except Exception as error:  # Whatever is wrong with a file, the others are to be answered.
        _complain(error)
        return None


def _answer(heard: list[tuple[str, Any]], answer: Answer) -> Iterator[tuple[str, Any]]:
    """The answers for a batch; if it fails, those that its members get alone."""
    try:
        answers = answer([waveform for _, waveform in heard]) if heard else []
    except Exception as error:  # It may be one recording, or their number.
        if len(heard) == 1:
            _complain(error, f"{heard[0][0]}: ")
            return
        for one in heard:
            yield from _answer([one], answer)
        return
    yield from zip((file for file, _ in heard), answers, strict=True)


def _recordings(names: Sequence[str]) -> list[str]:
    """The files that are meant by names of files, folders and patterns, in that order."""
    from .speech.audio import AUDIO_SUFFIXES

    files: list[str] = []
    for name in names:
        if os.path.isdir(name):
            inside = [os.path.join(place, file) for place, _, found in os.walk(name) for file in found]
            found = sorted(file for file in inside if file.lower().endswith(AUDIO_SUFFIXES))
            if not found:
                raise ValueError(f"There are no recordings in the folder {name!r}.")
            files += found
        elif glob.has_magic(name) and not os.path.lexists(name):
            files += sorted(glob.glob(name, recursive=True)) or [name]
        else:
            files.append(name)
    return files


@contextmanager
def _writer(args: argparse.Namespace, what: str) -> Iterator[Write]:
    """A function that writes one answer, to where and in the form that the arguments ask for."""
    if not args.output:
        yield lambda file, one: _print_json({"file": file, what: one}) if args.json else _print_line(file, one)
        return
    with open(args.output, "w", encoding="utf-8", errors="backslashreplace", newline="") as table:
        if args.output.endswith(".jsonl"):
            yield lambda file, one: print(_in_json({"file": file, what: one}), file=table, flush=True)
            return
        columns = ["file", "text"] if what == "text" else ["file", "label", "score"]
        rows = csv.DictWriter(table, columns)
        rows.writeheader()

        def write(file: str, one: Any) -> None:
            rows.writerows({"file": file, **label} for label in ([{"text": one}] if what == "text" else one))
            table.flush()

        yield write


def _print_line(file: str, one: Any) -> None:
    words = [one] if isinstance(one, str) else [f"{label['label']} {label['score']:.3f}" for label in one]
    print(_shown(file), *map(_shown, words), sep="\t", flush=True)


def _complain(problem: object, about: str = "") -> int:
    """Say on one line of standard error what went wrong."""
    message = " ".join(str(problem).split())[:LONGEST] or type(problem).__name__
    if isinstance(problem, Exception) and not isinstance(problem, (ValueError, ImportError, OSError, Warning)):
        message = f"{type(problem).__name__}: {message}"
    print(f"peft-elp: {_shown(about + message)}", file=sys.stderr)
    return 1


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names):,} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _shown(value: Any) -> str:
    """Text for a terminal: what would not print there, such as the start of a command to it, is escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in str(value))


def _print_json(value: Mapping[str, Any]) -> None:
    print(_in_json(value), flush=True)


def _in_json(value: Mapping[str, Any]) -> str:
    """JSON, also where a number is not finite, and without characters that act on a terminal."""
    ascii_alone = not (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(_finite(value), ensure_ascii=ascii_alone, allow_nan=False, default=str)
    return re.sub(r"[^\x20-\x7e]", lambda one: one[0] if one[0].isprintable() else json.dumps(one[0])[1:-1], text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
