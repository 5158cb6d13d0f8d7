"""The exact quadratic model of the loss, and its minimiser over a subspace: the dial.

q(d) = g'd + ½ d'(C + λI)d with C = J'ΛJ, the Gauss-Newton matrix of the batch. C is used only
through products: J v forward, Λ in between, and J'u backward where the subspace grows.
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
from kronewton.losses.generic import ends_in_an_error
from kronewton.replay import Bridge, ModelCall, Path, Replayer

FORWARD_MODE = ("forward AD", "forward mode AD", "forward-mode")  # in torch's errors about it
Vector = Sequence[Tensor]  # one tensor for each trained parameter


class MissingProducts(Exception):
    """The model has neither forward mode nor second derivatives; never shown to a user."""


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


@dataclass(frozen=True)
class Line:
    """A direction v and, for each part of the batch, J v and Λ J v at the criterion."""

    vector: Vector
    flat: Tensor  # (all parameters,)
    pushed: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Dial:
    """Where to stop between K-FAC and Newton.

    refine: directions to add at most. tolerance: two in a row that lower q by less than this share
    of it are the last ones; rounding ends it in any case.
    """

    refine: int
    tolerance: float
    damping: float  # λ, in units of the loss
    precondition: Callable[[Vector], Vector]  # the K-FAC inverse, with a damping of its own


@dataclass(frozen=True)
class Refinement:
    """How much farther a refined step goes than the one that it starts from."""

    step: Line  # the whole step
    directions: int  # that were added
    broken: bool  # ended by a number that was not finite, or by negative curvature


class QuadraticModel:
    """C of one batch through products of the model with itself linearised."""

    def __init__(
        self,
        replayer: Replayer,
        terms: Sequence[Term],
        unwatched: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.replayer, self.terms = replayer, terms
        self.unwatched = unwatched  # a context in which reruns are not taken for training
        self._outputs: list[Tensor] = []  # of the terms, with their graphs, once one is needed

    def line(self, direction: Vector) -> Line:
        """Push a direction through the linearised model: about two forward passes."""
        pushed = [self._push(term, direction) for term in self.terms]
        return Line(direction, flattened(direction), pushed)

    def subspace(self, gradient: Tensor, lines: Sequence[Line]) -> Subspace:
        """q on the span of the lines, with one synchronisation; the gradient is `flattened`."""
        k = len(lines)
        pairs = [(i, j) for i in range(k) for j in range(i + 1)]
        numbers = [torch.dot(gradient, line.flat) for line in lines]
        numbers += [torch.dot(lines[i].flat, lines[j].flat) for i, j in pairs]
        numbers += [self._bend(lines[i], lines[j]) for i, j in pairs]
        found = torch.stack([n.double() for n in numbers]).tolist()
        half = len(pairs)
        slope, squares, curvature = found[:k], found[k : k + half], found[k + half :]
        return Subspace(slope, _symmetric(curvature, k), _symmetric(squares, k))

    def combined(self, lines: Sequence[Line], x: Sequence[float]) -> Line:
        """The combination x of lines, its products by linearity."""
        flat = _sum([a * line.flat for a, line in zip(x, lines, strict=True)])
        pushed = [
            (
                _sum([a * line.pushed[t][0] for a, line in zip(x, lines, strict=True)]),
                _sum([a * line.pushed[t][1] for a, line in zip(x, lines, strict=True)]),
            )
            for t in range(len(self.terms))
        ]
        return Line(unflattened(flat, self.replayer.parameters()), flat, pushed)

    def product(self, line: Line) -> Tensor:
        """C v, flattened: the line's ΛJv taken back through the model, about one backward pass."""
        found = [
            self._pull(t, term.weight * LJv)
            for t, (term, (_, LJv)) in enumerate(zip(self.terms, line.pushed, strict=True))
        ]
        return _sum(found)

    def refine(
        self, gradient: Tensor, start: Line, within: Sequence[Line], dial: Dial
    ) -> Refinement:
        """Go on from the minimiser over `within` by preconditioned conjugate gradients.

        `start` must minimise q over the span of `within` (and may have a fixed part besides):
        what is added is conjugate to all of it, so that q falls with every direction and reaches
        the minimum over all parameters, the damped Newton step, in the end. Costs two forward
        passes and a backward pass for each direction.
        """
        damping, step = dial.damping, start
        slope, bend = self.numbers(gradient, start, damping)
        q, floor = slope + 0.5 * bend, max(dial.tolerance, _rounding(gradient))
        base: list[Line] = []
        for line in within:
            base.append(self._conjugate(line, base, damping))
        residual = gradient + self.product(start) + damping * start.flat
        last: list[Line] = []
        small = 0  # directions in a row that made little difference: one may be an accident
        for used in range(1, dial.refine + 1):
            p = self._conjugate(self._preconditioned(residual, dial), [*base, *last], damping)
            slope, bend = self.numbers(residual, p, damping)
            if not (math.isfinite(slope) and 0 < bend < math.inf):
                # At the minimum there is no direction left, and that is no failure.
                return Refinement(step, used - 1, broken=slope != 0)
            length, decrease = -slope / bend, 0.5 * slope**2 / bend
            step, q = self.combined([step, p], [1.0, length]), q - decrease
            small = small + 1 if decrease <= floor * abs(q) else 0
            if small == 2 or used == dial.refine:
                return Refinement(step, used, broken=False)
            residual = residual + length * (self.product(p) + damping * p.flat)
            last = [p]
        return Refinement(step, 0, broken=False)

    def numbers(self, gradient: Tensor, line: Line, damping: float) -> tuple[float, float]:
        """g'v and v'(C + λI)v, with one synchronisation."""
        bend = self._inner(line, line, damping)
        slope, bent = torch.stack([torch.dot(gradient, line.flat).double(), bend]).tolist()
        return slope, bent

    def _inner(self, x: Line, y: Line, damping: float) -> Tensor:
        """x'(C + λI)y, () in float64."""
        return (self._bend(x, y) + damping * torch.dot(x.flat, y.flat)).double()

    def _preconditioned(self, residual: Tensor, dial: Dial) -> Line:
        vector = unflattened(residual, self.replayer.parameters())
        pairs = zip(dial.precondition(vector), self.replayer.originals, strict=True)
        return self.line([t.neg() if p.requires_grad else torch.zeros_like(t) for t, p in pairs])

    def _conjugate(self, z: Line, against: Sequence[Line], damping: float) -> Line:
        """z less its parts along lines that are conjugate to each other."""
        if not against:
            return z
        sizes = [self._inner(line, line, damping) for line in against]
        for _ in range(2):  # the second time takes off what rounding left
            along = [self._inner(line, z, damping) for line in against]
            shares = (torch.stack(along) / torch.stack(sizes)).nan_to_num(0.0, 0.0, 0.0).tolist()
            z = self.combined([z, *against], [1.0, *(-share for share in shares)])
        return z

    def _bend(self, x: Line, y: Line) -> Tensor:
        """x'Cy, ()."""
        terms = [
            term.weight * torch.dot(Jx.flatten(), LJy.flatten())
            for term, (Jx, _), (_, LJy) in zip(self.terms, x.pushed, y.pushed, strict=True)
        ]
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0]

    def _push(self, term: Term, direction: Vector) -> tuple[Tensor, Tensor]:
        with self.unwatched():
            Jv = self._forward(term, direction)
        if term.bridge is not None:
            Jv = term.bridge.push(Jv)
        LJv = term.curvature.product(Jv)
        return Jv.to(LJv.dtype), LJv

    def _pull(self, t: int, u: Tensor) -> Tensor:
        """J'u of one term, flattened, on a graph that is kept for the next."""
        if not self._outputs:
            with self.unwatched(), torch.enable_grad():
                self._outputs = [self.replayer.run(term.call, term.path) for term in self.terms]
        bridge, output = self.terms[t].bridge, self._outputs[t]
        u = u if bridge is None else bridge.pull(u)
        originals = self.replayer.originals
        moving = [p for p in originals if p.requires_grad]  # some may have been frozen since
        found = iter(
            torch.autograd.grad(
                output, moving, u.to(output.dtype), retain_graph=True, materialize_grads=True
            )
        )
        pulled = [next(found) if p.requires_grad else torch.zeros_like(p) for p in originals]
        return flattened([t.to_dense() if t.is_sparse else t for t in pulled])

    def _forward(self, term: Term, direction: Vector) -> Tensor:
        """J v at the model's output, by torch's forward mode if the model has one."""
        if self.replayer.without_forward_mode:
            return self._double_backward(term, direction)
        try:
            return self._dual(term, direction)
        except (RuntimeError, NotImplementedError) as error:
            if not any(words in str(error) for words in FORWARD_MODE):
                raise
            if self.replayer.unfuse(str(error)):
                return self._forward(term, direction)
            self.replayer.without_forward_mode = str(error).split(".")[0]
        return self._double_backward(term, direction)

    def _dual(self, term: Term, direction: Vector) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            pairs = zip(self.replayer.parameters(), direction, strict=True)
            duals = [forward_ad.make_dual(p, d) for p, d in pairs]
            output = self.replayer.run(term.call, term.path, duals)
            primal, tangent = forward_ad.unpack_dual(output)
        return torch.zeros_like(primal) if tangent is None else tangent

    def _double_backward(self, term: Term, direction: Vector) -> Tensor:
        """J v as the derivative of v'J'u in u: three passes where forward mode takes two."""
        try:
            return self._twice(term, direction)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if self.replayer.unfuse(str(error)):
                return self._double_backward(term, direction)
            self.replayer.without_products = str(error).split(".")[0]
            raise MissingProducts(self.replayer.without_products) from error

    def _twice(self, term: Term, direction: Vector) -> Tensor:
        with torch.enable_grad():
            parameters = [p.requires_grad_() for p in self.replayer.parameters()]
            output = self.replayer.run(term.call, term.path, parameters)
            u = torch.zeros_like(output, requires_grad=True)
            pulled = torch.autograd.grad(
                output, parameters, u, create_graph=True, materialize_grads=True
            )
            if any(ends_in_an_error(p.grad_fn) for p in pulled):
                # torch would leave out whatever lies behind, without a word.
                raise RuntimeError("a function in it is marked once_differentiable")
            v = list(direction)
            (Jv,) = torch.autograd.grad(pulled, u, v)
        return Jv


def flattened(vector: Vector) -> Tensor:
    """All tensors in one, in float32 or better: (all parameters,)."""
    flat = torch.cat([t.reshape(-1) for t in vector])
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()


def unflattened(flat: Tensor, like: Vector) -> list[Tensor]:
    """The inverse of `flattened`, in the shapes and dtypes of another vector."""
    parts = flat.split([t.numel() for t in like])
    return [p.reshape(t.shape).to(t.dtype) for p, t in zip(parts, like, strict=True)]


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    first, *rest = tensors
    return sum(rest, first)


def _rounding(tensor: Tensor) -> float:
    return 4 * torch.finfo(tensor.dtype).eps


def _symmetric(lower: list[float], k: int) -> list[list[float]]:
    rows = [[0.0] * k for _ in range(k)]
    numbers = iter(lower)
    for i in range(k):
        for j in range(i + 1):
            rows[i][j] = rows[j][i] = next(numbers)
    return rows
