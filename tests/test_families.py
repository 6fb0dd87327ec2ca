"""One set of promises, kept by every family of speech encoders in the table: two ways to an answer give the same."""

import copy
import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones import answer, call, encoded, result, shaken
from families import FAMILIES, cases
from family import Around
from packaging.version import Version
from peft import PeftModel
from torch import nn

from peft_elp import FeatureCache, find_encoder, hotswap_adapter, prune_taps, speed_up_frozen
from peft_elp.backbones import BACKBONES, REFUSED
from peft_elp.tuner.stack import ELPStack

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),  # LASR's own
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),  # frozen convolutions
]
CASES = pytest.mark.parametrize("name", cases())
TAPPED = pytest.mark.parametrize("name", cases(lambda family: "L" in family.adapters))
MASKED = pytest.mark.parametrize("name", cases(lambda family: "attention_mask" in family.inputs))
CLOSE = {"atol": 5e-5, "rtol": 1e-4}
READER = {"adapters": "L", "train_layer_norms": False, "l_output": "project"}
PACKED = "packs utterances into one sequence"
CANNOT_MIX = {
    "glmasr": "take no attention mask",
    **dict.fromkeys(("qwen2_5_omni", "qwen3_omni_moe", "qwen3_asr"), PACKED),
}
# What follows their encoder needs more of it than features, or than its features without the inputs.
NOT_CACHED = {"moonshine", "nemotron3_5_transcribe", "nemotron3_diarization-chunks", "qwen3_asr"}
NOT_CACHED |= {"omniasr-generation", "omniasr-model", "seamless_m4t", "seamless_m4t_v2"}
CALL_TWICE = {"nemotron3_5_transcribe", "nemotron3_diarization-chunks"}  # their encoder, within one call
# Their convolutions let padding in, with or without adapters: pseudo features of different number move each other.
SENSITIVE = {"data2vec-audio", "seamless_m4t_v2", "wav2vec2-conformer", "wav2vec2-conformer-frames"}


def output(model: nn.Module, name: str, **options: Any) -> Any:
    with torch.no_grad():
        return model(**FAMILIES[name].inputs, **options)


def loss_of(model: nn.Module, name: str) -> torch.Tensor:
    inputs = FAMILIES[name].inputs
    if "XVector" in FAMILIES[name].model_class:  # its objective is a part of the head
        return model(**inputs, labels=torch.arange(3)).loss
    return result(model(**inputs)).square().mean()


def gradients(model: nn.Module, name: str) -> dict[str, Any]:
    loss_of(model, name).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def layers_of(model: nn.Module) -> list[Any]:
    stack = next(module for module in model.modules() if isinstance(module, ELPStack))
    return [layer.base_layer for layer in stack.encoder_layers]


# Training -----------------------------------------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_adapter_gets_a_gradient_and_nothing_else_does(name, attention):
    family = FAMILIES[name]
    if attention == "sdpa" and not family.has_sdpa():
        pytest.skip("eager only, in Transformers")
    for letters in {*(family.adapters if attention == "eager" else ()), family.adapters}:
        model = shaken(family.adapted(attention, adapters=letters), std=0.05).train()
        found = gradients(model, name)
        for parameter, gradient in found.items():
            assert gradient is not None, (letters, parameter)
            assert gradient.isfinite().all(), (letters, parameter)
            assert gradient.abs().max() > 0, (letters, parameter)
            assert ".elp_" in parameter or "modules_to_save" in parameter
        for letter, part in (("E", ".elp_e."), ("L", ".elp_l."), ("P", ".elp_p."), ("EL", ".elp_norm.")):
            assert any(part in parameter for parameter in found) == bool(set(letter) & set(letters)), part
        assert {n for n, p in model.named_parameters() if p.grad is not None} <= found.keys()


@CASES
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    family = FAMILIES[name]
    row = find_encoder(family.plain()).family
    if not family.checkpointing or (reentrant and not row.reentrant_checkpointing):
        pytest.skip("Transformers has no such gradient checkpointing for it")
    found = []
    for on in (False, True):
        model = shaken(family.adapted(), std=0.05).train()
        base = model.get_base_model()
        if on:
            encoder = base.tower if isinstance(base, Around) else base
            encoder.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found.append(gradients(model, name))
    for parameter, gradient in found[0].items():
        torch.testing.assert_close(found[1][parameter], gradient, msg=parameter, atol=1e-4, rtol=1e-3)


