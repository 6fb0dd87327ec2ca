import os
from pathlib import Path

import torch

# The other files hold models, inputs, servers and programs; --doctest-modules would collect them.
_HERE = Path(__file__).parent
collect_ignore = [str(file.relative_to(_HERE)) for file in _HERE.rglob("*.py") if not file.name.startswith("test_")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The workers of a parallel run share the cores; tiny tensors gain nothing from more threads, here and in programs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
