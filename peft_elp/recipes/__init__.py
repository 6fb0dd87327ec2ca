"""What the training scripts in `examples/` share: options, data, methods, learning rates, trainers and saving.

A script reads as data, model, metric, train, save. Copy one and change it; what it calls is documented here. Needs
`pip install 'peft-elp[recipes]'`.
"""

from .arguments import (
    METHODS,
    DataArguments,
    ModelArguments,
    RecipeTrainingArguments,
    option,
    parse_arguments,
    refuse_unused,
)
from .collator import Collator
from .ctc import check_characters, keep_alignable, make_decoder, make_tokenizer, num_frames
from .loading import load_config, load_feature_extractor, load_model
from .long_recordings import transcribe_long
from .methods import adapt, count_trained, trained_parameters, unwrap, without_adapter
from .rates import learning_rates
from .saving import save_results, write_rows
from .seq2seq import (
    Seq2SeqRecipeTrainer,
    Seq2SeqRecipeTrainingArguments,
    make_labels,
    make_normalizer,
    set_language,
)
from .splits import limit_rows, read_split, training_columns
from .trainer import RecipeTrainer, make_trainer
from .verification import SpeakerTrainer, pair_up, read_pairs, recording_names

__all__ = [
    "METHODS",
    "Collator",
    "DataArguments",
    "ModelArguments",
    "RecipeTrainer",
    "RecipeTrainingArguments",
    "Seq2SeqRecipeTrainer",
    "Seq2SeqRecipeTrainingArguments",
    "SpeakerTrainer",
    "adapt",
    "check_characters",
    "count_trained",
    "keep_alignable",
    "learning_rates",
    "limit_rows",
    "load_config",
    "load_feature_extractor",
    "load_model",
    "make_decoder",
    "make_labels",
    "make_normalizer",
    "make_tokenizer",
    "make_trainer",
    "num_frames",
    "option",
    "pair_up",
    "parse_arguments",
    "read_pairs",
    "read_split",
    "recording_names",
    "refuse_unused",
    "save_results",
    "set_language",
    "trained_parameters",
    "training_columns",
    "transcribe_long",
    "unwrap",
    "without_adapter",
    "write_rows",
]
