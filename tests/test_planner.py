"""What the planner makes of noise, and of a step that was worse than it promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kronewton as kn
from kronewton.adapt import Pace, Settings
from kronewton.batches import Batches
from kronewton.plan import Plan
from kronewton.planner import EARLY, RAISE, RISEN, Planner
from kronewton.quadratic import flattened
from kronewton.renewals import (
    CALM_RENEWALS,
    DECAY,
    QUIET_DECAY,
    RENEWALS,
    decay,
    intervals,
)

pytestmark = pytest.mark.usefixtures("float64")


def planner_of(**options: Any) -> Planner:
    optimizer = kn.KFAC(nn.Linear(3, 2), nn.MSELoss(), **options)
    planner = optimizer._planner
    assert planner is not None
    optimizer.close()
    return planner


def with_noise(planner: Planner, average: float, last: float | None) -> Planner:
    planner.settings, planner.noise = Settings(0.1, 0.1, noise=average), last
    return planner


@pytest.mark.parametrize(
    ("options", "average", "last", "intervals", "decay"),
    [
        ({}, 0.0, None, (5, 20), DECAY),  # nothing is known
        ({}, 0.0, 0.0, (2, 10), QUIET_DECAY),
        ({"refine": 2}, 0.0, 0.0, (1, 4), 0.0),
        ({"refine": 2}, 0.0, None, (5, 20), DECAY),
        ({}, 0.5, 0.5, (10, 40), DECAY),
        ({}, 0.5, 0.0, (10, 40), DECAY),  # one quiet step among loud ones
        ({}, 0.0, 0.5, (5, 20), DECAY),  # loud, and the average has not heard of it
        ({"damping": 0.1}, 0.0, 0.0, (5, 20), DECAY),  # never measured
        ({"factor_every": 3, "inverse_every": 7, "factor_decay": 0.2}, 0.0, 0.0, (3, 7), 0.2),
    ],
)
def test_renewals_and_memory_go_by_what_is_known_of_the_noise(
    options: dict[str, Any],
    average: float,
    last: float | None,
    intervals: tuple[int, int],
    decay: float,
) -> None:
    planner = with_noise(planner_of(**options), average, last)
    assert planner.intervals() == intervals
    assert planner.decay() == decay


def test_the_same_batch_again_is_known_to_be_without_noise_and_another_is_not() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 3), torch.randn(64, 2)
    for rows, known in (([slice(0, 64)], "none"), ([slice(0, 8), slice(8, 16)], "noise")):
        model, criterion = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), nn.MSELoss()
        optimizer = kn.KFAC(model, criterion, basis="factored")
        for step in range(4):
            part = rows[step % len(rows)]
            optimizer.zero_grad()
            criterion(model(x[part]), y[part]).backward()
            optimizer.step()
        assert optimizer._planner._known() == known


def test_the_same_examples_in_another_order_are_the_same_batch() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 3).float(), torch.randn(64, 2).float()
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).float()
    criterion = nn.MSELoss()
    optimizer = kn.KFAC(model, criterion)
    for _ in range(6):
        order = torch.randperm(64)
        optimizer.zero_grad()
        criterion(model(x[order]), y[order]).backward()
        optimizer.step()
    assert float(optimizer.diagnostics()["noise"]) == 0
    assert not bool(optimizer.diagnostics()["normalised"])


def test_a_step_that_is_taken_back_raises_one_damping_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, criterion = nn.Linear(3, 2), nn.MSELoss()
    optimizer = kn.KFAC(model, criterion, basis="factored")
    x, y = torch.randn(16, 3), torch.randn(16, 2)
    planner, real = optimizer._planner, Planner.plan

    def too_far(self: Planner, *given: Any) -> Plan:
        plan = real(self, *given)
        return Plan(plan.direction, plan.lr * 30, plan.momentum, predicted=plan.predicted)

    monkeypatch.setattr(Planner, "plan", too_far)
    before = [p.detach().clone() for p in model.parameters()]
    criterion(model(x), y).backward()
    start = planner.curvature.scale
    optimizer.step()
    assert planner.undone == 1
    for p, q in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), q)
    assert start == 0
    # Both started from the same trial; the rule, asked first, had raised λ a little already.
    assert planner.settings.damping >= RAISE * planner.settings.inverse_damping


@pytest.mark.parametrize(
    ("options", "asked"), [({}, 5), ({"refine": 1}, 6), ({"adapt_every": 2}, 4)]
)
def test_lambda_is_asked_about_every_fifth_step_and_with_the_dial_every_step(
    options: dict[str, Any], asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), nn.MSELoss()
    optimizer, calls = kn.KFAC(model, criterion, basis="factored", **options), []
    rule = type(optimizer._planner.rule)
    real = rule.update
    monkeypatch.setattr(rule, "update", lambda self, *g: calls.append(1) or real(self, *g))
    x, y = torch.randn(64, 3), torch.randn(64, 2)
    for _ in range(6):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    assert len(calls) == asked


@pytest.mark.parametrize("options", [{}, {"refine": 2}, {"basis": "eigen"}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_reaches_zero_stays_there(seed: int, options: dict[str, Any]) -> None:
    """A saturated softmax has neither gradient nor curvature, and nothing is to be made of that."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4)).float()
    criterion = nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, criterion, **options)
    x, y = torch.randn(8, 20).float(), torch.randint(0, 4, (8,))
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses[40:]) <= 1e-5
    assert max(float(p.detach().abs().max()) for p in model.parameters()) <= 1e3


