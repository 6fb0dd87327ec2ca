"""From a saved adapter to answers for recordings: text, labels, voices.

`transformers.pipeline` takes the same parts, for what it does beyond this: `pipeline("automatic-speech-recognition",
model=adapter.model.get_base_model(), feature_extractor=..., tokenizer=...)` cuts long recordings into chunks and gives
timestamps. Needs soundfile and soxr: `pip install 'peft-elp[recipes]'`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
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

from peft_elp.backbones import has_fixed_window, receptive_field
from peft_elp.heads import head_row
from peft_elp.saved.folder import SavedAdapter, find_adapter, first_line, is_hub_id, read_adapter
from peft_elp.wording import shortened

from .audio import AudioError, decode, resample
from .metrics import cosine_scores
from .speakers import is_padding_invariant, speaker_embeddings

Recording = str | Path | Mapping[str, Any] | np.ndarray | Tensor
Answers = list[Any]
TOKENIZER = ("tokenizer_config.json", "vocab.json", "tokenizer.json")
EXTRACTOR = ("preprocessor_config.json", "processor_config.json")
RATES_HZ = range(1_000, 1_000_001)  # what a feature extractor may ask for
ONLY_IN_TRAINING = ("masked_spec_embed",)  # weights that no answer depends on
ANOTHER_BASE = "If the base is elsewhere, name it: base=... in Python, --base on the command line."


@dataclass(frozen=True)
class Verification:
    """How alike two voices are.

    Args:
        score: The cosine of the angle between their embeddings, in [-1, 1].
        threshold: The score from which they count as one voice, None if there is no threshold.

    Examples:
        >>> Verification(score=0.7, threshold=0.3).same
        True
    """

    score: float
    threshold: float | None = None

    @property
    def same(self) -> bool | None:
        """Whether they count as one voice; None without a threshold."""
        return None if self.threshold is None else self.score >= self.threshold


class SpeechAdapter:
    """A saved adapter with its base, ready for recordings.

    A recording is a path, an entry of a `datasets.Audio(decode=False)` column, or an array of floats, mono, with
    `sampling_rate`. Files are mixed down to mono, and all recordings are resampled to the rate of the base. One
    recording gives one answer, a list gives a list. How many are answered at a time (`batch_size`) changes no answer:
    where padding would, because the base's convolutions are normalised over time or it reads no mask, only recordings
    of the same length share a pass.

    A pickled `SpeechAdapter` holds the name of its folder, not its weights: a worker process loads it from there.
    Changes that were made in memory do not travel.

    Args:
        model: The base with the adapter, head included.
        saved: The adapter's folder.
        feature_extractor: The feature extractor of the base.
        tokenizer: The tokenizer of the adapter, if it writes text.

    Examples:
        >>> emotions = SpeechAdapter.from_pretrained("me/emotions")  # doctest: +SKIP
        >>> emotions.classify("call.wav", top_k=1)  # doctest: +SKIP
        [{'label': 'happy', 'score': 0.93}]
    """

    def __init__(self, model: PeftModel, saved: SavedAdapter, feature_extractor: Any, tokenizer: Any = None) -> None:
        self.model = model
        self.saved = saved
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer
        base: Any = model.get_base_model()
        self._base = base
        self._dtype = _dtype(base)
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
    ) -> SpeechAdapter:
        """Load an adapter, the base that it names, and what was saved beside it. No code of a repository is run.

        Args:
            adapter: A folder, or a name on the Hub.
            base: Where the base is, if not where the adapter says. A relative path in an adapter counts from the
                working directory, or else from the folder around the adapter's.
            device: A device such as "cuda:1" or "mps". Default: a CUDA device if there is one, else the CPU.
            dtype: The dtype of the base, such as "float16". Default: as in its checkpoint.
            subfolder: The folder inside of `adapter`.
            revision: The adapter's branch or commit on the Hub.
            token: For private repositories.

        Raises:
            ValueError: There is no adapter or no base, the base lacks weights, or the two do not fit. The message says
                which.
        """
        saved = read_adapter(find_adapter(adapter, subfolder, revision, token))
        target = _device(device)
        name = str(base) if base else _find_base(saved)
        options = {"dtype": _named_dtype(dtype)} if dtype is not None else {}
        if saved.config.get("revision") and not base:  # The revision in a configuration is the one of the base.
            options["revision"] = saved.config["revision"]
        backbone = _load_base(saved, name, token=token, **options)
        try:
            model = PeftModel.from_pretrained(backbone, str(saved.folder), torch_device=str(target)).eval().to(target)
        except ValueError:
            raise
        except Exception as error:  # Whatever is wrong with files by a stranger.
            raise ValueError(
                f"The adapter in {str(saved.folder)!r} could not be loaded: {first_line(error)}"
            ) from error
        window = {"chunk_length": seconds} if (seconds := saved.config.get("chunk_length")) else {}
        source = str(saved.folder) if saved.holds(*EXTRACTOR) else name
        extractor = _load(AutoFeatureExtractor, source, token, **window)
        if getattr(extractor, "sampling_rate", None) not in RATES_HZ:
            raise ValueError(
                f"The feature extractor of {str(adapter)!r} has the sampling rate "
                f"{getattr(extractor, 'sampling_rate', None)!r}, where a number of samples per second belongs."
            )
        tokenizer = None
        if saved.task == "automatic-speech-recognition":
            if saved.holds(*TOKENIZER):
                tokenizer = _load(AutoTokenizer, str(saved.folder), token)
            elif not saved.counts["head"]:  # It writes with the base's own vocabulary.
                tokenizer = _load(AutoTokenizer, name, token)
        loaded = cls(model, saved, extractor, tokenizer)
        loaded._options = {"base": base, "device": device, "dtype": dtype}
        return loaded

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return partial(type(self).from_pretrained, self.saved.folder.resolve(), **self._options), ()

    @property
    def sampling_rate(self) -> int:
        """The rate in Hz that the base reads."""
        return self.feature_extractor.sampling_rate

    def read(self, recording: Recording, sampling_rate: int | None = None) -> np.ndarray:
        """The waveform of a recording as the base reads it.

        Args:
            recording: A file or an array.
            sampling_rate: The rate of an array in Hz; files state their own.

        Returns:
            float32 `(samples,)`, mono, at `self.sampling_rate`.

        Raises:
            ValueError: It is missing, broken, empty, too short or too long, or an array comes without a sampling rate.
        """
        if isinstance(recording, (np.ndarray, Tensor)):
            name, waveform = "The array", _resampled(recording, sampling_rate, self.sampling_rate)
        else:
            name = str(recording.get("path") if isinstance(recording, Mapping) else recording)
            try:
                waveform = decode(recording, self.sampling_rate)
            except AudioError as error:
                raise ValueError(f"{name}: {error}.") from error
        least = _least_samples(self._base)
        if len(waveform) < least:
            raise ValueError(
                f"{name}: too short, {len(waveform) / self.sampling_rate:.3f} s. The model needs "
                f"{least / self.sampling_rate:.3f} s or more."
            )
        chunk_length = self.saved.config.get("chunk_length")
        if chunk_length is not None and len(waveform) > chunk_length * self.sampling_rate:
            raise ValueError(
                f"{name}: too long, {len(waveform) / self.sampling_rate:.3f} s. The adapter was trained on a window "
                f"of {chunk_length} s, and the rest would be cut off."
            )
        return waveform

    def transcribe(
        self, recordings: Recording | Sequence[Recording], sampling_rate: int | None = None, batch_size: int = 1
    ) -> Any:
        """What is said in each recording, as text.

        Args:
            recordings: One or a list.
            sampling_rate: The rate of arrays in Hz.
            batch_size: How many to answer at a time.

        Returns:
            A string for each recording.

        Raises:
            ValueError: The adapter's head does not write text, no tokenizer is beside it, or a recording cannot be
                used.

        Examples:
            >>> SpeechAdapter.from_pretrained("english").transcribe(["a.wav", "b.wav"])  # doctest: +SKIP
            ['one two', 'three']
        """
        self._check("transcribe")
        if self.tokenizer is None:
            raise ValueError(
                f"{str(self.saved.folder)!r} has no tokenizer, which turns the numbers of the head into text. Save "
                "the tokenizer of the training there: tokenizer.save_pretrained(folder)."
            )
        return self._answer(recordings, sampling_rate, batch_size, self._transcribe)

    def classify(
        self,
        recordings: Recording | Sequence[Recording],
        sampling_rate: int | None = None,
        batch_size: int = 1,
        top_k: int | None = None,
    ) -> Any:
        """The labels of each recording with their scores, the likeliest first, as `transformers.pipeline` gives them.

        Args:
            recordings: One or a list.
            sampling_rate: The rate of arrays in Hz.
            batch_size: How many to answer at a time.
            top_k: How many labels, None for all.

        Returns:
            A list of `{"label": str, "score": float}` for each recording.

        Raises:
            ValueError: The adapter's head does not have labels, or a recording cannot be used.

        Examples:
            >>> SpeechAdapter.from_pretrained("emotions").classify("a.wav", top_k=1)  # doctest: +SKIP
            [{'label': 'happy', 'score': 0.93}]
        """
        self._check("classify")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is 1 or more, got {top_k!r}.")
        answers = self._answer(recordings, sampling_rate, batch_size, self._classify)
        return [answer[:top_k] for answer in answers] if _several(recordings) else answers[:top_k]

    def embed(
        self, recordings: Recording | Sequence[Recording], sampling_rate: int | None = None, batch_size: int = 1
    ) -> Any:
        """The embedding of each voice; see `speaker_embeddings`.

        Args:
            recordings: One or a list.
            sampling_rate: The rate of arrays in Hz.
            batch_size: How many to answer at a time.

        Returns:
            float32 `(width,)` for each recording.

        Raises:
            ValueError: The adapter's head does not have embeddings, or a recording cannot be used.

        Examples:
            >>> SpeechAdapter.from_pretrained("voices").embed("a.wav").shape  # doctest: +SKIP
            (512,)
        """
        self._check("verify")
        return self._answer(recordings, sampling_rate, batch_size, self._embed)

    def verify(
        self, first: Recording, second: Recording, sampling_rate: int | None = None, threshold: float | None = None
    ) -> Verification:
        """How alike the voices of two recordings are.

        This is for adapters that were trained to tell speakers apart. One that tells emotions apart compares emotions.

        Args:
            first: A recording.
            second: Another one.
            sampling_rate: The rate of arrays in Hz.
            threshold: The score from which they count as one voice. Default: the adapter's `verification_threshold`.

        Raises:
            ValueError: The adapter's head does not have embeddings, or a recording cannot be used.

        Examples:
            >>> SpeechAdapter.from_pretrained("voices").verify("a.wav", "b.wav", threshold=0.3).same  # doctest: +SKIP
            True
        """
        embeddings: dict[Any, Any] = dict(enumerate(self.embed([first, second], sampling_rate)))
        score = float(cosine_scores(embeddings, [(0, 1)])[0])
        return Verification(score, self.saved.config.get("verification_threshold") if threshold is None else threshold)

    def _check(self, task: str) -> None:
        kind = type(self._base).__name__
        row = head_row(kind)
        able = row.commands if row else ()
        if task not in able:
            raise ValueError(
                f"This adapter cannot {task}: it was trained with the head of {kind}"
                + (f", which can {' and '.join(able)}." if able else ". For that head, use its model directly.")
            )

    def _answer(self, recordings: Any, sampling_rate: int | None, batch_size: int, answer: Any) -> Any:
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more, got {batch_size!r}.")
        if not _several(recordings):
            return answer([self.read(recordings, sampling_rate)])[0]
        answers: Answers = []
        for start in range(0, len(recordings), batch_size):
            waveforms = [self.read(recording, sampling_rate) for recording in recordings[start : start + batch_size]]
            together: Answers = [None] * len(waveforms)
            for rows in self._batches(waveforms):
                for row, one in zip(rows, answer([waveforms[row] for row in rows]), strict=True):
                    together[row] = one
            answers += together
        return answers

    def _batches(self, waveforms: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """The numbers of the waveforms that share a pass, so that none changes the answer for another."""
        lengths = [0 if self._pads else len(waveform) for waveform in waveforms]
        for length in dict.fromkeys(lengths):
            yield [row for row, other in enumerate(lengths) if other == length]

    def _inputs(self, waveforms: Sequence[np.ndarray]) -> dict[str, Tensor]:
        padding = {} if has_fixed_window(self._base) else {"padding": True}  # A window is what extractors pad to.
        inputs = self.feature_extractor(
            list(waveforms), sampling_rate=self.sampling_rate, return_tensors="pt", **padding
        )
        return dict(inputs.to(self.model.device, dtype=self._dtype))  # It casts floating point tensors alone.

    @cached_property
    def _pipeline(self) -> Any:
        """For models that generate text; it takes recordings of any length."""
        return transformers.pipeline(
            "automatic-speech-recognition",
            model=self._base,
            feature_extractor=self.feature_extractor,
            tokenizer=self.tokenizer,
            device=self.model.device,
            dtype=self._dtype,
            trust_remote_code=False,
        )

    def _transcribe(self, waveforms: Sequence[np.ndarray]) -> Answers:
        row = head_row(type(self._base))
        if row and row.output == "generated_tokens":
            rows = [{"raw": waveform, "sampling_rate": self.sampling_rate} for waveform in waveforms]
            return [answer["text"].strip() for answer in self._pipeline(rows, batch_size=len(rows))]
        inputs = self._inputs(waveforms)
        with torch.inference_mode():
            tokens = _finite(self.model(**inputs).logits).argmax(-1)
        if len(waveforms) == 1 or not self._pads:
            return [self.tokenizer.decode(row) for row in tokens]
        mask = self._base._get_feature_vector_attention_mask(tokens.shape[1], inputs["attention_mask"])
        return [self.tokenizer.decode(row[valid.bool()]) for row, valid in zip(tokens, mask, strict=True)]

    def _classify(self, waveforms: Sequence[np.ndarray]) -> Answers:
        with torch.inference_mode():
            logits = _finite(self.model(**self._inputs(waveforms)).logits).float()
        problem = self._base.config.problem_type
        if problem == "multi_label_classification":
            scores = logits.sigmoid()
        else:
            scores = logits if problem == "regression" else logits.softmax(-1)
        names = self._base.config.id2label
        return [
            [
                {"label": names.get(index, f"LABEL_{index}"), "score": row[index]}
                for index in sorted(range(len(row)), key=lambda i: -row[i])
            ]
            for row in scores.tolist()
        ]

    def _embed(self, waveforms: Sequence[np.ndarray]) -> Answers:
        with torch.inference_mode():
            embeddings = _finite(speaker_embeddings(self.model, **self._inputs(waveforms)))
        return list(embeddings.float().cpu().numpy())


def _find_base(saved: SavedAdapter) -> str:
    """Where the base of an adapter is: a Hub id or a path."""
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
    try:
        if not os.path.isdir(name) and not is_hub_id(name):
            raise FileNotFoundError("there is no such folder.")
        loaded: Any = model_class.from_pretrained(name, output_loading_info=True, trust_remote_code=False, **options)
    except Exception as error:  # Whatever is wrong with files by a stranger.
        raise ValueError(
            f"The base {name!r} of the adapter in {str(saved.folder)!r} could not be loaded: {first_line(error)} "
            f"{ANOTHER_BASE}"
        ) from error
    model, report = loaded
    brought = (*(saved.config.get("modules_to_save") or ()), *ONLY_IN_TRAINING)
    lacking = sorted(key for key in report["missing_keys"] if not _is_below(key, brought))
    if lacking:
        raise ValueError(
            f"The base {name!r} lacks {len(lacking)} weights that {saved.model_class} has and the adapter in "
            f"{str(saved.folder)!r} does not bring: {shortened(lacking, 3)}. Was it trained on another base? "
            f"{ANOTHER_BASE}"
        )
    return model


def _is_below(key: str, modules: Sequence[str]) -> bool:
    """Whether a tensor belongs to one of the modules, which are full paths or endings of paths."""
    return any(f".{module}." in f".{key}." for module in modules)


def _load(auto_class: Any, source: str, token: str | bool | None, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(source, token=token, trust_remote_code=False, **options)
    except Exception as error:  # Whatever is wrong with files by a stranger.
        what = {AutoTokenizer: "tokenizer", AutoFeatureExtractor: "feature extractor"}[auto_class]
        raise ValueError(f"The {what} in {source!r} could not be loaded: {first_line(error)}") from error


def _dtype(base: Any) -> torch.dtype:
    """The dtype of a base, whose adapters may have another."""
    own = (parameter for name, parameter in base.named_parameters() if not (".elp_" in name or ".modules_to" in name))
    return next((parameter.dtype for parameter in own if parameter.is_floating_point()), torch.float32)


def _named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"The dtype {dtype!r} is not one of floating point. Write for example float16.")
    return found


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ValueError(
            f"The model answers with values that are not finite, in {values.dtype}. Its weights are broken, or too "
            "large for that dtype."
        )
    return values


def _least_samples(model: Any) -> int:
    """The fewest samples that a model can answer for, if convolutions read the waveform."""
    config = model.config
    if not hasattr(config, "conv_kernel"):
        return 1
    frames = 1
    row = head_row(type(model))
    if row and row.output == "embedding":  # The head needs two frames after its own convolutions, for a deviation.
        frames = 2 + sum(
            (kernel - 1) * step for kernel, step in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True)
        )
    return receptive_field(config) + (frames - 1) * prod(config.conv_stride)


def _several(recordings: Any) -> bool:
    return isinstance(recordings, Sequence) and not isinstance(recordings, str)


def _device(device: str | torch.device | None) -> torch.device:
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=target).cpu()  # A meta tensor cannot be copied.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"The device {str(device)!r} cannot be used: {first_line(error)} Write for example cpu."
        ) from error
    return target


def _resampled(recording: np.ndarray | Tensor, sampling_rate: int | None, wanted: int) -> np.ndarray:
    waveform = recording.detach().cpu().numpy() if isinstance(recording, Tensor) else recording
    if sampling_rate is None:
        raise ValueError(f"An array needs its sampling rate. Write for example sampling_rate={wanted}.")
    if sampling_rate < 1:
        raise ValueError(f"A sampling rate is a number of samples per second, got {sampling_rate!r}.")
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(
            f"An array is mono, of shape (samples,) with floats from -1 to 1, got {waveform.dtype} of shape "
            f"{waveform.shape}. Write array / 32768 for 16-bit samples, array.mean(axis=...) for several channels."
        )
    if not np.isfinite(waveform).all():
        raise ValueError("The array holds samples that are not finite numbers.")
    waveform = waveform.astype(np.float32)
    return resample(waveform, sampling_rate, wanted)
