"""A learning rate for each part, the published ones, and what Transformers' Trainer makes of them."""

import itertools
import math
import re
import shutil

import numpy as np
import pytest
import torch
from backbones import ELP, FAMILIES, build, has
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_elp import (
    ELPConfig,
    count_parameters,
    create_optimizer,
    get_epochwise_schedule,
    parameter_groups,
    published_factors,
    published_rates,
)

SETTINGS = ("e+l", "conventional", "e-only", "l-only", "e+l+p", "paper")
TASKS = ("asr", "asv", "er", "ic")
RATES = {"head": 5e-3, "L": 1e-3, "layer weights": 7e-3, "E": 1e-4, "P": 2e-2, "layer norms": 1e-5}
PARTS = {"elp_e": "E", "elp_l": "L", "elp_p": "P", "elp_norm": "layer norms", "modules_to_save": "head"}
SMALL = {"e_dim": 8, "l_dim": 10}


def adapted(head="ForCTC", family="wavlm", adapter_name="default", **options):
    base = build(family, head)
    torch.manual_seed(5)
    return get_peft_model(base, ELPConfig(**ELP | options), adapter_name=adapter_name)


def part_of(name, adapter_name="default"):
    if name.endswith(f".elp_l.{adapter_name}.layer_weights"):
        return "layer weights"
    held = re.search(rf"\.({'|'.join(PARTS)})\.{adapter_name}\.", name)
    return PARTS[held[1]] if held else None


# Groups -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification", "ForXVector"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_every_trainable_tensor_is_in_one_group_with_the_rate_of_its_part(head, weight_decay):
    model = adapted(head, adapter_name="mine", e_after=("attention", "feed_forward"))
    groups = parameter_groups(model, RATES, "mine", weight_decay)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates.get(id(parameter)) == RATES.get(part_of(name, "mine")), name
        assert (id(parameter) in rates) == parameter.requires_grad, name
    sizes = dict.fromkeys(RATES, 0)
    for group in groups:
        sizes[group["part"]] += sum(p.numel() for p in group["params"])
    sizes["L"] += sizes.pop("layer weights")
    assert sizes == count_parameters(model, "mine")
    if not weight_decay:
        assert [group["part"] for group in groups] == list(RATES)


@pytest.mark.parametrize(("family", "head"), [(f, h) for f in FAMILIES for h in ("ForCTC", "ForXVector") if has(f, h)])
def test_weight_decay_spares_what_trainer_spares(family, head, tmp_path):
    model = adapted(head, family)
    groups = parameter_groups(model, RATES, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    decayed = set(trainer.get_decay_parameter_names(model))
    found = {name: decay[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert found == {name: 0.1 if name in decayed else 0.0 for name in found}
    assert {name.rsplit(".", 1)[-1] for name, value in found.items() if value} == {"weight", "layer_weights", "rows"}
    assert not any("norm" in name for name, value in found.items() if value)


WITHOUT_P = {part: rate for part, rate in RATES.items() if part != "P"}
WRONG_RATES = (0.0, -1e-3, "1e-3", math.nan, math.inf, None, True)


@pytest.mark.parametrize(
    ("options", "rates", "message"),
    [
        ({}, {**RATES, "l": 1e-3}, "rates has 'l', which adapter 'default' does not train. It trains 'E', 'L', "),
        ({"adapters": "L"}, RATES, "It trains 'L', 'layer weights', 'layer norms', 'head'. Remove 'E' from rates"),
        ({"train_layer_norms": False}, RATES, "rates has 'layer norms', which adapter 'default' does not train"),
        ({"inference_mode": True}, {"E": 1e-3}, r"It trains no part \(in inference mode\?\)"),
        ({}, WITHOUT_P, r"rates has no 'P', but adapter 'default' trains 1 tensors .*elp_p.default.rows. Add"),
        ({}, {}, r"rates has no 'E', but adapter 'default' trains 12 tensors"),
        *(({}, {**RATES, "E": rate}, f"of 'E' must be a positive number, got {rate!r}") for rate in WRONG_RATES),
    ],
)
def test_rates_that_do_not_fit_the_adapter_are_named(options, rates, message):
    for use in (parameter_groups, lambda model, rates: create_optimizer(model, rates=rates)):
        with pytest.raises(ValueError, match=message):
            use(adapted(**options), rates)


def test_layer_weights_without_a_rate_learn_faster_than_the_rest_of_l():
    rates = {part: rate for part, rate in RATES.items() if part != "layer weights"}
    found = {group["part"]: group["lr"] for group in parameter_groups(adapted(), rates)}
    assert found == {**rates, "layer weights": pytest.approx(30 * rates["L"])}
    without_l = {part: rates[part] for part in ("head", "E", "layer norms")}
    assert {group["part"] for group in parameter_groups(adapted(adapters="E"), without_l)} == {*without_l}


def test_taps_without_a_matrix_take_the_rate_of_l():
    model = adapted("ForSequenceClassification", adapters="L", train_layer_norms=False, l_dim=0)
    groups = parameter_groups(model, {"head": 1e-2, "L": 1e-3})
    assert {group["part"]: group["lr"] for group in groups} == {"head": 1e-2, "layer weights": pytest.approx(3e-2)}


def test_trainable_tensors_outside_of_the_adapter_and_unknown_adapters_are_named():
    model = adapted()
    model.base_model.model.wavlm.feature_projection.requires_grad_(True)
    with pytest.raises(ValueError, match=r"4 trainable tensors belong to no part of adapter 'default': \S*feature_p"):
        parameter_groups(model, RATES)
    model = adapted()
    model.add_adapter("other", ELPConfig(**ELP, adapters="E", e_layers=[0]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".elp_e.other." in name)
    with pytest.raises(ValueError, match=r"belong to no part of adapter 'default': \S*elp_e.other"):
        parameter_groups(model, RATES)
    with pytest.raises(ValueError, match="There is no adapter 'mine'; the model has 'default'"):
        create_optimizer(adapted(), rates=RATES, adapter_name="mine")
    with pytest.raises(ValueError, match="There is no adapter 'default'; the model has none"):
        create_optimizer(build(), rates=RATES)


def test_the_optimizer_takes_its_own_options_and_no_common_rate():
    optimizer = create_optimizer(adapted(), torch.optim.Adam, rates=RATES, betas=(0.9, 0.98), eps=1e-6)
    assert type(optimizer) is torch.optim.Adam
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.98), 1e-6)}
    assert {group["part"]: group["lr"] for group in optimizer.param_groups} == RATES
    with pytest.raises(TypeError, match=r"lr=0.001 would have no effect"):
        create_optimizer(adapted(), rates=RATES, lr=1e-3)


def test_the_default_optimizer_steps_as_the_adam_of_the_publications():
    models = [adapted(), adapted()]
    for model, kind in zip(models, ({}, {"optimizer_cls": torch.optim.Adam}), strict=True):
        optimizer = create_optimizer(model, rates=RATES, **kind)
        for step in range(3):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
            optimizer.step()
    expected = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)


