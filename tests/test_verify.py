"""Every check of `kronewton verify` holds, and none would hold for a mistaken library."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from kronewton import derivation as note
from kronewton import factors, ladder, structure
from kronewton.inverse import EigenInverse
from kronewton.lab import verify
from kronewton.lab.verify import CHECKS, EXACT, Check, Source
from kronewton.losses.base import Categorical, Diagonal
from kronewton.quadratic import QuadraticModel
from kronewton.tiling import Tying
from kronewton.types import Statistics

CPU = torch.device("cpu")


def source(seed: int = 0) -> Source:
    return Source(torch.Generator().manual_seed(seed), CPU)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.identity)
def test_the_identity_holds(check: Check) -> None:
    random_state = torch.get_rng_state()
    result = check.run(source())
    assert result.passed, result
    assert result.instances > 0
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_singular_matrix_is_noticed_through_the_noise_of_a_preconditioner() -> None:
    """Seed 18 draws factors whose inverse amplifies the rounding of the null direction."""
    assert check_named("tied_singular_preconditioned").run(source(18)).passed


# Planted mistakes: each must make the check that it is filed under fail.


def one_percent(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **named: 1.01 * function(*given, **named)


def threefold(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **named: 3 * function(*given, **named)


def transposed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Right in size only where the matrix is square."""

    def wrong(*given: Any, **named: Any) -> Tensor:
        right = function(*given, **named)
        return right.mT.reshape(right.shape)

    return wrong


def swapped_hessian(A: Tensor, B: Tensor) -> Tensor:
    return torch.kron(B @ B.mT, A @ A.mT)


def swapped_block(A: Tensor, B: Tensor, Lambda: Tensor | None = None) -> Tensor:
    BB = B @ B.mT if Lambda is None else B @ Lambda @ B.mT
    mn = A.shape[1] * B.shape[1]
    return torch.einsum("ni,nj,nop->oipj", A, A, BB).reshape(mn, mn)


def swapped_kronecker(A: Tensor, B: Tensor, Lambda: Tensor | None = None) -> Tensor:
    BB = B @ B.mT if Lambda is None else B @ Lambda @ B.mT
    return torch.kron(BB.sum(0), A.mT @ A / len(A))


def two_sums(A: Tensor, B: Tensor, Lambda: Tensor | None = None) -> Tensor:
    BB = B @ B.mT if Lambda is None else B @ Lambda @ B.mT
    return torch.kron(A.mT @ A, BB.sum(0))


def transposed_jacobians(*given: Any) -> tuple[Tensor, Tensor]:
    A, B = JACOBIAN_BLOCKS(*given)
    return A, B.mT.reshape(B.shape)


def silent_newton_step(W: Tensor, A: Tensor, B: Tensor, Y: Tensor, damping: float = 0.0) -> Tensor:
    """Right, and says nothing of a pseudo-inverse."""
    return NEWTON_STEP(W, A, B, Y, damping or 1e-13)


def damped_factors(W: Tensor, A: Tensor, B: Tensor, Y: Tensor, damping: float = 0.0) -> Tensor:
    """√λ to each factor, instead of λ to their product."""
    if damping == 0:
        return NEWTON_STEP(W, A, B, Y)
    AA, BB = A @ A.mT, B @ B.mT
    for matrix in (AA, BB):
        matrix.diagonal().add_(damping**0.5)
    G = note.gradient(W, A, B, Y)
    return W - torch.linalg.solve(BB, G) @ torch.linalg.inv(AA)


def without_lambda(A: Tensor, B: Tensor, Lambda: Tensor | None = None) -> Tensor:
    return HESSIAN_BLOCK(A, B)


def laid_wrongly(change: Callable[[Tensor], Tensor]) -> Callable[..., Tying]:
    """The entries of the kernel in other places of it."""

    def wrong(*given: Any) -> Tying:
        right = TIED_CONVOLUTION(*given)
        return replace(right, entries=change(right.entries))

    return wrong


def turned_around(entries: Tensor) -> Tensor:
    return entries.flip(2)


def inputs_for_outputs(*given: Any) -> Tying:
    """A module's own matrix transposed: right in size where it is square."""
    right = TIED_CALLS(*given)
    return replace(right, entries=right.entries.mT.reshape(right.entries.shape))


