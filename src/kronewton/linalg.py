"""Pure tensor mathematics on symmetric matrices and Kronecker products that are never formed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from kronewton.errors import NotPositiveDefinite

LEAST_EIGENVALUE = 1e-4  # of the mean: columns with less are not told apart by iteration
AFRESH, AGAIN = 4, 2  # rounds from the axes, and from a basis
LEADING_AFRESH, LEADING_AGAIN = 2, 1  # rounds for the leading ones, from random columns, from them
BESIDE = 16  # random columns beyond the leading ones, whose last would take more rounds without
HALF = 2**22  # multiplications in a product, from which half precision pays for its casts
JITTERS = (0.0, 1e-9, 1e-7, 1e-5, 1e-3)  # added to the diagonal, relative to its mean


def second_moment(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of weighted outer products of rows: (…, n, d) with weights (n) gives (…, d, d)."""
    if weights is None:
        return rows.mT @ rows
    return rows.mT @ (rows * weights.unsqueeze(-1))


def damped_inverse(matrix: Tensor, damping: Tensor | float, name: str) -> Tensor:
    """Inverse of matrix + damping·I for positive semi-definite matrices (…, d, d), damping (…).

    Cholesky in the given precision, then in float64 with a growing jitter on the diagonal.
    Raises NotPositiveDefinite, naming the factor, if none of them is positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(_with_diagonal(matrix, damping))
    if not bool(info.any()):
        inverse = torch.cholesky_inverse(factor)
        if finite(diagonal(inverse)):
            return inverse
    return _careful_inverse(matrix, damping, name)


def _careful_inverse(matrix: Tensor, damping: Tensor | float, name: str) -> Tensor:
    require_finite(matrix, name)
    wide = matrix.double()
    mean = diagonal(wide).mean(-1).abs().clamp_min(torch.finfo(torch.float64).tiny)
    for jitter in JITTERS:
        factor, info = torch.linalg.cholesky_ex(_with_diagonal(wide, damping + jitter * mean))
        if not bool(info.any()):
            inverse = torch.cholesky_inverse(factor).to(matrix.dtype)
            if finite(inverse):
                return inverse
    raise NotPositiveDefinite(
        f"{name} ({matrix.shape[-1]}×{matrix.shape[-1]}) could not be inverted even with "
        f"{JITTERS[-1]:g} of its mean diagonal added; raise `damping` or use basis='eigen'."
    )


def symmetric_eigen(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues s (…, d), ascending, not below zero, and eigenvectors U (…, d, d) as columns.

    Retries in float64 if LAPACK gives up. Raises NotPositiveDefinite, naming the factor, if the
    matrix is not finite or no attempt converges.
    """
    require_finite(matrix, name)  # LAPACK may return numbers for a matrix with NaN in it
    for dtype in (matrix.dtype, torch.float64):
        try:
            s, U = torch.linalg.eigh(matrix.to(dtype))
        except RuntimeError as error:  # LinAlgError derives from it; MKL and cuSOLVER raise either
            if ran_out_of_memory(error):
                raise
            continue
        if math.isfinite(float(s.sum() + U.sum())):
            return s.clamp_min(0).to(matrix.dtype), U.to(matrix.dtype)
    raise NotPositiveDefinite(
        f"the eigendecomposition of {name} did not converge; "
        "use basis='factored' or train this layer in float64."
    )


