import os

import pytest
import torch

# Models, inputs and programs, no tests.
collect_ignore = ["accelerated.py", "backbones.py", "compiled.py", "families.py", "families_towers.py", "zero.py"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def one_thread():
    # The workers of a parallel run share the cores; tiny tensors gain nothing from more threads.
    torch.set_num_threads(1)
