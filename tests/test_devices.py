"""Adapters in models whose weights are copied, spread over devices, kept elsewhere or quantised while they run."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from backbones import adapted, answer, build, result, waveforms
from peft import PeftModel
from torch import nn

from peft_elp.tuner.stack import ELPStack

ADAPTERS, HEAD = ("E", "L", "P", "ELP"), "ForSequenceClassification"


def replica(model):
    """A copy as DataParallel makes it on each device: with tensors in place of parameters, which autograd tracks."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            copied._modules[name] = copies.get(child)
        for name, parameter in module._parameters.items():
            vars(copied)[name] = None if parameter is None else parameter.clone()
        copied._parameters.clear()
    return copies[model]


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_replicas_of_data_parallel_compute_what_the_model_does(adapters):
    model = adapted(HEAD, "hubert", adapters=adapters).train()
    waveform, mask = waveforms((2000, 1300, 900, 1700))

    def gradients(outputs):
        outputs.square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    whole = result(model(waveform, attention_mask=mask))
    halves = [result(replica(model)(waveform[rows], attention_mask=mask[rows])) for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(torch.cat(halves), whole)
    expected, found = gradients(whole), gradients(torch.cat(halves))
    assert found.keys() == expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_layers_may_be_on_several_devices(adapters):
    # The meta device stands for a second one. What is on it has shapes, and refuses to meet tensors of the first one.
    base = build("hubert", HEAD)
    model = adapted(base, adapters=adapters)
    encoder = base.hubert.encoder
    assert isinstance(encoder, ELPStack)
    encoder.elp_l.to("meta")  # It is empty if there is no L-adapter.
    for module in [*list(encoder.layers)[1:], base.projector, base.classifier]:
        module.to("meta")
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (
                [x.to("meta") for x in args],
                {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()},
            ),
            with_kwargs=True,
        )
    waveform, _ = waveforms()
    assert model(waveform).logits.shape == (3, 4)
    assert model(waveform).logits.is_meta


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter in the checkpoint to a meta parameter")
def test_a_base_whose_weights_are_kept_elsewhere_takes_adapters(where, adapters, tmp_path):
    def base():
        model = build("hubert", HEAD)
        if where == "cpu":
            return cpu_offload(model, execution_device="cpu") or model
        return disk_offload(model, tmp_path / "weights", execution_device="cpu") or model

    trained = adapted(HEAD, "hubert", adapters=adapters)
    trained.save_pretrained(tmp_path / "adapter")
    placed = adapted(base(), adapters=adapters)
    assert not any(p.is_meta for p in placed.parameters() if p.requires_grad)
    for model in (placed, PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()):
        assert torch.equal(answer(model), answer(trained))
        assert torch.equal(answer(model.unload()), answer(build("hubert", HEAD)))


def of_torch(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def of_torchao(model):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


@pytest.mark.parametrize("quantise", [of_torch, of_torchao])
@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")
def test_a_model_that_is_quantised_for_the_cpu_answers_as_before(adapters, quantise):
    model = adapted(HEAD, "hubert", adapters=adapters)
    small = quantise(copy.deepcopy(model))
    assert (
        sum(isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter for module in small.modules()) == 0
    )
    scale = answer(model).abs().max()
    torch.testing.assert_close(answer(small) / scale, answer(model) / scale, rtol=0, atol=0.05)
    assert not torch.equal(answer(small), answer(model))
