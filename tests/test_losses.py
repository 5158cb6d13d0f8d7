"""A criterion's Λ against autograd's dense Hessian: columns, products, draws, weights, refusals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kronewton.errors import CriterionError, UnsupportedError
from kronewton.losses import OutputCurvature, check, check_values, curvature

F64 = torch.float64
EXACT = 1e-12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=generator(seed))


def uniform(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, dtype=F64, generator=generator(seed))


def classes(C: int, *shape: int, masked: bool = False) -> Tensor:
    y = torch.randint(0, C, shape, generator=generator(2))
    if masked:
        y.flatten()[::3] = -100
    return y


# The oracle, and what the library says, both as a dense matrix over the flattened output.


def dense_hessian(criterion: nn.Module, x: Tensor, *targets: Any) -> Tensor:
    H = torch.autograd.functional.hessian(lambda z: criterion(z, *targets), x)
    return H.reshape(x.numel(), x.numel())


def from_columns(c: OutputCurvature, x: Tensor, examples: int) -> Tensor:
    """Σ uu' example by example: a column is nonzero in all of them."""
    u = torch.stack(list(c.columns())).reshape(c.column_count, examples, -1)  # (V, N, d)
    assert all(column.shape == x.shape for column in c.columns())
    return torch.block_diag(*torch.einsum("vni,vnj->nij", u, u))


def from_products(c: OutputCurvature, x: Tensor) -> Tensor:
    rows = torch.eye(x.numel(), dtype=x.dtype)
    return torch.stack([c.product(v.reshape(x.shape)).flatten() for v in rows], 1)


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Case:
    """One criterion on one output."""

    name: str
    criterion: nn.Module
    x: Tensor
    targets: tuple[Any, ...]
    batched: bool = True
    total: float | None = 1.0  # what ω sums to, None where weights change it

    def curvature(self) -> OutputCurvature:
        return curvature(self.criterion, self.x, *self.targets, batched=self.batched)

    @property
    def examples(self) -> int:
        alone = isinstance(self.criterion, nn.CrossEntropyLoss) and self.x.dim() == 1
        return self.x.shape[0] if self.batched and self.x.dim() > 0 and not alone else 1


def classification_cases() -> list[Case]:
    cases = []
    weight = uniform(4) + 0.1
    for shape in [(5, 4), (3, 4, 2), (3, 4, 2, 3), (1, 4)]:
        x, positions = normal(*shape), (shape[0], *shape[2:])
        y, soft = classes(4, *positions, masked=shape[0] > 1), uniform(*shape)
        kept = float((y != -100).sum())
        for w in (None, weight):
            for smoothing in (0.0, 0.2):
                for reduction in ("mean", "sum"):
                    loss = nn.CrossEntropyLoss(w, reduction=reduction, label_smoothing=smoothing)
                    name = f"ce{shape}-{'w' if w is not None else ''}-{smoothing}-{reduction}"
                    total = 1.0 if reduction == "mean" else kept
                    plain = w is None or (smoothing == 0.0 and reduction == "mean")
                    cases += [
                        Case(name, loss, x, (y,), total=total if plain else None),
                        Case(name + "-soft", loss, x, (soft,), total=None),
                    ]
    cases += [
        Case("ce-one", nn.CrossEntropyLoss(), normal(4), (torch.tensor(2),)),
        Case("ce-one-alone", nn.CrossEntropyLoss(), normal(4), (torch.tensor(2),), batched=False),
        Case("ce-one-soft", nn.CrossEntropyLoss(), normal(4), (uniform(4),), total=None),
        Case("ce-alone", nn.CrossEntropyLoss(), normal(3, 4), (classes(4, 3),), batched=False),
        Case("ce-ignore", nn.CrossEntropyLoss(ignore_index=2), normal(6, 4), (classes(4, 6),)),
        Case("ce-bytes", nn.CrossEntropyLoss(weight), normal(6, 4), (classes(4, 6).byte(),)),
        Case("ce-many", nn.CrossEntropyLoss(), normal(3, 40), (classes(40, 3),)),
    ]
    return cases


