"""The exact quadratic model of the loss, and its minimiser over a subspace.

q(d) = g'd + ½ d'(C + λI)d with C = J'ΛJ, the Gauss-Newton matrix of the batch. C is used only
through products: J v forward, Λ in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from kronewton.losses import OutputCurvature
from kronewton.replay import Bridge, ModelCall, Path, Replayer

Vector = Sequence[Tensor]  # one tensor for each trained parameter


@dataclass(frozen=True)
class Term:
    """One part of the batch: where the model is linearised, and Λ there."""

    call: ModelCall
    path: Path
    bridge: Bridge | None
    curvature: OutputCurvature
    weight: Tensor  # ()


@dataclass(frozen=True)
class Subspace:
    """q restricted to the span of k directions: slope (k), Gram matrix C (k, k), both floats.

    `squares` is the Gram matrix of the directions themselves, for the damping.
    """

    slope: list[float]
    curvature: list[list[float]]
    squares: list[list[float]]

    def finite(self) -> bool:
        return all(map(math.isfinite, chain(self.slope, *self.curvature, *self.squares)))

    def value(self, x: Sequence[float], damping: float) -> float:
        """q of the combination x of the directions, relative to no step."""
        return _dot(self.slope, x) + 0.5 * (self.bend(x) + damping * self.norm2(x))

    def bend(self, x: Sequence[float]) -> float:
        """x'Cx: twice the curvature term of the combination."""
        return _dot(x, [_dot(row, x) for row in self.curvature])

    def norm2(self, x: Sequence[float]) -> float:
        """The squared length of the combination."""
        return _dot(x, [_dot(row, x) for row in self.squares])

    def minimise(self, damping: float, fixed: dict[int, float]) -> list[float]:
        """The coefficients that minimise q, those in `fixed` being given.

        The damping is in units of the loss. A direction that adds nothing to the ones before it
        (to nine digits of its length) gets the coefficient 0.
        """
        k = len(self.slope)
        x = [fixed.get(j, 0.0) for j in range(k)]
        H = [
            [self.curvature[i][j] + damping * self.squares[i][j] for j in range(k)]
            for i in range(k)
        ]
        free = [j for j in range(k) if j not in fixed]
        slope = [self.slope[j] + sum(H[j][m] * x[m] for m in fixed) for j in free]
        solution = _solve([[H[i][j] for j in free] for i in free], slope)
        for j, value in zip(free, solution, strict=True):
            x[j] = value
        return x


def _dot(x: Sequence[float], y: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def _solve(H: list[list[float]], slope: list[float]) -> list[float]:
    """−H⁻¹ slope by Cholesky with dependent rows left out; H is at most a few rows."""
    L: list[list[float]] = []
    kept: list[int] = []
    for j, row in enumerate(H):
        partial: list[float] = []
        for m, i in enumerate(kept):
            partial.append((row[i] - _dot(L[m][:-1], partial)) / L[m][-1])
        rest = row[j] - _dot(partial, partial)
        if rest > 1e-9 * row[j] and rest > 0:
            L.append([*partial, math.sqrt(rest)])
            kept.append(j)
    y: list[float] = []
    for m, j in enumerate(kept):
        y.append((-slope[j] - _dot(L[m][:-1], y)) / L[m][-1])
    x = [0.0] * len(H)
    for m in reversed(range(len(kept))):
        later = sum(L[n][m] * x[kept[n]] for n in range(m + 1, len(kept)))
        x[kept[m]] = (y[m] - later) / L[m][m]
    return x


class QuadraticModel:
    """C of one batch through forward products of the model with itself linearised."""

    def __init__(
        self,
        replayer: Replayer,
        terms: Sequence[Term],
        unwatched: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.replayer, self.terms = replayer, terms
        self.unwatched = unwatched  # a context in which reruns are not taken for training

    def subspace(self, gradient: Vector, directions: Sequence[Vector]) -> Subspace:
        """q on the span of the directions: one forward product each, one synchronisation."""
        k = len(directions)
        pushed = [[self._push(term, d) for d in directions] for term in self.terms]
        numbers = [inner(gradient, d) for d in directions]
        for i in range(k):
            numbers += [inner(directions[i], directions[j]) for j in range(i + 1)]
        for i in range(k):
            numbers += [self._bend(pushed, i, j) for j in range(i + 1)]
        found = torch.stack([n.double() for n in numbers]).tolist()
        half = k * (k + 1) // 2
        slope, squares, curvature = found[:k], found[k : k + half], found[k + half :]
        return Subspace(slope, _symmetric(curvature, k), _symmetric(squares, k))

    def _bend(self, pushed: Sequence[Sequence[tuple[Tensor, Tensor]]], i: int, j: int) -> Tensor:
        terms = [
            term.weight * torch.dot(of[i][0].flatten(), of[j][1].flatten())
            for term, of in zip(self.terms, pushed, strict=True)
        ]
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0]

    def _push(self, term: Term, direction: Vector) -> tuple[Tensor, Tensor]:
        """J v and Λ J v at one part's criterion."""
        Jv = self._forward(term, direction)
        if term.bridge is not None:
            Jv = term.bridge.push(Jv)
        return Jv, term.curvature.product(Jv)

    def _forward(self, term: Term, direction: Vector) -> Tensor:
        with self.unwatched(), torch.no_grad(), forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(p, d)
                for p, d in zip(self.replayer.parameters(), direction, strict=True)
            ]
            output = self.replayer.run(term.call, term.path, duals)
            primal, tangent = forward_ad.unpack_dual(output)
        return torch.zeros_like(primal) if tangent is None else tangent


def inner(x: Vector, y: Vector) -> Tensor:
    """x'y over all parameters, ()."""
    products = [torch.sum(a * b) for a, b in zip(x, y, strict=True)]
    return torch.stack(products).sum()


def _symmetric(lower: list[float], k: int) -> list[list[float]]:
    rows = [[0.0] * k for _ in range(k)]
    numbers = iter(lower)
    for i in range(k):
        for j in range(i + 1):
            rows[i][j] = rows[j][i] = next(numbers)
    return rows
