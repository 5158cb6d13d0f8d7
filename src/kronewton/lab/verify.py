"""The note as a list of checks: each identity in its words, held against autograd in float64.

A check draws random instances of several shapes and yields one residual for each, relative in the
Frobenius norm. Later sections of the note append their own.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from kronewton import derivation as note
from kronewton import losses
from kronewton.errors import KronewtonWarning

F64 = torch.float64


@dataclass(frozen=True)
class Source:
    """Where random instances come from: a seed gives the same ones on every device."""

    generator: torch.Generator
    device: torch.device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=F64).to(self.device)

    def classes(self, count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=self.generator).to(self.device)


class Bound(ABC):
    """What is asked of every residual of a check."""

    value: float

    @abstractmethod
    def worst(self, residuals: Sequence[float]) -> float: ...

    @abstractmethod
    def holds(self, residual: float) -> bool: ...


@dataclass(frozen=True)
class AtMost(Bound):
    """The identity is exact, to rounding."""

    value: float = 1e-12

    def worst(self, residuals: Sequence[float]) -> float:
        return max(residuals)

    def holds(self, residual: float) -> bool:
        return residual <= self.value

    def __str__(self) -> str:
        return f"≤ {self.value:.0e}"


@dataclass(frozen=True)
class AtLeast(Bound):
    """Theory says that the two sides differ: agreement would be a mistake."""

    value: float = 1e-2

    def worst(self, residuals: Sequence[float]) -> float:
        return min(residuals)

    def holds(self, residual: float) -> bool:
        return residual >= self.value

    def __str__(self) -> str:
        return f"≥ {self.value:.0e}"


@dataclass(frozen=True)
class Result:
    """What a check found: the worst residual of its instances, and whether it is in bounds."""

    section: str
    identity: str
    residual: float
    bound: str
    instances: int
    passed: bool


@dataclass(frozen=True)
class Check:
    """One identity, and how far random instances are from it."""

    section: str
    identity: str
    bound: Bound
    residuals: Callable[[Source], Iterator[float]]

    def run(self, source: Source) -> Result:
        found = list(self.residuals(source))
        # max and min drop a NaN or keep it, depending on its place.
        worst = math.nan if any(map(math.isnan, found)) else self.bound.worst(found)
        passed = self.bound.holds(worst)
        return Result(self.section, self.identity, worst, str(self.bound), len(found), passed)


CHECKS: list[Check] = []
EXACT = AtMost()
APART = AtLeast()
Residuals = Callable[[Source], Iterator[float]]


def check(section: str, identity: str, bound: Bound = EXACT) -> Callable[[Residuals], Residuals]:
    """Enter a function into the list of checks."""

    def enter(residuals: Residuals) -> Residuals:
        CHECKS.append(Check(section, identity, bound, residuals))
        return residuals

    return enter


def run(seed: int, device: torch.device) -> list[Result]:
    """Every check, each on the same instances whatever other checks there are."""
    return [c.run(Source(torch.Generator().manual_seed(seed), device)) for c in CHECKS]


def table(results: Sequence[Result]) -> Table:
    """One row per identity, in the order of the note."""
    shown = Table("section", "identity", "instances", "residual", "bound", "")
    for r in results:
        verdict = "[green]holds[/]" if r.passed else "[bold red]FAILS[/]"
        # A tuple of plain strings would read [x] in an identity as markup: none has any.
        shown.add_row(
            r.section, r.identity, str(r.instances), f"{r.residual:.1e}", r.bound, verdict
        )
    return shown


def distance(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float((found - exact).norm() / exact.norm())


# 1. Linear network.

LINEAR = "1 linear network"
REGULAR = ((3, 4, 5, 9), (4, 3, 6, 12), (1, 5, 2, 9), (5, 1, 8, 3), (1, 1, 1, 1))  # (m, n, p, N)
SINGULAR = ((5, 4, 3, 9), (3, 6, 5, 4), (5, 6, 2, 3), (2, 3, 4, 1))  # m > p, n > N


@dataclass(frozen=True)
class LinearNetwork:
    """Y ≈ B'WA with everything random, in the order of the arguments of the note's functions."""

    W: Tensor
    A: Tensor
    B: Tensor
    Y: Tensor

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.W, self.A, self.B, self.Y

    def loss(self, W: Tensor) -> Tensor:
        return note.loss(W, self.A, self.B, self.Y)


def linear_networks(source: Source, shapes: Sequence[tuple[int, ...]]) -> Iterator[LinearNetwork]:
    for m, n, p, N in shapes:
        sides = ((m, n), (n, N), (m, p), (p, N))
        yield LinearNetwork(*(source.normal(*side) for side in sides))


def autograd_hessian(function: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
    """Hessian of a function of the matrix W in vec(W), (mn, mn)."""
    m, n = W.shape
    H: Tensor = torch.autograd.functional.hessian(
        lambda w: function(note.unvec(w, m, n)), note.vec(W.detach())
    )
    return H


@check(LINEAR, "J = ½ tr(e'e) with e = Y − B'WA")
def _loss(source: Source) -> Iterator[float]:
    for net in linear_networks(source, REGULAR + SINGULAR):
        W, A, B, Y = net.all
        e = Y - torch.einsum("mp,mn,nN->pN", B, W, A)
        yield distance(net.loss(W), 0.5 * torch.trace(e.mT @ e))


@check(LINEAR, "dJ = tr(e'de) with de = −B' dW A")
def _differential_of_loss(source: Source) -> Iterator[float]:
    for net in linear_networks(source, REGULAR + SINGULAR):
        dW = source.normal(*net.W.shape)
        _, dJ = torch.autograd.functional.jvp(net.loss, net.W, dW)
        # Relative to the terms of the sum: dJ itself can be near zero.
        size = net.W.norm() * dW.norm() * _gradient_of(net.loss, net.W).norm()
        yield float((note.differential_of_loss(dW, *net.all) - dJ).abs() / size.clamp_min(dJ.abs()))


def _gradient_of(function: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
    W = W.detach().requires_grad_()
    (G,) = torch.autograd.grad(function(W), W)
    return G
