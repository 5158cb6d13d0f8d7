"""The inverse of a sum of two Kronecker products: a matrix that is used in two orientations.

A tied embedding is a table of rows for its input and the matrix of a linear layer for its output.
Its block is the sum of both uses' own, P₁ ⊗ Q₁ + P₂ ⊗ Q₂, with P on the same side in both: cross
terms between the uses are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kronewton.conjugate import Solver, conjugate_gradients
from kronewton.errors import NotPositiveDefinite
from kronewton.inverse import Inverse, balance
from kronewton.linalg import JITTERS, diagonal
from kronewton.structure import DENSE, DIAGONAL, PLAIN, Blocks, Sides, Structure

TOLERANCE = 1e-13  # of the exact solve; conjugate gradients stop at what the precision can reach
MOST_ITERATIONS = 300


@dataclass(frozen=True)
class Product:
    """P ⊗ Q, P on the side of a matrix's rows (d_out), Q on that of its columns (d_in)."""

    P: Tensor
    Q: Tensor
    sides: Sides  # input: of Q, output: of P

    @property
    def shape(self) -> tuple[int, int]:
        """d_out and d_in."""
        on_input, on_output = self.sides
        return on_output.diagonal(self.P).shape[-1], on_input.diagonal(self.Q).shape[-1]

    def times(self, G: Tensor) -> Tensor:
        """P G Q."""
        return self.sides.input.right(self.sides.output.left(self.P, G), self.Q)

    def damped(self, damping: float) -> Product:
        """Both factors damped as for one Kronecker product alone, with π."""
        on_input, on_output = self.sides
        pi = balance(self.Q, self.P, self.sides)
        P = self._with_diagonal(self.P, on_output, damping**0.5 / pi)
        Q = self._with_diagonal(self.Q, on_input, damping**0.5 * pi)
        return Product(P, Q, self.sides)

    @staticmethod
    def _with_diagonal(M: Tensor, structure: Structure, value: Tensor) -> Tensor:
        if structure == DIAGONAL:
            return M + value
        out = M.clone()
        diagonal(out).add_(value)
        return out


@dataclass(frozen=True)
class PairInverse(Inverse):
    """(P₁ ⊗ Q₁ + P₂ ⊗ Q₂)⁻¹ of damped factors, through bases that diagonalise both on each side."""

    X: Tensor  # on the rows: X'P₁X and X'P₂X are diagonal
    Y: Tensor  # on the columns
    s: Tensor  # (d_out, d_in)
    sides: Sides = PLAIN  # of Y and X

    def apply(self, G: Tensor, damping: float) -> Tensor:
        on_input, on_output = self.sides
        rotated = on_input.rotate_rows(on_output.rotate(self.X, G), self.Y) / self.s
        return on_input.rotate_rows_back(on_output.rotate_back(self.X, rotated), self.Y)

    def tensors(self) -> dict[str, Tensor]:
        return {"X": self.X, "Y": self.Y, "s": self.s}


@dataclass(frozen=True)
class ExactPairInverse(Inverse):
    """(P₁ ⊗ Q₁ + P₂ ⊗ Q₂ + damping·I)⁻¹ by conjugate gradients, for every damping."""

    first: Product
    second: Product
    near: PairInverse  # the preconditioner

    def apply(self, G: Tensor, damping: float) -> Tensor:
        def product(v: Tensor) -> Tensor:
            V = v.reshape(G.shape)
            return (self.first.times(V) + self.second.times(V)).flatten()

        def precondition(v: Tensor) -> Tensor:
            return self.near.apply(v.reshape(G.shape), damping).flatten()

        solver = Solver(damping, precondition, TOLERANCE, MOST_ITERATIONS)
        return conjugate_gradients(product, G.flatten(), solver).x.reshape(G.shape)

    def tensors(self) -> dict[str, Tensor]:
        own = {"P1": self.first.P, "Q1": self.first.Q, "P2": self.second.P, "Q2": self.second.Q}
        return {**own, **self.near.tensors()}


