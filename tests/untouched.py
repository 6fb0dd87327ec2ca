"""What an error or `unload()` must leave as it was."""

import copy

import torch
from backbones import answer as logits

__all__ = ["assert_untouched", "logits", "snapshot"]


def snapshot(model):
    """Everything that an error or unload() must leave as it was: modules, tensors, settings, hooks."""
    return (
        [(name, type(module), id(module), module.training) for name, module in model.named_modules()],
        {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        copy.deepcopy(model.config.to_dict()),
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        getattr(getattr(getattr(model, "base_model", None), "feature_extractor", None), "_requires_grad", None),
    )


def assert_untouched(model, before, trainable=True):
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[2:] == before[2:]
    assert after[1].keys() == before[1].keys()
    for name, (identity, requires_grad, tensor) in before[1].items():
        assert after[1][name][0] == identity, name
        assert torch.equal(after[1][name][2], tensor), name
        assert not trainable or after[1][name][1] == requires_grad, name
