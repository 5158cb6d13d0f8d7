"""What a check is: random instances, a residual for each, a bound, a verdict.

A residual is relative, in the Frobenius norm.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

F64 = torch.float64


class Bound(ABC):
    """What is asked of the residuals of a check."""

    value: float

    @abstractmethod
    def worst(self, residuals: Sequence[float]) -> float:
        """The residual that is nearest to failing, or farthest past it."""

    @abstractmethod
    def holds(self, residual: float) -> bool:
        """Whether a residual is within the bound; a NaN never is."""


@dataclass(frozen=True)
class AtMost(Bound):
    """The two sides agree, by default to rounding."""

    value: float = 1e-12

    def worst(self, residuals: Sequence[float]) -> float:
        return max(residuals)

    def holds(self, residual: float) -> bool:
        return residual <= self.value

    def __str__(self) -> str:
        return f"≤ {self.value:.0e}"


@dataclass(frozen=True)
class AtLeast(Bound):
    """The two sides differ, and theory says so: agreement would be a mistake."""

    value: float = 1e-3

    def worst(self, residuals: Sequence[float]) -> float:
        return min(residuals)

    def holds(self, residual: float) -> bool:
        return residual >= self.value

    def __str__(self) -> str:
        return f"≥ {self.value:.0e}"


EXACT, APART = AtMost(), AtLeast()


@dataclass(frozen=True)
class Source:
    """Where instances come from: one seed gives the same numbers on every device."""

    generator: torch.Generator
    device: torch.device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64).to(self.device)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """Of full rank, with singular values from ½ to 2: rounding stays near 1e-15."""
        normal = torch.randn(rows, columns, generator=self.generator, dtype=F64)
        s = 0.5 + 1.5 * torch.rand(min(rows, columns), generator=self.generator, dtype=F64)
        U, _, Vh = torch.linalg.svd(normal, full_matrices=False)
        matrix: Tensor = (U * s) @ Vh
        return matrix.to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=F64).to(self.device)

    def classes(self, count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=self.generator).to(self.device)


class Told(float):
    """A residual with a few words on it for the table."""

    words: str

    def __new__(cls, residual: float, words: str) -> Told:
        told = super().__new__(cls, residual)
        told.words = words
        return told


Residuals = Callable[[Source], Iterator[float]]


@dataclass(frozen=True)
class Result:
    """The worst residual of all instances of one identity."""

    section: str
    identity: str
    residual: float
    bound: str
    instances: int
    passed: bool
    words: str = ""


@dataclass(frozen=True)
class Check:
    """One identity, and how far each random instance is from it."""

    section: str
    identity: str
    bound: Bound
    residuals: Residuals

    def run(self, source: Source) -> Result:
        """Draw the instances and keep the worst."""
        found = list(self.residuals(source))
        # max and min drop a NaN or keep it, by where it stands.
        worst = math.nan if any(map(math.isnan, found)) else self.bound.worst(found)
        passed = self.bound.holds(worst)
        words = worst.words if isinstance(worst, Told) else ""
        return Result(
            self.section, self.identity, float(worst), str(self.bound), len(found), passed, words
        )


@dataclass(frozen=True)
class Section:
    """One section of the note: its identities, in their order."""

    title: str
    checks: list[Check] = field(default_factory=list)

    def check(self, identity: str, bound: Bound = EXACT) -> Callable[[Residuals], Residuals]:
        """Enter a function into the section."""

        def enter(residuals: Residuals) -> Residuals:
            self.checks.append(Check(self.title, identity, bound, residuals))
            return residuals

        return enter


def table(results: Sequence[Result]) -> Table:
    """One row per identity, in the order of the note."""
    shown = Table("identity", "cases", "residual", "bound", "")
    section = ""
    for r in results:
        if r.section != section:
            section = r.section
            shown.add_section()
            shown.add_row(f"[bold]{escape(section)}[/]")
        verdict = "[green]holds[/]" if r.passed else "[bold red]FAILS[/]"
        numbers = (str(r.instances), f"{r.residual:.1e}", r.bound)
        identity = f"{r.identity}: {r.words}" if r.words else r.identity
        shown.add_row(escape(identity), *numbers, verdict)
    return shown


def distance(found: Tensor, exact: Tensor, *terms: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖, or over the largest of the terms that cancel in it.

    ‖found‖ where all of them are zero, as behind a dead ReLU.
    """
    size = max(float(t.norm()) for t in (exact, *terms))
    return float((found - exact).norm()) / (size or 1.0)
