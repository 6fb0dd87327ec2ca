"""What the training scripts in `examples/` share: options, data, methods, learning rates, trainers and saving.

A script reads as data, model, metric, train, save. Copy one and change it; what it calls is documented here. Needs
`pip install 'peft-elp[recipes]'`.
"""

from peft_elp_options import DataArguments as DataArguments
from peft_elp_options import TextArguments as TextArguments
from peft_elp_options import check_command_line as check_command_line
from peft_elp_options import option as option
from peft_elp_options import refuse_unused as refuse_unused

from .arguments import ModelArguments as ModelArguments
from .arguments import RecipeTrainingArguments as RecipeTrainingArguments
from .arguments import parse_arguments as parse_arguments
from .collator import Collator as Collator
from .ctc import check_characters as check_characters
from .ctc import keep_alignable as keep_alignable
from .ctc import make_tokenizer as make_tokenizer
from .ctc import num_frames as num_frames
from .loading import fit_window as fit_window
from .loading import limit_rows as limit_rows
from .loading import load_config as load_config
from .loading import load_feature_extractor as load_feature_extractor
from .loading import load_model as load_model
from .loading import read_split as read_split
from .loading import training_columns as training_columns
from .long_recordings import transcribe_long as transcribe_long
from .methods import adapt as adapt
from .methods import count_trained as count_trained
from .methods import get_base_model as get_base_model
from .methods import trained_parameters as trained_parameters
from .methods import without_adapter as without_adapter
from .rates import learning_rates as learning_rates
from .saving import save_results as save_results
from .saving import write_table as write_table
from .seq2seq import Seq2SeqRecipeTrainer as Seq2SeqRecipeTrainer
from .seq2seq import Seq2SeqRecipeTrainingArguments as Seq2SeqRecipeTrainingArguments
from .seq2seq import make_labels as make_labels
from .seq2seq import make_normalizer as make_normalizer
from .seq2seq import set_language as set_language
from .trainer import RecipeTrainer as RecipeTrainer
from .trainer import make_trainer as make_trainer
from .verification import SpeakerTrainer as SpeakerTrainer
from .verification import pair_up as pair_up
from .verification import read_pairs as read_pairs
from .verification import recording_names as recording_names