def element_cases(shape: tuple[int, ...], batched: bool, reduction: str) -> list[Case]:
    x, y, r = normal(*shape), uniform(*shape), {"reduction": reduction}
    last = shape[-1] if len(shape) > (1 if batched else 0) else 1
    total = 1.0 if reduction == "mean" else x.numel() / last
    near, rate = uniform(*shape) + 0.1, nn.PoissonNLLLoss(log_input=False, eps=1e-3, **r)
    table: list[tuple[str, nn.Module, tuple[Any, ...]]] = [
        ("mse", nn.MSELoss(**r), (y,)),
        ("bce", nn.BCEWithLogitsLoss(**r), (y,)),
        ("bce-w", nn.BCEWithLogitsLoss(uniform(*shape), **r), (y,)),
        ("poisson", nn.PoissonNLLLoss(**r), (3 * y,)),
        ("poisson-full", nn.PoissonNLLLoss(full=True, **r), (9 * y,)),
        ("poisson-ints", nn.PoissonNLLLoss(**r), ((9 * y).long(),)),
        ("gaussian", nn.GaussianNLLLoss(**r), (y, near)),
        ("gaussian-number", nn.GaussianNLLLoss(**r), (y, 0.3)),
        ("gaussian-clamped", nn.GaussianNLLLoss(eps=0.5, full=True, **r), (y, near)),
        ("huber", nn.HuberLoss(delta=1.7, **r), (y,)),
    ]
    if shape:
        positive, one = uniform(shape[-1]), uniform(1, seed=5)
        table += [
            ("bce-pos", nn.BCEWithLogitsLoss(pos_weight=positive, **r), (y,)),
            ("bce-both", nn.BCEWithLogitsLoss(positive, pos_weight=one, **r), (y,)),
            ("gaussian-short", nn.GaussianNLLLoss(**r), (y, near.mean(-1))),
            ("gaussian-one", nn.GaussianNLLLoss(**r), (y, near.mean(-1, keepdim=True))),
        ]
    cases = [
        Case(name, loss, x, ys, batched, None if name.startswith("bce-") else total)
        for name, loss, ys in table
    ]
    cases.append(Case("poisson-rate", rate, x.exp(), (3 * y,), batched, total))
    ending = f"{shape}-{'batched' if batched else 'alone'}-{reduction}"
    return [replace(case, name=case.name + ending) for case in cases]


