"""Transformers' Trainer with an adapted model: checkpoints, resuming, the best model."""

import shutil

import pytest
import torch
from backbones import ELP, build
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_elp import ELPConfig

# Trainer warns of settings that concern the machine, not the model.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


def examples(count, seed):
    """Noise, louder in one class than in the other."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_values": torch.randn(800, generator=generator) * (1 + 2 * (i % 2)), "labels": i % 2}
        for i in range(count)
    ]


def backbone():
    options = {"num_labels": 2, "hidden_dropout": 0.1, "mask_time_prob": 0.05, "mask_time_length": 2}
    return build("wav2vec2", "ForSequenceClassification", **options)


def adapted(**options):
    base = backbone()
    torch.manual_seed(5)
    return get_peft_model(base, ELPConfig(**ELP | options))


def trainer(model, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 7,
        }
        | options,
    )
    return Trainer(model, arguments, train_dataset=examples(16, 1), eval_dataset=examples(8, 2))


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_a_resumed_run_goes_on_as_an_uninterrupted_one(tmp_path):
    whole = trainer(adapted(), tmp_path / "whole")
    whole.train()
    resumed = trainer(adapted(), tmp_path / "resumed")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(whole)) == 8
    assert losses(resumed)[-4:] == losses(whole)[-4:]
    for (name, found), (_, expected) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=name)


def test_the_best_checkpoint_is_loaded_and_evaluated(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.05}
    run = trainer(adapted(), tmp_path, **options)
    run.train()
    evaluations = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = min(evaluations, key=evaluations.__getitem__)
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluations[best], abs=1e-6)
    loaded = PeftModel.from_pretrained(backbone(), run.state.best_model_checkpoint).eval()
    waveform = torch.stack([x["input_values"] for x in examples(4, 3)])
    with torch.no_grad():
        assert torch.equal(loaded(waveform).logits, run.model.eval()(waveform).logits)


@pytest.mark.parametrize("door", ["PEFT", "Transformers"])
def test_a_checkpoint_holds_the_adapter_only(door, tmp_path):
    model = adapted() if door == "PEFT" else backbone()
    if door == "Transformers":
        model.add_adapter(ELPConfig(**ELP))
    trainer(model, tmp_path, eval_strategy="no").train()
    names = {file.name for file in (tmp_path / "checkpoint-8").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= names
    assert not {"model.safetensors", "config.json"} & names
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (tmp_path / "checkpoint-8" / "adapter_model.safetensors").stat().st_size < 4 * trained + 20_000
    loaded = PeftModel.from_pretrained(backbone(), tmp_path / "checkpoint-8").eval()
    waveform = torch.stack([x["input_values"] for x in examples(4, 3)])
    with torch.no_grad():
        assert torch.equal(loaded(waveform).logits, model.eval()(waveform).logits)
    if door == "Transformers":
        with pytest.raises(ValueError, match="Can't find a checkpoint index"):  # it resumes a PeftModel only
            trainer(model, tmp_path, eval_strategy="no", max_steps=9).train(resume_from_checkpoint=True)
