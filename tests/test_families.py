"""One set of promises, kept by every family of speech encoders in the table."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from backbones import ELP, NORMS, build, encoded, result, shaken
from families import FAMILIES, cases
from family import Around
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_elp import ELPConfig
from peft_elp.backbones import BACKBONES

# Of LASR's own convolution.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
CASES = pytest.mark.parametrize("name", cases())


def outputs(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options)


def adapted(name, adapters=None, attention="eager", **options):
    family = FAMILIES[name]
    config = ELPConfig(adapters=adapters or family.adapters, **ELP | family.options | options)
    return get_peft_model(family.model(attention), config)


def gradients(model, inputs):
    loss = result(model(**inputs)).square().sum()
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def subsets(name):
    letters = FAMILIES[name].adapters
    return [*letters, letters]


@CASES
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_adapter_gets_a_gradient_and_nothing_else_does(name, attention):
    family = FAMILIES[name]
    base = family.model()
    supported = all(m._supports_sdpa for m in base.modules() if isinstance(m, PreTrainedModel))
    if attention == "sdpa" and not supported:
        pytest.skip("eager only, in Transformers")
    for adapters in subsets(name):
        model = shaken(adapted(name, adapters, attention), std=0.05).train()
        found = gradients(model, family.inputs)
        for parameter, gradient in found.items():
            assert gradient is not None, (adapters, parameter)
            assert gradient.isfinite().all(), (adapters, parameter)
            assert gradient.abs().max() > 0, (adapters, parameter)
        for letter, part in (("E", ".elp_e."), ("L", ".elp_l."), ("P", ".elp_p.")):
            assert any(part in parameter for parameter in found) == (letter in adapters)


@CASES
def test_attention_implementations_agree(name):
    family = FAMILIES[name]
    if not all(m._supports_sdpa for m in family.model().modules() if isinstance(m, PreTrainedModel)):
        pytest.skip("eager only, in Transformers")
    eager, sdpa = (
        encoded(outputs(shaken(adapted(name, attention=attention)), family.inputs)) for attention in ("eager", "sdpa")
    )
    mask = family.inputs.get("attention_mask")
    # Frames of padding see nothing or anything, as the implementation has it; only those of the longest are compared.
    longest = slice(None) if mask is None or eager.dim() < 3 else slice(0, 1)
    torch.testing.assert_close(sdpa[longest], eager[longest], atol=1e-4, rtol=1e-4)


@CASES
def test_shapes_are_those_without_adapters(name):
    family = FAMILIES[name]
    before = outputs(family.model(), family.inputs, output_hidden_states=True)
    after = outputs(adapted(name), family.inputs, output_hidden_states=True)
    assert result(after).shape == result(before).shape
    for key in ("hidden_states", "encoder_hidden_states"):
        if before.get(key):
            assert [x.shape for x in after[key]] == [x.shape for x in before[key]], key


@CASES
def test_every_letter_changes_what_the_encoder_hears(name):
    family = FAMILIES[name]
    before = encoded(outputs(family.model(), family.inputs))
    for letter in family.adapters:
        model = shaken(adapted(name, letter, train_layer_norms=False, modules_to_save=[]), std=3.0)
        assert not torch.allclose(encoded(outputs(model, family.inputs)), before, atol=2e-6, rtol=0), letter


@CASES
def test_switched_off_and_unloaded_adapters_leave_no_trace(name):
    family = FAMILIES[name]
    base = family.model()
    expected = result(outputs(base, family.inputs))
    modules = [(n, type(m), m.training) for n, m in base.named_modules()]
    tensors = {n: x.clone() for n, x in base.state_dict().items()}
    model = shaken(get_peft_model(base, ELPConfig(adapters=family.adapters, **ELP | family.options)))
    with model.disable_adapter():
        torch.testing.assert_close(result(outputs(model, family.inputs)), expected, atol=1e-5, rtol=1e-5)
    unloaded = model.unload()
    assert unloaded is base
    assert [(n, type(m), m.training) for n, m in base.named_modules()] == modules
    assert all(torch.equal(x, tensors[n]) for n, x in base.state_dict().items())
    torch.testing.assert_close(result(outputs(base, family.inputs)), expected, atol=1e-5, rtol=1e-5)


@CASES
def test_a_trained_adapter_loads_with_the_same_bits(name, tmp_path):
    family = FAMILIES[name]
    model = adapted(name).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    result(model(**family.inputs)).square().mean().backward()  # in training, where batch norms would move
    optimizer.step()
    expected = result(outputs(model.eval(), family.inputs))
    model.save_pretrained(tmp_path)
    # Trainable as the first: PyTorch picks some of its kernels by whether a weight requires a gradient.
    fresh = PeftModel.from_pretrained(family.model(), tmp_path, is_trainable=True).eval()
    assert torch.equal(result(outputs(fresh, family.inputs)), expected)


@CASES
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    family = FAMILIES[name]
    if not family.checkpointing:
        pytest.skip("Transformers has no gradient checkpointing for it")
    found = []
    for on in (False, True):
        model = shaken(adapted(name), std=0.05).train()
        base = model.get_base_model()
        if on:
            encoder = base.tower if isinstance(base, Around) else base
            encoder.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found.append(gradients(model, family.inputs))
    for parameter, gradient in found[0].items():
        torch.testing.assert_close(found[1][parameter], gradient, msg=parameter, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", cases(name for name, family in FAMILIES.items() if "attention_mask" in family.inputs))
def test_an_utterance_alone_is_as_in_a_padded_batch_where_the_backbone_has_it_so(name):
    family = FAMILIES[name]
    padded = family.inputs["attention_mask"]
    length = int(padded[1].sum())
    cut = {k: v[1:, :length] if v.shape[1:2] == padded.shape[1:] else v[1:] for k, v in family.inputs.items()}

    def difference(model):
        together, alone = result(outputs(model, family.inputs)), result(outputs(model, cut))
        return (together[1:, : alone.shape[1]] - alone).abs().max()

    own = difference(family.model())
    if own > 1e-5:
        pytest.skip("the backbone alone is not invariant to padding")
    # The head as it was: some heads convolve, and let padding in once their biases are not zero. Moonshine alone comes
    # to 9e-6, which is no rounding.
    assert difference(shaken(adapted(name, modules_to_save=[]))) < max(1e-5, 2 * own)


def test_a_skipped_last_layer_is_noticed_where_the_taps_end_in_it():
    model = adapted("sew").train()
    model.config.layerdrop = 0.99
    with pytest.raises(RuntimeError, match="layerdrop at 0"):
        model(**FAMILIES["sew"].inputs)


def test_batch_norms_of_the_frozen_backbone_stay_put():
    model = adapted("wav2vec2-conformer").train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert not any(m.training for m in norms)
    before = [m.running_mean.clone() for m in norms]
    model(**FAMILIES["wav2vec2-conformer"].inputs)
    assert all(torch.equal(m.running_mean, mean) for m, mean in zip(norms, before, strict=True))


@pytest.mark.parametrize("name", ["whisper", "speech_to_text", "speecht5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_hears_the_adapters_and_no_pseudo_features(name, beams):
    family = FAMILIES[name]
    inputs = {k: v for k, v in family.inputs.items() if k != "decoder_input_ids"}
    model = shaken(adapted(name))
    seen = []
    decoder = model.get_base_model().get_decoder() if name != "speecht5" else model.get_base_model().speecht5.decoder
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cached = model.generate(**inputs, **options)
        uncached = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached, uncached)
    frames = outputs(family.model(), family.inputs).encoder_last_hidden_state.shape[1]
    assert set(seen) == {frames}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("voxtral_realtime", {"adapters": "ELP"}, r"no P-adapter for VoxtralRealtimeEncoder: .*causal.*adapters='EL'"),
        ("granite_speech5", {"adapters": "ELP"}, r"no L-adapter for GraniteSpeech5Encoder: .*halve.*adapters='E'"),
        ("whisper", {"p_position": "prepend"}, "p_position='prepend' has no meaning for WhisperEncoder"),
        ("sew", {"p_length": 3}, r"SEWEncoder takes 2 frames as one.*multiple of 2, got 3. Write p_length=2"),
        ("sew", {"l_output": "head"}, "l_output='head' needs.*pools or up-samples"),
        ("whisper", {"target": "decoder"}, r"target='decoder' does not name.*model.encoder \(WhisperEncoder\)"),
    ],
)  # fmt: skip
def test_what_has_no_sound_place_is_refused_with_the_reason(name, options, message):
    if not FAMILIES[name].available:
        pytest.skip(f"new in Transformers {FAMILIES[name].since}")
    with pytest.raises(ValueError, match=message):
        adapted(name, **options)


@CASES
def test_a_family_has_the_stack_that_it_is_listed_for(name):
    family = FAMILIES[name]
    assert family.stack in {type(module).__name__ for module in family.model().modules()}


def test_every_row_of_the_table_is_tested():
    tested = {family.stack for family in FAMILIES.values()}
    tested |= {type(build(name, "Model", do_stable_layer_norm=stable).encoder).__name__ for name, stable in NORMS}
    assert set(BACKBONES) == tested


def test_the_pinned_transformers_has_every_family():
    constraints = (Path(__file__).parent.parent / "constraints.txt").read_text()
    pinned = max(
        Version(version) for version in re.findall(r"^transformers==([\d.]+)", constraints, flags=re.MULTILINE)
    )
    assert [name for name, family in FAMILIES.items() if Version(family.since) > pinned] == []
