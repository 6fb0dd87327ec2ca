"""Computing something again in the backward pass, so that it need not be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_input
from torch.nn.utils.parametrize import is_parametrized
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


_SOURCE = "_elp_source"  # An attribute of a detached input: what it was detached from.


def detach_from_frozen(convolution: nn.Conv1d, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of a convolution that computes a frozen weight in each call: the graph does not keep it.

    The positional convolution of wav2vec 2.0 is one. `torch.nn.utils.parametrizations.weight_norm` computes its
    weight, 18 MiB in the base size, from a direction and a length. The gradient of the input needs the weight, and the
    graph would keep it. So the convolution gets an input without a gradient, and `attach_gradient` records a step that
    computes the weight again.

    Nothing changes where the weight may not be there in the backward pass, because it was gathered for the call from
    several processes or from slower memory.
    """
    x = args[0] if args else None  # Nothing changes for an input that is passed by keyword.
    if x is None or not (x.requires_grad and records_plain_graph() and _computes_weight_anew(convolution)):
        return args
    detached = x.detach()
    setattr(detached, _SOURCE, x)
    return (detached, *args[1:])


def attach_gradient(convolution: nn.Conv1d, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook that belongs to `detach_from_frozen`."""
    x = getattr(args[0], _SOURCE, None) if args else None
    return output if x is None else _Gradient.apply(x, output, convolution)


def _computes_weight_anew(convolution: nn.Conv1d) -> bool:
    """Whether the weight is computed in each call, from frozen parameters that are there in the backward pass too."""
    if not is_parametrized(convolution, "weight") or convolution.padding_mode != "zeros":
        return False
    # Another pre-hook might replace the input. The private dictionary of hooks has no public reader.
    if isinstance(convolution.padding, str) or len(convolution._forward_pre_hooks) > 1:
        return False
    # ZeRO-3 marks what it gathers with `ds_id`, Accelerate what it fetches with `_hf_hook`.
    frozen = all(
        isinstance(parameter, nn.Parameter) and not parameter.requires_grad and not hasattr(parameter, "ds_id")
        for parameter in convolution.parameters()
    )
    return frozen and not any(hasattr(module, "_hf_hook") for module in convolution.modules())


class _Gradient(torch.autograd.Function):
    """The output of a convolution without a graph, with the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, convolution: nn.Conv1d) -> Tensor:
        ctx.convolution, ctx.shape = convolution, x.shape
        return output.clone()  # Not a view, so that it may be written to.

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        held = ctx.convolution
        weight = held.weight.to(gradient.dtype)
        x_gradient = conv1d_input(ctx.shape, weight, gradient, held.stride, held.padding, held.dilation, held.groups)
        return x_gradient, None, None