SHAPES = [(5, 3), (5,), (3, 2, 4), (2, 3, 2, 2), (1, 3), ()]
ELEMENT_CASES = [
    case
    for shape, batched in [*((s, True) for s in SHAPES), ((4,), False), ((2, 3), False)]
    for reduction in ("mean", "sum")
    for case in element_cases(shape, batched, reduction)
]
CASES = classification_cases() + ELEMENT_CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_columns_and_products_are_the_hessian(case: Case) -> None:
    check(case.criterion, case.x, *case.targets)
    check_values(case.criterion, case.x, *case.targets)
    H, c = dense_hessian(case.criterion, case.x, *case.targets), case.curvature()
    assert distance(from_columns(c, case.x, case.examples), H) < EXACT
    assert distance(from_products(c, case.x), H) < EXACT
    assert c.column_count == case.x.numel() // case.examples
    assert c.weights.shape[0] == case.examples
    if case.total is not None:
        assert float(c.weights.sum()) == pytest.approx(case.total, rel=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (2, 3, 2, 2), (3,)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_nll_pulled_back_through_log_softmax_is_the_hessian(
    shape: tuple[int, ...], reduction: str, weighted: bool
) -> None:
    dim = min(len(shape) - 1, 1)
    x, y = normal(*shape), classes(3, *shape[:dim], *shape[dim + 1 :], masked=len(shape) > 1)
    w = uniform(3) if weighted else None
    nll = nn.NLLLoss(w, reduction=reduction)
    logp = torch.log_softmax(x, dim)
    check(nll, logp, y)
    check_values(nll, logp, y)
    c = curvature(nll, logp, y)
    J = torch.autograd.functional.jacobian(lambda z: torch.log_softmax(z, dim), x)
    J = J.reshape(x.numel(), x.numel())
    H = dense_hessian(nn.CrossEntropyLoss(w, reduction=reduction), x, y)
    examples = shape[0] if len(shape) > 1 else 1
    assert distance(J.T @ from_columns(c, x, examples) @ J, H) < EXACT
    assert distance(J.T @ from_products(c, x) @ J, H) < EXACT
    ce = curvature(nn.CrossEntropyLoss(w, reduction=reduction), x, y)
    torch.testing.assert_close(c.weights, ce.weights, rtol=EXACT, atol=0)
    assert "log-softmax" in c.note
    pulled = (J.T @ c.draw(generator()).flatten()).reshape(shape)
    torch.testing.assert_close(pulled, ce.draw(generator()), rtol=1e-9, atol=1e-12)


def test_a_column_is_nonzero_at_one_position_of_all_examples() -> None:
    shape = (3, 4, 2)
    for criterion, y, at in [
        (nn.CrossEntropyLoss(), classes(4, 3, 2), (0, 2)),
        (nn.MSELoss(), uniform(*shape), (0, 1, 2)),
        (_Focal(), classes(4, 3, 2), (0, 2)),
    ]:
        for column in curvature(criterion, normal(*shape), y).columns():
            touched = column.movedim(at, tuple(range(len(at)))).reshape(*(shape[d] for d in at), -1)
            assert (touched != 0).any(-1).any(0).sum() <= 1


# Draws.

DRAWN = [
    Case("mse", nn.MSELoss(), normal(2, 3), (uniform(2, 3),)),
    Case("ce", nn.CrossEntropyLoss(), normal(2, 3), (classes(3, 2),)),
    Case("ce-nd", nn.CrossEntropyLoss(uniform(3)), normal(2, 3, 2), (classes(3, 2, 2),)),
    Case("ce-one", nn.CrossEntropyLoss(), normal(4), (torch.tensor(1),)),
    Case("bce", nn.BCEWithLogitsLoss(uniform(3)), normal(2, 3), (uniform(2, 3),)),
    Case("poisson", nn.PoissonNLLLoss(), normal(2, 3), (uniform(2, 3),)),
    Case("rate", nn.PoissonNLLLoss(log_input=False), uniform(2, 3) + 0.5, (uniform(2, 3),)),
    Case("gaussian", nn.GaussianNLLLoss(), normal(2, 3), (uniform(2, 3), uniform(2, 3) + 0.1)),
    Case("huber", nn.HuberLoss(delta=3.0), normal(2, 3), (uniform(2, 3),)),
]


@pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
@pytest.mark.parametrize("count", [300, 3000])
def test_draws_average_to_the_hessian(case: Case, count: int) -> None:
    c, g = case.curvature(), generator(7)
    u = torch.stack([c.draw(g).flatten() for _ in range(count)])
    outer = torch.einsum("vi,vj->vij", u, u)
    H = dense_hessian(case.criterion, case.x, *case.targets)
    error = outer.mean(0) - H
    # Entries where every draw agrees have no spread: they must agree to rounding.
    bound = 5 * outer.std(0) / math.sqrt(count) + 1e-12 * H.abs().max()
    assert (error.abs() <= bound).all()


def test_a_softmax_draw_is_the_gradient_for_a_drawn_class() -> None:
    x, w = normal(50, 3), uniform(3) + 0.1
    y = classes(3, 50)
    u = curvature(nn.CrossEntropyLoss(w), x, y).draw(generator())
    root = (w[y] / w[y].sum()).sqrt().unsqueeze(1)
    onehot = torch.softmax(x, 1) - u / root
    assert onehot.sum(1).allclose(torch.ones(50, dtype=F64))
    assert ((onehot - onehot.round()).abs() < 1e-12).all()


@pytest.mark.parametrize("case", [*DRAWN, CASES[-1]], ids=lambda case: case.name)
def test_draws_follow_their_own_generator_only(case: Case) -> None:
    def draws(seed: int) -> Tensor:
        c, g = case.curvature(), generator(seed)
        return torch.stack([c.draw(g) for _ in range(20)])

    before = torch.random.get_rng_state()
    first = draws(3)
    list(case.curvature().columns())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(draws(3), first)
    assert not torch.equal(draws(4), first)


def test_classes_without_probability_are_never_drawn() -> None:
    x = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]], dtype=F64).expand(200, 4)
    y = torch.zeros(200, dtype=torch.long)
    u = curvature(nn.CrossEntropyLoss(), x, y).draw(generator())
    assert u[:, [1, 3]].abs().max() == 0
    assert (u[:, 0] > 0).any()
    assert (u[:, 2] > 0).any()


