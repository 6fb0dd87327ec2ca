"""What Transformers loads as an adapter is compared with the adapter, as PEFT's tensors are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_elp.saved.weights import described_tensors

from .fit import SAVED_PREFIX, adapter_tensors, listed, misfit_error, mismatches, problems
from .patches import set_attribute
from .paths import canonical

NAME = "_load_pretrained_model"


def check_next_loading(model: Any, adapter_name: str) -> None:
    """Check what Transformers loads into the model next, which is the adapter that was just placed.

    Args:
        model: The model.
        adapter_name: Name of the adapter.
    """
    if hasattr(model, NAME):
        set_attribute(model, NAME, CheckedLoading(model, adapter_name))


@dataclass(eq=False)
class CheckedLoading:
    """`_load_pretrained_model` of one model, for the adapter that was placed last.

    Transformers' `load_adapter` places an adapter and calls this private method, which writes each tensor of the file
    that has a name in the model, whether it belongs to the adapter or not. This relies on the names of its arguments:
    `checkpoint_files` (paths) or `state_dict`, and `load_config` with `ignore_mismatched_sizes`.

    Args:
        model: The model.
        adapter_name: Name of the adapter.
    """

    model: Any
    adapter_name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        vars(self.model).pop(NAME, None)
        self._refuse(self._found(**kwargs))
        loaded = getattr(type(self.model), NAME)(*args, **kwargs)
        tensors = self._tensors()
        self._refuse(problems(tensors, tensors))
        return loaded

    def _found(
        self,
        state_dict: dict[str, Tensor] | None = None,
        checkpoint_files: Any = None,
        load_config: Any = None,
        **_: Any,
    ) -> dict[str, list[str]]:
        """How the tensors that are to be loaded differ from those of the adapter."""
        given = dict(state_dict or {})
        for path in checkpoint_files or ():
            given |= described_tensors(Path(path), str(Path(path).parent))
        given = {name.removeprefix(SAVED_PREFIX): tensor for name, tensor in given.items()}
        tensors = self._tensors()
        found = problems(tensors, given)
        return found if getattr(load_config, "ignore_mismatched_sizes", False) else found | mismatches(tensors, given)

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the adapter, by the names that they have in a file."""
        container = re.compile(rf"(?:\.modules_to_save|(\.elp_[a-z]+))\.{re.escape(self.adapter_name)}(?=\.)")
        tensors = adapter_tensors(self.model, self.adapter_name)
        return {canonical(container.sub(r"\1", name, count=1)): tensor for name, tensor in tensors.items()}

    def _refuse(self, found: dict[str, list[str]]) -> None:
        what = listed(found)
        if what:
            raise misfit_error(self.model, self.adapter_name, what)