def pair_inverse(first: Product, second: Product, damping: float, name: str) -> PairInverse:
    """Invert P₁ ⊗ Q₁ + P₂ ⊗ Q₂ + damping·I approximately, half of it damping each product.

    Raises NotPositiveDefinite, naming the layer, if a factor is not finite.
    """
    one, two = first.damped(damping / 2), second.damped(damping / 2)
    sides = common_sides(first.sides, second.sides)
    mu, X = _together(one.P, two.P, one.sides.output, two.sides.output, sides.output, name)
    nu, Y = _together(one.Q, two.Q, one.sides.input, two.sides.input, sides.input, name)
    s = torch.outer(mu[0], nu[0]) + torch.outer(mu[1], nu[1])
    return PairInverse(X, Y, s.clamp_min(torch.finfo(s.dtype).tiny), sides)


def exact_pair(first: Product, second: Product, damping: float, name: str) -> ExactPairInverse:
    """The same to rounding, however the damping changes afterwards."""
    return ExactPairInverse(first, second, pair_inverse(first, second, damping, name))


def of_both(first: Product, second: Product) -> Product:
    """Both partial traces of P₁ ⊗ Q₁ + P₂ ⊗ Q₂, over its trace: one product for a basis of both.

    Where the two are the same product it is twice that.
    """
    sides = common_sides(first.sides, second.sides)
    both = [
        (
            _stored_as(one.P, one.sides.output, sides.output),
            _stored_as(one.Q, one.sides.input, sides.input),
        )
        for one in (first, second)
    ]
    P = sum((sides.input.diagonal(Q).sum() * P for P, Q in both), torch.zeros((), device="cpu"))
    Q = sum((sides.output.diagonal(P).sum() * Q for P, Q in both), torch.zeros((), device="cpu"))
    trace = sides.input.diagonal(Q).sum().clamp_min(torch.finfo(Q.dtype).tiny)
    return Product(P, Q / trace, sides)


def common_sides(first: Sides, second: Sides) -> Sides:
    """What holds the sum of matrices that are stored in these two ways."""
    return Sides(_common(first.input, second.input), _common(first.output, second.output))


def _common(one: Structure, two: Structure) -> Structure:
    if DENSE in (one, two):
        return DENSE
    return two if one == DIAGONAL else one


def _stored_as(M: Tensor, now: Structure, wanted: Structure) -> Tensor:
    if now == wanted:
        return M
    if isinstance(wanted, Blocks):  # from a diagonal: never laid out in full
        padded = torch.nn.functional.pad(M, (0, wanted.padding))
        return torch.diag_embed(padded.unflatten(-1, (wanted.count, wanted.size)))
    return now.dense(M)


def _together(
    M1: Tensor, M2: Tensor, one: Structure, two: Structure, wanted: Structure, name: str
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The diagonals of X'M₁X and X'M₂X, (d,) each, and X."""
    M1, M2 = _stored_as(M1, one, wanted), _stored_as(M2, two, wanted)
    if wanted == DIAGONAL:
        return (M1, M2), M1.new_zeros(0)
    # Of the sum of both at one scale: M₁'s share of every direction is then between 0 and 1.
    t1, t2 = (wanted.diagonal(M).mean().clamp_min(1e-30) for M in (M1, M2))
    W = _whitening(M1 / t1 + M2 / t2, wanted, name)
    of_both = W.mT @ (M1 / t1) @ W
    share, U = wanted.eigen(of_both, f"a factor of the tied layer '{name}'")
    share = share.clamp(0, 1)
    return (t1 * share, t2 * (1 - share)), W @ U


def _whitening(S: Tensor, structure: Structure, name: str) -> Tensor:
    """W with W'S W = I, for a sum that is positive definite after some jitter."""
    if not bool(torch.isfinite(S).all()):
        raise NotPositiveDefinite(
            f"a factor of the tied layer '{name}' holds values that are not finite: check the data "
            "and the loss of the last steps."
        )
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    for jitter in JITTERS:
        if isinstance(structure, Blocks):
            S = structure.marked(S, 1.0)
        L, info = torch.linalg.cholesky_ex(S + jitter * identity)
        if not bool(info.any()):
            W: Tensor = torch.linalg.solve_triangular(L.mT, identity.expand_as(L), upper=True)
            return W
    raise NotPositiveDefinite(
        f"the factors of the tied layer '{name}' could not be inverted even with {JITTERS[-1]:g} "
        "of their mean diagonal added; raise `damping`."
    )


def oriented(P: Tensor, Q: Tensor, sides: Sides, turned: bool) -> Product:
    """B ⊗ A as P ⊗ Q on the sides of the layer's own matrix; turned: the use is its transpose."""
    if turned:
        return Product(Q, P, Sides(sides.output, sides.input))
    return Product(P, Q, sides)
