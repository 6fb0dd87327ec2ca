"""Several processes: `accelerate launch` with two of them on a CPU, against one process with the same batches.

The processes are started once, and do everything that `accelerated.py` lists.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import accelerated
import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

# Sums over four utterances, added, against sums over eight, in float32.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# Trainer warns of settings that concern the machine, not the model.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


def started(launcher, script, folder):
    """Run one of the programs in two processes."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-m", *launcher.split(), str(tests / script), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert run.returncode == 0, run.stderr[-5000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    # --multi_gpu is what starts several processes on one machine; `Accelerator(cpu=True)` keeps them off any GPU.
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    started(f"{launch} --mixed_precision no --dynamo_backend no", "accelerated.py", folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each process found."""
    return [torch.load(folder / f"{process}.pt", weights_only=True) for process in range(2)]


def of(found, name):
    for process in found:
        assert process["processes"] == 2
        assert not isinstance(process[name], str), process[name]
    return [process[name] for process in found]


def assert_same_training(found, expected):
    losses, adapter = expected
    assert len(losses) == accelerated.STEPS
    assert losses[0] != pytest.approx(losses[-1], abs=1e-4)
    assert found[0] == pytest.approx(losses, abs=1e-5)
    assert_same_tensors(found[1], adapter)


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# What one process trains, without checkpointing and LayerDrop, by the name of what two processes did.
ALONE = {name: (run["adapters"], run.get("family", "wavlm")) for name, run in accelerated.RUNS.items()}
if not torch.__version__.startswith("2.6"):  # which shards on no CPU
    ALONE |= {f"sharded {family}": ("ELP", family) for family in ("wavlm", "wav2vec2")}


@pytest.mark.parametrize("name", ALONE)
def test_two_processes_train_as_one(name, found, folder):
    expected = accelerated.trained(Accelerator(cpu=True), accelerated.adapted(*ALONE[name]))
    for losses, *rest in of(found, name):
        if name.startswith("sharded"):
            assert rest == [3]  # encoder layers
            rest = [load_file(folder / name.replace(" ", "-") / "adapter_model.safetensors")]
        assert_same_training((losses, rest[0]), expected)


def test_trainer_in_two_processes_saves_the_adapter_of_one(found, folder, tmp_path):
    expected = accelerated.trainer(tmp_path)
    for losses in of(found, "trainer"):
        assert losses == pytest.approx(expected, abs=1e-4)  # Trainer rounds what it logs
    for part in ("checkpoint-2", "."):
        adapter = load_file(tmp_path / part / "adapter_model.safetensors")
        assert_same_tensors(load_file(folder / "trainer" / part / "adapter_model.safetensors"), adapter)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_gives_the_same_losses_and_the_same_file(tmp_path):
    started("torch.distributed.run --standalone --nproc_per_node 2", "zero.py", tmp_path)
    expected = accelerated.trained(Accelerator(cpu=True), accelerated.adapted("ELP"))
    for stage in (2, 3):
        adapter = load_file(tmp_path / f"stage-{stage}" / "adapter_model.safetensors")
        for process in range(2):
            losses = torch.load(tmp_path / f"{process}.pt", weights_only=True)[stage]
            assert_same_training((losses, adapter), expected)


def test_adapters_are_saved_whole_from_inside_wrappers_of_torch():
    """Activation checkpointing and FSDP1 put them around layers: into the paths of modules, not of tensors."""
    model = accelerated.adapted()
    expected = get_peft_model_state_dict(model)
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "WavLMEncoderLayer")
    wrapped = [name for name, module in model.named_modules() if type(module).__name__ == "CheckpointWrapper"]
    assert len(wrapped) == 3  # one inside each of ELP's layers
    assert all(name.endswith(".base_layer") for name in wrapped)
    assert get_peft_model_state_dict(model).keys() == expected.keys()