def hessian_without_repetition(K: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Every entry of W for itself."""
    diagonal = torch.kron(A.square().sum(1), B.square().sum(1))
    return K.to_dense().T @ (diagonal.unsqueeze(1) * K.to_dense())


def one_percent_product(K: Tensor, A: Tensor, B: Tensor) -> Callable[[Tensor], Tensor]:
    return one_percent(CONVOLUTION_PRODUCT(K, A, B))


def kernel_for_adjoint(u: Tensor, K: Tensor, A: Tensor, B: Tensor, Y: Tensor) -> Tensor:
    """The sum over positions of K' replaced by its mean: K⁺ for K'."""
    g = TIED_GRADIENT(u, K, A, B, Y)
    return g / (K.to_dense().square().sum(0).clamp(min=1))


def swapped_expand(tying: Tying, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    AA, BB = EXPAND(tying, A, B)
    return BB.mT, AA.mT


def silent_tied_step(*given: Any) -> note.TiedStep:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NEWTON_STEP_TIED(*given)


def undamped_tied_step(*given: Any) -> note.TiedStep:
    *letters, solver = given
    return silent_tied_step(*letters, replace(solver, damping=0.0))


def one_percent_too_far(u: Tensor, *given: Any) -> note.TiedStep:
    right = NEWTON_STEP_TIED(u, *given)
    return replace(right, u=u + 1.01 * (right.u - u))


def a_sum_instead_of_a_mean(stats: Statistics, part: Tensor, *rest: Any) -> factors.Moment:
    right = INPUT_MOMENT(stats, part, *rest)
    return factors.Moment(right.total * stats.a.counts[0], right.count)


def without_weights(stats: Statistics, part: Tensor, *rest: Any) -> factors.Moment:
    return INPUT_MOMENT(replace(stats, weights=part.new_ones(())), part, *rest)


def a_basis_of_its_own(A: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The eigenvalues' order taken for the entries': no rotation at all."""
    s, U = SYMMETRIC_EIGEN(A, name)
    return s, torch.eye(U.shape[-1], dtype=U.dtype).expand_as(U)


def nowhere(squared_distance: Tensor, square: Tensor) -> float:
    return 0.0


def not_the_best(seen: Any, **named: Any) -> factors.Factors:
    return factors.batch_factors(seen)


def the_wrong_best(seen: Any, **named: Any) -> factors.Factors:
    return factors.reduced_factors(seen)


def with_damping_of_its_own(inverse: EigenInverse, G: Tensor, damping: float) -> Tensor:
    return APPLY(inverse, G, damping + 1e-3)


JACOBIAN_BLOCKS, NEWTON_STEP = note.jacobian_blocks, note.newton_step
TIED_CONVOLUTION, TIED_CALLS, EXPAND = note.tied_convolution, note.tied_calls, note.expand
TIED_GRADIENT, NEWTON_STEP_TIED = note.tied_gradient, note.newton_step_tied
CONVOLUTION_PRODUCT = note.convolution_product
HESSIAN_BLOCK, INPUT_MOMENT, APPLY = note.hessian_block, factors._input_moment, EigenInverse.apply
SYMMETRIC_EIGEN = ladder.symmetric_eigen
PLANTED: dict[str, list[tuple[Any, str, Any]]] = {  # by the check that must fail
    "loss": [(note, "loss", one_percent(note.loss))],
    "differential_of_loss": [
        (note, "gradient", one_percent(note.gradient)),
        (note, "gradient", transposed(note.gradient)),
        (note, "differential_of_loss", one_percent(note.differential_of_loss)),
    ],
    "differential_of_gradient": [
        (note, "differential_of_gradient", one_percent(note.differential_of_gradient)),
        (note, "differential_of_gradient", transposed(note.differential_of_gradient)),
    ],
    "vec": [(note, "vec", torch.flatten)],
    "hessian": [(note, "hessian", one_percent(note.hessian)), (note, "hessian", swapped_hessian)],
    "newton_step": [(note, "newton_step", one_percent(note.newton_step))],
    "least_squares": [(note, "newton_step", one_percent(note.newton_step))],
    "pseudo_inverse": [(note, "newton_step", silent_newton_step)],
    "damped_step": [(note, "newton_step", damped_factors)],
    "piecewise_squared": [
        (note, "hessian_block", one_percent(note.hessian_block)),
        (note, "hessian_block", swapped_block),
        (note, "jacobian_blocks", transposed_jacobians),
    ],
    "piecewise_softmax": [(note, "hessian_block", without_lambda)],
    "gauss_newton": [(note, "jacobian_blocks", transposed_jacobians)],
    "section_1_again": [(note, "kronecker_block", two_sums)],
    "kronecker_deep_linear": [
        (note, "kronecker_block", one_percent(note.kronecker_block)),
        (note, "kronecker_block", swapped_kronecker),
    ],
    "kronecker_otherwise": [(note, "kronecker_block", note.hessian_block)],
    "kronecker_softmax": [(note, "kronecker_block", note.hessian_block)],
    "counts": [(note, "kronecker_block", two_sums)],
    "tiling": [
        (note, "tiling_matrix", one_percent(note.tiling_matrix)),
        (note, "tied_convolution", laid_wrongly(turned_around)),
    ],
    "differential_of_tiling": [
        (note, "tied_convolution", laid_wrongly(turned_around)),
        (note, "tied_calls", inputs_for_outputs),
    ],
    "channels": [(note, "channels_outermost", lambda K, m, channels: K)],
    "tied_gradient": [
        (note, "tied_gradient", one_percent(note.tied_gradient)),
        (note, "tied_gradient", kernel_for_adjoint),
        (note, "tied_convolution", laid_wrongly(turned_around)),
    ],
    "tied_hessian": [
        (note, "convolution_hessian", one_percent(note.convolution_hessian)),
        (note, "convolution_hessian", hessian_without_repetition),
        (note, "tied_calls", inputs_for_outputs),
    ],
    "matrix_free": [(note, "convolution_product", one_percent_product)],
    "inverse_does_not_distribute": [
        (note, "distributed_inverse", lambda K, A, B: note.convolution_hessian(K, A, B).inverse())
    ],
    "expand": [(note, "expand", swapped_expand)],
    "tied_least_squares": [
        (note, "newton_step_tied", one_percent_too_far),
        (note, "tied_gradient", kernel_for_adjoint),
    ],
    "tied_singular": [
        (note, "newton_step_tied", silent_tied_step),
        (note, "newton_step_tied", one_percent_too_far),
    ],
    "tied_singular_preconditioned": [(note, "newton_step_tied", silent_tied_step)],
    "tied_damped": [(note, "newton_step_tied", undamped_tied_step)],
    "iterations": [(note, "kronecker_preconditioner", lambda *given: lambda r: r)],
    "columns": [
        (Categorical, "scale", property(lambda c: 1.01 * c.weigh().unsqueeze(c.dim))),
        (Diagonal, "diagonal", property(lambda d: 1.01 * d.hessian())),
    ],
    "products": [
        (Categorical, "scale", property(lambda c: 1.01 * c.weigh().unsqueeze(c.dim))),
        (Diagonal, "diagonal", property(lambda d: 1.01 * d.hessian())),
    ],
    "first_step": [
        (structure, "second_moment", one_percent(structure.second_moment)),
        (EigenInverse, "apply", transposed(EigenInverse.apply)),
    ],
    "exact_deep_linear": [(EigenInverse, "apply", one_percent(EigenInverse.apply))],
    "exact_one": [(structure, "second_moment", one_percent(structure.second_moment))],
    "duplicated": [(factors, "_input_moment", a_sum_instead_of_a_mean)],
    "micro_batches": [(factors, "_total", lambda tensors: [*tensors][-1])],  # the last part wins
    "scaled": [(EigenInverse, "apply", with_damping_of_its_own)],
    "masked": [(factors, "_input_moment", without_weights)],
    "regression": [(EigenInverse, "apply", transposed(EigenInverse.apply))],
    "newton": [(QuadraticModel, "product", one_percent(QuadraticModel.product))],
    "newton_given": [(QuadraticModel, "product", one_percent(QuadraticModel.product))],
    "falls": [(QuadraticModel, "product", threefold(QuadraticModel.product))],
    "best_is_best": [
        (ladder, "best_factors", not_the_best),
        (ladder, "best_factors", the_wrong_best),
    ],
    "corrected_is_nearer": [(ladder, "symmetric_eigen", a_basis_of_its_own)],
    "neither_is_exact": [(ladder, "_relative", nowhere)],
    "ladder_deep_linear": [
        (structure, "second_moment", one_percent(structure.second_moment)),
        (ladder, "symmetric_eigen", a_basis_of_its_own),
    ],
    "ladder_one": [
        (factors, "_input_moment", a_sum_instead_of_a_mean),
        (ladder, "_squared_norm", one_percent(ladder._squared_norm)),
    ],
    "ladder_per_position": [
        (ladder, "batch_factors", factors.reduced_factors),
        (ladder, "best_factors", the_wrong_best),
    ],
    "ladder_per_position_reduce": [(ladder, "reduced_factors", factors.batch_factors)],
    "ladder_pooled": [
        (ladder, "reduced_factors", factors.batch_factors),
        (ladder, "best_factors", not_the_best),
    ],
    "ladder_pooled_expand": [(ladder, "batch_factors", factors.reduced_factors)],
    "ladder_circular": [(ladder, "reduced_factors", factors.batch_factors)],
    "ladder_last": [
        (ladder, "batch_factors", factors.reduced_factors),
        (ladder, "reduced_factors", factors.batch_factors),
    ],
    "ladder_before_the_last": [(ladder, "_relative", nowhere)],
}


def check_named(name: str) -> Check:
    (found,) = (check for check in CHECKS if check.residuals.__name__ == f"_{name}")
    return found


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "mistake"),
    [
        pytest.param(name, *planted, id=f"{name}-{i}")
        for name, mistakes in PLANTED.items()
        for i, planted in enumerate(mistakes)
    ],
)
def test_a_mistake_is_caught(
    name: str, owner: Any, attribute: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, attribute, mistake)
    assert not check_named(name).run(source()).passed