# Weights.


def test_weights_are_class_weights_over_their_sum_and_zero_where_masked() -> None:
    x, w = normal(4, 3), torch.tensor([1.0, 2.0, 5.0], dtype=F64)
    y = torch.tensor([2, -100, 0, 1])
    mean = curvature(nn.CrossEntropyLoss(w), x, y)
    torch.testing.assert_close(mean.weights, torch.tensor([5.0, 0.0, 1.0, 2.0], dtype=F64) / 8)
    total = curvature(nn.CrossEntropyLoss(w, reduction="sum"), x, y)
    torch.testing.assert_close(total.weights, torch.tensor([5.0, 0.0, 1.0, 2.0], dtype=F64))
    assert mean.draw(generator())[1].abs().max() == 0
    assert mean.product(torch.ones_like(x))[1].abs().max() == 0
    assert all(column[1].abs().max() == 0 for column in mean.columns())


def test_masked_positions_behave_as_if_cut_away() -> None:
    x, y = normal(6, 3), classes(3, 6, masked=True)
    kept = y != -100
    whole, cut = (curvature(nn.CrossEntropyLoss(), a, b) for a, b in [(x, y), (x[kept], y[kept])])
    v = normal(6, 3, seed=8)
    torch.testing.assert_close(whole.product(v)[kept], cut.product(v[kept]), rtol=EXACT, atol=0)
    torch.testing.assert_close(whole.weights[kept], cut.weights, rtol=EXACT, atol=0)


def test_an_example_of_weight_two_is_two_examples() -> None:
    x, y = normal(3, 2), uniform(3, 2)
    weight = torch.tensor([[2.0], [1.0], [0.0]], dtype=F64)
    c = curvature(nn.BCEWithLogitsLoss(weight, reduction="sum"), x, y)
    torch.testing.assert_close(c.weights, weight.squeeze(1))


def test_element_weights_are_averaged_over_the_last_dimension() -> None:
    x, y, weight = normal(3, 2, 4), uniform(3, 2, 4), uniform(3, 2, 4)
    c = curvature(nn.BCEWithLogitsLoss(weight), x, y)
    torch.testing.assert_close(c.weights, weight.mean(-1) / 6)


def test_uniform_weights_are_one_number_expanded() -> None:
    c = curvature(nn.MSELoss(), normal(3, 2, 4), uniform(3, 2, 4))
    assert c.weights.shape == (3, 2)
    assert not any(c.weights.stride())


def test_duplicating_the_batch_leaves_the_sum_of_outer_products() -> None:
    x, y = normal(4, 3), classes(3, 4)
    once, twice = (curvature(nn.CrossEntropyLoss(), x.repeat(n, 1), y.repeat(n)) for n in (1, 2))
    B = [sum(u.T @ u for u in c.columns()) for c in (once, twice)]
    assert distance(B[1], B[0]) < EXACT


# Planted mutants: the oracle must see what libraries of this field get wrong.


@pytest.mark.parametrize(
    ("criterion", "mutant", "masked"),
    [
        (nn.CrossEntropyLoss(), lambda H: 1.01 * H, False),
        (nn.MSELoss(), lambda H: H / 2, False),
        (nn.CrossEntropyLoss(), lambda H: H * 4 / 6, True),  # a mean over all, not over unmasked
        (nn.CrossEntropyLoss(), lambda H: H + torch.eye(18, dtype=F64) * 1e-9, False),
    ],
    ids=["scale", "half", "normaliser", "shift"],
)
def test_the_oracle_catches(criterion: nn.Module, mutant: Any, masked: bool) -> None:
    x = normal(6, 3)
    y = uniform(6, 3) if isinstance(criterion, nn.MSELoss) else classes(3, 6, masked=masked)
    H, c = dense_hessian(criterion, x, y), curvature(criterion, x, y)
    assert distance(from_columns(c, x, 6), H) < EXACT
    assert distance(mutant(from_columns(c, x, 6)), H) > EXACT
    assert distance(mutant(from_products(c, x)), H) > EXACT


