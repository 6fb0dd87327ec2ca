"""A parameter that should be trained and gets no gradient is named, once; hidden states under an L-adapter."""

import warnings
from typing import Any

import pytest
import torch
from backbones import ELP, FAMILIES, NORMS, build, labels_for, result, waveforms
from peft import get_peft_model
from torch import nn

from peft_elp import ELPConfig

BARE = {**ELP, "adapters": "L", "train_layer_norms": False}


class Own(nn.Module):
    """A user's own head, which reads one of the hidden states of an adapted encoder."""

    def __init__(self, encoder, which):
        super().__init__()
        self.encoder, self.which = encoder, which
        self.head = nn.Linear(24, 2)

    def forward(self, waveform):
        output: Any = self.encoder(waveform, output_hidden_states=True)
        x = output.last_hidden_state if self.which is None else output.hidden_states[self.which]
        return self.head(x.mean(1))


def steps(model, number=3):
    """The warnings of some training steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(number):
            output = model(waveforms()[0])
            (output if isinstance(output, torch.Tensor) else result(output)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [
        str(warning.message) for warning in seen if "no gradient in the first training step" in str(warning.message)
    ]


@pytest.mark.parametrize("alone", [False, True])
def test_a_head_that_reads_past_the_l_adapter_is_told_so_once(alone):
    base = build("wavlm", "Model")
    if alone:
        base.add_adapter(ELPConfig(**BARE))
    encoder = base if alone else get_peft_model(base, ELPConfig(**BARE))
    (message,) = steps(Own(encoder.train(), 1))
    assert "8 parameters" in message or "parameters that should be trained" in message
    assert "elp_l.default.layer_weights" in message
    assert "does not depend on the encoder's last_hidden_state" in message
    assert len(message) < 450
    assert steps(Own(encoder.train(), 1)) == []


@pytest.mark.parametrize("adapters", ["E", "L", "P", "ELP"])
@pytest.mark.parametrize("alone", [False, True])
def test_training_that_reaches_everything_is_not_remarked_on(adapters, alone):
    model: Any = build()
    config = ELPConfig(**{**ELP, "adapters": adapters})
    if alone:
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    assert steps(model.train()) == []


def test_an_e_adapter_behind_the_last_tapped_layer_is_named():
    # A configuration that names the class of its base was saved. A new one of this kind is refused.
    saved = {"auto_mapping": {"base_model_class": "WavLMForCTC"}}
    config = ELPConfig(**{**ELP, "adapters": "EL"}, e_layers=[0, 2], l_layers=[0], l_output="project", **saved)
    (message,) = steps(get_peft_model(build(), config).train())
    assert "wavlm.encoder.layers.2." in message
    assert "layers.0." not in message


def test_layerdrop_and_adapters_that_did_not_run_are_no_reason():
    model: Any = get_peft_model(build("wav2vec2", layerdrop=0.9), ELPConfig(**{**ELP, "adapters": "E"})).train()
    model.add_adapter("other", ELPConfig(**{**ELP, "adapters": "E"}))
    model.set_requires_grad(["default", "other"])
    assert steps(model) == []


def test_a_step_without_the_model_or_in_evaluation_is_not_looked_at():
    model: Any = get_peft_model(build(), ELPConfig(**BARE))
    model.eval()(waveforms()[0])
    with torch.no_grad():
        model.train()(waveforms()[0])
    other = nn.Linear(1, 1)
    other(torch.ones(1, 1)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.optim.SGD(other.parameters(), lr=0.1).step()


# Hidden states -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l_output", ["project", "residual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_hidden_state_of_a_post_norm_encoder_is_its_output_under_l_too(family, l_output):
    waveform, mask = waveforms()
    model: Any = build(family, "Model")
    for adapters in ("", "L", "LP"):
        if adapters:
            model = get_peft_model(
                build(family, "Model"), ELPConfig(**{**ELP, "adapters": adapters}, l_output=l_output)
            )
        with torch.no_grad():
            output = model(waveform, attention_mask=mask, output_hidden_states=True)
            pair = model(waveform, attention_mask=mask, output_hidden_states=True, return_dict=False)
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
        states = next(value for value in pair if isinstance(value, tuple))
        assert torch.equal(states[-1], output.last_hidden_state)


def test_a_head_on_the_last_hidden_state_trains_the_l_adapter():
    model = Own(get_peft_model(build("hubert", "Model"), ELPConfig(**BARE)).train(), -1)
    assert steps(model) == []


@pytest.mark.parametrize(("family", "stable"), NORMS)
def test_hidden_states_keep_the_width_of_the_backbone(family, stable):
    model: Any = get_peft_model(build(family, do_stable_layer_norm=stable), ELPConfig(**ELP, l_output="head"))
    waveform, mask = waveforms()
    labels = labels_for(model.get_base_model(), 3, 0)
    output = model(waveform, attention_mask=mask, labels=labels, output_hidden_states=True)
    assert {x.shape[-1] for x in output.hidden_states} == {24}
