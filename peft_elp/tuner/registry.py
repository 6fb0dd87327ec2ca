"""The one file that writes into PEFT's tables."""

from __future__ import annotations

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

NAME = "ELP"


def register(config_cls: type, model_cls: type) -> None:
    """Make PEFT know ELP wherever it looks a method up by its type. Harmless when repeated."""
    if NAME in PeftType.__members__:
        known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
        if known is None or known.__module__ != config_cls.__module__:
            raise ImportError(
                f"PEFT {peft.__version__} has a method called {NAME} of its own"
                f"{f' ({known.__module__}.{known.__qualname__})' if known else ''}; peft_elp will not overwrite it. "
                "Use that one, or install a version of peft without it."
            )
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[NAME]] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType[NAME]] = model_cls
        return
    _add_member(NAME)
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)


def _add_member(name: str) -> None:
    # PeftType is a closed enumeration. A plain string would serve as a key in PEFT's tables, but error paths and
    # Transformers read `peft_type.value`, and a pickled config finds its type by value.
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue]
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    hashable = getattr(PeftType, "_hashable_values_", None)  # Python 3.12 and later
    if hashable is not None:
        hashable.append(name)
