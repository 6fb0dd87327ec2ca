"""Many adapters in one process: one backbone for each base, and passes that requests for different adapters share."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft.utils import CONFIG_NAME

from peft_elp.call.route import Route, current_route
from peft_elp.multitask import MultiTaskModel
from peft_elp.saved.folder import find_adapter, read_adapter
from peft_elp.speech.inference import MAX_DURATION_S, Recording, SpeechAdapter, Verification, _find_base
from peft_elp.speech.metrics import cosine_scores
from peft_elp.wording import first_line, shortened

logger = logging.getLogger(__name__)


class UnknownAdapterError(ValueError):
    """No adapter has that name."""


class NotLoadedError(RuntimeError):
    """An adapter is there, and cannot be loaded at present."""


@dataclass(frozen=True)
class Request:
    """What one adapter is asked about one recording.

    Args:
        adapter: The name of the adapter.
        task: "transcribe" for text, "classify" for labels, "embed" for the embedding of a voice.
        recording: What `SpeechAdapter` takes.
    """

    adapter: str
    task: Literal["transcribe", "classify", "embed"]
    recording: Recording


@dataclass(frozen=True)
class _Loaded:
    """An adapter in memory.

    Args:
        speech: Reads its recordings. Adapters of one base and model class have the same `speech.model`.
        key: Its name in that model.
        shares: Adapters in which this is equal can share a pass.
        labels: The names of its labels, by their number.
    """

    speech: SpeechAdapter
    key: str
    shares: tuple[Any, ...]
    labels: dict[int, str]


class Engine:
    """Answers requests to many adapters, with one backbone in memory for each base.

    Requests of one call share passes through the backbone, whichever adapters they are for, where that changes no
    answer: each is the one that `SpeechAdapter` gives alone. Call an engine from one thread at a time.

    Args:
        adapters: Folders of adapters, or their names on the Hub, by the name under which they are asked.
        folder: A folder in which every folder with an adapter is served under its name; see `look`.
        limit: How many adapters are in memory at most, None for all. The least recently used ones leave it.
        base: As for `SpeechAdapter.from_pretrained`, for all adapters.
        device: As there.
        dtype: As there.
        max_duration_s: As there. The padded recordings of one pass last no longer in sum.
        on_long_audio: As there; a recording that is skipped has an error in place of its answer.

    Raises:
        ValueError: There is no adapter, `limit` is below 1, or an adapter cannot be loaded.

    Examples:
        >>> engine = Engine({"emotions": "me/emotions", "english": "me/english"})  # doctest: +SKIP
        >>> engine.answer([Request("emotions", "classify", "a.wav"), Request("english", "transcribe", "a.wav")])
        ... # doctest: +SKIP
        [[{'label': 'happy', 'score': 0.93}, {'label': 'sad', 'score': 0.07}], 'one two']
    """

    def __init__(
        self,
        adapters: Mapping[str, str | Path],
        *,
        folder: str | Path | None = None,
        limit: int | None = None,
        base: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_duration_s: float = MAX_DURATION_S,
        on_long_audio: str = "error",
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}.")
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"There is no folder {str(folder)!r}. Pass a folder that holds folders of adapters.")
        self.folder = None if folder is None else Path(folder)
        self.limit = limit
        self._options: dict[str, Any] = {"base": base, "device": device, "dtype": dtype}
        self._long: dict[str, Any] = {"max_duration_s": max_duration_s, "on_long_audio": on_long_audio}
        self._sources: dict[str, Path] = {}
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # the least recently used first
        self._hosts: dict[tuple[Any, ...], SpeechAdapter] = {}  # what loaded each base with a head
        self._numbers = count()
        self._seen: dict[str, Any] = {}  # of the folder, at the last look
        self._taken: dict[str, Any] = {}  # of the folder, as it was loaded
        self._readers = ThreadPoolExecutor(4, "read")
        for name, source in adapters.items():
            self.put(name, source)
        self.look(settled=True)
        if not self._sources:
            raise ValueError("There is no adapter to serve: none was named, and the folder holds none.")

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters, in memory or not."""
        return sorted(self._sources)

    def put(self, name: str, source: str | Path) -> None:
        """Serve an adapter under a name. If the name is in use, the new adapter replaces the old one at once.

        Raises:
            ValueError: The adapter cannot be loaded. The old one stays.
        """
        folder = find_adapter(source)
        if name in self._loaded or self.limit is None or len(self._loaded) < self.limit:
            old, new = self._loaded.get(name), self._load(folder)
            self._loaded[name] = new
            self._forget(old)
        else:
            read_adapter(folder)
        self._sources[name] = folder

    def remove(self, name: str) -> None:
        """Serve an adapter no longer."""
        self._forget(self._loaded.pop(name, None))
        del self._sources[name]

    def look(self, settled: bool = False) -> None:
        """Look at the folder once: serve what is new in it or has changed, and no longer what is gone.

        A change counts once two looks in a row have found the same files, since it may be half copied. An adapter that
        cannot be loaded is logged, and an older one stays.

        Args:
            settled: Take what is there at once.
        """
        if self.folder is None:
            return
        there = {path.name: _state(path) for path in sorted(self.folder.iterdir()) if (path / CONFIG_NAME).is_file()}
        for name in self._taken.keys() - there.keys() - self._seen.keys():
            del self._taken[name]
            if name in self._sources:
                self.remove(name)
        for name, state in there.items():
            if state == self._taken.get(name) or not (settled or state == self._seen.get(name)):
                continue
            if name in self._sources and name not in self._taken:
                logger.warning("%r in %s is not served: another adapter has this name.", name, self.folder)
                continue
            self._taken[name] = state
            try:
                self.put(name, self.folder / name)
            except ValueError as error:
                logger.warning("%r in %s was not loaded: %s", name, self.folder, first_line(error))
        self._seen = there

    def check(self, adapter: str, task: str) -> None:
        """Refuse what no recording could change: an unknown adapter, or a task that is not its own.

        Raises:
            UnknownAdapterError: No adapter has that name.
            ValueError: The head of the adapter is for another task.
        """
        if adapter not in self._sources:
            raise UnknownAdapterError(
                f"There is no adapter {adapter!r}. The adapters are {shortened(map(repr, self.adapters))}."
            )
        if loaded := self._loaded.get(adapter):
            loaded.speech._check("verify" if task == "embed" else task)

    def threshold(self, adapter: str) -> float | None:
        """Return the score from which an adapter takes two voices for one, if it names a threshold."""
        return self._accept(adapter, "embed").speech.saved.config.get("verification_threshold")

    def answer(self, requests: Sequence[Request]) -> list[Any]:
        """Return the answer to each request: text, labels with their scores, or an embedding.

        What cannot be answered has the error in place of its answer, and costs no other request its own.
        """
        accepted = [_tried(self._accept, request.adapter, request.task) for request in requests]
        cut: list[Any] = list(self._readers.map(_pieces, accepted, requests))
        read = [one for one in enumerate(cut) if not isinstance(one[1], Exception)]
        pieces = [(requests[row].task, accepted[row], waveform) for row, found in read for waveform in found]
        answers: list[Any] = [None] * len(pieces)
        for numbers in _passes(pieces):
            task, batch = pieces[numbers[0]][0], [pieces[number][1:] for number in numbers]
            found = _tried(self._pass, batch, task)
            if isinstance(found, Exception):  # It may be one recording, or their number.
                found = [self._alone(one, task) for one in batch] if len(batch) > 1 else [found]
            for number, one in zip(numbers, found, strict=True):
                answers[number] = one
        while self.limit is not None and len(self._loaded) > self.limit:
            self._forget(self._loaded.popitem(last=False)[1])
        remaining = iter(answers)
        return [
            one if isinstance(one, Exception) else _joined([next(remaining) for _ in one], request.task, loaded)
            for one, request, loaded in zip(cut, requests, accepted, strict=True)
        ]

    def _alone(self, one: tuple[_Loaded, np.ndarray], task: str) -> Any:
        found = _tried(self._pass, [one], task)
        return found if isinstance(found, Exception) else found[0]

    def _pass(self, batch: Sequence[tuple[_Loaded, np.ndarray]], task: str) -> list[Any]:
        """Answer requests that share a pass."""
        every, waveforms = zip(*batch, strict=True)
        names, speech = [loaded.key for loaded in every], every[0].speech
        model: Any = speech.model
        model.set_adapter(names[0], inference_mode=True)  # A shorter window is that of the active adapter.
        mixed = len(set(names)) > 1
        route = current_route.set(Route(names, _beams(speech, task))) if mixed else nullcontext()
        with route, torch.inference_mode():
            if task == "embed":
                return speech._embed(waveforms)
            if task == "transcribe":
                return (speech._write if speech._generates else speech._decode)(waveforms)
            return speech._scores(waveforms)

    def _accept(self, name: str, task: str) -> _Loaded:
        """Return the adapter for a request, from now on the most recently used one; load it if need be."""
        self.check(name, task)
        if name not in self._loaded:
            try:
                self._loaded[name] = self._load(self._sources[name])
            except ValueError as error:
                logger.warning("%r cannot be loaded: %s", name, first_line(error))
                raise NotLoadedError(f"The adapter {name!r} cannot be loaded at present.") from error
            self.check(name, task)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def _load(self, folder: Path) -> _Loaded:
        saved = read_adapter(folder)
        base = str(self._options["base"] or _find_base(saved))
        place = (base, saved.config.get("revision"), saved.model_class)
        host = self._hosts.get(place)
        if host is None:
            key = "default"
            speech = SpeechAdapter.from_pretrained(folder, **self._options, **self._long)
            for (other_base, *_), other in self._hosts.items():
                if other_base == base:
                    try:
                        MultiTaskModel({"other": other.model, "new": speech.model})  # It shares their tensors.
                        break
                    except ValueError as error:
                        logger.warning("%s has a backbone of its own: %s", folder, first_line(error))
            self._hosts[place] = speech
        else:
            key = f"adapter{next(self._numbers)}"
            try:
                host.model.load_adapter(str(folder), key, torch_device=str(host.model.device))
                host.model.eval()
                speech = SpeechAdapter._around(host.model, saved, base, None, **self._long)
            except Exception as error:
                if key in host.model.peft_config:
                    host.model.delete_adapter(key)
                raise ValueError(f"The adapter in {str(folder)!r} cannot be used: {first_line(error)}") from error
        model: Any = speech.model
        model.set_adapter(key, inference_mode=True)  # The model's configuration is now that of its head.
        _ = speech._limits_s  # It is kept.
        shares = id(model), *_what_passes_share(speech)
        return _Loaded(speech, key, shares, dict(model.get_base_model().config.id2label))

    def _forget(self, loaded: _Loaded | None) -> None:
        """Free the memory of an adapter, and of its backbone if no other adapter uses it."""
        if loaded is None:
            return
        model: Any = loaded.speech.model
        others = [other.key for other in self._loaded.values() if other.speech.model is model]
        if others:
            model.set_adapter(others[0], inference_mode=True)  # PEFT warns where the active adapter is deleted.
            model.delete_adapter(loaded.key)
        else:
            self._hosts = {place: host for place, host in self._hosts.items() if host.model is not model}