# One adapter in several ways ----------------------------------------------------------------------------------------


@CASES
def test_an_adapter_answers_alike_however_it_came_there(name, tmp_path):
    family = FAMILIES[name]
    model: Any = shaken(family.adapted()).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss_of(model, name).backward()  # in training, where batch norms would move
    optimizer.step()
    expected = result(output(model.eval(), name))
    model.save_pretrained(tmp_path)
    copied = copy.deepcopy(model)
    model.add_weighted_adapter(["default"], [1.0], "mean")
    model.set_adapter("mean")
    torch.testing.assert_close(result(output(model, name)), expected, msg=lambda text: f"averaged: {text}")
    # Trainable as the first: PyTorch picks some of its kernels by whether a weight requires a gradient.
    loaded, lean = (
        PeftModel.from_pretrained(family.model(), tmp_path, "mine", is_trainable=True, low_cpu_mem_usage=lean).eval()
        for lean in (False, True)
    )
    swapped = shaken(family.adapted(), seed=9).eval()
    hotswap_adapter(swapped, str(tmp_path))
    for way, other in {"copied": copied, "loaded": loaded, "loaded lean": lean, "swapped in": swapped}.items():
        assert torch.equal(result(output(other, name)), expected), way


@CASES
def test_attention_implementations_agree(name):
    family = FAMILIES[name]
    if not family.has_sdpa():
        pytest.skip("eager only, in Transformers")
    eager, sdpa = (encoded(output(shaken(family.adapted(attention)), name)) for attention in ("eager", "sdpa"))
    # Frames of padding see nothing or anything, as the implementation has it; only those of the longest are compared.
    longest = slice(0, 1) if "attention_mask" in family.inputs and eager.dim() > 2 else slice(None)
    torch.testing.assert_close(sdpa[longest], eager[longest], atol=1e-4, rtol=1e-4)


@CASES
def test_frozen_layers_that_are_sped_up_answer_alike(name):
    base = FAMILIES[name].model().requires_grad_(False)
    expected = encoded(output(base, name))
    torch.testing.assert_close(encoded(output(speed_up_frozen(base), name)), expected)


# What a call reports ------------------------------------------------------------------------------------------------


@CASES
def test_shapes_are_those_without_adapters_whatever_is_reported(name):
    family = FAMILIES[name]
    model = shaken(family.adapted()).eval()
    before, after = (output(module, name, output_hidden_states=True) for module in (family.model(), model))
    assert result(after).shape == result(before).shape
    for key in ("hidden_states", "encoder_hidden_states"):
        if before.get(key):
            assert [x.shape for x in after[key]] == [x.shape for x in before[key]], key
    torch.testing.assert_close(result(output(model, name)), result(after))


# The start of the head for x-vectors is too small to tell.
@pytest.mark.parametrize("name", cases(lambda family: "XVector" not in family.model_class))
def test_every_letter_changes_what_the_encoder_hears(name):
    family = FAMILIES[name]
    before = encoded(output(family.model(), name))
    for letter in family.adapters:
        model = shaken(family.adapted(adapters=letter, train_layer_norms=False, modules_to_save=[]), std=3.0)
        assert not torch.allclose(encoded(output(model, name)), before, atol=2e-6, rtol=0), letter


# The batch ----------------------------------------------------------------------------------------------------------


@MASKED
@pytest.mark.parametrize("position", ["append", "prepend"])
def test_an_utterance_alone_is_as_in_a_padded_batch_where_the_backbone_has_it_so(name, position):
    family = FAMILIES[name]
    if position == "prepend" and ("P" not in family.adapters or find_encoder(family.plain()).family.front_end_inside):
        pytest.skip("refused")
    if find_encoder(family.plain()).family.window:
        pytest.skip("a fixed window: see test_own_frames.py")
    padded = family.inputs["attention_mask"]
    length = int(padded[1].sum())
    cut = {k: v[1:2, :length] if v.shape[1:2] == padded.shape[1:] else v[1:2] for k, v in family.inputs.items()}

    def difference(model):
        together, alone = result(output(model, name)), answer(model, **cut)
        return (together[1:2, : alone.shape[1]] - alone).abs().max()

    own = difference(family.model())
    if own > 1e-5:
        pytest.skip("the backbone alone is not invariant to padding")
    # The head as it was: some heads convolve, and let padding in once their biases are not zero. Moonshine alone comes
    # to 9e-6, which is no rounding.
    options = {"modules_to_save": [], "p_position": position}
    assert difference(shaken(family.adapted(**options))) < max(1e-5, 2 * own)


