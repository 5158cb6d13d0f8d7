"""Matrix functions against the same thing formed densely."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kronewton import linalg
from kronewton.errors import NotPositiveDefinite
from kronewton.linalg import (
    HALF,
    damped_inverse,
    iterated_eigen,
    leading_eigen,
    multiplies_in_half,
    rough_dtype,
    second_moment,
    symmetric_eigen,
)
from kronewton.structure import kronecker_apply

pytestmark = pytest.mark.usefixtures("float64")


def positive(d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randn(d + 3, d, dtype=dtype)
    return rows.T @ rows


@pytest.mark.parametrize("blocks", [(), (2,), (2, 3)])
def test_second_moment_sums_outer_products_of_each_block(blocks):
    rows, weights = torch.randn(*blocks, 5, 3), torch.rand(5)
    for index in itertools.product(*map(range, blocks)):
        pairs = zip(rows[index], weights, strict=True)
        dense = sum(w * torch.outer(r, r) for r, w in pairs)
        torch.testing.assert_close(second_moment(rows, weights)[index], dense)
    torch.testing.assert_close(second_moment(rows), second_moment(rows, torch.ones(5)))


def test_second_moment_with_weight_two_is_the_row_twice_and_with_zero_its_absence():
    rows = torch.randn(4, 3)
    weighted = second_moment(rows, torch.tensor([1.0, 2.0, 0.0, 1.0]))
    torch.testing.assert_close(weighted, second_moment(rows[[0, 1, 1, 3]]))


def test_second_moment_of_no_rows_is_zero():
    assert second_moment(torch.randn(0, 3)).equal(torch.zeros(3, 3))


@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (3, 3), (1, 4)])
def test_kronecker_apply_is_the_formed_product_on_row_major_vec(shape):
    d_out, d_in = shape
    B, A, G = positive(d_out), positive(d_in), torch.randn(shape)
    dense = (torch.kron(B, A) @ G.flatten()).reshape(shape)
    torch.testing.assert_close(kronecker_apply(B, A, G), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.3, torch.tensor(2.0)])
def test_damped_inverse_is_the_inverse_and_leaves_its_argument_alone(damping):
    matrix = positive(6)
    before = matrix.clone()
    product = damped_inverse(matrix, damping, "A") @ (matrix + damping * torch.eye(6))
    torch.testing.assert_close(product, torch.eye(6), rtol=0, atol=1e-10)
    assert matrix.equal(before)


def test_damped_inverse_of_zero_is_one_over_the_damping():
    torch.testing.assert_close(damped_inverse(torch.zeros(3, 3), 0.25, "A"), 4 * torch.eye(3))


def test_damped_inverse_of_a_matrix_that_rounding_made_indefinite():
    U = torch.linalg.qr(torch.randn(40, 40))[0]
    matrix = (U * torch.logspace(-7, 3, 40) @ U.T).float()
    matrix = (matrix + matrix.T) / 2
    assert int(torch.linalg.cholesky_ex(matrix).info) != 0, "the case is too easy"
    assert float(torch.linalg.eigvalsh(matrix.double()).min()) < 0
    inverse = damped_inverse(matrix, 0.0, "A")
    assert inverse.dtype == torch.float32
    spectrum = torch.linalg.eigvalsh(inverse.double())
    assert float(spectrum.min()) > -1e-6 * float(spectrum.max())


def test_damped_inverse_of_a_singular_matrix_without_damping_is_an_inverse_where_there_is_one():
    rows = torch.randn(2, 5)
    matrix = rows.T @ rows
    inverse = damped_inverse(matrix, 0.0, "A")
    assert torch.isfinite(inverse).all()
    torch.testing.assert_close(matrix @ inverse @ matrix, matrix, rtol=1e-4, atol=1e-4)


def test_damped_inverse_names_the_factor_and_the_way_out():
    with pytest.raises(NotPositiveDefinite, match=r"factor A of 'fc' \(3×3\).*raise `damping`"):
        damped_inverse(-torch.eye(3), 0.0, "factor A of 'fc'")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "function", [lambda m, name: damped_inverse(m, 0.1, name), symmetric_eigen]
)
@pytest.mark.parametrize("size", [2, 4])
def test_values_that_are_not_finite_are_named(bad, function, size):
    matrix = positive(size)
    matrix[0, 1] = matrix[1, 0] = bad
    with pytest.raises(NotPositiveDefinite, match=r"factor B of 'fc' holds values that are not"):
        function(matrix, "factor B of 'fc'")


def test_symmetric_eigen_reconstructs_in_ascending_order():
    matrix = positive(6)
    s, U = symmetric_eigen(matrix, "A")
    torch.testing.assert_close(U * s @ U.T, matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(U.T @ U, torch.eye(6), rtol=0, atol=1e-12)
    assert s.diff().ge(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 20])
def test_leading_eigen_finds_all_where_there_are_no_more(rank, dtype):
    rows = torch.randn(rank, 120, dtype=dtype) * torch.logspace(0, -3, 120, dtype=dtype)
    matrix = rows.T @ rows
    exact, _ = symmetric_eigen(matrix, "A")
    stream = torch.get_rng_state()
    s, U = leading_eigen(matrix, 20, None, "A")
    assert torch.get_rng_state().equal(stream)
    digits = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(U.T @ U, torch.eye(20, dtype=dtype), rtol=0, atol=digits)
    size = float(exact.max()) or 1.0
    torch.testing.assert_close((U * s) @ U.T, matrix, rtol=0, atol=digits * size)
    torch.testing.assert_close(s, exact[-20:], rtol=0, atol=digits * size)
    assert s.dtype == U.dtype == dtype


def test_leading_eigen_comes_near_and_nearer_from_what_was_found_before():
    """Of a spectrum as those of images: the share of the trace that the best 20 would have."""
    rows = torch.randn(400, 160) * torch.arange(1, 161) ** -1.0 @ torch.randn(160, 160)
    matrix = rows.T @ rows
    best = symmetric_eigen(matrix, "A")[0][-20:].sum()
    s, U = leading_eigen(matrix, 20, None, "A")
    assert 0.97 < float(s.sum() / best) <= 1 + 1e-12
    again, V = leading_eigen(matrix, 20, U, "A")
    assert s.sum() < again.sum() <= best * (1 + 1e-12)
    torch.testing.assert_close((V.T @ matrix @ V), torch.diag(again))
    torch.testing.assert_close(again, (V * (matrix @ V)).sum(0))


def test_leading_eigen_of_several_is_of_each():
    matrices = torch.stack([positive(40), positive(40)])
    s, U = leading_eigen(matrices, 10, None, "A")
    assert s.shape == (2, 10)
    assert U.shape == (2, 40, 10)
    torch.testing.assert_close(U.mT @ matrices @ U, torch.diag_embed(s))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_leading_eigen_names_what_is_not_finite(bad):
    matrix = torch.eye(100)
    matrix[3, 3] = bad
    with pytest.raises(NotPositiveDefinite, match="factor A of 'fc'"):
        leading_eigen(matrix, 5, None, "factor A of 'fc'")


def test_symmetric_eigen_has_no_eigenvalue_below_zero():
    rows = torch.randn(2, 8)
    s, _ = symmetric_eigen(rows.T @ rows, "A")
    assert s.ge(0).all()
    assert int((s > 1e-10).sum()) == 2


def test_symmetric_eigen_tries_float64_when_lapack_gives_up_in_float32(monkeypatch):
    matrix, tried, real = positive(4, torch.float32), [], torch.linalg.eigh

    def fragile(given):
        tried.append(given.dtype)
        if given.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")
        return real(given)

    monkeypatch.setattr(torch.linalg, "eigh", fragile)
    s, U = symmetric_eigen(matrix, "A")
    assert tried == [torch.float32, torch.float64]
    assert s.dtype == U.dtype == torch.float32
    torch.testing.assert_close(U * s @ U.T, matrix)


def test_symmetric_eigen_tries_float64_when_the_first_result_is_not_finite(monkeypatch):
    matrix, real = positive(4, torch.float32), torch.linalg.eigh

    def silent(given):
        s, U = real(given)
        return (s * float("nan"), U) if given.dtype == torch.float32 else (s, U)

    monkeypatch.setattr(torch.linalg, "eigh", silent)
    s, U = symmetric_eigen(matrix, "A")
    torch.testing.assert_close(U * s @ U.T, matrix)


def test_symmetric_eigen_gives_up_with_the_factors_name(monkeypatch):
    def broken(given):
        raise RuntimeError("CUSOLVER_STATUS_INTERNAL_ERROR")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.raises(NotPositiveDefinite, match="of factor A of 'fc' did not converge"):
        symmetric_eigen(positive(3), "factor A of 'fc'")


def graded(d: int, seed: int, dtype: torch.dtype = torch.float32, rank: int | None = None):
    """A second moment of rows whose variances go from 1 to 1e-6, or that are zero beyond a rank."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    s = torch.logspace(0, -6, d, dtype=torch.float64)
    s[rank or d :] = 0
    return (turn * s @ turn.T).to(dtype)


