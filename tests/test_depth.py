"""Layers that nothing reads do not run. Here they are broken, so that an answer shows whether they ran."""

import pytest
import torch
from backbones import ELP, NORMS, build, call, result, waveforms, with_adapters
from peft import PeftModel, get_peft_model
from torch import nn

from peft_elp import ELPConfig, MultiTaskModel, prune_taps
from peft_elp.tuner.stack import ELPStack

INPUTS = dict(zip(("input_values", "attention_mask"), waveforms(), strict=True))
FIRST = {"adapters": "L", "l_layers": [0], "train_layer_norms": False}


def layers_of(model):
    stack = next(module for module in model.modules() if isinstance(module, ELPStack))
    return [layer.base_layer for layer in stack.encoder_layers]


def break_layers(model, start):
    for layer in layers_of(model)[start:]:
        for parameter in layer.parameters():
            nn.init.constant_(parameter, torch.nan)


def adapted(head="ForSequenceClassification", family="wavlm", base=None, **adapters):
    return with_adapters(build(family, head, **base or {}), **adapters or {"default": FIRST})


@pytest.mark.parametrize(("family", "stable"), NORMS)
def test_a_training_step_is_the_same_without_the_layers_above(family, stable):
    options = {"adapters": "ELP", "l_layers": [0, 1], "l_output": "head"}
    found = []
    for watched in (True, False):
        model = adapted("ForCTC", family, {"do_stable_layer_norm": stable}, default=options).train()
        handle = layers_of(model)[-1].register_forward_hook(lambda *_: None)  # It wants to see the layer run.
        if not watched:
            handle.remove()
            break_layers(model, 2)
        waveform, mask = waveforms()
        result(model(waveform, attention_mask=mask)).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        other = found[1][name]
        assert torch.equal(gradient, other) if gradient is not None else other is None, name


