"""Bases of a wide side's leading eigenvectors and its own axes, against whole eigenbases."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from kronewton import KFAC, structure
from kronewton.drift import TOLERATED, Renewal, drift, find_by_products, outside, price
from kronewton.errors import NotPositiveDefinite, StateError
from kronewton.inverse import EigenInverse, eigen_basis
from kronewton.normalised import Moments, in_curvature
from kronewton.pair import Product
from kronewton.structure import (
    DENSE,
    DIAGONAL,
    FEWEST,
    MOST,
    ONE_IN,
    WIDE,
    Blocks,
    Leading,
    Sides,
    in_full,
)

pytestmark = pytest.mark.usefixtures("float64")

K = WIDE // ONE_IN


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(d: int, seed: int = 0, n: int = 0) -> Tensor:
    """A second moment with a spectrum as of images, each eigenvalue a square's share."""
    basis = torch.linalg.qr(drawn(d, d, seed=99)).Q
    rows = drawn(n or 3 * d, d, seed=seed) * torch.arange(1.0, d + 1) ** -1 @ basis
    return rows.T @ rows / len(rows)


def orthonormal(d: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(drawn(d, k, seed=seed)).Q


def renewed(
    product: Product, old: EigenInverse | None = None, worth: Sequence[bool] = (True, True)
) -> EigenInverse:
    renewal = Renewal(product, old, "layer", worth)
    find_by_products([renewal])
    return renewal.basis()


# The frame.


def test_coordinates_keep_lengths_and_lead_back():
    side, U, G = Leading(6), orthonormal(20, 6), drawn(20, 9, seed=1)
    found = side.rotate(U, G)
    assert found.shape == (26, 9)
    torch.testing.assert_close(side.rotate_back(U, found), G)
    torch.testing.assert_close(found.norm(dim=0), G.norm(dim=0))
    F = side.frame(U)
    torch.testing.assert_close(F, side.rotate(U, torch.eye(20)))
    torch.testing.assert_close(F.T @ F, torch.eye(20))
    other = drawn(26, 9, seed=2)  # of which no gradient is
    torch.testing.assert_close(side.rotate_back(U, other), F.T @ other)
    torch.testing.assert_close(side.rotate_rows(G.T, U), found.T)
    torch.testing.assert_close(side.rotate_rows_back(other.T, U), (F.T @ other).T)


@pytest.mark.parametrize("on_output", [False, True])
def test_a_layers_matrix_is_turned_on_both_sides(on_output):
    U, V, G = orthonormal(20, 6), orthonormal(8, 8, 1), drawn(8, 20, seed=2)
    U_A, U_B, sides = U, V, Sides(Leading(6), DENSE)
    F_A, F_B = Leading(6).frame(U), V.T
    if on_output:
        U_A, U_B, sides, F_A, F_B, G = V, U, Sides(DENSE, Leading(6)), F_B, F_A, G.T
    s = torch.ones(F_B.shape[0], F_A.shape[0])
    basis = EigenInverse(U_A, U_B, s, sides)
    assert basis.shape == G.shape
    torch.testing.assert_close(basis.rotate(G), F_B @ G @ F_A.T)
    other = drawn(*s.shape, seed=3)
    torch.testing.assert_close(basis.rotate_back(other), F_B.T @ other @ F_A)


def test_with_no_weights_rounds_are_those_of_the_matrix_itself():
    """Lengths are kept by the coordinates, and so are singular values."""
    G, U = drawn(16, 80, seed=1), orthonormal(80, 20)
    basis = EigenInverse(U, orthonormal(16, 16, 1), torch.ones(16, 100), Sides(Leading(20)))
    plain = EigenInverse(torch.eye(80), torch.eye(16), torch.ones(16, 80))
    step = {"fc": basis.rotate(G)}
    found = in_curvature(step, {"fc": basis}, {"fc": 1000})["fc"]
    wanted = in_curvature({"fc": G}, {"fc": plain}, {"fc": 1000})["fc"]
    torch.testing.assert_close(basis.rotate_back(found), wanted)


def test_moments_are_carried_into_a_new_frame():
    side, U, V = Leading(6), orthonormal(20, 6), orthonormal(20, 6, 1)
    x, v = drawn(20, 4, seed=2), drawn(26, 4, seed=3).square()
    m, carried = side.turn(side.rotate(U, x), v, U, V)
    torch.testing.assert_close(m, side.rotate(V, x))
    squares = side.between(U, V).square()
    torch.testing.assert_close(side.between(U, V), side.frame(V) @ side.frame(U).T)
    squares[6:, 6:] = torch.eye(20)  # what is outside of both stays where it is
    torch.testing.assert_close(carried, squares @ v)
    same_m, same_v = side.turn(m, v, V, V)
    torch.testing.assert_close(same_m, m)
    torch.testing.assert_close(same_v, v)


@pytest.mark.parametrize("kind", [DENSE, DIAGONAL, Blocks(5, 20)])
def test_moments_go_to_and_from_a_basis_that_is_kept_otherwise(kind):
    side, U = Leading(6), orthonormal(20, 6)
    other, _ = (torch.zeros(0), None) if kind == DIAGONAL else torch.linalg.qr(drawn(20, 20))
    if isinstance(kind, Blocks):
        other = torch.linalg.qr(drawn(4, 5, 5)).Q
    P, G = orthonormal(7, 7), drawn(7, 20, seed=4)
    first = EigenInverse(other, P, torch.ones(7, 20), Sides(kind, DENSE))
    second = EigenInverse(U, P, torch.ones(7, 26), Sides(side, DENSE))
    moments = Moments(first.rotate(G))
    moments.m, moments.v = first.rotate(G), first.rotate(G).square()
    v = moments.v
    moments.turn_(first, second)
    torch.testing.assert_close(moments.m, second.rotate(G))
    F = torch.eye(20) if kind == DIAGONAL else kind.frame(other)
    squares = (side.frame(U) @ F.T).square()
    torch.testing.assert_close(moments.v, v @ squares.T)
    moments.turn_(second, first)
    torch.testing.assert_close(moments.m, first.rotate(G))
    torch.testing.assert_close(moments.v, v @ squares.T @ squares)


def test_leading_coordinates_keep_their_mean_squares_where_all_vectors_are_found():
    """Not by way of the axes, where what is known of each would be mixed with all others'."""
    V, v = orthonormal(20, 20), torch.logspace(0, -3, 20).flip(0)
    first = EigenInverse(V[:, -6:], torch.zeros(0), torch.ones(1, 26), Sides(Leading(6), DIAGONAL))
    second = EigenInverse(V, torch.zeros(0), torch.ones(1, 20), Sides(DENSE, DIAGONAL))
    moments = Moments(torch.zeros(1, 26))
    moments.v[0, :6] = v[-6:]
    moments.turn_(first, second)
    torch.testing.assert_close(moments.v[0, -6:], v[-6:])
    torch.testing.assert_close(moments.v[0, :-6], torch.zeros(14))


def test_moments_of_a_layer_that_had_no_basis_are_carried():
    G, U = drawn(7, 20, seed=4), torch.eye(20)[:, :6]  # which leave nothing outside of themselves
    new = EigenInverse(U, torch.zeros(0), torch.ones(7, 26), Sides(Leading(6), DIAGONAL))
    moments = Moments(G)
    moments.m, moments.v = G, G.square()
    moments.turn_(None, new)
    torch.testing.assert_close(moments.m, new.rotate(G))
    torch.testing.assert_close(moments.v, new.rotate(G).square())


# Which sides have one, and what it is.


@pytest.mark.parametrize(
    ("sides", "d_out", "d_in", "wanted"),
    [
        (Sides(), 32, WIDE, Sides(Leading(32), DENSE)),
        (Sides(), 100, WIDE, Sides(Leading(K), DENSE)),
        (Sides(), 10, 2000, Sides(Leading(FEWEST), DENSE)),
        (Sides(), 32, WIDE - 1, Sides()),
        (Sides(), WIDE, 32, Sides(DENSE, Leading(K))),
        (Sides(), WIDE, WIDE, Sides()),
        (Sides(), 300, 599, Sides()),
        (Sides(), 300, 600, Sides(Leading(150), DENSE)),
        (Sides(), 600, 300, Sides(DENSE, Leading(150))),
        (Sides(), 500, 2000, Sides(Leading(MOST), DENSE)),
        (Sides(), 2000, 8, Sides(DENSE, Leading(MOST))),
        (Sides(DENSE, DIAGONAL), 784, WIDE, Sides(Leading(K), DIAGONAL)),
        (Sides(DIAGONAL, DENSE), WIDE, 50_000, Sides(DIAGONAL, Leading(K))),
        (Sides(DENSE, Blocks(256, 1024)), 1024, 256, Sides(DENSE, Blocks(256, 1024))),
    ],
)
def test_the_longer_side_has_leading_eigenvectors_where_it_is_wide(sides, d_out, d_in, wanted):
    assert in_full(sides, d_out, d_in) == wanted


def test_a_basis_tells_coordinates_apart_and_keeps_the_trace():
    one = Product(factor(20, 1), factor(WIDE + 8), Sides())
    found, k = renewed(one), 20
    assert found.sides == Sides(Leading(k), DENSE)
    assert found.U_A.shape == (WIDE + 8, k)
    assert found.s.shape == (20, WIDE + 8 + k)
    s_A = found.spectra[0] / found.spectra[0].sum() * one.Q.trace()
    torch.testing.assert_close(found.s.sum(), one.Q.trace() * one.P.trace())
    assert float(drift(found.sides.input, one.Q, found.U_A, s_A)) < TOLERATED
    best = eigen_basis(one.Q, one.P, "layer").spectra[0] / one.P.trace()
    assert float(s_A[:k].sum()) > 0.98 * float(best[-k:].sum())
    left = one.Q.diagonal() - (found.U_A.square() * s_A[:k]).sum(1)
    torch.testing.assert_close(s_A[k:], left)


def test_drift_is_that_of_the_leading_eigenvectors_with_all_others():
    M, k = factor(WIDE), 20
    U = torch.linalg.eigh(M).eigenvectors[:, -k:]
    side = Leading(k)
    s = torch.cat([(U * (M @ U)).sum(0), side._rest(M, (U * (M @ U)).sum(0), U)])
    assert float(drift(side, M, U, s)) < 1e-12
    turned = torch.linalg.qr(U + 0.1 * drawn(WIDE, k) / WIDE**0.5).Q
    assert float(drift(side, M, turned, s)) > 1.0


def test_a_basis_stays_while_it_serves_and_is_found_from_the_old_one(monkeypatch):
    one, other = (Product(factor(20, s), factor(WIDE, s + 1), Sides()) for s in (0, 5))
    old = renewed(one)
    again = renewed(Product(one.P, 2 * one.Q, Sides()), old)
    assert again.U_A is old.U_A
    torch.testing.assert_close(again.s, 2 * old.s)
    turned = torch.linalg.qr(torch.eye(WIDE) + 0.002 * drawn(WIDE, WIDE, seed=7)).Q
    asked, real = [], structure.leading_eigen
    monkeypatch.setattr(structure, "leading_eigen", lambda *args: asked.append(args) or real(*args))
    new = renewed(Product(one.P, turned @ one.Q @ turned.T, Sides()), old)
    assert new.U_A is not old.U_A
    assert asked[0][2] is old.U_A
    kept = renewed(other, old, (False, False))
    assert kept.U_A is old.U_A


@pytest.mark.parametrize("size", [5.0, 50.0])
def test_what_comes_up_outside_is_noticed_though_it_is_correlated_with_no_leading_one(size):
    one = Product(factor(K, 1), factor(WIDE), Sides())
    old = renewed(one)
    s = old.spectra[0] / old.spectra[0].sum() * one.Q.trace()
    side = Leading(K)
    assert float(outside(side, one.Q, old.U_A, s)) < 1.5
    w = drawn(WIDE, 10, seed=8)
    w = torch.linalg.qr(w - old.U_A @ (old.U_A.T @ w)).Q
    other = Product(one.P, one.Q + size * w @ w.T, Sides())
    s = s * other.Q.trace() / one.Q.trace()
    assert float(drift(side, other.Q, old.U_A, s)) < TOLERATED
    assert float(outside(side, other.Q, old.U_A, s)) > 2
    new = renewed(other, old)
    assert new.U_A is not old.U_A
    torch.testing.assert_close((new.U_A.T @ w).square().sum(0), torch.ones(10), rtol=0, atol=1e-3)


def test_a_basis_that_is_not_worth_finding_stays_in_whatever_way_it_is_kept():
    Q = factor(280)
    old = renewed(Product(torch.eye(200), Q, Sides()))
    assert old.sides == Sides(Leading(70), DIAGONAL)
    now = Product(factor(200, 2), Q, Sides())
    kept = renewed(now, old, (False, True))
    assert kept.U_A is old.U_A
    assert kept.sides == Sides(Leading(70), DENSE)
    assert renewed(now, kept).sides == Sides()


@pytest.mark.parametrize("again", [False, True])
def test_by_products_alone_it_is_nearly_the_same(again, monkeypatch):
    monkeypatch.setattr("kronewton.drift.by_products", lambda M: True)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    one = Product(factor(K, 1), factor(WIDE), Sides())
    found = renewed(one)
    if again:
        turned = orthonormal(WIDE, WIDE, 7)
        one = Product(factor(K, 2), turned @ factor(WIDE, 3) @ turned.T, Sides())
        found = renewed(one, found)
    U, s_A = found.U_A, found.spectra[0] / found.spectra[0].sum() * one.Q.trace()
    torch.testing.assert_close(U.T @ U, torch.eye(K), rtol=0, atol=1e-9)
    monkeypatch.undo()
    best = torch.linalg.eigh(one.Q).eigenvalues[-K:].sum()
    assert float(s_A[:K].sum()) > 0.97 * float(best)


@pytest.mark.parametrize("d", [WIDE, WIDE + 1])
def test_zeros_and_what_is_not_finite(d):
    nothing = renewed(Product(factor(20), torch.zeros(d, d), Sides()))
    assert nothing.s.isfinite().all()
    assert nothing.U_A.isfinite().all()
    with pytest.raises(NotPositiveDefinite, match="input factor A of layer 'layer'"):
        renewed(Product(factor(20), torch.full((d, d), torch.nan), Sides()))


def test_it_costs_as_many_products_as_it_has_vectors():
    M = torch.zeros(512, 512)
    assert price(M, Leading(128), 10**6) == price(M, DENSE, 10**6) / 4


# In a training.

WIDTHS = (300, 24, 300)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(WIDTHS)]
    return nn.Sequential(*layers, nn.Linear(WIDTHS[-1], 24), nn.Tanh(), nn.Linear(24, 3))


