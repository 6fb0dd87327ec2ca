import pytest
import torch
from torch import nn

from peft_elp.adapters import ACTIVATIONS, EAdapter, LAdapter, PAdapter, TapSum


def test_e_adapter_is_its_formula():
    torch.manual_seed(0)
    adapter = EAdapter(hidden_size=6, bottleneck_size=4, init_std=None)
    nn.init.normal_(adapter.norm.weight)
    nn.init.normal_(adapter.norm.bias)
    z = torch.randn(2, 5, 6)
    down = torch.einsum("btd,rd->btr", z, adapter.down.weight) + adapter.down.bias
    bottleneck = down * 0.5 * (1 + torch.erf(down / 2**0.5))
    up = torch.einsum("btr,dr->btd", bottleneck, adapter.up.weight) + adapter.up.bias
    centred = up - up.mean(-1, keepdim=True)
    norm = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * adapter.norm.weight + adapter.norm.bias
    torch.testing.assert_close(adapter(z), z + norm)


def test_a_fresh_e_adapter_is_nearly_the_identity():
    torch.manual_seed(0)
    z = torch.randn(2, 5, 768)
    change = EAdapter(hidden_size=768)(z) - z
    assert 0 < change.norm() / z.norm() < 0.1  # PyTorch's own initialisation gives 1


