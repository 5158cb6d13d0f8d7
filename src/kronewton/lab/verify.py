"""The note as a list of checks: each identity in its words, held against autograd in float64.

A check draws random instances of several shapes and yields one residual for each, relative in the
Frobenius norm. Later sections of the note enter theirs into the same list.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

import kronewton as kn
from kronewton import derivation as note
from kronewton.errors import KronewtonWarning

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
STEPS = AtMost(1e-9)  # three steps in a row carry rounding from one to the next


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
        return Result(self.section, self.identity, worst, str(self.bound), len(found), passed)


CHECKS: list[Check] = []


def check(section: str, identity: str, bound: Bound = EXACT) -> Callable[[Residuals], Residuals]:
    """Enter a function into the list of checks."""

    def enter(residuals: Residuals) -> Residuals:
        CHECKS.append(Check(section, identity, bound, residuals))
        return residuals

    return enter


def run(seed: int, device: torch.device) -> list[Result]:
    """Every check, on instances that do not depend on what other checks there are."""
    return [c.run(Source(torch.Generator().manual_seed(seed), device)) for c in CHECKS]


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
        shown.add_row(escape(r.identity), *numbers, verdict)
    return shown


def distance(found: Tensor, exact: Tensor, *terms: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖, or over the largest of the terms that cancel in it.

    ‖found‖ where all of them are zero, as behind a dead ReLU.
    """
    size = max(float(t.norm()) for t in (exact, *terms))
    return float((found - exact).norm()) / (size or 1.0)


# Section 1: a linear network.

SECTION_1 = "1. Linear network, Y ≈ B'WA"
REGULAR = ((3, 4, 6, 9), (4, 3, 8, 12), (1, 5, 3, 12), (5, 1, 9, 3), (1, 1, 1, 1))  # (m, n, p, N)
SINGULAR = ((5, 4, 3, 9), (3, 6, 7, 4), (5, 6, 2, 3), (2, 3, 4, 1))  # m > p, n > N, or both


@dataclass(frozen=True)
class Linear:
    """Y ≈ B'WA with everything random."""

    W: Tensor  # (m, n)
    A: Tensor  # (n, N)
    B: Tensor  # (m, p)
    Y: Tensor  # (p, N)

    @property
    def letters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of the note's functions."""
        return self.W, self.A, self.B, self.Y

    @property
    def design(self) -> Tensor:
        """A' ⊗ B', (pN, mn): vec(B'WA) = (A' ⊗ B') vec(W)."""
        rows = self.Y.numel()
        return torch.einsum("iN,op->Npio", self.A, self.B).reshape(rows, -1)

    def loss(self, W: Tensor) -> Tensor:
        """½ Σ e², in torch's own words."""
        e = self.Y - self.B.T @ W @ self.A
        return 0.5 * e.square().sum()


def linear(source: Source, shapes: Sequence[tuple[int, int, int, int]]) -> Iterator[Linear]:
    """One random linear network per shape."""
    for m, n, p, N in shapes:
        sides = ((m, n), (n, N), (m, p), (p, N))
        yield Linear(*(source.matrix(*side) for side in sides))


