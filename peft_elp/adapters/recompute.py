"""Computing something again in the backward pass, so that it need not be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_again_in_backward(part: Callable[..., Tensor], weight: Any, dropout: nn.Dropout, *inputs: Any) -> Tensor:
    """Call `part(*inputs)`, keep nothing but the inputs for the backward pass, and call it again there.

    This is the plain call where nothing is to be gained: without gradients, and under `torch.compile`, which decides
    itself what to keep. So it is where the second call would compute something else or fail: with weights that
    `torch.func.functional_call` lends to the module, and under `torch.func` and `torch.jit.trace`.

    Args:
        part: A method of a module.
        weight: A weight that it uses.
        dropout: The dropout that it uses, whose second mask is the same.
        inputs: Its inputs, tensors or None.

    Returns:
        The result of `part`.

    Examples:
        >>> norm, x = nn.LayerNorm(3), torch.tensor([[1.0, 2.0, 6.0]], requires_grad=True)
        >>> y = run_again_in_backward(lambda x: norm(x.exp()), norm.weight, nn.Dropout(0.0), x)
        >>> torch.equal(y, norm(x.exp()))
        True
    """
    if not records_plain_graph() or not isinstance(weight, nn.Parameter):
        return part(*inputs)
    same_mask = dropout.training and dropout.p > 0
    output = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=same_mask)
    assert isinstance(output, Tensor)
    return output


def records_plain_graph() -> bool:
    """Whether operations are recorded for gradients alone, neither compiled nor traced nor under `torch.func`."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  # documented, but not in __all__
    if tracing or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    # A private function of PyTorch; tests/test_seams.py watches it.
    return torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
