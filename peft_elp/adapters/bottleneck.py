"""What follows the first matrix of an adapter. The backward pass recomputes it from the product of that matrix.

`torch.utils.checkpoint` does the same for any function, but its overhead in Python exceeds the time of a small adapter
on a GPU. So the backward pass is written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .recompute import records_plain_graph

aten = torch.ops.aten

# The derivative of each activation y = f(x): maps the gradient of y, x, y and the module to the gradient of x.
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

    The graph keeps `h`, and for dropout a mask of one byte per element. Autograd takes over, and keeps more, where
    this backward pass would be wrong: under `torch.compile`, `torch.func` and `torch.jit.trace`, with modules that
    were replaced or have hooks, and with parameters that are not there in the backward pass.

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
    norm_weight, norm_bias = (norm.weight, norm.bias) if share is None else (share * norm.weight, share * norm.bias)
    up_weight, up_bias = (None, None) if up is None else (up.weight, up.bias)
    p = dropout.p if dropout.training else 0.0
    return _AfterDown.apply(h, up_weight, up_bias, norm_weight, norm_bias, activation, p, norm.eps)


def _fits(activation: nn.Module, dropout: nn.Module, up: nn.Module | None, norm: nn.Module) -> bool:
    """Whether the modules are the plain ones, with parameters that are whole and here, also in the backward pass.

    ZeRO-3 and FSDP leave the parameters of other processes empty, Accelerate those on slower memory on "meta".
    """
    modules = [module for module in (activation, dropout, up, norm) if module is not None]
    return (
        type(activation) in _BACKWARD
        and not getattr(activation, "inplace", False)  # It would overwrite what the graph keeps.
        and type(dropout) is nn.Dropout
        and (up is None or type(up) is nn.Linear)
        and type(norm) is nn.LayerNorm
        and not any(_is_changed(module) for module in modules)
        and all(_is_here(p) for module in modules[2:] for p in (module.weight, module.bias))
    )


def _is_changed(module: nn.Module) -> bool:
    """Whether a call does more than the class of the module says."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return any(hooks) or "forward" in vars(module)


def _is_here(parameter: Any) -> bool:
    return isinstance(parameter, nn.Parameter) and parameter.numel() > 0 and not parameter.is_meta


class _AfterDown(torch.autograd.Function):
    """`after_down` with plain modules, of shape `(..., bottleneck)` to `(..., hidden)`.

    Saves `h`, the mask of dropout, the parameters, and the mean and the reciprocal standard deviation of the norm.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        up_weight: Tensor | None,
        up_bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        activation: nn.Module,
        p: float,
        eps: float,
    ) -> Tensor:
        ctx.device_type = h.device.type
        autocast = torch.is_autocast_enabled(ctx.device_type)
        ctx.autocast_dtype = torch.get_autocast_dtype(ctx.device_type) if autocast else None
        ctx.activation, ctx.p, ctx.eps = activation, p, eps
        d, mask = activation(h), None
        if p:
            d, mask = torch.native_dropout(d, p, True)
        u = d if up_weight is None else _linear(d, up_weight, up_bias, ctx)
        y, mean, rstd = torch.native_layer_norm(u, u.shape[-1:], norm_weight, norm_bias, eps)
        ctx.save_for_backward(h, mask, up_weight, up_bias, norm_weight, norm_bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # PyTorch has *grads
        h, mask, up_weight, up_bias, norm_weight, norm_bias, mean, rstd = ctx.saved_tensors
        _, needs_up_weight, needs_up_bias, needs_norm_weight, needs_norm_bias, *_ = ctx.needs_input_grad
        create_graph = torch.is_grad_enabled()
        scale = 1 / (1 - ctx.p) if ctx.p < 1 else 0.0
        a = ctx.activation(h)
        d = a if mask is None else aten.native_dropout_backward.default(a, mask, scale)
        u = d if up_weight is None else _linear(d, up_weight, up_bias, ctx)
        # Under autocast, the output of the norm has another dtype than its input.
        normed, shape = u.to(grad.dtype), u.shape[-1:]
        if create_graph:  # Those of the forward pass have no graph.
            _, mean, rstd = torch.native_layer_norm(normed, shape, norm_weight, norm_bias, ctx.eps)
        grad, norm_weight_grad, norm_bias_grad = aten.native_layer_norm_backward.default(
            grad, normed, shape, mean, rstd, norm_weight, norm_bias, [True, needs_norm_weight, needs_norm_bias]
        )
        grad = grad.to(u.dtype)
        up_weight_grad = up_bias_grad = None
        if up_weight is not None:
            rows = grad.flatten(0, -2)
            if needs_up_weight:
                up_weight_grad = (rows.T @ d.flatten(0, -2).to(rows.dtype)).to(up_weight.dtype)
            if needs_up_bias:
                up_bias_grad = rows.sum(0).to(up_weight.dtype)
            grad = (grad @ up_weight.to(grad.dtype)).to(a.dtype)
        if mask is not None:
            grad = aten.native_dropout_backward.default(grad, mask, scale)
        if create_graph:  # Some functions in _BACKWARD have no derivative.
            (grad,) = torch.autograd.grad(a, h, grad, create_graph=True)
        else:
            grad = _BACKWARD[type(ctx.activation)](grad, h, a, ctx.activation)
        return grad, up_weight_grad, up_bias_grad, norm_weight_grad, norm_bias_grad, None, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, ctx: Any) -> Tensor:
    """A linear layer in the dtype of autocast.

    Autocast is switched off inside, since it would keep the cast weight in its cache. That copy has no graph, and the
    next layer that uses the weight would get no gradient.
    """
    dtype = ctx.autocast_dtype
    if dtype is None:
        return linear(x, weight, bias)
    with torch.autocast(ctx.device_type, enabled=False):
        return linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
