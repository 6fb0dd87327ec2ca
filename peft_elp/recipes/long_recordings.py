"""Recognition of recordings that are longer than what a model takes at once."""

from typing import Any

from datasets import Dataset
from transformers import pipeline

from peft_elp.speech.audio import decode

from .methods import get_base_model


def transcribe_long(model: Any, feature_extractor: Any, tokenizer: Any, dataset: Dataset, chunk_s: float) -> list[str]:
    """Recognise recordings of any length in overlapping pieces, with Transformers' own pipeline.

    A piece has `chunk_s` seconds, of which a sixth on each side is context only.

    Raises:
        ValueError: The pieces are too short to overlap.
    """
    base, rate_hz = get_base_model(model).eval(), feature_extractor.sampling_rate
    if chunk_s * rate_hz / 6 < getattr(base.config, "inputs_to_logits_ratio", 1):
        raise ValueError(f"--chunk_length_in_seconds must be long enough to overlap, got {chunk_s:g}. Use 5 or more.")
    recognise: Any = pipeline(
        "automatic-speech-recognition",
        model=base,
        feature_extractor=feature_extractor,
        tokenizer=tokenizer,
        device=base.device,
    )
    recordings = ({"raw": decode(audio, rate_hz), "sampling_rate": rate_hz} for audio in dataset["audio"])
    return [recognise(recording, chunk_length_s=chunk_s)["text"].strip() for recording in recordings]
