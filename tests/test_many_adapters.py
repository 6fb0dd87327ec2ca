"""Several adapters on one backbone: averages of them, and all of their answers from one pass."""

from typing import Any

import pytest
import torch
from backbones import ELP, TwoEncoders, answer, build, labels_for, result, waveforms, with_adapters
from peft import get_peft_model, get_peft_model_state_dict

from peft_elp import ELPConfig, MultiTaskModel
from peft_elp.tuner.stack import ELPStack


def adapted(head="ForCTC", family="wavlm", base=None, **adapters):
    return with_adapters(build(family, head, **base or {}), **adapters)


def tensors(model, name):
    return get_peft_model_state_dict(model, adapter_name=name)


# Averages -----------------------------------------------------------------------------------------------------------


def test_an_average_is_the_weighted_sum_of_all_tensors_the_heads_included():
    model = adapted(one={}, two={"e_dropout": 0.1})
    model.add_weighted_adapter(["one", "two"], [0.25, 0.75], "soup")
    one, two, soup = (tensors(model, name) for name in ("one", "two", "soup"))
    assert soup.keys() == one.keys() == two.keys()
    assert any("lm_head" in name for name in soup)
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, 0.25 * one[name] + 0.75 * two[name])
    assert model.active_adapters == ["two"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".soup." in n)
    model.set_adapter("soup")
    model(waveforms()[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["one", "other"], [0.5, 0.5], "soup"), "configured differently: e_dim is 8 and 4"),
        ((["one", "third"], [0.5, 0.5], "soup"), r"no adapter 'third'; the model has 'one', 'other', 'two'"),
        ((["one", "two"], [1.0, 1.0], "soup"), r"weights that sum to 1, got \[1.0, 1.0\]"),
        ((["one", "two"], [float("nan"), 1.0], "soup"), r"one finite weight for each adapter.*got \[nan, 1.0\]"),
        ((["one", "two"], [float("inf"), float("-inf")], "soup"), r"finite weight.*got \[inf, -inf\]"),
        ((["one", "two"], [1.0], "soup"), r"one finite weight for each adapter.*got \[1.0\]"),
        ((["one", "two"], [0.5, 0.5], "one"), "There is already an adapter 'one'"),
        ((["one", "two"], [0.5, 0.5], "soup", "svd"), "combination_type='svd' combines low-rank factors"),
        ((["one", "two"], [0.5, 0.5], "norm"), "cannot be named 'norm'"),
    ],
)
def test_what_cannot_be_averaged_is_refused(arguments, message):
    model = adapted(one={}, two={}, other={"e_dim": 4})
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.state_dict()) == before
    assert list(model.peft_config) == ["one", "two", "other"]


def test_an_average_is_as_precise_as_what_it_averages():
    model = get_peft_model(build().bfloat16(), ELPConfig(**ELP), adapter_name="one")
    model.add_adapter("two", ELPConfig(**ELP))
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "soup")
    one, soup = tensors(model, "one"), tensors(model, "soup")
    assert {name: tensor.dtype for name, tensor in soup.items()} == {name: t.dtype for name, t in one.items()}
    assert {tensor.dtype for tensor in soup.values()} == {
        torch.float32,
        torch.bfloat16,
    }  # of adapters, and of the head


# Many tasks, one pass -----------------------------------------------------------------------------------------------

ALONE = {"adapters": "L", "train_layer_norms": False}
READERS = {
    "one": ALONE,
    "two": ALONE | {"l_dim": 6, "l_layers": [0, 2], "head_config": {"num_labels": 7}},
    "rest": ALONE | {"l_output": "residual"},
}


def calls_of(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(module))
    return calls


def layer_calls(model):
    stack = next(module for module in model.modules() if isinstance(module, ELPStack))
    return calls_of(stack.encoder_layers[1].base_layer)


@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification", "ForXVector"])
@pytest.mark.parametrize(("family", "stable"), [("wav2vec2", False), ("wavlm", False), ("wavlm", True)])
def test_all_tasks_answer_from_one_pass_as_each_does_alone(family, stable, head):
    readers = (
        READERS if head == "ForSequenceClassification" else {n: o | {"head_config": None} for n, o in READERS.items()}
    )
    model = adapted(head, family, base={"do_stable_layer_norm": stable}, **readers, active={})
    waveform, mask = waveforms()
    expected = {name: answer(model, name) for name in readers}
    before = answer(model, "active")
    labels = {"two": labels_for(model.base_model.model, 3, 0)}

    layers, cnn = layer_calls(model), calls_of(model.base_model.model.base_model.feature_extractor.conv_layers[0])
    outputs = model.forward_all(list(readers), waveform, attention_mask=mask, labels=labels)
    assert list(outputs) == list(readers)
    for name, output in outputs.items():
        torch.testing.assert_close(result(output), expected[name])
        assert (output.loss is not None) == (name == "two")
    assert len(layers) == len(cnn) == 1
    assert torch.equal(answer(model), before)


