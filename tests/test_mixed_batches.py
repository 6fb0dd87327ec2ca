"""A batch whose utterances use different adapters answers as each utterance does alone with its adapter."""

from functools import partial

import pytest
import torch
from backbones import ELP, HEADS, NORMS, build, encoded, has, result, shaken, waveforms
from families import FAMILIES, cases
from peft import get_peft_model

from peft_elp import ELPConfig
from peft_elp.call.route import Route

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
ADAPTERS = {
    "all": {"adapters": "ELP"},
    "narrow": {"adapters": "ELP", "l_dim": 6, "p_length": 5, "l_layers": [0, 2]},
    "front": {"adapters": "P", "p_position": "prepend", "p_length": 2},
    "bottleneck": {"adapters": "E", "e_dim": 4, "e_after": ("feed_forward", "attention")},
    "sums": {"adapters": "L", "train_layer_norms": False},
    "residual": {"adapters": "LP", "l_output": "residual"},
}


PACKED = "packs utterances into one sequence"  # The end of the message names what cannot mix adapters.
CANNOT = {
    "glmasr": "take no attention mask",
    "qwen2_5_omni": PACKED,
    "qwen3_omni_moe": PACKED,
    "qwen3_asr": PACKED,
}


# Their convolutions let padding in, with or without adapters: pseudo features of different number move each other.
SENSITIVE = {"data2vec-audio", "seamless_m4t_v2", "wav2vec2-conformer", "wav2vec2-conformer-frames"}


def adapted(base, adapters=ADAPTERS, **options):
    """A model with all of the adapters, each one moved from where it starts."""
    model = None
    for name, own in adapters.items():
        config = ELPConfig(**ELP | options | own)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        shaken(model, seed=len(model.peft_config))  # another one for each
    return model.eval()


def alone(model, name, **inputs):
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return model(**inputs)
        model.set_adapter(name)
        return model(**inputs)


def mixed(model, names, **inputs):
    with torch.no_grad():
        return model(**inputs, adapter_names=names)


def assert_rows_agree(together, own, row, mask, name, atol=2e-5):
    """What a user may look at agrees: an output for each frame ends with the utterance."""
    frames = len(own[row])
    if own.dim() > 2 and mask is not None:
        frames = frames * int(mask[row].sum()) // mask.shape[1]
    torch.testing.assert_close(
        together[row][:frames], own[row][:frames], atol=atol, rtol=1e-4, msg=lambda message: f"{name}: {message}"
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("family", "stable"), NORMS)
def test_each_utterance_is_as_alone_with_its_adapter(family, stable, head):
    if not has(family, head):
        pytest.skip("a head that this family lacks")
    model = adapted(build(family, head, do_stable_layer_norm=stable))
    names = ["narrow", "__base__", "all", "front", "bottleneck", "sums", "residual", "all"]
    if family in SENSITIVE:
        names = ["bottleneck", "__base__", "sums"] * 2 + ["bottleneck"] * 2
    waveform, mask = waveforms((2000, 1300, 900, 1700, 2000, 1100, 1500, 1450))
    model.set_adapter("sums")  # whichever is active has no part in it
    together = result(mixed(model, names, input_values=waveform, attention_mask=mask))
    for row, name in enumerate(names):
        own = result(alone(model, name, input_values=waveform, attention_mask=mask))
        assert_rows_agree(together, own, row, mask, name)


def test_a_batch_without_padding_needs_no_mask():
    model = adapted(build("wavlm", "ForSequenceClassification"))
    waveform, _ = waveforms((1500,) * 4)
    names = ["all", "narrow", "__base__", "front"]
    together = result(mixed(model, names, input_values=waveform))
    for row, name in enumerate(names):
        own = result(alone(model, name, input_values=waveform))[row]
        torch.testing.assert_close(together[row], own, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", cases())
def test_every_family_mixes_adapters_or_says_why_not(name):
    family = FAMILIES[name]
    letters = family.adapters.replace("P", "") if name in SENSITIVE else family.adapters
    options = {
        "long": {"adapters": letters, **({"p_length": 6} if "P" in letters else {})},
        "short": {"adapters": "E"},
    }
    model = adapted(family.model(), options, **family.options)
    size = len(encoded(alone(model, "__base__", **family.inputs)))
    names = [("long", "__base__", "short")[row % 3] for row in range(size)]
    if name in CANNOT:
        with pytest.raises(ValueError, match=CANNOT[name]):
            mixed(model, names, **family.inputs)
        return
    together = encoded(mixed(model, names, **family.inputs))
    for row, adapter in enumerate(names):
        own = encoded(alone(model, adapter, **family.inputs))
        assert_rows_agree(together, own, row, family.inputs.get("attention_mask"), adapter, atol=5e-5)


# What is refused ----------------------------------------------------------------------------------------------------


def small():
    return adapted(build("wav2vec2", "ForCTC"), {"asr": {"adapters": "EL"}, "emotion": {"adapters": "L"}})


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["asr", "asr"], ValueError, r"holds 2 names, and the batch has the shape \(3, "),
        (["asr", "emotoin", "asr"], ValueError, "There is no adapter 'emotoin'; the model has 'asr', 'emotion'"),
        ("asr", TypeError, "one adapter name per utterance, got 'asr'"),
    ],
)
def test_names_that_do_not_fit_the_batch_are_refused(names, error, message):
    waveform, mask = waveforms()
    with pytest.raises(error, match=message):
        mixed(small(), names, input_values=waveform, attention_mask=mask)


