"""Statistics of batches → running Kronecker factors, as sums with counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronewton.linalg import diagonal, second_moment
from kronewton.types import Statistics

CHUNK = 1 << 24  # numbers in one chunk of per-example gradients


@dataclass(frozen=True)
class Moment:
    """A sum and its count, never a mean.

    Micro-batches, running averages with their bias correction and shards of a batch are then all
    one addition.
    """

    total: Tensor
    count: Tensor  # ()

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.total + other.total, self.count + other.count)

    def decayed(self, decay: float) -> Moment:
        """The same mean, counting less against what comes next."""
        return Moment(self.total * decay, self.count * decay)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count


@dataclass(frozen=True)
class Factors:
    """The moments of one layer: A over rows, B over batches, and s in an eigenbasis if kept."""

    A: Moment  # (…, d_in, d_in), counted by the rows' weights in the loss
    B: Moment  # (…, d_out, d_out), counted by batches
    s: Moment | None = None  # (…, d_out, d_in), counted by batches

    def then(self, batch: Factors, decay: float) -> Factors:
        """The running moments after one more batch."""
        s = self.s
        if batch.s is not None:
            s = batch.s if s is None else s.decayed(decay) + batch.s
        return Factors(self.A.decayed(decay) + batch.A, self.B.decayed(decay) + batch.B, s)

    def finite(self) -> Tensor:
        """Whether every number is finite, as a tensor ()."""
        # Diagonals are enough: a bad entry of a row reaches the diagonal through its square.
        return torch.isfinite(diagonal(self.A.total).sum() + diagonal(self.B.total).sum())

    @property
    def size(self) -> int:
        """How many numbers the layer's matrix has."""
        d_in, d_out = self.A.total.shape[-1], self.B.total.shape[-1]
        return self.A.total.shape[:-2].numel() * d_in * d_out

    def trace(self) -> Tensor:
        """Trace of B ⊗ A, ()."""
        A, B = diagonal(self.A.mean).sum(-1), diagonal(self.B.mean).sum(-1)  # (…)
        return (A * B).sum()


Observation = tuple[Statistics, Tensor]  # and the weight of its part of the batch in the loss


def batch_factors(observations: Sequence[Observation]) -> Factors:
    """A and B of one layer over all parts of one batch and all calls of the layer in them."""
    A = _sum(_input_moment(stats, part) for stats, part in observations)
    total = _total(part * second_moment(stats.b.flatten(-4, -2)) for stats, part in observations)
    return Factors(A, Moment(total, total.new_ones(())))


def _input_moment(stats: Statistics, part: Tensor) -> Moment:
    # Weighted by the loss: an example of weight 2 is that example twice, a masked one is not there.
    weights = stats.weights
    if weights.dim() == 0:
        N, S = stats.a.counts
        return Moment(part * weights * stats.a.second_moment(), part * weights * (N * S))
    return Moment(part * stats.a.second_moment(weights), part * weights.sum())


def with_corrected(
    factors: Factors, observations: Sequence[Observation], U_A: Tensor, U_B: Tensor
) -> Factors:
    """Add to a batch's factors the second moments of its gradients in an eigenbasis.

    s[o, i] = Σ (u_o' G u_i)² over the per-example gradients G of columns or draws
    (George et al. 2018): the diagonal of the exact block in the basis U_B ⊗ U_A.
    """
    total = _total(part * _rotated_squares(stats, U_A, U_B) for stats, part in observations)
    return replace(factors, s=Moment(total, total.new_ones(())))


def _rotated_squares(stats: Statistics, U_A: Tensor, U_B: Tensor) -> Tensor:
    N, S = stats.a.counts
    d_out, d_in, V = U_B.shape[-1], U_A.shape[-1], stats.b.shape[-4]
    step = max(1, CHUNK // (S * (d_in + V * d_out) + V * d_out * d_in))  # examples
    total = U_A.new_zeros(*U_A.shape[:-2], d_out, d_in)
    for n in range(0, N, step):
        a = stats.a.dense(n, n + step).unsqueeze(-4) @ U_A.unsqueeze(-3).unsqueeze(-3)
        b = stats.b[..., n : n + step, :, :] @ U_B.unsqueeze(-3).unsqueeze(-3)
        if S == 1:  # the square of a product is the product of squares
            b2 = b.square().sum(-4).squeeze(-2)  # (…, n, d_out)
            total += b2.mT @ a.square().squeeze(-4).squeeze(-2)
        else:
            total += (b.mT @ a).square().sum((-4, -3))  # (…, V, n, d_out, d_in)
    return total


def rotated(s: Moment, R_A: Tensor, R_B: Tensor) -> Moment:
    """Carry second moments into a new basis, R = U_old' U_new, as if they were uncorrelated.

    Keeps the trace, since R∘R is doubly stochastic. Exact if only the eigenvalues have changed.
    """
    return Moment(R_B.square().mT @ s.total @ R_A.square(), s.count)


def _sum(moments: Iterable[Moment]) -> Moment:
    first, *rest = moments
    return sum(rest, first)


def _total(tensors: Iterable[Tensor]) -> Tensor:
    first, *rest = tensors
    return sum(rest, first)
