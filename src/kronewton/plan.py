"""What the planner works with and hands over: a step before it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kronewton.linalg import longest
from kronewton.quadratic import Line, Subspace, Vector


@dataclass(frozen=True)
class Plan:
    """A step before it is made: Δ = lr·direction + momentum·(previous step) + refinement."""

    direction: list[Tensor]
    lr: float
    momentum: float
    refinement: Sequence[Tensor] = ()  # what the dial adds, if anything
    refined: int = 0  # directions that it took
    predicted: float = math.nan  # by the quadratic model, where there is one
    shortened: float = 1.0  # by the trust region
    made: bool = True  # False: nothing was good enough, or the model has no minimum

    def length(self, previous: Sequence[Tensor]) -> float:
        """What no number of the step exceeds; NaN or infinity if one is not finite.

        Norms stand for the largest number: a sum of squares costs no more than a sum.
        """
        earlier = longest(previous) if self.momentum else 0.0
        found = abs(self.lr) * longest(self.direction) + longest(self.refinement)
        return found + abs(self.momentum) * earlier


@dataclass(frozen=True)
class Candidate:
    """A K-FAC direction and the quadratic model on what is searched with it.

    Either the span of the direction and the previous step, or, with `mixed` above zero, the one
    line `direction + mixed·(previous step)`.
    """

    direction: list[Tensor]
    lines: list[Line]
    subspace: Subspace
    mixed: float = 0.0

    def coefficients(self, x: Sequence[float]) -> tuple[float, float]:
        """Of the direction and of the previous step, for a point x of the subspace."""
        return x[0], x[0] * self.mixed if self.mixed else [*x, 0.0][1]


@dataclass(frozen=True)
class Steering:
    """What the planner may ask of the optimizer."""

    precondition: Callable[[Vector, float], list[Tensor]]  # (B ⊗ A + damping·I)⁻¹ v, all layers
    scaled: Callable[[Sequence[Tensor]], list[Tensor]]  # by the groups' lr, where it is a number
    gradients: Callable[[], list[Tensor]]
    normalised: Callable[[float], list[Tensor]]  # −m/√v in the eigenbases; decay of m → all layers
    change: Callable[[Sequence[Tensor], float], list[Tensor]]  # of the parameters, by direction, lr