def test_tasks_train_together_in_one_pass():
    model = adapted("ForSequenceClassification", **READERS).train()
    model.set_requires_grad(list(READERS))
    waveform, mask = waveforms()
    labels = {name: torch.tensor([0, 1, 2]) for name in READERS}
    together = model.forward_all(list(READERS), waveform, attention_mask=mask, labels=labels)
    sum(output.loss for output in together.values()).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for name in READERS:
        model.set_adapter(name)
        model(waveform, attention_mask=mask, labels=labels[name]).loss.backward()
        for parameter, gradient in ((n, p.grad) for n, p in model.named_parameters() if f".{name}." in n):
            assert gradient is not None, parameter
            torch.testing.assert_close(found[parameter], gradient, msg=parameter)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["one", "three"], {}, r"got \['one', 'three'\]; the model has 'norms', 'one', 'rest', 'two'"),
        ("one", {}, "takes a list of adapter names, got 'one'"),
        (["one", "norms"], {}, r"'norms' changes what the layers compute \(adapters='L', train_layer_norms=True, "),
        (["one"], {"labels": {"two": torch.tensor([0])}}, "labels for 'two', which is not run. What is run: 'one'"),
        (["one"], {"output_hidden_states": True}, "no hidden states or attentions of their own"),
    ],
)
def test_what_has_no_common_pass_is_refused(names, options, message):
    model = adapted("ForSequenceClassification", **READERS, norms={"adapters": "L"})
    with pytest.raises(ValueError, match=message):
        model.forward_all(names, waveforms()[0], **options)


def test_a_shared_pass_leaves_states_and_names_as_they_were():
    model = adapted("ForSequenceClassification", one=ALONE, two=ALONE)
    before, names = answer(model, "one"), list(model.state_dict())
    model.forward_all(["one", "two"], waveforms()[0])
    assert list(model.state_dict()) == names
    assert model.get_model_status().active_adapters == ["one"]
    model.delete_adapter("two")
    assert model.active_adapters == ["one"]
    assert torch.equal(answer(model), before)


