"""Spoken words in many voices, made on this machine by espeak-ng: `python examples/synthesize.py "hello there" hello.wav`.

The PyPI package `espeakng-loader` brings the library and its voices; nothing else is installed or downloaded. A voice is
an accent of English and a variant of the vocal tract, as in "en-us+f3".
"""

import ctypes
import sys

import espeakng_loader
import numpy as np
import soundfile
import soxr

RATE_HZ = 16_000

# From espeak-ng's speak_lib.h.
SYNCHRONOUS_OUTPUT = 2
DONT_EXIT_ON_ERROR = 0x8000
SPEED_WORDS_PER_MINUTE, PITCH = 1, 3
UTF8 = 1
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Synthesizer:
    """Speaks text in espeak-ng's voices. One per process: the library has one state for all.

    Raises:
        OSError: espeak-ng does not start.
    """

    def __init__(self) -> None:
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path()
        self.library_rate_hz = self.library.espeak_Initialize(SYNCHRONOUS_OUTPUT, 0, data.encode(), DONT_EXIT_ON_ERROR)
        if self.library_rate_hz <= 0:
            raise OSError(
                f"espeak-ng found no voices in {data}. Reinstall espeakng-loader in a folder with a short path."
            )
        self.pieces: list[np.ndarray] = []
        self.callback = CALLBACK(self._take)  # kept here, or Python would free it while the library still calls it
        self.library.espeak_SetSynthCallback(self.callback)

    def _take(self, samples, num_samples: int, _events) -> int:
        if samples and num_samples > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    def say(self, text: str, voice: str, pitch: int = 50, words_per_minute: int = 160) -> np.ndarray:
        """The waveform of `text` at 16 kHz, in [-1, 1].

        Args:
            text: What to say.
            voice: Accent and variant, for example "en-gb+m3".
            pitch: 0 to 99, around the voice's own pitch at 50.
            words_per_minute: Speaking rate, 80 to 450.

        Raises:
            ValueError: espeak-ng has no such voice.
        """
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}. Try an accent and a variant, such as 'en-us+f3'.")
        self.library.espeak_SetParameter(PITCH, pitch, 0)
        self.library.espeak_SetParameter(SPEED_WORDS_PER_MINUTE, words_per_minute, 0)
        self.pieces.clear()
        encoded = text.encode() + b"\0"
        self.library.espeak_Synth(encoded, len(encoded), 0, 0, 0, UTF8, None, None)
        waveform = np.concatenate(self.pieces).astype(np.float32) / 32768
        return soxr.resample(waveform, self.library_rate_hz, RATE_HZ)


if __name__ == "__main__":
    soundfile.write(sys.argv[2], Synthesizer().say(sys.argv[1], "en-us+f3"), RATE_HZ)
