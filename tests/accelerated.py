"""Training in one process or in several: `accelerate launch ... tests/accelerated.py <folder>`.

Run by test_accelerate.py. What every check found is written to `<folder>/<process>.pt`. The tests run the same
functions in one process, on batches as large as those of all processes together.
"""

import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import InitProcessGroupKwargs
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from backbones import ELP, build, shaken, waveforms
from peft import get_peft_model, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from peft_elp import ELPConfig

STEPS, BATCH = 3, 8  # of all processes together


def examples():
    """Noise of several lengths, padded to one: the mean over the processes is the mean over the batch."""
    waveform, mask = waveforms((900, 700, 850, 600) * (STEPS * BATCH // 4))
    return [
        {"input_values": waveform[i], "attention_mask": mask[i], "labels": torch.tensor(i % 4)}
        for i in range(len(mask))
    ]


def adapted(adapters="ELP", family="wavlm", reentrant=None, **options):
    model = build(family, "ForSequenceClassification", **options)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return shaken(get_peft_model(model, ELPConfig(adapters=adapters, **ELP))).train()


RUNS = {f"set {letters}": {"adapters": letters} for letters in ("E", "L", "P", "EL", "EP", "LP", "ELP")}
RUNS |= {f"checkpointing {on}": {"adapters": "EL", "family": "wav2vec2", "reentrant": on} for on in (False, True)}
RUNS |= {f"layerdrop {one}": {"adapters": one, "family": "wav2vec2", "layerdrop": 0.5} for one in ("E", "EP")}


def optimizer_of(model):
    # A step of SGD is linear in the gradients; Adam's would blow up the rounding of those that are nearly zero.
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def steps(accelerator, model, optimizer):
    """The mean loss of each step."""
    loader = accelerator.prepare(DataLoader(examples(), batch_size=BATCH // accelerator.num_processes))
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.free_memory()  # else it keeps every model
    return losses


def trained(accelerator, model):
    """Losses, and the adapter as it would be saved."""
    wrapped, optimizer = accelerator.prepare(model, optimizer_of(model))
    return steps(accelerator, wrapped, optimizer), get_peft_model_state_dict(model)


def sharded(accelerator, family, layer, folder):
    """As `trained`, through FSDP2 on the units that Accelerate picks, and through a file."""
    model = adapted("ELP", family)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[layer]
    )
    plugin.set_auto_wrap_policy(model)
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model)
    units = [module for module in model.modules() if is_unit(module)]
    mesh = torch.distributed.init_device_mesh("cpu", (accelerator.num_processes,))
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh)
    losses = steps(accelerator, model, optimizer_of(model))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if accelerator.is_main_process:
        model.save_pretrained(folder, state_dict=state)
    return losses, len(units)


def trainer(folder, processes=1):
    """Transformers' Trainer on the same data, with a checkpoint in the middle; the losses that it logs."""
    options = {"max_steps": STEPS, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1, "save_steps": 2}
    options |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "ddp_find_unused_parameters": False}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=BATCH // processes, **options)
    model = adapted("ELP", "wav2vec2")
    # The loss is a mean over the batch. Trainer takes it for a share of all batches, and multiplies it by `processes`.
    model.get_base_model().accepts_loss_kwargs = False
    run = Trainer(model, arguments, train_dataset=examples())
    run.train()
    run.save_model()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def main(folder):
    torch.set_num_threads(1)
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=60))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[patience])
    found = {"processes": accelerator.num_processes}

    def check(name, function, *args):
        try:
            found[name] = function(*args)
        except Exception:
            found[name] = traceback.format_exc()

    for name, options in RUNS.items():
        check(name, lambda options: trained(accelerator, adapted(**options)), options)
    for family, layer in (("wavlm", "WavLMEncoderLayer"), ("wav2vec2", "Wav2Vec2EncoderLayer")):
        check(f"sharded {family}", sharded, accelerator, family, layer, folder / f"sharded-{family}")
    check("trainer", trainer, folder / "trainer", accelerator.num_processes)
    torch.save(found, folder / f"{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
