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


def labels_for(head):
    if head == "ForCTC":
        return ((1, 2), (3,), (4,), (5, 6))
    return (0, 1, 2, 3)


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
    data = Recordings(labels_for(head))
    model = adapted(family, head, base, **options)
    cache = FeatureCache(model, tmp_path, dtype=torch.float32)
    rows = cache.read(data, collate, progress=False)
    same_length = [(1, 3)]  # Frames of padding differ.
    live, cached = collate([data[1], data[3]]), cache.collate([rows[1], rows[3]])
    torch.testing.assert_close(result(call(model.eval(), **cached)), result(call(model, **live)), rtol=1e-4, atol=1e-5)
    # The head for x-vectors counts padded frames.
    batches = same_length if head == "ForXVector" else [(0, 1), (2, 3)]
    found = []
    for from_cache in (False, True):
        model = adapted(family, head, base, **options)
        if from_cache:
            FeatureCache(model, tmp_path, dtype=torch.float32)
            break_layers(model, 0)  # They do not run.
        made = [
            cache.collate([rows[number] for number in numbers])
            if from_cache
            else collate([data[number] for number in numbers])
            for numbers in batches
        ]
        found.append(trained(model, made))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor, rtol=1e-3, atol=1e-4)


def test_labels_may_be_for_a_loss_of_the_callers_own(tmp_path):
    model = adapted()
    rows = FeatureCache(model, tmp_path).read(Recordings([[0, 1]] * 4), collate, progress=False)
    assert rows[0]["labels"].tolist() == [0, 1]  # Two numbers for one recording: the head's own loss refuses them.


def test_trainer_trains_and_evaluates_from_the_cache(tmp_path):
    model = adapted()
    cache = FeatureCache(model, tmp_path / "features")
    rows = cache.read(Recordings(), collate, progress=False)
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
    live = collate([Recordings()[0]])
    with torch.no_grad():  # Cached as float16.
        expected = model.eval()(**cache.collate([rows[0]])).logits
        torch.testing.assert_close(fresh(**live).logits, expected, rtol=0.02, atol=0.02)


def test_rows_hold_no_recordings(tmp_path):
    rows = FeatureCache(adapted(), tmp_path).read(Recordings(), collate, progress=False)
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
        FeatureCache(model, tmp_path).read(Recordings(), interrupted, progress=False)
    assert len(calls) == 3  # Of which two are in a file.
    first = FeatureCache(model, tmp_path).read(Recordings(), collate, progress=False)
    assert len(calls) == 5
    again = FeatureCache(adapted(), tmp_path).read(Recordings(), collate, progress=False)
    assert len(calls) == 5
    assert torch.equal(first[3]["cached_features"], again[3]["cached_features"])
    assert not list(tmp_path.rglob("*.unfinished"))
    # Another encoder, other layers, another dtype and another recording are other features.
    FeatureCache(adapted(base={"num_hidden_layers": 2}), tmp_path).read(Recordings(), collate, progress=False)
    FeatureCache(adapted(l_layers=[1]), tmp_path).read(Recordings(), collate, progress=False)
    FeatureCache(model, tmp_path, dtype=torch.bfloat16).read(Recordings(), collate, progress=False)
    assert len(calls) == 17
    changed = adapted()
    nn.init.zeros_(changed.get_base_model().wavlm.encoder.layers[0].final_layer_norm.bias)
    FeatureCache(changed, tmp_path).read(Recordings(), collate, progress=False)
    assert len(calls) == 21
    FeatureCache(model, tmp_path).read(Recordings(lengths=(2000, 1301, 900, 1300)), collate, progress=False)
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
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        FeatureCache(model, tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match="nobody"):
        FeatureCache(model, tmp_path, adapter_name="nobody")
    cache = FeatureCache(model, tmp_path)

    noise = iter(range(100))

    def third_noisy(rows):
        return noisy(rows) if len(rows[0]["audio"]) == 900 else collate(rows)

    def noisy(rows):
        return {**collate(rows), "input_values": torch.full((1, 2000), float(next(noise)))}

    with pytest.raises(ValueError, match="Row 0 differs when it is read twice"):
        cache.read(Recordings(), noisy, progress=False)
    with pytest.raises(ValueError, match="Row 2 differs when it is read twice"):
        cache.read(
            Recordings(), lambda rows: (noisy if len(rows[0]["audio"]) == 900 else collate)(rows), progress=False
        )
    rows = cache.read(Recordings(), collate, progress=False)
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
