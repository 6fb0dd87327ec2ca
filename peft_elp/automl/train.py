"""From a folder of labelled recordings to an adapter with a report."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import EvalResult
from torch import Tensor

from peft_elp.saved.card import describe
from peft_elp.speech.inference import SpeechAdapter
from peft_elp.speech.metrics import equal_error_threshold
from peft_elp_options import DTYPES

from . import report as measured
from .features import Base, check_base, fit_window
from .live import train_live
from .look import TASKS, Recordings, look
from .measures import METRICS, cosines_of, trials_of
from .reader import Problem, answer, cool, place, train_reader
from .search import ENGINES, Candidate, Search, choose
from .split import Fold, make_folds
from .transcribe import transcribe

SHOWN = 20  # candidates in the report


@dataclass(frozen=True)
class Trained:
    """What `train` made.

    Args:
        folder: The folder of the adapter.
        report: What it is worth.
        base: The base, as `train` was given it.

    Examples:
        >>> trained = Trained(Path("my-adapter"), measured.Report({"verdict": "Better.", "notes": []}), "base")
        >>> trained.report.summary()
        'Better.'
    """

    folder: Path
    report: measured.Report
    base: str

    @cached_property
    def adapter(self) -> SpeechAdapter:
        """The adapter, loaded for use."""
        return SpeechAdapter.from_pretrained(self.folder, base=self.base)


@dataclass(frozen=True)
class Training:
    """The arguments of `train`.

    Args:
        recordings: A folder `<label>/*.wav`, one with splits, or one with a table; see `peft_elp.automl.look.look`.
        base: The encoder: a Hub id or folder.
        output: The folder for the adapter, `report.html` and `report.json`. It must not exist.
        task: "classify" names classes, "verify" compares voices, "transcribe" writes texts. None: what the data have.
        label: The column of the classes or texts. None finds it.
        speaker: The column of the speakers. None finds it.
        minutes: How long the search may take, without the time for the features and the report. Also how long a
            training on the recordings themselves may take.
        trials: How many candidates at most. The same number with the same seed and one job gives the same adapter.
        jobs: How many processes search side by side.
        engine: Where they run: "local", or "ray" for the cluster that Ray is connected to, with a shared folder.
        metric: "unweighted_accuracy", "accuracy" or "f1": what candidates are chosen by.
        live: Whether the chosen setting is trained further on the recordings themselves, with E-adapters and
            augmentation, and kept if it is better. None: where the device is not the CPU.
        seed: The seed of the folds, the search and the trainings.
        device: Where the encoder runs. None: a CUDA device if there is one, else the CPU.
        language: The language of the texts, such as "de", where the base is a multilingual Whisper.
        dtype: The dtype of the encoder.
        chunk_length: The window of an encoder such as Whisper's, in whole seconds. None: that of the longest
            recording.
        on_long_audio: What to do with recordings that are longer than the window: "error", "skip", or "crop", which
            reads only their beginning and is refused for texts.
        skip_bad: Whether recordings that cannot be read are left out.
        overwrite: Whether `output` may be replaced.
        progress: Print what is done, with progress bars.

    Raises:
        ValueError: An argument is wrong.
        FileExistsError: `output` holds something.
    """

    recordings: str | Path
    base: str
    output: str | Path
    _: KW_ONLY
    task: str | None = None
    label: str | None = None
    speaker: str | None = None
    minutes: float = 10.0
    trials: int | None = None
    jobs: int = 1
    engine: str = "local"
    metric: str = "unweighted_accuracy"
    live: bool | None = None
    seed: int = 0
    device: str | None = None
    language: str | None = None
    dtype: str = "float32"
    chunk_length: int | None = None
    on_long_audio: str = "error"
    skip_bad: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        known = {"task": (None, *TASKS), "metric": METRICS, "engine": ENGINES, "dtype": DTYPES}
        known["on_long_audio"] = ("error", "skip", "crop")
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name} must be one of {', '.join(map(str, values))}, got {value!r}.")
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be above 0, got {self.minutes!r}.")
        for name in ("trials", "jobs", "chunk_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}.")
        if ":" in (self.device or ""):
            raise ValueError(
                f"device must be a kind, such as 'cuda', got {self.device!r}. Choose one of several GPUs with the "
                "environment variable CUDA_VISIBLE_DEVICES."
            )
        folder = Path(self.output)
        if folder.exists() and not self.overwrite and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(
                f"{folder} exists. Choose another output, or replace it with overwrite (--overwrite)."
            )

    @property
    def work(self) -> Path:
        """The folder beside the output with what a search that was stopped goes on from."""
        return Path(self.output).with_name(f"{Path(self.output).name}.search")

    def say(self, *words: Any) -> None:
        """Print words, unless nothing is to be printed."""
        if self.progress:
            print(*words)  # noqa: T201


def train(recordings: str | Path, base: str, output: str | Path, **options: Any) -> Trained:
    """Train an adapter on a folder of labelled recordings, and report what it is worth.

    The encoder reads each recording once. A search then trains many settings of an L-adapter without layer norms on
    its features, by folds, and chooses the smallest one within one standard error of the best. The adapter is trained
    on everything but the test split, which is answered once, at the end. Texts are trained without a search, on the
    recordings themselves.

    Beside `output` lies `<output>.search` with the features and the trials: a search that was stopped goes on there,
    and a second one finds the features. Delete it when you no longer need it.

    Args:
        recordings: The recordings; this and the following are arguments of `Training`.
        base: The encoder.
        output: The folder for the adapter and its report.
        options: Its others, such as `minutes=10` or `task="verify"`.

    Returns:
        The folder, the report, and the adapter, ready for recordings.

    Raises:
        ValueError: An argument or the data are wrong, or the base cannot be used.
        FileExistsError: `output` holds something.
        KeyboardInterrupt: Ctrl-C before the first candidate was trained. Later, the best candidate so far is saved.

    Examples:
        >>> trained = train("recordings", "microsoft/wavlm-base-plus", "my-adapter")  # doctest: +SKIP
        >>> print(trained.report.summary())  # doctest: +SKIP
        >>> trained.adapter.classify("new.wav", top_k=1)  # doctest: +SKIP
        [{'label': 'happy', 'score': 0.93}]
    """
    start, training = time.monotonic(), Training(recordings, base, output, **options)
    _, window_s = check_base(base)
    columns = {"task": training.task, "label": training.label, "speaker": training.speaker}
    found = look(recordings, **columns, skip_bad=training.skip_bad, progress=training.progress)
    found = fit_window(found, min(window_s, training.chunk_length or window_s), training.on_long_audio)
    found.show(training.say)
    model, parts, facts = (transcribe if found.task == "transcribe" else _search)(training, found)
    facts |= {"base": base, "seed": training.seed, "minutes": training.minutes, "jobs": training.jobs}
    facts |= {"warnings": found.warnings, "seconds": time.monotonic() - start, "task": found.task}
    facts["measured_on"] = "test" if found.where("test") else "held-out"
    facts["verdict"] = measured.verdict(facts)
    facts["data"] = {
        "overview": found.overview().reset_index().to_dict("records"),
        "columns": found.columns,
        "held_out": facts.pop("held_out"),
        "speakers": len(set(found.speakers)) if found.speakers else None,
        "clips": len(found.labels),
        "seconds": float(found.table["duration_s"].sum()),
    }
    result = measured.Report(facts)
    _save(training, model, parts, result)
    training.say(f"{result.summary()}\nSaved in {output}: {Path(output, 'report.html')} tells the rest.")
    return Trained(Path(output), result, base)


def _search(training: Training, found: Recordings) -> tuple[Any, list[Any], dict[str, Any]]:
    """Return the adapted model for the chosen setting, what is saved beside it, and what was measured."""
    names, work = found.names, training.work
    folds, how = make_folds(found, training.seed)
    training.say(f"Held out: {how}")
    options = training.device, training.dtype, training.chunk_length, training.on_long_audio
    encoder = Base(training.base, names, found.longest_s, *options)
    size = encoder.size(found.rows)
    training.say(f"Features: {encoder.layers} layers, {size / 1e9:.2g} GB in {work / 'features'}")
    features = encoder.read(found.rows, work / "features", training.progress)
    numbers = {name: number for number, name in enumerate(names)}
    labels = torch.tensor([numbers.get(name, -1) for name in found.labels])
    problem = Problem(features, labels, len(names), found.task == "verify", encoder.width, training.seed)
    seconds = 60 * training.minutes
    search = Search(problem, folds, encoder.layers, encoder.hidden, training.metric, seconds, training.trials)
    candidates, interrupted = search.run(
        work / "trials.log", _fingerprint(search), training.jobs, training.engine, training.progress
    )
    model, facts = _finish(training, search, encoder, found, candidates)
    if interrupted:
        facts["notes"].append("The search was interrupted; this is the best candidate so far.")
    return model, [encoder.extractor], facts | {"held_out": how}


def _fingerprint(search: Search) -> str:
    """Return a name for a search: what its trials depend on."""
    facts = [search.folds, search.problem.labels.tolist(), search.metric, search.problem.seed, search.problem.verify]
    found = hashlib.sha256(repr([*facts, search.sizes()]).encode())
    found.update(search.problem.features.pooled.numpy().tobytes())
    return found.hexdigest()[:16]


def _finish(
    training: Training, search: Search, encoder: Base, found: Recordings, candidates: Sequence[Candidate]
) -> tuple[Any, dict[str, Any]]:
    """Train the chosen candidate on everything but the test split, and measure it."""
    chosen, head, problem = choose(candidates, encoder.hidden), search.head(candidates), search.problem
    training.say(f"Chosen among {len(candidates)}: {search.in_words(chosen)}. Training it on everything but test.")
    live, notes = None, []
    if encoder.device.type != "cpu" if training.live is None else training.live:
        live, note = train_live(training, search, encoder, found, chosen)
        notes = [note]
    folds = search.folds[:1] if live else search.folds  # It was validated on one.
    held_out = [i for fold in folds for i in fold.held_out]
    held = live[1] if live else _out_of_fold(search, folds, chosen)
    temperature, threshold = 1.0, None
    if problem.verify:
        parts = [part for fold in folds for part in fold.parts]
        pairs = zip(parts, held.split([len(part) for part in parts]), strict=True)
        trials = [trials_of(problem.labels[part], cosines_of(answers)) for part, answers in pairs]
        threshold = float(np.mean([equal_error_threshold(*one) for one in trials]))
    else:
        temperature = measured.fit_temperature(held, problem.labels[held_out])
    rows, test = found.where("train", "validation"), found.where("test")
    reader, _, losses = train_reader(problem, chosen.setting, rows, stop=chosen.stop)
    if test:
        alone, _, _ = train_reader(problem, head.setting, rows, stop=head.stop)
        answers, beside = live[2] if live else answer(problem, reader, test), answer(problem, alone, test)
    else:
        answers, beside = held, _out_of_fold(search, folds, head)
        notes.append(
            "There is no test split: the figures are of recordings that were held out in turn. The setting was "
            f"chosen among {len(candidates)} by the same recordings, so they are somewhat too good."
        )
    model: Any = live[0] if live else encoder.adapted(**chosen.setting.elp())
    if not live:
        place(reader.folded(), model)
    cool(model, temperature)
    model.peft_config["default"].verification_threshold = threshold
    facts = _measure(search, found, test or held_out, answers / temperature, beside)
    shares = zip(chosen.setting.layers, reader.shares.tolist(), strict=True)
    best = sorted((one for one in candidates if one.complete), key=lambda one: -one.score)
    return model, facts | {
        "notes": notes,
        "is_head": chosen is head and not live,
        "chosen": search.row(chosen),
        "head": search.row(head),
        "tried": len(candidates),
        "complete": len(best),
        "candidates": [search.row(one) for one in best[:SHOWN]],
        "layer_weights": [{"layer": layer, "share": share} for layer, share in shares],
        "curve": [1 - x if problem.verify else x for x in chosen.curve],
        "losses": losses,
        "temperature": temperature,
        "threshold": threshold,
    }


def _out_of_fold(search: Search, folds: Sequence[Fold], one: Candidate) -> Tensor:
    """Return a candidate's answers for all recordings that were held out, in the order of the folds."""
    readers = ((fold, train_reader(search.problem, one.setting, fold.train, stop=one.stop)[0]) for fold in folds)
    return torch.cat([answer(search.problem, reader, fold.held_out) for fold, reader in readers])


