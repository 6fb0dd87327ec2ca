"""Which adapter serves which utterance of a batch, if the call names the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .context import CallVariable

BASE = "__base__"


class Route:
    """The adapters of one call, by utterance; `beams`: how often generation repeats each behind the encoder.

    Examples:
        >>> Route(["asr", "emotion", "asr"]).indices("asr", torch.zeros(3, 49, 768))
        tensor([0, 2])
    """

    def __init__(self, names: Sequence[str], beams: int = 1) -> None:
        self.names = tuple(names)
        self.beams = beams
        self.adapters = tuple(dict.fromkeys(name for name in names if name != BASE))
        self.whole: str | None = None  # The adapter of all utterances, however many there are.
        self._indices: dict[tuple[str, Any, int], Tensor] = {}

    @classmethod
    def only(cls, name: str) -> Route:
        """Return one adapter for all utterances of a batch of any size."""
        route = cls([name])
        route.whole = name
        return route

    def check(self, x: Tensor, axes: int) -> int:
        """Return how often each utterance is repeated in a batch, whose size has to fit the number of names."""
        repeats = len(x) // len(self.names)
        if x.dim() < axes or len(x) != repeats * len(self.names) or repeats not in (1, self.beams):
            raise ValueError(
                f"adapter_names holds {len(self.names)} names, and the batch has the shape {tuple(x.shape)}. Pass one "
                "adapter name per utterance. An encoder that packs utterances into one sequence, or splits long ones, "
                "cannot mix adapters. Nor can generation from recordings longer than the window. Call the model once "
                "per adapter."
            )
        return repeats

    def indices(self, name: str, x: Tensor, axes: int = 3) -> Tensor:
        """Return the indices of the utterances that use an adapter."""
        repeats = self.check(x, axes)
        key = (name, x.device, repeats)
        if key not in self._indices:
            utterances = [index for index, known in enumerate(self.names) if known == name]
            repeated = [index * repeats + copy for index in utterances for copy in range(repeats)]
            self._indices[key] = torch.tensor(repeated, device=x.device)
        return self._indices[key]


current_route: CallVariable[Route] = CallVariable("peft_elp_route")