# The published settings ---------------------------------------------------------------------------------------------


def test_a_preset_is_a_configuration_whose_fields_can_be_overridden():
    config = ELPConfig.preset("e+l", e_dim=64, e_activation="relu")
    assert (config.adapters, config.e_dim, config.e_activation, config.l_dim) == ("EL", 64, "relu", 512)
    preset, default = ELPConfig.preset("e+l+p").to_dict(), ELPConfig().to_dict()
    differing = {name for name in default if default[name] != preset[name]}
    # The defaults are the method itself, but for where it starts, for sizes as shares of the width, and for the length
    # that the publications leave open.
    assert differing == {"init_weights", "p_init_std", "p_length", "e_dim", "l_dim"}
    with pytest.raises(ValueError, match=r"preset must be one of 'e\+l', 'conventional', .*got 'E\+L'"):
        ELPConfig.preset("E+L")
    with pytest.raises(ValueError, match="e_dim must be"):
        ELPConfig.preset("e+l", e_dim=0)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("task", TASKS)
def test_published_rates_name_the_parts_that_the_preset_trains(setting, task):
    model = get_peft_model(build(), ELPConfig.preset(setting, **SMALL))
    rates = published_rates(setting, task)
    optimizer = create_optimizer(model, rates=rates)
    assert {group["part"]: group["lr"] for group in optimizer.param_groups} == rates
    rates.clear()
    assert published_rates(setting, task)  # each call has its own


def test_published_rates_are_those_of_the_table():
    table = {  # head, L, E and layer norms, as in the publication
        "e+l": {"asv": (5e-4, 1e-4, 1e-5, 1e-5), "er": (5e-4, 1e-4, 5e-5, 5e-5), "asr": (2e-3, 1e-3, 1e-3, 1e-3),
                "ic": (5e-4, 1e-5, 1e-5, 1e-5)},
        "l-only": {"asv": (5e-4, 5e-4, None, 5e-4), "er": (5e-4, 5e-4, None, 5e-4), "asr": (2e-3, 1e-3, None, 1e-3),
                   "ic": (5e-4, 1e-4, None, 1e-4)},
        "e-only": {task: (2e-3 if task == "asr" else 5e-4, None, 1e-5, 1e-5) for task in TASKS},
        "conventional": {task: (1e-3 if task == "asr" else 5e-4, None, 1e-5, 1e-5) for task in TASKS},
    }  # fmt: skip
    for (setting, tasks), task in itertools.product(table.items(), TASKS):
        rates = published_rates(setting, task)
        assert tuple(rates.get(part) for part in ("head", "L", "E", "layer norms")) == tasks[task]
        assert rates.get("layer weights") == rates.get("L")
    for task in TASKS:
        expected = {**published_rates("e+l", task), "P": published_rates("e+l", task)["E"]}
        assert published_rates("e+l+p", task) == expected


@pytest.mark.parametrize("lookup", [published_rates, published_factors])
def test_unknown_settings_and_tasks_are_named_with_the_known_ones(lookup):
    with pytest.raises(ValueError, match=r"Unknown setting 'full'; choose one of 'e\+l', 'conventional'"):
        lookup("full", "asr")
    with pytest.raises(ValueError, match="Unknown task 'sid'; choose one of 'asv', 'er', 'asr', 'ic'"):
        lookup("e+l", "sid")


