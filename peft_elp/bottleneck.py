"""What follows the first matrix of an adapter, with a backward pass that keeps nothing but the product of that matrix.

`torch.utils.checkpoint` would do the same for any function. Its own work takes longer than a small adapter, so that a
training step on a GPU would wait for Python. Here the backward pass is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .recompute import records_plain_graph

aten = torch.ops.aten

# The gradient of the input, from that of the output, the input and the output.
_BACKWARD: dict[type[nn.Module], Callable[[Tensor, Tensor, Tensor, Any], Tensor]] = {
    nn.GELU: lambda g, x, y, module: aten.gelu_backward.default(g, x, approximate=module.approximate),
    nn.ReLU: lambda g, x, y, module: aten.threshold_backward.default(g, x, 0),
    nn.LeakyReLU: lambda g, x, y, module: aten.leaky_relu_backward.default(g, x, module.negative_slope, False),
    nn.SiLU: lambda g, x, y, module: aten.silu_backward.default(g, x),
    nn.Mish: lambda g, x, y, module: aten.mish_backward.default(g, x),
    nn.Tanh: lambda g, x, y, module: aten.tanh_backward.default(g, y),
    nn.Sigmoid: lambda g, x, y, module: aten.sigmoid_backward.default(g, y),
}


def after_down(
    h: Tensor,
    activation: nn.Module,
    dropout: nn.Dropout,
    up: nn.Linear | None,
    norm: nn.LayerNorm,
    share: Tensor | None = None,
) -> Tensor:
    """`share * norm(up(dropout(activation(h))))`, where `up` and `share` may be missing.

    Where gradients are recorded, the graph keeps `h`, and one byte for each element that dropout may drop. The
    formula runs as it stands, and keeps more, where the backward pass of this module does not fit: under
    `torch.compile`, which decides itself what to keep, under `torch.func` and `torch.jit.trace`, with modules that are
    replaced or have hooks, and with parameters that are not there in the backward pass.

    Args:
        h: What the first matrix gives, `(..., bottleneck)`.
        activation: An elementwise function.
        dropout: Dropout after it.
        up: The second matrix, if there is one.
        norm: The layer norm at the end.
        share: A scalar tensor.

    Shape:
        `(..., bottleneck)` to `(..., hidden)` with `up`, else to the same.

    Examples:
        >>> up, norm = nn.Linear(4, 8), nn.LayerNorm(8)
        >>> h = torch.randn(2, 3, 4, requires_grad=True)
        >>> y = after_down(h, nn.GELU(), nn.Dropout(0.0), up, norm)
        >>> torch.equal(y, norm(up(nn.functional.gelu(h))))
        True
    """
    if not (h.requires_grad and records_plain_graph() and _fits(activation, dropout, up, norm)):
        d = dropout(activation(h))
        y = norm(d if up is None else up(d))
        return y if share is None else share * y
    # With the share inside the norm, the output of the norm need not be kept for the gradient of the share.
    weight, bias = (norm.weight, norm.bias) if share is None else (share * norm.weight, share * norm.bias)
    matrix, offset = (None, None) if up is None else (up.weight, up.bias)
    dropped = dropout.p if dropout.training else 0.0
    return _AfterDown.apply(h, matrix, offset, weight, bias, activation, dropped, norm.eps)


def _fits(activation: nn.Module, dropout: nn.Module, up: nn.Module | None, norm: nn.Module) -> bool:
    """Whether the modules are the plain ones, with parameters that are whole and here, also in the backward pass.

    ZeRO-3 and FSDP leave the parameters of other processes empty, Accelerate those on slower memory on "meta".
    """
    if not (
        _is_plain(activation, _BACKWARD) and _is_plain(dropout, (nn.Dropout,)) and _is_plain(norm, (nn.LayerNorm,))
    ):
        return False
    used = [norm.weight, norm.bias]
    if up is not None:
        if not _is_plain(up, (nn.Linear,)):
            return False
        used += [up.weight, up.bias]
    return all(isinstance(p, nn.Parameter) and p.numel() > 0 and not p.is_meta for p in used)


def _is_plain(module: nn.Module, kinds: Container[type[nn.Module]]) -> bool:
    """Whether a module is of one of these kinds, and a call does nothing but what its class says."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return type(module) in kinds and "forward" not in vars(module) and not any(hooks)


class _AfterDown(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        matrix: Tensor | None,
        offset: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        activation: nn.Module,
        dropped: float,
        eps: float,
    ) -> Tensor:
        kind = h.device.type
        ctx.kind = kind
        ctx.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.activation, ctx.dropped, ctx.eps = activation, dropped, eps
        d = activation(h)
        kept = None
        if dropped:
            d, kept = torch.native_dropout(d, dropped, True)
        u = d if matrix is None else _linear(d, matrix, offset, ctx)
        y, mean, deviation = torch.native_layer_norm(u, u.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(h, kept, matrix, offset, weight, bias, mean, deviation)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, kept, matrix, offset, weight, bias, mean, deviation = ctx.saved_tensors
        _, of_matrix, of_offset, of_weight, of_bias, *_ = ctx.needs_input_grad
        again = torch.is_grad_enabled()  # Whether the gradients are differentiated in their turn.
        scale = 1 / (1 - ctx.dropped) if ctx.dropped < 1 else 0.0
        a = ctx.activation(h)
        d = a if kept is None else aten.native_dropout_backward.default(a, kept, scale)
        u = d if matrix is None else _linear(d, matrix, offset, ctx)
        # Under autocast, the norm has another type than its input.
        normed, shape = u.to(gradient.dtype), u.shape[-1:]
        if again:  # Those of the forward pass have no graph.
            _, mean, deviation = torch.native_layer_norm(normed, shape, weight, bias, ctx.eps)
        gradient, weight_gradient, bias_gradient = aten.native_layer_norm_backward.default(
            gradient, normed, shape, mean, deviation, weight, bias, [True, of_weight, of_bias]
        )
        gradient = gradient.to(u.dtype)
        matrix_gradient = offset_gradient = None
        if matrix is not None:
            rows = gradient.flatten(0, -2)
            if of_matrix:
                matrix_gradient = (rows.T @ d.flatten(0, -2).to(rows.dtype)).to(matrix.dtype)
            if of_offset:
                offset_gradient = rows.sum(0).to(matrix.dtype)
            gradient = (gradient @ matrix.to(gradient.dtype)).to(a.dtype)
        if kept is not None:
            gradient = aten.native_dropout_backward.default(gradient, kept, scale)
        if again:  # Some functions of the table have no gradient.
            (gradient,) = torch.autograd.grad(a, h, gradient, create_graph=True)
        else:
            gradient = _BACKWARD[type(ctx.activation)](gradient, h, a, ctx.activation)
        return gradient, matrix_gradient, offset_gradient, weight_gradient, bias_gradient, None, None, None


def _linear(x: Tensor, matrix: Tensor, offset: Tensor | None, ctx: Any) -> Tensor:
    """A linear layer in the type of autocast. Its cache of casts is not used, since casts here have no graph."""
    if ctx.autocast is None:
        return linear(x, matrix, offset)
    dtype = ctx.autocast
    with torch.autocast(ctx.kind, enabled=False):
        return linear(x.to(dtype), matrix.to(dtype), None if offset is None else offset.to(dtype))
