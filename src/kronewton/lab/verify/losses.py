"""The losses: Λ is what everything else is scaled by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kronewton as kn
from kronewton.lab.verify.checks import Section, Source, distance

SECTION = Section("Losses: Λ in the output")


@dataclass(frozen=True)
class Loss:
    """A criterion at one output."""

    criterion: nn.Module
    z: Tensor
    targets: tuple[Tensor, ...]

    def hessian(self) -> Tensor:
        """Autograd's, over the flattened output."""
        z, targets = self.z, self.targets
        H: Tensor = torch.autograd.functional.hessian(lambda z: self.criterion(z, *targets), z)
        return H.reshape(z.numel(), z.numel())


def class_losses(source: Source, reduction: str) -> Iterator[Loss]:
    """Cross-entropy with classes, masks, class weights, smoothing and soft targets."""
    for N, C, *positions in ((6, 4), (1, 3), (3, 4, 2), (2, 3, 2, 2)):
        z, soft = source.normal(N, C, *positions), source.uniform(N, C, *positions)
        y, weight = source.classes(C, N, *positions), source.uniform(C) + 0.1
        masked = y.clone()
        masked[1:2] = -100
        for given, smoothing in ((None, 0.0), (weight, 0.0), (weight, 0.2)):
            criterion = nn.CrossEntropyLoss(given, reduction=reduction, label_smoothing=smoothing)
            for target in (y, masked, soft):
                yield Loss(criterion, z, (target,))


def element_losses(source: Source, reduction: str) -> Iterator[Loss]:
    """The losses of single numbers."""
    for shape in ((6, 3), (1, 4), (5,), (2, 3, 2)):
        z, y = source.normal(*shape), source.uniform(*shape)
        weight, positive = source.uniform(*shape), source.uniform(shape[-1])
        yield Loss(nn.MSELoss(reduction=reduction), z, (y,))
        yield Loss(nn.BCEWithLogitsLoss(reduction=reduction), z, (y,))
        both = nn.BCEWithLogitsLoss(weight, pos_weight=positive, reduction=reduction)
        yield Loss(both, z, (y,))
        yield Loss(nn.PoissonNLLLoss(reduction=reduction), z, (3 * y,))
        rate = nn.PoissonNLLLoss(log_input=False, reduction=reduction)
        yield Loss(rate, z.exp(), (3 * y,))
        yield Loss(nn.GaussianNLLLoss(reduction=reduction), z, (y, weight + 0.1))


def loss_cases(source: Source) -> Iterator[Loss]:
    """Every loss that has a closed form, in both reductions."""
    for reduction in ("mean", "sum"):
        yield from class_losses(source, reduction)
        yield from element_losses(source, reduction)


@SECTION.check("Σ uu' over the columns u of √Λ is autograd's Hessian")
def _columns(source: Source) -> Iterator[float]:
    for case in loss_cases(source):
        columns = kn.losses.curvature(case.criterion, case.z, *case.targets).columns()
        u = torch.stack(list(columns)).flatten(2 if case.z.dim() > 1 else 1)
        u = u.reshape(len(u), len(case.z), -1)  # (V, N, p): one column serves all examples
        found = torch.block_diag(*torch.einsum("vno,vnp->nop", u, u))
        yield distance(found, case.hessian())


@SECTION.check("Λv is autograd's Hessian times v")
def _products(source: Source) -> Iterator[float]:
    for case in loss_cases(source):
        v = source.normal(*case.z.shape)
        found = kn.losses.curvature(case.criterion, case.z, *case.targets).product(v)
        yield distance(found.flatten(), case.hessian() @ v.flatten())


@SECTION.check("NLLLoss after log-softmax is cross-entropy")
def _likelihood(source: Source) -> Iterator[float]:
    for weight in (None, source.uniform(4) + 0.1):
        for N, *positions in ((6,), (3, 2), (2, 2, 2)):
            z, y = source.normal(N, 4, *positions), source.classes(4, N, *positions)
            x = z.log_softmax(1)
            J: Tensor = torch.autograd.functional.jacobian(lambda z: z.log_softmax(1), z)
            J = J.reshape(z.numel(), z.numel())
            Lambda = kn.losses.curvature(nn.NLLLoss(weight), x, y)
            Lambda_J = [Lambda.product(v.reshape(x.shape)).flatten() for v in J.T]
            expected = Loss(nn.CrossEntropyLoss(weight), z, (y,)).hessian()
            yield distance(J.T @ torch.stack(Lambda_J, 1), expected)
