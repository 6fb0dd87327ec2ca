"""A trained parameter without a gradient is named."""

from typing import Any

import pytest
import torch
from backbones import ELP, build, result, waveforms
from peft import get_peft_model
from torch import nn

from peft_elp import ELPConfig, check_gradients

READER = ELP | {"adapters": "L", "train_layer_norms": False}


class Own(nn.Module):
    """A user's own head, which reads one of the hidden states of an adapted encoder."""

    def __init__(self, encoder, which):
        super().__init__()
        self.encoder, self.which = encoder, which
        self.head = nn.Linear(24, 2)

    def forward(self, waveform):
        return self.head(self.encoder(waveform, output_hidden_states=True).hidden_states[self.which].mean(1))


def after_a_step(model: nn.Module) -> nn.Module:
    output = model.train()(waveforms()[0])
    (output if isinstance(output, torch.Tensor) else result(output)).float().square().mean().backward()
    return model


@pytest.mark.parametrize("alone", [False, True])
def test_a_head_that_reads_past_the_l_adapter_is_told_so(alone):
    base: Any = build("wavlm", "Model")
    if alone:
        base.add_adapter(ELPConfig(**READER))
    encoder = base if alone else get_peft_model(base, ELPConfig(**READER))
    with pytest.raises(
        RuntimeError, match=r"15 trained parameters got no .*elp_l.*does not depend on the encoder's last_hidden_state"
    ) as error:
        check_gradients(after_a_step(Own(encoder, 1)))
    assert len(str(error.value)) < 450
    check_gradients(after_a_step(Own(encoder, -1)))


@pytest.mark.parametrize("letters", ["E", "L", "P", "ELP"])
def test_training_that_reaches_everything_is_not_remarked_on_whatever_waits_beside_it(letters):
    model: Any = get_peft_model(build(), ELPConfig(**ELP | {"adapters": letters}))
    model.add_adapter("other", ELPConfig(**ELP | {"adapters": "E"}))
    check_gradients(after_a_step(model))
