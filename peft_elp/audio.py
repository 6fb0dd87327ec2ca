"""One recording: read, mixed down to mono, resampled; or refused, with the reason.

Needs soundfile and soxr: `pip install peft-elp[recipes]`.
"""

from __future__ import annotations

import io
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
        f"peft_elp.audio reads recordings with soundfile and soxr ({error}). Install them: pip install "
        "'peft-elp[recipes]'."
    ) from error

RATE_HZ = 16_000  # what wav2vec 2.0, HuBERT, WavLM and Whisper were trained on
STREAMED = 0x7FFFF000  # what sox, and more what ffmpeg, write for the size of a WAV file that they pipe


class AudioError(ValueError):
    """A recording that cannot be used; `reason` is "missing", "unreadable" or "empty"."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


def decode(audio: str | Path | Mapping[str, Any] | None, rate_hz: int = RATE_HZ) -> np.ndarray:
    """The waveform of a recording: float32 `(samples,)`, mono, at `rate_hz`.

    Args:
        audio: A path, or an entry of a column of kind `datasets.Audio(decode=False)`: `{"path": ..., "bytes": ...}`.
        rate_hz: What the feature extractor says in `sampling_rate`.

    Raises:
        AudioError: There is no such file, it cannot be read, or it holds no sound.
    """
    waveform, native_hz = read_audio(audio)
    return waveform if native_hz == rate_hz else soxr.resample(waveform, native_hz, rate_hz)


def read_audio(audio: str | Path | Mapping[str, Any] | None) -> tuple[np.ndarray, int]:
    """The waveform of a recording, mono, and its own sampling rate in Hz; arguments and errors are those of `decode`.

    A file that is shorter than its header says is refused, where the format tells (WAV, FLAC, MP3). soundfile reads
    first; what it cannot (AAC, WebM) goes to torchcodec, if that is installed.
    """
    entry: Mapping[str, Any] = audio if isinstance(audio, Mapping) else {"path": audio}
    path, content = entry.get("path") or "", entry.get("bytes")
    if content is None and not Path(path).is_file():
        raise AudioError("there is no such file" if path else "no recording is given", "missing")
    if not (Path(path).stat().st_size if content is None else content):
        raise AudioError("the file is empty", "empty")
    try:
        channels, rate_hz = _read_with_soundfile(path if content is None else io.BytesIO(content))
    except soundfile.SoundFileError as error:
        refusal = getattr(error, "error_string", str(error)).rstrip(".")
        channels, rate_hz = _read_with_torchcodec(str(path) if content is None else content, refusal)
    if not len(channels):
        raise AudioError("it holds no sound", "empty")
    waveform = channels.mean(axis=1)
    if not np.isfinite(waveform).all():
        raise AudioError("it holds samples that are not numbers")
    return waveform, rate_hz


def _read_with_soundfile(file: Any) -> tuple[np.ndarray, int]:
    with soundfile.SoundFile(file) as sound:
        stated, channels = sound.frames, sound.read(dtype="float32", always_2d=True)
        # libsndfile takes a WAV file that was cut off for a shorter one, and says so in its log alone.
        cut = re.search(r"^data : (\d+) \(should be \d+\)", sound.extra_info, re.MULTILINE)
    if len(channels) < stated or (cut and int(cut[1]) < STREAMED):
        raise AudioError("it is cut off: the header promises more sound than the file holds")
    return channels, sound.samplerate


def _read_with_torchcodec(source: str | bytes, refusal: str) -> tuple[np.ndarray, int]:
    try:
        from torchcodec.decoders import AudioDecoder  # pyright: ignore[reportMissingImports]  # not required
    except (ImportError, OSError, RuntimeError) as error:  # the latter two: it does not find ffmpeg
        raise AudioError(
            f"soundfile cannot read it ({refusal}), and torchcodec, which reads more formats, is not there "
            f"({str(error).splitlines()[0]}). Convert it to WAV or FLAC, or install torchcodec and ffmpeg"
        ) from error
    try:
        samples = AudioDecoder(source).get_all_samples()
    except (RuntimeError, ValueError) as error:
        raise AudioError(f"neither soundfile ({refusal}) nor torchcodec ({error}) can read it") from error
    return samples.data.numpy().T, int(samples.sample_rate)
