"""The dial from K-FAC to Newton, against dense damped Gauss-Newton steps."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import kronewton as kn
from kronewton import quadratic
from kronewton.errors import CriterionError, KronewtonWarning
from kronewton.quadratic import QuadraticModel

pytestmark = pytest.mark.usefixtures("float64")

SETTINGS: dict[str, Any] = {
    "trust_region": None,
    "fisher": "exact",
    "factor_every": 1,
    "inverse_every": 1,
}
GIVEN: dict[str, Any] = {"lr": 1.0, "momentum": 0.0}
CRITERION = nn.CrossEntropyLoss()


def batch(seed: int = 1, count: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 4, 4, generator=generator)
    return x, torch.randint(0, 4, (count,), generator=generator)


def conv_net(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Tanh(),
        *extra,
        nn.Conv2d(3, 2, 2, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def dense(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], criterion: nn.Module = CRITERION
) -> tuple[Tensor, Tensor]:
    """The gradient of the first batch and J'ΛJ, the mean over all of them."""
    names = [name for name, _ in model.named_parameters()]
    values = tuple(p.detach() for p in model.parameters())
    C = torch.zeros(())
    for x, y in batches:

        def output(*tensors: Tensor, x: Tensor = x) -> Tensor:
            return functional_call(model, dict(zip(names, tensors, strict=True)), (x,))

        z = output(*values)
        blocks = torch.autograd.functional.jacobian(output, values)
        J = torch.cat([b.reshape(z.numel(), -1) for b in blocks], 1)
        Lambda = torch.autograd.functional.hessian(lambda z, y=y: criterion(z, y), z)
        C = C + J.T @ Lambda.reshape(len(J), len(J)) @ J / len(batches)
    x, y = batches[0]
    g = torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
    return torch.cat([t.flatten() for t in g]), C


def newton(g: Tensor, C: Tensor, damping: float) -> Tensor:
    return -torch.linalg.solve(C + damping * torch.eye(len(g)), g)


def q(g: Tensor, C: Tensor, damping: float, d: Tensor) -> float:
    return float(g @ d + 0.5 * d @ (C @ d) + 0.5 * damping * d @ d)


