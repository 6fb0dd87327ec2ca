"""Answers: their shapes, inputs and dtypes; copies of the model."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from backbones import labels_for, result
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting
from steps import adapted, answer, differ, nudged, of_adapter, same
from torch.nn.utils import parametrize


def test_adapter_changes_the_answer(method, model):
    differ(answer(adapted(method, model), model), answer(model.make(), model))


def test_inputs_may_be_positional(peft_model, model):
    first, *rest = model.inputs().items()
    if first[0] == "input_features":
        rest = [("attention_mask", None), *rest]
    with torch.no_grad():
        output = result(peft_model(first[1], *(value for _, value in rest)))
    same(output, answer(peft_model, model))


def test_answer_may_be_a_tuple(peft_model, model):
    with torch.no_grad():
        same(peft_model(**model.inputs(), return_dict=False)[0], answer(peft_model, model))


def test_hidden_states_have_the_shape_of_the_bases(method, model):
    shapes = []
    for module in (adapted(method, model), model.make()):
        output = module(**model.inputs(), output_hidden_states=True)
        states = output.encoder_hidden_states if "encoder_hidden_states" in output else output.hidden_states
        shapes.append([x.shape for x in states])
    assert shapes[0] == shapes[1]


def test_labels_give_a_loss(peft_model, model):
    if isinstance(peft_model.get_base_model(), transformers.HubertModel):
        pytest.skip("a bare encoder takes no labels")
    inputs = model.inputs()
    labels = inputs.pop("decoder_input_ids", None)
    if labels is None:
        labels = labels_for(peft_model.get_base_model(), 3, 0)
    loss = peft_model(**inputs, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_text_is_generated(peft_model, model):
    if not peft_model.get_base_model().can_generate():
        pytest.skip("the model generates nothing")
    inputs = {"input_features": model.inputs()["input_features"], "max_new_tokens": 5, "do_sample": False}
    ids = peft_model.generate(**inputs, num_beams=2)
    with peft_model.disable_adapter():
        same(peft_model.generate(**inputs), model.make().generate(**inputs))
    assert ids.shape[0] == 3
    peft_model.generate(inputs["input_features"], max_new_tokens=2)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_runs_in_half_precision_with_adapters_in_it_or_not(method, model, dtype, autocast):
    torch.manual_seed(3)
    peft_model = get_peft_model(model.make().to(dtype), method.config(model), autocast_adapter_dtype=autocast).eval()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in model.inputs().items()}
    with torch.no_grad():
        output = result(peft_model(**inputs))
    assert output.dtype == dtype
    assert torch.isfinite(output).all()


def test_moves_to_another_dtype(peft_model, model):
    before = answer(peft_model, model)
    peft_model.double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in model.inputs().items()}
    with torch.no_grad():
        same(result(peft_model(**inputs)).float(), before, atol=1e-3, rtol=1e-3)


COPIES = pytest.mark.does_not_hold("LN-Tuning", "its copies keep the base's dtype")


@pytest.mark.parametrize("autocast", [pytest.param(True, marks=COPIES), False])
def test_half_precision_adapters_are_float32_unless_told_otherwise(method, model, autocast, tmp_path):
    option = {"autocast_adapter_dtype": autocast}
    peft_model = get_peft_model(model.make().bfloat16(), method.config(model), **option)
    peft_model.add_adapter("added", method.config(model), **option)
    peft_model.save_pretrained(tmp_path)
    peft_model.load_adapter(tmp_path, adapter_name="loaded", **option)
    for name in ("default", "added", "loaded"):
        found = {p.dtype for key, p in of_adapter(peft_model, method, name).items() if method.prefix in key}
        assert found == {torch.float32 if autocast else torch.bfloat16}, name


@pytest.mark.does_not_hold("LN-Tuning", "it has no such switch")
def test_casting_of_inputs_can_be_switched_off(peft_model, model):
    expected = answer(peft_model, model)
    with disable_input_dtype_casting(peft_model):
        same(answer(peft_model, model), expected)


def test_model_can_be_copied_deeply(peft_model, model):
    expected = answer(peft_model, model)
    twin = copy.deepcopy(peft_model)
    nudged(peft_model, 9)
    same(answer(twin, model), expected)
    differ(answer(peft_model, model), expected)


def test_model_can_be_pickled(peft_model, model):
    if any(parametrize.is_parametrized(module) for module in peft_model.modules()):
        pytest.skip("PyTorch pickles no parametrised weight, here that of the convolution over positions")
    same(answer(pickle.loads(pickle.dumps(peft_model)), model), answer(peft_model, model))
    buffer = io.BytesIO()
    torch.save(peft_model, buffer)
    buffer.seek(0)
    same(answer(torch.load(buffer, weights_only=False), model), answer(peft_model, model))
