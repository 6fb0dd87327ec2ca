"""Pseudo features as keys and values alone, a cheaper variant of P that `peft_elp` does not have.

`measure_starts.py lengths --keys_and_values` measures what it brings, and `measure_cost.py methods` what it costs.
docs/reference/starts.md has the results.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_elp import Encoder


class KeysAndValues(nn.Module):
    """Trained rows that the frames attend to in each layer.

    P puts its rows among the frames, so they pass through the layers as the frames do. These do not: they have no
    queries and no feed-forward modules, and are the same in each layer, up to its norm:
    `y = attention(queries=x, keys_and_values=[norm(rows); x])`, with the norm in pre-norm layers alone.

    Args:
        encoder: A wav2vec 2.0, HuBERT or Whisper encoder, whose attention takes `key_value_states`.
        length: Number of rows.
        std: Their standard deviation at the start.
    """

    def __init__(self, encoder: Encoder, length: int, std: float = 1e-4) -> None:
        super().__init__()
        self.rows = nn.Parameter(std * torch.randn(length, encoder.hidden_size))
        for layer in encoder.layers:
            norm = layer.get_submodule(encoder.family.norms[0]) if encoder.family.pre_norm else nn.Identity()
            attention = layer.get_submodule(encoder.family.attention[0])
            attention.register_forward_pre_hook(partial(self._join, norm), with_kwargs=True)

    def _join(self, norm: nn.Module, _attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        rows = norm(self.rows).to(x).expand(x.shape[0], -1, -1)
        kwargs = kwargs | {"key_value_states": torch.cat([rows, x], dim=1)}
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor):  # (batch, 1, queries, keys): boolean, or what is added to the scores
            seen = mask.new_full((*mask.shape[:-1], len(self.rows)), 1.0 if mask.dtype == torch.bool else 0.0)
            kwargs["attention_mask"] = torch.cat([seen, mask], dim=-1)
        return (x, *rest), {key: value for key, value in kwargs.items() if key != "hidden_states"}
