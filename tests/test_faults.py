"""Faults on purpose: the weights stay finite, and training is back within forty good steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from kronewton import KFAC
from kronewton.errors import CriterionError, KronewtonError, KronewtonWarning

AFTER = 40  # good steps
WORSE = 1.5  # times the loss of a run without the fault
BASES = ("factored", "eigen", "corrected", "adam", "auto")


def constant(t: Tensor) -> Tensor:
    return torch.full_like(t, 0.5)


def rank_one(t: Tensor) -> Tensor:
    flat = t.reshape(len(t), -1) if t.dim() > 1 else t.reshape(1, -1)
    return (flat[:, :1] @ flat[:1]).reshape(t.shape)


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda t: torch.full_like(t, math.nan),
    "one nan": lambda t: t.clone().index_fill_(0, torch.tensor([0]), math.nan),
    "inf": lambda t: torch.full_like(t, math.inf),
    "huge": lambda t: t * 1e25,
    "denormal": lambda t: t * 1e-41,
    "zero": torch.zeros_like,
    "constant": constant,
    "rank one": rank_one,
    "empty": lambda t: t[:0],
}


class Task:
    """Batches of a task with noise, and a fault in one of them or in what is kept between them."""

    def __init__(self, regression: bool, **options) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(256, 6)
        scores = self.x @ torch.randn(6, 3) + 2 * torch.randn(256, 3)
        self.y = scores if regression else scores.argmax(1)
        self.model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 3))
        self.criterion: nn.Module = nn.MSELoss() if regression else nn.CrossEntropyLoss()
        self.optimizer = KFAC(self.model, self.criterion, **options)
        self.regression, self.number = regression, 0

    def batch(self) -> tuple[Tensor, Tensor]:
        at = (torch.arange(64) + 64 * self.number) % 256
        self.number += 1
        return self.x[at], self.y[at]

    def step(self, x: Tensor, y: Tensor, fault: Callable[[Tensor], Tensor] | None = None) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        for p in self.model.parameters() if fault is not None else ():
            p.grad = fault(p.grad)
        self.optimizer.step()
        assert all(bool(torch.isfinite(p).all()) for p in self.model.parameters())

    def good(self, count: int) -> None:
        for _ in range(count):
            self.step(*self.batch())

    def loss(self) -> float:
        return float(self.criterion(self.model(self.x), self.y).detach())

    def kept(self, what: str) -> Iterator[Tensor]:
        """The tensors of the running factors or of the inverses."""
        for layer in self.optimizer._layers:
            for key, t in self.optimizer._curvature.tensors(layer.name).items():
                total = key.startswith(("A_total", "B_total", "s_total"))
                if t.dim() and (total if what == "factor" else key.startswith("inverse_")):
                    yield t


def disturb(task: Task, where: str, fault: Callable[[Tensor], Tensor]) -> None:
    """One bad step, or a fault in what is kept."""
    if where in ("factor", "inverse"):
        for t in task.kept(where):
            t.copy_(fault(t))
        return
    x, y = task.batch()
    task.number -= 1  # the good steps see the same batches as without it
    if where == "input":
        task.step(fault(x), y if len(fault(x)) else y[:0])
    elif where == "target":
        task.step(x, fault(y))
    else:
        task.step(x, y, fault)


PLAIN: dict[tuple, float] = {}


def undisturbed(at: int, regression: bool, basis: str) -> float:
    if (at, regression, basis) not in PLAIN:
        task = Task(regression, basis=basis)
        task.good(at + AFTER)
        PLAIN[at, regression, basis] = task.loss()
    return PLAIN[at, regression, basis]


def recovers(task: Task, at: int, basis: str, where: str, fault: Callable) -> None:
    task.good(at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronewtonWarning)
        try:
            disturb(task, where, fault)
        except CriterionError as error:
            assert "empty batch" in str(error)
        task.good(AFTER)
    assert task.loss() <= WORSE * undisturbed(at, task.regression, basis)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("at", [0, 20])
@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("regression", [True, False])
def test_a_fault_in_the_input(regression, what, at, basis):
    recovers(Task(regression, basis=basis), at, basis, "input", FAULTS[what])


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("at", [0, 20])
@pytest.mark.parametrize("what", set(FAULTS) - {"empty"})
def test_a_fault_in_the_target(what, at, basis):
    recovers(Task(True, basis=basis), at, basis, "target", FAULTS[what])


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("at", [0, 20])
def test_a_batch_that_is_masked_everywhere(at, basis):
    def masked(y: Tensor) -> Tensor:
        return torch.full_like(y, -100)

    recovers(Task(False, basis=basis), at, basis, "target", masked)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("at", [0, 20])
@pytest.mark.parametrize("what", set(FAULTS) - {"empty"})
def test_a_fault_in_the_gradient(what, at, basis):
    recovers(Task(False, basis=basis), at, basis, "gradient", FAULTS[what])


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("at", [1, 20])
@pytest.mark.parametrize("what", set(FAULTS) - {"empty"})
@pytest.mark.parametrize("where", ["factor", "inverse"])
def test_a_fault_in_what_is_kept(where, what, at, basis):
    recovers(Task(False, basis=basis), at, basis, where, FAULTS[what])
