"""Training under DeepSpeed's ZeRO in two processes on a CPU: `torchrun ... tests/zero.py <folder>`.

Run by test_accelerate.py, where DeepSpeed is installed.
"""

import sys
from pathlib import Path

import deepspeed  # pyright: ignore[reportMissingImports]
import torch
from accelerated import BATCH, adapted, examples, optimizer_of
from torch.utils.data import default_collate


def trained(stage, folder):
    """The mean loss of each step; the adapter goes into a file."""
    model = adapted("ELP")
    config = {
        "train_micro_batch_size_per_gpu": BATCH // 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # tiny ones are sharded too
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    data, losses = examples(), []
    for start in range(torch.distributed.get_rank() * BATCH // 2, len(data), BATCH):
        loss = engine(**default_collate(data[start : start + BATCH // 2])).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / 2)
    state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else None
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder / f"stage-{stage}", state_dict=state)
    return losses


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    folder = Path(sys.argv[1])
    found = {stage: trained(stage, folder) for stage in (2, 3)}
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")
