"""One pass through a frozen backbone that serves several L-adapters.

The call for the first adapter runs the backbone and reads the taps of all adapters. The model is called again for each
further adapter, and reuses what the first call computed instead of running the convolutions and layers again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peft_elp.adapters import LAdapter

from .context import CallVariable
from .outputs import another, hidden_states_of


@dataclass
class SharedPass:
    """What one pass computes for the calls that follow it."""

    # For each task that shares the layers, its L-adapter and the layers that the adapter taps.
    readers: dict[str, tuple[LAdapter, list[int]]] = field(default_factory=dict)
    task: str = ""  # whose call is under way
    features: Any = None  # the output of the convolutions over the waveform, once they have run
    # Hidden states of tapped layers by the layer's number, from an earlier call. The layers do not run then.
    cached: Mapping[int, Tensor] | None = None
    encoder: str | None = None  # the name of the encoder that computed them
    ends: dict[str, Tensor] = field(default_factory=dict)  # by task: what replaces the encoder's output
    output: Any = None  # of the stack, if sums of taps replace it; the stack is not called again then
    # By layer, for a stack that goes on after its layers: it is called again without them.
    layer_outputs: dict[int, Any] = field(default_factory=dict)
    entered: list[tuple[str, str]] = field(default_factory=list)  # the modules that the call of each task has reached

    def enter(self, module: str) -> None:
        """Note that the call of a task has reached a module, whose result is computed once.

        Raises:
            RuntimeError: It has reached the module before, with another input.
        """
        if (self.task, module) in self.entered:
            raise RuntimeError(
                f"This model calls its {module} more than once in a forward pass, and a pass that tasks share, or "
                "cached features, hold the result of one call. Call the model once per adapter, with recordings."
            )
        self.entered.append((self.task, module))

    def keep(self, layer: int, output: Any) -> None:
        """Keep the output of a layer. The stack may read it, or write into it, in each of its calls."""
        self.layer_outputs[layer] = another(output, hidden_states_of(output).clone())

    def replay(self, layer: int) -> Any:
        """Return the output that `keep` has kept."""
        output = self.layer_outputs[layer]
        return another(output, hidden_states_of(output).clone())


# The argument of a model that holds cached features: for each tapped layer, under its number as a string, the hidden
# states that the taps read, `(batch, frames, hidden)`; and, as the name of a tensor, the encoder that computed them.
CACHED = "cached_features"


def cached_pass(features: Mapping[str, Tensor]) -> SharedPass:
    """Return a pass in which neither the convolutions nor the layers run."""
    layers = {int(name): x for name, x in features.items() if name.isdecimal()}
    return SharedPass(cached=layers, encoder=next((name for name in features if not name.isdecimal()), None))


current_pass: CallVariable[SharedPass] = CallVariable("peft_elp_shared_pass")


def readers_of_pass() -> SharedPass | None:
    """Return the current pass if several tasks share its layers, else None."""
    shared = current_pass.get()
    return shared if shared is not None and shared.readers else None
