"""What is computed again in the backward pass is not kept, and the gradients are the same."""

import copy

import pytest
import torch
from backbones import build, waveforms
from peft import get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrizations import weight_norm

from peft_elp import ELPConfig
from peft_elp.adapters.recompute import attach_gradient, detach_from_frozen


def positional(dtype=torch.float32, hooked=True):
    """A frozen convolution with weight norm, as in wav2vec 2.0."""
    torch.manual_seed(0)
    convolution = weight_norm(nn.Conv1d(8, 8, 4, padding=2, groups=2), name="weight", dim=2).to(dtype)
    if hooked:
        convolution.register_forward_pre_hook(detach_from_frozen)
        convolution.register_forward_hook(attach_gradient)
    return convolution.requires_grad_(False)


def frames(dtype=torch.float32):
    return torch.randn(2, 8, 6, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


def kept_shapes(run):
    """The shapes of the tensors that a graph keeps."""
    shapes = []
    with saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
        run()
    return shapes


WEIGHT = (8, 4, 4)


def gradient(convolution, x):
    y = convolution(x)
    y.sin().sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"dilation": 2}])
def test_the_gradient_is_that_of_the_plain_convolution(settings):
    hooked, plain = positional(torch.float64), positional(torch.float64, hooked=False)
    for convolution in (hooked, plain):
        vars(convolution).update({name: (value,) for name, value in settings.items()})
    output, found = gradient(hooked, frames(torch.float64))
    expected_output, expected = gradient(plain, frames(torch.float64))
    assert torch.equal(output, expected_output)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(hooked, frames(torch.float64))
    assert torch.autograd.gradgradcheck(lambda x: hooked(x).sin(), frames(torch.float64))


def test_the_weight_is_not_kept():
    assert WEIGHT in kept_shapes(lambda: positional(hooked=False)(frames()))
    assert kept_shapes(lambda: positional()(frames())) == []


def test_an_input_by_keyword_has_its_gradient():
    x, other = frames(), frames()
    positional()(input=x).sum().backward()
    positional(hooked=False)(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_the_output_may_be_written_to():
    x = frames()
    positional()(x).mul_(2).sum().backward()
    other = frames()
    positional(hooked=False)(other).mul_(2).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_autocast():
    found = []
    for hooked in (True, False):
        x = frames()
        with torch.autocast("cpu", torch.bfloat16):
            y = positional(hooked=hooked)(x)
        assert y.dtype == torch.bfloat16
        y.float().sin().sum().backward()
        found.append((y, x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=2e-2)


def trained():
    convolution = positional()
    convolution.parametrizations.weight.original0.requires_grad_()
    return convolution


def changed_by_another_hook():
    convolution = positional()
    convolution.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return convolution


def fetched():
    convolution = positional()
    convolution.parametrizations.weight._hf_hook = "of accelerate"
    return convolution


def gathered():
    convolution = positional()
    convolution.parametrizations.weight.original1.ds_id = 3
    return convolution


@pytest.mark.parametrize("make", [trained, changed_by_another_hook, fetched, gathered])
def test_the_plain_convolution_runs_where_the_weight_may_be_gone(make):
    convolution = make()
    assert WEIGHT in kept_shapes(lambda: convolution(frames()))
    x = frames()
    convolution(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_transforms_of_torch_func():
    convolution, plain = positional(), positional(hooked=False)
    x = frames().detach()
    found = torch.func.grad(lambda x: convolution(x).sin().sum())(x)
    torch.testing.assert_close(found, torch.func.grad(lambda x: plain(x).sin().sum())(x))
    lent = {name: parameter.clone() for name, parameter in convolution.named_parameters()}
    y = torch.func.functional_call(convolution, lent, (frames(),))
    assert y.grad_fn.name() == "ConvolutionBackward0"


def test_a_traced_convolution_holds_no_python():
    traced = torch.jit.trace(positional(), frames())
    assert "PythonOp" not in str(traced.inlined_graph)
    assert torch.equal(traced(frames()), positional(hooked=False)(frames()))


def test_pseudo_features_have_the_same_gradient_without_a_kept_weight():
    model = get_peft_model(build("wav2vec2", "ForSequenceClassification"), ELPConfig(adapters="P", p_length=2)).train()
    waveform, mask = waveforms()
    other = copy.deepcopy(model)
    (hooked,) = (module for module in other.modules() if detach_from_frozen in module._forward_pre_hooks.values())
    weight = tuple(hooked.weight.shape)
    hooked._forward_pre_hooks.clear()
    grads = []
    for which, expected in ((model, False), (other, True)):
        torch.manual_seed(0)
        shapes = kept_shapes(lambda which=which: which(waveform, attention_mask=mask).logits)
        assert (weight in shapes) is expected
        torch.manual_seed(0)
        which(waveform, attention_mask=mask).logits.square().sum().backward()
        grads.append([parameter.grad for parameter in which.parameters() if parameter.requires_grad])
    torch.testing.assert_close(grads[0], grads[1])


def test_unload_takes_the_hooks_off():
    base = build("wav2vec2", "ForSequenceClassification")
    model = get_peft_model(base, ELPConfig(adapters="P"))
    unloaded = model.unload()
    held = [hook for m in unloaded.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not {detach_from_frozen, attach_gradient} & {*held}
