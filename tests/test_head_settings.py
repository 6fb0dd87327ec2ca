"""The settings that a head is made from belong to its adapter: its labels, its loss, its part of the configuration."""

import json
from itertools import permutations
from threading import Thread

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from backbones import ELP, build, result, waveforms, with_adapters
from families import FAMILIES
from peft import PeftModel, get_peft_model
from torch import nn

from peft_elp import ELPConfig

SPECTROGRAM = FAMILIES["audio-spectrogram-transformer"]
BANDS = {"input_values": SPECTROGRAM.inputs["input_values"]}
SMALL = {"adapters": "E", "e_dim": 4}
# The base classifies into three classes. Transformers guesses the loss from the labels: cross entropy, binary cross
# entropy and squared errors.
TASKS = {
    "single": (3, torch.tensor([0, 2]), nn.functional.cross_entropy),
    "multi": (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), nn.functional.binary_cross_entropy_with_logits),
    "number": (1, torch.tensor([0.5, -0.5]), lambda logits, labels: nn.functional.mse_loss(logits[:, 0], labels)),
}


def settings_of(config):
    return {name: value for name, value in config.to_dict().items() if name != "dtype"}


@pytest.mark.parametrize("order", list(permutations(TASKS)), ids="-".join)
@pytest.mark.parametrize("as_they_come", [True, False], ids=["placed as they come", "placed first"])
def test_each_adapter_has_its_own_loss_in_every_order(order, as_they_come):
    base = SPECTROGRAM.model()
    before, model = settings_of(base.config), None

    def check(name):
        _, labels, loss = TASKS[name]
        model.set_adapter(name)
        output = model(**BANDS, labels=labels)
        torch.testing.assert_close(output.loss, loss(output.logits, labels))

    for name in order:
        config = ELPConfig(**SMALL, head_config={"num_labels": TASKS[name][0]})
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        if as_they_come:
            check(name)
    for name in (*order, *reversed(order)):
        check(name)
    with model.disable_adapter():
        assert model(**BANDS, labels=torch.tensor([0, 1])).loss.isfinite()
    assert settings_of(model.unload().config) == before


def test_a_problem_type_that_was_chosen_stays_with_its_adapter(tmp_path):
    chosen = {"problem_type": "multi_label_classification"}
    model = get_peft_model(SPECTROGRAM.model(), ELPConfig(**SMALL, head_config=chosen), adapter_name="multi")
    model.add_adapter("plain", ELPConfig(**SMALL))
    for name, problem_type in (("plain", None), ("multi", "multi_label_classification"), ("plain", None)):
        model.set_adapter(name)
        assert model.config.problem_type == problem_type
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(SPECTROGRAM.model(), tmp_path / "multi")
    assert again.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("num_labels", [2, 7])
def test_frames_are_classified_into_the_adapters_labels(num_labels):
    model = with_adapters(
        build("wavlm", "ForAudioFrameClassification"), one={"head_config": {"num_labels": num_labels}}
    )
    logits = model(waveforms()[0]).logits
    classes = torch.randint(num_labels, logits.shape[:2])
    loss = model(waveforms()[0], labels=nn.functional.one_hot(classes, num_labels)).loss
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten()))
    with model.disable_adapter():
        model(waveforms()[0], labels=nn.functional.one_hot(classes.clamp(max=3), 4))
    assert model.unload().num_labels == 4


def test_unloading_leaves_no_setting_that_the_base_never_had():
    base = SPECTROGRAM.model()
    before = settings_of(base.config)
    settings = {"num_labels": 5, "classifier_proj_size": 12}
    assert settings_of(get_peft_model(base, ELPConfig(**SMALL, head_config=settings)).unload().config) == before


