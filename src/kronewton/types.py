"""The frozen values that flow between the rooms, and the letters they are written in.

Symbols, with shapes. They mean the same in every room; what a room adds it explains.

| symbol | shape | meaning |
|---|---|---|
| N, S, V | | examples, positions that share the weight, draws or columns |
| i, o | | an input, an output of a layer (the letters of every einsum) |
| a | (N, S, d_in) | a layer's input rows, with a last entry 1 where the layer has a bias |
| b | (V, N, S, d_out) | rows backpropagated to the layer's output: columns of J'√Λ, or draws |
| A | (d_in, d_in) | second moment of a: a mean over examples |
| B | (d_out, d_out) | second moment of b: a sum over examples (Λ carries the 1/N of a mean loss) |
| G | (d_out, d_in) | the weight gradient as a matrix, the bias gradient as its last column |
| Λ | | Hessian of the criterion in the model's output |
| U, s | (d, d), (d,) | eigenvectors as columns, eigenvalues |
| λ, γ | | dampings of the quadratic model and of the inverses, in units of the loss |

Layout, said once. torch stores W as (d_out, d_in) and flattens row by row, so that a layer's
curvature block reads B ⊗ A. The note stacks columns, and the same matrix reads AA' ⊗ BB'.
The product is never formed: (B ⊗ A) vec(G) = vec(B G A).

A layer that is several small ones beside each other (a convolution in groups) has one more
dimension in front of a, b, A, B and G: a batch of blocks, written … in shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from kronewton.structure import DENSE, Structure

CHUNK = 1 << 24  # numbers in the rows that are laid out at a time


class Rows(ABC):
    """A layer's input rows a: laid out in memory, or known by what they are made from."""

    @property
    @abstractmethod
    def counts(self) -> tuple[int, int]:
        """N and S."""

    @abstractmethod
    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows of some examples, or of all: (…, N, S, d_in)."""

    @abstractmethod
    def second_moment(self, weights: Tensor | None = None, structure: Structure = DENSE) -> Tensor:
        """Sum of outer products, each row with its weight (N, S): (…, d_in, d_in), as stored."""

    def product(self, b: Tensor) -> Tensor:
        """Σ b a' over rows b (…, N, S, d_out), some examples at a time: (…, d_out, d_in)."""
        N, S = self.counts
        step = max(1, CHUNK // max(1, S * self.width))
        total = b.new_zeros(*b.shape[:-3], b.shape[-1], self.width)
        for n in range(0, N, step):
            rows = self.dense(n, n + step).flatten(-3, -2)
            total += b[..., n : n + step, :, :].flatten(-3, -2).mT @ rows.to(b.dtype)
        return total

    @abstractmethod
    def squares(self) -> Tensor:
        """The sum of the squares of all entries, ()."""

    @property
    @abstractmethod
    def width(self) -> int:
        """d_in."""

    @abstractmethod
    def some(self, start: int, stop: int) -> Rows:
        """The rows of some examples."""

    @abstractmethod
    def averaged(self, shares: Tensor | None = None) -> Rows:
        """One row for each example: the mean over its positions, or Σ shares·a: (…, N, 1, d_in)."""


@dataclass(frozen=True)
class Statistics:
    """What one layer saw in one forward pass, and what came back to its output."""

    a: Rows  # (…, N, S, d_in)
    b: Tensor  # (…, V, N, S, d_out), scaled so that the sum of all outer products estimates B
    weights: Tensor  # (N, S) weight of each row in the loss, or (): the same for all rows
    loss_positions: int = 0  # of an example in the criterion; 0: not known
    forward: int = 0  # of the model; a layer's calls within one are positions of the same examples
