"""Conjugate gradients on a symmetric matrix that is known by its products, and how they ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from kronewton.errors import OptionError

Product = Callable[[Tensor], Tensor]


class Ending(StrEnum):
    """Why no further iteration was made."""

    CONVERGED = "the residual is small enough"
    LIMIT = "the limit of iterations"
    ROUNDING = "rounding, below which the residual does not fall"
    CURVATURE = "a direction without positive curvature"
    NOT_FINITE = "a number that is not finite"


@dataclass(frozen=True)
class Solver:
    """How (H + λI) x = b is to be solved."""

    damping: float = 0.0  # λ, in units of H
    preconditioner: Product | None = None  # about (H + λI)⁻¹, positive definite; None: plain
    tolerance: float = 1e-10  # of ‖b − (H + λI)x‖ / ‖b‖; float32 gets to 4e-6
    limit: int | None = None  # of iterations; None: ten for each unknown

    def __post_init__(self) -> None:
        """Refuse what would not end, or not where it should."""
        if not 0 <= self.damping < math.inf:
            raise OptionError(
                f"damping={self.damping}; a finite number from 0 up is allowed. Give 0 for the "
                "matrix itself, or a positive number in its units."
            )
        if not 0 < self.tolerance < 1:
            raise OptionError(
                f"tolerance={self.tolerance}; a number between 0 and 1 is allowed. Give the "
                "relative residual to reach, as 1e-10."
            )
        if self.limit is not None and self.limit < 1:
            raise OptionError(
                f"limit={self.limit}; a whole number from 1 up is allowed, or None for ten "
                "iterations for each unknown. Leave it out if in doubt."
            )


@dataclass(frozen=True)
class Solution:
    """Where conjugate gradients came to."""

    x: Tensor
    iterations: int
    residual: float  # ‖b − (H + λI)x‖ / ‖b‖, computed afresh
    ending: Ending


PLAIN = Solver()
REACHABLE = 32  # roundings: below, conjugate gradients on a singular matrix follow noise


def conjugate_gradients(product: Product, b: Tensor, solver: Solver = PLAIN) -> Solution:
    """Solve (H + λI) x = b from x = 0, for a product v ↦ Hv of a positive semidefinite H.

    Every iteration lowers ½x'(H + λI)x − b'x, so that however it ends the last x is the best. Of
    a singular H that b is in the range of, plain conjugate gradients find the shortest x.
    """

    def damped(v: Tensor) -> Tensor:
        return product(v) + solver.damping * v

    size = float(b.norm()) or 1.0
    b = b / size  # squares of very small numbers would vanish
    goal = max(solver.tolerance, REACHABLE * torch.finfo(b.dtype).eps)
    limit = solver.limit or 10 * len(b)
    x, r, done = torch.zeros_like(b), b, 0
    while True:
        new, count, ending = _descend(damped, x, r, solver.preconditioner, goal, limit - done)
        # Inside, r follows a recursion that rounding leads astray: take it afresh and go on.
        fresh, before, done = b - damped(new), float(r.norm()), done + count
        if float(new @ (b + fresh)) >= float(x @ (b + r)):  # lower by twice that; false if NaN
            x, r = new, fresh
        now = float(r.norm())
        if ending is Ending.CONVERGED and now > solver.tolerance:
            ending = Ending.ROUNDING
            if goal < now <= before / 2:
                continue
        return Solution(size * x, done, now, ending)


def _descend(
    product: Product, x: Tensor, r: Tensor, preconditioner: Product | None, goal: float, limit: int
) -> tuple[Tensor, int, Ending]:
    """Conjugate gradients from x with residual r: the new x, the iterations, how they ended."""
    p, rz = torch.zeros_like(r), 0.0
    for count in range(limit + 1):
        if float(r.norm()) <= goal:
            return x, count, Ending.CONVERGED
        if count == limit:
            break
        z = r if preconditioner is None else preconditioner(r)
        rz, before = float(r @ z), rz
        p = z + (rz / before if before else 0.0) * p
        Hp = product(p)
        curvature = float(p @ Hp)
        if not math.isfinite(rz + curvature + float(Hp.norm())):
            return x, count, Ending.NOT_FINITE
        if rz <= 0 or curvature <= 0:
            return x, count, Ending.CURVATURE
        x, r = x + (rz / curvature) * p, r - (rz / curvature) * Hp
    return x, limit, Ending.LIMIT


def seems_singular(product: Product, like: Tensor, solver: Solver = PLAIN) -> bool:
    """Whether some direction has no curvature, as far as one random vector z tells.

    H y = H z is solved for y: if H is regular then y = z, and if not then z − y is taken to zero.
    In float64 a condition number above 1e10 or so passes for singular, in float32 one above 1e3.
    """
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    Hz = product(z)
    rest = z - conjugate_gradients(product, Hz, solver).x
    rounding = 10 * len(z) * torch.finfo(z.dtype).eps
    size, whole = float(rest @ rest), float(z @ z)
    if size <= rounding * whole:  # nothing is left but rounding, whose curvature says nothing
        return False
    mean = float(z @ Hz) / whole  # of the eigenvalues, about; the largest is up to len(z) means
    return float(rest @ product(rest)) <= 100 * rounding * mean * size
