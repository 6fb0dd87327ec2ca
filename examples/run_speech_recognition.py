r"""Train an adapted speech encoder for speech recognition with CTC, as in the paper on Libri-light 10 h.

    python examples/make_demo_data.py
    python examples/run_speech_recognition.py --model_name_or_path demo/encoder --dataset_name demo/sentences \
        --learning_rate 2e-3 --output_dir outputs/sentences

The vocabulary is the characters of the training text. Measured: `wer` and `cer`, the word and character error rates of
the test text, by jiwer. Text is in lower case, unless `--do_lower_case False` keeps the case, and without
`--chars_to_ignore`. `predictions.csv` has every utterance.
"""

from dataclasses import dataclass

from peft_elp_options import TextArguments, check_command_line, option


@dataclass
class RecognitionArguments(TextArguments):
    """The recordings and their texts."""

    do_lower_case: bool = option(True, "Put all text into lower case.")
    chars_to_ignore: str = option('.,?!;:"', "Characters that are removed from all text.")
    tokenizer_name_or_path: str | None = option(None, "A vocabulary. Default: the characters of the training text.")
    on_long_text: str = option(
        "error", "Stop at a text that is too long for its frames, or leave it out.", choices=("error", "skip")
    )


if __name__ == "__main__":
    check_command_line(RecognitionArguments, __doc__)  # before PyTorch is imported, which takes seconds

import json
import re
from collections.abc import Sequence
from typing import Any

import jiwer
from datasets import Dataset
from transformers import AutoModelForCTC, AutoTokenizer

from peft_elp import recipes
from peft_elp.speech.data import find_column, read_column


def read_texts(dataset: Dataset, data_args: RecognitionArguments) -> list[str]:
    """The text of each utterance, as the model is to write it.

    Raises:
        ValueError: Nothing is left of a text.
    """
    ignored = re.escape(data_args.chars_to_ignore)
    texts = []
    for raw in read_column(dataset, find_column(dataset, "text", data_args.text_column_name)):
        text = " ".join((re.sub(f"[{ignored}]", "", raw) if ignored else raw).split())
        if not text:
            raise ValueError(f"Nothing is left of the text {raw!r} without --chars_to_ignore. Remove its recording.")
        texts.append(text.lower() if data_args.do_lower_case else text)
    return texts


def error_rates(texts: list[str], found: list[str]) -> dict[str, float]:
    return {"wer": jiwer.wer(texts, found), "cer": jiwer.cer(texts, found)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure with a command line, by default that of the process; return the metrics."""
    model_args, data_args, args = recipes.parse_arguments(argv, RecognitionArguments)
    config = recipes.load_config(model_args.model_name_or_path)
    feature_extractor = recipes.load_feature_extractor(model_args, data_args)
    rate_hz, chunk_s = feature_extractor.sampling_rate, data_args.chunk_length_in_seconds

    # Data
    bounds = {} if chunk_s is None else {"max_duration_in_seconds": None}
    seed, most, most_test = args.seed, data_args.max_train_samples, data_args.max_eval_samples
    train = recipes.read_split(data_args, data_args.train_split_name, config, seed, most)
    test = recipes.read_split(data_args, data_args.eval_split_name, config, seed, most_test, **bounds)
    texts, test_texts = read_texts(train, data_args), read_texts(test, data_args)
    if data_args.tokenizer_name_or_path:
        tokenizer: Any = AutoTokenizer.from_pretrained(data_args.tokenizer_name_or_path)
    else:
        tokenizer = recipes.make_tokenizer(texts, args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    recipes.check_characters(tokenizer, texts, test_texts)
    print(f"{len(train)} utterances in training, {len(test)} in test; {len(tokenizer)} tokens")

    # Model
    config.update({"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    config.ctc_loss_reduction = "mean"  # A sum would give long utterances most of the weight.
    model: Any = recipes.load_model(AutoModelForCTC, model_args, config)

    def labelled(dataset: Dataset) -> tuple[Dataset, list[str]]:
        labels = tokenizer(read_texts(dataset, data_args)).input_ids
        rows = recipes.keep_alignable(dataset, labels, model, rate_hz, data_args.on_long_text)
        return recipes.training_columns(dataset, labels).select(rows), read_texts(dataset.select(rows), data_args)

    validation: Any = None
    validation_texts = []
    if (name := data_args.validation_split_name) is not None:
        rows = recipes.read_split(data_args, name, config, seed, most_test)
        validation, validation_texts = labelled(rows)

    # Metric
    def texts_of(dataset: Dataset, logits: Any) -> list[str]:
        frames = [recipes.num_frames(model, round(duration_s * rate_hz)) for duration_s in dataset["duration_s"]]
        return [tokenizer.decode(padded[:count].argmax(-1)) for padded, count in zip(logits, frames, strict=True)]

    def compute_metrics(predicted: Any) -> dict[str, float]:
        return error_rates(validation_texts, texts_of(validation, predicted.predictions))

    # Train
    options = {"train_dataset": labelled(train)[0], "eval_dataset": validation, "compute_metrics": compute_metrics}
    trainer = recipes.make_trainer(model, model_args, args, "asr", feature_extractor, **options)
    trainer.train_and_save()

    # Measure and save
    if chunk_s is None:
        found = texts_of(test, trainer.predict(test.select_columns(["audio", "duration_s"])).predictions)
    else:
        found = recipes.transcribe_long(trainer.model, feature_extractor, tokenizer, test, chunk_s)
    files = [audio["path"] for audio in test["audio"]]
    recipes.write_table(trainer, "predictions.csv", {"file": files, "text": test_texts, "predicted": found})
    case = "lower-cased, " if data_args.do_lower_case else ""
    protocol = (
        f"CTC over characters, greedy decoding. Text is {case}without {data_args.chars_to_ignore} and scored by "
        "jiwer, as shares of 1."
    )
    return recipes.save_results(trainer, error_rates(test_texts, found), model_args, data_args, "asr", protocol)


if __name__ == "__main__":
    print(json.dumps(main()))