def _measure(
    search: Search, found: Recordings, rows: Sequence[int], answers: Tensor, beside: Tensor
) -> dict[str, Any]:
    """Measure answers for some recordings, and those of the head alone."""
    problem, metric = search.problem, "eer" if search.problem.verify else search.metric
    if problem.verify:
        result = measured.verification([found.labels[i] for i in rows], answers, beside, problem.seed)
    else:
        groups = [found.speakers[i] for i in rows] if found.speakers else None
        right = problem.labels[list(rows)].tolist()
        result = measured.classification(right, answers, beside, found.names, groups, metric, problem.seed)
        for one in result["wrong"]:
            one["file"] = found.table["file"][rows[one["row"]]]
    return {"metric": metric, "clips": len(rows), "beside": "the head alone on the last layer", "result": result}


def _save(training: Training, model: Any, parts: Sequence[Any], result: measured.Report) -> None:
    """Write the adapter and its report, all or nothing."""
    facts, folder = result.facts, Path(training.output)
    kind = "automatic-speech-recognition" if facts["task"] == "transcribe" else "audio-classification"
    metric, value = facts["metric"], facts["result"]["metrics"][facts["metric"]]["value"]
    split = "test" if facts["measured_on"] == "test" else "held-out folds"
    describe(
        model,
        metrics=[EvalResult(kind, "folder", "own recordings", metric, round(100 * value, 1), dataset_split=split)],
        protocol=f"Trained by `peft-elp train`; `report.html` has the details. {facts['verdict']}",
        seed=training.seed,
        training={name: facts["chosen"][name] for name in ("rate", "steps") if name in facts.get("chosen", {})},
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        made = Path(beside, folder.name)
        for part in (model, *parts):
            part.save_pretrained(str(made))
        result.save(made, folder)
        if folder.exists():
            if not training.overwrite and any(folder.iterdir()):
                raise FileExistsError(f"{folder} was made by something else in the meantime.")
            shutil.rmtree(folder)
        made.rename(folder)