def leading_eigen(matrix: Tensor, k: int, near: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues (…, k), ascending, of (…, d, d) and their eigenvectors (…, d, k).

    Nearly, by subspace iteration (Halko et al. 2011), from the eigenvectors `near` of a matrix that
    was much the same, or from random columns. For k = d/8 it takes an eighth of the time of
    `symmetric_eigen`. Raises NotPositiveDefinite, naming the factor, if the matrix is not finite.
    """
    require_finite(matrix, name)
    rounds, U = LEADING_AGAIN, near
    if U is None:
        # The user's stream of draws stays as it is.
        generator = torch.Generator(matrix.device).manual_seed(0)
        shape = *matrix.shape[:-1], min(k + BESIDE, matrix.shape[-1])
        U = torch.randn(shape, dtype=matrix.dtype, device=matrix.device, generator=generator)
        rounds = LEADING_AFRESH
    for _ in range(rounds):
        U = torch.linalg.qr(matrix @ U).Q
    s, V = symmetric_eigen(U.mT @ (matrix @ U), name)
    return s[..., -k:], U @ V[..., -k:]


def iterated_eigen(matrix: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Nearly what `symmetric_eigen` gives, by products and in no order, and whether it is sound.

    A few rounds of simultaneous iteration on matrices (…, d, d), from the eigenvectors `near` of
    ones that were much the same, (…, d, k): all, or the leading ones, of which it is then; or from
    the axes, for all. Eigenvectors keep their places and signs. Not
    sound, (…), is one that is not finite, or whose columns are too much alike to be told apart.
    """
    wide = matrix.double()  # columns that are nearly alike have a Gram matrix that is singular
    mean = diagonal(wide).mean(-1)[..., None, None]
    mean = torch.where(mean == 0, torch.ones_like(mean), mean)  # the axes of nothing are as good
    least = LEAST_EIGENVALUE * mean
    if near is None:
        near = torch.eye(matrix.shape[-1], dtype=wide.dtype, device=wide.device).expand_as(wide)
        rounds = AFRESH
    else:
        rounds = AGAIN
    U = near.double()
    M_U, sound = wide @ U, torch.ones_like(least[..., 0, 0], dtype=torch.bool)
    for _ in range(rounds):
        # The largest first: every column loses what it has of those before it. In float32, so that
        # rounding does not decide about those without any.
        size = ((U * M_U).sum(-2, keepdim=True) + least) / mean
        order = size.float().argsort(dim=-1, descending=True, stable=True).expand_as(U)
        P = (M_U + least * U).gather(-1, order)
        P = P / torch.linalg.vector_norm(P, dim=-2, keepdim=True)
        L, info = torch.linalg.cholesky_ex(P.mT @ P)
        made = torch.linalg.solve_triangular(L, P.mT, upper=False).mT
        U = torch.empty_like(made).scatter_(-1, order, made)
        M_U, sound = wide @ U, sound & (info == 0)
    s = (U * M_U).sum(-2).clamp_min(0)
    sound = sound & (s.sum(-1) + U.sum((-2, -1))).isfinite()
    return s.to(matrix.dtype), U.to(matrix.dtype), sound


def _with_diagonal(matrix: Tensor, value: Tensor | float) -> Tensor:
    out = matrix.clone()
    diagonal(out).add_(value.unsqueeze(-1) if isinstance(value, Tensor) else value)
    return out


def diagonal(matrix: Tensor) -> Tensor:
    """The diagonals of (…, d, d) as a view (…, d)."""
    return matrix.diagonal(dim1=-2, dim2=-1)


def rough_dtype(dtype: torch.dtype, device: torch.device, products: int) -> torch.dtype:
    """The precision for products whose result may be rough: bfloat16 where it is faster.

    products: multiplications in each. Never of what is float64.
    """
    apt = products >= HALF and dtype == torch.float32 and device.type == "cpu"
    apt = apt and multiplies_in_half() and bool(torch.backends.mkldnn.enabled)
    return torch.bfloat16 if apt else dtype


@cache
def multiplies_in_half() -> bool:
    """Whether this machine's CPU has units for products in bfloat16, and torch uses them."""
    told: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in old torch
    has_units = told.get("avx512_bf16") or told.get("amx_bf16")
    return bool(has_units and torch.backends.mkldnn.is_available())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers of all tensors are finite."""
    there = [t for t in tensors if t.numel()]
    norms = torch._foreach_norm(there, math.inf) if there else ()
    return not norms or math.isfinite(float(torch.stack([n.double() for n in norms]).max()))


def finite(tensor: Tensor) -> bool:
    """Whether all numbers of one tensor are finite."""
    # A sum that is finite is one of finite numbers; one that is not may have overflowed.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an error says so: CPUs and the libraries of GPUs have a RuntimeError for it."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "memory" in said or "alloc" in said


@contextmanager
def memory_for(name: str) -> Iterator[None]:
    """Memory that runs out inside is an inversion that failed like any other."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        raise NotPositiveDefinite(
            f"there was not enough memory to invert the factors of layer '{name}'; give it a lower "
            f"largest_side, largest_side={{'{name}': 1024}}, or make the batch smaller."
        ) from error


def longest(tensors: Sequence[Tensor]) -> float:
    """The largest norm of any of the tensors; NaN or infinity if a number is not finite."""
    norms = list(torch._foreach_norm(list(tensors))) if tensors else []
    if len({n.dtype for n in norms}) > 1:
        norms = [n.double() for n in norms]
    return float(torch.stack(norms).max()) if norms else 0.0


def require_finite(matrix: Tensor, name: str) -> None:
    """Raise NotPositiveDefinite, naming the factor, if it is not."""
    if not finite(matrix):
        raise NotPositiveDefinite(
            f"{name} holds values that are not finite: the batch, the model's output or a "
            "gradient had NaN or infinity in it; check the data and the loss of the last steps."
        )
