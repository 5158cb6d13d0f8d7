"""Section 3 of the note: convolutions, and all else that repeats its parameters."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kronewton import derivation as note
from kronewton.errors import KronewtonWarning
from kronewton.lab.verify.autograd import damped_solve
from kronewton.lab.verify.checks import APART, F64, AtMost, Section, Source, Told, distance

SECTION = Section("3. Convolution, vec(W) = Ku")
SOLVED = AtMost(1e-8)  # the residual of 1e-10 times a condition number of up to a hundred
META: dict[str, Any] = {"device": torch.device("meta"), "dtype": F64}

# Every option at least once, with the shape of an input.
CONVOLUTIONS: tuple[tuple[nn.Module, tuple[int, ...]], ...] = (
    (nn.Conv1d(2, 3, 3, **META), (2, 6)),
    (nn.Conv1d(2, 2, 4, padding="same", padding_mode="circular", **META), (2, 5)),
    (nn.Conv1d(2, 4, 2, stride=2, groups=2, padding=1, padding_mode="reflect", **META), (2, 5)),
    (nn.Conv2d(1, 1, 1, **META), (1, 1, 1)),
    (nn.Conv2d(2, 3, 3, padding=1, **META), (2, 4, 3)),
    (nn.Conv2d(2, 2, (3, 2), (1, 2), (2, 0), (2, 1), padding_mode="circular", **META), (2, 5, 4)),
    (nn.Conv2d(4, 2, 2, dilation=2, groups=2, bias=False, **META), (4, 4, 3)),
    (nn.Conv2d(2, 2, (1, 4), padding="same", padding_mode="replicate", **META), (2, 2, 3)),
    (nn.Conv3d(1, 2, 2, padding=(0, 1, 1), stride=(1, 2, 1), **META), (1, 3, 2, 2)),
    (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1, **META), (2, 3)),
    (nn.ConvTranspose2d(2, 4, (2, 3), stride=2, groups=2, dilation=(2, 1), **META), (2, 2, 2)),
    (nn.ConvTranspose3d(1, 2, 2, padding=(1, 0, 0), **META), (1, 2, 2, 1)),
)
LARGE, SMALL = ((8, 60),), ((1, 3), (2, 1))  # (N, p): H_u is regular, singular as a rule
Forward = Callable[[Tensor, Tensor], Tensor]  # u (q), A (n, N) → W A (m, N), without bias


@dataclass(frozen=True)
class Tied:
    """Y ≈ B'WA with vec(W) = K u, and the same W A by torch's own module, from its weight."""

    tying: note.Tying
    forward: Forward
    u: Tensor  # (q)
    A: Tensor  # (n, N)
    B: Tensor  # (m, p)
    Y: Tensor  # (p, N)

    @cached_property
    def K(self) -> Tensor:
        """The tiling matrix, sparse."""
        return self.tying.matrix()

    @property
    def letters(self) -> tuple[Tensor, note.Tying, Tensor, Tensor, Tensor]:
        """The arguments of the step."""
        return self.u, self.tying, self.A, self.B, self.Y

    def output(self, u: Tensor) -> Tensor:
        """vec(B'WA), (pN)."""
        return note.vec(self.B.mT @ self.forward(u, self.A))

    def loss(self, u: Tensor) -> Tensor:
        """½ Σ e²."""
        return 0.5 * (note.vec(self.Y) - self.output(u)).square().sum()

    @cached_property
    def design(self) -> Tensor:
        """The Jacobian of the output in u, (pN, q)."""
        J: Tensor = torch.autograd.functional.jacobian(self.output, self.u)
        return J

    @cached_property
    def hessian(self) -> Tensor:
        """Autograd's, (q, q)."""
        H: Tensor = torch.autograd.functional.hessian(self.loss, self.u)
        return H

    @property
    def gradient(self) -> Tensor:
        """Autograd's, (q)."""
        u = self.u.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.loss(u), u)
        return g


def made(source: Source, conv: nn.Module) -> nn.Module:
    """The same module with random numbers in it."""
    conv = copy.deepcopy(conv).to_empty(device=source.device)
    for p in conv.parameters():
        p.data = source.normal(*p.shape)
    return conv


def of_weight(module: nn.Module, input_shape: tuple[int, ...]) -> Forward:
    """A module as a function of its flattened weight and of inputs that are columns."""
    weight = module.get_parameter("weight")
    zeros = {name: torch.zeros_like(p) for name, p in module.named_parameters()}

    def forward(u: Tensor, A: Tensor) -> Tensor:
        replaced = {**zeros, "weight": u.reshape(weight.shape)}
        x = A.mT.reshape(-1, *input_shape)
        y: Tensor = functional_call(module, replaced, (x,))
        return y.flatten(1).mT

    return forward


