"""Facts of the table that can be read off a random model of each family."""

import pytest
import torch
from families import FAMILIES, cases
from torch import nn

from peft_elp import find_encoder

# Of LASR's own convolution.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def default_norms(model: nn.Module) -> nn.Module:
    """The model with all norms as Transformers makes them, and other weights too large for the norms' epsilon."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            nn.init.constant_(parameter, float(name.endswith("weight")))
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def layers_normalise(model: nn.Module, inputs: dict) -> bool:
    """Whether each frame that the first encoder layer returns is of the size that a norm without parameters gives."""
    outputs = []

    def keep(module, args, output):
        outputs.append((output[0] if isinstance(output, tuple) else output).clone())

    hook = find_encoder(model).layers[0].register_forward_hook(keep)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    frames = outputs[0].flatten(0, -2).double()
    size = frames[frames.abs().sum(-1) > 0].square().mean(-1).sqrt()
    return bool(((size - 1).abs() < 0.02).all())


@pytest.mark.parametrize("name", cases(name for name, family in FAMILIES.items() if "L" in family.adapters))
def test_the_row_says_whether_layers_return_what_is_not_normalised(name):
    model = default_norms(FAMILIES[name].plain())
    assert find_encoder(model).family.pre_norm != layers_normalise(model, FAMILIES[name].inputs)
