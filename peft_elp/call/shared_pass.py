"""One pass through a frozen backbone that serves several L-adapters.

The first of them runs the backbone and reads the taps of all. For each further one the model is called again, with
what the first call found in place of the backbone's convolutions and layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peft_elp.adapters import LAdapter

from .context import Current
from .outputs import another


@dataclass
class SharedPass:
    """What one pass leaves behind for the calls that follow it.

    Args:
        readers: For each task that shares the layers, its L-adapter and the layers that this taps.
        task: The task whose call is under way.
        features: What the convolutions over the waveform gave, once they ran.
        ends: For each task, what takes the place of the encoder's output, once the layers ran.
        output: What the stack gave, where the sums of taps take the place of its output: it is not called again.
        layer_outputs: What each layer gave beside the hidden states, by its number, for a stack that goes on after
            them: it is called again, without its layers.
    """

    readers: dict[str, tuple[LAdapter, list[int]]] = field(default_factory=dict)
    task: str = ""
    features: Any = None
    ends: dict[str, Tensor] = field(default_factory=dict)
    output: Any = None
    layer_outputs: dict[int, Any] = field(default_factory=dict)

    def keep(self, layer: int, output: Any) -> None:
        """Remember what a layer gave, but for its hidden states."""
        self.layer_outputs[layer] = None if isinstance(output, Tensor) else another(output, None)

    def replay(self, layer: int, x: Tensor) -> Any:
        """What a layer gave, with hidden states `x`, which nothing reads any more."""
        output = self.layer_outputs[layer]
        return x if output is None else another(output, x)


current_pass: Current[SharedPass] = Current("peft_elp_shared_pass")


def readers_of_pass() -> SharedPass | None:
    """The pass under way whose layers several tasks share, None where there is none."""
    shared = current_pass.get()
    return shared if shared is not None and shared.readers else None