def autograd_gradient(loss: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
    """Gradient in the matrix W, (m, n), that can be differentiated again."""
    W = W if W.requires_grad else W.detach().requires_grad_()
    (G,) = torch.autograd.grad(loss(W), W, create_graph=True)
    return G


def autograd_hessian(loss: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
    """Hessian of a function of the matrix W in vec(W), (mn, mn)."""
    m, n = W.shape

    def of_vector(w: Tensor) -> Tensor:
        return loss(note.unvec(w, m, n))

    H: Tensor = torch.autograd.functional.hessian(of_vector, note.vec(W.detach()))
    return H


@check(SECTION_1, "J = ½ tr(e'e)")
def _loss(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR + SINGULAR):
        yield distance(note.loss(*net.letters), net.loss(net.W))


@check(SECTION_1, "dJ = tr(e'de) = tr(G'dW) with G = −B e A'")
def _differential_of_loss(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR + SINGULAR):
        dW, G = source.normal(*net.W.shape), autograd_gradient(net.loss, net.W).detach()
        dJ = note.differential_of_loss(dW, *net.letters)
        yield distance(dJ, (G * dW).sum(), G * dW)
        yield distance(note.gradient(*net.letters), G)


@check(SECTION_1, "dG = BB' dW AA'")
def _differential_of_gradient(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR + SINGULAR):
        W, dW = net.W.clone().requires_grad_(), source.normal(*net.W.shape)
        (dG,) = torch.autograd.grad(autograd_gradient(net.loss, W), W, dW)
        yield distance(note.differential_of_gradient(dW, net.A, net.B), dG)


@check(SECTION_1, "vec(BXA') = (A ⊗ B) vec(X)")
def _vec(source: Source) -> Iterator[float]:
    for m, n, p, N in REGULAR + SINGULAR:
        A, X, B = source.normal(N, n), source.normal(m, n), source.normal(p, m)
        yield distance(torch.kron(A, B) @ note.vec(X), note.vec(B @ X @ A.T))


@check(SECTION_1, "H = AA' ⊗ BB'")
def _hessian(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR + SINGULAR):
        yield distance(note.hessian(net.A, net.B), autograd_hessian(net.loss, net.W))


@check(SECTION_1, "vec(W) − H⁻¹vec(G) = W − (BB')⁻¹ G (AA')⁻¹")
def _newton_step(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR):
        H, G = autograd_hessian(net.loss, net.W), autograd_gradient(net.loss, net.W).detach()
        new = note.vec(net.W) - torch.linalg.solve(H, note.vec(G))
        yield distance(note.vec(note.newton_step(*net.letters)), new, net.W)


@check(SECTION_1, "one step from any W is least squares")
def _least_squares(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR):
        best = torch.linalg.lstsq(net.design, note.vec(net.Y).unsqueeze(1)).solution.squeeze(1)
        for W in (net.W, torch.zeros_like(net.W), 100 * source.normal(*net.W.shape)):
            new = note.newton_step(W, net.A, net.B, net.Y)
            yield distance(note.vec(new), best, W)


@check(SECTION_1, "AA' or BB' singular: it still is, by the shortest step, and it says so")
def _pseudo_inverse(source: Source) -> Iterator[float]:
    for net in linear(source, SINGULAR):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            new = note.newton_step(*net.letters)
        warned = any(issubclass(w.category, KronewtonWarning) for w in said)
        e = note.vec(net.Y - net.B.T @ net.W @ net.A)
        shortest = torch.linalg.pinv(net.design) @ e
        yield distance(note.vec(new - net.W), shortest, net.W) if warned else math.inf


@check(SECTION_1, "damped: vec(W) − (AA' ⊗ BB' + λI)⁻¹vec(G)")
def _damped_step(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR + SINGULAR):
        H, G = autograd_hessian(net.loss, net.W), autograd_gradient(net.loss, net.W).detach()
        for relative in (0.1, 1.0, 10.0):
            damping = relative * float(H.diagonal().mean())
            new = note.newton_step(*net.letters, damping=damping)
            d = -_damped_solve(H, damping, note.vec(G))
            yield distance(note.vec(new - net.W), d, net.W)


def _damped_solve(H: Tensor, damping: float, g: Tensor) -> Tensor:
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    d: Tensor = torch.linalg.solve(H + damping * eye, g)
    return d


# Section 2: piecewise-linear networks, and others by their Gauss-Newton matrix.

SECTION_2 = "2. Piecewise-linear network, J = Σ J_i"
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


@check(SECTION_2, "H = Σ A_iA_i' ⊗ B_iB_i', J = ½ tr(e'e): autograd's Hessian block")
def _piecewise_squared(source: Source) -> Iterator[float]:
    for problem in problems(source, PIECEWISE, [HalfSquare()]):
        for layer in problem.layers:
            A, B, _ = problem.blocks(layer)
            yield distance(note.hessian_block(A, B), problem.hessian(layer))


@check(SECTION_2, "H = Σ A_iA_i' ⊗ B_iΛ_iB_i', softmax, Λ_i = diag(p) − pp': the same")
def _piecewise_softmax(source: Source) -> Iterator[float]:
    for problem in problems(source, PIECEWISE, [nn.CrossEntropyLoss(reduction="sum")]):
        p = problem.model(problem.x).detach().softmax(1)
        Lambda = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        for layer in problem.layers:
            A, B, _ = problem.blocks(layer)
            terms = note.hessian_block(A, B, Lambda.abs())
            yield distance(note.hessian_block(A, B, Lambda), problem.hessian(layer), terms)


@check(SECTION_2, "the same with autograd's Λ_i, for every loss and reduction")
def _piecewise_any(source: Source) -> Iterator[float]:
    for problem in problems(source, PIECEWISE, CRITERIA):
        for layer in problem.layers:
            A, B, Lambda = problem.blocks(layer)
            terms = note.hessian_block(A, B, Lambda.abs())
            yield distance(note.hessian_block(A, B, Lambda), problem.hessian(layer), terms)


@check(SECTION_2, "not piecewise linear: the Gauss-Newton block J'ΛJ")
def _gauss_newton(source: Source) -> Iterator[float]:
    for problem in problems(source, SMOOTH, CRITERIA):
        for layer in problem.layers:
            block = note.hessian_block(*problem.blocks(layer))
            yield distance(block, problem.gauss_newton(layer))


@check(SECTION_2, "… which there is not the Hessian, the last layer apart", APART)
def _gauss_newton_is_not_the_hessian(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Tanh], [HalfSquare()]):
        for layer in problem.layers[:-1]:
            yield distance(note.hessian_block(*problem.blocks(layer)), problem.hessian(layer))


@check(SECTION_2, "all B_i alike: H = AA' ⊗ BB' again")
def _section_1_again(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR + SINGULAR):
        A, B = net.A.T, net.B.expand(net.A.shape[1], *net.B.shape)
        H = note.hessian(net.A, net.B)
        yield distance(note.hessian_block(A, B), H)
        yield distance(note.kronecker_block(A, B), H)


@check(SECTION_2, "H ≈ 1/N Σ A_iA_i' ⊗ Σ B_iΛ_iB_i': exact for a deep linear net, squared error")
def _kronecker_deep_linear(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Identity], [HalfSquare(), *CRITERIA[:2]]):
        for layer in problem.layers:
            yield distance(note.kronecker_block(*problem.blocks(layer)), problem.hessian(layer))