def test_training_a_mixed_batch_is_refused():
    waveform, mask = waveforms()
    with pytest.raises(ValueError, match="for inference only"):
        mixed(small().train(), ["asr"] * 3, input_values=waveform, attention_mask=mask)


def test_a_loss_over_the_whole_batch_is_refused_where_a_head_computes_it():
    model = adapted(build("wavlm", "ForXVector"), {"one": {"adapters": "L"}, "two": {"adapters": "E"}})
    waveform, mask = waveforms((1300, 1300))
    with pytest.raises(ValueError, match=r"AMSoftmaxLoss.*call the model without labels"):
        mixed(model, ["one", "two"], input_values=waveform, attention_mask=mask, labels=torch.tensor([0, 1]))


def test_a_mixed_call_leaves_the_next_call_alone():
    model, (waveform, mask) = small(), waveforms()
    before = alone(model, "asr", input_values=waveform, attention_mask=mask).logits
    mixed(model, ["emotion", "asr", "__base__"], input_values=waveform, attention_mask=mask)
    with pytest.raises(ValueError, match="holds 2 names"):
        mixed(model, ["emotion"] * 2, input_values=waveform, attention_mask=mask)
    with torch.no_grad():
        assert torch.equal(model(waveform, attention_mask=mask).logits, before)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_mixes_adapters(beams):
    family = FAMILIES["whisper"]
    model = adapted(family.model(), {"one": {"adapters": "ELP"}, "two": {"adapters": "EP", "p_length": 5}})
    inputs = {"input_features": family.inputs["input_features"], "max_new_tokens": 5, "num_beams": beams}
    names = [("one", "two", "__base__")[row % 3] for row in range(len(inputs["input_features"]))]
    together = model.generate(**inputs, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                own = model.generate(**inputs)[row]
        else:
            model.set_adapter(name)
            own = model.generate(**inputs)[row]
        assert together[row].tolist() == own.tolist()


def long_recordings(lengths=(140, 60, 100)):
    """A Whisper for windows of 40 frames, and recordings that end after different numbers of windows."""
    base = FAMILIES["whisper"].model()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(5)  # Else the text hardly depends on the recording.
    model = adapted(base, {"one": {"adapters": "ELP"}, "two": {"adapters": "EP", "p_length": 5}})
    known = {"no_timestamps_token_id": 9, "is_multilingual": False, "max_initial_timestamp_index": 3}
    for name, value in known.items():
        setattr(model.generation_config, name, value)
    torch.manual_seed(0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    features = torch.randn(len(lengths), 8, max(lengths)) * mask[:, None]
    options = {"return_timestamps": True, "max_new_tokens": 6}
    return model, {"input_features": features, "attention_mask": mask, **options}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_generation_from_long_recordings_mixes_adapters(options):
    model, inputs = long_recordings()
    names = ["one", "two", "__base__"]
    together = model.generate(**inputs, **options, adapter_names=names)
    own = []
    for name in names:
        if name == "__base__":
            with model.disable_adapter():
                own.append(model.generate(**inputs, **options))
        else:
            model.set_adapter(name)
            own.append(model.generate(**inputs, **options))
    assert not torch.equal(own[0][0], own[1][0])
    for row in range(3):
        length = min(together.shape[1], own[row].shape[1])
        assert together[row, :length].tolist() == own[row][row, :length].tolist()
        assert not together[row, length:].any()  # Only padding follows.
        assert not own[row][row, length:].any()


@pytest.mark.parametrize("falls_back", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
def test_generation_may_fall_back_for_all_recordings_and_not_for_some(falls_back, monkeypatch):
    model, inputs = long_recordings()
    base = model.get_base_model()
    answers = iter(falls_back)
    monkeypatch.setattr(base, "_need_fallback", lambda *args: (next(answers, False), False))
    call = partial(model.generate, **inputs, temperature=(0.0, 0.5), adapter_names=["one", "two", "__base__"])
    if all(falls_back):
        assert len(call()) == 3
    else:
        with pytest.raises(ValueError, match="Nor can generation that falls back to other temperatures for some"):
            call()
    assert next(answers, "all asked for") == "all asked for"


def test_a_batch_that_lost_utterances_says_that_the_sizes_differ():
    route = Route(["one", "two", "one"], beams=2)
    assert route.check(torch.zeros(6, 4), axes=2) == 2
    for shape in ((2, 4), (4, 4), (9, 4), (3,)):
        with pytest.raises(ValueError, match=r"adapter_names holds 3 names, and the batch has the shape \(\d,"):
            route.check(torch.zeros(shape), axes=2)