def filled(source: Source, tying: note.Tying, forward: Forward, N: int, p: int) -> Tied:
    """Random letters around a tying."""
    (m, n), q = tying.shape, tying.entries.numel()
    letters = source.normal(n, N), source.normal(m, p), source.normal(p, N)
    return Tied(tying, forward, source.normal(q), *letters)


def convolutions(source: Source, sizes: tuple[tuple[int, int], ...]) -> Iterator[Tied]:
    """Every convolution with every (N, p)."""
    for (conv, shape), (N, p) in product(CONVOLUTIONS, sizes):
        conv = made(source, conv)
        yield filled(source, note.tied_convolution(conv, shape), of_weight(conv, shape), N, p)


def calls(source: Source, sizes: tuple[tuple[int, int], ...]) -> Iterator[Tied]:
    """An nn.Linear on tokens: one module, called at every position."""
    for (d_out, d_in, S), (N, p) in product(((2, 3, 4), (3, 2, 1), (1, 4, 3)), sizes):
        linear = made(source, nn.Linear(d_in, d_out, bias=False, **META))
        forward = of_weight(linear, (S, d_in))
        tying = note.tied_calls(d_out, d_in, S, source.device)
        yield filled(source, tying, forward, N, p)


def tied(source: Source, sizes: tuple[tuple[int, int], ...]) -> Iterator[Tied]:
    """Convolutions and calls."""
    yield from convolutions(source, sizes)
    yield from calls(source, sizes)


