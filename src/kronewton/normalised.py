"""Adam's moments of the gradient in K-FAC's eigenbasis: steps for gradients that are mostly noise.

A Newton step divides by the curvature, and where a gradient is noise it divides noise. A normalised
step moves every coordinate about equally far whatever its gradient's size, and coordinates are told
apart best along the eigenvectors of the factors (Vyas et al. 2024 with Shampoo's factors).

Coordinates of like size do not make singular values of like size: where many gradients agree, a
step is all but a matrix of rank one, and curvature along that bounds its length. So steps are
orthogonalised (Jordan et al. 2024, of the mean gradient), and in a metric half way from none to
Newton's: of all Δ for which no singular value of B^¼ Δ A^¼ is above one, it falls furthest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kronewton.inverse import EigenInverse
from kronewton.linalg import diagonal, rough_dtype
from kronewton.structure import DENSE, DIAGONAL, Sides, Structure, in_parts

FIRST_DECAY, SECOND_DECAY = 0.85, 0.95
LEAST = 1e-5  # of a layer's root mean square: a coordinate's gradient below counts as this
TINY = 1e-30
QUINTIC = 3.4445, -4.775, 2.0315  # of a singular value, its third and its fifth power
ROUNDS = 3  # of it: a value below a 25th of the length stays below the others
WIDE = 2  # times the shorter side: from about there products of the shorter one alone are cheaper
TOGETHER = 2**24  # numbers in matrices that are orthogonalised in one product
PAYS = 2.75  # runs of a layer on a batch, that its rounds may cost
HALVED = 256  # from this side on rounds in half precision take half the time, not nine tenths
LEAST_SIDE = 16  # smaller ones, as of ten classes, have little that could be flattened


class Moments:
    """Of one layer: m, the mean, and v, the mean square of its gradient in an eigenbasis."""

    def __init__(self, like: Tensor, steps: int = 0, left: float = 1.0) -> None:
        self.m, self.v = torch.zeros_like(like), torch.zeros_like(like)  # (…, d_out, d_in)
        self.steps = steps
        self.left = left  # in m, of the zeros that it began with

    def turn_(self, old: EigenInverse | None, new: EigenInverse) -> None:
        """Carry both into a new basis: m exactly, v as if its coordinates were uncorrelated."""
        dtype = new.s.dtype  # the model may have been cast since
        self.m, self.v = self.m.to(dtype), self.v.to(dtype)
        if old is None:
            self.m = new.rotate(self.m)
            self.v = _from_axes(self.v.mT, new.sides.input, new.U_A).mT
            self.v = _from_axes(self.v, new.sides.output, new.U_B)
            return
        if new.U_A is not old.U_A:
            sides = old.sides.input, new.sides.input
            m, v = _turned(self.m.mT, self.v.mT, *sides, old.U_A.to(dtype), new.U_A)
            self.m, self.v = m.mT.contiguous(), v.mT.contiguous()
        if new.U_B is not old.U_B:
            sides = old.sides.output, new.sides.output
            self.m, self.v = _turned(self.m, self.v, *sides, old.U_B.to(dtype), new.U_B)

    def tensors(self) -> dict[str, Tensor]:
        """All that must be saved."""
        steps = self.m.new_tensor(float(self.steps))
        left = torch.tensor(self.left, dtype=torch.float64, device=self.m.device)
        return {"m": self.m, "v": self.v, "steps": steps, "left": left}


def normalised(
    moments: Sequence[Moments], rotated: Sequence[Tensor], decay: float, *, ahead: bool = False
) -> list[Tensor]:
    """−m/√v of all layers after one more gradient of each, without the bias of their start.

    ahead: with m as it would be if that gradient came once more (Nesterov's momentum).
    """
    if not moments:
        return []
    gradients = list(rotated)
    for one, g in zip(moments, gradients, strict=True):  # the model may have been cast since
        one.m, one.v = one.m.to(g), one.v.to(g)
    m, v = [one.m for one in moments], [one.v for one in moments]
    torch._foreach_lerp_(m, gradients, 1 - decay)
    torch._foreach_mul_(v, SECOND_DECAY)
    torch._foreach_addcmul_(v, gradients, gradients, value=1 - SECOND_DECAY)
    roots = torch._foreach_sqrt(v)
    shares = [LEAST / math.sqrt(max(1, t.numel())) for t in v]
    least = torch._foreach_mul(torch._foreach_norm(roots), shares)
    torch._foreach_clamp_min_(least, TINY)
    torch._foreach_add_(roots, list(least))
    found = torch._foreach_div(torch._foreach_lerp(m, gradients, 1 - decay) if ahead else m, roots)
    corrections = []
    for one in moments:
        one.steps += 1
        one.left *= decay
        # Both corrections are one number: m/(1 − Πβ₁) over √(v/(1 − β₂ⁿ)).
        left = one.left * decay if ahead else one.left
        corrections.append(-math.sqrt(1 - SECOND_DECAY**one.steps) / (1 - left))
    torch._foreach_mul_(found, corrections)
    return list(found)


def in_curvature(
    steps: Mapping[str, Tensor], bases: Mapping[str, EigenInverse], rows: Mapping[str, int]
) -> dict[str, Tensor]:
    """Steps by layer, in their bases, orthogonalised or weighted in their curvature.

    rows: of each layer in a batch. A step that is not orthogonalised has its coordinates weighted
    by the same power of the curvature, and keeps its length. What is not `curved` stays as it is.
    """
    found, flat = dict(steps), {}
    for name, basis in bases.items():
        step = steps[name]
        if curved(step, basis.sides):
            part = in_parts(step, basis.sides)
            if flattenable(step, basis.sides, rows.get(name, 0)):
                flat[name] = part
            else:
                found[name] = weighted(part, basis.metric)
    made = orthogonalised(list(flat.values()), [bases[name].metric for name in flat])
    found.update(zip(flat, made, strict=True))
    return {name: _shaped(X, steps[name].shape) for name, X in found.items()}


def _shaped(X: Tensor, shape: torch.Size) -> Tensor:
    return X if X.shape == shape else X.reshape(shape)


def weighted(step: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """W∘X for a step X (…, d_out, d_in), as long as it was; W is the product of the weights."""
    found = step
    for one in weights:
        found = found * one
    return found.mul_(_length(step) / _length(found).clamp_min_(TINY))


def curved(step: Tensor, sides: Sides) -> bool:
    """Whether a layer's step (…, d_out, d_in) goes by its curvature.

    Not where the outputs' own axes are their basis, as of pixels that are put out: they are equally
    long already in what counts. Nor columns, as of scales and shifts, and single outputs.
    """
    return min(step.shape[-2:]) > 1 and sides.output != DIAGONAL


def flattenable(step: Tensor, sides: Sides, rows: int) -> bool:
    """Whether a step that goes by its curvature should have singular values that are alike.

    rows: of the layer in a batch. Not where they are few, as a hundred for a side of 256: the
    rounds would cost several runs of the layer, forward and backward, for steps that are not so
    much fewer. Nor where an input's own axes are its basis, or the shorter side has no factor in
    full, for the price would be that of one.
    """
    d_out, d_in = step.shape[-2:]
    shorter = sides.output if d_out <= d_in else sides.input
    apt = DIAGONAL not in sides and min(d_out, d_in) >= LEAST_SIDE and shorter == DENSE
    share = 0.5 if _in_half_the_time(in_parts(step, sides)) else 1.0
    return apt and share * price_of_rounds(d_out, d_in) <= PAYS * 6 * rows * d_out * d_in


def half_flattened(step: Tensor, sides: Sides, rows: int) -> bool:
    """Whether a layer's step is orthogonalised in half precision; as `flattenable` has it."""
    apt = curved(step, sides) and flattenable(step, sides, rows)
    return apt and _rough_dtype(in_parts(step, sides)) != step.dtype


def _in_half_the_time(X: Tensor) -> bool:
    """Whether rounds of a matrix, or of several, (…, m, n), are so much faster than in float32."""
    return min(X.shape[-2:]) >= HALVED and _rough_dtype(X) != X.dtype


def _rough_dtype(X: Tensor) -> torch.dtype:
    """The precision of the rounds of a matrix, or of several, (…, m, n)."""
    # Of many products in a row each is cast for half.
    return rough_dtype(X.dtype, X.device, 2 * min(X.shape[-2:]) ** 3)


def price_of_rounds(d_out: int, d_in: int) -> int:
    """Operations that it takes to orthogonalise a matrix."""
    m, n = sorted((d_out, d_in))
    squared = 4 * m * m * n + (6 * ROUNDS) * m**3
    return squared if n >= WIDE * m else ROUNDS * (4 * m * m * n + 2 * m**3)


def orthogonalised(
    steps: Sequence[Tensor], weights: Sequence[Sequence[Tensor]] = ()
) -> list[Tensor]:
    """Matrices (…, d_out, d_in) with singular values nearly alike, each as long as it was.

    weights: of every step X, of its rows (…, d_out, 1) and of its columns (…, 1, d_in), whose
    product is W: W∘polar(W∘X) instead of polar(X). Of the matrices that are as long in the norm
    max σ(Δ/W) it is the one that falls furthest along X.
    Those of one shape together, by products alone (Newton and Schulz; Jordan et al. 2024).
    """
    found = list(steps)
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for i, step in enumerate(steps):
        alike.setdefault((_wide(step).shape, step.dtype), []).append(i)
    for same in alike.values():
        most = max(1, TOGETHER // steps[same[0]].numel())
        for some in (same[k : k + most] for k in range(0, len(same), most)):
            alone = len(some) == 1
            X = _one([_wide(steps[i]) for i in some])
            W = _together([_wide_weights(steps[i], weights[i]) for i in some]) if weights else ()
            length = _length(X)
            for one in W:
                X = X * one
            flat = _in_rounds(X / (_length(X) if W else length).clamp_min(TINY))
            for one in W:
                flat *= one
            flat *= length / _length(flat).clamp_min_(TINY)
            for i, made in zip(some, (flat,) if alone else flat, strict=True):
                found[i] = made if steps[i].shape == made.shape else made.mT
    return found


def _together(weights: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """The weights of several matrices as those of a batch of them."""
    return tuple(_one(side) for side in zip(*weights, strict=True))


def _one(tensors: Sequence[Tensor]) -> Tensor:
    """Matrices, or batches of them, of one shape (…, m, n) as a batch, (k, …, m, n); one alone."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))


def _length(X: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    return length


def _in_rounds(X: Tensor) -> Tensor:
    """Wide matrices (…, m, n), no longer than one, with singular values near one.

    Where that is faster in half precision, as in Jordan et al.: polar is not met by much more.
    """
    if X.dim() > 3:
        return _in_rounds(X.flatten(0, -3)).reshape(X.shape)
    given = X.dtype
    X = X.to(_rough_dtype(X))
    plus = torch.addmm if X.dim() == 2 else torch.baddbmm
    first, third, fifth = QUINTIC
    squared = X.shape[-1] >= WIDE * X.shape[-2]  # fewer products are with X itself
    gram, factor = X @ X.mT, None
    for k in range(ROUNDS):
        Q = plus(gram, gram, gram, beta=third, alpha=fifth)  # and first·I
        last = k + 1 == ROUNDS
        if not squared:
            X = plus(X, Q, X, beta=first)
            gram = gram if last else X @ X.mT
            continue
        if not last:
            gram = plus(gram, Q, gram, beta=first)
            gram = plus(gram, gram, Q, beta=first)
        if factor is None:
            factor = Q
            diagonal(factor).add_(first)
        else:
            factor = plus(factor, Q, factor, beta=first)
    return (X if factor is None else factor @ X).to(given)


def _wide(step: Tensor) -> Tensor:
    return step if step.shape[-2] <= step.shape[-1] else step.mT


def _wide_weights(step: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    is_wide = step.shape[-2] <= step.shape[-1]
    return weights if is_wide else [one.mT for one in reversed(weights)]


def _turned(
    m: Tensor, v: Tensor, before: Structure, now: Structure, U: Tensor, V: Tensor
) -> tuple[Tensor, Tensor]:
    """Means m and mean squares v (…, d, e), of rows in the basis U, in the basis V."""
    if before == now:
        return now.turn(m, v, U, V)
    return now.rotate(V, before.rotate_back(U, m)), _carried(v, before, U, now, V)


def _carried(v: Tensor, before: Structure, U: Tensor, now: Structure, V: Tensor) -> Tensor:
    """Mean squares v (…, d, e) in the basis U, carried into V, which is kept in another way."""
    if before == DIAGONAL:
        return _from_axes(v, now, V)
    if now == DIAGONAL:
        return before.to_axes(v, U)
    between = now.frame(V) @ before.frame(U).mT
    return between.square() @ v


def _from_axes(v: Tensor, now: Structure, V: Tensor) -> Tensor:
    return v if now == DIAGONAL else now.from_axes(v, V)


def restored(kept: Mapping[str, Tensor]) -> Moments:
    """The inverse of `Moments.tensors`."""
    moments = Moments(kept["m"], int(kept["steps"]), float(kept["left"]))
    moments.m, moments.v = kept["m"], kept["v"]
    return moments
