"""On a GPU the same is computed as on the CPU. All of this file is skipped where there is none."""

import warnings

import pytest
import torch
from backbones import ELP, adapted, answer, encoded, labels_for, result, shaken, waveforms
from families import FAMILIES, cases
from on_disk import adapted as adapted_on_disk
from on_disk import save_base
from torch.nn.functional import cross_entropy

from peft_elp import ELPConfig, FeatureCache
from peft_elp.speech.inference import SpeechAdapter

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]
GPU = "cuda"
ADAPTERS = ("E", "L", "P", "EL", "ELP")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convolutions in float32; by default, cuDNN rounds their inputs to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


CLASSES = FAMILIES["wav2vec2-stable-classes"]


def model_of(name, **options):
    return shaken(FAMILIES[name].adapted(**options), std=0.05)


def on_gpu(inputs):
    return {key: x.to(GPU) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}


def run(model, inputs):
    """What the encoder gives, and the gradients."""
    model.zero_grad()
    out = encoded(model(**inputs))
    result(model(**inputs)).float().square().sum().backward()
    return out.detach().cpu(), {n: p.grad.to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", cases())
def test_a_gpu_computes_what_the_cpu_does(name):
    model, inputs = model_of(name), FAMILIES[name].inputs
    out, gradients = run(model, inputs)
    found, found_gradients = run(model.to(GPU), on_gpu(inputs))
    torch.testing.assert_close(found, out, atol=1e-3, rtol=1e-3)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        assert (found_gradients[parameter] - gradient).abs().max() <= 1e-3 * scale, parameter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_every_adapter_trains_in_mixed_precision(adapters, dtype):
    model = model_of("wav2vec2-stable-classes", adapters=adapters).to(GPU).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer, scaler = torch.optim.AdamW(trained.values(), lr=1e-2), torch.amp.GradScaler(GPU, init_scale=2.0**8)
    labels = labels_for(model.get_base_model(), 3, 0).to(GPU)
    losses = []
    for _ in range(10):
        with torch.autocast(GPU, dtype):
            loss = cross_entropy(model(**on_gpu(CLASSES.inputs)).logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_a_training_step_waits_for_the_gpu_at_most_once_more_than_without_adapters(adapters):
    """The host runs ahead of a GPU until it needs a value from there, as to check that no utterance is too short."""

    def waits(model):
        inputs = on_gpu(CLASSES.inputs)
        model.train()
        for _ in range(2):  # The first step checks more.
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    result(model(**inputs)).square().sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    assert waits(model_of("wav2vec2-stable-classes", adapters=adapters).to(GPU)) <= 1 + waits(
        FAMILIES["wav2vec2-stable-classes"].model().to(GPU)
    )


def test_utterances_of_one_batch_may_have_different_adapters():
    model = model_of("wav2vec2-stable-classes").to(GPU).eval()
    model.add_adapter("second", ELPConfig(**ELP | {"adapters": "EL", "e_dim": 4}))
    model.set_adapter("second")
    shaken(model, seed=4)
    inputs, names = on_gpu(CLASSES.inputs), ["default", "second", "__base__"]
    with torch.no_grad():
        together = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(together[row], answer(model, name, **inputs)[row], atol=1e-4, rtol=1e-3)


def test_a_cache_of_features_trains_as_the_recordings_do(tmp_path):
    model = adapted("ForSequenceClassification", "hubert", adapters="L", train_layer_norms=False).to(GPU)
    rows = [{"input_values": x[:1300], "labels": torch.tensor(1)} for x in waveforms()[0][:2]]

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    cache = FeatureCache(model, tmp_path, dtype=torch.float32)
    cached = cache.read(rows, collate, progress=False)
    batch = cache.collate([cached[0], cached[1]])
    features = {layer: x.to(GPU) for layer, x in batch.pop("cached_features").items()}
    model.eval()
    found = model(**on_gpu(batch), cached_features=features).loss
    torch.testing.assert_close(found, model(**on_gpu(collate(rows))).loss, atol=1e-4, rtol=1e-3)


def test_a_speech_adapter_answers_on_a_gpu(tmp_path):
    base = save_base(tmp_path / "base")
    adapted_on_disk(base, "ForSequenceClassification").save_pretrained(tmp_path / "adapter")
    audio = list(torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)).numpy())
    on_cpu, found = (
        SpeechAdapter.from_pretrained(tmp_path / "adapter", device=device).classify(audio, 16_000, batch_size=3)
        for device in ("cpu", GPU)
    )
    for one, other in zip(on_cpu, found, strict=True):
        assert [answer["label"] for answer in other] == [answer["label"] for answer in one]
        assert [answer["score"] for answer in other] == pytest.approx([answer["score"] for answer in one], abs=1e-3)
