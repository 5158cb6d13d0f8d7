"""Which entries of a factor are kept: all, equal blocks along the diagonal, or the diagonal.

A side of a layer can be too large for a matrix: a vocabulary, a flattened image. Its factor is then
kept in part. Every structure stores a symmetric matrix M of one side as one tensor, and does with
it what a dense matrix could do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kronewton.linalg import (
    damped_inverse,
    iterated_eigen,
    leading_eigen,
    require_finite,
    second_moment,
    symmetric_eigen,
)
from kronewton.linalg import diagonal as diagonal_of

LEAST_BLOCK = 16  # smaller ones say little more than the diagonal, and cost more
WIDE = 256  # from this side on
ONE_IN = 4  # of a wide side's eigenvectors are its leading ones: half of all products are saved
FEWEST, MOST = 16, 256  # of them
LONGER = 2  # times the other side: below, orthogonalising takes more than turning saves


class Structure(ABC):
    """How a symmetric d×d matrix M is stored, and its eigenvectors U."""

    @abstractmethod
    def described(self) -> str:
        """In the words of the table of coverage."""

    @abstractmethod
    def stored(self, d: int) -> tuple[int, ...]:
        """The shape that M is stored in."""

    def stored_basis(self, d: int) -> tuple[int, ...]:
        """The shape that U is stored in."""
        return self.stored(d)

    @abstractmethod
    def second_moment(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """The kept entries of the weighted sum of outer products of rows (…, n, d)."""

    @abstractmethod
    def of_dense(self, matrix: Tensor) -> Tensor:
        """What is kept of a matrix (…, d, d) that is there in full."""

    @abstractmethod
    def dense(self, M: Tensor) -> Tensor:
        """The matrix (…, d, d), with zeros where nothing is kept."""

    @abstractmethod
    def diagonal(self, M: Tensor) -> Tensor:
        """The diagonal, (…, d)."""

    def trace(self, M: Tensor) -> Tensor:
        """The sum of the diagonal, (…)."""
        return self.diagonal(M).sum(-1)

    @abstractmethod
    def inverse(self, M: Tensor, damping: Tensor | float, name: str) -> Tensor:
        """(M + damping·I)⁻¹, stored likewise. Raises NotPositiveDefinite, naming the factor."""

    @abstractmethod
    def eigen(self, M: Tensor, name: str, near: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Eigenvalues (…, d), not below zero, and eigenvectors, stored likewise as columns.

        near: eigenvectors of an M before, to begin with where that helps.
        """

    def nearly_eigen(self, M: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same nearly, by products, and whether it is sound, (…)."""
        raise NotImplementedError  # axes need no search

    @abstractmethod
    def left(self, M: Tensor, G: Tensor) -> Tensor:
        """M G for a matrix G (…, d, e)."""

    @abstractmethod
    def rotate(self, U: Tensor, G: Tensor) -> Tensor:
        """U'G."""

    @abstractmethod
    def rotate_back(self, U: Tensor, G: Tensor) -> Tensor:
        """U G."""

    def vectors(self, d: int) -> int:
        """How many of d coordinates are along eigenvectors: the first."""
        return d

    def some(self, U: Tensor, like: Tensor, every: int) -> Tensor:
        """Every so many eigenvectors as columns (…, d, k), for d coordinates as `like` (…, d)."""
        d = like.shape[-1]
        unit = torch.eye(d, dtype=like.dtype, device=like.device)[:, ::every]
        return self.rotate_back(U, unit.expand(*like.shape[:-1], d, -1))

    @abstractmethod
    def between(self, U: Tensor, V: Tensor) -> Tensor | None:
        """V'U, stored as M is: what takes coordinates in the basis U to those in V.

        None where both are the axes.
        """

    def carry(self, s: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """(V'U)∘(V'U) s for s (…, d, e): second moments in the basis U, carried into V.

        As if they were uncorrelated. Keeps the trace, since the square is doubly stochastic.
        """
        R = self.between(U, V)
        return s if R is None else self.left(R.square(), s)

    def frame(self, U: Tensor) -> Tensor:
        """The matrix of all coordinates, (…, k, d): what rotates, laid out in full."""
        return self.dense(U).mT

    def turn(self, m: Tensor, v: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Means m and second moments v (…, d, e) in the basis U, carried into V."""
        R = self.between(U, V)
        return (m, v) if R is None else (self.left(R, m), self.left(R.square(), v))

    def from_axes(self, v: Tensor, U: Tensor) -> Tensor:
        """Second moments (…, d, e) along the side's axes, carried into the basis U."""
        return self.left(U.square().mT, v)

    def to_axes(self, v: Tensor, U: Tensor) -> Tensor:
        """Second moments in the basis U, carried to the side's axes."""
        return self.left(U.square(), v)

    def right(self, G: Tensor, M: Tensor) -> Tensor:
        """G M for a matrix G (…, e, d) and a symmetric M."""
        return self.left(M, G.mT).mT

    def rotate_rows(self, rows: Tensor, U: Tensor) -> Tensor:
        """Rows (…, n, d) in the eigenbasis: rows U."""
        return self.rotate(U, rows.mT).mT

    def rotate_rows_back(self, rows: Tensor, U: Tensor) -> Tensor:
        """The inverse of `rotate_rows`: rows U'."""
        return self.rotate_back(U, rows.mT).mT


@dataclass(frozen=True)
class Dense(Structure):
    """The whole matrix, (…, d, d)."""

    def described(self) -> str:
        return "dense"

    def stored(self, d: int) -> tuple[int, ...]:
        return d, d

    def second_moment(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return second_moment(rows, weights)

    def of_dense(self, matrix: Tensor) -> Tensor:
        return matrix

    def dense(self, M: Tensor) -> Tensor:
        return M

    def diagonal(self, M: Tensor) -> Tensor:
        return diagonal_of(M)

    def trace(self, M: Tensor) -> Tensor:
        return M.trace() if M.dim() == 2 else super().trace(M)

    def inverse(self, M: Tensor, damping: Tensor | float, name: str) -> Tensor:
        return damped_inverse(M, damping, name)

    def eigen(self, M: Tensor, name: str, near: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return symmetric_eigen(M, name)

    def nearly_eigen(self, M: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return iterated_eigen(M, near)

    def left(self, M: Tensor, G: Tensor) -> Tensor:
        return M @ G

    def right(self, G: Tensor, M: Tensor) -> Tensor:
        return G @ M

    def rotate(self, U: Tensor, G: Tensor) -> Tensor:
        return U.mT @ G

    def rotate_back(self, U: Tensor, G: Tensor) -> Tensor:
        return U @ G

    def some(self, U: Tensor, like: Tensor, every: int) -> Tensor:
        return U[..., ::every]

    def rotate_rows(self, rows: Tensor, U: Tensor) -> Tensor:
        return rows @ U

    def rotate_rows_back(self, rows: Tensor, U: Tensor) -> Tensor:
        return rows @ U.mT

    def between(self, U: Tensor, V: Tensor) -> Tensor | None:
        return V.mT @ U


@dataclass(frozen=True)
class Leading(Dense):
    """The whole matrix, of whose eigenvectors there are the k leading ones, (d, k).

    What is outside of these has a coordinate along each of the side's own axes, so that there are
    k + d: [U'x; (I − UU')x]. They make a tight frame: x = U (c₁ − U'c₂) + c₂, and a change of
    coordinates alone never changes a length.
    """

    k: int

    def eigen(self, M: Tensor, name: str, near: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s, U = leading_eigen(M, self.k, near, name)
        return torch.cat([s, self._rest(M, s, U)], -1), U

    def nearly_eigen(self, M: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if near is None:  # the axes with most, as good a start as any
            most = self.diagonal(M).topk(self.k, dim=-1).indices
            near = torch.zeros_like(M[..., : self.k]).scatter_(-2, most.unsqueeze(-2), 1.0)
            s, near, _ = iterated_eigen(M, near)
        s, U, sound = iterated_eigen(M, near)
        return torch.cat([s, self._rest(M, s, U)], -1), U, sound

    def _rest(self, M: Tensor, s: Tensor, U: Tensor) -> Tensor:
        """What is left of the diagonal outside of the leading eigenvectors."""
        along = (U.square() @ s.unsqueeze(-1)).squeeze(-1)
        return (self.diagonal(M) - along).clamp_min(0)

    def rotate(self, U: Tensor, G: Tensor) -> Tensor:
        within = U.mT @ G
        return torch.cat([within, G - U @ within], -2)

    def rotate_back(self, U: Tensor, G: Tensor) -> Tensor:
        within, rest = G[..., : self.k, :], G[..., self.k :, :]
        return U @ (within - U.mT @ rest) + rest

    def vectors(self, d: int) -> int:
        return self.k

    def stored_basis(self, d: int) -> tuple[int, ...]:
        return d, self.k

    def between(self, U: Tensor, V: Tensor) -> Tensor:
        return self.frame(V) @ self.frame(U).mT

    def rotate_rows(self, rows: Tensor, U: Tensor) -> Tensor:
        within = rows @ U
        return torch.cat([within, rows - within @ U.mT], -1)

    def rotate_rows_back(self, rows: Tensor, U: Tensor) -> Tensor:
        within, rest = rows[..., : self.k], rows[..., self.k :]
        return (within - rest @ U) @ U.mT + rest

    def turn(self, m: Tensor, v: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        within, rest = v[..., : self.k, :], v[..., self.k :, :]
        R = V.mT @ U
        along = R.square() @ within + (V - U @ R.mT).square().mT @ rest
        # What is outside of both is much the same, as the bases are.
        outside = (U - V @ R).square() @ within + rest
        return self.rotate(V, self.rotate_back(U, m)), torch.cat([along, outside], -2)

    def frame(self, U: Tensor) -> Tensor:
        outside = (U @ U.mT).neg_()
        diagonal_of(outside).add_(1)
        return torch.cat([U.mT, outside], -2)

    def from_axes(self, v: Tensor, U: Tensor) -> Tensor:
        return self.frame(U).square() @ v

    def to_axes(self, v: Tensor, U: Tensor) -> Tensor:
        return self.frame(U).mT.square() @ v


@dataclass(frozen=True)
class OnlyDiagonal(Structure):
    """The diagonal, (…, d). Its eigenvectors are the axes, and no tensor is kept for them."""

    def described(self) -> str:
        return "diagonal"

    def stored(self, d: int) -> tuple[int, ...]:
        return (d,)

    def stored_basis(self, d: int) -> tuple[int, ...]:
        return (0,)

    def second_moment(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        squares = rows.square()
        return squares.sum(-2) if weights is None else weights @ squares

    def of_dense(self, matrix: Tensor) -> Tensor:
        return diagonal_of(matrix).clone()

    def dense(self, M: Tensor) -> Tensor:
        return torch.diag_embed(M)

    def diagonal(self, M: Tensor) -> Tensor:
        return M

    def inverse(self, M: Tensor, damping: Tensor | float, name: str) -> Tensor:
        wide = damping.unsqueeze(-1) if isinstance(damping, Tensor) else damping
        # As 1×1 matrices: the same care for what is not finite or not positive.
        return damped_inverse(M[..., None, None], wide, name)[..., 0, 0]

    def eigen(self, M: Tensor, name: str, near: Tensor | None = None) -> tuple[Tensor, Tensor]:
        require_finite(M, name)
        return M.clamp_min(0), M.new_zeros(0)

    def left(self, M: Tensor, G: Tensor) -> Tensor:
        return M.unsqueeze(-1) * G

    def rotate(self, U: Tensor, G: Tensor) -> Tensor:
        return G

    def rotate_back(self, U: Tensor, G: Tensor) -> Tensor:
        return G

    def between(self, U: Tensor, V: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Blocks(Structure):
    """Consecutive blocks of `size` along the diagonal, (…, k, size, size), the last one padded."""

    size: int
    d: int

    @property
    def count(self) -> int:
        """k."""
        return -(-self.d // self.size)

    @property
    def padding(self) -> int:
        """Rows of the last block that are not there."""
        return self.count * self.size - self.d

    def described(self) -> str:
        return f"{self.count} blocks of {self.size}"

    def stored(self, d: int) -> tuple[int, ...]:
        return self.count, self.size, self.size

    def _cut(self, G: Tensor) -> Tensor:
        """Rows (…, d, e) in blocks (…, k, size, e)."""
        padded = torch.nn.functional.pad(G, (0, 0, 0, self.padding)) if self.padding else G
        cut: Tensor = padded.unflatten(-2, (self.count, self.size))
        return cut

    def second_moment(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        cut = self._cut(rows.mT)  # (…, k, size, n)
        moment: Tensor = cut @ (cut if weights is None else cut * weights).mT
        return moment

    def of_dense(self, matrix: Tensor) -> Tensor:
        padded: Tensor = torch.nn.functional.pad(matrix, (0, self.padding, 0, self.padding))
        both = (self.count, self.size)
        cut: Tensor = padded.unflatten(-1, both).unflatten(-3, both)
        return cut.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous()

    def dense(self, M: Tensor) -> Tensor:
        full = M.new_zeros(*M.shape[:-3], self.count * self.size, self.count * self.size)
        for k in range(self.count):
            at = slice(k * self.size, (k + 1) * self.size)
            full[..., at, at] = M[..., k, :, :]
        return full[..., : self.d, : self.d]

    def diagonal(self, M: Tensor) -> Tensor:
        return diagonal_of(M).flatten(-2)[..., : self.d]

    def marked(self, M: Tensor, value: Tensor | float) -> Tensor:
        """M with a value on the diagonal of what is padding."""
        if not self.padding:
            return M
        marked = M.clone()
        diagonal_of(marked)[..., -1, self.size - self.padding :] = value
        return marked

    def inverse(self, M: Tensor, damping: Tensor | float, name: str) -> Tensor:
        wide = damping.unsqueeze(-1) if isinstance(damping, Tensor) else damping
        # Without damping the padding alone would make the last block singular.
        return damped_inverse(self.marked(M, 1.0), wide, name)

    def eigen(self, M: Tensor, name: str, near: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Below all others, so that no eigenvector mixes padding with what is there.
        below = -self.diagonal(M).sum(-1, keepdim=True).clamp_min(torch.finfo(M.dtype).tiny)
        s, U = symmetric_eigen(self.marked(M, below), name)
        s[..., -1, :] = s[..., -1, :].roll(-self.padding, -1)
        U[..., -1, :, :] = U[..., -1, :, :].roll(-self.padding, -1)
        return s.flatten(-2)[..., : self.d], U

    def nearly_eigen(self, M: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        # What is padding stays where it is, last among the axes that there is nothing along.
        s, U, sound = iterated_eigen(M, near)
        return s.flatten(-2)[..., : self.d], U, sound.all(-1)

    def _times(self, M: Tensor, G: Tensor) -> Tensor:
        product: Tensor = M @ self._cut(G)
        return product.flatten(-3, -2)[..., : self.d, :]

    def left(self, M: Tensor, G: Tensor) -> Tensor:
        return self._times(M, G)

    def rotate(self, U: Tensor, G: Tensor) -> Tensor:
        return self._times(U.mT, G)

    def rotate_back(self, U: Tensor, G: Tensor) -> Tensor:
        return self._times(U, G)

    def between(self, U: Tensor, V: Tensor) -> Tensor | None:
        return V.mT @ U


DENSE, DIAGONAL = Dense(), OnlyDiagonal()


class Sides(NamedTuple):
    """The structures of a layer's two factors."""

    input: Structure = DENSE  # of A
    output: Structure = DENSE  # of B

    @property
    def dense(self) -> bool:
        """Whether both factors are kept in full."""
        return self.input == self.output == DENSE

    def described(self) -> str:
        """Empty if both are dense, which is what everybody expects."""
        named = (("input", self.input), ("output", self.output))
        return ", ".join(f"{side} {s.described()}" for side, s in named if s != DENSE)


PLAIN = Sides()


def in_full(sides: Sides, d_out: int, d_in: int) -> Sides:
    """How bases of a layer's dense sides are kept, if of all coordinates there is one basis.

    A wide side that is much longer than the other has its leading eigenvectors alone: what is
    outside is nearly as well told apart along its own axes, at a small part of the price. Of inputs
    they are no more than there are outputs, as the ten classes of a wide classifier: its gradients
    have no more directions. Not where sides are much the same, since the more coordinates there are
    the more takes it to orthogonalise steps; where the other side's own axes are its basis, none
    are.
    """
    on_input, on_output = sides
    if on_input == DENSE and (d_in >= LONGER * d_out or on_output == DIAGONAL):
        on_input = leading(d_in, d_out)
    if on_output == DENSE and (d_out >= LONGER * d_in or on_input == DIAGONAL):
        on_output = leading(d_out)
    return Sides(on_input, on_output)


def leading(d: int, most: int = MOST) -> Structure:
    """How the basis of a dense side of d is kept where that may be in less than all vectors.

    most: leading ones, as the layer's other side asks for; `FEWEST` there may be anyway.
    """
    return DENSE if d < WIDE else Leading(min(d // ONE_IN, max(FEWEST, most), MOST))


def coordinates(U: Tensor, d: int) -> int:
    """How many a side of d has in a basis U, however that is stored."""
    in_less = U.dim() > 1 and U.shape[-1] < U.shape[-2] == d
    return d + U.shape[-1] if in_less else d


def of_basis(U: Tensor, d: int, side: Structure, dims: int) -> Structure:
    """How the basis U of a side is stored: as its factor is, or in less.

    d: of s along that side. dims: of s.
    """
    if U.numel() == 0:
        return DIAGONAL  # the side's own axes, which take no tensor
    if side == DENSE and U.dim() > dims:
        return Blocks(U.shape[-1], d)
    in_less = side == DENSE and U.shape[-1] < U.shape[-2]
    return Leading(U.shape[-1]) if in_less else side


def kronecker_apply(B: Tensor, A: Tensor, G: Tensor, sides: Sides = PLAIN) -> Tensor:
    """(B ⊗ A) vec(G) as a matrix, for symmetric A (…, d_in, d_in): B G A."""
    # The thinner product first: it is the cheaper order and the same number.
    if G.shape[-2] <= G.shape[-1]:
        return sides.input.right(sides.output.left(B, G), A)
    return sides.output.left(B, sides.input.right(G, A))


def in_parts(step: Tensor, sides: Sides) -> Tensor:
    """A step (…, d_out, d_in) as parts (…, k, d_out/k, d_in) where its output's side has k."""
    on_output = sides.output
    if isinstance(on_output, Blocks) and not on_output.padding:
        step = step.unflatten(-2, (on_output.count, on_output.size))
    return step


def side_of(d: int, other: int, largest: int) -> Structure:
    """The structure of a side of d, when the layer's other side has `other` entries.

    Up to `largest` it is dense. Above, it is split into blocks as large as the other side, at most
    `largest`: the factor then takes no more memory than the weight, and making it no more time
    than the layer's own product. Where that leaves blocks too small to matter, the diagonal.
    """
    if d <= largest:
        return DENSE
    count = math.ceil(d / max(1, min(other, largest)))
    size = math.ceil(d / count)
    return Blocks(size, d) if size >= LEAST_BLOCK else DIAGONAL


def fused(d: int, other: int) -> Blocks | None:
    """An output's side of d as several of the input's, without its bias or with; None: as one."""
    for size in (other - 1, other):
        if size >= LEAST_BLOCK and size < d and d % size == 0:
            return Blocks(size, d)
    return None