@check(SECTION_2, "… exact for a batch of one, and for N copies of it")
def _kronecker_one(source: Source) -> Iterator[float]:
    for one in problems(source, [nn.ReLU, nn.Tanh], CRITERIA, count=1):
        for problem in (one, one.repeated(4)):
            for layer in problem.layers:
                block = note.kronecker_block(*problem.blocks(layer))
                yield distance(block, problem.gauss_newton(layer))


def _worst_layer(problem: Problem) -> float:
    """Distance of the Kronecker product from the block where it is largest."""
    return max(
        distance(note.kronecker_block(*problem.blocks(layer)), problem.gauss_newton(layer))
        for layer in problem.layers
    )


@check(SECTION_2, "… not exact for any other batch: the distance of K-FAC", APART)
def _kronecker_otherwise(source: Source) -> Iterator[float]:
    # Nothing piecewise linear: few examples may share a region, and in it K-FAC is exact.
    yield from map(_worst_layer, problems(source, SMOOTH, CRITERIA))


@check(SECTION_2, "… nor for a deep linear net with softmax", APART)
def _kronecker_softmax(source: Source) -> Iterator[float]:
    yield from map(_worst_layer, problems(source, [nn.Identity], [nn.CrossEntropyLoss()]))


@check(SECTION_2, "a batch given twice counts twice, in the block and in its approximation")
def _counts(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.ReLU], [HalfSquare(), nn.CrossEntropyLoss()]):
        # A sum doubles; the mean over the doubled batch is the same mean.
        factor = 2.0 if isinstance(problem.criterion, HalfSquare) else 1.0
        for layer in problem.layers:
            once, twice = problem.blocks(layer), problem.repeated(2).blocks(layer)
            for block in (note.hessian_block, note.kronecker_block):
                yield distance(block(*twice), factor * block(*once))


