"""Inverses against the dense solve, their failures, and when they are renewed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kronewton import KFAC, curvature, inverse
from kronewton.errors import NotPositiveDefinite
from kronewton.inverse import EigenInverse, balance, eigen_basis, factored_inverse
from kronewton.renewals import SELDOM, due, due_in_turn, turn_of

pytestmark = pytest.mark.usefixtures("float64")


def positive(d: int, rank: int | None = None) -> Tensor:
    rows = torch.randn(d + 2 if rank is None else rank, d)
    return rows.T @ rows


def solved(matrix: Tensor, G: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, G.flatten()).reshape(G.shape)


# Factored.


@pytest.mark.parametrize("damping", [1e-6, 0.3, 20.0])
def test_factored_is_the_dense_inverse_with_pi_damping(damping):
    A, B, G = positive(4), 100 * positive(3), torch.randn(3, 4)
    pi = math.sqrt((float(A.trace()) / 4) / (float(B.trace()) / 3))
    A_damped = A + pi * math.sqrt(damping) * torch.eye(4)
    B_damped = B + math.sqrt(damping) / pi * torch.eye(3)
    dense = solved(torch.kron(B_damped, A_damped), G)
    found = factored_inverse(A, B, damping, "fc").apply(G, math.nan)
    torch.testing.assert_close(found, dense, rtol=1e-10, atol=1e-12)


def test_pi_balances_the_mean_eigenvalues():
    assert float(balance(4 * torch.eye(3), 9 * torch.eye(2))) == pytest.approx(2 / 3)


@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_pi_is_one_where_a_factor_is_zero(zero):
    A = torch.zeros(3, 3) if zero in ("A", "both") else positive(3)
    B = torch.zeros(2, 2) if zero in ("B", "both") else positive(2)
    assert float(balance(A, B)) == 1.0


@pytest.mark.parametrize("zero", ["A", "B", "both"])
@pytest.mark.parametrize("kind", ["factored", "eigen"])
def test_a_zero_factor_gives_a_finite_descent_direction(zero, kind):
    A = torch.zeros(3, 3) if zero in ("A", "both") else positive(3)
    B = torch.zeros(2, 2) if zero in ("B", "both") else positive(2)
    G = torch.randn(2, 3)
    made = factored_inverse(A, B, 0.1, "fc") if kind == "factored" else eigen_basis(A, B, "fc")
    D = made.apply(G, 0.1)
    assert torch.isfinite(D).all()
    assert float((D * G).sum()) > 1e-3 * float(G.square().sum())


def test_factored_is_exact_only_for_a_multiple_of_the_identity():
    G, B = torch.randn(3, 4), positive(3)
    for A, exact in ((torch.zeros(4, 4), False), (positive(4), False), (torch.eye(4), False)):
        dense = solved(torch.kron(B, A) + 0.3 * torch.eye(12), G)
        assert torch.allclose(factored_inverse(A, B, 0.3, "fc").apply(G, 0.3), dense) is exact
    # Both at once: (β + √λ/π)(α + π√λ) is αβ + λ only up to the mixed terms.
    found = factored_inverse(2 * torch.eye(4), 8 * torch.eye(3), 0.25, "fc").apply(G, 0.25)
    torch.testing.assert_close(found, G / ((2 + 0.25) * (8 + 1.0)))


# In the eigenbasis.


@pytest.mark.parametrize("damping", [1e-8, 0.3, 20.0])
def test_eigen_is_the_dense_solve(damping):
    A, B, G = positive(4), positive(3, rank=2), torch.randn(3, 4)
    dense = solved(torch.kron(B, A) + damping * torch.eye(12), G)
    found = eigen_basis(A, B, "fc").apply(G, damping)
    assert float((found - dense).norm() / dense.norm()) < (1e-10 if damping > 1e-7 else 1e-5)


def test_eigen_without_damping_is_the_pseudo_inverse():
    A, B, G = positive(4, rank=2), positive(3, rank=2), torch.randn(3, 4)
    dense = (torch.linalg.pinv(torch.kron(B, A), rtol=1e-12) @ G.flatten()).reshape(3, 4)
    found = eigen_basis(A, B, "fc").apply(G, 0.0)
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-8)


def test_eigen_without_damping_and_curvature_does_not_move():
    found = eigen_basis(torch.zeros(3, 3), torch.zeros(2, 2), "fc").apply(torch.randn(2, 3), 0.0)
    assert found.equal(torch.zeros(2, 3))


@pytest.mark.parametrize("kind", ["factored", "eigen"])
@pytest.mark.parametrize("c", [1e-6, 1e6])
def test_loss_and_damping_times_c_give_the_direction_over_c(kind, c):
    A, B, G = positive(4), positive(3), torch.randn(3, 4)

    def direction(B: Tensor, damping: float) -> Tensor:
        if kind == "factored":
            return factored_inverse(A, B, damping, "fc").apply(G, damping)
        return eigen_basis(A, B, "fc").apply(G, damping)

    torch.testing.assert_close(direction(c * B, c * 0.3) * c, direction(B, 0.3), rtol=1e-9, atol=0)


def test_corrected_eigenvalues_take_the_place_of_the_products():
    U_A, U_B = torch.linalg.qr(torch.randn(4, 4))[0], torch.linalg.qr(torch.randn(3, 3))[0]
    s, G = torch.rand(3, 4), torch.randn(3, 4)
    U = torch.kron(U_B, U_A)
    dense = solved(U @ torch.diag(s.flatten()) @ U.T + 0.1 * torch.eye(12), G)
    torch.testing.assert_close(EigenInverse(U_A, U_B, s).apply(G, 0.1), dense)


@pytest.mark.parametrize("kind", ["factored", "eigen"])
def test_what_is_saved_makes_the_same_inverse(kind):
    A, B, G = positive(4), positive(3), torch.randn(3, 4)
    made = factored_inverse(A, B, 0.1, "fc") if kind == "factored" else eigen_basis(A, B, "fc")
    assert type(made)(**made.tensors()).apply(G, 0.1).equal(made.apply(G, 0.1))


# Failures.


@pytest.mark.parametrize("make", [lambda A, B: factored_inverse(A, B, 0.1, "net.fc1"), None])
@pytest.mark.parametrize("side", ["A", "B"])
def test_failures_name_the_layer_and_the_factor(make, side):
    A, B = positive(3), positive(2)
    {"A": A, "B": B}[side][0, 0] = math.nan
    told = {"A": "the input factor A", "B": "the gradient factor B"}[side]
    with pytest.raises(NotPositiveDefinite, match=f"{told} of layer 'net.fc1' holds values"):
        (make or (lambda A, B: eigen_basis(A, B, "net.fc1")))(A, B)


def broken(*args, **kwargs):
    raise NotPositiveDefinite("the input factor A of layer '0': injected")


class Run:
    """A small net whose every step has factors and inverses due."""

    def __init__(self, basis: str, dtype: torch.dtype = torch.float64) -> None:
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        self.criterion = nn.MSELoss()
        self.optimizer = KFAC(
            self.model, self.criterion, lr=0.1, momentum=0.0, damping=0.1, trust_region=None,
            fisher="exact", basis=basis, factor_every=1, inverse_every=1,
        )  # fmt: skip
        self.x, self.y = torch.randn(6, 3).to(dtype), torch.randn(6, 2).to(dtype)

    def step(self) -> Tensor:
        before = nn.utils.parameters_to_vector(self.model.parameters()).detach()
        self.optimizer.zero_grad()
        self.criterion(self.model(self.x), self.y).backward()
        self.optimizer.step()
        return nn.utils.parameters_to_vector(self.model.parameters()).detach() - before

    def failed(self) -> int:
        return int(self.optimizer.diagnostics()["failed_inversions"])


@pytest.mark.parametrize("basis", ["factored", "eigen", "corrected"])
def test_a_failed_inversion_keeps_the_last_good_inverse_and_is_counted(basis, monkeypatch):
    run = Run(basis)
    run.step()
    assert run.failed() == 0
    kept = {n: i.tensors() for n, i in run.optimizer._curvature.inverses.items()}
    name = "factored_inverse" if basis == "factored" else "eigen_basis"
    monkeypatch.setattr(curvature, name, broken)
    moved = run.step()
    assert torch.isfinite(moved).all()
    assert float(moved.norm()) > 0
    assert run.failed() == 2  # two layers
    for layer, found in run.optimizer._curvature.inverses.items():
        for key, tensor in found.tensors().items():
            if key != "s":  # corrected eigenvalues run on in the old basis
                assert tensor.equal(kept[layer][key])
    monkeypatch.undo()
    run.step()
    assert run.failed() == 2


@pytest.mark.parametrize("basis", ["factored", "eigen", "corrected"])
def test_a_first_inversion_that_fails_is_raised_and_leaves_the_weights(basis, monkeypatch):
    run = Run(basis)
    before = [p.clone() for p in run.model.parameters()]
    if basis == "factored":
        monkeypatch.setattr(curvature, "factored_inverse", broken)
    else:
        monkeypatch.setattr(curvature, "eigen_basis", broken)
    with pytest.raises(NotPositiveDefinite, match="layer '0'"):
        run.step()
    assert all(p.equal(q) for p, q in zip(run.model.parameters(), before, strict=True))


@pytest.mark.parametrize("basis", ["factored", "eigen", "corrected"])
def test_lapack_that_gives_up_in_float32_changes_nothing_but_rounding(basis, monkeypatch):
    torch.manual_seed(1)
    wanted = Run(basis, torch.float32).step()
    real_eigh, real_cholesky = torch.linalg.eigh, torch.linalg.cholesky_ex

    def eigh(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("injected")
        return real_eigh(matrix)

    def cholesky_ex(matrix):
        factor, info = real_cholesky(matrix)
        return factor, torch.ones_like(info) if matrix.dtype == torch.float32 else info

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky_ex)
    torch.manual_seed(1)
    run = Run(basis, torch.float32)
    torch.testing.assert_close(run.step(), wanted, rtol=1e-3, atol=1e-5)
    assert run.failed() == 0


# When inverses are renewed.


def test_due_at_powers_and_then_every_so_many_steps():
    assert [s for s in range(45) if due(s, 20)] == [0, 1, 2, 4, 8, 16, 20, 40]
    assert [s for s in range(101) if due(s, 50, SELDOM)] == [0, 5, 25, 50, 100]
    assert [s for s in range(101) if due(s, 50, SELDOM | {1})] == [0, 1, 5, 25, 50, 100]
    assert all(due(s, 1) for s in range(5))


def test_renewals_have_their_places_one_after_the_other():
    assert [turn_of(s, 50) for s in range(151) if due(s, 50, SELDOM)] == [0, 1, 2, 1, 2, 3]
    assert [turn_of(s, 4) for s in range(21) if due(s, 4)] == [0, 0, 1, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("layers", "every"), [(3, 20), (7, 5), (5, 5), (1, 3), (4, 1)])
def test_after_the_start_every_layer_has_its_own_turn_once_a_period(layers, every):
    names = [f"l{i}" for i in range(layers)]
    assert due_in_turn(0, every, names) == set(names)
    period = [due_in_turn(s, every, names) for s in range(every, 2 * every)]
    assert sorted(n for turn in period for n in turn) == sorted(names)
    assert max(map(len, period)) <= -(-layers // every)  # no step inverts more than its share
    later = [due_in_turn(s, every, names) for s in range(3 * every, 4 * every)]
    assert later == period


def test_mutant_swapped_factors_are_caught(monkeypatch):
    real = inverse.kronecker_apply
    monkeypatch.setattr(inverse, "kronecker_apply", lambda B, A, G, sides: real(A, B, G))
    A, B, G = positive(3), positive(3), torch.randn(3, 3)
    dense = solved(torch.kron(B, A), G)
    found = factored_inverse(A, B, 0.0, "fc").apply(G, 0.0)
    assert not torch.allclose(found, dense, rtol=1e-3)
    monkeypatch.undo()
    found = factored_inverse(A, B, 0.0, "fc").apply(G, 0.0)
    torch.testing.assert_close(found, dense, rtol=1e-8, atol=1e-9)
