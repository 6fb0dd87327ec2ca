import os

import pytest
import torch

# models and inputs, and what test_compile.py runs elsewhere
collect_ignore = ["backbones.py", "families.py", "families_towers.py", "compiled.py", "exported.py"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def one_thread():
    # The workers of a parallel run share the cores; tiny tensors gain nothing from more threads.
    torch.set_num_threads(1)
