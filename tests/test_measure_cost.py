"""examples/benchmarks/measure_cost.py, in a very short form, on tiny encoders."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))

import common
import measure_cost

# The heads of tiny models are not small beside their encoders.
SHORT = ["methods", "--size", "tiny", "--seconds", "0.2", "--repeats", "2"]


@pytest.mark.parametrize("family", ["wavlm", "whisper"])
def test_every_method_is_measured(family, tmp_path, capsys):
    words = ["--family", family, "--output", str(tmp_path / "cost.json")]
    measure_cost.main([*SHORT, *words])
    out = capsys.readouterr().out
    expected = [name for name in measure_cost.METHODS if family != "wavlm" or name != common.Q_AND_V]
    assert re.findall(r"^\| ([^|]+) \| [\d,]+ \|", out, flags=re.MULTILINE) == expected
    assert len({line.count("|") for line in out.splitlines() if line.startswith("|")}) == 1
    costs = {cost["method"]: cost for cost in json.loads((tmp_path / "cost.json").read_text())["costs"]}
    assert list(costs) == expected
    assert all(len(cost["step_s"]) == len(cost["inference_s"]) == 2 for cost in costs.values())
    head, half, whole = (costs[name] for name in (common.HEAD, measure_cost.HALF_L, common.L_ONLY))
    assert head["backward_gflop"] < whole["backward_gflop"]
    assert half["forward_gflop"] < whole["forward_gflop"]
    assert head["saved_mib"] < half["saved_mib"] < whole["saved_mib"]
    assert costs[common.LORA]["trained"] == pytest.approx(costs["E+L"]["trained"], rel=0.2)


@pytest.mark.parametrize(
    "options",
    [
        ["--gradient_checkpointing"],
        ["--autocast"],
        ["--dtype", "bfloat16"],
        ["--e_dim", "4", "--l_dim", "6", "--p_length", "2"],
        ["--size", "overhead", "--family", "wav2vec2"],
    ],
)
@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
def test_other_ways_to_train_are_measured(options, capsys):
    measure_cost.main([*SHORT, "--repeats", "1", "--methods", "E+L+P", "head only", *options])
    assert "| E+L+P | " in capsys.readouterr().out


def test_many_adapters_are_measured(capsys, monkeypatch):
    small = measure_cost.Wav2Vec2Config(num_hidden_layers=2, hidden_size=48, intermediate_size=64, layerdrop=0.0)
    monkeypatch.setattr(measure_cost.Wav2Vec2Config, "from_dict", lambda _: small)
    words = ["--adapters", "2", "--tasks", "2", "--batch_size", "1", "--seconds", "0.5", "--repeats", "1"]
    measure_cost.main(["adapters", *words])
    said = capsys.readouterr().out
    assert "2 tasks on 1 x 0.5 s: one pass for all" in said
    assert said.count("placing") == 2


def test_kept_bytes_are_those_of_distinct_tensors():
    linear, x = torch.nn.Linear(4, 4, bias=False), torch.randn(3, 4)
    assert measure_cost.saved_bytes(linear, lambda: linear(x)) == 3 * 4 * 4
    assert measure_cost.saved_bytes(linear, lambda: linear(x) + linear(x.view(3, 4))) == 3 * 4 * 4


def test_a_checkpoint_of_frozen_layers_keeps_nothing():
    frozen, head = torch.nn.Linear(4, 4).requires_grad_(False), torch.nn.Linear(4, 4)
    x = torch.randn(3, 4)

    def run():
        return head(torch.utils.checkpoint.checkpoint(frozen, x, use_reentrant=False))

    assert measure_cost.saved_bytes(torch.nn.Sequential(frozen, head), run) == 3 * 4 * 4
