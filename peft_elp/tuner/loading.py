"""Placing and loading an adapter through PEFT or Transformers: the whole adapter, or the model stays as it was.

PEFT and Transformers place an adapter in the model before they look for its weights. If the weights are missing,
broken or do not fit, they leave an untrained adapter in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from peft import PeftModel
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from peft_elp.config import ELPConfig

from .layers import ELPLayer
from .snapshot import Snapshot

# The methods that put an adapter into a model, and which of their arguments the model is. Neither library has a hook
# around them.
DOORS = (
    (PeftModel, "__init__", 1),
    (PeftModel, "from_pretrained", 1),
    (PeftModel, "add_adapter", 0),
    (PeftModel, "load_adapter", 0),
    (PeftAdapterMixin, "add_adapter", 0),
    (PeftAdapterMixin, "load_adapter", 0),
)


def protect_loading() -> None:
    """Wrap the methods in `DOORS`; harmless when repeated. Nothing changes for models without ELP-adapters."""
    for holder, name, model_at in DOORS:
        method = vars(holder)[name]
        plain = method.__func__ if isinstance(method, classmethod) else method
        if not hasattr(plain, "before_elp"):
            wrapped = _whole_or_not_at_all(plain, model_at, loads=name in ("from_pretrained", "load_adapter"))
            setattr(holder, name, classmethod(wrapped) if isinstance(method, classmethod) else wrapped)


def _whole_or_not_at_all(method: Callable[..., Any], model_at: int, loads: bool) -> Callable[..., Any]:
    """The method, after an error of which its argument `model` is what it was before.

    Args:
        method: The method.
        model_at: Which of its arguments the model is.
        loads: Whether it reads the configuration itself, so that only an error shows whose adapter it is.
    """

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        is_elp = any(isinstance(value, ELPConfig) for value in (*args, *kwargs.values()))
        if not (is_elp or loads):
            return method(*args, **kwargs)
        model: Any = args[model_at] if len(args) > model_at else kwargs.get("model")
        before = Snapshot(model)
        try:
            return method(*args, **kwargs)
        except BaseException:
            if is_elp or _has_elp(model):
                before.restore()
            raise

    vars(wrapped)["before_elp"] = method
    return wrapped


def _has_elp(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(isinstance(module, ELPLayer) for module in model.modules())
