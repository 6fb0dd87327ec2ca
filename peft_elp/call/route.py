"""Which adapter answers for which utterance of a batch, where a call says so rather than the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .context import Current

BASE = "__base__"


class Route:
    """The adapters of one call, by utterance.

    Args:
        names: The name of each utterance's adapter, or "__base__" for the backbone alone.
        beams: How often generation repeats each utterance behind the encoder.
    """

    def __init__(self, names: Sequence[str], beams: int = 1) -> None:
        self.names = tuple(names)
        self.beams = beams
        self.adapters = tuple(dict.fromkeys(name for name in names if name != BASE))
        self._rows: dict[tuple[str, Any, int], Tensor] = {}
        self.whole: str | None = None

    @classmethod
    def only(cls, name: str) -> Route:
        """One adapter for all utterances of any batch."""
        route = cls([name])
        route.whole = name
        return route

    def rows(self, name: str, x: Tensor, axes: int = 3) -> Tensor:
        """The places in the batch `x`, a tensor of at least so many axes, of the utterances that use an adapter.

        Raises:
            ValueError: The batch is of another size.
        """
        repeats = len(x) // len(self.names)
        if x.dim() < axes or len(x) != repeats * len(self.names) or repeats not in (1, self.beams):
            raise ValueError(
                f"adapter_names holds {len(self.names)} names, and a tensor of shape {tuple(x.shape)} came where each "
                "utterance has one row. Give one name an utterance. An encoder that packs utterances into one "
                "sequence, or folds long ones, cannot mix adapters: call it once for each."
            )
        key = (name, x.device, repeats)
        if key not in self._rows:
            rows = [row for row, known in enumerate(self.names) if known == name]
            places = [row * repeats + copy for row in rows for copy in range(repeats)]
            self._rows[key] = torch.tensor(places, device=x.device)
        return self._rows[key]


current_route: Current[Route] = Current("peft_elp_route")