@pytest.mark.parametrize("l_output", ["head", "residual"])
def test_all_tasks_answer_as_the_backbone_while_adapters_are_off(l_output):
    model, x = adapted("ForSequenceClassification", one=ALONE | {"l_output": l_output}), waveforms()[0]
    with model.disable_adapter():
        assert torch.equal(result(model.forward_all(["one"], x)["one"]), answer(model, input_values=x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_shared_pass_reaches_none_but_its_tasks(reentrant):
    model = adapted("ForSequenceClassification", "wav2vec2", one=ALONE, two=ALONE | {"l_dim": 6}, active={}).train()
    model.set_requires_grad(["one", "two"])
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    labels = dict.fromkeys(("one", "two"), torch.tensor([0, 1, 2]))
    sum(output.loss for output in model.forward_all(["one", "two"], waveforms()[0], labels=labels).values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".one." in name or ".two." in name), name


FEATURES = ALONE | {"modules_to_save": ["feature_projection", "projector", "classifier"]}


def test_an_adapter_that_trains_a_module_before_the_layers_shares_no_pass():
    model = adapted("ForSequenceClassification", one=ALONE, features=FEATURES)
    with pytest.raises(ValueError, match=r"'features' changes what the layers compute.*feature_projection"):
        model.forward_all(["one", "features"], waveforms()[0])

    trained = {
        "plain": ALONE,
        "features": FEATURES,
        "convolutions": ALONE | {"modules_to_save": ["feature_extractor"]},
    }
    tasks: dict[str, Any] = {task: adapted("ForSequenceClassification", default=own) for task, own in trained.items()}
    expected = {task: answer(model) for task, model in tasks.items()}
    waveform, mask = waveforms()
    for task, output in MultiTaskModel(tasks)(waveform, attention_mask=mask).items():
        torch.testing.assert_close(result(output), expected[task])
    twins = [get_peft_model(build("wavlm", "ForSequenceClassification"), ELPConfig(**ELP | FEATURES)) for _ in "ab"]
    MultiTaskModel(dict(zip("ab", twins, strict=True)))
    own = [{n: p for n, p in twin.named_parameters() if p.requires_grad} for twin in twins]
    assert any("feature_projection" in name for name in own[0])
    assert all(own[0][name] is not own[1][name] for name in own[0])


def test_tasks_do_not_take_adapters_by_utterance():
    model = adapted("ForSequenceClassification", one=ALONE, two=ALONE)
    with pytest.raises(ValueError, match="each model has one active adapter"):
        MultiTaskModel({"task": model})(waveforms()[0], adapter_names=["one"] * 3)


def models():
    tasks = {"asr": ("ForCTC", {}), "emotion": ("ForSequenceClassification", ALONE)}
    tasks |= {"speaker": ("ForXVector", ALONE | {"l_dim": 6}), "words": ("ForCTC", {"adapters": "EP"})}
    found = {}
    for task, (head, options) in tasks.items():
        base: Any = build("wavlm", head)
        base.wavlm.load_state_dict(build("wavlm").wavlm.state_dict())
        found[task] = with_adapters(base, default=options)
    return found


def test_models_with_different_heads_share_one_backbone():
    tasks = models()
    waveform, mask = waveforms()
    expected = {task: result(model(waveform, attention_mask=mask)) for task, model in tasks.items()}
    together = MultiTaskModel(tasks).eval()
    backbones = [model.base_model.model.wavlm for model in tasks.values()]
    for name, tensor in backbones[0].feature_projection.named_parameters():
        assert all(tensor is backbone.feature_projection.get_parameter(name) for backbone in backbones)
    adapters = sum(
        p.numel() for m in tasks.values() for n, p in m.named_parameters() if "elp_" in n or "modules_to_save" in n
    )
    heads = sum(p.numel() for m in tasks.values() for n, p in m.named_parameters() if "original_module" in n)
    own = sum(p.numel() for p in build("wavlm", "Model").parameters())
    assert sum(p.numel() for p in together.parameters()) == own + adapters + heads

    cnn = [call for b in backbones for call in [calls_of(b.feature_extractor.conv_layers[0])]]
    layers = [layer_calls(model) for model in tasks.values()]
    outputs = together(waveform, attention_mask=mask, labels={"emotion": torch.tensor([0, 1, 2])})
    assert list(outputs) == list(tasks)
    for task, output in outputs.items():
        torch.testing.assert_close(result(output), expected[task])
        assert (output.loss is not None) == (task == "emotion")
    assert sum(map(len, cnn)) == 1
    assert [len(calls) for calls in layers] == [1, 1, 0, 1]  # "speaker" takes what "emotion" found
    assert list(together(waveform, tasks=["speaker"])) == ["speaker"]


def test_models_of_different_checkpoints_are_refused():
    asr, other = models()["asr"], get_peft_model(build("wavlm", "ForSequenceClassification", seed=5), ELPConfig(**ELP))
    with pytest.raises(ValueError, match=r"backbones of 'asr' and 'emotion' differ in \d+ of \d+ tensors"):
        MultiTaskModel({"asr": asr, "emotion": other})
    with pytest.raises(ValueError, match=r"There is no task 'speaker'; the tasks are 'asr'"):
        MultiTaskModel({"asr": asr})(waveforms()[0], tasks=["speaker"])


@pytest.mark.parametrize("target", ["left.encoder", "right.encoder"])
def test_a_model_with_two_encoders_of_one_class_shares_passes_through_the_adapted_one(target):
    readers = {"one": ALONE, "two": ALONE | {"l_dim": 6}}
    base = TwoEncoders("wavlm", "wavlm")
    model = with_adapters(base, **{name: own | {"target": target} for name, own in readers.items()})
    inputs = {"input_values": waveforms()[0]}
    expected = {name: answer(model, name, **inputs) for name in readers}
    layers = layer_calls(model)
    outputs = model.forward_all(list(readers), **inputs)
    assert len(layers) == 1
    tasks: Any = MultiTaskModel({"task": model})
    for name in readers:
        torch.testing.assert_close(result(outputs[name]), expected[name])
        model.set_adapter(name)
        torch.testing.assert_close(result(tasks(**inputs)["task"]), expected[name])
