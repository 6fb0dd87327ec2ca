"""Values from an independent computation: the published parameter counts, and a plain loop over the formulas."""

import pytest
import torch
from backbones import adapted, build, result, waveforms
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import WavLMConfig, WavLMModel

from peft_elp import ELPConfig, count_parameters

WAVLM_BASE_PLUS = WavLMConfig(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, layerdrop=0.0
)
E_ADAPTER, TAP, NORMS = 395_776, 394_752, 36_864


@pytest.mark.parametrize(
    ("preset", "options", "counts", "total"),
    [
        ("e+l", {}, (11 * E_ADAPTER, 12 * TAP + 12, NORMS), 9_127_436),
        ("conventional", {}, (24 * E_ADAPTER, 0, NORMS), 9_535_488),
        ("e-only", {}, (12 * E_ADAPTER, 0, NORMS), 4_786_176),
        # The published count of L alone leaves out its layer norms, which have a published learning rate.
        ("l-only", {"train_layer_norms": False}, (0, 12 * TAP + 12, 0), 4_737_036),
    ],
)
def test_parameter_counts_are_the_published_ones(preset, options, counts, total):
    with torch.device("meta"):
        model = get_peft_model(WavLMModel(WAVLM_BASE_PLUS), ELPConfig.preset(preset, **options))
    found = count_parameters(model)
    # A bare encoder has no head that could take 512 features: the published counts leave the way out of L aside.
    outside = 512 * 768 + 768 if "L" in model.peft_config["default"].adapters else 0
    assert (found["E"], found["L"] - outside, found["layer norms"], found["P"]) == (*counts, 0)
    assert sum(found.values()) - outside == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(found.values())


def norm(x, tensors, name, eps=1e-5):
    return nn.functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def linear(x, tensors, name):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def reference(base, tensors, waveform):
    """One utterance through the frozen sub-modules of the plain backbone and the formulas of the paper."""
    prefix = base.base_model_prefix
    encoder, config = base.base_model.encoder, base.config
    at = {key.removeprefix(f"base_model.model.{prefix}.encoder."): value for key, value in tensors.items()}
    x, _ = base.base_model.feature_projection(base.base_model.feature_extractor(waveform[None]).transpose(1, 2))
    frames = x.shape[1]
    if "elp_p.rows" in at:
        x = torch.cat([x, at["elp_p.rows"][None]], dim=1)
    x = x + encoder.pos_conv_embed(x)
    stable = config.do_stable_layer_norm
    x = x if stable else encoder.layer_norm(x)
    taps, bias = [], None
    for i, layer in enumerate(encoder.layers):
        z = norm(x, at, f"layers.{i}.layer_norm.elp_norm") if stable else x
        if prefix == "wavlm":
            z, _, bias = layer.attention(z, position_bias=bias, index=i)
        else:
            z = layer.attention(z)[0]
        x = x + z
        x = x if stable else norm(x, at, f"layers.{i}.layer_norm.elp_norm")
        z = layer.feed_forward(norm(x, at, f"layers.{i}.final_layer_norm.elp_norm") if stable else x)
        e = f"layers.{i}.feed_forward.elp_e"
        if f"{e}.down.weight" in at:
            z = z + norm(linear(nn.functional.gelu(linear(z, at, f"{e}.down")), at, f"{e}.up"), at, f"{e}.norm")
        x = x + z
        x = x if stable else norm(x, at, f"layers.{i}.final_layer_norm.elp_norm")
        taps.append(x)
    if stable:
        taps[-1] = encoder.layer_norm(x)
        taps = [nn.functional.layer_norm(tap, tap.shape[-1:]) for tap in taps]
    share = at["elp_l.layer_weights"].exp() / at["elp_l.layer_weights"].exp().sum()
    y = sum(
        share[i] * norm(nn.functional.gelu(linear(tap, at, f"elp_l.taps.{i}.down")), at, f"elp_l.taps.{i}.norm")
        for i, tap in enumerate(taps)
    )
    return linear(y[:, :frames], tensors, "base_model.model.lm_head")[0]


@pytest.mark.parametrize(
    ("family", "stable"), [("wavlm", False), ("wavlm", True), ("wav2vec2", False), ("wav2vec2", True)]
)
@pytest.mark.parametrize("adapters", ["EL", "ELP"])
def test_the_forward_pass_is_the_papers_formulas(family, stable, adapters):
    base = build(family, do_stable_layer_norm=stable)
    model = adapted(family=family, base={"do_stable_layer_norm": stable}, adapters=adapters)
    tensors = get_peft_model_state_dict(model)
    assert sum("elp_e" in name for name in tensors) == 2 * 6  # all layers but the last
    lengths = (2000, 1300, 900)
    waveform, mask = waveforms(lengths)
    with torch.no_grad():
        logits = result(model(waveform, attention_mask=mask))
        for row, length in enumerate(lengths):
            expected = reference(base, tensors, waveform[row, :length])
            torch.testing.assert_close(logits[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
