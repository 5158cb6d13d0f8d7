"""The optimizer, from outside: its first steps with everything automatic switched off."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import kronewton as kn
from kronewton import derivation as note
from kronewton.lab.verify.autograd import damped_solve
from kronewton.lab.verify.checks import F64, AtLeast, AtMost, Section, Source, distance
from kronewton.lab.verify.networks import CRITERIA, SMOOTH, Problem, matrix, network, problems

SECTION = Section("K-FAC, as the library takes it")
STEPS = AtMost(1e-9)  # three steps in a row carry rounding from one to the next


def taken(
    problem: Problem,
    parts: Sequence[slice] = (slice(None),),
    factor: float = 1.0,
    steps: int = 1,
) -> dict[str, Tensor]:
    """What some K-FAC steps add to every layer's W.

    The batch is given in parts; the factor multiplies the loss and the damping.
    """
    model, criterion = copy.deepcopy(problem.model), problem.criterion
    optimizer = kn.KFAC(
        model,
        criterion,
        lr=1.0,
        momentum=0.0,
        damping=factor * problem.damping,
        trust_region=None,
        weight_decay=0.0,
        fisher="exact",
        basis="eigen",
        factor_every=1,
        inverse_every=1,
    )
    for _ in range(steps):
        optimizer.zero_grad()
        for part in parts:
            x, y = problem.x[part], problem.y[part]
            share = 1.0 if criterion.reduction == "sum" else len(x) / len(problem.x)
            (factor * share * criterion(model(x), y)).backward()
        optimizer.step()
    optimizer.close()
    return {k: matrix(model, k) - matrix(problem.model, k) for k in problem.layers}


def dense_step(problem: Problem, layer: str, block: Tensor) -> Tensor:
    """−(block + λI)⁻¹vec(G) as a matrix."""
    G = problem.gradient(layer)
    return -note.unvec(damped_solve(block, problem.damping, note.vec(G)), *G.shape)


@SECTION.check("the first step is −(B ⊗ A + λI)⁻¹g")
def _first_step(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.ReLU, nn.Tanh], CRITERIA):
        for layer, step in taken(problem).items():
            block = note.kronecker_block(*problem.blocks(layer))
            W = matrix(problem.model, layer)
            yield distance(step, dense_step(problem, layer, block), W)


def _from_gauss_newton(problem: Problem) -> Iterator[float]:
    """Distance of the first step from the dense damped Gauss-Newton step, layer by layer."""
    for layer, step in taken(problem).items():
        exact = dense_step(problem, layer, problem.gauss_newton(layer))
        yield distance(step, exact, matrix(problem.model, layer))


@SECTION.check("deep linear, squared error: it is the dense Gauss-Newton step −(J'ΛJ + λI)⁻¹g")
def _exact_deep_linear(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Identity], CRITERIA[:2]):
        yield from _from_gauss_newton(problem)


@SECTION.check("a batch of one, or N copies of it, any nonlinearity and loss: it is, too")
def _exact_one(source: Source) -> Iterator[float]:
    for one in problems(source, [nn.ReLU, nn.Tanh], CRITERIA, count=1):
        for problem in (one, one.repeated(4)):
            yield from _from_gauss_newton(problem)


@SECTION.check("other batches: it is not", AtLeast(1e-5))
def _not_exact(source: Source) -> Iterator[float]:
    for problem in problems(source, SMOOTH, CRITERIA):
        yield max(
            distance(step, dense_step(problem, layer, problem.gauss_newton(layer)))
            for layer, step in taken(problem).items()
        )


def _after_three(problem: Problem, changed: Problem, **how: Any) -> float:
    """How far three steps taken in two ways are apart."""
    one, other = taken(problem, steps=3), taken(changed, steps=3, **how)
    return max(distance(other[layer], one[layer]) for layer in one)


MEANS = (nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss())


@SECTION.check("three steps: the batch given twice changes nothing", STEPS)
def _duplicated(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Tanh], MEANS):
        yield _after_three(problem, problem.repeated(2))


@SECTION.check("three steps: micro-batches of 2 + 4, of 3 + 3, of 1 + 2 + 3 are the batch", STEPS)
def _micro_batches(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Tanh], CRITERIA):
        for cuts in ((0, 2, 6), (0, 3, 6), (0, 1, 3, 6)):
            parts = [slice(*pair) for pair in pairwise(cuts)]
            yield _after_three(problem, problem, parts=parts)


@SECTION.check("three steps: the loss and λ times c change nothing", STEPS)
def _scaled(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Tanh], CRITERIA):
        for c in (0.01, 7.0):
            yield _after_three(problem, problem, factor=c)


@SECTION.check("a masked example is as if it were not there")
def _masked(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Tanh], [nn.CrossEntropyLoss()]):
        y = problem.y.clone()
        y[:2] = -100
        masked = Problem(problem.model, problem.criterion, problem.x, y)
        cut = Problem(problem.model, problem.criterion, problem.x[2:], y[2:])
        expected = taken(cut)
        yield from (distance(step, expected[layer]) for layer, step in taken(masked).items())


@SECTION.check(
    "linear regression, λ = 1e-10, automatic step: one step is least squares", AtMost(1e-5)
)
def _regression(source: Source) -> Iterator[float]:
    scales = torch.logspace(0, math.log10(0.03), 7, dtype=F64, device=source.device)
    for outputs in (1, 3):
        x, model = source.normal(200, 7) * scales, network(source, (7, outputs), nn.Identity)
        y = x @ source.normal(7, outputs) + 0.5 + 0.1 * source.normal(200, outputs)
        criterion = nn.MSELoss()
        optimizer = kn.KFAC(model, criterion, damping=1e-10, basis="eigen", fisher="exact")
        criterion(model(x), y).backward()
        optimizer.step()
        optimizer.close()
        best = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), y).solution
        yield distance(matrix(model, "0"), best.T)
