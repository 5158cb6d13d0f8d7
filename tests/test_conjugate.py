"""Conjugate gradients against dense solves, and every way in which they end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kronewton import conjugate
from kronewton.conjugate import Ending, Product, Solver, conjugate_gradients, seems_singular
from kronewton.errors import OptionError
from oracles import distance

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def spectrum(*eigenvalues: float) -> Tensor:
    Q = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues))).Q
    return Q @ torch.diag(torch.tensor(eigenvalues, dtype=F64)) @ Q.T


REGULAR = spectrum(*torch.logspace(-2, 1, 30).tolist())
SINGULAR = spectrum(0, 0, 0, 0.1, 0.3, 0.5, 1, 2, 3, 9)


def by(H: Tensor) -> Product:
    return lambda v: H @ v


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e100])
def test_solution_is_the_dense_one(damping: float, scale: float) -> None:
    b = scale * normal(30, seed=1)
    found = conjugate_gradients(by(REGULAR), b, Solver(damping))
    dense = torch.linalg.solve(REGULAR + damping * torch.eye(30, dtype=F64), b)
    assert distance(found.x, dense) <= 1e-8
    assert found.ending is Ending.CONVERGED
    left = b - REGULAR @ found.x - damping * found.x
    assert float(left.norm() / b.norm()) == pytest.approx(found.residual, rel=1e-3)
    assert found.residual <= 1e-10


def test_comparison_catches_one_percent_and_a_forgotten_damping() -> None:
    b, eye = normal(30, seed=1), torch.eye(30, dtype=F64)
    dense = torch.linalg.solve(REGULAR + 0.1 * eye, b)
    assert distance(conjugate_gradients(by(1.01 * REGULAR), b, Solver(0.1)).x, dense) > 1e-4
    assert distance(conjugate_gradients(by(REGULAR), b).x, dense) > 1e-2


def test_one_iteration_for_each_eigenvalue() -> None:
    H = spectrum(1, 1, 1, 2, 2, 2, 5)
    assert conjugate_gradients(by(H), normal(7, seed=1)).iterations == 3


def test_the_inverse_as_preconditioner_takes_one_iteration() -> None:
    inverse = REGULAR.inverse()
    found = conjugate_gradients(by(REGULAR), normal(30), Solver(preconditioner=by(inverse)))
    assert found.iterations == 1


def test_zero_is_solved_by_zero() -> None:
    found = conjugate_gradients(by(REGULAR), torch.zeros(30, dtype=F64))
    assert (found.iterations, found.residual, found.ending) == (0, 0.0, Ending.CONVERGED)
    assert not found.x.any()


def test_singular_and_consistent_is_the_shortest() -> None:
    b = SINGULAR @ normal(10, seed=1)
    found = conjugate_gradients(by(SINGULAR), b)
    assert distance(found.x, torch.linalg.pinv(SINGULAR, hermitian=True, rtol=1e-12) @ b) <= 1e-8
    assert found.ending is Ending.CONVERGED


def test_singular_and_preconditioned_is_the_shortest_in_its_norm() -> None:
    """x = P^½ y for the shortest y of (P^½HP^½) y = P^½b."""
    s, U = torch.linspace(0.5, 3, 10, dtype=F64), torch.linalg.qr(normal(10, 10, seed=2)).Q
    P, root = U @ torch.diag(s) @ U.T, U @ torch.diag(s.sqrt()) @ U.T
    b = SINGULAR @ normal(10, seed=1)
    inner = root @ SINGULAR @ root
    found = conjugate_gradients(by(SINGULAR), b, Solver(preconditioner=by(P)))
    shortest = root @ torch.linalg.pinv(inner, hermitian=True, rtol=1e-12) @ root @ b
    assert distance(found.x, shortest) <= 1e-8
    assert distance(found.x, torch.linalg.pinv(SINGULAR, hermitian=True, rtol=1e-12) @ b) > 1e-3


def energy(H: Tensor, b: Tensor, x: Tensor) -> float:
    return float(0.5 * x @ H @ x - b @ x)


def test_at_the_limit_the_model_is_lower_with_every_iteration() -> None:
    b, reached = normal(30, seed=1), [0.0]
    for limit in (1, 2, 5, 10):
        found = conjugate_gradients(by(REGULAR), b, Solver(limit=limit))
        assert (found.iterations, found.ending) == (limit, Ending.LIMIT)
        reached.append(energy(REGULAR, b, found.x))
    assert reached == sorted(reached, reverse=True)


def failing_after(calls: int, H: Tensor, wrong: float) -> Product:
    """A product that gives NaN, or turns round, after some calls."""
    count = [0]

    def product(v: Tensor) -> Tensor:
        count[0] += 1
        return H @ v * (wrong if count[0] == calls else 1.0)

    return product


@pytest.mark.parametrize(
    ("wrong", "ending"),
    [
        (float("nan"), Ending.NOT_FINITE),
        (float("inf"), Ending.NOT_FINITE),
        (-1.0, Ending.CURVATURE),
        (0.0, Ending.CURVATURE),
    ],
)
def test_a_broken_product_ends_with_the_best_so_far(wrong: float, ending: Ending) -> None:
    b = normal(30, seed=1)
    found = conjugate_gradients(failing_after(4, REGULAR, wrong), b)
    three = conjugate_gradients(by(REGULAR), b, Solver(limit=3))
    assert (found.iterations, found.ending) == (3, ending)
    assert torch.equal(found.x, three.x)
    assert found.residual == pytest.approx(three.residual)


def test_negative_curvature_at_once_leaves_zero() -> None:
    found = conjugate_gradients(by(-REGULAR), normal(30))
    assert (found.ending, found.residual) == (Ending.CURVATURE, pytest.approx(1.0))
    assert not found.x.any()


def test_a_product_that_is_never_finite_leaves_zero() -> None:
    found = conjugate_gradients(by(REGULAR * float("nan")), normal(30))
    assert (found.ending, found.iterations) == (Ending.NOT_FINITE, 0)
    assert not found.x.any()
    assert found.residual == pytest.approx(1.0)


def test_a_preconditioner_that_is_not_positive_definite_is_noticed() -> None:
    solver = Solver(preconditioner=lambda r: -r)
    assert conjugate_gradients(by(REGULAR), normal(30), solver).ending is Ending.CURVATURE


def test_rounding_is_reported_and_does_no_harm() -> None:
    """float32, singular: below 1e-6 the search directions are noise."""
    H, b = SINGULAR.float(), (SINGULAR @ normal(10, seed=1)).float()
    found = conjugate_gradients(by(H), b)
    assert found.ending is Ending.ROUNDING
    assert found.residual <= 1e-5
    shortest = torch.linalg.pinv(SINGULAR, hermitian=True, rtol=1e-6) @ b.double()
    assert distance(found.x.double(), shortest) <= 1e-4


def test_a_drifting_recursion_is_taken_up_afresh() -> None:
    """A product that is off by 1 % at one call misleads the recursion, not the result."""
    b = normal(30, seed=1)
    found = conjugate_gradients(failing_after(20, REGULAR, 1.01), b)
    assert found.ending is Ending.CONVERGED
    assert distance(found.x, torch.linalg.solve(REGULAR, b)) <= 1e-7


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_singular_is_told_from_regular(scale: float) -> None:
    like = torch.zeros(10, dtype=F64)
    ill = spectrum(*torch.logspace(-8, 0, 10, dtype=F64).tolist())
    assert not seems_singular(by(scale * ill), like)
    for H in (SINGULAR, 0 * SINGULAR, spectrum(0, *range(1, 10))):
        assert seems_singular(by(scale * H), like)
        assert seems_singular(by(scale * H), like, Solver(preconditioner=by(torch.eye(10).to(H))))


@pytest.mark.parametrize("number", [1e-3, 0.1, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("size", [1, 3])
def test_a_multiple_of_the_identity_is_regular(size: int, number: float) -> None:
    """y is z to the last digit, and the rest without curvature."""
    like = torch.zeros(size, dtype=F64)
    assert not seems_singular(lambda v: number * v, like)
    assert seems_singular(lambda v: 0 * v, like)


def test_the_random_vector_leaves_the_callers_stream_alone() -> None:
    state = torch.get_rng_state()
    seems_singular(by(REGULAR), torch.zeros(30, dtype=F64))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, r"damping=-1.0; a finite number from 0 up is allowed"),
        ({"damping": float("nan")}, r"damping=nan; a finite number"),
        ({"tolerance": 0.0}, r"tolerance=0.0; a number between 0 and 1 is allowed"),
        ({"tolerance": 1.0}, r"tolerance=1.0; .*Give the relative residual"),
        ({"limit": 0}, r"limit=0; a whole number from 1 up is allowed, or None"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        conjugate.Solver(**options)
