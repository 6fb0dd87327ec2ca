"""Speech recognition with CTC and an adapted speech encoder, as in the paper on Libri-light 10 h.

    python examples/make_demo_data.py
    python examples/run_speech_recognition.py --model_name_or_path demo/encoder --dataset_name demo/sentences \
        --learning_rate 2e-3 --output_dir outputs/sentences

The vocabulary is the characters of the training text. Measured: `wer` and `cer`, word and character error rate, by
jiwer over all of the test text, lower-cased (`--do_lower_case False` keeps case) and without `--chars_to_ignore`.
`predictions.csv` has every utterance.
"""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from datasets import Dataset
from recipe import DataArguments, load_config, make_trainer, option, parse, read_split, save, with_labels, write_rows
from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer, Wav2Vec2CTCTokenizer

from peft_elp.data import read_column

ONLY_WITH = {"beam_width": ("decoder", "beam"), "language_model": ("decoder", "beam")}


@dataclass
class RecognitionArguments(DataArguments):
    """The recordings, their texts, and how frames are turned into text."""

    text_column_name: str = option("text", "What is said.")
    do_lower_case: bool = option(True, "Lower-case all text.")
    chars_to_ignore: str = option('.,?!;:"', "Characters that are taken out of all text.")
    tokenizer_name_or_path: str | None = option(None, "A vocabulary. Default: the characters of the training text.")
    on_long_text: str = option(
        "error",
        "What becomes of an utterance whose text is too long for its frames.",
        choices=("error", "skip"),
    )
    decoder: str = option("greedy", "'beam' needs pyctcdecode.", choices=("greedy", "beam"))
    beam_width: int = option(100, "Of --decoder beam.")
    language_model: str | None = option(None, "A KenLM file for --decoder beam.")
    chunk_length_in_seconds: float | None = option(
        None,
        "Recognise longer test recordings in overlapping pieces. Default: --max_duration_in_seconds refuses them.",
    )
    validation_split_name: str | None = option(None, "What --eval_strategy evaluates on while training.")


def read_texts(dataset: Dataset, data_args: RecognitionArguments) -> list[str]:
    """What is said in each utterance, as it is to be recognised.

    Raises:
        ValueError: Nothing is left of a text.
    """
    ignored = re.escape(data_args.chars_to_ignore)
    texts = []
    for raw in read_column(dataset, data_args.text_column_name):
        text = " ".join((re.sub(f"[{ignored}]", "", raw) if ignored else raw).split())
        if not text:
            raise ValueError(
                f"Nothing is left of the text {raw!r} without --chars_to_ignore. Take it out of the data."
            )
        texts.append(text.lower() if data_args.do_lower_case else text)
    return texts


