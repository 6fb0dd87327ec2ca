import os
from pathlib import Path

import pytest
import torch

# The other files hold models, inputs, servers and programs; --doctest-modules would collect them.
_HERE = Path(__file__).parent
collect_ignore = [str(file.relative_to(_HERE)) for file in _HERE.rglob("*.py") if not file.name.startswith("test_")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def one_thread():
    # The workers of a parallel run share the cores; tiny tensors gain nothing from more threads.
    torch.set_num_threads(1)
