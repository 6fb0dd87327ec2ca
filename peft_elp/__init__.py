"""ELP-adapter tuning for speech encoders, on PEFT's terms.

Importing the package makes PEFT know the method: `get_peft_model(model, ELPConfig())` adapts a Transformers speech
encoder with any of its heads. See Inoue et al. 2024, [arXiv:2407.21066](https://arxiv.org/abs/2407.21066).
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("peft-elp")
except PackageNotFoundError:  # a source tree that is on the path without being installed
    __version__ = "0.0.0"


def _prints_help_alone(argv: list[str]) -> bool:
    """Whether the process is the command `peft-elp`, asked for nothing but its help or its version."""
    if not argv or Path(argv[0]).name not in ("peft-elp", "peft-elp.exe") or "--" in argv:
        return False
    return not argv[1:] or not {"-h", "--help", "--version"}.isdisjoint(argv[1:])


# A help text should not wait for the import of PyTorch and PEFT, which takes seconds.
if not _prints_help_alone(sys.argv):
    from .backbones import Backbone, register_backbone
    from .config import ELPConfig
    from .feature_cache import FeatureCache
    from .multitask import MultiTaskModel
    from .optim import create_optimizer, get_epochwise_schedule, parameter_groups
    from .parameters import count_parameters
    from .published import published_factors, published_rates
    from .saved.card import describe, write_card
    from .saved.save import protect_saving
    from .tuner.find import Encoder, find_encoder
    from .tuner.hotswap import hotswap_adapter
    from .tuner.layout import speed_up_frozen
    from .tuner.loading import protect_loading
    from .tuner.model import ELPModel
    from .tuner.prune import prune_taps
    from .tuner.registry import register
    from .tuner.window import shorten_window

    register(ELPConfig, ELPModel)
    protect_saving()
    protect_loading()

__all__ = [
    "Backbone",
    "ELPConfig",
    "ELPModel",
    "Encoder",
    "FeatureCache",
    "MultiTaskModel",
    "__version__",
    "count_parameters",
    "create_optimizer",
    "describe",
    "find_encoder",
    "get_epochwise_schedule",
    "hotswap_adapter",
    "parameter_groups",
    "prune_taps",
    "published_factors",
    "published_rates",
    "register_backbone",
    "shorten_window",
    "speed_up_frozen",
    "write_card",
]
