"""The speech encoder of a model is found by class, by path or by its stack."""

import pytest
from backbones import ELP, TwoEncoders
from peft import get_peft_model

from peft_elp import ELPConfig
from peft_elp.tuner.find import encoder_of
from peft_elp.tuner.stack import ELPStack

L = {**ELP, "adapters": "L", "train_layer_norms": False, "modules_to_save": []}


def test_a_stack_tells_which_of_two_encoders_of_one_class_is_meant():
    model = TwoEncoders("wavlm", "wavlm")
    for side, tower in (("left", model.left), ("right", model.right)):
        found = encoder_of(model, tower.encoder)
        assert (found.stack_path, found.backbone) == (f"{side}.encoder", tower)
        assert found.layers == list(tower.encoder.layers)
    plain = model.right.encoder
    adapted = get_peft_model(model, ELPConfig(target="right.encoder", **L))
    (stack,) = (module for module in adapted.modules() if isinstance(module, ELPStack))
    for known in (stack, plain):
        found = encoder_of(adapted.base_model, known)
        assert (found.stack_path, found.stack) == ("model.right.encoder", plain)
        assert all(type(layer).__name__ == "WavLMEncoderLayer" for layer in found.layers)
    with pytest.raises(ValueError, match="WavLMEncoder is not an encoder stack of this TwoEncoders"):
        encoder_of(TwoEncoders("wavlm", "wavlm"), plain)