def test_the_monte_carlo_check_catches_a_forgotten_factor() -> None:
    x, y = normal(2, 3), uniform(2, 3)
    c, g = curvature(nn.MSELoss(), x, y), generator(7)
    u = torch.stack([c.draw(g).flatten() for _ in range(3000)]) / math.sqrt(2)
    outer = torch.einsum("vi,vj->vij", u, u)
    error = (outer.mean(0) - dense_hessian(nn.MSELoss(), x, y)).abs()
    assert (error > 5 * outer.std(0) / math.sqrt(3000) + 1e-12).any()


# Any other criterion.


class _Focal(nn.Module):
    """A loss per position whose Hessian is indefinite."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logp = torch.log_softmax(x, 1).gather(1, y.unsqueeze(1))
        return -((1 - logp.exp()) ** 2 * logp).mean()


class _PerExample(nn.Module):
    """Couples all that belongs to one example."""

    reduction = "sum"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((x - y).square().flatten(1).sum(1) + 1).sqrt().sum()


class _Contrastive(nn.Module):
    """Couples examples."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.logsumexp(x @ x.T, 1).mean() + (x - y).square().sum()


class _Pairs(nn.Module):
    """Couples two examples only: the first and the last."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().sum() + (x[0] * x[-1]).sum()


class _Smoothed(nn.CrossEntropyLoss):
    """A subclass of its own mind."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(2 * input, target)


class _Renamed(nn.MSELoss):
    """A subclass that changes nothing."""


def projected(H: Tensor) -> Tensor:
    s, U = torch.linalg.eigh((H + H.T) / 2)
    return U @ torch.diag(s.clamp(min=0)) @ U.T


GENERIC = [
    (_Focal(), 3 * normal(5, 3), classes(3, 5), "had negative", 3),
    (_Focal(), 3 * normal(3, 3, 4), classes(3, 3, 4), "had negative", 12),
    (_Focal(), normal(2, 3, 2, 2), classes(3, 2, 2, 2), "had negative", 12),
    (_Focal(), normal(1, 3), classes(3, 1), "was positive", 3),
    (_PerExample(), normal(4, 3), uniform(4, 3), "was positive", 3),
    (_PerExample(), normal(4, 3, 2), uniform(4, 3, 2), "was positive", 6),
    (_Smoothed(), normal(5, 3), classes(3, 5), "was positive", 3),
    (nn.SmoothL1Loss(beta=0.3), normal(5, 3), uniform(5, 3), "was positive", 3),
    (nn.BCELoss(), uniform(5, 3), uniform(5, 3, seed=9), "was positive", 3),
    (nn.KLDivLoss(reduction="batchmean"), normal(5, 3), uniform(5, 3), "no curvature", 3),
    (nn.SoftMarginLoss(), normal(6), normal(6, seed=4).sign(), "was positive", 1),
    (_Contrastive(), normal(5, 3), uniform(5, 3), "mixes examples", 15),
    (_Pairs(), normal(7, 3), uniform(7, 3), "mixes examples", 21),
]


@pytest.mark.parametrize(("criterion", "x", "y", "says", "count"), GENERIC)
def test_any_criterion_is_its_projected_hessian(
    criterion: nn.Module, x: Tensor, y: Tensor, says: str, count: int
) -> None:
    check(criterion, x, y)
    check_values(criterion, x, y)
    c, H = curvature(criterion, x, y), projected(dense_hessian(criterion, x, y))
    assert says in c.note
    assert c.column_count == count
    examples = 1 if "mixes" in says else x.shape[0]
    scale = H.norm() + 1e-300
    assert (from_columns(c, x, examples) - H).norm() <= 1e-11 * scale
    assert (from_products(c, x) - H).norm() <= 1e-11 * scale
    u = c.draw(generator())
    assert u.shape == x.shape
    assert not u.requires_grad


@pytest.mark.parametrize(("size", "weight"), [(10, 1e5), (100, 1e4), (1000, 1e3)])
def test_a_coupling_beside_much_larger_curvature_is_not_overlooked(
    size: int, weight: float
) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
            far = weight * nn.functional.mse_loss(x[:, size], t)
            return nn.functional.cross_entropy(x[:, :size], y) + far

    x, v = 0.1 * normal(8, size + 1).float(), normal(8, size + 1, seed=3).float()
    v[:, size] = 0
    at = curvature(Both(), x, classes(size, 8), normal(8).float())
    p = x[:, :size].softmax(1)
    u = v[:, :size]
    exact = ((p * u.square()).sum(1) - (p * u).sum(1).square()).sum() / len(x)
    assert float((v * at.product(v)).sum()) == pytest.approx(float(exact), rel=1e-3)


