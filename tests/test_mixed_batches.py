"""A batch whose utterances use different adapters answers as each utterance does alone with its adapter."""

from typing import Any

import pytest
import torch
from backbones import NORMS, answer, build, result, waveforms, with_adapters
from families import FAMILIES

from peft_elp.call.route import Route

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"adapters": "ELP"},
    "narrow": {"adapters": "ELP", "l_dim": 6, "p_length": 5, "l_layers": [0, 2]},
    "front": {"adapters": "P", "p_position": "prepend", "p_length": 2},
    "bottleneck": {"adapters": "E", "e_dim": 4, "e_after": ("feed_forward", "attention")},
    "sums": {"adapters": "L", "train_layer_norms": False},
    "residual": {"adapters": "LP", "l_output": "residual"},
}


def mixed(model, names, **inputs):
    with torch.no_grad():
        return model(**inputs, adapter_names=names)


@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification"])
@pytest.mark.parametrize(("family", "stable"), NORMS)
def test_each_utterance_is_as_alone_with_its_adapter(family, stable, head):
    model = with_adapters(build(family, head, do_stable_layer_norm=stable), **ADAPTERS)
    names = ["narrow", "__base__", "all", "front", "bottleneck", "sums", "residual", "all"]
    if family == "data2vec-audio":  # its convolutions over positions let padding in, with or without adapters
        names = ["bottleneck", "__base__", "sums"] * 2 + ["bottleneck"] * 2
    waveform, mask = waveforms((2000, 1300, 900, 1700, 2000, 1100, 1500, 1450))
    inputs = {"input_values": waveform, "attention_mask": mask}
    model.set_adapter("sums")  # whichever is active has no part in it
    together = result(mixed(model, names, **inputs))
    for row, name in enumerate(names):
        own = answer(model, name, **inputs)[row]
        frames = len(own) * int(mask[row].sum()) // mask.shape[1] if head == "ForCTC" else len(own)
        torch.testing.assert_close(together[row][:frames], own[:frames], atol=2e-5, rtol=1e-4)


# What is refused ----------------------------------------------------------------------------------------------------


def small():
    return with_adapters(build("wav2vec2"), asr={"adapters": "EL"}, emotion={"adapters": "L"})


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
    model = with_adapters(build("wavlm", "ForXVector"), one={"adapters": "L"}, two={"adapters": "E"})
    waveform, mask = waveforms((1300, 1300))
    with pytest.raises(ValueError, match=r"AMSoftmaxLoss.*call the model without labels"):
        mixed(model, ["one", "two"], input_values=waveform, attention_mask=mask, labels=torch.tensor([0, 1]))


def test_a_mixed_call_leaves_the_next_call_alone():
    model, (waveform, mask) = small(), waveforms()
    before = answer(model, "asr")
    mixed(model, ["emotion", "asr", "__base__"], input_values=waveform, attention_mask=mask)
    with pytest.raises(ValueError, match="holds 2 names"):
        mixed(model, ["emotion"] * 2, input_values=waveform, attention_mask=mask)
    assert torch.equal(answer(model), before)


def generated(model: Any, name: str, **inputs: Any) -> torch.Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model.generate(**inputs)
    model.set_adapter(name)
    return model.generate(**inputs)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_mixes_adapters(beams):
    model: Any = with_adapters(
        FAMILIES["whisper"].model(), one={"adapters": "ELP"}, two={"adapters": "EP", "p_length": 5}
    )
    features = FAMILIES["whisper"].inputs["input_features"]
    inputs = {"input_features": torch.cat([features, features[:1]]), "max_new_tokens": 5, "num_beams": beams}
    names = ["one", "two", "__base__"]
    together = model.generate(**inputs, adapter_names=names)
    for row, name in enumerate(names):
        assert together[row].tolist() == generated(model, name, **inputs)[row].tolist()


def test_generation_from_recordings_longer_than_the_window_is_refused():
    model: Any = with_adapters(FAMILIES["whisper"].model(), one={"adapters": "ELP"}, two={"adapters": "E"})
    config = model.get_base_model().generation_config
    config.no_timestamps_token_id, config.is_multilingual, config.max_initial_timestamp_index = 9, False, 3
    long = {"input_features": torch.randn(3, 8, 140), "attention_mask": (torch.arange(140) < 100).expand(3, -1).long()}
    long["attention_mask"][0, 60:] = 0
    with pytest.raises(ValueError, match="Nor can generation from recordings longer than the window"):
        model.generate(**long, return_timestamps=True, max_new_tokens=6, adapter_names=["one", "two", "__base__"])


def test_a_batch_that_lost_utterances_says_that_the_sizes_differ():
    route = Route(["one", "two", "one"], beams=2)
    assert route.check(torch.zeros(6, 4), axes=2) == 2
    for shape in ((2, 4), (4, 4), (9, 4), (3,)):
        with pytest.raises(ValueError, match=r"adapter_names holds 3 names, and the batch has the shape \(\d,"):
            route.check(torch.zeros(shape), axes=2)