def correlation(matrix: Tensor, U: Tensor) -> Tensor:
    """Squared correlations of each coordinate with all others in the basis U, their mean."""
    turned = (U.mT @ matrix @ U).double()
    m = turned.diagonal(dim1=-2, dim2=-1)
    m = m + 1e-4 * m.mean(-1, keepdim=True)
    shares = turned.square() / m.unsqueeze(-1) / m.unsqueeze(-2)
    own = shares.diagonal(dim1=-2, dim2=-1)
    return (shares.sum(-2) - own).mean(-1)


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterated_eigen_is_nearly_an_eigenbasis(dtype, rank):
    matrices = torch.stack([graded(48, seed, dtype, rank) for seed in range(3)])
    axes = torch.eye(48, dtype=dtype).expand_as(matrices)
    s, U, sound = iterated_eigen(matrices, None)
    assert sound.all()
    assert s.dtype == U.dtype == dtype
    torch.testing.assert_close(U.mT @ U, axes, rtol=0, atol=1e-5)
    assert correlation(matrices, axes).min() > 3
    assert correlation(matrices, U).max() < 0.3
    torch.testing.assert_close(s, (U.mT @ matrices @ U).diagonal(dim1=-2, dim2=-1).clamp_min(0))
    later = matrices + 0.1 * torch.stack([graded(48, 9 + seed, dtype, rank) for seed in range(3)])
    _, V, sound = iterated_eigen(later, U)
    assert sound.all()
    assert correlation(later, U).min() > 1
    assert correlation(later, V).max() < 0.3