def test_generic_draws_average_to_the_projected_hessian() -> None:
    x, y = normal(3, 3, 2), classes(3, 3, 2)
    c, g = curvature(_Focal(), x, y), generator(5)
    u = torch.stack([c.draw(g).flatten() for _ in range(3000)])
    outer = torch.einsum("vi,vj->vij", u, u)
    error = (outer.mean(0) - projected(dense_hessian(_Focal(), x, y))).abs()
    assert (error <= 5 * outer.std(0) / math.sqrt(3000) + 1e-12).all()


def test_a_criterion_linear_in_the_output_says_that_it_has_no_curvature() -> None:
    c = curvature(nn.KLDivLoss(reduction="sum"), normal(4, 3), uniform(4, 3))
    assert "no curvature" in c.note
    assert c.product(normal(4, 3)).abs().max() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_absolute_error_has_the_fisher_of_laplaces_distribution(reduction: str) -> None:
    x, y = normal(4, 3), uniform(4, 3)
    c = curvature(nn.L1Loss(reduction=reduction), x, y)
    scale = 1 / 12 if reduction == "mean" else 1.0
    assert "no curvature of its own" in c.note
    assert not c.curved
    torch.testing.assert_close(c.product(torch.ones_like(x)), torch.full_like(x, scale))
    draws = torch.stack([c.draw(generator(k)).flatten() for k in range(2000)])
    torch.testing.assert_close(
        draws.T @ draws / 2000, scale * torch.eye(12, dtype=draws.dtype), rtol=0, atol=0.15 * scale
    )
    columns = torch.stack(list(c.columns())).sum(0)
    torch.testing.assert_close(columns, torch.full_like(x, math.sqrt(scale)))


def test_generic_weights_are_uniform_and_cost_no_hessian() -> None:
    class Once(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            raise AssertionError("not needed for weights")

    assert curvature(Once(), normal(4, 3), uniform(4, 3)).weights.tolist() == [0.25] * 4
    assert curvature(_PerExample(), normal(4, 3), uniform(4, 3)).weights.tolist() == [1.0] * 4


def test_subclasses_are_known_by_their_forward() -> None:
    x, y = normal(4, 3), uniform(4, 3)
    assert "autograd" in curvature(_Smoothed(), x, classes(3, 4)).note
    assert curvature(_Renamed(), x, y).note == ""
    patched = nn.MSELoss()
    patched.forward = lambda a, b: (a - b).pow(4).sum()  # type: ignore[method-assign]
    H = dense_hessian(patched, x, y)
    assert distance(from_products(curvature(patched, x, y), x), H) < EXACT


def test_a_criterion_keeps_its_buffers_and_random_state() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=F64))
            self.register_buffer("seen", torch.zeros((), dtype=F64))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            self.seen += 1
            noise = 1 + 0 * torch.rand(())
            return self.scale * noise * (x - y).square().sum()

    criterion, x, y = Running(), normal(4, 3), uniform(4, 3)
    parameter, buffer, before = criterion.scale, criterion.seen, torch.random.get_rng_state()
    v = normal(4, 3)
    torch.testing.assert_close(curvature(criterion, x, y).product(v), 4 * v)
    assert criterion.scale is parameter
    assert criterion.seen is buffer
    assert float(buffer) == 0
    assert parameter.grad is None
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_criterions_hooks_are_not_called() -> None:
    criterion, calls = _PerExample(), []
    criterion.register_forward_hook(lambda *_: calls.append(1))
    curvature(criterion, normal(4, 3), uniform(4, 3)).draw(generator())
    assert calls == []


def test_a_compiled_criterion_is_the_one_that_was_compiled() -> None:
    c = curvature(torch.compile(nn.MSELoss()), normal(4, 3), uniform(4, 3))
    torch.testing.assert_close(c.product(normal(4, 3)), normal(4, 3) / 6)


# Precision, grad mode, NaN.

