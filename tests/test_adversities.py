"""Losses and data that nobody wants, with nothing set: weights stay finite, and training recovers.

Batches of changing sizes and a shift in float64, in the middle of normalised steps, are in
test_normalised.py; a batch, a gradient or a state that is broken in test_faults.py.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kronewton import KFAC
from kronewton.errors import KronewtonWarning, SkippedError

REGRESSION = pytest.mark.parametrize("regression", [True, False])
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Formula = Callable[[Tensor], Tensor]


class Of(nn.Module):
    """A criterion of the output alone."""

    def __init__(self, of: Formula) -> None:
        super().__init__()
        self.of = of

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.of(output)


def as_it_is(output: Tensor) -> Tensor:
    return output


def nothing(output: Tensor) -> Tensor:
    return 0 * output


CONSTANT = {  # a criterion, and what of the output it is given
    "the criterion": (Of(lambda o: 0 * o.sum() + 1), as_it_is),
    "of the output": (nn.MSELoss(), nothing),
    "in steps": (nn.MSELoss(), torch.round),
}
WITHOUT_CURVATURE: dict[str, Formula] = {
    "linear": lambda o: o.mean(),
    "concave": lambda o: -o.square().mean(),
    "exponential": lambda o: -o.exp().mean(),
}
CURVED: dict[str, Formula] = {
    "cubic": lambda o: o.pow(3).mean(),
    "logarithm": lambda o: -o.abs().log().mean(),
}


class Task:
    """512 examples that can be learnt but for a little noise, in batches that are drawn."""

    def __init__(self, regression: bool, criterion: nn.Module | None = None, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(512, 6, generator=generator)
        scores = torch.tanh(self.x @ torch.randn(6, 3, generator=generator))
        scores += 0.1 * torch.randn(512, 3, generator=generator)
        self.y = scores if regression else scores.argmax(1)
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        self.criterion = criterion or (nn.MSELoss() if regression else nn.CrossEntropyLoss())
        self.optimizer = KFAC(self.model, self.criterion)
        self.generator = generator

    def drawn(self, size: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(512, (size,), generator=self.generator)
        return self.x[at], self.y[at]

    def step(self, x: Tensor, y: Tensor, of: Formula = as_it_is) -> None:
        """One step on what a formula of the output costs; the weights are looked at after it."""
        self.optimizer.zero_grad()
        self.criterion(of(self.model(x)), y).backward()
        try:
            self.optimizer.step()
        finally:
            assert bool(torch.isfinite(self.weights()).all())

    def steps(
        self, count: int, size: int = 64, change: Change | None = None, of: Formula = as_it_is
    ) -> Task:
        for _ in range(count):
            x, y = self.drawn(size)
            self.step(*((x, y) if change is None else change(x, y)), of)
        return self

    def loss(self, change: Change | None = None) -> float:
        x, y = (self.x, self.y) if change is None else change(self.x, self.y)
        return float(self.criterion(self.model(x), y).detach())

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Everything that was learnt is wrong."""
    return x, -y if y.is_floating_point() else (y + 1) % 3


# Losses.


@pytest.mark.parametrize("name", CONSTANT)
def test_a_loss_that_no_parameter_changes_moves_nothing_and_says_so(name):
    criterion, of = CONSTANT[name]
    task = Task(True, criterion)
    before = task.weights()
    with pytest.warns(KronewtonWarning, match=r"no finite curvature .* loss that is constant"):
        task.steps(50, of=of)
    with pytest.raises(SkippedError, match=r"51 steps in a row .* loss that is constant"):
        task.steps(1, of=of)
    assert task.weights().equal(before)


@pytest.mark.parametrize("after", [0, 40])
@REGRESSION
def test_after_thirty_steps_of_a_constant_loss_forty_good_ones_are_enough(regression, after):
    task, plain = Task(regression).steps(after), Task(regression).steps(after + 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronewtonWarning)
        task.steps(30, of=nothing)
    task.steps(40)
    assert task.loss() < 1.5 * plain.loss()


@pytest.mark.parametrize("name", WITHOUT_CURVATURE)
@pytest.mark.filterwarnings("ignore::kronewton.errors.KronewtonWarning")
def test_a_loss_without_a_floor_or_curvature_is_told_what_it_lacks(name):
    task = Task(True, Of(WITHOUT_CURVATURE[name]))
    before = task.weights()
    with pytest.raises(SkippedError, match=r"no finite curvature .* linear or concave in"):
        task.steps(51)
    assert task.weights().equal(before)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("name", CURVED)
@pytest.mark.filterwarnings("ignore::kronewton.errors.KronewtonWarning")
def test_a_loss_without_a_floor_is_followed_down_in_finite_weights(name, every):
    task = Task(True, Of(CURVED[name]))
    start = task.loss()
    with contextlib.suppress(SkippedError):  # once it overflows
        for _ in range(100):
            task.step(*(task.drawn(64) if every else (task.x, task.y)))
    assert task.loss() < start - 0.1


# Data.


@REGRESSION
def test_labels_of_pure_noise_teach_nothing_and_are_forgotten_in_sixty_steps(regression):
    def noise(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(y), generator=task.generator)
        return x, y[order]

    task = Task(regression)
    guessed = float(task.y.var()) if regression else math.log(3)
    worst = max(task.steps(10, change=noise).loss(noise) for _ in range(10))
    assert 0.9 * guessed < worst < 1.5 * guessed
    assert task.steps(60).loss() < 1.5 * Task(regression).steps(60).loss()


@REGRESSION
def test_another_batch_size_in_every_step_costs_less_than_three_times_the_loss(regression):
    task, plain = Task(regression), Task(regression).steps(100)
    for k in range(100):
        task.steps(1, size=1 + 37 * k % 64)  # one example among them
    assert task.loss() < 3 * plain.loss()


@pytest.mark.parametrize(("regression", "times"), [(True, 3.0), (False, 1.5)])
def test_after_a_shift_forty_batches_lead_near_to_where_they_do_from_the_start(regression, times):
    found = []
    for seed in range(5):
        task = Task(regression, seed=seed).steps(100)
        task.steps(40, change=turned)
        fresh = Task(regression, seed=seed).steps(40, change=turned)
        found.append(task.loss(turned) / fresh.loss(turned))
    assert statistics.median(found) < times


def test_after_a_shift_without_noise_twenty_steps_bring_the_loss_back():
    task = Task(True)
    for _ in range(100):
        task.step(task.x, task.y)
    before = task.loss()
    for _ in range(20):
        task.step(*turned(task.x, task.y))
    assert task.loss(turned) < 2 * before


@pytest.mark.parametrize("seed", range(3))
def test_after_a_shift_of_a_full_batch_that_was_fitted_sixty_steps_are_better_than_guessing(seed):
    task = Task(False, seed=seed)
    for _ in range(150):
        task.step(task.x, task.y)
    assert task.loss() < 1e-2  # the curvature went with the loss
    for _ in range(60):
        task.step(*turned(task.x, task.y))
    assert task.loss(turned) < 0.5 * math.log(3)


def test_a_loss_whose_sign_turns_is_said_and_ends_in_an_error():
    task = Task(False)
    for _ in range(30):
        task.step(task.x, task.y)
    before = task.weights()

    def climb() -> None:
        for _ in range(60):
            task.optimizer.zero_grad()
            (-task.criterion(task.model(task.x), task.y)).backward()
            task.optimizer.step()

    with pytest.raises(SkippedError, match=r"concave there.*maximize=True"):
        climb()
    assert torch.equal(task.weights(), before)