# How residuals become a verdict.


def constant(*residuals: float) -> Callable[[Source], Iterator[float]]:
    return lambda source: iter(residuals)


@pytest.mark.parametrize(
    ("bound", "residuals", "worst", "passed"),
    [
        (EXACT, (1e-15, 1e-12, 1e-14), 1e-12, True),
        (EXACT, (1e-15, 2e-12, 1e-14), 2e-12, False),
        (verify.APART, (0.5, 1e-3, 0.1), 1e-3, True),
        (verify.APART, (0.5, 1e-4, 0.1), 1e-4, False),
        (EXACT, (math.nan, 1e-15), math.nan, False),
        (EXACT, (1e-15, math.nan), math.nan, False),
        (verify.APART, (math.nan, 0.5), math.nan, False),
    ],
)
def test_the_worst_instance_decides(
    bound: verify.Bound, residuals: tuple[float, ...], worst: float, passed: bool
) -> None:
    result = Check("1", "x = x", bound, constant(*residuals)).run(source())
    assert result.residual == worst or (math.isnan(worst) and math.isnan(result.residual))
    assert (result.passed, result.instances) == (passed, len(residuals))


def test_a_seed_gives_the_same_instances_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    check = CHECKS[0]
    monkeypatch.setattr(verify, "CHECKS", [check])
    (alone,) = verify.run(3, CPU)
    monkeypatch.setattr(verify, "CHECKS", [CHECKS[-1], check])
    assert verify.run(3, CPU)[1] == alone
    assert not torch.equal(source(3).normal(2), source(4).normal(2))


