"""Section 2 of the note: piecewise-linear networks, and others by their Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from kronewton import derivation as note
from kronewton.lab.verify.checks import APART, Section, Source, distance
from kronewton.lab.verify.linear import REGULAR, SINGULAR, linear
from kronewton.lab.verify.networks import (
    CRITERIA,
    PIECEWISE,
    SMOOTH,
    HalfSquare,
    Problem,
    problems,
)

SECTION = Section("2. Piecewise-linear network, J = Σ J_i")


@SECTION.check("H = Σ A_iA_i' ⊗ B_iB_i', J = ½ tr(e'e): autograd's Hessian block")
def _piecewise_squared(source: Source) -> Iterator[float]:
    for problem in problems(source, PIECEWISE, [HalfSquare()]):
        for layer in problem.layers:
            A, B, _ = problem.blocks(layer)
            yield distance(note.hessian_block(A, B), problem.hessian(layer))


@SECTION.check("H = Σ A_iA_i' ⊗ B_iΛ_iB_i', softmax, Λ_i = diag(p) − pp': the same")
def _piecewise_softmax(source: Source) -> Iterator[float]:
    for problem in problems(source, PIECEWISE, [nn.CrossEntropyLoss(reduction="sum")]):
        p = problem.model(problem.x).detach().softmax(1)
        Lambda = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        for layer in problem.layers:
            A, B, _ = problem.blocks(layer)
            terms = note.hessian_block(A, B, Lambda.abs())
            yield distance(note.hessian_block(A, B, Lambda), problem.hessian(layer), terms)


@SECTION.check("the same with autograd's Λ_i, for every loss and reduction")
def _piecewise_any(source: Source) -> Iterator[float]:
    for problem in problems(source, PIECEWISE, CRITERIA):
        for layer in problem.layers:
            A, B, Lambda = problem.blocks(layer)
            terms = note.hessian_block(A, B, Lambda.abs())
            yield distance(note.hessian_block(A, B, Lambda), problem.hessian(layer), terms)


@SECTION.check("not piecewise linear: the Gauss-Newton block J'ΛJ")
def _gauss_newton(source: Source) -> Iterator[float]:
    for problem in problems(source, SMOOTH, CRITERIA):
        for layer in problem.layers:
            block = note.hessian_block(*problem.blocks(layer))
            yield distance(block, problem.gauss_newton(layer))


@SECTION.check("… which there is not the Hessian, the last layer apart", APART)
def _gauss_newton_is_not_the_hessian(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Tanh], [HalfSquare()]):
        for layer in problem.layers[:-1]:
            yield distance(note.hessian_block(*problem.blocks(layer)), problem.hessian(layer))


@SECTION.check("all B_i alike: H = AA' ⊗ BB' again")
def _section_1_again(source: Source) -> Iterator[float]:
    for net in linear(source, REGULAR + SINGULAR):
        A, B = net.A.T, net.B.expand(net.A.shape[1], *net.B.shape)
        H = note.hessian(net.A, net.B)
        yield distance(note.hessian_block(A, B), H)
        yield distance(note.kronecker_block(A, B), H)


@SECTION.check("H ≈ 1/N Σ A_iA_i' ⊗ Σ B_iΛ_iB_i': exact for a deep linear net, squared error")
def _kronecker_deep_linear(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.Identity], [HalfSquare(), *CRITERIA[:2]]):
        for layer in problem.layers:
            yield distance(note.kronecker_block(*problem.blocks(layer)), problem.hessian(layer))


@SECTION.check("… exact for a batch of one, and for N copies of it")
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


@SECTION.check("… not exact for any other batch: the distance of K-FAC", APART)
def _kronecker_otherwise(source: Source) -> Iterator[float]:
    # Nothing piecewise linear: few examples may share a region, and in it K-FAC is exact.
    yield from map(_worst_layer, problems(source, SMOOTH, CRITERIA))


@SECTION.check("… nor for a deep linear net with softmax", APART)
def _kronecker_softmax(source: Source) -> Iterator[float]:
    yield from map(_worst_layer, problems(source, [nn.Identity], [nn.CrossEntropyLoss()]))


@SECTION.check("a batch given twice counts twice, in the block and in its approximation")
def _counts(source: Source) -> Iterator[float]:
    for problem in problems(source, [nn.ReLU], [HalfSquare(), nn.CrossEntropyLoss()]):
        # A sum doubles; the mean over the doubled batch is the same mean.
        factor = 2.0 if isinstance(problem.criterion, HalfSquare) else 1.0
        for layer in problem.layers:
            once, twice = problem.blocks(layer), problem.repeated(2).blocks(layer)
            for block in (note.hessian_block, note.kronecker_block):
                yield distance(block(*twice), factor * block(*once))
