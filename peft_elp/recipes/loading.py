"""The pretrained encoder of a recipe."""

from typing import Any

from transformers import AutoConfig


def load_config(model_name_or_path: str, **settings: Any) -> Any:
    """The configuration of an encoder, without LayerDrop.

    An L-adapter reads every layer, so no layer may be skipped; the other methods are trained the same way, so that
    they can be compared.

    Args:
        model_name_or_path: A Hub id or folder.
        settings: Values that replace those of the configuration, such as `id2label`.
    """
    config: Any = AutoConfig.from_pretrained(model_name_or_path, **settings)
    if getattr(config, "layerdrop", 0.0):
        config.layerdrop = 0.0
    return config
