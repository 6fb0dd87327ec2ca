"""Texts: CTC over characters, or the decoder that the base brings, trained on recordings until it gets no better."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from sklearn.model_selection import GroupShuffleSplit
from transformers import (
    MODEL_FOR_CTC_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
)

from peft_elp import recipes

from .features import check_base
from .live import fit, until_best
from .look import Recordings
from .measures import of_texts, text_errors
from .report import WRONG, compare

BATCH_SIZE = 8
HELD_OUT = 0.15  # of the recordings, where there is no validation split
IGNORED = re.compile(r'[.,?!;:"]')  # what CTC does not write
LOOP = 6  # words: a longer text that says each word three times or more is a loop


class _Ctc:
    """A new head for the characters of the training texts, in lower case and without punctuation."""

    before = "writing nothing"
    trainer, arguments = recipes.RecipeTrainer, recipes.RecipeTrainingArguments

    def __init__(self, training: Any, config: Any, arguments: Any, texts: Sequence[str]) -> None:
        characters = [self.normal(text) for text in texts]
        self.tokenizer: Any = recipes.make_tokenizer(characters, training.work / "vocabulary")
        config.update({"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id})
        config.ctc_loss_reduction = "mean"  # A sum would give long recordings most of the weight.
        self.model: Any = recipes.load_model(AutoModelForCTC, arguments, config)

    def normal(self, text: str) -> str:
        return " ".join(IGNORED.sub("", text).lower().split())

    def labels(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer([self.normal(text) for text in texts]).input_ids

    def fitting(self, data: Any, rate_hz: int) -> Any:
        return data.select(recipes.keep_alignable(data, data["labels"], self.model, rate_hz, on_long_text="skip"))

    def texts(self, logits: Any, samples: Sequence[int]) -> list[str]:
        frames = (recipes.num_frames(self.model, count) for count in samples)
        return [self.tokenizer.decode(one[:count].argmax(-1)) for one, count in zip(logits, frames, strict=True)]


class _Decoder:
    """The decoder of the base, such as Whisper's, which stays as it is; Whisper's normaliser prepares the texts."""

    before = "the base before training"
    trainer, arguments = recipes.Seq2SeqRecipeTrainer, recipes.Seq2SeqRecipeTrainingArguments

    def __init__(self, training: Any, config: Any, arguments: Any, texts: Sequence[str]) -> None:
        self.model: Any = recipes.load_model(AutoModelForSpeechSeq2Seq, arguments, config)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(training.base)
        recipes.set_language(self.model, self.tokenizer, training.language, "transcribe")
        self.normal = recipes.make_normalizer(self.tokenizer, training.language)

    def labels(self, texts: Sequence[str]) -> list[list[int]]:
        return recipes.make_labels(self.model, self.tokenizer, texts)

    def fitting(self, data: Any, rate_hz: int) -> Any:
        return data

    def texts(self, tokens: Any, samples: Sequence[int]) -> list[str]:
        tokens = np.where(tokens == -100, self.tokenizer.pad_token_id, tokens)  # how Trainer pads
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def transcribe(training: Any, found: Recordings) -> tuple[Any, list[Any], dict[str, Any]]:
    """Train recognition of text; return the adapted model, what is saved beside it, and what was measured.

    Raises:
        ValueError: The base has neither a CTC head nor a decoder.
    """
    config, _ = check_base(training.base)
    kind = _Decoder if type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING else _Ctc
    if kind is _Ctc and type(config) not in MODEL_FOR_CTC_MAPPING:
        raise ValueError(
            f"{training.base} ({config.model_type}) writes no texts: Transformers has neither CTC nor a decoder for "
            "it. Choose another base, such as wav2vec 2.0, HuBERT, WavLM or Whisper."
        )
    arguments = recipes.ModelArguments(
        model_name_or_path=training.base, dtype=training.dtype, chunk_length=training.chunk_length
    )
    extractor = recipes.load_feature_extractor(arguments)
    train, held_out, how = _split(found, training.seed)
    training.say(f"Held out: {how}")
    with redirect_stdout(StringIO()):  # what the recipes print
        task = kind(training, config, arguments, [found.labels[row] for row in train])
        data = recipes.training_columns(found.rows, task.labels(found.labels))
        samples = [round(seconds * extractor.sampling_rate) for seconds in data["duration_s"]]
        right = [task.normal(text) or text for text in found.labels]

        def answers(rows: Sequence[int], predicted: Any) -> tuple[Any, list[str]]:
            found = task.texts(predicted.predictions, [samples[row] for row in rows])
            written = [task.normal(text) for text in found]
            return text_errors([right[row] for row in rows], written), written

        what = found.table["digest"].tolist(), found.labels, train, held_out
        settings = until_best(training, "cer", training.device == "cpu", what, per_device_train_batch_size=BATCH_SIZE)
        trainer = recipes.make_trainer(
            task.model,
            arguments,
            task.arguments(**settings),
            "asr",
            extractor,
            task.trainer,
            train_dataset=task.fitting(data.select(train), extractor.sampling_rate),
            eval_dataset=data.select(held_out),
            compute_metrics=lambda found: of_texts(answers(held_out, found)[0], np.arange(len(held_out))),
        )
        rows = found.where("test") or held_out
        asked: Any = data.select(rows).remove_columns("labels")
        before = text_errors([right[row] for row in rows], [""] * len(rows))
        if kind is _Decoder:
            with recipes.without_adapter(trainer.model):
                before, _ = answers(rows, trainer.predict(asked))
    fit(trainer, 60 * training.minutes)
    after, written = answers(rows, trainer.predict(asked))
    speakers = [found.speakers[row] for row in rows] if found.speakers else None
    result = compare(of_texts, after, before, "wer", speakers, training.seed) | {"chance": {"wer": 1.0, "cer": 1.0}}
    worst = [i for i in np.argsort(-after[:, 0] / after[:, 1], kind="stable").tolist() if after[i, 0]]
    result["wrong"] = [
        {"row": i, "file": found.table["file"][rows[i]], "right": right[rows[i]], "answer": written[i]}
        for i in worst[:WRONG]
    ]
    history = trainer.state.log_history
    facts = {
        "metric": "wer",
        "clips": len(rows),
        "beside": task.before,
        "result": result,
        "notes": [*_degenerate(written)],
        "held_out": how,
        "curve": [one["eval_wer"] for one in history if "eval_wer" in one],
        "losses": [one["loss"] for one in history if "loss" in one] or [0.0],
        "steps": trainer.state.global_step,
        "parameters": recipes.count_trained(trainer.model),
    }
    return trainer.model.eval(), [extractor, task.tokenizer], facts


def _split(found: Recordings, seed: int) -> tuple[list[int], list[int], str]:
    """Return what to train on, what tells when to stop, and a sentence about it."""
    train, validation = found.where("train"), found.where("validation")
    if validation:
        return train, validation, "the validation split tells when to stop."
    groups = [found.speakers[row] for row in train] if found.speakers else train
    unit = "speakers" if len(set(groups)) > 1 and found.speakers else "recordings"
    groups = groups if unit == "speakers" else train
    ((heard, held_out),) = GroupShuffleSplit(1, test_size=HELD_OUT, random_state=seed).split(train, groups=groups)
    return [train[i] for i in heard], [train[i] for i in held_out], f"{len(held_out)} recordings, by {unit}."


def _degenerate(written: Sequence[str]) -> Iterator[str]:
    """Yield a warning where a model writes nothing, always the same, or in loops."""
    words = [text.split() for text in written]
    loops = sum(len(one) > LOOP and len(one) >= 3 * len(set(one)) for one in words)
    same, count = Counter(written).most_common(1)[0]
    found = {"are empty": written.count(""), "repeat their words": loops, f"are {same[:40]!r}": count}
    for what, number in found.items():
        if number > len(written) / 2 and number > 1:
            yield (
                f"{number} of {len(written)} texts {what}: the model has not learned to write. Train longer "
                "(--minutes) or on more recordings."
            )
            return
