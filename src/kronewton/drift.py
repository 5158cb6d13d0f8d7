"""Eigenbases that are renewed side by side, where they have drifted, and not where they have not.

A basis of normalised steps only has to tell coordinates apart: what counts is how correlated they
have become in it, which a few columns show for a small part of an eigendecomposition's cost.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronewton.inverse import EigenInverse
from kronewton.linalg import finite, ran_out_of_memory
from kronewton.pair import Product
from kronewton.structure import (
    DENSE,
    DIAGONAL,
    Blocks,
    Dense,
    Leading,
    Sides,
    Structure,
    fused,
    in_full,
)

COLUMNS = 16  # of a basis, from which its drift is measured
PROBES, OUTGROWN = 4, 2.0  # vectors; times the least leading eigenvalue, that may be outside
TOLERATED = 0.3  # of squared correlations of a coordinate with all others, together
INDEPENDENT = 1.0  # likewise between a side's own axes: they are as good a basis as any
FEW_INDEPENDENT = 0.25  # of a small side, of which all correlations are few
APART = 0.2  # of them all, between coordinates of different parts: each part has a basis of its own
SMALL = 64  # up to this side an eigendecomposition costs no more than asking what has drifted
ASKED = 16  # from this side of outputs on, whether its own axes are as good
FLOOR = 1e-4  # of the mean eigenvalue: below it correlations mean nothing
TINY = 1e-30
TOGETHER = 2**22  # numbers in matrices whose eigenvectors are found together
EIGEN = 4  # products of d×d matrices, that an eigendecomposition costs as much as
AT_LEAST = 2.5e7  # multiplications, in whose time a layer is renewed however small it is
EARLY = 40  # runs that bases may cost in the first steps, the later of them the less
RAREST = 1000  # steps between renewals of a basis, at most
PAYS = 3  # runs that are to cost as much as the new basis in one of them


@dataclass
class Side:
    """The basis of one side: how it is stored, and the matrix whose eigenvectors it is.

    found: its eigenvalues and vectors, where they are known without an eigendecomposition.
    """

    structure: Structure
    M: Tensor | None  # while it is asked for
    what: str
    near: Tensor | None = None  # eigenvectors of an M before, stored likewise
    found: tuple[Tensor, Tensor] | None = None

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and vectors. Raises NotPositiveDefinite if M is not finite."""
        if self.found is not None:
            return self.found
        assert self.M is not None
        return self.structure.eigen(self.M, self.what, self.near)


class Renewal:
    """An eigenbasis of P ⊗ Q: of each side the old one while it serves, or the side's own axes.

    An output's side that is several of the input's, as of a query, a key and a value that one
    matrix makes, has a basis for each where these have little to do with each other.

    worth: whether a new one is worth its price, of the input's side and of the output's.
    rows: as how many the factors' mean is as good, a number or a tensor (), for what looks like a
    correlation and is chance.
    """

    def __init__(
        self,
        product: Product,
        old: EigenInverse | None,
        name: str,
        worth: Sequence[bool] = (True, True),
        rows: Tensor | float = math.inf,
    ) -> None:
        self.old, self.worth = old, worth
        of_input = of_output = None
        if old is not None and old.s.dtype == product.Q.dtype:  # or the model has been cast since
            of_input = (old.sides.input, old.U_A, old.spectra[0])
            of_output = (old.sides.output, old.U_B, old.spectra[1])
        d_out, d_in = product.shape
        self.of_output = _side(
            product.P,
            in_full(product.sides, d_out, d_in).output,
            fused(d_out, d_in),
            of_output,
            f"the gradient factor B of layer '{name}'",
            worth[1],
            rows,
            ASKED,
        )
        found = product.sides._replace(output=self.of_output.structure)
        self.of_input = _side(
            product.Q,
            in_full(found, d_out, d_in).input,
            None,
            of_input,
            f"the input factor A of layer '{name}'",
            worth[0],
            rows,
        )

    def basis(self) -> EigenInverse:
        """Found now, where it is still to be.

        Raises NotPositiveDefinite, naming the layer, if a factor is not finite.
        """
        (s_A, U_A), (s_B, U_B) = self.of_input.eigen(), self.of_output.eigen()
        s = s_B.unsqueeze(-1) * s_A.unsqueeze(-2)
        return EigenInverse(U_A, U_B, s, Sides(self.of_input.structure, self.of_output.structure))

    def moved(self, new: EigenInverse) -> list[bool]:
        """Of each side that was worth asking and is not small, whether it had drifted."""
        if self.old is None:
            return []
        d_out, d_in = new.s.shape[-2:]
        sides = ((d_in, self.old.U_A, new.U_A), (d_out, self.old.U_B, new.U_B))
        return [
            now is not before
            for (d, before, now), asked in zip(sides, self.worth, strict=True)
            if asked and d > SMALL and now.numel()
        ]


