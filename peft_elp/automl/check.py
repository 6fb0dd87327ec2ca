"""How good a saved adapter is on labelled recordings, and where it breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from scipy.signal import butter, fftconvolve, sosfilt

from peft_elp.speech.audio import AUDIO_SUFFIXES, decode, name_of
from peft_elp.speech.data import read_column
from peft_elp.speech.inference import SpeechAdapter
from peft_elp.wording import first_line, shortened

from .look import _columns, _speakers, _splits
from .measures import cosines_of, of_classes, of_texts, of_voices, text_errors
from .report import DRAWS_OF_PAIRS, LOWER, METRIC_NAMES, Report, classification, compare, percent

TELEPHONE_HZ = 8000
BAND_HZ = (300, 3400)  # of a telephone
REVERBERATION_S = 0.6  # until the sound has fallen by 60 dB
METRIC_OF = {"classify": "unweighted_accuracy", "verify": "eer", "transcribe": "wer"}
CLEAN = "as recorded"

Distort = Callable[[NDArray[Any], np.random.Generator], NDArray[Any]]


@dataclass(frozen=True)
class Checked:
    """What was measured.

    Args:
        metric: What decides: "unweighted_accuracy", "eer" or "wer".
        facts: All numbers; `facts["conditions"]` has those of each condition.
        at_least: The smallest value that is good enough. None: no limit.
        at_most: The largest value that is good enough. None: no limit.

    Examples:
        >>> good = {"metrics": {"wer": {"value": 0.1}}}
        >>> Checked("wer", {"conditions": {"as recorded": good}}).value
        0.1
    """

    metric: str
    facts: dict[str, Any]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def value(self) -> float:
        """The metric of the recordings as they are."""
        return self.facts["conditions"][CLEAN]["metrics"][self.metric]["value"]

    @property
    def good(self) -> bool:
        """Whether the metric is within the limits."""
        enough = self.at_least is None or self.value >= self.at_least
        return enough and (self.at_most is None or self.value <= self.at_most)

    def save_page(self, file: str | Path) -> None:
        """Write the numbers as a page in HTML."""
        clean, count = self.facts["conditions"][CLEAN], self.facts["recordings"]
        said = (
            f"{METRIC_NAMES[self.metric].capitalize()} {percent(clean['metrics'][self.metric])} on {count} recordings."
        )
        facts = {
            "verdict": said,
            "notes": [],
            "clips": count,
            "measured_on": "labelled",
            "beside": self.facts["other"],
        }
        facts["result"] = {"wrong": [], **self.facts, **clean}
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        page = Report(self.facts | facts | {"conditions": list(self.table())}).page(file.parent)
        file.write_text(page, encoding="utf-8")

    def table(self) -> Iterator[tuple[str, str, str]]:
        """Return each condition with its metric, and the change against the other adapter or the clean recordings."""
        two = self.facts["other"] is not None
        yield "", METRIC_NAMES[self.metric], "better than the other by" if two else "change"
        for name, found in self.facts["conditions"].items():
            if "error" in found:
                yield name, "not measured", found["error"]
            else:
                change = "" if name == CLEAN and not two else f"{_points(found['gain'])}"
                yield name, percent(found["metrics"][self.metric]), change


def check(
    adapter: SpeechAdapter,
    folder: str | Path,
    other: SpeechAdapter | None = None,
    *,
    task: str | None = None,
    label: str | None = None,
    speaker: str | None = None,
    noise: str | Path | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    say: Callable[[str], Any] = lambda _: None,
) -> Checked:
    """Measure an adapter on labelled recordings: as they are, with noise, reverberation, by telephone, and more.

    Intervals are of a bootstrap over speakers where five or more are known, else over recordings. A change against the
    clean recordings, or against another adapter, is measured on the same recordings (paired).

    Args:
        adapter: The adapter.
        folder: Recordings, as for `peft_elp.automl.look.look`. If there are several splits, those of the test.
        other: Another adapter for the same task, to compare with.
        task: "classify", "verify" or "transcribe". None: what the adapter is for.
        label: The column of the classes, speakers or texts. None finds it.
        speaker: The column of the speakers. None finds it.
        noise: A folder of noise. None: white noise.
        at_least: The least accuracy that is good enough, for `Checked.good`.
        at_most: The largest error rate that is.
        batch_size: How many recordings are answered at a time.
        seed: The seed of noise and bootstrap.
        say: Is told which condition is measured.

    Raises:
        ValueError: The recordings have classes that an adapter does not know, an adapter cannot do the task, or a
            limit does not fit its metric.
    """
    task = task or adapter.task
    metric = METRIC_OF[task]
    lower = metric in LOWER
    if (at_least if lower else at_most) is not None:
        raise ValueError(
            f"The {METRIC_NAMES[metric]} is better the {'lower' if lower else 'higher'} it is. Limit it with "
            f"{'at_most (--at-most)' if lower else 'at_least (--at-least)'}."
        )
    entries, right, speakers = _read(folder, task, label, speaker)
    measured = _Task(task, right, speakers, seed)
    for one in [adapter, *([other] if other else [])]:
        measured.prepare(one)
    rate_hz = adapter.sampling_rate
    waveforms = [decode(entry, rate_hz) for entry in entries]
    names = [name_of(entry) for entry in entries]
    clean = None
    conditions: dict[str, Any] = {}
    for name, distort in conditions_of(rate_hz, noise).items():
        say(name)
        random = np.random.default_rng(seed)
        arrays = [distort(waveform, random).astype(np.float32) for waveform in waveforms]
        sounds = [
            {"array": array, "sampling_rate": rate_hz, "path": path} for array, path in zip(arrays, names, strict=True)
        ]
        try:
            own = measured.answers(adapter, sounds, batch_size)
            clean = own if clean is None else clean
            beside = clean if other is None else measured.answers(other, sounds, batch_size)
            conditions[name] = measured.compare(own, beside)
        except ValueError as error:
            if name == CLEAN:
                raise
            conditions[name] = {"error": first_line(error)}
    facts = {
        "task": task,
        "adapter": str(adapter.saved.folder),
        "base": str(adapter.saved.base),
        "recordings": len(right),
        "unit": conditions[CLEAN]["unit"],
        "other": other and str(other.saved.folder),
        "conditions": conditions,
        **measured.details(clean, names),
    }
    return Checked(metric, facts, at_least, at_most)


def conditions_of(rate_hz: int, noise: str | Path | None = None) -> dict[str, Distort]:
    """Return what is done to the recordings, by the name of the condition.

    Args:
        rate_hz: The rate of the waveforms.
        noise: A folder of noise. None: white noise.

    Examples:
        >>> quiet = conditions_of(16000)["20 dB quieter"](np.ones(4), np.random.default_rng(0))
        >>> [round(float(x), 3) for x in quiet]
        [0.1, 0.1, 0.1, 0.1]
    """
    inside = () if noise is None else sorted(Path(noise).rglob("*"))
    files = [str(path) for path in inside if path.suffix.lower() in AUDIO_SUFFIXES]
    if noise is not None and not files:
        raise ValueError(f"There are no recordings in the folder {str(noise)!r}.")
    read = cache(partial(decode, rate_hz=rate_hz))

    def with_noise(x: NDArray[Any], random: np.random.Generator, decibels: float) -> NDArray[Any]:
        if files:
            sound = read(files[random.integers(len(files))])
            added = np.resize(np.roll(sound, -random.integers(len(sound))), len(x))
        else:
            added = random.normal(size=len(x))
        power = np.square(x).mean() / max(np.square(added).mean(), 1e-12)
        return x + added * np.sqrt(power / 10 ** (decibels / 10))

    def reverberated(x: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
        seconds = np.arange(round(REVERBERATION_S * rate_hz)) / rate_hz
        room = random.normal(size=len(seconds)) * 10 ** (-3 * seconds / REVERBERATION_S)
        room[0] = np.sqrt(np.square(room).sum())  # The direct sound is as strong as all that follows.
        y = fftconvolve(x, room)[: len(x)]
        return y * np.sqrt(np.square(x).mean() / max(np.square(y).mean(), 1e-12))

    def by_telephone(x: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
        band = butter(4, BAND_HZ, "bandpass", fs=TELEPHONE_HZ, output="sos")
        heard = sosfilt(band, soxr.resample(x, rate_hz, TELEPHONE_HZ))
        return soxr.resample(heard, TELEPHONE_HZ, rate_hz)

    return {
        CLEAN: lambda x, random: x,
        **{f"noise, {level} dB": partial(with_noise, decibels=level) for level in (20, 10, 0)},
        "reverberation": reverberated,
        "telephone": by_telephone,
        "20 dB quieter": lambda x, random: 0.1 * x,
        "20 dB louder": lambda x, random: np.clip(10 * x, -1, 1),
        "slower by 10 %": lambda x, random: soxr.resample(x, rate_hz, rate_hz / 0.9),
        "faster by 10 %": lambda x, random: soxr.resample(x, rate_hz, rate_hz / 1.1),
    }


@dataclass
class _Task:
    """What is measured on the answers to recordings."""

    task: str
    right: list[str]
    speakers: list[str] | None
    seed: int

    def prepare(self, adapter: SpeechAdapter) -> None:
        """Check that an adapter can do the task."""
        adapter._check(self.task)
        if self.task != "classify":
            return
        base: Any = adapter.model.get_base_model()
        self.names = sorted(map(str, base.config.id2label.values()))
        if unknown := sorted(set(self.right) - set(self.names)):
            raise ValueError(
                f"{len(unknown)} classes of the recordings are unknown to the adapter in "
                f"{str(adapter.saved.folder)!r}: {shortened(map(repr, unknown))}. It knows {shortened(self.names)}."
            )

    def answers(self, adapter: SpeechAdapter, sounds: Sequence[Mapping[str, Any]], batch_size: int) -> NDArray[Any]:
        """Return what is measured: scores by class, embeddings, or counts of errors."""
        if self.task == "verify":
            return np.stack(adapter.embed(sounds, batch_size=batch_size))
        if self.task == "transcribe":
            return text_errors(self.right, adapter.transcribe(sounds, batch_size=batch_size))
        scores = [
            {str(one["label"]): one["score"] for one in labels}
            for labels in adapter.classify(sounds, batch_size=batch_size)
        ]
        return np.array([[of.get(name, 0.0) for name in self.names] for of in scores])

    def compare(self, own: NDArray[Any], beside: NDArray[Any]) -> dict[str, Any]:
        if self.task == "verify":
            voices, others = cosines_of(torch.tensor(own)), cosines_of(torch.tensor(beside))
            return compare(of_voices(self.right), voices, others, "eer", self.right, self.seed, DRAWS_OF_PAIRS)
        if self.task == "transcribe":
            return compare(of_texts, own, beside, "wer", self.speakers, self.seed)
        measure = of_classes(self._numbers(), len(self.names))
        metric = METRIC_OF[self.task]
        return compare(measure, own.argmax(-1), beside.argmax(-1), metric, self.speakers, self.seed)

    def details(self, own: Any, files: Sequence[str]) -> dict[str, Any]:
        """Return what is told of each class, whether scores are what they promise, and the worst mistakes."""
        if self.task != "classify":
            return {}
        logits = torch.tensor(own).clamp_min(1e-12).log()
        found = classification(self._numbers(), logits, logits, self.names, None, METRIC_OF[self.task], self.seed)
        for one in found["wrong"]:
            one["file"] = files[one["row"]]
        return {key: x for key, x in found.items() if key not in ("metrics", "head", "gain", "unit")}

    def _numbers(self) -> list[int]:
        return [self.names.index(label) for label in self.right]


def _read(
    folder: str | Path, task: str, label: str | None, speaker: str | None
) -> tuple[list[Any], list[str], list[str] | None]:
    """Return the recordings, what is right for each, and their speakers if they are known."""
    splits = list(_splits(folder))
    chosen = [rows for split, rows in splits if split == "test"] or [rows for _, rows in splits]
    _, columns = _columns(chosen, task, label, speaker)
    entries = [entry for rows in chosen for entry in rows["audio"]]
    right = [str(one) for rows in chosen for one in read_column(rows, columns["label"])]
    speakers = [one for rows in chosen for one in _speakers(rows, columns.get("speaker"))]
    if len(right) < 2:
        raise ValueError(f"A check needs at least two recordings, got {len(right)} in {str(folder)!r}.")
    return entries, right, None if None in speakers else [str(one) for one in speakers]


def _points(gain: Mapping[str, float]) -> str:
    return f"{100 * gain['value']:+.1f} points ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
