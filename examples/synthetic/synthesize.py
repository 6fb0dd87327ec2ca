"""Synthesise words in many voices with espeak-ng: `python examples/synthetic/synthesize.py "hello" hello.wav`.

The library and its voices come with the PyPI package `espeakng-loader`. A voice is an accent of English with a
speaker, such as "en-us+f3". The same calls in the same order give the same samples.
"""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import espeakng_loader
import numpy as np
import soundfile
import soxr

RATE_HZ = 16_000

# From espeak-ng's speak_lib.h
SYNCHRONOUS_OUTPUT = 2
PHONEME_EVENTS, DO_NOT_EXIT = 0x0001, 0x8000
WORDS_PER_MINUTE, PITCH, PITCH_RANGE = 1, 3, 4
UTF8 = 1
NO_EVENT, PHONEME_EVENT = 0, 7


class Event(ctypes.Structure):
    """`espeak_EVENT` of speak_lib.h: here, the start of a phoneme."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("phoneme", ctypes.c_char * 8),
    )


CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))


class Speech(NamedTuple):
    """A waveform at 16 kHz in [-1, 1], and each phoneme with its start in seconds; "" is a pause."""

    waveform: np.ndarray
    phonemes: list[tuple[float, str]]


class Synthesizer:
    """Text to speech with espeak-ng. Use `synthesizer()` to get it: the library crashes when it is started twice."""

    def __init__(self) -> None:
        self.data = espeakng_loader.get_data_path()
        if len(self.data) > 120:  # The library truncates long paths; a relative path is often shorter.
            self.data = min(self.data, os.path.relpath(self.data), key=len)
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        options = PHONEME_EVENTS | DO_NOT_EXIT
        self.rate_hz = self.library.espeak_Initialize(SYNCHRONOUS_OUTPUT, 0, self.data.encode(), options)
        if self.rate_hz <= 0:
            raise OSError(f"espeak-ng found no voices in {self.data!r}. Install espeakng-loader under a shorter path.")
        self.pieces: list[np.ndarray] = []
        self.phonemes: list[tuple[float, str]] = []
        self.callback = CALLBACK(self._take)  # Keeps Python from freeing it while the library calls it.
        self.library.espeak_SetSynthCallback(self.callback)

    def _take(self, samples, num_samples: int, events) -> int:
        if samples and num_samples > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        while events and events.contents.type != NO_EVENT:
            if events.contents.type == PHONEME_EVENT:
                # Remove marks of stress and length: "'i:" and "i" are one phoneme, and "_:" is a pause.
                phoneme = events.contents.phoneme.decode(errors="ignore").strip("',_:")
                self.phonemes.append((events.contents.audio_position_ms / 1000, phoneme))
            events = ctypes.cast(ctypes.addressof(events.contents) + ctypes.sizeof(Event), ctypes.POINTER(Event))
        return 0

    def say(
        self, text: str, voice: str, pitch: int = 50, words_per_minute: int = 160, pitch_range: int = 50
    ) -> Speech:
        """Speak a text; return the waveform and the phonemes.

        Args:
            text: The text.
            voice: Accent and speaker, for example "en-us+f3".
            pitch: 0 to 99; 50 is the voice's own.
            words_per_minute: Speaking rate, 80 to 450.
            pitch_range: 0 to 99; 0 is monotonous, 50 is the voice's own.
        """
        # The library ignores a speaker that it does not know.
        known = Path(self.data, "voices", "!v", voice.partition("+")[2]).is_file()
        if not known or self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}. Use an accent and a speaker, such as 'en-us+f3'.")
        self.library.espeak_SetParameter(PITCH, pitch, 0)
        self.library.espeak_SetParameter(PITCH_RANGE, pitch_range, 0)
        self.library.espeak_SetParameter(WORDS_PER_MINUTE, words_per_minute, 0)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of the noise in breath and whisper
        self.pieces, self.phonemes = [], []
        encoded = text.encode() + b"\0"
        self.library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded)), 0, 0, 0, UTF8, None, None)
        if not self.pieces:
            raise ValueError(f"espeak-ng says nothing for {text!r}. Use at least one word.")
        waveform = np.concatenate(self.pieces).astype(np.float32) / 32768
        return Speech(soxr.resample(waveform, self.rate_hz, RATE_HZ), self.phonemes)


@cache
def synthesizer() -> Synthesizer:
    """Return the one synthesizer of the process."""
    return Synthesizer()


if __name__ == "__main__":
    soundfile.write(sys.argv[2], synthesizer().say(sys.argv[1], "en-us+f3").waveform, RATE_HZ)