def values_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def one_step(
    model: nn.Module, criterion: nn.Module = CRITERION, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The first step on the first batch, and what the optimizer says of it."""
    optimizer = kn.KFAC(model, criterion, **{**SETTINGS, **options})
    before, (x, y) = values_of(model), batch()
    criterion(model(x), y).backward()
    optimizer.step()
    optimizer.close()
    return values_of(model) - before, optimizer.diagnostics()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("how", [GIVEN, {}], ids=["lr given", "nothing set"])
@pytest.mark.parametrize("damping", [1e-1, 1e-3])
@pytest.mark.parametrize("basis", ["factored", "eigen", "corrected"])
@pytest.mark.parametrize("norms", [(), (nn.GroupNorm,)], ids=["conv", "with a norm"])
def test_far_along_it_is_the_damped_gauss_newton_step(norms, basis, damping, how):
    """With a norm, whose scale and shift have no factors: the dial is over all parameters."""
    extra = [norm(1, 3) for norm in norms]
    g, C = dense(conv_net(*extra), [batch()])
    found, told = one_step(conv_net(*extra), damping=damping, basis=basis, refine=400, **how)
    assert relative(found, newton(g, C, damping)) <= 1e-5
    assert 0 < told["refined"] < 400
    assert float(told["predicted"]) == pytest.approx(q(g, C, damping, found), rel=1e-9)


@pytest.mark.parametrize("how", [GIVEN, {}], ids=["lr given", "nothing set"])
def test_the_model_falls_with_every_direction(how):
    g, C = dense(conv_net(), [batch()])
    steps = [one_step(conv_net(), damping=1e-3, refine=k, **how) for k in range(1, 12)]
    found = [q(g, C, 1e-3, step) for step, _ in steps]
    assert all(later < earlier for earlier, later in pairwise(found))
    assert [int(told["refined"]) for _, told in steps] == list(range(1, 12))


def test_automatic_lr_and_momentum_are_the_dials_first_point():
    g, C = dense(conv_net(), [batch()])
    first = q(g, C, 1e-2, one_step(conv_net(), damping=1e-2)[0])
    assert q(g, C, 1e-2, one_step(conv_net(), damping=1e-2, refine=1)[0]) < first
    assert first < q(g, C, 1e-2, one_step(conv_net(), damping=1e-2, **GIVEN)[0])


@pytest.mark.parametrize(
    "how", [{}, {"momentum": 0.5}, {"lr": 1.0, "momentum": "auto"}, {"lr": 1.0, "momentum": 0.0}]
)
def test_a_second_step_goes_on_from_the_previous_one(how):
    """The previous step is in the span: the second one is Newton's too, whatever is given."""
    model, damping, (x, y) = conv_net(), 1e-2, batch()
    optimizer = kn.KFAC(model, CRITERION, damping=damping, refine=300, **SETTINGS, **how)
    for _ in range(2):
        g, C = dense(model, [batch()])
        before = values_of(model)
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()
    assert relative(values_of(model) - before, newton(g, C, damping)) <= 1e-5


def test_a_numeric_lr_multiplies_the_refined_direction_group_by_group():
    g, C = dense(conv_net(), [batch()])
    model = conv_net()
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": 0.5}, {"params": rest, "lr": 0.1}]
    optimizer = kn.KFAC(
        groups, CRITERION, model=model, damping=1e-2, refine=300, **SETTINGS, **GIVEN
    )
    before, (x, y) = values_of(model), batch()
    CRITERION(model(x), y).backward()
    optimizer.step()
    wanted = newton(g, C, 1e-2) * 0.1
    wanted[: first.numel()] *= 5
    assert relative(values_of(model) - before, wanted) <= 1e-5


def test_the_trust_region_shortens_the_whole_step():
    free, _ = one_step(conv_net(), damping=1e-4, refine=30)
    held, told = one_step(conv_net(), damping=1e-4, refine=30, trust_region=1e-3)
    assert 0 < float(told["shortened"]) < 1
    assert relative(held, free * told["shortened"]) <= 1e-9
    _, C = dense(conv_net(), [batch()])
    loss = float(CRITERION(conv_net()(batch()[0]), batch()[1]))
    assert 0.5 * float(held @ C @ held) == pytest.approx(1e-3 * loss)


def test_micro_batches_are_one_batch():
    whole, _ = one_step(conv_net(), damping=1e-2, refine=5)
    model, (x, y) = conv_net(), batch()
    optimizer = kn.KFAC(model, CRITERION, damping=1e-2, refine=5, **SETTINGS)
    before = values_of(model)
    for rows in (slice(0, 3), slice(3, 10)):
        (CRITERION(model(x[rows]), y[rows]) * len(x[rows]) / 10).backward()
    optimizer.step()
    assert relative(values_of(model) - before, whole) <= 1e-9


def test_curvature_of_several_batches():
    """The second step's gradient is of the second batch, its curvature of both."""
    model = conv_net()
    optimizer = kn.KFAC(
        model, CRITERION, damping=1e-2, refine=300, curvature_batches=2, **SETTINGS, **GIVEN
    )
    for seed in (1, 2):
        seen = [batch(s) for s in range(seed, 0, -1)]
        g, C = dense(model, seen)
        before, (x, y) = values_of(model), batch(seed)
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()
        assert relative(values_of(model) - before, newton(g, C, 1e-2)) <= 1e-5


def test_an_early_end_is_where_the_tolerance_says():
    g, C = dense(conv_net(), [batch()])
    loose, told = one_step(conv_net(), damping=1e-2, refine=300, refine_tolerance=1e-2)
    tight, more = one_step(conv_net(), damping=1e-2, refine=300)
    assert int(told["refined"]) < int(more["refined"])
    least = q(g, C, 1e-2, newton(g, C, 1e-2))
    assert q(g, C, 1e-2, tight) - least <= 1e-10 * abs(least)
    assert 0 < q(g, C, 1e-2, loose) - least <= 0.1 * abs(least)


def test_a_reshape_between_model_and_criterion_is_carried_both_ways():
    class Flat(nn.Module):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return (z.reshape(y.shape) - y).square().sum()

    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(6, 3), 0
    y, criterion = torch.randn(6), nn.MSELoss()
    steps = []
    for squeeze in (False, True):
        copy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        copy.load_state_dict(model.state_dict())
        optimizer = kn.KFAC(copy, criterion, damping=1e-2, refine=50, **SETTINGS)
        z = copy(x)
        (criterion(z.squeeze(1), y) if squeeze else criterion(z, y.unsqueeze(1))).backward()
        optimizer.step()
        steps.append(values_of(copy) - values_of(model))
    assert relative(*steps) <= 1e-9


def test_nothing_is_computed_for_it_at_zero(monkeypatch):
    def refused(*_: Any) -> None:
        raise AssertionError("refine=0 asked for a product backward")

    monkeypatch.setattr(QuadraticModel, "refine", refused)
    monkeypatch.setattr(QuadraticModel, "product", refused)
    _, told = one_step(conv_net(), damping=1e-2)
    assert int(told["refined"]) == 0


def test_a_batch_norm_and_dropout_network_refines_and_keeps_its_buffers_and_stream():
    model = conv_net(nn.BatchNorm2d(3), nn.Dropout(0.3))
    optimizer = kn.KFAC(model, CRITERION, refine=4)
    x, y = batch()
    for _ in range(6):
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        state, mean = torch.get_rng_state(), model[2].running_mean.clone()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model[2].running_mean, mean)
        assert bool(torch.isfinite(values_of(model)).all())


