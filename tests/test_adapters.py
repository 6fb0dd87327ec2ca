import pytest
import torch
from torch import nn

from peft_elp.adapters import ACTIVATIONS, EAdapter, LAdapter, PAdapter, TapSum

ACTIVATION_FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x * (x > 0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "silu": lambda x: x / (1 + (-x).exp()),
    "mish": lambda x: x * torch.tanh(torch.log(1 + x.exp())),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}


def shaken(adapter):
    """The adapter in double precision, with no parameter where it starts."""
    torch.manual_seed(0)
    for parameter in adapter.double().parameters():
        nn.init.normal_(parameter)
    return adapter


def e_adapter(**options):
    return shaken(EAdapter(hidden_size=6, bottleneck_size=4, **options))


def l_adapter(**options):
    return shaken(LAdapter(hidden_size=6, num_taps=2, tap_size=4, **options))


def hidden_states(*batch):
    return torch.randn(*batch, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normed(x, norm=None):
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y if norm is None else y * norm.weight + norm.bias


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_e_adapter_is_its_formula(activation):
    adapter, z = e_adapter(activation=activation), hidden_states()
    down = torch.einsum("btd,rd->btr", z, adapter.down.weight) + adapter.down.bias
    bottleneck = ACTIVATION_FORMULAS[activation](down)
    up = torch.einsum("btr,dr->btd", bottleneck, adapter.up.weight) + adapter.up.bias
    torch.testing.assert_close(adapter(z), z + normed(up, adapter.norm))


@pytest.mark.parametrize("input_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_l_adapter_is_its_formula(activation, input_norm):
    adapter, layers = l_adapter(activation=activation, input_norm=input_norm), hidden_states(2) * 3 + 1
    layer_weights = adapter.layer_weights.exp() / adapter.layer_weights.exp().sum()
    expected = 0
    for weight, tap, x in zip(layer_weights, adapter.taps, layers, strict=True):
        down = torch.einsum("btd,rd->btr", normed(x) if input_norm else x, tap.down.weight) + tap.down.bias
        expected = expected + weight * normed(ACTIVATION_FORMULAS[activation](down), tap.norm)
    torch.testing.assert_close(adapter(layers), expected)


def test_an_l_adapter_without_a_matrix_sums_the_normalised_layers():
    adapter, layers = shaken(LAdapter(hidden_size=6, num_taps=2, tap_size=0)), hidden_states(2) * 3 + 1
    layer_weights = adapter.layer_weights.exp() / adapter.layer_weights.exp().sum()
    torch.testing.assert_close(adapter(layers), torch.einsum("lbtd,l->btd", normed(layers), layer_weights))
    assert [name for name, _ in adapter.named_parameters()] == ["layer_weights"]


def test_a_tap_alone_has_no_layer_weight():
    tap, x = l_adapter().taps[0], hidden_states()
    torch.testing.assert_close(tap(x), tap(x, torch.tensor(0.5)) * 2)


def test_the_names_of_tensors_are_those_of_saved_adapters():
    linear = {"weight", "bias"}
    e = {f"{part}.{name}" for part in ("down", "up", "norm") for name in linear}
    taps = {f"taps.{tap}.{part}.{name}" for tap in range(2) for part in ("down", "norm") for name in linear}
    assert {*EAdapter(6, 4).state_dict()} == e
    assert {*l_adapter(input_norm=True).state_dict()} == taps | {"layer_weights"}
    assert {*l_adapter(output="residual").state_dict()} == taps | {"layer_weights", "output.weight", "output.bias"}
    assert {*PAdapter(6).state_dict()} == {"rows"}


def test_starts():
    torch.manual_seed(0)
    z = torch.randn(2, 5, 768)
    change = EAdapter(hidden_size=768)(z) - z
    assert 0 < change.norm() / z.norm() < 0.1  # nearly the identity; PyTorch's own initialisation gives 1
    torch.testing.assert_close(LAdapter(hidden_size=6, num_taps=3).shares(), torch.full((3,), 1 / 3))
    residual = LAdapter(hidden_size=6, num_taps=2, tap_size=4, output="residual")
    assert residual.residual
    torch.testing.assert_close(residual([torch.randn(1, 2, 6)] * 2), torch.zeros(1, 2, 6))
    rows = PAdapter(hidden_size=768, length=64, init_std=0.02).rows
    assert rows.std().item() == pytest.approx(0.02, rel=0.05)
    assert rows.mean().item() == pytest.approx(0, abs=1e-3)


def test_dropout_acts_in_training_alone():
    for adapter, x in ((e_adapter(dropout=0.5), hidden_states()), (l_adapter(dropout=0.5), hidden_states(2))):
        assert not torch.equal(adapter(x), adapter(x))
        assert torch.equal(adapter.eval()(x), adapter(x))


def frames_kept(run):
    """The widths of the hidden states, 2 x 5 frames, that a call keeps for its backward pass."""
    widths = []

    def pack(tensor):
        if tensor.numel() > 30:  # no statistics of norms, weights or biases
            widths.append(tensor.numel() // 10)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sorted(widths)


def tap_sum(adapter, layers, keep_inputs_only=True):
    taps = TapSum(adapter, keep_inputs_only)
    for tap, x in enumerate(layers):
        taps.add(tap, x)
    return taps.result()


def test_what_a_training_step_keeps():
    adapter, layers = l_adapter(), hidden_states(2)
    assert frames_kept(lambda: e_adapter()(hidden_states())) == [4, 4, 6, 6]
    assert frames_kept(lambda: adapter(layers)) == [4] * 4 + [6] * 2  # not the outputs of the taps
    assert frames_kept(lambda: tap_sum(adapter, layers)) == [6] * 2


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"input_norm": True}], ids=str)
def test_taps_that_keep_their_inputs_only_have_the_same_gradients(options):
    adapter, found = l_adapter(**options), []
    for keep_inputs_only in (False, True):
        torch.manual_seed(2)
        layers = hidden_states(2).requires_grad_()
        y = tap_sum(adapter, layers, keep_inputs_only)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [layers, *adapter.parameters()])])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_a_missing_tap_is_noticed():
    adapter = LAdapter(hidden_size=6, num_taps=3, tap_size=4)
    taps = TapSum(adapter)
    taps.add(0, torch.zeros(1, 2, 6))
    taps.add(2, torch.zeros(1, 2, 6))
    with pytest.raises(
        RuntimeError, match=r"each of its 3 layers once per call, but it read \[0, 2\].*layerdrop at 0"
    ):
        taps.result()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EAdapter(8, bottleneck_size=0), "^bottleneck_size must be at least 1, got 0.$"),
        (lambda: LAdapter(8, num_taps=0), "^num_taps must be at least 1, got 0.$"),
        (lambda: LAdapter(8, num_taps=2, tap_size=-1), "^tap_size must be at least 0, got -1.$"),
        (lambda: LAdapter(8, num_taps=2, output="sum"), "^output must be one of 'taps', .*, got 'sum'.$"),
        (lambda: PAdapter(8, length=0), "^length must be at least 1, got 0.$"),
        (lambda: PAdapter(8, position="middle"), "^position must be one of 'append', 'prepend', got 'middle'.$"),
        (lambda: EAdapter(8, 4, activation="swish"), "^activation must be one of 'gelu', .*, got 'swish'.$"),
    ],
)
def test_a_bad_setting_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
