"""Random networks with a loss and a batch, and autograd's curvature of their layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kronewton import derivation as note
from kronewton.lab.verify.autograd import autograd_gradient, autograd_hessian
from kronewton.lab.verify.checks import F64, Source

WIDTHS = ((4, 5, 3), (5, 4, 4, 3))  # the square layer gets a skip connection
N = 6


class HalfSquare(nn.Module):
    """½ tr(e'e), summed over examples."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y - z).square().sum()


class Residual(nn.Module):
    """x + f(x): what is piecewise linear stays so."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


@dataclass(frozen=True)
class Problem:
    """A network with a loss and one batch. A layer's W has its bias as last column."""

    model: nn.Module
    criterion: nn.Module
    x: Tensor  # (N, d)
    y: Tensor

    @property
    def layers(self) -> list[str]:
        """The names of the linear layers, in their order."""
        return [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear)]

    def output_of(self, layer: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The network's output as a function of one layer's W, and that W."""

        def output(W: Tensor) -> Tensor:
            replaced = {f"{layer}.weight": W[:, :-1], f"{layer}.bias": W[:, -1]}
            z: Tensor = functional_call(self.model, replaced, (self.x,))
            return z

        return output, matrix(self.model, layer)

    def loss(self, z: Tensor) -> Tensor:
        """J of an output of the network."""
        J: Tensor = self.criterion(z, self.y)
        return J

    def gradient(self, layer: str) -> Tensor:
        """Autograd's G of one layer, (m, n)."""
        output, W = self.output_of(layer)
        return autograd_gradient(lambda W: self.loss(output(W)), W).detach()

    def hessian(self, layer: str) -> Tensor:
        """Autograd's Hessian block of one layer, (mn, mn)."""
        output, W = self.output_of(layer)
        return autograd_hessian(lambda W: self.loss(output(W)), W)

    def gauss_newton(self, layer: str) -> Tensor:
        """J'ΛJ of one layer, all examples in one J, (mn, mn)."""
        output, W = self.output_of(layer)
        m, n = W.shape
        J: Tensor = torch.autograd.functional.jacobian(
            lambda w: output(note.unvec(w, m, n)).flatten(), note.vec(W)
        )  # (Np, mn)
        H: Tensor = J.T @ self._output_hessian().reshape(len(J), len(J)) @ J
        return H

    @cached_property
    def damping(self) -> float:
        """A λ that every layer's step feels and none is ruled by, in units of the loss."""
        traces = []
        for A, B, Lambda in map(self.blocks, self.layers):
            BB = torch.einsum("nop,npq,noq->n", B, Lambda, B)
            traces.append(float(A.square().sum(1) @ BB))
        return 0.03 * max(traces)

    def _output_hessian(self) -> Tensor:
        H: Tensor = torch.autograd.functional.hessian(self.loss, self.model(self.x).detach())
        return H  # (N, p, N, p)

    def blocks(self, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        """A_i with the bias's entry 1, B_i and Λ_i."""
        A, B = note.jacobian_blocks(self.model, layer, self.x)
        Lambda = self._output_hessian().diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (N, p, p)
        return torch.cat([A, torch.ones_like(A[:, :1])], 1), B, Lambda

    def repeated(self, times: int) -> Problem:
        """The same with every example several times."""
        x, y = (torch.cat([t] * times) for t in (self.x, self.y))
        return Problem(self.model, self.criterion, x, y)


def matrix(model: nn.Module, layer: str) -> Tensor:
    """W of one layer, its bias the last column, (m, n)."""
    weight, bias = (model.get_parameter(f"{layer}.{name}") for name in ("weight", "bias"))
    return torch.cat([weight, bias.unsqueeze(1)], 1).detach()


def network(source: Source, widths: Sequence[int], kind: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers with a nonlinearity after all but the last, at random weights and biases."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        # Not torch's initialisation: it would draw from the random stream of the caller.
        linear = nn.utils.skip_init(nn.Linear, d_in, d_out, dtype=F64, device=source.device)
        linear.weight.data = source.normal(d_out, d_in) / d_in**0.5
        linear.bias.data = source.normal(d_out) / 2
        layers += [Residual(linear) if d_in == d_out else linear, kind()]
    return nn.Sequential(*layers[:-1])


def target(source: Source, criterion: nn.Module, p: int, count: int) -> Tensor:
    """A random target that the criterion takes for an output (count, p)."""
    if isinstance(criterion, nn.CrossEntropyLoss):
        return source.classes(p, count)
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        return source.uniform(count, p)
    return source.normal(count, p)


def problems(
    source: Source,
    kinds: Sequence[Callable[[], nn.Module]],
    criteria: Sequence[nn.Module],
    count: int = N,
) -> Iterator[Problem]:
    """Every kind of nonlinearity with every criterion, each at every list of widths."""
    for widths in WIDTHS:
        for kind in kinds:
            for criterion in criteria:
                model = network(source, widths, kind)
                x = source.normal(count, widths[0])
                yield Problem(model, criterion, x, target(source, criterion, widths[-1], count))


PIECEWISE = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh)
SMOOTH = (nn.Tanh, nn.Sigmoid)
CRITERIA = (
    nn.MSELoss(),
    nn.MSELoss(reduction="sum"),
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.BCEWithLogitsLoss(),
)
