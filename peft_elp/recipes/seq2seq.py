"""Speech recognition with a pretrained decoder, such as Whisper's: labels, the trainer, and normalised text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from .arguments import RecipeTrainingArguments, option
from .trainer import RecipeTrainer


@dataclass
class Seq2SeqRecipeTrainingArguments(  # pyright: ignore[reportIncompatibleVariableOverride]
    RecipeTrainingArguments, Seq2SeqTrainingArguments
):
    """`RecipeTrainingArguments` for a model that generates text."""

    # No rates were published for encoders with a pretrained decoder.
    learning_rate: float | None = option(1e-4, "Rate of everything that is trained.")  # pyright: ignore
    predict_with_generate: bool = option(True, "Evaluate generated text, not only the loss.")


class Seq2SeqRecipeTrainer(RecipeTrainer, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` with a learning rate for each part."""


def set_language(model: Any, tokenizer: Any, language: str | None, task: str) -> None:
    """Make a multilingual Whisper write one language, in training and in generation; other models stay as they are.

    Args:
        model: The model, whose generation settings are changed.
        tokenizer: Its tokenizer, whose prefix of a label is changed.
        language: A language such as "de" or "german".
        task: "transcribe" or "translate" (into English).

    Raises:
        ValueError: A multilingual model needs a language, or another model takes none.
    """
    is_multilingual = getattr(model.generation_config, "is_multilingual", False)
    if is_multilingual and language is None:
        raise ValueError(f"{model.name_or_path} knows many languages. Name one with --language, such as en.")
    if not is_multilingual:
        if language is not None:
            raise ValueError(f"{model.name_or_path} knows a single language. Remove --language.")
        return
    tokenizer.set_prefix_tokens(language=language, task=task)
    model.generation_config.language, model.generation_config.task = language, task


def make_labels(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text as the decoder must write them, from the first one after the start to the end.

    Raises:
        ValueError: A text has more tokens than the decoder has positions.
    """
    start, end = (
        getattr(model.config, name, None) if (token := getattr(model.generation_config, name, None)) is None else token
        for name in ("decoder_start_token_id", "eos_token_id")
    )
    most = getattr(model.config, "max_target_positions", None)
    labels = []
    for text, numbers in zip(texts, tokenizer(list(texts)).input_ids, strict=True):
        numbers = numbers[1:] if numbers and numbers[0] == start else numbers
        numbers = numbers if numbers and numbers[-1] == end else [*numbers, end]
        if most is not None and len(numbers) > most:
            raise ValueError(f"A text has {len(numbers)} tokens, but the decoder has {most} positions: {text[:80]!r}.")
        labels.append(numbers)
    return labels


def make_normalizer(tokenizer: Any, language: str | None = None) -> Callable[[str], str]:
    """Make Whisper's normaliser of text, for word error rates that can be compared.

    It removes case, punctuation and fillers such as "um"; in English, which is None, it also writes out contractions
    and unifies numbers, and spellings where the tokenizer brings a list of them.

    Examples:
        >>> make_normalizer(None)("Um, it's TWENTY dollars.")
        'it is $20'
    """
    if language in (None, "en", "english"):
        normalize = EnglishTextNormalizer(getattr(tokenizer, "english_spelling_normalizer", None) or {})
    else:
        normalize = BasicTextNormalizer()
    return lambda text: normalize(text).strip()