@CASES
def test_the_order_of_a_batch_does_not_matter(name):
    family = FAMILIES[name]
    if CANNOT_MIX.get(name) == PACKED:
        pytest.skip("the backbone packs utterances into one sequence")
    model = shaken(family.adapted()).eval()
    turned = answer(model, **{key: x.flip(0) for key, x in family.inputs.items()})
    torch.testing.assert_close(turned.flip(0), answer(model, **family.inputs), **CLOSE)


@CASES
def test_a_mixed_batch_answers_row_by_row_or_says_why_not(name):
    family = FAMILIES[name]
    letters = family.adapters.replace("P", "") if name in SENSITIVE else family.adapters
    assert name not in SENSITIVE or find_encoder(family.plain()).family.feels_padding
    more = {"p_length": 3 * family.options.get("p_length", 2)} if "P" in letters else {}
    model = shaken(family.adapted(adapters=letters, **more))
    model.add_adapter("short", family.config(adapters="E", e_dim=4))
    model.set_adapter("short")
    shaken(model, seed=5).eval()
    size = len(next(iter(family.inputs.values()))) if "feature_lens" not in family.inputs else 2
    names = [("default", "__base__", "short")[row % 3] for row in range(size)]
    if name in CANNOT_MIX:
        with pytest.raises(ValueError, match=CANNOT_MIX[name]):
            output(model, name, adapter_names=names)
        return
    together, mask = encoded(output(model, name, adapter_names=names)), family.inputs.get("attention_mask")
    for row, adapter in enumerate(names):
        own = encoded(call(model, adapter, **family.inputs))
        frames = len(own[row])
        if own.dim() > 2 and mask is not None:  # an output for each frame ends with the utterance
            frames = frames * int(mask[row].sum()) // mask.shape[1]
        torch.testing.assert_close(together[row][:frames], own[row][:frames], **CLOSE)


# Taps ---------------------------------------------------------------------------------------------------------------


@TAPPED
def test_the_layers_above_the_last_tap_do_not_run(name):
    family = FAMILIES[name]
    options = READER | {"l_layers": [0], "adapters": "L" + "P" * ("P" in family.adapters)}
    model = shaken(family.adapted(**options), std=0.05).eval()
    layers = layers_of(model)
    handle = layers[-1].register_forward_hook(lambda *_: None)  # It wants to see the layer run.
    expected = result(output(model, name))
    handle.remove()
    for parameter in nn.ModuleList(layers[1:]).parameters():
        nn.init.constant_(parameter, torch.nan)
    assert torch.equal(result(output(model, name)), expected)


@TAPPED
def test_tasks_that_share_a_pass_answer_as_each_does_alone_or_say_why_not(name):
    family = FAMILIES[name]
    model = shaken(family.adapted(**READER)).eval()
    model.add_adapter("narrow", family.config(**READER | {"l_dim": 6, "l_layers": [0, 2]}))
    model.set_adapter("narrow")
    shaken(model, seed=5).eval()
    expected = {adapter: answer(model, adapter, **family.inputs) for adapter in ("default", "narrow")}
    calls = []
    layers_of(model)[1].register_forward_hook(lambda *_: calls.append(1))
    result(output(model, name))
    once = len(calls)  # some stacks run once for each chunk of the recording
    if name in CALL_TWICE:
        with pytest.raises(RuntimeError, match="calls its encoder more than once"):
            model.forward_all(["narrow", "default"], **family.inputs)
        return
    with torch.no_grad():
        together = model.forward_all(["narrow", "default"], **family.inputs)
    for adapter, found in together.items():
        torch.testing.assert_close(result(found), expected[adapter])
    assert len(calls) == 2 * once


@TAPPED
def test_an_adapter_pruned_to_all_of_its_weight_answers_alike(name):
    family = FAMILIES[name]
    model = shaken(family.adapted(**READER)).eval()
    stack = next(module for module in model.modules() if isinstance(module, ELPStack))
    stack.elp_l["default"].layer_weights.data = torch.tensor([0.7, 0.3, 0.0]).log()
    expected = result(output(model, name))
    assert prune_taps(model, "default", "short", keep=2) == [0, 1]
    torch.testing.assert_close(answer(model, "short", **family.inputs), expected)


