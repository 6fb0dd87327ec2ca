"""Speech recognition with CTC: the vocabulary, and texts that fit their frames."""

import json
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Wav2Vec2CTCTokenizer


def make_tokenizer(texts: Sequence[str], folder: str | Path) -> Wav2Vec2CTCTokenizer:
    """Make a tokenizer for the characters of the texts, with a `vocab.json` in the folder.

    "|" separates words, and "[PAD]" is the blank of CTC.

    Examples:
        >>> from tempfile import mkdtemp
        >>> tokenizer = make_tokenizer(["ab a", "b"], mkdtemp())
        >>> tokenizer("a b").input_ids
        [3, 2, 4]
    """
    characters = sorted({character for text in texts for character in text} - {" ", "|"})
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "|", *characters])}
    file = Path(folder, "vocab.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    special = {"bos_token": None, "eos_token": None, "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return Wav2Vec2CTCTokenizer(str(file), word_delimiter_token="|", **special)


def check_characters(tokenizer: Any, texts: Sequence[str], test_texts: Sequence[str]) -> None:
    """Check that the tokenizer knows the characters of the texts; a character that only the test lacks is a warning.

    Raises:
        ValueError: The tokenizer lacks characters of the training texts.
    """

    def unknown(texts: Sequence[str]) -> str:
        characters = sorted({*"".join(texts)} - {" "})
        return " ".join(one for one in characters if tokenizer.unk_token_id in tokenizer(one).input_ids)

    if lacking := unknown(texts):
        raise ValueError(
            f"The vocabulary lacks characters of the training text: {lacking}. If it is in upper case, keep the case "
            "of the text with --do_lower_case False. --chars_to_ignore removes characters."
        )
    if lacking := unknown(test_texts):
        warnings.warn(f"The vocabulary lacks characters of the test text: {lacking}", stacklevel=2)


def num_frames(model: Any, num_samples: int) -> int:
    """Return the number of frames that an encoder of the wav2vec 2.0 kind makes of a recording."""
    count: Any = getattr(model, "_get_feat_extract_output_lengths", None)  # what Transformers' own heads use
    if count is None:
        raise ValueError(f"{type(model).__name__} does not tell its number of frames. Use a relative of wav2vec 2.0.")
    return int(count(num_samples))


def keep_alignable(
    dataset: Dataset, labels: Sequence[Sequence[int]], model: Any, rate_hz: int, on_long_text: str = "error"
) -> list[int]:
    """Return the numbers of the recordings with whose frames CTC can align their text.

    CTC needs one frame for each character, and one for a blank between two equal ones.

    Args:
        dataset: Recordings with `audio` and `duration_s`.
        labels: The text of each recording as tokens.
        model: A CTC model of the wav2vec 2.0 kind.
        rate_hz: The sampling rate of the encoder.
        on_long_text: "error" refuses longer texts, "skip" leaves them out with a warning.

    Raises:
        ValueError: A text is too long and `on_long_text` is "error".
    """
    too_long = {}
    columns = zip(dataset["audio"], dataset["duration_s"], labels, strict=True)
    for number, (audio, duration_s, label) in enumerate(columns):
        there = num_frames(model, round(duration_s * rate_hz))
        needed = len(label) + sum(first == second for first, second in pairwise(label))
        if there < needed:
            too_long[number] = f"{audio['path']}: {needed} frames needed, {there} there"
    if too_long:
        shown = "".join(f"\n  {line}" for line in [*too_long.values()][:5])
        message = f"{len(too_long)} of {len(labels)} texts are too long for the frames of their recordings.{shown}"
        if on_long_text == "error":
            raise ValueError(f"{message}\nCorrect them, or leave them out with --on_long_text skip.")
        warnings.warn(f"{message}\nThey are left out.", stacklevel=2)
    return [number for number in range(len(labels)) if number not in too_long]
