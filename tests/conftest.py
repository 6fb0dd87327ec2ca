import os

import pytest
import torch

# Models, inputs, servers and programs: what matches test_*.py holds the tests.
collect_ignore_glob = ["[!t]*.py"]
pytest.register_assert_rewrite("conformance")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def one_thread():
    # The workers of a parallel run share the cores; tiny tensors gain nothing from more threads.
    torch.set_num_threads(1)
