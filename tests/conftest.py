"""One thread for each worker: small matrices on many threads are slower, and workers compete."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, and for commands that tests start

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def float64():
    """Seeded, and float64 wherever no dtype is said."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
