"""One recording: read, mixed down to mono, resampled; or refused, with the reason.

Needs soundfile and soxr: `pip install 'peft-elp[recipes]'`.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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


class AudioError(ValueError):
    """A recording that cannot be used.

    Args:
        message: What is wrong, as the end of a sentence that starts with the name of the recording.
        reason: "missing", "unreadable" or "empty".

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


def decode(audio: str | Path | Mapping[str, Any] | None, rate_hz: int = RATE_HZ) -> np.ndarray:
    """The waveform of a recording at the rate of a model.

    Args:
        audio: A path, or an entry of a `datasets.Audio(decode=False)` column: `{"path": ..., "bytes": ...}`.
        rate_hz: The rate in Hz: `sampling_rate` of the model's feature extractor.

    Returns:
        float32 `(samples,)`, mono.

    Raises:
        AudioError: There is no such file, it cannot be read, or it holds no sound.

    Examples:
        >>> decode("call.wav").dtype  # doctest: +SKIP
        dtype('float32')
    """
    waveform, native_hz = read_audio(audio)
    try:
        return resample(waveform, native_hz, rate_hz)
    except MemoryError as error:
        raise AudioError("it is too long to be resampled in memory. Cut it into pieces") from error


def resample(waveform: np.ndarray, native_hz: int, rate_hz: int) -> np.ndarray:
    """A waveform at another sampling rate; the same array if the rates are equal.

    Args:
        waveform: float32 `(samples,)`.
        native_hz: Its rate in Hz.
        rate_hz: The wanted rate in Hz.

    Examples:
        >>> resample(np.zeros(8000, dtype=np.float32), native_hz=8000, rate_hz=16000).shape
        (16000,)
    """
    return waveform if native_hz == rate_hz else soxr.resample(waveform, native_hz, rate_hz)


def read_audio(audio: str | Path | Mapping[str, Any] | None) -> tuple[np.ndarray, int]:
    """The waveform of a recording at its own rate.

    A file that is shorter than its header says is refused, where the format tells (WAV, FLAC, MP3). soundfile reads
    first; what it cannot read (AAC, WebM) goes to torchcodec, if that is installed.

    Args:
        audio: As for `decode`.

    Returns:
        float32 `(samples,)`, mono, and its sampling rate in Hz.

    Raises:
        AudioError: As for `decode`.

    Examples:
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp(), "call.wav")
        >>> soundfile.write(file, np.zeros((4000, 2)), 8000)
        >>> waveform, rate_hz = read_audio(file)
        >>> waveform.shape, rate_hz
        ((4000,), 8000)
    """
    entry: Mapping[str, Any] = audio if isinstance(audio, Mapping) else {"path": audio}
    path, content = entry.get("path") or "", entry.get("bytes")
    if content is None and not os.path.isfile(path):  # It takes any name, also one that no file can have.
        raise AudioError("there is no such file" if path else "no recording is given", "missing")
    if not (os.path.getsize(path) if content is None else content):
        raise AudioError("the file is empty", "empty")
    try:
        channels, rate_hz = _read_with_soundfile(path if content is None else io.BytesIO(content))
    except soundfile.SoundFileError as error:
        refusal = getattr(error, "error_string", str(error)).rstrip(".")
        channels, rate_hz = _read_with_torchcodec(str(path) if content is None else content, refusal)
    except MemoryError as error:
        raise AudioError("it is too long to be read into memory. Cut it into pieces") from error
    if not len(channels):
        raise AudioError("it holds no sound", "empty")
    waveform = channels.mean(axis=1)
    if not np.isfinite(waveform).all():
        raise AudioError("it holds samples that are not finite numbers")
    return waveform, rate_hz


def _read_with_soundfile(file: Any) -> tuple[np.ndarray, int]:
    with soundfile.SoundFile(file) as sound:
        stated, channels = sound.frames, sound.read(dtype="float32", always_2d=True)
        # libsndfile reads a WAV file that was cut off as a shorter one, and only its log says so.
        cut = re.search(r"^data : (\d+) \(should be \d+\)", sound.extra_info, re.MULTILINE)
    if len(channels) < stated or (cut and int(cut[1]) < STREAMED):
        raise AudioError("it is cut off: the header promises more sound than the file holds")
    return channels, sound.samplerate


def _read_with_torchcodec(source: str | bytes, refusal: str) -> tuple[np.ndarray, int]:
    try:
        from torchcodec.decoders import AudioDecoder  # pyright: ignore[reportMissingImports]  # not required
    except (ImportError, OSError, RuntimeError) as error:  # It raises the latter two where it does not find ffmpeg.
        raise AudioError(
            f"soundfile cannot read it ({refusal}), and torchcodec, which reads more formats, is not available "
            f"({str(error).splitlines()[0]}). Convert it to WAV or FLAC, or install torchcodec and ffmpeg"
        ) from error
    try:
        samples = AudioDecoder(source).get_all_samples()
    except (RuntimeError, ValueError) as error:
        raise AudioError(f"neither soundfile ({refusal}) nor torchcodec ({error}) can read it") from error
    return samples.data.numpy().T, int(samples.sample_rate)