HALF = [
    (nn.MSELoss(), uniform(4, 3)),
    (nn.CrossEntropyLoss(uniform(3).bfloat16()), classes(3, 4)),
    (nn.CrossEntropyLoss(), uniform(4, 3).bfloat16()),
    (nn.BCEWithLogitsLoss(), uniform(4, 3).bfloat16()),
    (nn.HuberLoss(), uniform(4, 3).bfloat16()),
    (_Contrastive(), uniform(4, 3).bfloat16()),
]


@pytest.mark.parametrize(("criterion", "y"), HALF)
def test_half_precision_is_widened_under_autocast_too(criterion: nn.Module, y: Tensor) -> None:
    x = normal(4, 3).bfloat16().requires_grad_()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        c = curvature(criterion, x, y)
        u, product = c.draw(generator()), c.product(x)
        columns = list(c.columns())
    for tensor in (u, product, c.weights, *columns):
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
    exact = curvature(
        criterion.float(), x.detach().double(), y.double() if y.is_floating_point() else y
    )
    torch.testing.assert_close(
        product.double(), exact.product(x.detach().double()), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (nn.MSELoss(), (uniform(4, 3),)),
        (nn.CrossEntropyLoss(), (classes(3, 4),)),
        (nn.NLLLoss(), (classes(3, 4),)),
        (nn.BCEWithLogitsLoss(), (uniform(4, 3),)),
        (nn.PoissonNLLLoss(), (uniform(4, 3),)),
        (nn.PoissonNLLLoss(log_input=False), (uniform(4, 3),)),
        (nn.GaussianNLLLoss(), (uniform(4, 3), 0.1)),
        (nn.HuberLoss(), (uniform(4, 3),)),
        (_Focal(), (classes(3, 4),)),
        (_Contrastive(), (uniform(4, 3),)),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_output_does_not_raise(
    criterion: nn.Module, targets: tuple[Any, ...], bad: float
) -> None:
    x = torch.log_softmax(normal(4, 3), 1)
    x[1, 1] = bad
    check(criterion, x, *targets)
    if math.isnan(bad):
        check_values(criterion, x, *targets)
    c = curvature(criterion, x, *targets)
    assert c.draw(generator()).shape == c.product(x).shape == x.shape
    assert len(list(c.columns())) == c.column_count
    assert isinstance(c.note, str)


# Refusals.


def refused(kind: type[Exception], *parts: str) -> Any:
    return pytest.raises(kind, match=".*".join(parts))


@pytest.mark.parametrize(
    ("criterion", "x", "targets", "parts"),
    [
        (nn.MSELoss(), normal(4, 1), (normal(4),), [r"shape \(4, 1\)", r"shape \(4,\)", "Reshape"]),
        (nn.HuberLoss(), normal(4), (normal(4, 1),), [r"\(4,\)", r"\(4, 1\)", "Reshape"]),
        (nn.PoissonNLLLoss(), normal(4), (normal(4, 1),), [r"\(4,\)", r"\(4, 1\)", "Reshape"]),
        (
            nn.MSELoss(),
            normal(4),
            (classes(3, 4),),
            ["target of int64", "floating", "Use target.to"],
        ),
        (nn.BCEWithLogitsLoss(), normal(4), (classes(2, 4),), ["int64", "Use target.to"]),
        (nn.MSELoss(), normal(4), (), ["given after the output: nothing", "target", "Call"]),
        (nn.MSELoss(), normal(4), (1.0,), ["output: float", "allowed is target", "Call"]),
        (nn.MSELoss(), normal(0, 3), (normal(0, 3),), ["empty batch", r"\(0, 3\)", "drop_last"]),
        (nn.MSELoss(), classes(3, 4), (normal(4),), ["output of int64", "floating", "Pass"]),
        (
            nn.BCEWithLogitsLoss(uniform(4)),
            normal(4, 1),
            (uniform(4, 1),),
            [r"weight of shape \(4,\)", r"output of shape \(4, 1\)", "Give it a 1"],
        ),
        (
            nn.BCEWithLogitsLoss(pos_weight=uniform(3)),
            normal(4),
            (uniform(4),),
            [r"pos_weight of shape \(3,\)", "broadcasts"],
        ),
        (
            nn.GaussianNLLLoss(),
            normal(4, 3),
            (uniform(4, 3), uniform(3)),
            [r"output of shape \(4, 3\)", r"variance of shape \(3,\)", "Reshape the variance"],
        ),
        (nn.GaussianNLLLoss(), normal(4), (normal(4),), ["target and variance", "Call criterion"]),
        (
            nn.CrossEntropyLoss(),
            normal(4, 3),
            (normal(4),),
            [r"output of shape \(4, 3\)", r"float64 of shape \(4,\)", "int64", "target.long"],
        ),
        (nn.CrossEntropyLoss(), normal(4, 3), (classes(3, 4).int(),), ["int32", "target.long"]),
        (nn.CrossEntropyLoss(), normal(4, 7, 3), (classes(3, 4, 7),), [r"\(4, 3\)", "movedim"]),
        (nn.CrossEntropyLoss(), normal(), (torch.tensor(0),), [r"output of shape \(\)"]),
        (nn.NLLLoss(), normal(4, 3), (uniform(4, 3),), ["float64", "int64 and shape", "long"]),
        (
            nn.CrossEntropyLoss(uniform(4)),
            normal(5, 3),
            (classes(3, 5),),
            [r"class weights of shape \(4,\)", "3 classes", "Correct `weight`"],
        ),
    ],
)
def test_check_refuses(
    criterion: nn.Module, x: Tensor, targets: tuple[Any, ...], parts: list[str]
) -> None:
    with refused(CriterionError, type(criterion).__name__, *parts):
        check(criterion, x, *targets)


@pytest.mark.parametrize(
    ("criterion", "x", "y", "parts"),
    [
        (
            nn.CrossEntropyLoss(),
            normal(2, 3),
            torch.tensor([0, 3]),
            ["class 3", "3 classes", "0 to 2"],
        ),
        (nn.CrossEntropyLoss(), normal(2, 3), torch.tensor([-1, 2]), ["class -1", "start at 1"]),
        (nn.CrossEntropyLoss(), normal(1, 2), torch.tensor([[math.nan, 1.0]]), ["finite", "NaN"]),
        (
            nn.CrossEntropyLoss(),
            normal(1, 2),
            torch.tensor([[-0.5, 1.5]]),
            ["negative", "from 0 up"],
        ),
        (nn.NLLLoss(), normal(2, 3), torch.tensor([0, 1]), ["sum to 1", "LogSoftmax", "CrossEnt"]),
        (
            nn.PoissonNLLLoss(log_input=False),
            uniform(2),
            torch.tensor([1.0, -1.0]),
            ["negative target", "from 0 up"],
        ),
        (
            nn.BCEWithLogitsLoss(pos_weight=uniform(2)),
            normal(2),
            torch.tensor([1.0, -1.0]),
            ["negative target", "Correct"],
        ),
    ],
)
def test_check_values_refuses(criterion: nn.Module, x: Tensor, y: Tensor, parts: list[str]) -> None:
    check(criterion, x, y)
    with refused(CriterionError, type(criterion).__name__, *parts):
        check_values(criterion, x, y)


def test_log_probabilities_in_half_precision_pass() -> None:
    x = torch.log_softmax(3 * normal(64, 50), 1)
    for dtype in (torch.bfloat16, torch.float16):
        check_values(nn.NLLLoss(), x.to(dtype), classes(50, 64))


def test_reduction_none_is_refused() -> None:
    for criterion in (nn.MSELoss(reduction="none"), nn.HuberLoss(reduction="none")):
        with refused(UnsupportedError, 'reduction="none"', '"mean" and "sum"', "Choose"):
            check(criterion, normal(4), normal(4))


def test_a_criterion_that_does_not_return_one_number_is_refused() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - y

    with refused(CriterionError, r"Many returned float64 of shape \(4,\)", "one number", "Reduce"):
        curvature(Many(), normal(4), normal(4)).product(normal(4))


def test_a_criterion_without_second_derivative_is_refused() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square().sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * g

    class Loss(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return Once.apply(x - y)

    with refused(UnsupportedError, "Loss cannot be differentiated twice", 'fisher="empirical"'):
        curvature(Loss(), normal(4), normal(4)).draw(generator())


def test_a_dense_hessian_that_is_too_large_is_refused() -> None:
    x = normal(700, 3)
    with refused(UnsupportedError, "couples 2100 elements", r"\(700, 3\)", "2048", "empirical"):
        curvature(_Contrastive(), x, x).product(x)
