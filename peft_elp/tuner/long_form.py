"""Whisper's generation from recordings of more than 30 s, in a batch that mixes adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_elp.call.route import Route, current_route

NAME = "generate_with_fallback"


def generates_long_form(model: nn.Module) -> bool:
    """Whether the model generates from long recordings, segment by segment, as Whisper does."""
    return hasattr(model, NAME)


@dataclass(eq=False)
class GenerateSegment:
    """`generate_with_fallback` of one model: generates from one segment of each recording that has not ended yet.

    Transformers drops the recordings that have ended from the batch. This relies on its arguments `batch_idx_map`, the
    index of each recording that is left, and `batch_size`, the size of the batch at the beginning.

    Args:
        model: The model.
    """

    model: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generate, route = getattr(type(self.model), NAME), current_route.get()
        if route is None or route.whole is not None:
            return generate(self.model, *args, **kwargs)
        copies = kwargs["batch_size"] // len(route.names)
        names = [route.names[index // copies] for index in kwargs["batch_idx_map"]]
        with current_route.set(Route(names, route.beams)):
            return generate(self.model, *args, **kwargs)