def _tried(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns, or the error that it raises."""
    try:
        return function(*args)
    except Exception as error:
        return error


def _pieces(loaded: Any, request: Request) -> Any:
    return loaded if isinstance(loaded, Exception) else _tried(loaded.speech._pieces, request.recording, None)


def _passes(pieces: Sequence[tuple[str, _Loaded, np.ndarray]]) -> Iterator[list[int]]:
    """Return the numbers of the pieces that share a pass, so that none changes the answer to another."""
    groups: dict[Any, list[int]] = {}
    for number, (task, loaded, waveform) in enumerate(pieces):
        alone = number if loaded.speech._is_long(waveform) else None
        length = None if loaded.speech._pads else len(waveform)
        groups.setdefault((task, loaded.shares, length, alone), []).append(number)
    for numbers in groups.values():
        numbers.sort(key=lambda number: len(pieces[number][2]))
        speech = pieces[numbers[0]][1].speech
        most, start = speech.max_duration_s * speech.sampling_rate, 0
        for end in range(1, len(numbers) + 1):
            if end == len(numbers) or (end + 1 - start) * len(pieces[numbers[end]][2]) > most:
                yield numbers[start:end]
                start = end


def _joined(answers: Sequence[Any], task: str, loaded: _Loaded) -> Any:
    """Return the answer to a recording from those to its pieces."""
    if not answers:
        return ValueError("The recording is too long, and was skipped.")
    if failed := [one for one in answers if isinstance(one, Exception)]:
        return failed[0]
    if task == "transcribe":
        return " ".join(answers)
    mean = np.mean(answers, axis=0)
    return mean if task == "embed" else _labels(loaded.labels, mean)


def compare(one: np.ndarray, other: np.ndarray, threshold: float | None) -> Verification:
    """Compare two voices by their embeddings."""
    return Verification(float(cosine_scores({0: one, 1: other}, [(0, 1)])[0]), threshold)


def _what_passes_share(speech: SpeechAdapter) -> tuple[Any, ...]:
    """Return what has to be equal in adapters of one model for a pass that they share, labels aside."""
    config = speech.saved.config
    head = {
        setting: value
        for setting, value in (config.get("head_config") or {}).items()
        if setting not in ("id2label", "label2id")
    }
    pseudo_features = config.get("p_length") if "P" in str(config.get("adapters")) else 0
    vocabulary = frozenset(speech.tokenizer.get_vocab().items()) if speech.tokenizer is not None else None
    return json.dumps(head, sort_keys=True), pseudo_features, speech.feature_extractor.to_json_string(), vocabulary


def _beams(speech: SpeechAdapter, task: str) -> int:
    """Return how many beams the pipeline of Transformers searches with."""
    if task != "transcribe" or not speech._generates:
        return 1
    base: Any = speech.model.get_base_model()
    default: Any = getattr(type(speech._pipeline), "_default_generation_config", None)
    return base.generation_config.to_diff_dict().get("num_beams") or getattr(default, "num_beams", 1) or 1


def _labels(labels: Mapping[int, str], scores: np.ndarray) -> list[dict[str, Any]]:
    return [{"label": labels[number], "score": float(scores[number])} for number in np.argsort(-scores, kind="stable")]


def _state(folder: Path) -> tuple[Any, ...]:
    """Return what differs when a file of a folder has changed."""
    found = []
    for path in sorted(folder.iterdir()):
        try:
            status = path.stat()
        except OSError:  # It was removed just now.
            continue
        found.append((path.name, status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)
