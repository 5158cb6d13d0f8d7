"""One thread for each worker: small matrices on many threads are slower, and workers compete."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, and for commands that tests start

import pytest
import torch

torch.set_num_threads(1)


class DeviceGenerator(torch.Generator):
    """A generator that is on the default device if no other is said, as tensors are."""

    def __new__(cls, device=None):
        return super().__new__(cls, device or torch.get_default_device())


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests make their tensors, as in cuda")


def pytest_configure(config):
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))
        torch.Generator = DeviceGenerator


@pytest.fixture(autouse=True)
def default_device(request):
    """On a GPU, when asked: tensors of tests, while the package is to follow them by itself."""
    if request.config.getoption("--device") != "cpu":
        torch.set_default_device(request.config.getoption("--device"))


@pytest.fixture
def float64():
    """Seeded, and float64 wherever no dtype is said."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
