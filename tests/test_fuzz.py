"""Any configuration on any model is refused and leaves the model untouched, or it keeps every promise."""

import tempfile
import warnings

import pytest
import torch
from backbones import call, encoded, labels_for, result, shaken
from families import FAMILIES
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from untouched import assert_untouched, snapshot

from peft_elp import ELPConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
MODELS = sorted(name for name, family in FAMILIES.items() if family.available)

# The models have two or three layers. The heads of most of them have a projector or a classifier.
LAYERS = st.sampled_from([None, [0], [1], [0, 1], [1, 2], [0, 2], [2], [0, 1, 2], [3]])
CONFIGS = st.fixed_dictionaries(
    {"e_dim": st.integers(1, 6), "l_dim": st.integers(1, 6), "p_length": st.integers(1, 6)},
    optional={
        "adapters": st.sets(st.sampled_from("ELP"), min_size=1).map("".join),
        "e_layers": LAYERS,
        "l_layers": LAYERS,
        "e_after": st.sampled_from([("feed_forward",), ("attention",), ("feed_forward", "attention")]),
        "e_activation": st.sampled_from(["gelu", "relu"]),
        "l_output": st.sampled_from([None, "head", "project", "residual"]),
        "l_input_norm": st.sampled_from([None, False, True]),
        "p_position": st.sampled_from(["append", "prepend"]),
        "e_dropout": st.sampled_from([0.0, 0.3]),
        "l_dropout": st.sampled_from([0.0, 0.3]),
        "train_layer_norms": st.booleans(),
        "init_weights": st.booleans(),
        "modules_to_save": st.sampled_from([None] * 5 + [[], ["projector"], ["classifier"], ["lm_head"], ["nothing"]]),
        "head_config": st.sampled_from([None] * 4 + [{"num_labels": 3}, {"vocab_size": 5}, {"num_labels": 1}]),
        "exclude_modules": st.sampled_from([None, None, r".*layers\.0\..*", ["layer_norm"], ["feed_forward"]]),
    },
)


def read(output):
    return result(output) if "logits" in output else encoded(output)


def answer(model, inputs):
    return read(call(model.eval(), **inputs))


def belongs_to_adapter(name):
    return ".elp_" in name or ".modules_to_save." in name


def keeps_its_promises(name, config):
    make, inputs = FAMILIES[name].model, FAMILIES[name].inputs
    base = make()
    base.requires_grad_(False)  # A frozen WavLM rounds differently, with or without adapters.
    plain, names = answer(base, inputs), list(base.state_dict())
    before = snapshot(base)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base, ELPConfig(**config))
    except ValueError as error:
        event(f"refused: {str(error)[:40]}")
        assert_untouched(base, before)
        assert torch.equal(answer(base, inputs), plain)
        return
    event("placed")

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert {n for n, _ in model.named_parameters() if belongs_to_adapter(n)} == set(trained)
    shaken(model)
    model.train()
    if name.endswith("xvector"):  # Its loss has parameters.
        model(**inputs, labels=labels_for(base, 3, 0)).loss.backward()
    score = read(model(**inputs))
    (score * torch.randn(score.shape)).sum().backward()
    for n, parameter in trained.items():
        assert parameter.grad is not None, f"{n} has no gradient"
        assert parameter.grad.isfinite().all(), n
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)

    adapted = answer(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(make(), folder)
    torch.testing.assert_close(answer(loaded, inputs), adapted, atol=1e-6, rtol=1e-6)
    with model.disable_adapter():
        assert torch.equal(answer(model, inputs), plain)
    assert torch.equal(answer(model, inputs), adapted)
    unloaded = model.unload()
    assert torch.equal(answer(unloaded, inputs), plain)
    assert list(unloaded.state_dict()) == names


FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "print_blob": True}
# What it once found.
SMALL = {"e_dim": 1, "l_dim": 1, "p_length": 1, "l_layers": [0]}


@example(name="hubert", config={"l_output": "head", "exclude_modules": r".*layers\.0\..*", **SMALL})
@example(name="hubert", config={"l_output": "project", **SMALL})
@given(name=st.sampled_from(MODELS), config=CONFIGS)
@settings(max_examples=100, derandomize=True, **FUZZ)
def test_a_configuration_is_refused_or_keeps_its_promises(name, config):
    keeps_its_promises(name, config)


@given(name=st.sampled_from(MODELS), config=CONFIGS)
@settings(max_examples=2000, **FUZZ)
def test_many_configurations_are_refused_or_keep_their_promises(name, config):
    keeps_its_promises(name, config)
