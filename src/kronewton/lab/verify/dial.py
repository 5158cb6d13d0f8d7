"""The dial: from K-FAC's first step to the exact damped Gauss-Newton step of a small network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import kronewton as kn
from kronewton.lab.verify.checks import AtMost, Section, Source, distance

SECTION = Section("The dial from K-FAC to Newton, over all parameters together")
SHAPE = (1, 4, 4)  # of one image
DIALS = range(1, 9)


@dataclass(frozen=True)
class Quadratic:
    """A network on a batch, with its gradient g and the dense C = J'ΛJ."""

    model: nn.Module
    x: Tensor
    y: Tensor
    g: Tensor
    C: Tensor
    damping: float

    criterion = nn.CrossEntropyLoss()

    def value(self, d: Tensor) -> float:
        """q(d) = g'd + ½ d'(C + λI)d."""
        return float(self.g @ d + 0.5 * d @ (self.C @ d) + 0.5 * self.damping * d @ d)

    def newton(self) -> Tensor:
        """−(C + λI)⁻¹g."""
        damped = self.C.clone()
        damped.diagonal().add_(self.damping)
        d: Tensor = -torch.linalg.solve(damped, self.g)
        return d

    def step(self, refine: int, basis: str, **given: Any) -> Tensor:
        """The optimizer's first step, all parameters in one vector."""
        model = copy.deepcopy(self.model)
        optimizer = kn.KFAC(
            model,
            self.criterion,
            damping=self.damping,
            trust_region=None,
            fisher="exact",
            basis=basis,
            refine=refine,
            **given,
        )
        self.criterion(model(self.x), self.y).backward()
        optimizer.step()
        optimizer.close()
        pairs = zip(model.parameters(), self.model.parameters(), strict=True)
        return torch.cat([(p - q).detach().flatten() for p, q in pairs])


def quadratics(source: Source) -> Iterator[Quadratic]:
    """Convolutions with tanh and cross-entropy, one net with a norm, which has no factors."""
    for norm in (False, True):
        with torch.random.fork_rng(devices=[]):  # torch's own initial weights are not kept
            middle = [nn.GroupNorm(1, 3)] if norm else []
            layers = [nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), *middle]
            layers += [nn.Conv2d(3, 2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4)]
        model = nn.Sequential(*layers).to(source.device, torch.float64)
        for p in model.parameters():
            p.data = source.normal(*p.shape) / 2
        x, y = source.normal(10, *SHAPE), source.classes(4, 10)
        g, C = dense(model, Quadratic.criterion, x, y)
        for damping in (1e-1, 1e-3):
            yield Quadratic(model, x, y, g, C, damping)


def dense(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """g and C by autograd, over all parameters one after the other."""
    names = [name for name, _ in model.named_parameters()]
    values = tuple(p.detach() for p in model.parameters())

    def output(*tensors: Tensor) -> Tensor:
        z: Tensor = functional_call(model, dict(zip(names, tensors, strict=True)), (x,))
        return z

    z = output(*values)
    J = torch.cat(
        [b.reshape(z.numel(), -1) for b in torch.autograd.functional.jacobian(output, values)], 1
    )
    Lambda = torch.autograd.functional.hessian(lambda z: criterion(z, y), z)
    g = torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
    return torch.cat([t.flatten() for t in g]), J.T @ Lambda.reshape(len(J), len(J)) @ J


@SECTION.check("far along, it is −(J'ΛJ + λI)⁻¹g, whatever the basis", AtMost(1e-5))
def _newton(source: Source) -> Iterator[float]:
    for problem in quadratics(source):
        for basis in ("factored", "eigen", "corrected"):
            yield distance(problem.step(300, basis), problem.newton())


@SECTION.check("… and with lr = 1 and momentum = 0", AtMost(1e-5))
def _newton_given(source: Source) -> Iterator[float]:
    for problem in quadratics(source):
        step = problem.step(300, "factored", lr=1.0, momentum=0.0)
        yield distance(step, problem.newton())


@SECTION.check("q falls with every direction: its largest rise, over its fall", AtMost(0.0))
def _falls(source: Source) -> Iterator[float]:
    for problem in quadratics(source):
        values = [problem.value(problem.step(k, "factored")) for k in DIALS]
        least = problem.value(problem.newton())
        yield max(later - before for before, later in pairwise(values)) / abs(least)
