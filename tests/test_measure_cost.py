"""examples/measure_cost.py, in a very short form, on tiny encoders."""

import json
import re
import sys
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch

pytest.importorskip("psutil")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import measure_cost

# The heads of tiny models are not small beside their encoders.
pytestmark = pytest.mark.filterwarnings("ignore:modules_to_save=.* trains and saves:UserWarning")
SHORT = ["methods", "--size", "tiny", "--seconds", "0.2", "--repeats", "2"]


@pytest.mark.parametrize("family", ["wavlm", "whisper"])
def test_every_method_is_measured(family, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["--family", family, "--output", str(tmp_path / "cost.json"), "--plot", str(tmp_path / "cost.svg")]
    measure_cost.main([*SHORT, *words])
    out = capsys.readouterr().out
    left_out = {measure_cost.Q_AND_V, measure_cost.KEYS, measure_cost.EL_KEYS} if family == "wavlm" else set()
    expected = [name for name in measure_cost.METHODS if name not in left_out]
    assert re.findall(r"^\| ([^|]+) \| [\d,]+ \|", out, flags=re.MULTILINE) == expected
    costs = {cost["method"]: cost for cost in json.loads((tmp_path / "cost.json").read_text())["costs"]}
    assert list(costs) == expected
    assert "E+L+P" in (tmp_path / "cost.svg").read_text()
    assert all(len(cost["step_s"]) == len(cost["inference_s"]) == 2 for cost in costs.values())
    assert costs["head only"]["backward_gflop"] < costs["L without layer norms"]["backward_gflop"]
    half, whole = costs["L of the lower half without layer norms"], costs["L without layer norms"]
    assert half["forward_gflop"] < whole["forward_gflop"]
    assert costs["head only"]["saved_mib"] < half["saved_mib"] < whole["saved_mib"]


@pytest.mark.parametrize(
    "options",
    [
        ["--gradient_checkpointing"],
        ["--autocast"],
        ["--dtype", "bfloat16", "--padded"],
        ["--e_dim", "4", "--l_dim", "6", "--p_length", "2"],
    ],
)
@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
def test_other_ways_to_train_are_measured(options, capsys):
    measure_cost.main([*SHORT, "--methods", "E+L+P", "head only", *options])
    assert "| E+L+P | " in capsys.readouterr().out


def test_kept_bytes_are_those_of_distinct_tensors():
    linear, x = torch.nn.Linear(4, 4, bias=False), torch.randn(3, 4)
    assert measure_cost.saved_bytes(linear, lambda: linear(x)) == 3 * 4 * 4
    assert measure_cost.saved_bytes(linear, lambda: linear(x) + linear(x.view(3, 4))) == 3 * 4 * 4


def test_a_checkpoint_of_frozen_layers_keeps_nothing():
    frozen = torch.nn.Linear(4, 4).requires_grad_(False)
    head = torch.nn.Linear(4, 4)
    x = torch.randn(3, 4)

    def run():
        return head(torch.utils.checkpoint.checkpoint(frozen, x, use_reentrant=False))

    assert measure_cost.saved_bytes(torch.nn.Sequential(frozen, head), run) == 3 * 4 * 4


def test_nothing_is_kept_after_the_bytes_were_counted(monkeypatch):
    made = WeakSet()

    class Held(measure_cost.Held):
        def __init__(self, tensor):
            super().__init__(tensor)
            made.add(self)

    monkeypatch.setattr(measure_cost, "Held", Held)
    linear = torch.nn.Linear(4, 4)
    assert measure_cost.saved_bytes(linear, lambda: linear(torch.randn(3, 4)).exp().sum())
    assert not made


def test_many_adapters_are_measured(capsys):
    words = ["adapters", "--adapters", "2", "--tasks", "2", "--batch_size", "1", "--seconds", "0.5", "--repeats", "1"]
    measure_cost.main(words)
    assert "2 tasks on 1 x 0.5 s: one pass for all" in capsys.readouterr().out


def test_the_overhead_of_a_layer_is_measured(capsys):
    measure_cost.main(["overhead", "--repeats", "2"])
    rows = re.findall(r"^\| ([^|]+) \| [\d.]+ \| [+-][\d.]+ \|", capsys.readouterr().out, flags=re.MULTILINE)
    assert rows == [*measure_cost.SETTINGS, "E+L+P, disabled"]


def test_kept_bytes_of_a_compiled_step_are_those_that_its_graph_holds():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 2))
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(3, 4)
    kept = measure_cost.saved_bytes(model, lambda: compiled(x).sum())
    node: Any = compiled(x).sum().grad_fn
    while not hasattr(node, "saved_tensors"):  # the node of the whole compiled graph
        node = node.next_functions[0][0]
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held = {saved.untyped_storage().data_ptr(): saved.untyped_storage().nbytes() for saved in node.saved_tensors}
    assert kept == sum(size for address, size in held.items() if address not in weights) > 0
