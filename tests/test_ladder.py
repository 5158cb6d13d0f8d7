"""Distances to the exact block, and the nearest Kronecker product, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kronewton import factors as factors_module
from kronewton import ladder
from kronewton.errors import OptionError
from kronewton.factors import Observation, batch_factors, best_factors, reduced_factors
from kronewton.ladder import distances
from kronewton.layers import DenseRows
from kronewton.types import Statistics

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = [(5, 1, 2), (4, 3, 2), (6, 4, 1)]  # N, S, V


def observation(N: int, S: int, V: int, blocks: tuple[int, ...] = ()) -> Observation:
    a, b = torch.randn(*blocks, N, S, 3), torch.randn(*blocks, V, N, S, 2)
    return Statistics(DenseRows(a), b, torch.tensor(1 / N)), torch.tensor(0.7)


def gradients(seen: list[Observation]) -> Tensor:
    """(P, blocks, d_out, d_in)"""
    found = []
    for stats, part in seen:
        a, b = stats.a.dense(), stats.b
        a, b = (a, b) if a.dim() == 4 else (a[None], b[None])
        G = torch.einsum("gvnso,gnsi->vngoi", b, a)
        found.append(part.sqrt() * G.flatten(0, 1))
    return torch.cat(found)


def dense(seen: list[Observation]) -> Tensor:
    rows = gradients(seen).flatten(1)
    return rows.T @ rows


def product(factors: factors_module.Factors) -> Tensor:
    A, B = factors.A.mean, factors.B.mean
    if A.dim() == 2:
        return torch.kron(B, A)
    return torch.block_diag(*(torch.kron(b, a) for a, b in zip(A, B, strict=True)))


def apart(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def van_loan(H: Tensor, d_out: int, d_in: int) -> Tensor:
    """The nearest Kronecker product by a dense singular value decomposition."""
    rearranged = H.reshape(d_out, d_in, d_out, d_in).permute(0, 2, 1, 3)
    U, s, V = torch.linalg.svd(rearranged.reshape(d_out**2, d_in**2), full_matrices=False)
    return torch.kron(s[0] * U[:, 0].reshape(d_out, d_out), V[0].reshape(d_in, d_in))


@pytest.mark.parametrize("shape", SHAPES)
def test_best_is_the_leading_singular_pair_of_van_loans_rearrangement(shape):
    seen = [observation(*shape), observation(*shape)]
    found = product(best_factors(seen, sweeps=1000, tolerance=1e-15))
    torch.testing.assert_close(found, van_loan(dense(seen), 2, 3), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sweeps", [1, 30])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(10))
def test_best_is_never_farther_than_expand_or_reduce(seed, shape, sweeps):
    torch.manual_seed(seed)
    seen = [observation(*shape)]
    exact, best = dense(seen), product(best_factors(seen, sweeps=sweeps))
    for other in (batch_factors(seen), reduced_factors(seen)):
        assert apart(best, exact) <= apart(product(other), exact) + 1e-12


def test_best_of_several_blocks_is_the_best_of_each():
    stats, part = observation(4, 3, 2, (2,))
    found = best_factors([(stats, part)], sweeps=1000, tolerance=1e-15)
    for g in range(2):
        alone = Statistics(DenseRows(stats.a.dense()[g]), stats.b[g], stats.weights)
        wanted = product(best_factors([(alone, part)], sweeps=1000, tolerance=1e-15))
        torch.testing.assert_close(
            torch.kron(found.B.mean[g], found.A.mean[g]), wanted, rtol=1e-6, atol=1e-8
        )


def test_best_keeps_expands_trace_in_A_and_its_counts():
    seen = [observation(4, 3, 2)]
    best, expand = best_factors(seen), batch_factors(seen)
    torch.testing.assert_close(best.A.mean.trace(), expand.A.mean.trace())
    assert best.A.count.equal(expand.A.count)
    assert best.B.count.equal(expand.B.count)


def test_best_does_not_depend_on_the_chunk(monkeypatch):
    seen = [observation(7, 3, 2)]
    whole = product(best_factors(seen))
    monkeypatch.setattr(factors_module, "CHUNK", 12)
    torch.testing.assert_close(product(best_factors(seen)), whole)


def test_best_of_a_block_that_is_zero_or_masked_is_zero():
    stats, part = observation(4, 3, 2)
    nothing = Statistics(stats.a, torch.zeros_like(stats.b), stats.weights)
    assert best_factors([(nothing, part)]).B.mean.eq(0).all()
    masked = Statistics(stats.a, torch.zeros_like(stats.b), torch.zeros(4, 3))
    assert float(best_factors([(masked, part)]).A.count) == 0


@pytest.mark.parametrize("blocks", [(), (2,)])
@pytest.mark.parametrize("shape", SHAPES)
def test_distances_are_those_of_the_dense_matrices(shape, blocks):
    seen = [observation(*shape, blocks), observation(*shape, blocks)]
    exact, found = dense(seen), distances(seen, "layer")
    for name, build in (("expand", batch_factors), ("reduce", reduced_factors)):
        assert getattr(found, name) == pytest.approx(apart(product(build(seen)), exact))
    assert found.diagonal == pytest.approx(apart(exact.diagonal().diag(), exact))
    assert found.best <= min(found.expand, found.reduce) + 1e-9
    assert found.corrected <= found.expand + 1e-9
    assert found.corrected == pytest.approx(_corrected(seen, exact))


def _corrected(seen: list[Observation], exact: Tensor) -> float:
    factors = batch_factors(seen)
    A, B = factors.A.mean, factors.B.mean
    A, B = (A, B) if A.dim() == 3 else (A[None], B[None])
    pairs = zip(A, B, strict=True)
    U = torch.block_diag(
        *(torch.kron(torch.linalg.eigh(b)[1], torch.linalg.eigh(a)[1]) for a, b in pairs)
    )
    return apart(U @ (U.T @ exact @ U).diagonal().diag() @ U.T, exact)


def test_one_example_at_one_position_is_at_no_distance():
    found = distances([observation(1, 1, 1)], "layer")
    assert max(found.expand, found.reduce, found.best, found.corrected) <= 1e-7
    assert found.diagonal > 0.1


def test_too_many_numbers_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(ladder, "LIMIT", 10)
    with pytest.raises(OptionError, match=r"layer 'conv' has .* Give fewer examples"):
        distances([observation(4, 3, 2)], "conv")


@pytest.mark.parametrize("mutant", ["_best_input_factor", "_best_output_factor"])
def test_mutants_are_caught(mutant, monkeypatch):
    seen, real = [observation(4, 3, 2)], getattr(factors_module, mutant)

    def tilted(*given: Tensor) -> Tensor:  # a factor's scale alone is made good by the other's
        right = real(*given)
        return right + 0.02 * right[..., :1, :1] * torch.eye(right.shape[-1])

    monkeypatch.setattr(factors_module, mutant, tilted)
    found = product(best_factors(seen, sweeps=1000, tolerance=1e-15))
    assert apart(found, van_loan(dense(seen), 2, 3)) > 1e-3
