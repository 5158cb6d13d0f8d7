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
    require_finite,
    second_moment,
    symmetric_eigen,
)
from kronewton.linalg import diagonal as diagonal_of

LEAST_BLOCK = 16  # smaller ones say little more than the diagonal, and cost more


class Structure(ABC):
    """How a symmetric d×d matrix M is stored, and its eigenvectors U."""

    @abstractmethod
    def described(self) -> str:
        """In the words of the table of coverage."""

    @abstractmethod
    def stored(self, d: int) -> tuple[int, ...]:
        """The shape that M is stored in."""

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
    def eigen(self, M: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Eigenvalues (…, d), not below zero, and eigenvectors, stored likewise as columns."""

    def nearly_eigen(self, M: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same nearly, by products, and whether it is sound, (…).

        near: eigenvectors of an M before, to begin with.
        """
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

    def eigen(self, M: Tensor, name: str) -> tuple[Tensor, Tensor]:
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
class OnlyDiagonal(Structure):
    """The diagonal, (…, d). Its eigenvectors are the axes, and no tensor is kept for them."""

    def described(self) -> str:
        return "diagonal"

    def stored(self, d: int) -> tuple[int, ...]:
        return (d,)

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

    def eigen(self, M: Tensor, name: str) -> tuple[Tensor, Tensor]:
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

    def eigen(self, M: Tensor, name: str) -> tuple[Tensor, Tensor]:
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
