"""Training from cached features equals training on the recordings, and no layer of the encoder runs."""

import pytest
import torch
from backbones import ELP, build, call, result
from backbones import adapted as with_adapter
from peft import PeftModel
from test_depth import break_layers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from peft_elp import ELPConfig, FeatureCache

READER = ELP | {"adapters": "L", "train_layer_norms": False}
LENGTHS = (2000, 1300, 900, 1300)
CASES = [
    ("wav2vec2", "ForSequenceClassification", {}, {}),
    ("wav2vec2", "ForCTC", {"do_stable_layer_norm": True}, {}),
    ("hubert", "ForSequenceClassification", {}, {"l_layers": [0, 1], "l_output": "project"}),
    ("wavlm", "ForCTC", {}, {}),
    ("wavlm", "ForSequenceClassification", {"do_stable_layer_norm": True}, {"l_output": "residual"}),
    ("wavlm", "ForXVector", {}, {}),
]


class Recordings(torch.utils.data.Dataset):
    """Rows as a data set has them; each waveform is different."""

    def __init__(self, labels=(0, 1, 2, 3), lengths=LENGTHS):
        self.labels, self.lengths = labels, lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        torch.manual_seed(index)
        return {"audio": torch.randn(self.lengths[index]), "labels": torch.as_tensor(self.labels[index])}


def collate(rows):
    waveforms = [row["audio"] for row in rows]
    labels = [row["labels"] for row in rows]
    return {
        "input_values": pad_sequence(waveforms, batch_first=True),
        "attention_mask": pad_sequence([torch.ones(len(x)).long() for x in waveforms], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100)
        if labels[0].dim()
        else torch.stack(labels),
    }


def adapted(family="wavlm", head="ForSequenceClassification", base=None, **options):
    return with_adapter(head, family, base, **READER | options).train()


def read(model, folder, data=None, collate=collate, **options):
    """The cache of a model, and the rows of a data set through it."""
    cache = FeatureCache(model, folder, **options)
    return cache, cache.read(data or Recordings(), collate, progress=False)