def find_by_products(renewals: Iterable[Renewal]) -> None:
    """Find what is still to be found of several bases, where products do it faster.

    Sides of one shape together. What cannot be found so is left to an eigendecomposition.
    """
    alike: dict[tuple[Hashable, ...], list[Side]] = {}
    for side in (s for r in renewals for s in (r.of_input, r.of_output)):
        M = side.M
        if side.found is None and M is not None and side.structure != DIAGONAL and by_products(M):
            key = side.structure, M.shape, M.dtype, M.device, side.near is None
            alike.setdefault(key, []).append(side)
    for (structure, shape, *_), same in alike.items():
        assert isinstance(structure, Structure)
        assert isinstance(shape, torch.Size)
        most = max(1, TOGETHER // shape.numel())
        for some in (same[k : k + most] for k in range(0, len(same), most)):
            near = [side.near for side in some if side.near is not None]
            matrices = [side.M for side in some if side.M is not None]
            try:
                s, U, sound = structure.nearly_eigen(
                    torch.stack(matrices), torch.stack(near) if near else None
                )
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                continue  # one by one they take less
            good = sound.reshape(len(some), -1).all(-1).tolist()  # one wait
            for i in (i for i, well in enumerate(good) if well):
                # Copies: a view would keep all of them for as long as one is in use.
                some[i].found, some[i].M, some[i].near = (s[i].clone(), U[i].clone()), None, None


def by_products(M: Tensor) -> bool:
    """Whether products find a basis sooner than an eigendecomposition.

    On a GPU that takes as long as some two hundred products, and is made for one matrix at a time.
    """
    return M.is_cuda


def _side(
    M: Tensor,
    structure: Structure,
    parts: Blocks | None,
    old: tuple[Structure, Tensor, Tensor] | None,
    what: str,
    worth: bool,
    rows: Tensor | float,
    least: int = SMALL + 1,
) -> Side:
    """How the basis of a side is stored, and what it is where that is known.

    parts: that a dense one may have. least: of coordinates, for a dense one's own axes to be asked.
    """
    diagonal = structure.diagonal(M)
    d = diagonal.shape[-1]
    dense = M.dim() == 2  # and one matrix
    small = 1 < d <= SMALL
    asked = d > SMALL or d == 1 or (dense and d >= least)
    last = old
    if asked and structure != DIAGONAL and finite(diagonal):
        if d == 1:  # as of a normalisation's inputs
            return _axes(diagonal, what)
        old, parts = (None, None) if small else (old, parts)
        simplest = None
        of_dense = (Blocks,) if worth else (Blocks, Dense)  # that a dense one's may be
        if old is not None and (old[0] == structure or (dense and isinstance(old[0], of_dense))):
            before, U, s = old
            s = s * (diagonal.sum(-1) / s.sum(-1).clamp_min(TINY)).unsqueeze(-1)
            if before != structure and worth:  # what is between parts, their drift does not show
                simplest = _simplest(M, diagonal, parts, rows)
            kept = M if before == structure else before.of_dense(M)
            serves = simplest in (None, before)
            if not worth:
                return Side(before, None, what, found=(s, U))
            if serves and float(drift(before, kept, U, s)) < TOLERATED:
                if not isinstance(before, Leading) or not outgrown(before, kept, U, s):
                    return Side(before, None, what, found=(s, U))
                last = None  # no rounds lead from there to what has nothing to do with it
        if old is not None and old[0] == DIAGONAL and not worth:
            simplest = DIAGONAL
        elif dense and simplest is None:
            simplest = _simplest(M, diagonal, parts, rows)
        if simplest == DIAGONAL:
            return _axes(diagonal, what)
        if isinstance(simplest, Blocks):
            structure, M = simplest, simplest.of_dense(M)
    near = last[1] if last is not None and last[0] == structure else None
    return Side(structure, M, what, near)


def _axes(diagonal: Tensor, what: str) -> Side:
    return Side(DIAGONAL, None, what, found=(diagonal.clone(), diagonal.new_zeros(0)))


def outside(structure: Leading, M: Tensor, U: Tensor, s: Tensor) -> Tensor:
    """How much curvature there is beside leading eigenvectors U, over the least of theirs, (…).

    A Rayleigh quotient after one step of a power iteration from a few random vectors: what has
    come up far from all of U makes no correlation with it that `drift` would show.
    """
    generator = torch.Generator(M.device).manual_seed(0)
    shape = *M.shape[:-1], PROBES
    x = torch.randn(shape, dtype=M.dtype, device=M.device, generator=generator)
    y = M @ (x - U @ (U.mT @ x))
    y = y - U @ (U.mT @ y)
    quotient = (y * (M @ y)).sum((-2, -1)) / y.square().sum((-2, -1)).clamp_min(TINY)
    return quotient / s[..., : structure.k].amin(-1).clamp_min(TINY)


def outgrown(structure: Leading, M: Tensor, U: Tensor, s: Tensor) -> bool:
    """Whether leading eigenvectors are no more the leading ones."""
    return bool((outside(structure, M, U, s) > OUTGROWN).any())


def drift(structure: Structure, M: Tensor, U: Tensor, s: Tensor) -> Tensor:
    """How correlated coordinates are in a basis U whose eigenvalues were s (…, d), as a scalar.

    Σ_i≠j (u_i'M u_j)² / (m_i m_j) with m for the eigenvalues, the mean over some columns j: zero
    in an eigenbasis of M.
    """
    n = structure.vectors(s.shape[-1])
    every = max(1, n // COLUMNS)
    some = structure.some(U, s, every)  # (…, d, k)
    seen = structure.rotate(U, structure.left(M, some))
    m = (s + FLOOR * s.mean(-1, keepdim=True)).clamp_min(TINY)
    shares = seen.square_().div_(m.unsqueeze(-1)).sum(-2)  # (…, k)
    at = slice(0, n, every)
    own = seen[..., at, :].diagonal(dim1=-2, dim2=-1)
    return ((shares - own) / m[..., at]).mean()


def _simplest(M: Tensor, diagonal: Tensor, parts: Blocks | None, rows: Tensor | float) -> Structure:
    """What a basis needs to hold of a matrix, by the correlations of its own axes."""
    m = (diagonal + FLOOR * diagonal.mean()).clamp_min(TINY)
    root = m.rsqrt()
    correlations = (M * root).mul_(root.unsqueeze(-1))
    flat = correlations.flatten()
    own = (diagonal / m).square().sum()
    # Of n rows the squared correlation of two coordinates that are independent is 1/n by chance.
    sums = [torch.dot(flat, flat) - own, (own * (own - 1) / rows).to(own)]
    if parts is not None:
        sums.append(parts.of_dense(correlations).square().sum() - own)
    among, chance, *within = torch.stack(sums).tolist()  # one wait
    if among - chance < (INDEPENDENT if len(m) > SMALL else FEW_INDEPENDENT) * len(m):
        return DIAGONAL
    if parts is not None and among - within[0] < APART * among:
        return parts
    return DENSE


def price(M: Tensor, basis: Structure, work: int) -> float:
    """What a basis of a side costs, in runs of so many multiplications, forward and backward."""
    return EIGEN * M.numel() * basis.vectors(M.shape[-1]) / max(1, work)


def pays(own: float, of_all: float, step: int, every: int) -> bool:
    """Whether to renew the basis of a side that is due.

    own: its price, in runs of its layer on a batch. of_all: that of all bases in runs of the model.
    A layer with few rows, or few numbers on its other side, is run in far less time than an
    eigendecomposition takes, which is to cost a third of the layer's runs in between. In the first
    steps bases change most: the n-th may cost EARLY/n runs of the layer, or all bases together so
    many of the model.
    """
    if step < every:
        return step * min(own, of_all) <= EARLY
    times = min(math.ceil(PAYS * own / every), RAREST // every)
    return step // every % max(1, times) == 0
