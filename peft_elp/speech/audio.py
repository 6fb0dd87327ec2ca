"""One recording: read, mixed down to mono, resampled; or refused, with the reason.

Needs soundfile and soxr: `pip install 'peft-elp[recipes]'`.
"""

from __future__ import annotations

import glob
import io
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    import soundfile
    import soxr
except ImportError as error:
    raise ImportError(
        f"peft_elp.speech.audio reads recordings with soundfile and soxr ({error}). Install them: pip install "
        "'peft-elp[recipes]'."
    ) from error

RATE_HZ = 16_000  # what wav2vec 2.0, HuBERT, WavLM and Whisper were trained on
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".m4a", ".aac", ".webm", ".wma")
STREAMED = 0x7FFFF000  # the size that sox writes into a WAV file that it pipes; ffmpeg writes a larger one
LOUDEST = 10.0  # Floats beyond it are no longer an overdriven recording.


class AudioError(ValueError):
    """A recording that cannot be used.

    Args:
        message: What is wrong, as the end of a sentence that starts with the name of the recording.
        reason: "missing", "unreadable", "empty" or "too long".

    Examples:
        >>> try:
        ...     read_audio("no such file.wav")
        ... except AudioError as error:
        ...     print(f"{error} ({error.reason})")
        there is no such file (missing)
    """

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


def decode(audio: Any, rate_hz: int = RATE_HZ, max_duration_s: float | None = None) -> np.ndarray:
    """Return the waveform of a recording at the rate of a model.

    Args:
        audio: A path, or an entry of a `datasets.Audio` column: `{"path": ..., "bytes": ...}` with `decode=False`, an
            `AudioDecoder` otherwise. `{"array": ..., "sampling_rate": ...}` is taken as it is, whatever its path.
        rate_hz: The rate in Hz: `sampling_rate` of the model's feature extractor.
        max_duration_s: A longer recording is refused before it is decoded. None has no limit.

    Returns:
        float32 `(samples,)`, mono.

    Raises:
        AudioError: There is no such file, it cannot be read, holds no sound or is too long.

    Examples:
        >>> decode({"array": np.ones(800) / 2, "sampling_rate": 8000}).shape
        (1600,)
    """
    waveform, native_hz = read_audio(audio, max_duration_s)
    return waveform if native_hz == rate_hz else soxr.resample(waveform, native_hz, rate_hz)


def read_audio(audio: Any, max_duration_s: float | None = None) -> tuple[np.ndarray, int]:
    """Return the waveform of a recording at its own rate.

    A file that is shorter than its header says is refused, where the format tells (WAV, FLAC, MP3). soundfile reads
    first; what it cannot read (AAC, WebM) goes to torchcodec, if that is installed. A warning names a recording that
    is silent, whose channels cancel each other, or whose floats are in the range of 16-bit integers.

    Arguments and errors are those of `decode`.

    Returns:
        float32 `(samples,)`, mono, and its sampling rate in Hz.

    Examples:
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp(), "call.wav")
        >>> soundfile.write(file, np.ones((4000, 2)) / 2, 8000)
        >>> waveform, rate_hz = read_audio(file)
        >>> waveform.shape, rate_hz
        ((4000,), 8000)
    """
    entry: Mapping[str, Any] = audio if isinstance(audio, Mapping) else {"path": audio}
    path, content, array = entry.get("path") or "", entry.get("bytes"), entry.get("array", entry.get("raw"))
    if hasattr(audio, "get_all_samples"):
        channels, rate_hz = _read_with_torchcodec(audio, max_duration_s)
    elif array is not None:
        channels, rate_hz = _as_channels(array, entry.get("sampling_rate"), max_duration_s)
    elif content is None and not os.path.isfile(path):  # It takes any name, also one that no file can have.
        raise AudioError("there is no such file" if path else "no recording is given", "missing")
    elif not (os.path.getsize(path) if content is None else content):
        raise AudioError("the file is empty", "empty")
    else:
        channels, rate_hz = _read_file(path if content is None else content, max_duration_s)
    if not len(channels):
        raise AudioError("it holds no sound", "empty")
    waveform = channels.mean(axis=1)
    if not np.isfinite(waveform).all():
        raise AudioError("it holds samples that are not finite numbers")
    if doubt := _doubt(channels, waveform):
        warnings.warn(f"{name_of(audio)}: {doubt}", stacklevel=2)
    return waveform, rate_hz


def cut_long(waveform: np.ndarray, most: float, on_long_audio: str) -> list[np.ndarray]:
    """Return the pieces of a recording that a model is to read.

    Args:
        waveform: `(samples,)`.
        most: Samples that the model reads at most.
        on_long_audio: What to do with more: "crop" keeps the first `most` samples, "split" makes pieces of equal
            length, whose answers are to be averaged, and anything else refuses.

    Raises:
        AudioError: The recording is too long.

    Examples:
        >>> [len(piece) for piece in cut_long(np.zeros(50), 20, "split")]
        [17, 17, 17]
    """
    if len(waveform) <= most:
        return [waveform]
    if on_long_audio == "crop":
        return [waveform[: int(most)]]
    if on_long_audio == "split":
        count = math.ceil(len(waveform) / int(most))
        length = math.ceil(len(waveform) / count)
        starts = np.linspace(0, len(waveform) - length, count).round().astype(int)
        return [waveform[start : start + length] for start in starts]
    raise AudioError(f"it has {len(waveform):,} samples, and the model reads at most {int(most):,}", "too long")


