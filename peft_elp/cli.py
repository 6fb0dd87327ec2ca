# ruff: noqa: T201  # printing is what a command does
"""The command `peft-elp`: look at a saved adapter, and try it on recordings."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .saved.card import read_results
from .saved.folder import find_adapter, read_adapter

if TYPE_CHECKING:
    from .inference import SpeechAdapter

BAR = 40  # characters, of the largest layer weight


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, by default with the arguments of the process.

    Returns:
        0; or 1 if something could not be answered, and standard error says what. Wrong arguments leave with 2.
    """
    args = _parser().parse_args(argv)
    logging.set_verbosity_error()  # that a base comes with a new head is meant here
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # not for who runs a command
            return args.run(args)
    except (ValueError, ImportError, OSError) as error:
        return _complain(error)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("peft-elp", description="Look at a saved ELP-adapter, and try it on recordings.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    saved = argparse.ArgumentParser(add_help=False)
    saved.add_argument("adapter", help="the folder of an adapter, or its name on the Hub")
    saved.add_argument("--subfolder", help="the folder inside of it, where there are several adapters")
    saved.add_argument("--revision", help="a branch or a commit on the Hub")
    saved.add_argument("--json", action="store_true", help="print JSON, one object on each line")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--base", help="folder or Hub name of the base, if not what the adapter says")
    model.add_argument("--device", help="such as cpu, cuda or mps (default: cuda where there is one, else cpu)")

    files = argparse.ArgumentParser(add_help=False)
    files.add_argument("files", nargs="+", metavar="FILE", help="recordings: WAV, FLAC, MP3, OGG, ...")
    files.add_argument("--batch-size", type=_count, default=1, help="how many to answer at a time (default: 1)")

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
    trials.add_argument("--folder", help="what its paths count from (default: its own folder)")
    trials.add_argument("--batch-size", type=_count, default=1, help="how many to answer at a time (default: 1)")
    trials.set_defaults(run=_trials)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more is needed, got {text!r}")
    return int(text)


def _info(args: argparse.Namespace) -> int:
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
        print(f"{name:12}{value or 'not said'}")
    if saved.labels:
        print(f"{'labels':12}{', '.join(saved.labels)}")
    if threshold is not None:
        print(f"{'threshold':12}{threshold}")
    print("\nparameters")
    for part, what in saved.sizes().items():
        print(f"  {part:11}{saved.counts[part]:>12,}  {what}")
    print(f"  {'all':11}{sum(saved.counts.values()):>12,}")
    if saved.layer_weights:
        print("\nlayer weights")
        largest = max(share for _, share in saved.layer_weights)
        for layer, share in saved.layer_weights:
            print(f"  {layer:3} {share:.3f} {'#' * round(BAR * share / largest)}")
    if results:
        print("\nresults, as its card says")
        for one in results:
            print(" ", *(value for value in one.values() if value is not None))
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
    found = _load(args).verify(args.file_a, args.file_b, threshold=args.threshold)
    if args.json:
        _print_json({"score": found.score, "threshold": found.threshold, "same": found.same})
    elif found.same is None:
        print(f"{found.score:.3f}\tthe adapter names no threshold; give one with --threshold")
    else:
        print(f"{found.score:.3f}\t{'same voice' if found.same else 'different voices'}, threshold {found.threshold}")
    return 0


def _trials(args: argparse.Namespace) -> int:
    """Print the score of each trial and the error rates of all; a recording that cannot be read stops it."""
    from .data import read_trials
    from .metrics import cosine_scores, equal_error_rate, min_dcf

    trials = read_trials(args.list, args.folder)
    files = sorted({file for trial in trials for file in trial[1:]})
    voices = _load(args).embed(files, batch_size=args.batch_size)
    scores = cosine_scores(dict(zip(files, voices, strict=True)), [trial[1:] for trial in trials])
    for trial, score in zip(trials, scores.tolist(), strict=True):
        if args.json:
            _print_json({**trial._asdict(), "score": score})
        else:
            print(f"{score:.3f}", *trial, sep="\t", flush=True)
    labels = [trial.label for trial in trials]
    rates = {"trials": len(trials), "eer": equal_error_rate(labels, scores), "min_dcf": min_dcf(labels, scores)}
    if args.json:
        _print_json(rates)
    else:
        print(f"{len(trials):,} trials: equal error rate {rates['eer']:.2%}, minDCF {rates['min_dcf']:.3f}")
    return 0


def _load(args: argparse.Namespace) -> SpeechAdapter:
    from .inference import SpeechAdapter  # only here: it needs models, `info` does not

    return SpeechAdapter.from_pretrained(
        args.adapter, base=args.base, device=args.device, subfolder=args.subfolder, revision=args.revision
    )


def _each(args: argparse.Namespace, adapter: SpeechAdapter, what: str, answer: Callable[[list[Any]], Any]) -> int:
    """Print what there is to say of each file; those that cannot be read do not stop the others."""
    status = 0
    for start in range(0, len(args.files), args.batch_size):
        files = args.files[start : start + args.batch_size]
        heard = [(file, waveform) for file in files if (waveform := _read(adapter, file)) is not None]
        status |= len(heard) < len(files)
        answers = answer([waveform for _, waveform in heard]) if heard else []
        for (file, _), one in zip(heard, answers, strict=True):
            if args.json:
                _print_json({"file": file, what: one})
            elif what == "labels":
                print(file, *(f"{label['label']} {label['score']:.3f}" for label in one), sep="\t", flush=True)
            else:
                print(file, one, sep="\t", flush=True)
    return status


def _read(adapter: SpeechAdapter, file: str) -> Any:
    try:
        return adapter.read(file)
    except ValueError as error:
        _complain(error)
        return None


def _complain(error: Exception) -> int:
    print(f"peft-elp: {error}", file=sys.stderr)
    return 1


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(main())
