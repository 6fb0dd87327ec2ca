"""What saving writes into a folder, and what is left there when it fails."""

import pytest
import torch
from backbones import ELP, adapted, build, waveforms
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from untouched import logits

from peft_elp import ELPConfig

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
HEAD = "ForSequenceClassification"


@pytest.fixture(scope="module")
def older():
    """Tapped layers differ from those of `newer`, and no shape does."""
    return adapted(HEAD, l_layers=[0, 1], e_activation="relu")


@pytest.fixture(scope="module")
def newer():
    return adapted(HEAD, l_layers=[1, 2], e_activation="gelu")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answer(folder):
    return logits(PeftModel.from_pretrained(build("wavlm", HEAD), folder).eval())


def test_a_second_save_takes_the_place_of_the_first(older, newer, tmp_path):
    older.save_pretrained(tmp_path)
    newer.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == {CONFIG, WEIGHTS, CARD}
    torch.testing.assert_close(answer(tmp_path), logits(newer))


def test_weights_of_two_formats_are_refused_until_one_is_removed(older, newer, tmp_path):
    older.save_pretrained(tmp_path)
    message = r"holds both adapter_model\.safetensors and adapter_model\.bin, from two saves\. Remove the older one"
    with pytest.warns(UserWarning, match=message):
        newer.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=message):
        answer(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.testing.assert_close(answer(tmp_path), logits(newer))


class WithBatchNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = build("wavlm", "Model")
        self.norm = torch.nn.BatchNorm1d(24)

    def forward(self, waveform, attention_mask):
        hidden_states = self.encoder(waveform, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.norm(hidden_states.mean(1))}


def test_a_head_with_a_batch_norm_is_saved_with_its_counter(tmp_path):
    model = get_peft_model(WithBatchNorm(), ELPConfig(modules_to_save=["norm"], **ELP))
    model.train()(*waveforms())
    model.eval().save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["base_model.model.norm.num_batches_tracked"] == 1
    loaded = PeftModel.from_pretrained(WithBatchNorm(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(*waveforms()), model(*waveforms()))


def test_a_process_that_is_not_the_main_one_writes_nothing(newer, tmp_path):
    newer.save_pretrained(tmp_path, is_main_process=False)
    assert contents(tmp_path) == {}


def test_a_card_that_cannot_be_written_costs_no_adapter(newer, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_elp.saved.card._text", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match="is saved in .*, but its card could not be written: division by zero"):
        newer.save_pretrained(tmp_path)
    torch.testing.assert_close(answer(tmp_path), logits(newer))
