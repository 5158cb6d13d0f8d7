"""How far each approximation of a layer's block is from the exact one, without forming any.

The exact block is H = Σ vec(G) vec(G)' over per-example gradients G (of columns or draws), so
that ‖H‖² is the sum of their squared inner products, and ⟨H, B ⊗ A⟩ = Σ tr(G'B G A).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronewton.errors import OptionError
from kronewton.factors import (
    Factors,
    Observation,
    batch_factors,
    best_factors,
    example_gradients,
    reduced_factors,
)
from kronewton.linalg import symmetric_eigen

LIMIT = 1 << 28  # numbers in all per-example gradients of a layer together


@dataclass(frozen=True)
class Distances:
    """‖approximation − exact‖ / ‖exact‖ of one layer's block, in the Frobenius norm.

    corrected: expand's eigenbasis with corrected eigenvalues (EKFAC).
    """

    diagonal: float
    expand: float
    reduce: float
    best: float
    corrected: float


def distances(observations: Sequence[Observation], name: str) -> Distances:
    """Of one layer, in float64. Zero is told from rounding down to about 1e-7.

    Raises OptionError, naming the layer, if its per-example gradients are too many.
    """
    G = _all_gradients(observations, name)
    square = _squared_norm(G)
    expand = batch_factors(observations)
    return Distances(
        _of_diagonal(G, square),
        _of_product(G, square, expand),
        _of_product(G, square, reduced_factors(observations)),
        _of_product(G, square, best_factors(observations, sweeps=500, tolerance=1e-12)),
        _of_corrected(G, square, expand),
    )


def _all_gradients(observations: Sequence[Observation], name: str) -> Tensor:
    """(P, blocks, d_out, d_in) in float64."""
    count = sum(
        stats.b.shape[:-1].numel() // stats.a.counts[1] * stats.b.shape[-1]
        * stats.a.width
        for stats, _ in observations
    )  # fmt: skip
    if count > LIMIT:
        raise OptionError(
            f"layer '{name}' has {count:.1e} numbers in its per-example gradients; up to "
            f"{LIMIT:.1e} are allowed. Give fewer examples, or fisher='sampled'."
        )
    chunks = [
        (G if G.dim() == 4 else G.unsqueeze(0)).double().movedim(1, 0)
        for stats, part in observations
        for G in example_gradients(stats, part)
    ]
    return torch.cat(chunks)


def _squared_norm(G: Tensor) -> Tensor:
    """‖H‖², (): through whichever of the two Gram matrices is smaller."""
    flat = G.flatten(1)
    gram = flat @ flat.T if len(flat) < flat.shape[1] else flat.T @ flat
    return gram.square().sum()


def _of_product(G: Tensor, square: Tensor, factors: Factors) -> float:
    A, B = (_blocks(m.mean) for m in (factors.A, factors.B))
    inner = ((B @ G @ A) * G).sum()
    own = (A.square().sum((-1, -2)) * B.square().sum((-1, -2))).sum()
    return _relative(square - 2 * inner + own, square)


def _of_diagonal(G: Tensor, square: Tensor) -> float:
    # A projection of H: what is left is as large as H less what was taken.
    return _relative(square - G.square().sum(0).square().sum(), square)


def _of_corrected(G: Tensor, square: Tensor, factors: Factors) -> float:
    (_, U_A), (_, U_B) = (
        symmetric_eigen(_blocks(m.mean), "a factor") for m in (factors.A, factors.B)
    )
    s = (U_B.mT @ G @ U_A).square().sum(0)
    return _relative(square - s.square().sum(), square)


def _blocks(matrix: Tensor) -> Tensor:
    return (matrix if matrix.dim() == 3 else matrix.unsqueeze(0)).double()


def _relative(squared_distance: Tensor, square: Tensor) -> float:
    return float((squared_distance.clamp_min(0) / square).sqrt()) if bool(square > 0) else 0.0
