"""Frozen attention gets hidden states in the layout in which it is fast, and computes the same."""

import pytest
import torch
from backbones import ELP, build, waveforms
from peft import get_peft_model
from torch.overrides import TorchFunctionMode

from peft_elp import ELPConfig, speed_up_frozen


class Layouts(TorchFunctionMode):
    """Whether `multi_head_attention_forward` got contiguous queries, call by call."""

    def __init__(self):
        super().__init__()
        self.contiguous = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.multi_head_attention_forward:
            self.contiguous.append(args[0].is_contiguous())
        return function(*args, **(kwargs or {}))


def run(model):
    waveform, mask = waveforms()
    with torch.no_grad(), Layouts() as layouts:
        return model(waveform, attention_mask=mask).logits, layouts.contiguous


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize(
    "config",
    [{"name": "e+l", "e_dim": 4, "l_dim": 6}, {"name": "conventional", "e_dim": 4}],  # The second wraps attention.
    ids=["e+l", "conventional"],
)
def test_attention_of_wavlm_is_laid_out_while_adapters_are_in_the_model(stable, config):
    base = build("wavlm", "ForCTC", do_stable_layer_norm=stable).requires_grad_(False)
    expected, plain = run(base)
    assert plain == [False] * 3
    model = get_peft_model(base, ELPConfig.preset(**config)).eval()
    model.add_adapter("other", ELPConfig(**ELP))
    assert run(model)[1] == [True] * 3
    with model.disable_adapter():
        logits, layouts = run(model)
    assert layouts == [False] * 3
    assert torch.equal(logits, expected)
    assert run(model)[1] == [True] * 3
    model.unload()
    assert run(base)[1] == [False] * 3


def test_a_model_without_adapters_is_sped_up_too():
    base = build("wavlm", "ForCTC").requires_grad_(False)
    expected, _ = run(base)
    assert speed_up_frozen(speed_up_frozen(base)) is base
    logits, layouts = run(base)
    assert layouts == [True] * 3
    torch.testing.assert_close(logits, expected)  # PyTorch chooses other kernels.
    get_peft_model(base, ELPConfig(**ELP)).unload()
    assert run(base)[1] == [True] * 3


def test_families_that_need_nothing_get_nothing():
    base = build("hubert")
    assert not any(module._forward_pre_hooks for module in speed_up_frozen(base).modules() if module is not base)