# The losses: Λ is what everything else is scaled by.

LOSSES = "Losses: Λ in the output"


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


@check(LOSSES, "Σ uu' over the columns u of √Λ is autograd's Hessian")
def _columns(source: Source) -> Iterator[float]:
    for case in loss_cases(source):
        columns = kn.losses.curvature(case.criterion, case.z, *case.targets).columns()
        u = torch.stack(list(columns)).flatten(2 if case.z.dim() > 1 else 1)
        u = u.reshape(len(u), len(case.z), -1)  # (V, N, p): one column serves all examples
        found = torch.block_diag(*torch.einsum("vno,vnp->nop", u, u))
        yield distance(found, case.hessian())


@check(LOSSES, "Λv is autograd's Hessian times v")
def _products(source: Source) -> Iterator[float]:
    for case in loss_cases(source):
        v = source.normal(*case.z.shape)
        found = kn.losses.curvature(case.criterion, case.z, *case.targets).product(v)
        yield distance(found.flatten(), case.hessian() @ v.flatten())


@check(LOSSES, "NLLLoss after log-softmax is cross-entropy")
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


# The optimizer, from outside: its first steps with everything automatic switched off.

KFAC = "K-FAC, as the library takes it"


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
    return -note.unvec(_damped_solve(block, problem.damping, note.vec(G)), *G.shape)


@check(KFAC, "the first step is −(B ⊗ A + λI)⁻¹g")
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


@check(KFAC, "deep linear, squared error: it is the dense Gauss-Newton step −(J'ΛJ + λI)⁻¹g")
def _exact_deep_linear(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Identity], CRITERIA[:2]):
        yield from _from_gauss_newton(problem)


@check(KFAC, "a batch of one, or N copies of it, any nonlinearity and loss: it is, too")
def _exact_one(source: Source) -> Iterator[float]:
    for one in problems(source, [nn.ReLU, nn.Tanh], CRITERIA, count=1):
        for problem in (one, one.repeated(4)):
            yield from _from_gauss_newton(problem)


@check(KFAC, "other batches: it is not", AtLeast(1e-5))
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


@check(KFAC, "three steps: the batch given twice changes nothing", STEPS)
def _duplicated(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Tanh], MEANS):
        yield _after_three(problem, problem.repeated(2))


@check(KFAC, "three steps: micro-batches of 2 + 4, of 3 + 3, of 1 + 2 + 3 are the batch", STEPS)
def _micro_batches(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Tanh], CRITERIA):
        for cuts in ((0, 2, 6), (0, 3, 6), (0, 1, 3, 6)):
            parts = [slice(*pair) for pair in pairwise(cuts)]
            yield _after_three(problem, problem, parts=parts)


@check(KFAC, "three steps: the loss and λ times c change nothing", STEPS)
def _scaled(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Tanh], CRITERIA):
        for c in (0.01, 7.0):
            yield _after_three(problem, problem, factor=c)


@check(KFAC, "a masked example is as if it were not there")
def _masked(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Tanh], [nn.CrossEntropyLoss()]):
        y = problem.y.clone()
        y[:2] = -100
        masked = Problem(problem.model, problem.criterion, problem.x, y)
        cut = Problem(problem.model, problem.criterion, problem.x[2:], y[2:])
        expected = taken(cut)
        yield from (distance(step, expected[layer]) for layer, step in taken(masked).items())


@check(
    KFAC, "linear regression, λ = 1e-10, automatic step: one step is least squares", AtMost(1e-5)
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