def find_recordings(names: Sequence[str]) -> tuple[list[str], int]:
    """Find recordings by the names of files, folders and patterns, in that order.

    Returns:
        The files, and how many others lie in the folders.

    Raises:
        ValueError: A folder holds no recording. A file that does not exist is among the files.

    Examples:
        >>> find_recordings(["b.wav", "a.wav"])
        (['b.wav', 'a.wav'], 0)
    """
    files: list[str] = []
    ignored = 0
    for name in names:
        if os.path.isdir(name):
            inside = sorted(os.path.join(place, file) for place, _, found in os.walk(name) for file in found)
            found = [file for file in inside if file.lower().endswith(AUDIO_SUFFIXES)]
            if not found:
                raise ValueError(f"There are no recordings in the folder {name!r}.")
            files += found
            ignored += len(inside) - len(found)
        elif glob.has_magic(name) and not os.path.lexists(name):
            files += sorted(glob.glob(name, recursive=True)) or [name]
        else:
            files.append(name)
    return files, ignored


def name_of(audio: Any) -> str:
    """Return how messages name a recording: by its path, or as an array."""
    path = audio.get("path") if isinstance(audio, Mapping) else audio
    return str(path) if isinstance(path, (str, Path)) else "The array"


def _doubt(channels: np.ndarray, waveform: np.ndarray) -> str | None:
    """Return why a recording probably does not hold what it should."""
    peak = np.abs(waveform).max()
    if peak > LOUDEST:
        return f"its samples reach {peak:.0f}, expected floats from -1 to 1. Divide 16-bit samples by 32768."
    if not channels.any():
        return "it is silent, all samples are 0."
    if np.square(waveform).mean() < 0.01 * np.square(channels).mean():
        return "its channels have opposite phases and cancel each other in their mean. Pass one of them."
    return None


def _check_duration(samples: float, rate_hz: float, max_duration_s: float | None) -> None:
    if max_duration_s is not None and samples > max_duration_s * rate_hz:
        message = (
            f"it is too long, {samples / rate_hz:.4g} s; at most {max_duration_s:g} s are allowed (max_duration_s)"
        )
        raise AudioError(message, "too long")


def _as_channels(array: Any, sampling_rate: Any, max_duration_s: float | None) -> tuple[np.ndarray, int]:
    waveform = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    if not sampling_rate or sampling_rate < 1:
        raise AudioError(f"its sampling rate must be at least 1 Hz, got {sampling_rate!r}. Pass sampling_rate=16000")
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        raise AudioError(
            f"it must be mono, of shape (samples,) with floats from -1 to 1, got {waveform.dtype} of shape "
            f"{waveform.shape}. Write array / 32768 for 16-bit samples, array.mean(axis=...) for several channels"
        )
    _check_duration(len(waveform), sampling_rate, max_duration_s)
    return waveform.astype(np.float32)[:, None], sampling_rate


def _read_file(source: str | Path | bytes, max_duration_s: float | None) -> tuple[np.ndarray, int]:
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as sound:
            _check_duration(sound.frames, sound.samplerate, max_duration_s)
            stated, channels = sound.frames, sound.read(dtype="float32", always_2d=True)
            # libsndfile reads a WAV file that was cut off as a shorter one, and only its log says so.
            cut = re.search(r"^data : (\d+) \(should be \d+\)", sound.extra_info, re.MULTILINE)
    except soundfile.SoundFileError as error:
        return _read_other(source, getattr(error, "error_string", str(error)).rstrip("."), max_duration_s)
    if len(channels) < stated or (cut and int(cut[1]) < STREAMED):
        raise AudioError("it is cut off: the header promises more sound than the file holds")
    return channels, sound.samplerate


def _read_other(source: Any, refusal: str, max_duration_s: float | None) -> tuple[np.ndarray, int]:
    """Read a format that soundfile refuses."""
    try:
        from torchcodec.decoders import AudioDecoder  # pyright: ignore[reportMissingImports]  # not required
    except (ImportError, OSError, RuntimeError) as error:  # It raises the latter two where it does not find ffmpeg.
        raise AudioError(
            f"soundfile cannot read it ({refusal}), and torchcodec, which reads more formats, is not available "
            f"({str(error).splitlines()[0]}). Convert it to WAV or FLAC, or install torchcodec and ffmpeg"
        ) from error
    try:
        return _read_with_torchcodec(AudioDecoder(source), max_duration_s)
    except AudioError:
        raise
    except (RuntimeError, ValueError) as error:
        raise AudioError(f"neither soundfile ({refusal}) nor torchcodec ({error}) can read it") from error


def _read_with_torchcodec(decoder: Any, max_duration_s: float | None) -> tuple[np.ndarray, int]:
    _check_duration(decoder.metadata.duration_seconds or 0, 1, max_duration_s)
    samples = decoder.get_all_samples()
    return samples.data.numpy().T, int(samples.sample_rate)
