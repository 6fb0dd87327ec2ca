"""Pseudo features are next to the frames of their utterance, on whichever side it is padded."""

import pytest
import torch
from backbones import ELP, result, shaken
from families import FAMILIES
from peft import get_peft_model

from peft_elp import ELPConfig
from peft_elp.adapters import PAdapter

LENGTHS = (24, 15, 9)


def padded(left):
    """Three utterances in one batch, and each of them alone."""
    torch.manual_seed(2)
    frames, mask = torch.zeros(3, 24, 10), torch.zeros(3, 24, dtype=torch.long)
    alone = [torch.randn(length, 10) for length in LENGTHS]
    for row, utterance in enumerate(alone):
        place = slice(24 - len(utterance), 24) if left else slice(0, len(utterance))
        frames[row, place], mask[row, place] = utterance, 1
    return frames, mask, alone


@pytest.mark.parametrize("position", ["prepend", "append"])
@pytest.mark.parametrize("left", [True, False], ids=["padded on the left", "padded on the right"])
@pytest.mark.parametrize("mixed", [False, True], ids=["one adapter", "mixed"])
def test_an_utterance_answers_in_a_padded_batch_as_alone(position, left, mixed):
    config = ELPConfig(p_position=position, **ELP)
    model = shaken(get_peft_model(FAMILIES["wav2vec2-bert"].model(), config)).eval()
    frames, mask, alone = padded(left)
    names = {"adapter_names": ["default"] * 3} if mixed else {}
    with torch.no_grad():
        together = result(model(input_features=frames, attention_mask=mask, **names))
        for row, utterance in enumerate(alone):
            own = result(model(input_features=utterance[None], attention_mask=torch.ones(1, len(utterance))))[0]
            at = slice(24 - len(utterance), 24) if left else slice(0, len(utterance))
            torch.testing.assert_close(together[row, at], own, atol=2e-5, rtol=1e-4)


# Which of the frames 0 to 3 are valid, and the frames with two pseudo features, 9.
JOINED = {
    "append": {"1111": "012399", "1100": "019923", "0011": "012399", "0000": "990123"},
    "prepend": {"1111": "990123", "1100": "990123", "0011": "019923"},
}


@pytest.mark.parametrize("position", JOINED)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_pseudo_features_join_each_utterance_and_leave_again(position, dtype):
    adapter = PAdapter(hidden_size=1, length=2, position=position)
    torch.nn.init.constant_(adapter.rows, 9.0)
    valid = torch.tensor([[int(frame) for frame in frames] for frames in JOINED[position]])
    expected = torch.tensor([[float(frame) for frame in frames] for frames in JOINED[position].values()])
    x = torch.arange(4.0).expand(len(valid), 4)[..., None]
    joined, mask, real = adapter(x, valid.to(dtype))
    assert torch.equal(joined[..., 0], expected)
    assert mask.dtype == dtype
    assert torch.equal(mask.bool(), (expected == 9) | valid.gather(1, expected.clamp(max=3).long()).bool())
    assert torch.equal(real.of(joined), x)
    assert torch.equal(adapter(x[:1], None)[0], joined[:1])


@pytest.mark.parametrize(("name", "length"), [("wav2vec2-conformer", 1), ("whisper", 1), ("sew", 2), ("sew-odd", 3)])
def test_the_default_is_the_shortest_length_that_the_encoder_takes(name, length):
    family = FAMILIES[name]
    model = get_peft_model(family.model(), ELPConfig(adapters="P", modules_to_save=[]))
    (rows,) = (p for n, p in model.named_parameters() if ".elp_p." in n)
    assert len(rows) == model.peft_config["default"].p_length == length
    with torch.no_grad():
        assert result(model(**family.inputs)).isfinite().all()