@pytest.mark.parametrize("report", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("how", ["argument", "configuration", "without PEFT"])
def test_reports_make_all_layers_run(how, report):
    model = adapted()
    expected, options = call(model).logits, {report: True}
    key = report.removeprefix("output_")
    handle = layers_of(model)[-1].register_forward_hook(lambda *_: None)
    reported = call(model, **INPUTS, **options)[key]
    handle.remove()
    if how == "configuration":
        setattr(model.config, report, True)
        options = {}
    output = call(model.get_base_model() if how == "without PEFT" else model, **INPUTS, **options)
    torch.testing.assert_close(output.logits, expected)  # Attention that reports its weights may round differently.
    assert len(output[key]) == len(reported) > 2
    for found, full in zip(output[key], reported, strict=True):
        assert torch.equal(found, full)
    assert not torch.equal(output[key][-1], output[key][-2])
    if how != "configuration":
        break_layers(model, 1)
        assert torch.equal(call(model).logits, expected)  # A report leaves nothing behind.


class StateOfSecondLayer(nn.Module):
    """A user's model, which reads hidden states that its caller does not ask for."""

    def __init__(self):
        super().__init__()
        self.encoder = build("wavlm", "Model")
        self.config = self.encoder.config

    def forward(self, input_values, attention_mask=None):
        return self.encoder(input_values, attention_mask=attention_mask, output_hidden_states=True).hidden_states[2]


def test_a_users_model_that_reads_hidden_states_gets_those_of_all_layers():
    expected = call(StateOfSecondLayer(), **INPUTS)
    config = ELPConfig(**ELP | FIRST, l_output="project", modules_to_save=[])
    model = get_peft_model(StateOfSecondLayer(), config).eval()
    torch.testing.assert_close(call(model, **INPUTS), expected)


def test_a_residual_output_needs_all_layers():
    model = adapted(default=FIRST | {"l_output": "residual"})
    break_layers(model, 2)
    assert not call(model).logits.isfinite().all()


READERS = {
    "low": FIRST,
    "middle": FIRST | {"l_layers": [1]},
    "inside": FIRST | {"adapters": "EL", "l_layers": [0, 1]},
    "residual": FIRST | {"l_output": "residual"},
    "pseudo": {"adapters": "P"},
}


@pytest.mark.parametrize(
    ("names", "start"),
    [
        (["low", "low", "low"], 1),
        (["low", "middle", "inside"], 2),
        (["low", "residual", "low"], None),
        (["low", "pseudo", "low"], None),
        (["low", "__base__", "low"], None),
    ],
)
def test_a_mixed_batch_runs_to_its_highest_reader(names, start):
    model = adapted(**READERS)
    expected = call(model, **INPUTS, adapter_names=names).logits
    if start is not None:
        break_layers(model, start)
        assert torch.equal(call(model, **INPUTS, adapter_names=names).logits, expected)
    else:
        break_layers(model, 2)
        whole = call(model, **INPUTS, adapter_names=names).logits.isfinite().all(-1)
        assert whole.tolist() == [name == "low" for name in names]


@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification"])
def test_tasks_that_share_a_pass_run_to_their_highest_reader(head):
    model = adapted(head, **READERS)
    expected = {name: call(model, name).logits for name in ("low", "middle")}
    tasks = MultiTaskModel({"one": adapted(head, low=FIRST), "two": adapted(head, middle=READERS["middle"])}).eval()
    apart = call(tasks)
    break_layers(model, 2)
    break_layers(tasks.models["one"], 2)
    with torch.no_grad():
        shared = model.forward_all(["low", "middle"], **INPUTS)
    for name, logits in expected.items():
        torch.testing.assert_close(shared[name].logits, logits)
    for name, output in call(tasks).items():
        assert torch.equal(output.logits, apart[name].logits)


def test_an_exported_model_has_no_layers_above_the_last_tap():
    model = adapted()
    expected = call(model).logits
    program = torch.export.export(model, (), INPUTS, strict=False)
    used = {node.target for node in program.graph.nodes if node.op == "placeholder" and node.users}
    named = program.graph_signature.inputs_to_parameters
    assert any("encoder.base_layer.layers.0" in named.get(target, "") for target in used)
    assert not any("encoder.base_layer.layers.1" in named.get(target, "") for target in used)
    torch.testing.assert_close(program.module()(**INPUTS).logits, expected)


# prune_taps ---------------------------------------------------------------------------------------------------------

TRAINED = {"adapters": "ELP", "train_layer_norms": True}


def with_shares(*shares, **options):
    model = adapted(default=TRAINED | options)
    stack = next(module for module in model.modules() if isinstance(module, ELPStack))
    stack.elp_l["default"].layer_weights.data = torch.tensor(shares).log()
    return model, stack


@pytest.mark.parametrize(
    ("choice", "kept"),
    [({"keep": 1}, [0]), ({"keep": 2}, [0, 2]), ({"keep": [1, 0]}, [0, 1])],
)
def test_a_pruned_adapter_sums_the_kept_taps_in_proportion(choice, kept, tmp_path):
    shares = (0.5, 0.2, 0.3)
    model, stack = with_shares(*shares)
    # The plain sum with the weights of the other taps at zero, renormalised.
    stack.elp_l["default"].layer_weights.data = torch.tensor(
        [share if layer in kept else 0.0 for layer, share in enumerate(shares)]
    ).log()
    expected = call(model).logits
    stack.elp_l["default"].layer_weights.data = torch.tensor(shares).log()
    before = call(model).logits
    assert prune_taps(model, "default", "short", **choice) == kept
    assert torch.equal(call(model).logits, before)
    torch.testing.assert_close(call(model, "short").logits, expected)
    model.save_pretrained(tmp_path, selected_adapters=["short"])
    loaded = PeftModel.from_pretrained(build("wavlm", "ForSequenceClassification"), tmp_path / "short").eval()
    torch.testing.assert_close(call(loaded).logits, expected)
    saved = stack.elp_l["short"]
    assert len(saved.taps) == len(kept)
    assert saved.shares().sum().item() == pytest.approx(1)


def test_what_lies_above_the_last_kept_tap_goes_with_it():
    model, _ = with_shares(0.7, 0.2, 0.1, e_layers=[0, 1])
    prune_taps(model, "default", "short", keep=1)
    names = [name for name, _ in model.named_parameters() if ".short." in name]
    assert any("layers.0" in name for name in names)
    assert not any("layers.1" in name or "layers.2" in name for name in names)
    assert model.peft_config["short"].e_layers == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": [0, 3]}, r"Layers \[3\] have no tap. The tapped layers and their shares are 0: 0.500, 1: 0.200"),
        ({"keep": 0}, "No tap would be kept"),
        ({"keep": 1, "adapter_name": "nobody"}, "nobody"),
        ({"keep": 1, "new_name": "default"}, "There is already an adapter 'default'"),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_nothing_changes(arguments, message):
    model, _ = with_shares(0.5, 0.2, 0.3)
    before = list(model.state_dict())
    names = {"adapter_name": "default", "new_name": "short"} | arguments
    with pytest.raises(ValueError, match=message):
        prune_taps(model, **names)
    assert list(model.state_dict()) == before
    assert list(model.peft_config) == ["default"]


def test_an_adapter_without_taps_is_not_pruned():
    with pytest.raises(ValueError, match="has no L-adapter"):
        prune_taps(adapted(default={"adapters": "E"}), "default", "short", keep=1)