@SECTION.check("conv(x) = unvec(Ku) x + bias, with every option of torch")
def _tiling(source: Source) -> Iterator[float]:
    for conv, shape in CONVOLUTIONS:
        conv, x = made(source, conv), source.normal(3, *shape)
        K, u = note.tiling_matrix(conv, shape), conv.get_parameter("weight").detach().flatten()
        n = math.prod(shape)
        y, zero = (conv(t).detach() for t in (x, torch.zeros_like(x)))  # zero: the bias alone
        W = note.unvec(K @ u, len(K) // n, n)
        yield distance(x.flatten(1) @ W.mT + zero.flatten(1), y.flatten(1))


@SECTION.check("dvec(W)/du = K")
def _differential_of_tiling(source: Source) -> Iterator[float]:
    for net in tied(source, ((1, 1),)):
        eye = torch.eye(net.tying.shape[1], dtype=F64, device=source.device)
        J: Tensor = torch.autograd.functional.jacobian(
            lambda u, net=net, eye=eye: note.vec(net.forward(u, eye)), net.u
        )
        yield distance(net.K.to_dense(), J)


@SECTION.check("the output channel outermost: dW/dU = I ⊗ K₁")
def _channels(source: Source) -> Iterator[float]:
    for d_in, d_out, kernel, shape in ((2, 3, 3, (4, 5)), (1, 4, 2, (3, 3)), (3, 1, 1, (2, 2))):
        one, all_of_them = (
            note.tiling_matrix(made(source, nn.Conv2d(d_in, d, kernel, **META)), (d_in, *shape))
            for d in (1, d_out)
        )
        m = len(all_of_them) // (d_in * math.prod(shape))
        found = note.channels_outermost(all_of_them, m, d_out).to_dense()
        eye = torch.eye(d_out, dtype=F64, device=source.device)
        yield distance(found, torch.kron(eye, one.to_dense()))


@SECTION.check("g = K'vec(G)")
def _tied_gradient(source: Source) -> Iterator[float]:
    for net in tied(source, LARGE + SMALL):
        yield distance(note.tied_gradient(net.u, net.K, net.A, net.B, net.Y), net.gradient)


@SECTION.check("H_u = K'(AA' ⊗ BB')K: autograd's Hessian")
def _tied_hessian(source: Source) -> Iterator[float]:
    for net in tied(source, LARGE + SMALL):
        yield distance(note.convolution_hessian(net.K, net.A, net.B), net.hessian)


@SECTION.check("K' vec(BB' unvec(Kv) AA') = H_u v: nothing formed")
def _matrix_free(source: Source) -> Iterator[float]:
    for net in tied(source, LARGE + SMALL):
        v = source.normal(len(net.u))
        yield distance(note.convolution_product(net.K, net.A, net.B)(v), net.hessian @ v)


@SECTION.check("K⁺((AA')⁻¹ ⊗ (BB')⁻¹)K⁺', at its best length, is not H_u⁻¹", APART)
def _inverse_does_not_distribute(source: Source) -> Iterator[float]:
    for net in tied(source, ((128, 128),)):
        if net.tying.inputs.shape[:2] == (1, 1):  # one position: K is square, and it is
            continue
        H, X = net.hessian.inverse(), note.distributed_inverse(net.K, net.A, net.B)
        yield distance((H * X).sum() / (X * X).sum() * X, H)


@SECTION.check("H_u ≈ Â ⊗ B̂ (expand): exact for one position")
def _expand(source: Source) -> Iterator[float]:
    for d_in, d_out, size in ((2, 3, (2, 2)), (1, 4, (3, 1)), (3, 1, (1, 2))):
        conv, shape = made(source, nn.Conv2d(d_in, d_out, size, **META)), (d_in, *size)
        tying, forward = note.tied_convolution(conv, shape), of_weight(conv, shape)
        for N, p in LARGE + SMALL:
            net = filled(source, tying, forward, N, p)
            (AA,), (BB,) = note.expand(tying, net.A, net.B)
            yield distance(torch.kron(BB, AA), net.hessian)  # u is U row by row


def solvers(net: Tied, damping: float = 0.0) -> Iterator[note.Solver]:
    """Conjugate gradients, plain and preconditioned."""
    precondition = note.kronecker_preconditioner(net.tying, net.A, net.B, damping)
    yield note.Solver(damping)
    yield note.Solver(damping, precondition)


@SECTION.check("one step on u from anywhere is least squares", SOLVED)
def _tied_least_squares(source: Source) -> Iterator[float]:
    for net in tied(source, LARGE):
        best = torch.linalg.lstsq(net.design, note.vec(net.Y).unsqueeze(1)).solution.squeeze(1)
        for solver in solvers(net):
            step = note.newton_step_tied(*net.letters, solver)
            yield math.inf if step.singular else distance(step.u, best, net.u)


def _said_and_done(net: Tied, solver: note.Solver) -> Tensor | None:
    """The step on u, or None if it was not said to be one of several."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step = note.newton_step_tied(*net.letters, solver)
    warned = any(issubclass(w.category, KronewtonWarning) for w in said)
    return step.u - net.u if step.singular and warned else None


@SECTION.check("H_u singular: it still is, by the shortest step, and it says so", SOLVED)
def _tied_singular(source: Source) -> Iterator[float]:
    for net in tied(source, SMALL):
        if torch.linalg.matrix_rank(net.design) == len(net.u):
            continue
        e = note.vec(net.Y) - net.design @ net.u
        d = _said_and_done(net, note.Solver())
        yield math.inf if d is None else distance(d, torch.linalg.pinv(net.design) @ e, net.u)


@SECTION.check("… and preconditioned by a step to another optimum", SOLVED)
def _tied_singular_preconditioned(source: Source) -> Iterator[float]:
    for net in tied(source, SMALL):
        if torch.linalg.matrix_rank(net.design) == len(net.u):
            continue
        e = note.vec(net.Y) - net.design @ net.u
        d = _said_and_done(net, [*solvers(net)][1])
        left = net.design @ (torch.linalg.pinv(net.design) @ e)  # of the output: unique
        yield math.inf if d is None else distance(net.design @ d, left, e)


@SECTION.check("damped: u − (H_u + λI)⁻¹g", SOLVED)
def _tied_damped(source: Source) -> Iterator[float]:
    for net in tied(source, LARGE + SMALL):
        damping = float(net.hessian.diagonal().mean())
        d = -damped_solve(net.hessian, damping, net.gradient)
        for solver in solvers(net, damping):
            yield distance(note.newton_step_tied(*net.letters, solver).u - net.u, d)


@SECTION.check("3 → 8 channels, 3×3: iterations preconditioned and plain", AtMost(1 / 3))
def _iterations(source: Source) -> Iterator[float]:
    for N, p in ((30, 40), (60, 120)):
        conv, shape = made(source, nn.Conv2d(3, 8, 3, padding=1, **META)), (3, 6, 6)
        net = filled(source, note.tied_convolution(conv, shape), of_weight(conv, shape), N, p)
        x = net.A.T.reshape(N, *shape)
        # Neighbours and channels alike, as in images: a condition number of hundreds.
        x = x / 4 + 3 * F.avg_pool2d(x, 3, 1, 1) + 2 * x.mean(1, keepdim=True)
        net = Tied(net.tying, net.forward, net.u, x.flatten(1).T, net.B, net.Y)
        plain, fast = (note.newton_step_tied(*net.letters, solver) for solver in solvers(net))
        ratio = fast.iterations / plain.iterations
        residual = max(fast.residual, plain.residual)
        s = torch.linalg.eigvalsh(note.convolution_hessian(net.K, net.A, net.B))
        words = f"{fast.iterations} and {plain.iterations}, condition {float(s[-1] / s[0]):.0f}"
        yield Told(ratio if residual <= 1e-10 else math.inf, words)