# What can go wrong.


def test_nan_in_the_products_ends_it_with_the_best_so_far(monkeypatch):
    real, calls = QuadraticModel.product, []

    def broken(self: QuadraticModel, line: Any) -> Tensor:
        calls.append(line)
        found = real(self, line)
        return found if len(calls) < 4 else found * math.nan

    three, _ = one_step(conv_net(), damping=1e-2, refine=3)
    monkeypatch.setattr(QuadraticModel, "product", broken)
    found, told = one_step(conv_net(), damping=1e-2, refine=50)
    assert int(told["refined"]) == 3
    assert int(told["broken_refinements"]) == 1
    assert relative(found, three) <= 1e-12


def test_negative_curvature_ends_it_with_the_best_so_far(monkeypatch):
    real = QuadraticModel.numbers

    def bent(self: QuadraticModel, *given: Any) -> tuple[float, float]:
        slope, bend = real(self, *given)
        return slope, -bend

    monkeypatch.setattr(QuadraticModel, "numbers", bent)
    found, told = one_step(conv_net(), damping=1e-2, refine=9)
    assert int(told["refined"]) == 0
    assert int(told["broken_refinements"]) == 1
    assert bool(torch.isfinite(found).all())


def test_a_criterion_without_curvature_is_refused():
    model = nn.Linear(3, 2)
    optimizer = kn.KFAC(model, criterion := nn.L1Loss(), damping=0.1, refine=2)
    before = values_of(model)
    criterion(model(torch.randn(4, 3)), torch.randn(4, 2)).backward()
    with pytest.raises(CriterionError, match=r"refine=2 .*L1Loss has no curvature .*HuberLoss"):
        optimizer.step()
    assert torch.equal(values_of(model), before)


class OnlyBackward(torch.autograd.Function):
    """A square that torch cannot differentiate forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * u


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OnlyBackward.apply(x)


class TorchSquare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def test_without_forward_mode_it_says_so_once_and_is_exact():
    with pytest.warns(KronewtonWarning, match="no forward mode for a part of this model") as said:
        found, _ = one_step(conv_net(Square()), damping=1e-2, refine=6)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted, _ = one_step(conv_net(TorchSquare()), damping=1e-2, refine=6)
    assert relative(found, wanted) <= 1e-9


def test_a_model_that_cannot_be_run_again_makes_k_facs_step_and_says_so():
    model, (x, y) = conv_net(), batch()
    optimizer = kn.KFAC(model, CRITERION, damping=1e-2, refine=3, **SETTINGS)
    CRITERION(model(x), y).backward()
    x.add_(1)
    with pytest.warns(KronewtonWarning, match="refine=3 was asked .* cannot be run again"):
        optimizer.step()


def test_a_model_without_a_layer_of_any_kind_says_so():
    with pytest.warns(KronewtonWarning, match="refine=2 was asked for, and no layer"):
        optimizer = kn.KFAC(nn.PReLU(dtype=torch.cfloat), nn.MSELoss(), refine=2)
    assert optimizer.coverage().rows[0].method == "AdamW"


class OwnScale(nn.Module):
    """A parameter of its own, which training gradients tell nothing of, example by example."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def test_coverage_names_what_only_the_dial_reaches():
    model = conv_net(OwnScale())
    options = {"fisher": "empirical"}
    methods = {r.parameter: r.method for r in kn.KFAC(model, CRITERION, **options).coverage().rows}
    assert methods["2.scale"] == "AdamW"
    refined = kn.KFAC(model, CRITERION, refine=1, strict=True, **options).coverage()
    methods = {r.parameter: r.method for r in refined.rows}
    assert methods["2.scale"] == "joins refine"
    assert methods["0.weight"] == "K-FAC factored"
    assert refined.covered == 1


# Planted mistakes: each must break the first test.


def one_percent(self: QuadraticModel, line: Any) -> Tensor:
    return 1.01 * PRODUCT(self, line)


def without_the_second_layer(self: QuadraticModel, line: Any) -> Tensor:
    found = PRODUCT(self, line).clone()
    found[30:56] = 0
    return found


PRODUCT = QuadraticModel.product


@pytest.mark.parametrize("mutant", [one_percent, without_the_second_layer])
def test_mutants_are_caught(mutant, monkeypatch):
    g, C = dense(conv_net(), [batch()])
    monkeypatch.setattr(quadratic.QuadraticModel, "product", mutant)
    found, _ = one_step(conv_net(), damping=1e-2, refine=400, **GIVEN)
    assert relative(found, newton(g, C, 1e-2)) > 1e-4