def test_l_adapter_is_its_formula_and_starts_uniform():
    torch.manual_seed(0)
    adapter = LAdapter(hidden_size=6, num_taps=3, tap_size=4, init_std=None)
    torch.testing.assert_close(adapter.layer_weights, torch.full((3,), 1 / 3))
    nn.init.normal_(adapter.layer_weights)
    layers = [torch.randn(2, 5, 6) for _ in range(3)]
    weights = adapter.layer_weights.exp() / adapter.layer_weights.exp().sum()
    expected = torch.zeros(2, 5, 4)
    for weight, tap, x in zip(weights, adapter.taps, layers, strict=True):
        y = nn.functional.gelu(x @ tap.down.weight.T + tap.down.bias)
        expected = (
            expected + weight * (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        )
    torch.testing.assert_close(adapter(layers), expected)


def test_a_tap_with_input_norm_reads_what_a_layer_norm_without_parameters_gives():
    torch.manual_seed(0)
    plain, normed = (LAdapter(hidden_size=6, num_taps=2, tap_size=4, input_norm=on) for on in (False, True))
    normed.load_state_dict(plain.state_dict())  # no tensor more
    layers = [torch.randn(2, 5, 6) * 9 + 100 for _ in range(2)]
    centred = [x - x.mean(-1, keepdim=True) for x in layers]
    inputs = [x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() for x in centred]
    torch.testing.assert_close(normed(layers), plain(inputs), rtol=1e-4, atol=1e-5)
    assert (normed(layers) - plain(layers)).abs().max() > 1e-3


def kept(run):
    """The widths of the frames, 2 x 5 of them, that a call keeps for its backward pass."""
    widths = []

    def pack(tensor):
        if tensor.numel() > 30:  # no statistics of norms, weights or biases
            widths.append(tensor.numel() // 10)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sorted(widths)


def test_a_training_step_keeps_the_input_and_the_bottleneck_only():
    z = torch.randn(2, 5, 6)
    assert kept(lambda: EAdapter(hidden_size=6, bottleneck_size=4)(z)) == [4, 6]
    tap = LAdapter(hidden_size=6, num_taps=1, tap_size=4).taps[0]
    assert kept(lambda: tap(z, torch.ones(()))) == [4, 6]
    assert kept(lambda: tap(z, torch.ones(()), True)) == [6]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("part", ["E", "tap", "tap with input norm", "tap that keeps its input only"])
def test_what_is_computed_again_has_the_gradients_of_the_formula(part, dropout):
    torch.manual_seed(0)
    if part == "E":
        adapter = EAdapter(hidden_size=6, bottleneck_size=4, dropout=dropout, init_std=None)
    else:
        options = {"dropout": dropout, "init_std": None, "input_norm": "norm" in part}
        adapter = LAdapter(hidden_size=6, num_taps=1, tap_size=4, **options).taps[0]
    adapter.double()
    x, share = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)

    def formula(x, share, *parameters):
        values = dict(zip(dict(adapter.named_parameters()), parameters, strict=True))
        torch.manual_seed(1)
        inside = nn.functional.layer_norm(x, (6,)) if "norm" in part else x
        h = nn.functional.linear(inside, values["down.weight"], values["down.bias"])
        h = nn.functional.dropout(nn.functional.gelu(h), dropout)
        if part == "E":
            h = nn.functional.linear(h, values["up.weight"], values["up.bias"])
        y = nn.functional.layer_norm(h, h.shape[-1:], values["norm.weight"], values["norm.bias"])
        return x + y if part == "E" else share * y

    def module(x, share):
        torch.manual_seed(1)
        return adapter(x) if part == "E" else adapter(x, share, "input only" in part)

    parameters = list(adapter.parameters())
    x, share = x.requires_grad_(), share.requires_grad_()
    output, expected = module(x, share), formula(x, share, *parameters)
    assert torch.equal(output, expected)
    inputs = [x, *([] if part == "E" else [share]), *parameters]
    upstream = torch.randn_like(output)
    for found, plain in zip(
        torch.autograd.grad(output, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    if not dropout:
        assert torch.autograd.gradcheck(module, [x, share], fast_mode=True)
        assert torch.autograd.gradgradcheck(module, [x, share], fast_mode=True)


def test_borrowed_weights_and_transforms_have_gradients_too():
    adapter, z = EAdapter(hidden_size=6, bottleneck_size=4, init_std=None), torch.randn(2, 5, 6)
    others = {name: torch.randn_like(value).requires_grad_() for name, value in adapter.named_parameters()}

    def loss(values):
        return torch.func.functional_call(adapter, values, (z,)).square().sum()

    found = torch.func.grad(loss)({name: value.detach() for name, value in others.items()})
    borrowed = torch.autograd.grad(loss(others), list(others.values()))
    adapter.load_state_dict(others)
    own = torch.autograd.grad(adapter(z).square().sum(), list(adapter.parameters()))
    for name, one, other in zip(others, borrowed, own, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(found[name], other)


def test_a_missing_tap_is_noticed():
    adapter = LAdapter(hidden_size=6, num_taps=3, tap_size=4)
    taps = TapSum(adapter)
    taps.add(0, torch.zeros(1, 2, 6))
    taps.add(2, torch.zeros(1, 2, 6))
    with pytest.raises(RuntimeError, match=r"3 taps was given taps \[0, 2\].*layerdrop at 0"):
        taps.result()


def test_a_residual_output_starts_at_zero():
    adapter = LAdapter(hidden_size=6, num_taps=2, tap_size=4, output="residual")
    assert adapter.residual
    torch.testing.assert_close(adapter([torch.randn(1, 2, 6)] * 2), torch.zeros(1, 2, 6))


@pytest.mark.parametrize("position", ["append", "prepend"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, None])
def test_pseudo_features_join_each_utterance_and_leave_again(position, dtype):
    torch.manual_seed(0)
    adapter = PAdapter(hidden_size=2, length=2, position=position)
    x, lengths = torch.randn(3, 5, 2), [5, 3, 0]
    mask = None if dtype is None else (torch.arange(5) < torch.tensor(lengths)[:, None]).to(dtype)
    joined, joined_mask, real = adapter(x, mask)
    assert joined.shape == (3, 7, 2)
    torch.testing.assert_close(real.of(joined), x)
    for row, length in enumerate(lengths):
        start = 0 if position == "prepend" else 5 if mask is None else length
        torch.testing.assert_close(joined[row, start : start + 2], adapter.rows.detach())
        if mask is not None:
            assert joined_mask is not None
            assert joined_mask.dtype == dtype
            assert joined_mask[row].tolist() == [1] * (length + 2) + [0] * (5 - length)


def test_pseudo_features_start_at_their_standard_deviation():
    torch.manual_seed(0)
    rows = PAdapter(hidden_size=768, length=64, init_std=0.02).rows
    assert rows.std().item() == pytest.approx(0.02, rel=0.05)
    assert rows.mean().item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EAdapter(8, bottleneck_size=0), "bottleneck_size of 1 or more, got 0"),
        (lambda: LAdapter(8, num_taps=0), "num_taps of 1 or more, got 0"),
        (lambda: LAdapter(8, num_taps=2, tap_size=-1), "tap_size of 1 or more, got -1"),
        (lambda: LAdapter(8, num_taps=2, output="sum"), "'taps', 'project' or 'residual', got 'sum'"),
        (lambda: PAdapter(8, length=0), "length of 1 or more, got 0"),
        (lambda: PAdapter(8, position="middle"), "'append' or 'prepend', got 'middle'"),
        (lambda: EAdapter(8, 4, activation="swish"), "Unknown activation 'swish'; known are gelu"),
    ],
)
def test_a_bad_size_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_runs(activation):
    assert EAdapter(4, 2, activation=activation)(torch.ones(1, 2, 4)).isfinite().all()