def trained(model, batches, steps=3):
    """The losses and the trained tensors of a short training."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("family", "head", "base", "options"), CASES)
def test_training_from_the_cache_equals_training_on_the_recordings(family, head, base, options, tmp_path):
    data = Recordings(((1, 2), (3,), (4,), (5, 6)) if head == "ForCTC" else (0, 1, 2, 3))
    model = adapted(family, head, base, **options)
    cache, rows = read(model, tmp_path, data, dtype=torch.float32)
    live, cached = collate([data[1], data[3]]), cache.collate([rows[1], rows[3]])  # Frames of padding differ.
    torch.testing.assert_close(result(call(model.eval(), **cached)), result(call(model, **live)), rtol=1e-4, atol=1e-5)
    # The head for x-vectors counts padded frames.
    batches = [(1, 3)] if head == "ForXVector" else [(0, 1), (2, 3)]
    expected = trained(adapted(family, head, base, **options), [collate([data[i] for i in one]) for one in batches])
    model = adapted(family, head, base, **options)
    FeatureCache(model, tmp_path, dtype=torch.float32)
    break_layers(model, 0)  # They do not run.
    losses, tensors = trained(model, [cache.collate([rows[i] for i in one]) for one in batches])
    torch.testing.assert_close(losses, expected[0], rtol=1e-4, atol=1e-5)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-4)


def test_labels_may_be_for_a_loss_of_the_callers_own(tmp_path):
    _, rows = read(adapted(), tmp_path, Recordings([[0, 1]] * 4))
    assert rows[0]["labels"].tolist() == [0, 1]  # Two numbers for one recording: the head's own loss refuses them.


def test_trainer_trains_and_evaluates_from_the_cache(tmp_path):
    model = adapted()
    cache, rows = read(model, tmp_path / "features")
    break_layers(model, 0)
    args = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=2,
        max_steps=3,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_num_workers=1,
    )
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, data_collator=cache.collate)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(p.isfinite().all() for name, p in model.named_parameters() if name in before)
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert trainer.evaluate()["eval_loss"] > 0
    model.save_pretrained(tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(build("wavlm", "ForSequenceClassification"), tmp_path / "adapter").eval()
    live, cached = collate([Recordings()[0]]), cache.collate([rows[0]])  # as float16
    torch.testing.assert_close(call(fresh, **live).logits, call(model.eval(), **cached).logits, rtol=0.02, atol=0.02)


def test_rows_hold_no_recordings(tmp_path):
    _, rows = read(adapted(), tmp_path)
    held = [x for _, rest in rows.rows for name, x in rest.items() if name != "labels"]
    assert [tuple(x.shape) for x in held] == [(length,) for length in LENGTHS for _ in range(2)]
    assert {x.untyped_storage().nbytes() for x in held} == {4, 8}  # one float32, one int64


def test_what_is_saved_is_not_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_elp.feature_cache.RECORDINGS_PER_FILE", 2)
    calls = []
    compute = FeatureCache._features
    monkeypatch.setattr(FeatureCache, "_features", lambda self, batch: calls.append(1) or compute(self, batch))

    def interrupted(rows):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return collate(rows)

    model = adapted()
    with pytest.raises(KeyboardInterrupt):
        read(model, tmp_path, collate=interrupted)
    assert len(calls) == 3  # Of which two are in a file.
    _, first = read(model, tmp_path)
    assert len(calls) == 5
    _, again = read(adapted(), tmp_path)
    assert len(calls) == 5
    assert torch.equal(first[3]["cached_features"], again[3]["cached_features"])
    assert not list(tmp_path.rglob("*.unfinished"))
    # Another encoder, other layers, another dtype and another recording are other features.
    read(adapted(base={"num_hidden_layers": 2}), tmp_path)
    read(adapted(l_layers=[1]), tmp_path)
    read(model, tmp_path, dtype=torch.bfloat16)
    assert len(calls) == 17
    changed = adapted()
    nn.init.zeros_(changed.get_base_model().wavlm.encoder.layers[0].final_layer_norm.bias)
    read(changed, tmp_path)
    assert len(calls) == 21
    read(model, tmp_path, Recordings(lengths=(2000, 1301, 900, 1300)))
    assert len(calls) == 22


@pytest.mark.parametrize(
    ("options", "base", "message"),
    [
        ({"adapters": "EL"}, {}, "changes what the encoder computes"),
        ({"adapters": "LP"}, {}, "changes what the encoder computes"),
        ({"train_layer_norms": True}, {}, "changes what the encoder computes"),
        ({"adapters": "E"}, {}, "changes what the encoder computes"),
        ({}, {"mask_time_prob": 0.05}, "masks its features at random .*mask_time_prob=0.05.*apply_spec_augment=False"),
        ({"l_output": "residual", "l_layers": [0]}, {}, "also reads the last layer"),
    ],
)
def test_what_cannot_be_cached_is_refused(options, base, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        FeatureCache(adapted(base=base, **options), tmp_path / "features")
    assert not (tmp_path / "features").exists()


def test_other_mistakes_are_refused(tmp_path):
    model = adapted()
    for options in ({"dtype": torch.int8}, {"adapter_name": "nobody"}):
        with pytest.raises(ValueError, match=r"float32, float16 or bfloat16|nobody"):
            FeatureCache(model, tmp_path, **options)
    noise = iter(range(100))

    def noisy(rows):
        return {**collate(rows), "input_values": torch.full((1, 2000), float(next(noise)))}

    with pytest.raises(ValueError, match="Row 0 differs when it is read twice"):
        read(model, tmp_path, collate=noisy)
    with pytest.raises(ValueError, match="Row 2 differs when it is read twice"):
        read(model, tmp_path, collate=lambda rows: (noisy if len(rows[0]["audio"]) == 900 else collate)(rows))
    cache, rows = read(model, tmp_path)
    model.add_adapter("other", ELPConfig(**ELP))
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"\['other'\] have no FeatureCache"):
        model(**cache.collate([rows[0]]))
    one = adapted(l_layers=[1])
    FeatureCache(one, tmp_path)
    batch = cache.collate([rows[0]])
    batch["cached_features"].pop("1")
    with pytest.raises(ValueError, match=r"of the layers \[0, 2\], and adapter 'default' reads \[1\]"):
        one(**batch)