@pytest.mark.parametrize("factor", [1e3, 1e4])
def test_a_first_batch_that_saturates_does_not_settle_the_damping(factor: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4)).float()
    criterion = nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, criterion)
    x, y = torch.randn(8, 20).float(), torch.randint(0, 4, (8,))
    for step in range(150):
        optimizer.zero_grad()
        loss = criterion(model(x * (factor if step == 0 else 1)), y)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) <= 1e-2


def test_renewals_start_afresh_with_a_new_kind_of_step() -> None:
    planner = with_noise(planner_of(), 2.0, 2.0)
    assert planner.age(37) == 37
    assert planner.settle(37, [], torch.zeros(1))
    assert (planner.normalising, planner.age(37)) == (True, 0)
    assert (planner.intervals(), planner.decay()) == (RENEWALS["early"], DECAY)
    planner.pace = planner.pacing.agreed(planner.pace, None)
    assert planner.age(38) == 1


def test_normalised_steps_renew_factors_half_as_often_after_the_first_and_remember_as_long() -> (
    None
):
    planner = with_noise(planner_of(), 2.0, 2.0)
    assert planner.settle(0, [], torch.zeros(1))
    (early, _), memory = planner.intervals(), planner.decay()
    for _ in range(EARLY):
        assert planner.intervals() == RENEWALS["early"]
        planner.pace = planner.pacing.agreed(planner.pace, None)
    assert planner.intervals() == RENEWALS["normalised"]
    assert planner.intervals()[0] == 2 * early
    assert planner.decay() == pytest.approx(memory**2)  # over as many steps
    planner.curvature.restless = 0.1
    assert planner.intervals() == CALM_RENEWALS
    given = with_noise(planner_of(factor_every=4), 2.0, 2.0)
    assert given.settle(0, [], torch.zeros(1))
    given.pace = planner.pace
    assert (given.intervals()[0], given.decay()) == (4, memory)  # the user's, and so as ever


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_trial_of_a_linear_model_has_the_bend_of_the_exact_quadratic_model(
    criterion: nn.Module,
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    optimizer = kn.KFAC(model, criterion)
    x, y = torch.randn(20, 6).double(), torch.randn(20, 3).double().softmax(1)
    criterion(model(x), y).backward()
    parts, _ = optimizer._watcher.collect()  # type: ignore[union-attr]
    assert optimizer._planner is not None
    batches = optimizer._planner.batches
    step = [0.1 * torch.randn_like(p) for p in model.parameters()]
    found = batches.quadratic(parts)
    line = found.line(step)
    exact = found.subspace(torch.zeros_like(line.flat), [line]).bend([1.0])
    trial = batches.trial(parts, step)
    assert trial.bend == pytest.approx(exact, rel=1e-10)
    with torch.no_grad():
        for p, d in zip(model.parameters(), step, strict=True):
            p.add_(d)
        assert trial.loss == pytest.approx(float(criterion(model(x), y)), rel=1e-12)


def test_the_first_bound_is_that_of_the_exact_quadratic_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    criterion, x, y = nn.CrossEntropyLoss(), torch.randn(20, 6).double(), torch.arange(20) % 3
    optimizer = kn.KFAC(model, criterion)
    criterion(model(x), y).backward()
    parts, _ = optimizer._watcher.collect()  # type: ignore[union-attr]
    planner, gradient = (
        optimizer._planner,
        flattened([p.grad for p in model.parameters() if p.grad is not None]),
    )
    assert planner is not None
    direction = [-torch.sign(p.grad) for p in model.parameters() if p.grad is not None]
    exact = planner.batches.quadratic(parts)
    found = exact.subspace(gradient, [exact.line(direction)])
    pace = planner._bounded(Pace(), parts, gradient, direction)
    assert pace.ceiling == pytest.approx(-found.slope[0] / found.bend([1.0]), rel=1e-2)


@pytest.mark.parametrize("where", ["outputs", "autocast", "parameters"])
def test_in_half_precision_the_first_bound_is_from_forward_mode(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(6, 3).float()
    if where == "parameters":
        model = nn.Sequential(model.bfloat16(), Widened())
    criterion, x, y = nn.CrossEntropyLoss(), torch.randn(20, 6).float(), torch.arange(20) % 3
    x = x.bfloat16() if where == "parameters" else x
    optimizer = kn.KFAC(model, criterion)
    assert optimizer._planner is not None
    asked: list[Any] = []
    real = optimizer._planner.batches.quadratic
    monkeypatch.setattr(
        optimizer._planner.batches, "quadratic", lambda parts: asked.append(parts) or real(parts)
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=where != "parameters"):
        output = model(x)
        loss = criterion(output.float() if where == "autocast" else output, y)
    loss.backward()
    optimizer.step()
    assert len(asked) == 1


class Widened(nn.Module):
    """Half precision that does not show in the output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


DEAR = [0, 5, 25, 50], [0, 5, 25, 50]  # factors and bases
LEAPT = [0, 1, 5, 25, 50], [0, 1, 5, 25, 50]
CHEAP = [0, 1, 2, 4, 8, 12, 16, 24, 32, 40, 48], [0, 1, 2, 4, 8, 16, 20, 40]


@pytest.mark.parametrize(
    ("rows", "noise", "options", "steps"),
    [
        (64, 9.0, {}, DEAR),
        (64, 0.0, {}, LEAPT),
        (64, 9.0, {"lr": 0.01}, LEAPT),  # how far the first step went is not known
        (8192, 9.0, {}, CHEAP),
        (8192, 0.0, {}, CHEAP),
    ],
)
def test_renewals_are_seldom_where_they_take_longer_than_the_steps_between(
    rows, noise, options, steps
):
    """noise: in the targets. Without it the first step learns much of what there is to learn."""
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(20, 20), nn.Tanh()), nn.MSELoss()
    optimizer = kn.KFAC(model, criterion, basis="adam", **options)
    factors, bases = [], []
    for step in range(52):
        before = [float(f.A.count) for f in optimizer._curvature.factors.values()]
        basis = optimizer._curvature.inverses.get("0")
        x = torch.randn(rows, 20)
        optimizer.zero_grad()
        criterion(model(x), x.tanh() + noise * torch.randn(rows, 20)).backward()
        optimizer.step()
        if before != [float(f.A.count) for f in optimizer._curvature.factors.values()]:
            factors.append(step)
        if optimizer._curvature.inverses["0"] is not basis:
            bases.append(step)
    assert (factors, bases) == steps


def test_dear_factors_are_no_more_often_renewed_where_bases_rest_and_remember_as_long() -> None:
    options = planner_of().options
    assert intervals("normalised", 0.1, options) == CALM_RENEWALS
    assert intervals("normalised, dear", 0.1, options) == RENEWALS["normalised, dear"]
    assert decay("normalised, dear", options) == decay("normalised", options) == DECAY**2
    assert decay("early, dear", options) == decay("early", options) == DECAY


@pytest.mark.parametrize("c", [1.0, 1e3])
def test_a_first_step_may_lose_a_share_of_its_promise_and_a_later_one_the_loss(c: float) -> None:
    planner, most = planner_of(), RISEN * 4 * c
    assert 0 < RISEN < 1
    for steps, change, allowed in (
        (1, 0.9 * most, True),
        (1, 1.1 * most, False),
        (planner.pacing.first, 1.1 * most, False),
        (planner.pacing.first + 1, 1.1 * most, True),
        (planner.pacing.first + 1, 10.1 * c, False),
    ):
        planner.pace = Pace(steps=steps)
        assert planner._loss_allows(change, -4 * c, 10 * c, []) == allowed


@pytest.mark.parametrize("basis", ["auto", "adam"])
def test_a_batch_that_comes_again_has_new_factors_at_once_where_they_are_dear(basis):
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(20, 20), nn.Tanh()), nn.MSELoss()
    optimizer = kn.KFAC(model, criterion, basis=basis)
    x, y = torch.randn(1024, 20), 9 * torch.randn(1024, 20)  # so many that some are enough
    counts = []
    for _ in range(2):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        counts.append(float(optimizer._curvature.factors["0"].A.count))
        if len(counts) == 1:
            planner = optimizer._planner
            assert planner.curvature.dear
            assert not planner.pacing.leapt(planner.pace, planner.lr)
    assert counts[1] > counts[0]


class TwoOutputs(nn.Module):
    """Counts how often it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.runs = nn.Linear(20, 20), 0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.runs += 1
        y = self.body(x)
        return y, y.square()


class OneInside(nn.Module):
    """Has a criterion of its own, beside the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.inner = nn.Linear(20, 20), nn.MSELoss()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.body(x)
        return y.tanh(), self.inner(y, x)


def test_a_criterion_inside_the_model_and_one_outside_are_both_tried() -> None:
    torch.manual_seed(0)
    model, outer = OneInside(), nn.MSELoss()
    optimizer = kn.KFAC(model, (model.inner, outer), basis="adam")
    x, y = torch.randn(64, 20), torch.rand(64, 20)
    for _ in range(3):
        optimizer.zero_grad()
        output, inner = model(x)
        (inner + outer(output, y)).backward()
        optimizer.step()
    assert optimizer.diagnostics()["skipped"] == 0
    assert optimizer._planner is not None
    assert optimizer._planner.noise == 0  # what was tried is the loss that came


def test_a_model_with_two_criteria_is_run_once_for_a_trial(monkeypatch) -> None:
    torch.manual_seed(0)
    model, first, second = TwoOutputs(), nn.MSELoss(), nn.SmoothL1Loss()
    optimizer = kn.KFAC(model, (first, second), basis="adam")
    x, real, tried = torch.randn(64, 20), Batches.trial, []

    def trial(batches, parts, step):
        model.runs = 0
        found = real(batches, parts, step)
        runs = model.runs
        there = {n: p + d for (n, p), d in zip(model.named_parameters(), step, strict=True)}
        y, squares = torch.func.functional_call(model, there, x)
        loss = first(y, x) + 0.5 * second(squares, x)
        tried.append((runs, found.loss == pytest.approx(float(loss), rel=1e-5)))
        return found

    monkeypatch.setattr(Batches, "trial", trial)
    y, squares = model(x)
    (first(y, x) + 0.5 * second(squares, x)).backward()
    optimizer.step()
    assert len(tried) > 1
    assert set(tried) == {(1, True)}