def test_the_table_has_a_row_for_each_identity_and_says_what_fails() -> None:
    good = Check("1. A section", "dG = BB' dW AA'", EXACT, constant(1e-15)).run(source())
    bad = Check("2. Another", "H[u] = H", verify.APART, constant(1e-9)).run(source())
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(verify.table([good, bad]))
    text = console.export_text()
    rows = [line for line in text.splitlines() if "holds" in line or "FAILS" in line]
    assert len(rows) == 2
    assert all(word in rows[0] for word in ("dG = BB' dW AA'", "1.0e-15", "≤ 1e-12", "holds"))
    assert all(word in rows[1] for word in ("H[u] = H", "1.0e-09", "≥ 1e-03", "FAILS"))
    assert "1. A section" in text


def test_words_on_the_worst_instance_stand_in_its_row() -> None:
    told = (verify.Told(0.1, "one and ten"), verify.Told(0.2, "two and ten"))
    result = Check("1", "iterations", EXACT, constant(*told)).run(source())
    assert (type(result.residual), result.residual, result.words) == (float, 0.2, "two and ten")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(verify.table([result]))
    assert "iterations: two and ten" in console.export_text()


def test_distance_is_relative_to_the_largest_term() -> None:
    one, zero = torch.ones(4), torch.zeros(4)
    assert verify.distance(1.01 * one, one) == pytest.approx(0.01, rel=1e-4)
    assert verify.distance(1.01 * one, one, 100 * one) == pytest.approx(1e-4, rel=1e-4)
    assert verify.distance(zero, zero) == 0
    assert verify.distance(one, zero) == 2


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.identity)
def test_the_identity_holds_for_many_seeds(check: Check) -> None:
    assert all(check.run(source(seed)).passed for seed in range(1, 15))
