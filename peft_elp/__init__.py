"""ELP-adapter tuning for speech encoders, on PEFT's terms.

Importing the package makes PEFT know the method: `get_peft_model(model, ELPConfig())` adapts a Transformers speech
encoder with any of its heads. See Inoue et al. 2024, [arXiv:2407.21066](https://arxiv.org/abs/2407.21066).
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .backbones import Backbone, register_backbone
from .config import ELPConfig
from .feature_cache import FeatureCache
from .multitask import MultiTaskModel
from .optim import create_optimizer, get_epochwise_schedule, parameter_groups
from .parameters import count_parameters
from .published import published_factors, published_rates
from .saved.card import describe, write_card, write_saved_card
from .tuner.find import Encoder, find_encoder
from .tuner.gradients import check_gradients
from .tuner.hotswap import hotswap_adapter
from .tuner.layout import speed_up_frozen
from .tuner.model import ELPModel
from .tuner.prune import prune_taps
from .tuner.registry import register
from .tuner.window import pool_own_frames, shorten_window

try:
    __version__ = version("peft-elp")
except PackageNotFoundError:  # a source tree that is on the path without being installed
    __version__ = "0.0.0"

register(ELPConfig, ELPModel)
ELPConfig.after_save = staticmethod(write_saved_card)

__all__ = [
    "Backbone",
    "ELPConfig",
    "ELPModel",
    "Encoder",
    "FeatureCache",
    "MultiTaskModel",
    "__version__",
    "check_gradients",
    "count_parameters",
    "create_optimizer",
    "describe",
    "find_encoder",
    "get_epochwise_schedule",
    "hotswap_adapter",
    "parameter_groups",
    "pool_own_frames",
    "prune_taps",
    "published_factors",
    "published_rates",
    "register_backbone",
    "shorten_window",
    "speed_up_frozen",
    "write_card",
]


def __getattr__(name: str) -> Any:
    """Return `train`, which needs the packages of an extra, when it is asked for."""
    if name == "train":
        return import_module(".automl.train", __name__).train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
