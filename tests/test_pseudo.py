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


def test_pseudo_features_come_right_before_the_first_valid_frame():
    adapter = PAdapter(hidden_size=1, length=2, position="prepend")
    torch.nn.init.constant_(adapter.rows, 9.0)
    x = torch.arange(8.0).reshape(2, 4, 1)
    joined, mask, real = adapter(x, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
    assert joined[..., 0].tolist() == [[0, 1, 9, 9, 2, 3], [9, 9, 4, 5, 6, 7]]
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert torch.equal(real.of(joined), x)


@pytest.mark.parametrize(("name", "length"), [("wav2vec2-conformer", 1), ("whisper", 1), ("sew", 2), ("sew-odd", 3)])
def test_the_default_is_the_shortest_length_that_the_encoder_takes(name, length):
    family = FAMILIES[name]
    model = get_peft_model(family.model(), ELPConfig(adapters="P", modules_to_save=[]))
    (rows,) = (p for n, p in model.named_parameters() if ".elp_p." in n)
    assert len(rows) == model.peft_config["default"].p_length == length
    with torch.no_grad():
        assert result(model(**family.inputs)).isfinite().all()