def test_iterated_eigen_leaves_eigenvectors_and_their_signs_in_place():
    matrix = positive(12)
    s, U = symmetric_eigen(matrix, "A")
    shuffled = U[:, torch.randperm(12)] * torch.tensor([1.0, -1.0]).repeat(6)
    found, V, _ = iterated_eigen(matrix, shuffled)
    torch.testing.assert_close(V, shuffled)
    torch.testing.assert_close(found.sort().values, s)


def test_iterated_eigen_says_which_are_sound():
    matrices = torch.stack([positive(5) for _ in range(5)])
    near = torch.eye(5).repeat(5, 1, 1)
    matrices[0, 0, 1] = matrices[0, 1, 0] = float("nan")
    matrices[1, 0, 0] = float("inf")
    matrices[2] = 0
    near[3] = 1
    s, U, sound = iterated_eigen(matrices, near)
    assert sound.tolist() == [False, False, True, False, True]
    assert not s[2].any()
    assert U[2].equal(torch.eye(5))
    assert iterated_eigen(matrices, None)[2].tolist() == [False, False, True, True, True]


def test_cholesky_that_fails_once_is_retried_in_float64(monkeypatch):
    matrix, tried, real = positive(4, torch.float32), [], torch.linalg.cholesky_ex

    def fragile(given):
        tried.append(given.dtype)
        factor, info = real(given)
        return factor, torch.ones_like(info) if given.dtype == torch.float32 else info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fragile)
    inverse = damped_inverse(matrix, 0.1, "A")
    assert tried == [torch.float32, torch.float64]
    dense = torch.linalg.inv(matrix.double() + 0.1 * torch.eye(4)).float()
    torch.testing.assert_close(inverse, dense)


def test_jitter_grows_until_cholesky_succeeds(monkeypatch):
    added, real = [], torch.linalg.cholesky_ex

    def picky(given):
        added.append(float(given[0, 0]) - 1)
        factor, info = real(given)
        return factor, info if added[-1] > 1e-6 else torch.ones_like(info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", picky)
    inverse = damped_inverse(torch.eye(2), 0.0, "A")
    assert added == pytest.approx([0.0, *linalg.JITTERS[:4]], abs=1e-12)
    torch.testing.assert_close(inverse, torch.eye(2) / (1 + linalg.JITTERS[3]))


@pytest.mark.parametrize(
    ("dtype", "device", "products", "units", "wanted"),
    [
        (torch.float32, "cpu", HALF, True, torch.bfloat16),
        (torch.float32, "cpu", HALF - 1, True, torch.float32),
        (torch.float32, "cpu", HALF, False, torch.float32),
        (torch.float32, "cuda", HALF, True, torch.float32),
        (torch.float64, "cpu", HALF, True, torch.float64),
    ],
)
def test_products_are_rough_where_that_is_faster_and_never_of_float64(
    dtype, device, products, units, wanted, monkeypatch
):
    monkeypatch.setattr(linalg, "multiplies_in_half", lambda: units)
    assert rough_dtype(dtype, torch.device(device), products) == wanted
    monkeypatch.setattr(linalg.torch.backends.mkldnn, "enabled", False)  # and bfloat16 is slow
    assert rough_dtype(dtype, torch.device(device), products) == dtype


@pytest.mark.parametrize("units", ["avx512_bf16", "amx_bf16", None])
def test_what_a_cpu_can_do_is_asked_of_torch_where_it_knows(units, monkeypatch):
    told = {"avx2": True, "avx512_bf16": False, "amx_bf16": False}
    told |= {units: True} if units else {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert multiplies_in_half.__wrapped__() == bool(units)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not multiplies_in_half.__wrapped__()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not multiplies_in_half.__wrapped__()