def make_tokenizer(texts: Sequence[str], folder: Path) -> Wav2Vec2CTCTokenizer:
    """A tokenizer of the characters in the texts; "|" stands between words, and "[PAD]" is CTC's blank."""
    characters = sorted({character for text in texts for character in text} - {" ", "|"})
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "|", *characters])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    special = {"bos_token": None, "eos_token": None, "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), word_delimiter_token="|", **special)


def unknown_characters(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Those for which the tokenizer has no token."""
    characters = sorted({*"".join(texts)} - {" "})
    return [character for character in characters if tokenizer.unk_token_id in tokenizer(character).input_ids]


class Pieces:
    """Recordings in overlapping pieces of one length at most, and the logits of a recording from those of its pieces.

    A sixth of a piece at each side is context: its frames are taken from the neighbour.
    """

    def __init__(self, dataset: Dataset, chunk_s: float | None, rate_hz: int, model: Any) -> None:
        self.model, self.hop = model, int(np.prod(model.config.conv_stride))  # samples between two frames
        self.side = 0 if chunk_s is None else int(chunk_s * rate_hz / 6) // self.hop
        self.length = 0 if chunk_s is None else int(chunk_s * rate_hz) // self.hop * self.hop  # 0: in one piece
        if chunk_s is not None and self.side < 1:
            raise ValueError(f"--chunk_length_in_seconds {chunk_s:g} is too short to overlap. Take 5 or more.")
        self.rows = [
            (i, *piece) for i, s in enumerate(dataset["duration_s"]) for piece in self._cut(round(s * rate_hz))
        ]
        self.dataset = dataset.select([row[0] for row in self.rows])
        if chunk_s is not None:
            self.dataset = self.dataset.add_column("samples", [list(row[1:3]) for row in self.rows])  # pyright: ignore

    def _cut(self, total: int) -> list[tuple[int, int, bool]]:
        """Start, end and whether it is the last, in samples."""
        if not self.length or total <= self.length:
            return [(0, total, True)]
        step = self.length - 2 * self.side * self.hop
        starts = range(0, total - self.length + step, step)
        return [(start, min(start + self.length, total), start == starts[-1]) for start in starts]

    def join(self, logits: np.ndarray) -> list[np.ndarray]:
        """The logits `(frames, vocabulary)` of each recording, from those of the pieces, which are padded."""
        joined: dict[int, list[np.ndarray]] = {}
        for (number, start, stop, last), padded in zip(self.rows, logits, strict=True):
            end = frames(self.model, stop - start) if last else self.length // self.hop - self.side
            joined.setdefault(number, []).append(padded[self.side if start else 0 : end])
        return [np.concatenate(parts) for parts in joined.values()]


def frames(model: Any, num_samples: int) -> int:
    """How many frames the encoder makes of a recording."""
    return int(model._get_feat_extract_output_lengths(num_samples))


def frames_needed(label: Sequence[int]) -> int:
    """CTC needs a frame for each character, and a blank between two that are the same."""
    return len(label) + sum(first == second for first, second in pairwise(label))


def make_decoder(data_args: RecognitionArguments, tokenizer: Any) -> Any:
    """What makes text of the logits of one recording.

    Raises:
        ImportError: `--decoder beam` is asked for, and pyctcdecode is not installed.
    """
    if data_args.decoder == "greedy":
        return lambda logits: tokenizer.decode(logits.argmax(-1))
    try:
        from pyctcdecode import build_ctcdecoder  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise ImportError(
            f"--decoder beam needs pyctcdecode ({error}): pip install pyctcdecode, and kenlm for --language_model."
        ) from error
    by_number = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    names = {tokenizer.pad_token: "", tokenizer.word_delimiter_token: " ", tokenizer.unk_token: "⁇"}
    beams = build_ctcdecoder([names.get(token, token) for token in by_number], data_args.language_model)
    return lambda logits: beams.decode(
        logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True), beam_width=data_args.beam_width
    )


def that_fit(
    dataset: Dataset, labels: Sequence[Sequence[int]], model: Any, rate_hz: int, on_long_text: str
) -> list[int]:
    """The rows whose text CTC can align with their frames.

    Raises:
        ValueError: There are others, and `on_long_text` is "error"; it names the first few.
    """
    short = {}
    for row, (audio, duration_s, label) in enumerate(
        zip(dataset["audio"], dataset["duration_s"], labels, strict=True)
    ):
        there, needed = frames(model, round(duration_s * rate_hz)), frames_needed(label)
        if there < needed:
            short[row] = f"{audio['path']}: {needed} frames needed, {there} there"
    if short:
        shown = "".join(f"\n  {line}" for line in [*short.values()][:5])
        message = f"{len(short)} of {len(labels)} texts are too long for the frames of their recordings.{shown}"
        if on_long_text == "error":
            raise ValueError(f"{message}\nCorrect them, or leave them out with --on_long_text skip.")
        warnings.warn(f"{message}\nThey are left out.", stacklevel=2)
    return [row for row in range(len(labels)) if row not in short]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure with a command line, by default that of the process; returns the metrics."""
    model_args, data_args, args = parse(argv, RecognitionArguments, ONLY_WITH)
    config = load_config(model_args)
    feature_extractor = AutoFeatureExtractor.from_pretrained(model_args.model_name_or_path)
    rate_hz, chunk_s = feature_extractor.sampling_rate, data_args.chunk_length_in_seconds
    bounds = {} if chunk_s is None else {"max_duration_in_seconds": None}
    train = read_split(data_args, data_args.train_split_name, config, args.seed, data_args.max_train_samples)
    test = read_split(data_args, data_args.eval_split_name, config, args.seed, data_args.max_eval_samples, **bounds)
    validation = read_split(data_args, name, config, args.seed) if (name := data_args.validation_split_name) else None

    texts = read_texts(train, data_args)
    test_texts = read_texts(test, data_args)
    if data_args.tokenizer_name_or_path:
        tokenizer: Any = AutoTokenizer.from_pretrained(data_args.tokenizer_name_or_path)
    else:
        tokenizer = make_tokenizer(texts, Path(args.output_dir))
    tokenizer.save_pretrained(args.output_dir)
    to_text = make_decoder(data_args, tokenizer)
    print(f"{len(train)} utterances in training, {len(test)} in test; {len(tokenizer)} tokens")
    if unknown := unknown_characters(tokenizer, texts):
        raise ValueError(
            f"The vocabulary lacks characters of the training text: {' '.join(unknown)}. Is it in upper case? Then "
            "--do_lower_case False keeps the case of the text. --chars_to_ignore takes characters out."
        )
    if unknown := unknown_characters(tokenizer, test_texts):
        warnings.warn(f"Characters of test that the vocabulary lacks: {' '.join(unknown)}", stacklevel=2)

    config.update({"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    config.ctc_loss_reduction = "mean"  # of a sum, long utterances would be most
    model: Any = AutoModelForCTC.from_pretrained(model_args.model_name_or_path, config=config)
    if not hasattr(model, "_get_feat_extract_output_lengths"):
        raise ValueError(f"{type(model).__name__} does not tell its frames; take a relative of wav2vec 2.0.")

    def labelled(dataset: Dataset) -> tuple[Dataset, list[str]]:
        labels = tokenizer(read_texts(dataset, data_args)).input_ids
        rows = that_fit(dataset, labels, model, rate_hz, data_args.on_long_text)
        return with_labels(dataset, labels).select(rows), read_texts(dataset.select(rows), data_args)

    def error_rates(texts: list[str], pieces: Pieces, logits: Any) -> tuple[dict[str, float], list[str]]:
        found = [to_text(utterance) for utterance in pieces.join(logits)]
        return {"wer": jiwer.wer(texts, found), "cer": jiwer.cer(texts, found)}, found

    validation, validation_texts = labelled(validation) if validation is not None else (None, [])
    whole = None if validation is None else Pieces(validation, None, rate_hz, model)
    trainer = make_trainer(
        model,
        model_args,
        args,
        "asr",
        feature_extractor,
        train_dataset=labelled(train)[0],
        eval_dataset=validation,
        compute_metrics=None
        if whole is None
        else lambda found: error_rates(validation_texts, whole, found.predictions)[0],
    )
    trainer.fit()

    pieces = Pieces(test, chunk_s, rate_hz, model)
    predicted = trainer.predict(pieces.dataset, metric_key_prefix="eval")
    rates, found = error_rates(test_texts, pieces, predicted.predictions)
    files = [audio["path"] for audio in test["audio"]]
    write_rows(trainer, "predictions.csv", ["file", "text", "predicted"], zip(files, test_texts, found, strict=True))
    metrics = predicted.metrics | {f"eval_{name}": rate for name, rate in rates.items()}
    case = "lower-cased, " if data_args.do_lower_case else ""
    protocol = f"CTC over characters, {data_args.decoder} decoding. Text is {case}without {data_args.chars_to_ignore} "
    protocol += "and scored by jiwer, as shares of 1."
    return save(trainer, metrics, model_args, data_args, "asr", protocol)


if __name__ == "__main__":
    print(json.dumps(main()))
