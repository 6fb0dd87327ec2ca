"""From a saved adapter to answers for recordings: text, labels, voices.

`transformers.pipeline` takes the same parts, for what it does beyond this: `pipeline("automatic-speech-recognition",
model=adapter.model.get_base_model(), feature_extractor=..., tokenizer=...)` cuts long recordings into chunks and gives
timestamps. Needs soundfile and soxr: `pip install 'peft-elp[recipes]'`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoTokenizer, PreTrainedModel

from peft_elp.backbones import has_fixed_window, receptive_field, window_s
from peft_elp.heads import head_row
from peft_elp.saved.card import TOKENIZER
from peft_elp.saved.folder import SavedAdapter, find_adapter, is_hub_id, read_adapter
from peft_elp.wording import first_line, shortened

from .audio import AudioError, cut_long, decode, name_of
from .metrics import cosine_scores
from .speakers import is_padding_invariant, speaker_embeddings

Recording = str | Path | Mapping[str, Any] | np.ndarray | Tensor
EXTRACTOR = ("preprocessor_config.json", "processor_config.json")
RATES_HZ = range(1_000, 1_000_001)  # what a feature extractor may ask for
ONLY_IN_TRAINING = ("masked_spec_embed",)  # weights that no answer depends on
ANOTHER_BASE = "If the base is elsewhere, name it: base=... in Python, --base on the command line."
ON_LONG_AUDIO = ("error", "skip", "crop", "split")
SPECTRUM_S = 0.025  # what one frame of a spectrogram is computed from
MAX_DURATION_S = 120.0  # In WavLM base, the attention of one recording of this length takes about 5 GB.


@dataclass(frozen=True)
class Verification:
    """How alike two voices are.

    Args:
        score: The cosine of the angle between their embeddings, in [-1, 1].
        threshold: The score from which they count as one voice, None if there is no threshold.
    """

    score: float
    threshold: float | None = None

    @property
    def same(self) -> bool | None:
        """Whether they count as one voice; None without a threshold."""
        return None if self.threshold is None else self.score >= self.threshold


class SpeechAdapter:
    """A saved adapter with its base, ready for recordings.

    A recording is a path, an entry of a `datasets.Audio` column, or an array of floats, mono, with `sampling_rate` in
    Hz. Files are mixed down to mono, and all recordings are resampled to the rate of the base. One recording gives one
    answer, a list gives a list. How many are answered at a time (`batch_size`) changes no answer: where padding would
    (see `is_padding_invariant`), only recordings of the same length share a pass. What cannot be answered raises a
    `ValueError`: a task that is not the head's, or a recording that is missing, broken, empty, too short or too long.

    A recording is too long if it exceeds `max_duration_s`, or the window of an encoder that would cut off its rest,
    such as Whisper's 30 seconds. Models that generate text read recordings of any length.

    A pickled `SpeechAdapter` holds the name of its folder, not its weights: a worker process loads it from there.
    Changes that were made in memory do not travel.

    Args:
        model: The base with the adapter, head included.
        saved: The adapter's folder.
        feature_extractor: The feature extractor of the base.
        tokenizer: The tokenizer of the adapter, if it writes text.
        max_duration_s: The longest recording that is read in one piece.
        on_long_audio: What to do with a recording that is too long: "error" refuses it, "skip" answers None, "crop"
            reads its beginning, "split" reads pieces of equal length and averages their scores or embeddings; texts
            are joined, and a word at a cut may be lost.

    Raises:
        ValueError: `on_long_audio` is none of these.

    Examples:
        >>> emotions = SpeechAdapter.from_pretrained("me/emotions")  # doctest: +SKIP
        >>> emotions.classify("call.wav", top_k=1)  # doctest: +SKIP
        [{'label': 'happy', 'score': 0.93}]
        >>> SpeechAdapter.from_pretrained("me/english").transcribe(["a.wav", "b.wav"])  # doctest: +SKIP
        ['one two', 'three']
        >>> SpeechAdapter.from_pretrained("me/voices").verify("a.wav", "b.wav", threshold=0.3).same  # doctest: +SKIP
        True
    """

    def __init__(
        self,
        model: PeftModel,
        saved: SavedAdapter,
        feature_extractor: Any,
        tokenizer: Any = None,
        max_duration_s: float = MAX_DURATION_S,
        on_long_audio: str = "error",
    ) -> None:
        _check_choice(on_long_audio)
        self.model = model
        self.saved = saved
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer
        self.max_duration_s = max_duration_s
        self.on_long_audio = on_long_audio
        base: Any = model.get_base_model()
        self._base = base
        self._head = head_row(type(base))
        self._generates = self._head is not None and self._head.output == "generated_tokens"
        self._dtype = base.dtype
        self._pads = is_padding_invariant(base, feature_extractor)
        self._options: dict[str, Any] = {}  # of `from_pretrained`, for another process

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        *,
        base: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        max_duration_s: float = MAX_DURATION_S,
        on_long_audio: str = "error",
    ) -> SpeechAdapter:
        """Load an adapter, the base that it names, and what was saved beside it. No code of a repository is run.

        Args:
            adapter: A folder, or a name on the Hub.
            base: Where the base is, if not where the adapter says. A relative path in an adapter counts from the
                working directory, or else from the folder around the adapter's.
            device: A device such as "cuda:1" or "mps". Default: a CUDA device if there is one, else the CPU.
            dtype: The dtype of the base, such as "float16". Default: float32 on a CPU, which computes slowly in half
                precision, else as in its checkpoint.
            subfolder: The folder inside of `adapter`.
            revision: The adapter's branch or commit on the Hub.
            token: For private repositories.
            max_duration_s: As for the class.
            on_long_audio: As for the class.

        Raises:
            ValueError: There is no adapter or no base, the base lacks weights, or the two do not fit. The message says
                which.
        """
        _check_choice(on_long_audio)
        saved = read_adapter(find_adapter(adapter, subfolder, revision, token))
        with _named_errors(f"The device {str(device)!r}"):
            target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.zeros(1, device=target).cpu()  # A meta tensor cannot be copied.
        name = str(base) if base else _find_base(saved)
        chosen = torch.float32 if dtype is None and target.type == "cpu" else dtype
        options = {} if chosen is None else {"dtype": chosen}
        if saved.config.get("revision") and not base:  # The revision in a configuration is the one of the base.
            options["revision"] = saved.config["revision"]
        backbone = _load_base(saved, name, token=token, **options)
        with _named_errors(f"The adapter in {str(saved.folder)!r}"):
            model = PeftModel.from_pretrained(backbone, str(saved.folder), torch_device=str(target)).eval().to(target)
        long = {"max_duration_s": max_duration_s, "on_long_audio": on_long_audio}
        loaded = cls._around(model, saved, name, token, **long)
        loaded._options = {"base": base, "device": device, "dtype": dtype, **long}
        return loaded

    @classmethod
    def _around(
        cls,
        model: PeftModel,
        saved: SavedAdapter,
        base: str,
        token: str | bool | None,
        max_duration_s: float,
        on_long_audio: str = "error",
    ) -> SpeechAdapter:
        """Load the feature extractor and the tokenizer that belong to an adapter."""
        window = {"chunk_length": seconds} if (seconds := saved.config.get("chunk_length")) else {}
        source = str(saved.folder) if saved.holds(*EXTRACTOR) else base
        options: dict[str, Any] = {"token": token, "trust_remote_code": False}
        with _named_errors(f"The feature extractor in {source!r}"):
            extractor: Any = AutoFeatureExtractor.from_pretrained(source, **options, **window)
        rate_hz = getattr(extractor, "sampling_rate", None)
        if rate_hz not in RATES_HZ:
            raise ValueError(
                f"The sampling rate of the feature extractor in {source!r} must be from 1,000 to 1,000,000 Hz, got "
                f"{rate_hz!r}."
            )
        if saved.config.get("pool_own_frames"):
            extractor.return_attention_mask = True
        tokenizer = None
        has_own = saved.holds(*TOKENIZER)
        # Without a trained head, the adapter writes with the vocabulary of its base.
        if saved.task == "automatic-speech-recognition" and (has_own or not saved.counts["head"]):
            source = str(saved.folder) if has_own else base
            with _named_errors(f"The tokenizer in {source!r}"):
                tokenizer = AutoTokenizer.from_pretrained(source, **options)
        return cls(model, saved, extractor, tokenizer, max_duration_s, on_long_audio)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return partial(type(self).from_pretrained, self.saved.folder.resolve(), **self._options), ()

    @property
    def sampling_rate(self) -> int:
        """The rate in Hz that the base reads."""
        return self.feature_extractor.sampling_rate

    @property
    def task(self) -> str:
        """What the adapter is for: "transcribe", "verify" or else "classify"."""
        if self.tokenizer is not None:
            return "transcribe"
        compares = self.saved.config.get("verification_threshold") is not None
        return "verify" if compares or "XVector" in str(self.saved.model_class) else "classify"

    def read(self, recording: Recording, sampling_rate: int | None = None) -> np.ndarray:
        """Return the waveform of a recording at `self.sampling_rate`: float32 `(samples,)`.

        Raises:
            AudioError: The recording cannot be answered. With `on_long_audio` "crop" or "split" it may be too long.
        """
        entry: Any = recording
        if isinstance(recording, (np.ndarray, Tensor)):
            entry = {"array": recording, "sampling_rate": sampling_rate}
        whole = self._generates or self.on_long_audio in ("crop", "split")
        try:
            waveform = decode(entry, self.sampling_rate, None if whole else self.max_duration_s)
            duration_s, (least_s, most_s) = len(waveform) / self.sampling_rate, self._limits_s
            if duration_s < least_s:
                raise AudioError(f"it is too short to judge, {duration_s:.3f} s; at least {least_s:.3f} s are needed")
            if duration_s > most_s and not whole:
                raise AudioError(
                    f"it is too long, {duration_s:.2f} s; the model reads a window of {most_s:g} s", "too long"
                )
            if not waveform.any():
                raise AudioError("it is silent, all samples are 0", "empty")
        except AudioError as error:
            ways = f" on_long_audio (--on-long-audio) can be {', '.join(ON_LONG_AUDIO[1:])}."
            advice = ways if error.reason == "too long" else ""
            raise AudioError(f"{name_of(entry)}: {error}.{advice}", error.reason) from error
        return waveform

    def _pieces(self, recording: Recording, sampling_rate: int | None) -> list[np.ndarray]:
        """Return the waveforms that are read in place of a recording; none if it is skipped."""
        try:
            waveform = self.read(recording, sampling_rate)
        except AudioError as error:
            if error.reason == "too long" and self.on_long_audio == "skip":
                return []
            raise
        if self._generates:
            return [waveform]
        return cut_long(waveform, min(self.max_duration_s, self._limits_s[1]) * self.sampling_rate, self.on_long_audio)

    @cached_property
    def _limits_s(self) -> tuple[float, float]:
        """The duration that the first frame needs, and the one of which the feature extractor keeps everything."""
        config = self._base.config
        least_s = SPECTRUM_S
        if hasattr(config, "conv_kernel"):
            frames = 1
            if self._head and self._head.output == "embedding":  # Its deviation needs two, after its convolutions.
                frames = 2 + sum((k - 1) * d for k, d in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True))
            least_s = (receptive_field(config) + (frames - 1) * prod(config.conv_stride)) / self.sampling_rate
        return least_s, window_s(self.feature_extractor)

    def transcribe(
        self, recordings: Recording | Sequence[Recording], sampling_rate: int | None = None, batch_size: int = 1
    ) -> Any:
        """Return what is said in each recording, as text.

        Raises:
            ValueError: No tokenizer is beside the adapter, or as for the class.
        """
        self._check("transcribe")
        if self.tokenizer is None:
            raise ValueError(
                f"{str(self.saved.folder)!r} has no tokenizer, which turns the numbers of the head into text. Save "
                "the tokenizer of the training there: tokenizer.save_pretrained(folder)."
            )
        write = self._write if self._generates else self._decode
        return self._answer(recordings, sampling_rate, batch_size, write, " ".join)

    def classify(
        self,
        recordings: Recording | Sequence[Recording],
        sampling_rate: int | None = None,
        batch_size: int = 1,
        top_k: int | None = None,
    ) -> Any:
        """Return the labels of each recording with their scores, the likeliest first, as `transformers.pipeline` does.

        With `top_k`, only so many labels.
        """
        self._check("classify")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k!r}.")
        return self._answer(recordings, sampling_rate, batch_size, self._scores, partial(self._named, top_k=top_k))

    def embed(
        self, recordings: Recording | Sequence[Recording], sampling_rate: int | None = None, batch_size: int = 1
    ) -> Any:
        """Return the embedding of each voice, float32 `(width,)`; see `speaker_embeddings`."""
        self._check("verify")
        return self._answer(recordings, sampling_rate, batch_size, self._embed, _mean)

    def verify(
        self, first: Recording, second: Recording, sampling_rate: int | None = None, threshold: float | None = None
    ) -> Verification:
        """Compare the voices of two recordings.

        This is for adapters that were trained to tell speakers apart. One that tells emotions apart compares emotions.
        They count as one voice from the score `threshold`, by default the adapter's `verification_threshold`.
        """
        embeddings: dict[Any, Any] = dict(enumerate(self.embed([first, second], sampling_rate)))
        if any(one is None for one in embeddings.values()):
            raise ValueError("A recording was skipped, so there are no two voices to compare.")
        score = float(cosine_scores(embeddings, [(0, 1)])[0])
        return Verification(score, self.saved.config.get("verification_threshold") if threshold is None else threshold)

    def _check(self, task: str) -> None:
        able = self._head.commands if self._head else ()
        if task not in able:
            raise ValueError(
                f"This adapter cannot {task}: it was trained with the head of {type(self._base).__name__}"
                + (f", which can {' and '.join(able)}." if able else ". For that head, use its model directly.")
            )

    def _answer(
        self,
        recordings: Any,
        sampling_rate: int | None,
        batch_size: int,
        answer: Callable[[Sequence[np.ndarray]], Sequence[Any]],
        join: Callable[[Sequence[Any]], Any],
    ) -> Any:
        """Answer for the pieces of each recording, and join their answers."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}.")
        if not isinstance(recordings, Sequence) or isinstance(recordings, str):
            return self._answer([recordings], sampling_rate, 1, answer, join)[0]
        answers: list[Any] = []
        for start in range(0, len(recordings), batch_size):
            cut = [self._pieces(one, sampling_rate) for one in recordings[start : start + batch_size]]
            waveforms = [piece for pieces in cut for piece in pieces]
            found: dict[int, Any] = {}
            for numbers in self._batches(waveforms, batch_size):
                found.update(zip(numbers, answer([waveforms[number] for number in numbers]), strict=True))
            remaining = iter(range(len(waveforms)))
            answers += [join([found[next(remaining)] for _ in pieces]) if pieces else None for pieces in cut]
        return answers

    def _batches(self, waveforms: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
        """Return the numbers of the waveforms that share a pass, so that none changes the answer for another."""
        shared: dict[Any, list[int]] = {}
        for number, waveform in enumerate(waveforms):
            length = None if self._pads else len(waveform)
            shared.setdefault(("long", number) if self._is_long(waveform) else length, []).append(number)
        for numbers in shared.values():
            yield from (numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size))

    def _is_long(self, waveform: np.ndarray) -> bool:
        return len(waveform) > self._limits_s[1] * self.sampling_rate

    def _inputs(self, waveforms: Sequence[np.ndarray]) -> dict[str, Tensor]:
        padding = {} if has_fixed_window(self._base) else {"padding": True}  # A window is what extractors pad to.
        inputs = self.feature_extractor(
            list(waveforms), sampling_rate=self.sampling_rate, return_tensors="pt", **padding
        )
        return dict(inputs.to(self.model.device, dtype=self._dtype))  # It casts floating point tensors alone.

    @cached_property
    def _pipeline(self) -> Any:
        return transformers.pipeline(
            "automatic-speech-recognition",
            model=self._base,
            feature_extractor=self.feature_extractor,
            tokenizer=self.tokenizer,
            device=self.model.device,
            dtype=self._dtype,
            trust_remote_code=False,
        )

    def _write(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        # By the timestamps that it writes, Whisper moves its window through a long recording.
        options = {"return_timestamps": True} if self._is_long(waveforms[0]) else {}
        entries = [{"raw": waveform, "sampling_rate": self.sampling_rate} for waveform in waveforms]
        return [answer["text"].strip() for answer in self._pipeline(entries, batch_size=len(entries), **options)]

    def _decode(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        inputs = self._inputs(waveforms)
        with torch.inference_mode():
            tokens = _finite(self.model(**inputs).logits).argmax(-1)
        if "attention_mask" not in inputs or not hasattr(self._base, "_get_feature_vector_attention_mask"):
            return self.tokenizer.batch_decode(tokens)
        mask = self._base._get_feature_vector_attention_mask(tokens.shape[1], inputs["attention_mask"])
        return [self.tokenizer.decode(one[own.bool()]) for one, own in zip(tokens, mask, strict=True)]

    def _scores(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            logits = _finite(self.model(**self._inputs(waveforms)).logits).float().cpu()
        functions = {"multi_label_classification": torch.sigmoid, "regression": torch.clone}
        return list(functions.get(self._base.config.problem_type, partial(torch.softmax, dim=-1))(logits).numpy())

    def _named(self, scores: Sequence[np.ndarray], top_k: int | None) -> list[dict[str, Any]]:
        """Return the labels with the mean of their scores, the likeliest first."""
        mean, names = _mean(scores), self._base.config.id2label
        order = np.argsort(-mean, kind="stable")[:top_k].tolist()
        return [{"score": float(mean[number]), "label": names[number]} for number in order]

    def _embed(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            embeddings = _finite(speaker_embeddings(self.model, **self._inputs(waveforms)))
        return list(embeddings.float().cpu().numpy())


def _check_choice(on_long_audio: str) -> None:
    if on_long_audio not in ON_LONG_AUDIO:
        raise ValueError(f"on_long_audio must be one of {', '.join(ON_LONG_AUDIO)}, got {on_long_audio!r}.")


def _find_base(saved: SavedAdapter) -> str:
    """Return where the base of an adapter is: a Hub id or a path."""
    if not saved.base:
        raise ValueError(f"The adapter in {str(saved.folder)!r} does not name its base. {ANOTHER_BASE}")
    beside = saved.folder.resolve().parent
    places = [saved.base, str(beside / saved.base)]
    if not is_hub_id(saved.base):
        places.append(str(beside / Path(saved.base).name))
    return next((place for place in places if os.path.isfile(os.path.join(place, "config.json"))), saved.base)


def _load_base(saved: SavedAdapter, name: str, **options: Any) -> PreTrainedModel:
    model_class: Any = getattr(transformers, saved.model_class or "", None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ValueError(
            f"The adapter in {str(saved.folder)!r} names the class {saved.model_class!r}, which is not a model class "
            "of Transformers. Save the adapter from a PeftModel around a model of Transformers."
        )
    with _named_errors(f"The base {name!r} of the adapter in {str(saved.folder)!r}", ANOTHER_BASE):
        if not os.path.isdir(name) and not is_hub_id(name):
            raise FileNotFoundError("there is no such folder.")
        loaded: Any = model_class.from_pretrained(name, output_loading_info=True, trust_remote_code=False, **options)
    model, report = loaded
    brought = (*(saved.config.get("modules_to_save") or ()), *ONLY_IN_TRAINING)  # full paths, or endings of paths
    lacking = [key for key in report["missing_keys"] if not any(f".{module}." in f".{key}." for module in brought)]
    if lacking:
        raise ValueError(
            f"The base {name!r} lacks {len(lacking)} weights that {saved.model_class} has and the adapter in "
            f"{str(saved.folder)!r} does not bring: {shortened(sorted(lacking), 3)}. Was it trained on another base? "
            f"{ANOTHER_BASE}"
        )
    return model


@contextmanager
def _named_errors(what: str, advice: str = "") -> Iterator[None]:
    """Say in one sentence what could not be loaded, whatever is wrong with files by a stranger."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} cannot be used: {first_line(error).rstrip('.')}. {advice}".rstrip()) from error


def _mean(answers: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean over the pieces of a recording, which are of one length."""
    return np.mean(answers, axis=0)


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ValueError(
            "The model answers with values that are not finite. Its weights are broken, or too large for its dtype."
        )
    return values