class Training:
    def __init__(self, seed: int = 1, **options: object) -> None:
        self.model, self.criterion = network(seed), nn.MSELoss()
        self.optimizer = KFAC(self.model, self.criterion, **options)
        hidden = drawn(600, 300, seed=4)
        self.x = 3 * hidden * torch.arange(1.0, 301) ** -0.7 @ orthonormal(300, 300, 3)
        self.y = torch.sin(2 * hidden[:, :3])

    def steps(self, which: Sequence[int]) -> float:
        for k in which:
            rows = torch.arange(100) + 100 * (k % 6)
            self.optimizer.zero_grad()
            x = self.x[rows].to(next(self.model.parameters()).dtype)
            loss = self.criterion(self.model(x), self.y[rows].to(x.dtype))
            loss.backward()
            self.optimizer.step()
        assert not int(self.optimizer.diagnostics()["skipped"])
        return float(loss.detach())

    def bases(self) -> list[EigenInverse]:
        found = self.optimizer._curvature.inverses.values()
        return [basis for basis in found if isinstance(basis, EigenInverse)]

    def weights(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()


def of_kind(training: Training) -> int:
    return sum(isinstance(side, Leading) for b in training.bases() for side in b.sides)


def test_a_training_takes_as_many_steps_as_with_whole_bases(monkeypatch):
    """In the mean of three: one alone ends anywhere within a factor of two."""
    found = {}
    for kind, leading in (("leading", 3), ("whole", 0)):
        losses = []
        for seed in range(3):
            training = Training(seed)
            losses.append(math.log(training.steps(range(60))))
            assert of_kind(training) == leading
        found[kind] = sum(losses) / len(losses)
        monkeypatch.setattr("kronewton.structure.WIDE", 10**6)
    assert found["leading"] < found["whole"] + 0.35
    assert found["whole"] < math.log(0.04)


@pytest.mark.parametrize("basis", ["adam", "orthogonal"])
def test_a_training_goes_on_from_its_state_bit_for_bit(basis):
    whole = Training(basis=basis)
    whole.steps(range(12))
    first, resumed = Training(basis=basis), Training(basis=basis)
    first.steps(range(7))
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert of_kind(resumed) == 3
    resumed.steps(range(7, 12))
    assert resumed.weights().equal(whole.weights())


def test_a_state_goes_on_where_the_other_side_has_its_own_axes():
    """The outputs of a squared error have nothing to do with each other."""

    def trained(k: int, state: object = None) -> tuple[KFAC, Tensor]:
        torch.manual_seed(0)
        model, criterion = nn.Linear(280, 200), nn.MSELoss()
        optimizer = KFAC(model, criterion, basis="orthogonal")
        x = drawn(800, 280) * torch.arange(1.0, 281) ** -0.5 @ orthonormal(280, 280)
        target = drawn(800, 200, seed=1)
        for i in range(8):
            if i == k and state is None:
                saved.append((copy.deepcopy(model.state_dict()), optimizer.state_dict()))
            if i < k and state is not None:
                continue
            if i == k and state is not None:
                model.load_state_dict(state[0])
                optimizer.load_state_dict(state[1])
            rows = slice(100 * i, 100 * i + 100)
            optimizer.zero_grad()
            criterion(model(x[rows]), target[rows]).backward()
            optimizer.step()
        return optimizer, nn.utils.parameters_to_vector(model.parameters())

    saved: list[object] = []
    optimizer, weights = trained(5)
    (basis,) = optimizer._curvature.inverses.values()
    assert basis.sides == Sides(Leading(70), DIAGONAL)
    _, resumed = trained(5, saved[0])
    assert resumed.equal(weights)


def test_a_state_with_whole_bases_goes_on_with_leading_ones(monkeypatch):
    monkeypatch.setattr("kronewton.structure.WIDE", 10**6)
    before = Training(basis="orthogonal")
    before.steps(range(12))
    assert of_kind(before) == 0
    monkeypatch.undo()
    after = Training(basis="orthogonal")
    after.model.load_state_dict(before.model.state_dict())
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    assert after.steps(range(12, 110)) < before.steps(range(12, 13))
    assert of_kind(after) == 3
    assert {moments.steps for moments in after.optimizer._curvature.moments.values()} == {110}


@pytest.mark.parametrize("key", ["inverse_U_A", "inverse_s", "moments_m"])
def test_a_state_whose_parts_do_not_fit_is_refused(key):
    training = Training(basis="orthogonal")
    training.steps(range(3))
    state = training.optimizer.state_dict()
    kept = next(k for k in state["state"].values() if "kfac_inverse_U_A" in k)
    kept[f"kfac_{key}"] = kept[f"kfac_{key}"][..., 1:]
    with pytest.raises(StateError, match="which needs"):
        Training(basis="orthogonal").optimizer.load_state_dict(state)


def test_no_inverse_has_the_shape_of_leading_eigenvectors():
    training = Training(basis="factored")
    training.steps(range(2))
    state = training.optimizer.state_dict()
    kept = next(k for k in state["state"].values() if "kfac_inverse_A_inverse" in k)
    kept["kfac_inverse_A_inverse"] = kept["kfac_inverse_A_inverse"][:, :75]
    with pytest.raises(StateError, match=r"A_inverse of an inverse of shape \(301, 75\)"):
        Training(basis="factored").optimizer.load_state_dict(state)


def test_a_model_may_be_cast_in_mid_training():
    training = Training(basis="orthogonal")
    before = training.steps(range(6))
    training.model.float()
    assert training.steps(range(6, 30)) < before
    assert of_kind(training) == 3


def test_the_coverage_says_of_which_sides_not_all_eigenvectors_are_there():
    training = Training(basis="orthogonal")
    training.steps(range(2))
    methods = [
        row.method for row in training.optimizer.coverage().rows if row.parameter[-6:] == "weight"
    ]
    assert methods == [
        "K-FAC orthogonal; input by 24 of 301 eigenvectors",
        "K-FAC orthogonal; output by 75 of 300 eigenvectors",
        "K-FAC orthogonal; input by 24 of 301 eigenvectors",
        "K-FAC orthogonal",
    ]


@pytest.mark.parametrize(("d", "n"), [(WIDE, 0), (2 * WIDE, 128)])
def test_few_of_many_are_found_well_enough_not_to_count_as_drifted(d, n):
    M, side = factor(d, n=n), Leading(FEWEST)
    s, U = side.eigen(M, "A")
    assert U.shape == (d, FEWEST)
    assert float(drift(side, M, U, s)) < 0.5 * TOLERATED
    assert float(s[:FEWEST].sum()) > 0.999 * float(torch.linalg.eigvalsh(M)[-FEWEST:].sum())
