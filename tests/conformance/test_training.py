"""What trains, and the ways to train it."""

import pytest
import torch
import transformers
from backbones import trained
from peft import PeftModel, cast_mixed_precision_params, get_peft_model, prepare_model_for_kbit_training
from steps import adapted, answer, loss_of, of_adapter, same


def test_only_the_adapter_is_trainable(peft_model, method):
    assert trained(peft_model) == set(of_adapter(peft_model, method, "default"))


def test_gradients_reach_the_whole_adapter_and_nothing_else(peft_model, model):
    loss_of(peft_model, model).backward()
    assert {n for n, p in peft_model.named_parameters() if p.grad is not None} == trained(peft_model)


def test_steps_move_the_whole_adapter_and_nothing_else(method, model):
    peft_model = adapted(method, model).train()
    tensors = dict([*peft_model.named_parameters(), *peft_model.named_buffers()])
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    optimizer = torch.optim.Adam([p for p in peft_model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        loss_of(peft_model, model).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])}
    assert moved == trained(peft_model)


def test_trained_adapter_answers_alike_when_loaded(method, model, tmp_path):
    peft_model = adapted(method, model).train()
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.01)
    loss_of(peft_model, model).backward()
    optimizer.step()
    peft_model.save_pretrained(tmp_path)
    same(answer(PeftModel.from_pretrained(model.make(), tmp_path), model), answer(peft_model.eval(), model))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # frozen convolutions
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(method, model, reentrant):
    if reentrant and isinstance(model.make(), transformers.WavLMPreTrainedModel):
        pytest.skip("WavLM itself never returns under re-entrant checkpointing")
    peft_model = adapted(method, model).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            peft_model.prepare_model_for_gradient_checkpointing(peft_model)
            peft_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        peft_model.zero_grad()
        loss_of(peft_model, model).backward()
        gradients.append({n: p.grad for n, p in peft_model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == trained(peft_model)
    for name, gradient in gradients[0].items():
        same(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)


def test_model_prepared_for_quantised_training_trains(method, model):
    base = prepare_model_for_kbit_training(
        model.make().bfloat16(), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    assert not trained(base)
    peft_model = get_peft_model(base, method.config(model)).train()
    loss_of(peft_model, model).backward()
    assert {n for n, p in peft_model.named_parameters() if p.grad is not None} == trained(peft_model)


def test_trains_under_autocast(method, model):
    peft_model = adapted(method, model).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(peft_model, model)
    loss.backward()
    assert {n for n, p in peft_model.named_parameters() if p.grad is not None} == trained(peft_model)
    assert all(torch.isfinite(p.grad).all() for p in peft_model.parameters() if p.grad is not None)


def test_base_can_be_cast_to_half_precision_for_training(method, model):
    peft_model = adapted(method, model).train()
    cast_mixed_precision_params(peft_model, torch.bfloat16)
    assert {p.dtype for p in peft_model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in peft_model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(peft_model, model)
    loss.backward()
    assert {n for n, p in peft_model.named_parameters() if p.grad is not None} == trained(peft_model)


def test_frozen_adapter_can_be_asked_for(method, model):
    peft_model = get_peft_model(model.make(), method.config(model, inference_mode=True))
    assert not trained(peft_model)


def test_training_of_an_adapter_can_be_switched(paired, method):
    paired.set_requires_grad("default", requires_grad=False)
    assert not trained(paired)
    paired.set_requires_grad(["default", "other"], requires_grad=True)
    both = set(of_adapter(paired, method, "default")) | set(of_adapter(paired, method, "other"))
    assert trained(paired) == both
