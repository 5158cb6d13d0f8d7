"""Section 1 of the note: a linear network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronewton import derivation as note
from kronewton.errors import KronewtonWarning
from kronewton.lab.verify.autograd import autograd_gradient, autograd_hessian, damped_solve
from kronewton.lab.verify.checks import Section, Source, distance

SECTION = Section("1. Linear network, Y ≈ B'WA")
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


@SECTION.check("J = ½ tr(e'e)")
def _loss(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR + SINGULAR):
        yield distance(note.loss(*net.letters), net.loss(net.W))


@SECTION.check("dJ = tr(e'de) = tr(G'dW) with G = −B e A'")
def _differential_of_loss(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR + SINGULAR):
        dW, G = source.normal(*net.W.shape), autograd_gradient(net.loss, net.W).detach()
        dJ = note.differential_of_loss(dW, *net.letters)
        yield distance(dJ, (G * dW).sum(), G * dW)
        yield distance(note.gradient(*net.letters), G)


@SECTION.check("dG = BB' dW AA'")
def _differential_of_gradient(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR + SINGULAR):
        W, dW = net.W.clone().requires_grad_(), source.normal(*net.W.shape)
        (dG,) = torch.autograd.grad(autograd_gradient(net.loss, W), W, dW)
        yield distance(note.differential_of_gradient(dW, net.A, net.B), dG)


@SECTION.check("vec(BXA') = (A ⊗ B) vec(X)")
def _vec(source: Source) -> Iterator[float]:
    for m, n, p, N in REGULAR + SINGULAR:
        A, X, B = source.normal(N, n), source.normal(m, n), source.normal(p, m)
        yield distance(torch.kron(A, B) @ note.vec(X), note.vec(B @ X @ A.T))


@SECTION.check("H = AA' ⊗ BB'")
def _hessian(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR + SINGULAR):
        yield distance(note.hessian(net.A, net.B), autograd_hessian(net.loss, net.W))


@SECTION.check("vec(W) − H⁻¹vec(G) = W − (BB')⁻¹ G (AA')⁻¹")
def _newton_step(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR):
        H, G = autograd_hessian(net.loss, net.W), autograd_gradient(net.loss, net.W).detach()
        new = note.vec(net.W) - torch.linalg.solve(H, note.vec(G))
        yield distance(note.vec(note.newton_step(*net.letters)), new, net.W)


@SECTION.check("one step from any W is least squares")
def _least_squares(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR):
        best = torch.linalg.lstsq(net.design, note.vec(net.Y).unsqueeze(1)).solution.squeeze(1)
        for W in (net.W, torch.zeros_like(net.W), 100 * source.normal(*net.W.shape)):
            new = note.newton_step(W, net.A, net.B, net.Y)
            yield distance(note.vec(new), best, W)


@SECTION.check("AA' or BB' singular: it still is, by the shortest step, and it says so")
def _pseudo_inverse(source: Source) -> Iterator[float]:
    for net in linear(source, SINGULAR):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            new = note.newton_step(*net.letters)
        warned = any(issubclass(w.category, KronewtonWarning) for w in said)
        e = note.vec(net.Y - net.B.T @ net.W @ net.A)
        shortest = torch.linalg.pinv(net.design) @ e
        yield distance(note.vec(new - net.W), shortest, net.W) if warned else math.inf


@SECTION.check("damped: vec(W) − (AA' ⊗ BB' + λI)⁻¹vec(G)")
def _damped_step(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR + SINGULAR):
        H, G = autograd_hessian(net.loss, net.W), autograd_gradient(net.loss, net.W).detach()
        for relative in (0.1, 1.0, 10.0):
            damping = relative * float(H.diagonal().mean())
            new = note.newton_step(*net.letters, damping=damping)
            d = -damped_solve(H, damping, note.vec(G))
            yield distance(note.vec(new - net.W), d, net.W)
