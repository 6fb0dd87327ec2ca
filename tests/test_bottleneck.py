"""The written-out backward pass of what follows the first matrix of an adapter, against autograd."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from peft_elp import bottleneck
from peft_elp.adapters import ACTIVATIONS, EAdapter, Tap
from peft_elp.adapters.bottleneck import after_down

NARROW, WIDE = 4, 6


def parts(activation="gelu", with_up=True, dropped=0.0, dtype=torch.float64):
    """Activation, dropout, matrix and norm, none of them where they start."""
    torch.manual_seed(0)
    up = nn.Linear(NARROW, WIDE) if with_up else None
    norm = nn.LayerNorm(WIDE if with_up else NARROW)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    modules = [ACTIVATIONS[activation](), nn.Dropout(dropped), up, norm]
    return [module if module is None else module.to(dtype) for module in modules]


def inputs(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(2, 3, NARROW, dtype=dtype, requires_grad=True)


def formula(h, activation, dropout, up, norm, share=None):
    d = dropout(activation(h))
    y = norm(d if up is None else up(d))
    return y if share is None else share * y


def gradients(function, modules, share, dtype=torch.float64, **autocast):
    h, share = inputs(dtype), None if share is None else torch.tensor(share, dtype=dtype, requires_grad=True)
    held = [x for x in (h, share) if x is not None]
    held += [parameter for module in modules if module is not None for parameter in module.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        y = function(1 * h, *modules, share)  # Not a leaf, as it is in an adapter.
    return y, torch.autograd.grad(y.float().sin().sum() if autocast else y.sin().sum(), held)


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("with_up", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_formula(activation, with_up, share):
    modules = parts(activation, with_up)
    y, found = gradients(after_down, modules, share)
    expected_y, expected = gradients(formula, modules, share)
    assert "AfterDown" in type(y.grad_fn).__name__
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_up", [True, False])
def test_first_and_second_derivatives(with_up):
    modules = parts(with_up=with_up)
    share = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().clone().requires_grad_() for m in modules[2:] if m is not None for p in m.parameters()]

    def call(h, share, *weights):
        for parameter, value in zip(
            (p for m in modules[2:] if m is not None for p in m.parameters()), weights, strict=True
        ):
            parameter.data.copy_(value)
        return after_down(h, *modules, share).sin()

    def of_inputs(h, share):
        return call(h, share, *weights)

    assert torch.autograd.gradcheck(of_inputs, (inputs(), share))
    assert torch.autograd.gradgradcheck(of_inputs, (inputs(), share))


@pytest.mark.parametrize("with_up", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives_reach_the_parameters(activation, with_up):
    found = []
    for function in (after_down, formula):
        modules, h = parts(activation, with_up), inputs()
        (first,) = torch.autograd.grad(function(h, *modules).sin().sum(), [h], create_graph=True)
        held = [parameter for module in modules if module is not None for parameter in module.parameters()]
        found.append(torch.autograd.grad(first.square().sum(), held, allow_unused=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("with_up", [True, False])
def test_dropout_has_the_same_mask_in_both_passes(with_up):
    modules = parts("tanh", with_up, dropped=0.5)

    def call(h):
        torch.manual_seed(7)
        return after_down(h, *modules)

    assert torch.autograd.gradcheck(call, inputs())
    assert not torch.equal(call(inputs()), formula(inputs(), modules[0], nn.Dropout(0.0), *modules[2:]))
    modules[1].eval()
    assert torch.equal(after_down(inputs(), *modules), formula(inputs(), *modules))


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("with_up", [True, False])
def test_autocast(with_up, share):
    modules = parts(with_up=with_up, dtype=torch.float32)
    y, found = gradients(after_down, modules, share, torch.float32, autocast=True)
    expected_y, expected = gradients(formula, modules, share, torch.float32, autocast=True)
    assert y.dtype == expected_y.dtype
    torch.testing.assert_close(y, expected_y, rtol=2e-2, atol=2e-2)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)


def test_a_cast_without_a_graph_is_not_shared():
    modules = parts(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        after_down(inputs(torch.float32), *modules)
        modules[2](inputs(torch.float32)).float().sum().backward()
    assert modules[2].weight.grad is not None


def kept(run):
    shapes = []
    with saved_tensors_hooks(lambda x: shapes.append((tuple(x.shape), x.dtype)) or x, lambda x: x):
        run()
    return [found for found in shapes if len(found[0]) == 3 and found[0][-1] > 1]


@pytest.mark.parametrize("with_up", [True, False])
def test_the_graph_keeps_the_product_alone(with_up):
    h = ((2, 3, NARROW), torch.float64)
    assert kept(lambda: after_down(inputs(), *parts(with_up=with_up), torch.tensor(0.3))) == [h]
    with_mask = kept(lambda: after_down(inputs(), *parts(with_up=with_up, dropped=0.5)))
    assert with_mask == [h, ((2, 3, NARROW), torch.bool)]


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def other_matrix(modules):
    matrix = Doubled(NARROW, WIDE)
    matrix.load_state_dict(modules[2].state_dict())
    modules[2] = matrix.double()


def other_activation(modules):
    modules[0] = nn.Softplus()


def in_place_activation(modules):
    modules[0] = nn.SiLU(inplace=True)


def without_gain(modules):
    modules[3] = nn.LayerNorm(WIDE, elementwise_affine=False)


def other_dropout(modules):
    modules[1] = nn.Identity()


def replaced_forward(modules):
    modules[2].forward = lambda d: 2 * nn.functional.linear(d, modules[2].weight, modules[2].bias)


@pytest.mark.parametrize(
    "change",
    [other_matrix, other_activation, in_place_activation, other_dropout, without_gain, replaced_forward],
)
def test_replaced_modules_run_as_they_stand(change):
    modules = parts()
    change(modules)
    y, found = gradients(after_down, modules, 0.3)
    expected_y, expected = gradients(formula, modules, 0.3)
    assert torch.equal(y, expected_y)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("place", range(4))
def test_hooks_on_modules_run(place):
    modules, calls = parts(), []
    module = modules[place]
    handles = [
        module.register_forward_pre_hook(lambda *_: calls.append("before")),
        module.register_forward_hook(lambda *_: calls.append("after")),
        module.register_full_backward_pre_hook(lambda *_: calls.append("before backward")),
        module.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    _, hooked = gradients(after_down, modules, None)
    assert calls == ["before", "after", "before backward", "backward"]
    for handle in handles:
        handle.remove()
    y, found = gradients(after_down, modules, None)
    assert "AfterDown" in type(y.grad_fn).__name__
    torch.testing.assert_close(found, hooked, rtol=1e-10, atol=1e-12)


def test_transforms_of_torch_func():
    modules = parts()
    h = inputs().detach()
    found = torch.func.grad(lambda h: after_down(h, *modules).sin().sum())(h)
    torch.testing.assert_close(found, torch.func.grad(lambda h: formula(h, *modules).sin().sum())(h))
    adapter = EAdapter(WIDE, NARROW).double()
    lent = {name: torch.randn_like(p) for name, p in adapter.named_parameters()}
    z = torch.randn(2, 3, WIDE, dtype=torch.float64)

    def loss(lent):
        return torch.func.functional_call(adapter, lent, (z,)).sin().sum()

    plain = copy.deepcopy(adapter)
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(lent[name])
    plain(z).sin().sum().backward()
    for name, gradient in torch.func.grad(loss)(lent).items():
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad)


def test_every_activation_has_a_gradient():
    assert set(bottleneck._BACKWARD) == set(ACTIVATIONS.values())


@pytest.mark.parametrize("hooked", ["norm", "down"])
def test_hooks_on_parameters_run_once(hooked):
    tap = Tap(WIDE, NARROW, "gelu", 0.0, None)
    parameter = getattr(tap, hooked).weight
    calls = []
    parameter.register_hook(lambda gradient: calls.append(1))
    tap(torch.randn(2, 3, WIDE), torch.tensor(0.5)).sum().backward()
    assert calls == [1]


def test_frozen_parameters_get_no_gradient():
    modules = parts()
    for module in modules[2:]:
        module.requires_grad_(False)
    h, other = inputs(), inputs()
    after_down(h, *modules).sin().sum().backward()
    formula(other, *modules).sin().sum().backward()
    torch.testing.assert_close(h.grad, other.grad)
    assert all(parameter.grad is None for module in modules[2:] for parameter in module.parameters())