@TAPPED
def test_cached_features_answer_as_the_recordings_do_or_say_why_not(name, tmp_path):
    family = FAMILIES[name]
    model = shaken(family.adapted(**READER), std=0.05).eval()
    if find_encoder(family.plain()).family.taps_end != "stack":
        with pytest.raises(ValueError, match="goes on after its layers"):
            FeatureCache(model, tmp_path)
        return
    cache = FeatureCache(model, tmp_path, dtype=torch.float32)
    rows = []
    for number in range(2):
        row = {key: x[number] for key, x in family.inputs.items()}
        if "attention_mask" in row and not find_encoder(family.plain()).family.window:  # without padding
            length = int(row["attention_mask"].sum())
            row = {key: x[:length] if len(x) == len(row["attention_mask"]) else x for key, x in row.items()}
        rows.append(row)
    read = partial(cache.read, rows, lambda rows: {key: x[None] for key, x in rows[0].items()}, progress=False)
    if name in NOT_CACHED:
        with pytest.raises(ValueError, match=r"cached features.* Train it without a cache"):
            read()
        return
    cached = read()
    for row, own in zip(rows, cached, strict=True):
        expected = answer(model, **{key: x[None] for key, x in row.items()})
        torch.testing.assert_close(answer(model, **cache.collate([own])), expected, rtol=1e-4, atol=1e-5)


# Single families ----------------------------------------------------------------------------------------------------


def test_a_skipped_last_layer_is_noticed_where_the_taps_end_in_it():
    model = FAMILIES["sew"].adapted().train()
    model.config.layerdrop = 0.99
    with pytest.raises(RuntimeError, match="layerdrop at 0"):
        model(**FAMILIES["sew"].inputs)


@pytest.mark.parametrize("name", ["whisper", "speech_to_text", "speecht5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_hears_the_adapters_and_no_pseudo_features(name, beams):
    family = FAMILIES[name]
    inputs = {k: v for k, v in family.inputs.items() if k != "decoder_input_ids"}
    model: Any = shaken(family.adapted())
    base = model.get_base_model()
    seen = []
    decoder = base.speecht5.decoder if name == "speecht5" else base.get_decoder()
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cached = model.generate(**inputs, **options)
        uncached = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached, uncached)
    assert set(seen) == {output(family.model(), name).encoder_last_hidden_state.shape[1]}


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
        FAMILIES[name].adapted(**options)


def test_an_unknown_encoder_is_described_by_a_guess():
    layer = lambda: nn.ModuleDict({"norm1": nn.LayerNorm(4), "mlp": nn.Linear(4, 4)})  # noqa: E731
    model = nn.Module()
    model.language_model = nn.ModuleList(nn.Linear(40, 40) for _ in range(9))
    model.audio_tower = nn.Module()
    model.audio_tower.config = SimpleNamespace(layerdrop=0.1)
    model.audio_tower.blocks = nn.ModuleList(layer() for _ in range(2))
    model.audio_tower.final_norm = nn.LayerNorm(4)
    guess = (
        r"model.get_submodule\('audio_tower'\).*layers='blocks', feed_forward=\('mlp',\), norms=\('norm1',\), "
        r"layerdrop='config.layerdrop', feature_encoder=None, pre_norm=True"
    )
    with pytest.raises(ValueError, match=f"(?s){guess}"):
        find_encoder(model)


@pytest.mark.parametrize("name", REFUSED)
def test_an_audio_model_that_cannot_be_adapted_is_refused_with_the_reason(name):
    model = nn.Sequential(type(name, (nn.Module,), {"__module__": "transformers.models"})())
    with pytest.raises(ValueError, match=re.escape(REFUSED[name])):
        find_encoder(model)


# The table ----------------------------------------------------------------------------------------------------------


def test_every_row_of_the_table_is_tested():
    stacks = {type(find_encoder(family.plain()).stack).__name__ for family in FAMILIES.values() if family.available}
    # What an older Transformers lacks is tested with a newer one.
    assert stacks == set(BACKBONES) or (
        stacks < set(BACKBONES) and not all(family.available for family in FAMILIES.values())
    )


def test_the_pinned_or_the_newest_transformers_has_every_family():
    constraints = (Path(__file__).parent.parent / "constraints.txt").read_text()
    pinned = re.findall(r"^transformers==([\d.]+)", constraints, flags=re.MULTILINE)
    newest = max(map(Version, [*pinned, "5.24"]))  # `make test-newest` installs 5.24 or a later one.
    assert [name for name, family in FAMILIES.items() if Version(family.since) > newest] == []
