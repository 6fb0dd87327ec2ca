"""From a saved adapter to answers for recordings: text, labels, voices.

`transformers.pipeline` takes the same parts, for what it does beyond this: `pipeline("automatic-speech-recognition",
model=adapter.model.get_base_model(), feature_extractor=..., tokenizer=...)` cuts long recordings into chunks and gives
timestamps. Needs soundfile and soxr: `pip install 'peft-elp[recipes]'`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoTokenizer, pipeline

from .audio import AudioError, decode
from .backbones import receptive_field
from .heads import head_row
from .metrics import cosine_scores
from .saved.folder import SavedAdapter, find_adapter, read_adapter
from .speakers import is_padding_invariant, speaker_embeddings

Recording = str | Path | Mapping[str, Any] | np.ndarray | Tensor
Answers = list[Any]
TOKENIZER = ("tokenizer_config.json", "vocab.json", "tokenizer.json")
EXTRACTOR = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Verification:
    """How alike two voices are.

    Args:
        score: The cosine of the angle between their embeddings, in [-1, 1].
        threshold: The score from which they count as one voice, None where nobody has named one.
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
    `sampling_rate`. Files are mixed down to mono, and all recordings are resampled to what the base reads. One
    recording gives one answer, a list gives a list. How many are answered at a time (`batch_size`) changes no answer:
    where padding would, because the base's convolutions are normalised over time or it reads no mask, only recordings
    of the same length share a pass.

    Args:
        model: The base with the adapter, head included.
        saved: The adapter's folder.
        feature_extractor: That of the base.
        tokenizer: That of the adapter, where it writes text.

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
        self._pads = is_padding_invariant(base, feature_extractor)

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        *,
        base: str | Path | None = None,
        device: str | torch.device | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> SpeechAdapter:
        """Load an adapter, the base that it names, and what was saved beside it.

        Args:
            adapter: A folder, or a name on the Hub.
            base: Another place for the base than the adapter names.
            device: Such as "cuda:1" or "mps". Default: a CUDA device if there is one, else the CPU.
            subfolder: The folder inside of `adapter`.
            revision: The adapter's branch or commit on the Hub.
            token: For private repositories.

        Raises:
            ValueError: There is no adapter or no base, or they do not fit. The message says which.
        """
        saved = read_adapter(find_adapter(adapter, subfolder, revision, token))
        target = _device(device)
        model_class = getattr(transformers, saved.model_class or "", None)
        name = str(base or saved.base or "")
        if model_class is None or not name:
            raise ValueError(
                f"{str(adapter)!r} does not say which model it belongs to: its adapter_config.json names the base "
                f"{saved.base!r} and the class {saved.model_class!r}. "
                + ("Name the base: base=..." if model_class else "Save it from a PeftModel of a Transformers model.")
            )
        try:
            # A revision in an adapter's configuration is that of the base.
            options = {"revision": saved.config["revision"]} if saved.config.get("revision") and not base else {}
            backbone = model_class.from_pretrained(name, token=token, **options)
        except OSError as error:
            raise ValueError(
                f"The base {name!r} of the adapter {str(adapter)!r} could not be loaded: "
                f"{str(error).strip().splitlines()[0]} If it is elsewhere, say where: base=..."
            ) from error
        model = PeftModel.from_pretrained(backbone, str(saved.folder), torch_device=str(target)).eval().to(target)
        source = str(saved.folder) if saved.holds(*EXTRACTOR) else name
        extractor = AutoFeatureExtractor.from_pretrained(source, token=token)
        tokenizer = None
        if saved.task == "automatic-speech-recognition":
            if saved.holds(*TOKENIZER):
                tokenizer = AutoTokenizer.from_pretrained(str(saved.folder))
            elif not saved.counts["head"]:  # it writes with the base's own vocabulary
                tokenizer = AutoTokenizer.from_pretrained(name, token=token)
        return cls(model, saved, extractor, tokenizer)

    @property
    def sampling_rate(self) -> int:
        """The rate in Hz that the base reads."""
        return self.feature_extractor.sampling_rate

    def read(self, recording: Recording, sampling_rate: int | None = None) -> np.ndarray:
        """The waveform of a recording as the base reads it.

        Args:
            recording: A file or an array.
            sampling_rate: That of an array; files say it themselves.

        Raises:
            ValueError: It is missing, broken, empty or too short, or an array says no sampling rate.
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
        return waveform

    def transcribe(
        self, recordings: Recording | Sequence[Recording], sampling_rate: int | None = None, batch_size: int = 1
    ) -> Any:
        """What is said in each recording, as text.

        Args:
            recordings: One or a list.
            sampling_rate: That of arrays.
            batch_size: How many to answer at a time.

        Raises:
            ValueError: The adapter's head writes no text, no tokenizer is beside it, or a recording cannot be used.
        """
        self._check("transcribe")
        if self.tokenizer is None:
            raise ValueError(
                f"{str(self.saved.folder)!r} has no tokenizer, which makes text of the numbers of its head. Save that "
                "of the training beside it: tokenizer.save_pretrained(folder)."
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
            sampling_rate: That of arrays.
            batch_size: How many to answer at a time.
            top_k: How many labels, None for all.

        Raises:
            ValueError: The adapter's head names no labels, or a recording cannot be used.
        """
        self._check("classify")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is 1 or more, got {top_k!r}.")
        answers = self._answer(recordings, sampling_rate, batch_size, self._classify)
        return [answer[:top_k] for answer in answers] if _several(recordings) else answers[:top_k]

    def embed(
        self, recordings: Recording | Sequence[Recording], sampling_rate: int | None = None, batch_size: int = 1
    ) -> Any:
        """The embedding of each voice, `(width,)`; see `speaker_embeddings`.

        Args:
            recordings: One or a list.
            sampling_rate: That of arrays.
            batch_size: How many to answer at a time.

        Raises:
            ValueError: The adapter's head has no embeddings, or a recording cannot be used.
        """
        self._check("verify")
        return self._answer(recordings, sampling_rate, batch_size, self._embed)

    def verify(
        self, first: Recording, second: Recording, sampling_rate: int | None = None, threshold: float | None = None
    ) -> Verification:
        """How alike the voices of two recordings are.

        That is for adapters that were trained to tell speakers apart. One that tells emotions apart compares emotions.

        Args:
            first: A recording.
            second: Another one.
            sampling_rate: That of arrays.
            threshold: The score from which they count as one voice. Default: what the adapter says in
                `verification_threshold`.

        Raises:
            ValueError: The adapter's head has no embeddings, or a recording cannot be used.
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
                + (f", which can {' and '.join(able)}." if able else ", for which use its model directly.")
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
        """Which of the waveforms share a pass, so that none changes the answer of another."""
        lengths = [0 if self._pads else len(waveform) for waveform in waveforms]
        for length in dict.fromkeys(lengths):
            yield [row for row, other in enumerate(lengths) if other == length]

    def _inputs(self, waveforms: Sequence[np.ndarray]) -> dict[str, Tensor]:
        padding = {} if self._base.config.model_type == "whisper" else {"padding": True}  # Whisper's has a length
        inputs = self.feature_extractor(
            list(waveforms), sampling_rate=self.sampling_rate, return_tensors="pt", **padding
        )
        return dict(inputs.to(self.model.device))

    @cached_property
    def _pipeline(self) -> Any:
        """For models that generate text, which hears recordings of any length."""
        return pipeline(
            "automatic-speech-recognition",
            model=self._base,
            feature_extractor=self.feature_extractor,
            tokenizer=self.tokenizer,
            device=self.model.device,
        )

    def _transcribe(self, waveforms: Sequence[np.ndarray]) -> Answers:
        if not type(self._base).__name__.endswith("ForCTC"):
            rows = [{"raw": waveform, "sampling_rate": self.sampling_rate} for waveform in waveforms]
            return [answer["text"].strip() for answer in self._pipeline(rows, batch_size=len(rows))]
        inputs = self._inputs(waveforms)
        with torch.inference_mode():
            tokens = self.model(**inputs).logits.argmax(-1)
        if len(waveforms) == 1 or not self._pads:
            return [self.tokenizer.decode(row) for row in tokens]
        mask = self._base._get_feature_vector_attention_mask(tokens.shape[1], inputs["attention_mask"])
        return [self.tokenizer.decode(row[valid.bool()]) for row, valid in zip(tokens, mask, strict=True)]

    def _classify(self, waveforms: Sequence[np.ndarray]) -> Answers:
        with torch.inference_mode():
            logits = self.model(**self._inputs(waveforms)).logits.float()
        problem = self._base.config.problem_type
        if problem == "multi_label_classification":
            scores = logits.sigmoid()
        else:
            scores = logits if problem == "regression" else logits.softmax(-1)
        names = self._base.config.id2label
        return [
            [{"label": names[index], "score": row[index]} for index in sorted(range(len(row)), key=lambda i: -row[i])]
            for row in scores.tolist()
        ]

    def _embed(self, waveforms: Sequence[np.ndarray]) -> Answers:
        with torch.inference_mode():
            embeddings = speaker_embeddings(self.model, **self._inputs(waveforms))
        return list(embeddings.float().cpu().numpy())


def _least_samples(model: Any) -> int:
    """How long a recording has to be, where convolutions read the waveform."""
    config = model.config
    if not hasattr(config, "conv_kernel"):
        return 1
    frames = 1
    if type(model).__name__.endswith("ForXVector"):  # two frames are left of it, for a standard deviation
        frames = 2 + sum(
            (kernel - 1) * step for kernel, step in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True)
        )
    return receptive_field(config) + (frames - 1) * prod(config.conv_stride)


def _several(recordings: Any) -> bool:
    return isinstance(recordings, Sequence) and not isinstance(recordings, str)


def _device(device: str | torch.device | None) -> torch.device:
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The device {str(device)!r} cannot be used: {reason} Write for example cpu.") from error
    return target


def _resampled(recording: np.ndarray | Tensor, sampling_rate: int | None, wanted: int) -> np.ndarray:
    waveform = recording.detach().cpu().numpy() if isinstance(recording, Tensor) else recording
    if sampling_rate is None:
        raise ValueError(f"An array does not say its sampling rate. Write for example sampling_rate={wanted}.")
    if sampling_rate < 1:
        raise ValueError(f"A sampling rate is a number of samples per second, got {sampling_rate!r}.")
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(
            f"An array is mono, of shape (samples,) with floats from -1 to 1, got {waveform.dtype} of shape "
            f"{waveform.shape}. Of 16 bit samples: array / 32768; of several channels: array.mean(axis=...)."
        )
    if not np.isfinite(waveform).all():
        raise ValueError("The array holds samples that are not numbers.")
    waveform = waveform.astype(np.float32)
    return waveform if sampling_rate == wanted else soxr.resample(waveform, sampling_rate, wanted)
