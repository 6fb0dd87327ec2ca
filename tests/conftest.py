import os

import pytest
import torch

# Models, inputs and what is run on them, no tests.
collect_ignore = [
    "backbones.py",
    "families.py",
    "families_towers.py",
    "compiled.py",
    "conformance.py",
    "count_conformance.py",
    "hub.py",
]
pytest.register_assert_rewrite("conformance")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def one_thread():
    # The workers of a parallel run share the cores; tiny tensors gain nothing from more threads.
    torch.set_num_threads(1)
