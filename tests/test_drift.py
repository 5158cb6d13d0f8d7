"""Eigenbases that are renewed side by side, where they have drifted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from kronewton import KFAC, structure
from kronewton.drift import (
    ASKED,
    INDEPENDENT,
    RAREST,
    SMALL,
    TOLERATED,
    Renewal,
    drift,
    find_by_products,
    pays,
    price,
)
from kronewton.errors import NotPositiveDefinite
from kronewton.inverse import eigen_basis
from kronewton.pair import Product
from kronewton.structure import DENSE, DIAGONAL, Blocks, Sides, fused

pytestmark = pytest.mark.usefixtures("float64")

LARGE = SMALL + 16


def correlated(d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * d, d, generator=generator) @ torch.randn(d, d, generator=generator)
    return rows.T @ rows / (4 * d)


def renewed(product, old, name, *worth):
    """The basis of one layer alone."""
    renewal = Renewal(product, old, name, *worth)
    find_by_products([renewal])
    return renewal.basis()


def product(seed: int = 0) -> Product:
    return Product(correlated(LARGE, seed), correlated(LARGE + 1, seed + 1), Sides())


def test_a_first_basis_is_the_eigenbasis():
    one = product()
    found, exact = renewed(one, None, "layer"), eigen_basis(one.Q, one.P, "layer")
    assert found.U_A.equal(exact.U_A)
    assert found.U_B.equal(exact.U_B)
    torch.testing.assert_close(found.s, exact.s)


def test_drift_is_that_of_all_coordinates_of_a_small_matrix():
    M, U = correlated(12, 3), torch.linalg.qr(correlated(12, 4)).Q
    s = (U.T @ M @ U).diagonal()
    turned = U.T @ M @ U
    m = s + 1e-4 * s.mean()
    squares = (turned.square() / m.unsqueeze(1) / m).fill_diagonal_(0)
    torch.testing.assert_close(drift(DENSE, M, U, s), squares.sum(0).mean())


@pytest.mark.parametrize("structure", [DENSE, Blocks(16, LARGE)])
def test_there_is_no_drift_in_an_eigenbasis(structure):
    M = structure.of_dense(correlated(LARGE, 1))
    s, U = structure.eigen(M, "factor")
    assert float(drift(structure, M, U, s)) < 1e-12
    assert float(drift(structure, structure.of_dense(correlated(LARGE, 2)), U, s)) > TOLERATED


def test_each_side_is_renewed_only_where_it_has_drifted():
    one, other = product(0), product(7)
    old = renewed(one, None, "layer")
    mixed = Product(one.P, other.Q, Sides())  # the rows' side as it was
    new = renewed(mixed, old, "layer")
    assert new.U_B is old.U_B
    assert new.U_A is not old.U_A
    torch.testing.assert_close(new.U_A, eigen_basis(other.Q, one.P, "layer").U_A)
    again = renewed(Product(2 * one.P, one.Q, Sides()), old, "layer")  # only scaled
    assert again.U_A is old.U_A
    assert again.U_B is old.U_B
    torch.testing.assert_close(again.s, 2 * old.s)


@pytest.mark.parametrize("stored", [DENSE, Blocks(16, LARGE), Blocks(24, LARGE)])
def test_where_eigendecompositions_are_dear_bases_are_found_by_products(stored, monkeypatch):
    sides = Sides(input=stored, output=DENSE)
    first, second = (
        Product(correlated(LARGE + 4, seed), stored.of_dense(correlated(LARGE, seed)), sides)
        for seed in (0, 5)
    )
    monkeypatch.setattr("kronewton.drift.by_products", lambda M: True)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    old = renewed(first, None, "layer")
    new = renewed(second, old, "layer")
    assert new.U_A is not old.U_A
    assert new.U_B is not old.U_B
    for one, basis in ((first, old), (second, new)):
        s_A, s_B = basis.spectra
        s_A = s_A * stored.trace(one.Q).sum() / s_A.sum()
        assert float(drift(stored, one.Q, basis.U_A, s_A)) < TOLERATED
        assert float(drift(DENSE, one.P, basis.U_B, s_B / s_B.sum() * one.P.trace())) < TOLERATED
        unit = torch.eye(LARGE)
        whole = stored.dense(basis.U_A)
        torch.testing.assert_close(whole.T @ whole, unit, rtol=0, atol=1e-9)


@pytest.mark.parametrize("together", [2**22, 2 * LARGE**2, 1])
def test_bases_of_one_shape_are_found_together_and_each_as_if_alone(together, monkeypatch):
    monkeypatch.setattr("kronewton.drift.by_products", lambda M: True)
    first = [product(seed) for seed in range(3)]
    alone = [renewed(one, None, "layer") for one in first]
    bad = Product(torch.full((LARGE, LARGE), math.nan), correlated(LARGE + 1, 0), Sides())
    asked, real = [], structure.iterated_eigen

    def counted(M: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(M.shape)
        return real(M, near)

    monkeypatch.setattr(structure, "iterated_eigen", counted)
    monkeypatch.setattr("kronewton.drift.TOGETHER", together)
    renewals = [Renewal(one, None, "layer") for one in (first[0], bad, *first[1:])]
    find_by_products(renewals)
    assert len(asked) == {2**22: 2, 2 * LARGE**2: 2 + 4, 1: 8}[together]
    for one, found in zip(alone, [renewals[0], *renewals[2:]], strict=True):
        torch.testing.assert_close(found.basis().U_A, one.U_A)
        torch.testing.assert_close(found.basis().U_B, one.U_B)
        torch.testing.assert_close(found.basis().s, one.s)
    with pytest.raises(NotPositiveDefinite, match="gradient factor B of layer 'layer'"):
        renewals[1].basis()


def test_a_group_whose_basis_is_not_sound_is_not_taken(monkeypatch):
    """As of a grouped convolution one group of which is dead, or gave NaN."""
    monkeypatch.setattr("kronewton.drift.by_products", lambda M: True)
    P, Q = (torch.stack([correlated(8, seed) for seed in some]) for some in ((0, 1), (2, 3)))
    P[1] = 0
    found = renewed(Product(P, Q, Sides()), None, "layer")
    assert found.s.isfinite().all()
    assert found.U_B.isfinite().all()
    assert not found.s[1].any()
    P[1] = math.nan
    with pytest.raises(NotPositiveDefinite, match="gradient factor B of layer 'layer'"):
        renewed(Product(P, Q, Sides()), None, "layer")


def test_a_basis_keeps_no_memory_of_those_it_was_found_with(monkeypatch):
    monkeypatch.setattr("kronewton.drift.by_products", lambda M: True)
    renewals = [Renewal(product(seed), None, "layer") for seed in range(3)]
    find_by_products(renewals)
    for renewal in renewals:
        U = renewal.basis().U_A
        assert U.untyped_storage().nbytes() == U.numel() * U.element_size()


def test_bases_that_there_is_no_memory_for_together_are_found_one_by_one(monkeypatch):
    def full(M: Tensor, near: Tensor | None) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("kronewton.drift.by_products", lambda M: True)
    monkeypatch.setattr(structure, "iterated_eigen", full)
    one = product()
    found, exact = renewed(one, None, "layer"), eigen_basis(one.Q, one.P, "layer")
    assert found.U_A.equal(exact.U_A)
    assert found.U_B.equal(exact.U_B)


def test_a_basis_that_products_do_not_find_is_an_eigendecomposition(monkeypatch):
    monkeypatch.setattr("kronewton.drift.by_products", lambda M: True)
    one = Product(correlated(12, 0), correlated(20, 1), Sides())
    monkeypatch.setattr(structure, "iterated_eigen", lambda M, near: (
        M[..., 0], M, torch.zeros(M.shape[:-2], dtype=torch.bool)))  # fmt: skip
    found, exact = renewed(one, None, "layer"), eigen_basis(one.Q, one.P, "layer")
    assert found.U_A.equal(exact.U_A)
    assert found.U_B.equal(exact.U_B)
    monkeypatch.undo()
    monkeypatch.setattr("kronewton.drift.by_products", lambda M: True)
    with pytest.raises(NotPositiveDefinite, match="gradient factor B of layer 'layer'"):
        renewed(Product(torch.full((20, 20), math.nan), correlated(20, 0), Sides()), None, "layer")


def test_small_sides_are_always_renewed():
    one = Product(correlated(5, 0), correlated(6, 1), Sides())
    old = renewed(one, None, "layer")
    assert renewed(one, old, "layer").U_A is not old.U_A


@pytest.mark.parametrize("d", [4, ASKED, SMALL])
def test_a_small_side_whose_axes_are_independent_keeps_them_from_sixteen_on(d):
    """As of outputs of squared errors, whatever their number: their noise is independent."""
    rows = torch.randn(500, d, generator=torch.Generator().manual_seed(0))
    one = Product(rows.T @ rows, correlated(LARGE, 1), Sides())
    old = renewed(one, None, "layer")
    for found in (old, renewed(one, old, "layer")):
        assert found.sides == Sides(DENSE, DENSE if d < ASKED else DIAGONAL)
    again = renewed(Product(correlated(d, 3), one.Q, Sides()), old, "layer")
    assert again.sides == Sides()
    turned = renewed(Product(one.Q, one.P, Sides()), None, "layer")
    assert turned.sides == Sides()  # of inputs that are small it is not asked


def test_a_small_side_that_is_several_of_the_other_one_has_one_basis():
    M = torch.block_diag(*(correlated(16, 10 + part) for part in range(3)))
    assert renewed(Product(M, correlated(16, 1), Sides()), None, "layer").sides == Sides()


def test_a_side_whose_axes_are_all_but_independent_keeps_them():
    one = product()
    d = one.P.shape[-1]
    P = torch.linspace(1, 5, d).diag()
    P[0, 1] = P[1, 0] = 0.1
    found = renewed(Product(P, one.Q, Sides()), None, "layer")
    assert found.sides == Sides(DENSE, DIAGONAL)
    assert found.U_B.numel() == 0
    torch.testing.assert_close(found.s.sum(1) / found.s.sum(1)[0], P.diagonal() / P[0, 0])
    G = torch.randn(d, d + 1)
    torch.testing.assert_close(found.rotate_back(found.rotate(G)), G)
    torch.testing.assert_close(found.rotate(G), G @ found.U_A)
    assert renewed(Product(correlated(d, 5), one.Q, Sides()), found, "layer").sides == Sides()
    assert INDEPENDENT <= 1  # of what a coordinate has alone


def of_parts(d: int, count: int, cross: float) -> Tensor:
    """A factor of equal parts, each with a basis of its own, and something between them."""
    M = torch.block_diag(*(correlated(d, 10 + part) for part in range(count)))
    return M + cross * correlated(count * d, 9)


@pytest.mark.parametrize("d", [32, LARGE])
@pytest.mark.parametrize("rows", [48, 200, 4000])
def test_what_is_correlated_by_chance_alone_keeps_its_own_axes(d, rows):
    generator = torch.Generator().manual_seed(rows + d)
    seen = torch.randn(rows, d, generator=generator) * torch.rand(d, generator=generator)
    independent = seen.T @ seen / rows
    Q = correlated(40, 0)
    one = Product(independent, Q, Sides())
    assert Renewal(one, None, "layer", rows=rows).of_output.structure == DIAGONAL
    by_number = Renewal(one, None, "layer", rows=torch.tensor(float(rows)))
    assert by_number.of_output.structure == DIAGONAL
    if rows < 100:  # as if there were more of them, so that it would be none
        assert Renewal(one, None, "layer").of_output.structure == DENSE
    dead = independent.clone()  # what is never there is correlated with nothing, nor by chance
    dead[: d // 2] = dead[:, : d // 2] = 0
    assert (
        Renewal(Product(dead, Q, Sides()), None, "layer", rows=rows).of_output.structure == DIAGONAL
    )
    mixed = seen @ torch.randn(d, d, generator=generator)
    mixed[:, ::2] = mixed[:, 1::2] + mixed[:, ::2] / 8
    truly = Product(mixed.T @ mixed / rows, Q, Sides())
    assert Renewal(truly, None, "layer", rows=rows).of_output.structure == DENSE


def test_parts_of_a_side_that_have_little_to_do_with_each_other_have_a_basis_each():
    Q, P = correlated(33, 1), of_parts(32, 3, 0.01)  # as of a query, a key and a value, with a bias
    found = renewed(Product(P, Q, Sides()), None, "layer")
    assert found.sides == Sides(DENSE, Blocks(32, 96))
    for part, U in enumerate(found.U_B):
        own = P[32 * part : 32 * (part + 1), 32 * part : 32 * (part + 1)]
        assert float((U.T @ own @ U).fill_diagonal_(0).abs().max()) < 1e-12 * float(own.norm())
    torch.testing.assert_close(found.s.sum(), P.trace() * Q.trace())
    G = torch.randn(96, 33)
    torch.testing.assert_close(found.rotate_back(found.rotate(G)), G)
    scaled = renewed(Product(3 * P, Q, Sides()), found, "layer")  # while they serve, they stay
    assert scaled.U_B is found.U_B
    other = renewed(Product(of_parts(32, 3, 0.01).flip(0, 1), Q, Sides()), found, "layer")
    assert other.sides == found.sides
    assert other.U_B is not found.U_B
    together = renewed(Product(correlated(96, 5), Q, Sides()), found, "layer")
    assert together.sides == Sides()
    # Parts that come to have to do with each other, though each is as it was.
    between = torch.tensor([[1.0, 0.9, 0.8], [0.9, 1.0, 0.9], [0.8, 0.9, 1.0]])
    one = correlated(32, 10)
    apart = renewed(Product(torch.kron(torch.eye(3), one), Q, Sides()), None, "layer")
    assert apart.sides == found.sides
    coupled = Product(torch.kron(between, one), Q, Sides())
    assert renewed(coupled, apart, "layer").sides == Sides()
    assert renewed(coupled, apart, "layer", (True, False)).U_B is apart.U_B  # not worth asking
    # A side that is no multiple of the other one is one side, and so is an input's.
    assert renewed(Product(P, correlated(60, 1), Sides()), None, "layer").sides == Sides()
    turned = renewed(Product(correlated(32, 1), P, Sides()), None, "layer")
    assert turned.sides.input == DENSE


@pytest.mark.parametrize("cross", [0.25, 0.4])
def test_a_fifth_of_the_squared_correlations_between_parts_is_too_much(cross: float):
    one, unit = torch.full((32, 32), 0.5).fill_diagonal_(1), torch.eye(3)
    P = torch.kron(unit + cross * (1 - unit), one)  # the correlations themselves
    squares = P.square().fill_diagonal_(0)
    between = 1 - float(torch.kron(unit, torch.ones(32, 32)).mul(squares).sum() / squares.sum())
    assert (between < 0.15) if cross < 0.3 else (0.25 < between < 0.3)
    found = renewed(Product(P, correlated(33, 1), Sides()), None, "layer")
    assert found.sides.output == (Blocks(32, 96) if between < 0.2 else DENSE)


@pytest.mark.parametrize(
    ("d", "other", "size"),
    [(384, 129, 128), (384, 128, 128), (96, 33, 32), (512, 65, 64), (128, 129, None),
     (129, 64, None), (96, 60, None), (60, 10, None), (784, 256, None), (10, 0, None)],
)  # fmt: skip
def test_a_side_may_be_several_of_the_other_one(d: int, other: int, size: int | None):
    assert fused(d, other) == (None if size is None else Blocks(size, d))


def test_what_is_not_finite_is_refused_by_name():
    one = product()
    one.Q[0, 0] = math.nan
    with pytest.raises(NotPositiveDefinite, match="input factor A of layer 'fc'"):
        renewed(one, None, "fc")


def test_a_side_that_is_not_worth_its_price_keeps_its_basis_and_takes_the_new_scale():
    old = renewed(product(), None, "layer")
    other = product(7)
    doubled = Product(2 * other.P, 2 * other.Q, other.sides)
    kept = renewed(doubled, old, "layer", (False, True))
    assert kept.U_A is old.U_A
    assert kept.U_B is not old.U_B
    torch.testing.assert_close(kept.s.sum(), doubled.P.trace() * doubled.Q.trace())
    both = renewed(doubled, None, "layer", (False, False))  # there is none to keep
    torch.testing.assert_close(both.U_A, renewed(doubled, None, "layer").U_A)


def test_bases_are_renewed_as_often_as_they_pay():
    M = torch.zeros(512, 512)
    cheap, dear = (
        price(M, DENSE, 10**9),
        price(M, DENSE, 3 * 128 * 10 * 512),
    )  # 273 runs of the second layer
    times = range(0, 4000, 10)
    assert all(pays(cheap, math.inf, step, 10) for step in (0, 1, 2, 4, 8, *times))
    assert not any(pays(dear, math.inf, step, 10) for step in (1, 2, 4, 8))
    found = [step for step in times if pays(dear, math.inf, step, 10)]
    assert found == [0, *range(820, 4000, 820)]  # three times as many as it costs
    for every in (10, 50):  # whatever it costs
        times = range(0, 4000, every)
        found = [step for step in times if pays(10 * dear, math.inf, step, every)]
        assert found == [0, *range(RAREST, 4000, RAREST)]
    some = [step for step in (0, 1, 2, 4, 8) if pays(dear, 15.0, step, 10)]  # the earlier, the more
    assert some == [0, 1, 2]


def test_a_basis_that_is_dear_for_its_layer_and_cheap_for_the_model_is_renewed(monkeypatch):
    monkeypatch.setattr("kronewton.curvature.DEAR", math.inf)  # in each of the first steps
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 250), nn.Tanh(), nn.Linear(250, 96), nn.Tanh())
    model.append(nn.Linear(96, 2))  # 96 inputs: dear for two outputs
    x, y = torch.randn(64, 96), torch.randint(0, 2, (64,))
    alone = nn.Sequential(nn.Linear(96, 2))
    found = {}
    for net, last in ((model, "4"), (alone, "0")):
        criterion = nn.CrossEntropyLoss()
        optimizer = KFAC(net, criterion, basis="adam")
        bases = []
        for _ in range(3):
            x = torch.randn(64, 8) @ torch.randn(8, 96)  # whose basis is another in every step
            optimizer.zero_grad()
            criterion(net(x), y).backward()
            optimizer.step()
            bases.append(optimizer._curvature.inverses[last].U_A)
        found[last] = [after is not before for before, after in itertools.pairwise(bases)]
    assert found == {"4": [True, True], "0": [False, False]}


@pytest.mark.parametrize("rows", [64, 1000])
def test_outputs_that_are_independent_are_known_as_such_from_few_rows(rows):
    """Squared errors: of 64 rows a coordinate has squared correlations of 1.5 with all others."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(8, 100), nn.MSELoss()
    optimizer = KFAC(model, criterion, basis="orthogonal")
    for step in range(2):
        optimizer.zero_grad()
        criterion(model(torch.randn(rows, 8)), torch.randn(rows, 100)).backward()
        optimizer.step()
        factors = optimizer._curvature.factors[""]
        used = min(rows, 256)  # of a thousand, a quarter
        if step == 0:
            assert float(factors.rows) == used
        assert optimizer._curvature.inverses[""].sides.output == DIAGONAL
    other = KFAC(model, criterion, basis="orthogonal")
    other.load_state_dict(optimizer.state_dict())
    assert float(other._curvature.factors[""].rows) == float(factors.rows)