NAMES = {np.int64(0): np.str_("no"), np.int64(1): np.str_("yes"), np.int64(2): np.str_("stop")}


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"num_labels": np.int64(3)},
        {"id2label": NAMES},
        {"classifier_proj_size": np.int32(6), "num_labels": 3},
    ],
    ids=str,
)
def test_settings_of_numpy_can_be_saved(settings, tmp_path):
    base = build("wavlm", "ForSequenceClassification", num_labels=3)
    if settings is None:
        base.config.id2label, base.config.label2id = NAMES, {name: number for number, name in NAMES.items()}
    model = get_peft_model(base, ELPConfig(head_config=settings, **ELP))
    assert model(waveforms()[0]).logits.shape == (3, 3)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["head_config"]
    assert saved["num_labels"] == 3
    if settings is None or "id2label" in settings:
        assert saved["id2label"] == {"0": "no", "1": "yes", "2": "stop"}
        assert ELPConfig.from_pretrained(tmp_path).head_config["id2label"] == {0: "no", 1: "yes", 2: "stop"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id2label": ["no", "yes"]}, r"id2label in head_config must map 0, 1, ... to labels, got \['no', 'yes'\]"),
        ({"id2label": {"first": "no"}}, "must map 0, 1, ... to labels"),
        ({"num_labels": "three"}, "num_labels in head_config must be an integer from 1 to 1048576, got 'three'"),
        ({"num_labels": 0}, "num_labels in head_config must be an integer from 1 .* got 0"),
        ({"num_labels": [3]}, r"num_labels in head_config must be an integer from 1 .* got \[3\]"),
        ({"tdnn_dim": [8, "x"]}, "tdnn_dim in head_config must be an integer from 1 .* got 'x'"),
        ({"problem_type": "guess"}, "problem_type in head_config must be one of 'regression'"),
        ({"hidden_size": 3}, r"head_config must be a dictionary of settings of a head, got \['hidden_size'\]"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ELPConfig(head_config=settings)


@pytest.mark.parametrize(
    ("head", "modules", "settings", "message"),
    [
        ("ForCTC", [], {"vocab_size": 5}, "changes 'lm_head', which"),
        (
            "ForSequenceClassification",
            ["projector"],
            {"num_labels": 5},
            "changes 'classifier', which modules_to_save=",
        ),
        ("ForXVector", ["projector"], {"tdnn_dim": [12, 12, 30]}, "changes 'feature_extractor', 'tdnn.2'"),
    ],
)
def test_settings_of_a_module_that_is_not_trained_are_refused(head, modules, settings, message):
    base = build("wavlm", head)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, ELPConfig(modules_to_save=modules, head_config=settings, **ELP))
    assert not hasattr(base, "peft_config")


# What a call needs travels with the call ----------------------------------------------------------------------------

SIZES = {"three": 3, "five": 5, "four": 4}
INPUTS = dict(zip(("input_values", "attention_mask"), waveforms(), strict=True))
LABELS = {name: torch.tensor([0, 1, size - 1]) for name, size in SIZES.items()}


def readers():
    reads = {"adapters": "L", "train_layer_norms": False}
    options = {name: {"head_config": {"num_labels": size}, **reads} for name, size in SIZES.items()}
    return with_adapters(build("wavlm", "ForSequenceClassification"), **options)


def test_threads_that_share_passes_leave_each_other_and_the_configuration_alone():
    model, expected, wrong = readers(), {}, []
    for name in SIZES:
        model.set_adapter(name)
        with torch.no_grad():
            expected[name] = model(**INPUTS, labels=LABELS[name]).loss
    before = settings_of(model.config)

    def call(names):
        try:
            for _ in range(10):
                with torch.no_grad():
                    outputs = model.forward_all(names, **INPUTS, labels=LABELS)
                wrong.extend(name for name in names if not torch.allclose(outputs[name].loss, expected[name]))
        except Exception as error:
            wrong.append(repr(error))

    threads = [Thread(target=call, args=(list(order),)) for order in permutations(SIZES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert settings_of(model.config) == before
    assert model.unload().config.num_labels == 4


def test_a_shared_pass_has_the_adapters_settings_behind_a_hook_of_accelerate():
    model = readers()
    expected = model.forward_all(list(SIZES), **INPUTS, labels=LABELS)
    add_hook_to_module(model.base_model.model, ModelHook())
    outputs = model.forward_all(list(SIZES), **INPUTS, labels=LABELS)
    for name in SIZES:
        assert torch.equal(outputs[name].loss, expected[name].loss)
        assert torch.equal(result(outputs[name]), result(expected[name]))
