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
from backbones import waveforms
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
    assert found[1].keys() == adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(found[1][name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("adapters", accelerated.SETS)
def test_two_processes_train_as_one_with_any_set_of_adapters(adapters, found):
    expected = accelerated.trained(Accelerator(cpu=True), accelerated.adapted(adapters))
    for process in of(found, f"set {adapters}"):
        assert_same_training(process, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_in_two_processes(use_reentrant, found):
    expected = accelerated.trained(Accelerator(cpu=True), accelerated.adapted("EL", "wav2vec2"))
    for process in of(found, f"checkpointing {use_reentrant}"):
        assert_same_training(process, expected)


@pytest.mark.parametrize("adapters", ["E", "EP"])
def test_layerdrop_is_off_while_processes_train_layers_together_and_said_once(adapters, found):
    expected = accelerated.trained(Accelerator(cpu=True), accelerated.adapted(adapters, "wav2vec2", layerdrop=0.0))
    for losses, adapter, said in of(found, f"layerdrop {adapters}"):
        assert_same_training((losses, adapter), expected)
        assert len(said) == 1
        assert said[0].startswith("LayerDrop (config.layerdrop=0.5) is off while adapters inside the encoder layers")


def test_layerdrop_stays_where_nothing_in_the_layers_is_trained(found):
    without, _ = accelerated.trained(Accelerator(cpu=True), accelerated.adapted("P", "wav2vec2", layerdrop=0.0))
    (losses, first, said), (_, second, _) = of(found, "layerdrop P")
    assert not said
    assert losses != pytest.approx(without, abs=1e-4)
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


def test_layerdrop_stays_in_one_process():
    model = accelerated.adapted("E", "wav2vec2", layerdrop=0.5)
    model(waveforms()[0])
    assert model.get_base_model().config.layerdrop == 0.5


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="PyTorch 2.6 shards on no CPU")
@pytest.mark.parametrize("family", ["wavlm", "wav2vec2"])
def test_sharded_training_gives_the_same_losses_and_the_same_file(family, found, folder):
    expected = accelerated.trained(Accelerator(cpu=True), accelerated.adapted("ELP", family))
    processes = of(found, f"sharded {family}")
    adapter = load_file(folder / f"sharded-{family}" / "adapter_model.safetensors")
    for losses, units in processes:
        assert units == 3  # encoder layers
        assert_same_training((losses, adapter), expected)


def test_trainer_in_two_processes_saves_the_adapter_of_one(found, folder, tmp_path):
    expected = accelerated.trainer(tmp_path)
    for losses in of(found, "trainer"):
        assert losses == pytest.approx(expected, abs=1e-4)  # Trainer rounds what it logs
    for part in ("checkpoint-2", "."):
        adapter = load_file(tmp_path / part / "adapter_model.safetensors")
        saved = load_file(folder / "trainer" / part / "adapter_model.safetensors")
        assert saved.keys() == adapter.keys()
        for name, tensor in adapter.items():
            torch.testing.assert_close(saved[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


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
