"""What stands around the step: precision, scaling, accumulation, clipping, compilation and more."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from kronewton import KFAC
from kronewton.errors import KronewtonWarning, UnsupportedError

ALL_FISHERS = pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
PINNED = {"lr": 0.5, "momentum": 0.3, "damping": 0.05, "trust_region": None}
Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batches(count: int, N: int = 6) -> list[Batch]:
    torch.manual_seed(2)
    return [(torch.randn(N, 3).double(), torch.randint(0, 4, (N,))) for _ in range(count)]


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Scaled:
    """A training with a GradScaler, or without one."""

    def __init__(self, scale: float | None, criterion: bool = True, **options) -> None:
        self.model, self.criterion = net(), nn.CrossEntropyLoss()
        self.optimizer = KFAC(self.model, self.criterion if criterion else None, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1, enabled=bool(scale))

    def backward(self, x: Tensor, y: Tensor, part: float = 1.0) -> None:
        self.scaler.scale(self.criterion(self.model(x), y) * part).backward()

    def step(self, *parts: Batch, clip: float = 0.0, zero: bool = True) -> Tensor:
        if zero:
            self.optimizer.zero_grad()
        else:
            self.model.zero_grad()
        N = sum(len(y) for _, y in parts)
        for x, y in parts:
            self.backward(x, y, len(y) / N)
        if clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return vector(self.model)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("options", [{}, PINNED, {"basis": "adam"}, {"refine": 2}])
@pytest.mark.parametrize(
    ("fisher", "criterion"),
    [("exact", True), ("sampled", True), ("empirical", True), ("empirical", False)],
)
def test_a_grad_scaler_changes_nothing(fisher, criterion, options, clip):
    if options.get("refine") and not criterion:
        pytest.skip("the dial needs a criterion")
    plain, scaled = (Scaled(s, criterion, fisher=fisher, **options) for s in (None, 1024.0))
    for batch in batches(5):
        one, other = plain.step(batch, clip=clip), scaled.step(batch, clip=clip)
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@ALL_FISHERS
def test_a_scaler_and_unequal_parts_are_the_batch(fisher):
    plain, scaled = (Scaled(s, fisher=fisher, **PINNED) for s in (None, 2.0**16))
    for x, y in batches(3):
        parts = [(x[:2], y[:2]), (x[2:], y[2:])]
        one, other = plain.step(*parts), scaled.step(*parts)
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("zero", [True, False])
@ALL_FISHERS
def test_a_step_that_a_scaler_leaves_out_commits_no_statistics(fisher, zero):
    options = {"fisher": fisher, "factor_every": 1, "inverse_every": 1, **PINNED}
    clean, hurt = (Scaled(s, **options) for s in (None, 1024.0))
    data = batches(4)
    for number, batch in enumerate(data):
        clean.step(batch, zero=zero)
        if number == 2:
            state = copy.deepcopy(hurt.optimizer.state_dict())
            before = vector(hurt.model)
            hurt.model.zero_grad() if not zero else hurt.optimizer.zero_grad()
            hurt.backward(*data[0])
            next(hurt.model.parameters()).grad[0, 0] = math.inf  # as an overflow leaves it
            hurt.scaler.step(hurt.optimizer)
            hurt.scaler.update()
            assert vector(hurt.model).equal(before)
            assert hurt.scaler.get_scale() == 512
            now = hurt.optimizer.state_dict()["state"]
            for index, entries in state["state"].items():
                for key in set(entries) - {"kfac_generator"}:
                    assert torch.equal(now[index][key].nan_to_num(), entries[key].nan_to_num())
        hurt.step(batch, zero=zero)
        if fisher != "sampled":  # whose draws for the batch that was left out are gone
            torch.testing.assert_close(
                vector(clean.model), vector(hurt.model), rtol=1e-7, atol=1e-9
            )
    assert bool(torch.isfinite(vector(hurt.model)).all())


def test_the_scale_of_the_next_step_is_its_own():
    run, plain = Scaled(1024.0, fisher="exact", **PINNED), Scaled(None, fisher="exact", **PINNED)
    for number, batch in enumerate(batches(4)):
        plain.step(batch)
        if number % 2:  # a step without the scaler in between
            run.optimizer.zero_grad()
            run.criterion(run.model(batch[0]), batch[1]).backward()
            run.optimizer.step()
        else:
            run.step(batch)
        torch.testing.assert_close(vector(run.model), vector(plain.model), rtol=1e-7, atol=1e-9)
    assert run.optimizer._step_supports_amp_scaling is False
