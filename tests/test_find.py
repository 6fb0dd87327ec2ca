"""The speech encoder of a model is found by class, by path or by its stack."""

from typing import Any

import pytest
from backbones import ELP, build
from peft import get_peft_model
from torch import nn

from peft_elp import ELPConfig
from peft_elp.tuner.find import encoder_of, find_encoder
from peft_elp.tuner.stack import ELPStack

L = {**ELP, "adapters": "L", "train_layer_norms": False, "modules_to_save": []}


class Twins(nn.Module):
    """Two encoders of one class."""

    def __init__(self):
        super().__init__()
        self.left: Any = build("wavlm", "Model")
        self.right: Any = build("wavlm", "Model", seed=1)
        self.config = self.left.config

    def forward(self, waveform):
        return self.left(waveform).last_hidden_state + self.right(waveform).last_hidden_state


def test_a_stack_tells_which_of_two_encoders_of_one_class_is_meant():
    model = Twins()
    with pytest.raises(ValueError, match=r"several speech encoders: left.encoder .*, right.encoder .*choose it with"):
        find_encoder(model)
    for side, tower in (("left", model.left), ("right", model.right)):
        found = encoder_of(model, tower.encoder)
        assert found.stack_path == f"{side}.encoder"
        assert found.backbone is tower
        assert found.layers == list(tower.encoder.layers)
    plain = model.right.encoder
    adapted = get_peft_model(model, ELPConfig(target="right.encoder", **L))
    (stack,) = (module for module in adapted.modules() if isinstance(module, ELPStack))
    for known in (stack, plain):
        found = encoder_of(adapted.base_model, known)
        assert (found.stack_path, found.stack) == ("model.right.encoder", plain)
        assert all(type(layer).__name__ == "WavLMEncoderLayer" for layer in found.layers)
    with pytest.raises(ValueError, match="WavLMEncoder is not an encoder stack of this Twins"):
        encoder_of(Twins(), plain)
