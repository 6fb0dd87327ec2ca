r"""Train an adapted encoder with a pretrained decoder for speech recognition: Whisper, Moonshine, Speech2Text...

    python examples/run_speech_recognition_seq2seq.py --model_name_or_path openai/whisper-tiny.en \
        --dataset_name recordings --max_steps 200 --per_device_train_batch_size 4 --output_dir outputs/whisper

The decoder stays as it is, except with `--method full`. A multilingual Whisper needs `--language`.

Measured: `wer` and `cer`, the word and character error rates of the test text, by jiwer, after Whisper's own text
normaliser; `wer_before` and `cer_before` are those of the model before the training. `predictions.csv` has every
utterance, not normalised.
"""

from dataclasses import dataclass

from peft_elp_options import TextArguments, check_command_line, option


@dataclass
class RecognitionArguments(TextArguments):
    """The recordings, their texts, and the language."""

    language: str | None = option(None, "Language of the text, such as 'de', for a multilingual Whisper.")
    task: str = option("transcribe", "What a multilingual Whisper writes.", choices=("transcribe", "translate"))
    measure_before: bool = option(True, "Also measure the test split before the training.")


if __name__ == "__main__":
    check_command_line(RecognitionArguments, __doc__)  # before PyTorch is imported, which takes seconds

import json
from collections.abc import Sequence
from typing import Any

import jiwer
from datasets import Dataset
from transformers import AutoModelForSpeechSeq2Seq, AutoTokenizer

from peft_elp import recipes
from peft_elp.speech.data import find_column, read_column


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure with a command line, by default that of the process; return the metrics."""
    model_args, data_args, args = recipes.parse_arguments(
        argv, RecognitionArguments, recipes.Seq2SeqRecipeTrainingArguments
    )
    name, chunk_s, seed = model_args.model_name_or_path, data_args.chunk_length_in_seconds, args.seed
    config = recipes.load_config(name)
    feature_extractor = recipes.load_feature_extractor(model_args, data_args)
    tokenizer = AutoTokenizer.from_pretrained(name)

    def texts_in(dataset: Dataset) -> list[str]:
        return read_column(dataset, find_column(dataset, "text", data_args.text_column_name))

    # Data
    bounds = {} if chunk_s is None else {"max_duration_in_seconds": None}
    most, most_test = data_args.max_train_samples, data_args.max_eval_samples
    train = recipes.read_split(data_args, data_args.train_split_name, config, seed, most)
    test = recipes.read_split(data_args, data_args.eval_split_name, config, seed, most_test, **bounds)
    test_texts = texts_in(test)
    print(f"{len(train)} utterances in training, {len(test)} in test")

    # Model
    model = recipes.load_model(AutoModelForSpeechSeq2Seq, model_args, config)
    recipes.set_language(model, tokenizer, data_args.language, data_args.task)

    def labelled(dataset: Dataset) -> Dataset:
        return recipes.training_columns(dataset, recipes.make_labels(model, tokenizer, texts_in(dataset)))

    validation, validation_texts = None, []
    if (split := data_args.validation_split_name) is not None:
        rows = recipes.read_split(data_args, split, config, seed, most_test)
        validation, validation_texts = labelled(rows), texts_in(rows)

    # Metric
    normalize = recipes.make_normalizer(tokenizer, "en" if data_args.task == "translate" else data_args.language)

    def error_rates(texts: Sequence[str], found: Sequence[str]) -> dict[str, float]:
        right, answered = [normalize(text) for text in texts], [normalize(text) for text in found]
        return {"wer": jiwer.wer(right, answered), "cer": jiwer.cer(right, answered)}

    def texts_of(tokens: Any) -> list[str]:
        tokens[tokens == -100] = tokenizer.pad_token_id  # how Trainer pads
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    # Train
    options = {"train_dataset": labelled(train), "eval_dataset": validation}
    options["compute_metrics"] = lambda predicted: error_rates(validation_texts, texts_of(predicted.predictions))
    trainer_cls = recipes.Seq2SeqRecipeTrainer
    trainer = recipes.make_trainer(model, model_args, args, "asr", feature_extractor, trainer_cls, **options)

    def transcribe() -> list[str]:
        if chunk_s is not None:
            return recipes.transcribe_long(trainer.model, feature_extractor, tokenizer, test, chunk_s)
        return texts_of(trainer.predict(test.select_columns(["audio", "duration_s"])).predictions)

    metrics: dict[str, Any] = {}
    if data_args.measure_before:
        with recipes.without_adapter(trainer.model):
            rates = error_rates(test_texts, transcribe())
        metrics |= {f"{name}_before": rate for name, rate in rates.items()}
        print({name: round(rate, 4) for name, rate in metrics.items()})
    trainer.train_and_save()

    # Measure and save
    found = transcribe()
    files = [audio["path"] for audio in test["audio"]]
    recipes.write_table(trainer, "predictions.csv", {"file": files, "text": test_texts, "predicted": found})
    tokenizer.save_pretrained(args.output_dir)
    metrics |= error_rates(test_texts, found)
    protocol = f"Text of {len(test)} utterances after Whisper's normaliser, scored by jiwer, as shares of 1."
    return recipes.save_results(trainer, metrics, model_args, data_args, "asr", protocol)


if __name__ == "__main__":
    print(json.dumps(main()))