def test_published_factors_are_the_published_schedules():
    decay = np.linspace(100, 1, 78) / np.linspace(100, 1000, 78)  # to 1/1000, after the last epoch
    asr = np.concatenate([np.linspace(10, 100, 20) / 100, np.ones(3), decay])[:100]
    for setting in ("e+l", "e-only", "l-only", "e+l+p"):
        assert published_factors(setting, "asr") == pytest.approx(asr)
    assert published_factors("conventional", "asr") == pytest.approx([0.3 ** (epoch // 25) for epoch in range(100)])
    for setting in SETTINGS:
        assert published_factors(setting, "asv") == (0.3, 0.5, 0.7, 1.0, 0.2, 0.1)
        assert published_factors(setting, "er") == (*[1.0] * 10, *[0.1] * 10)
        assert published_factors(setting, "ic") == (0.1, 0.5, 0.7, 1.0, 0.5, 0.3, 0.1)


# Schedules ----------------------------------------------------------------------------------------------------------


def scheduled(factors, steps, more=0):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = get_epochwise_schedule(optimizer, factors, steps)
    found = []
    for _ in range(steps + more):
        found.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()
    return found


def test_each_epoch_has_its_own_factor_and_a_training_of_another_length_keeps_the_shape():
    assert scheduled([0.3, 0.5, 1.0], 12) == [0.3] * 4 + [0.5] * 4 + [1.0] * 4
    for steps_per_epoch in (1, 7, 31):
        factors = published_factors("e+l", "asr")
        expected = [factor for factor in factors for _ in range(steps_per_epoch)]
        assert scheduled(factors, steps_per_epoch * 100) == pytest.approx(expected)
    assert scheduled([0.3, 0.5, 1.0], 7) == [0.3] * 3 + [0.5] * 2 + [1.0] * 2
    assert scheduled([0.1, 0.5, 1.0, 0.2], 2) == [0.1, 1.0]
    assert scheduled([1.0, 0.1], 2, more=3) == [1.0, 0.1, 0.1, 0.1, 0.1]
    assert scheduled(np.array([0.5]), 1) == [0.5]


@pytest.mark.parametrize(
    ("factors", "steps", "message"),
    [
        ([], 10, r"factors must be one or more numbers of at least 0, got \[\]"),
        ([1.0, -0.1], 10, r"got \[1.0, -0.1\]"),
        ([1.0, math.nan], 10, "nan"),
        ([1.0], 0, "num_training_steps must be at least 1, got 0"),
        ([1.0], -1, "got -1"),
    ],
)
def test_schedules_without_a_meaning_are_refused(factors, steps, message):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match=message):
        get_epochwise_schedule(optimizer, factors, steps)


# Trainer ------------------------------------------------------------------------------------------------------------


class RatesOfEachStep(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append({group["part"]: group["lr"] for group in optimizer.param_groups})


def trainer(folder, factors=None, **options):
    """Two epochs of four steps, with the rates of each step on record."""
    model = adapted("ForSequenceClassification")
    optimizer = create_optimizer(model, rates=RATES)
    schedule = None if factors is None else get_epochwise_schedule(optimizer, factors, num_training_steps=8)
    options |= {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_steps": 4, "seed": 7, "report_to": []}
    arguments = TrainingArguments(str(folder), use_cpu=True, dataloader_pin_memory=False, **options)
    noise = torch.randn(16, 800, generator=torch.Generator().manual_seed(1))
    rows = [{"input_values": x * (1 + 2 * (i % 2)), "labels": i % 2} for i, x in enumerate(noise)]
    record = RatesOfEachStep()
    return Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, schedule), callbacks=[record]
    ), record.seen


def scaled(factor):
    return pytest.approx({part: rate * factor for part, rate in RATES.items()})


def test_trainer_gives_each_part_its_rate_and_its_own_schedule_scales_them_all(tmp_path):
    run, seen = trainer(tmp_path, lr_scheduler_type="linear", learning_rate=1.0, save_strategy="no")
    run.train()
    assert seen == [scaled(1 - step / 8) for step in range(8)]


def test_an_epochwise_schedule_scales_all_parts_in_trainer_and_a_resumed_run_goes_on(tmp_path):
    whole, seen = trainer(tmp_path / "whole", [0.3, 0.5, 1.0, 0.2])
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.train()
    assert seen == [scaled(factor) for factor in (0.3, 0.3, 0.5, 0.5, 1.0, 1.0, 0.2, 0.2)]
    resumed, seen_again = trainer(tmp_path / "resumed", [0.3, 0.5, 1.0, 0.2])
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed.train(resume_from_checkpoint=True)
    assert seen_again == seen[4:]
    continued = dict(resumed.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(continued[name], parameter, msg=name)
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        if parameter.requires_grad:
            # Adam's first steps are about as long as its rate: here 4 rates in all.
            assert (parameter - before[name]).abs().max() < 4.3 * RATES[part_of(name)], name
