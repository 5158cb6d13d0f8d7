"""Adam's moments of the gradient in K-FAC's eigenbasis: steps for gradients that are mostly noise.

A Newton step divides by the curvature, and where a gradient is noise it divides noise. A normalised
step moves every coordinate about equally far whatever its gradient's size, and coordinates are told
apart best along the eigenvectors of the factors (Vyas et al. 2024 with Shampoo's factors).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kronewton.inverse import EigenInverse
from kronewton.structure import DIAGONAL, Structure

FIRST_DECAY, SLOW_DECAY, SECOND_DECAY = 0.8, 0.9, 0.95
JOURNEY = 0.03  # of a coordinate, in which its gradient is as good as that of one place
LEAST = 1e-5  # of a layer's root mean square: a coordinate's gradient below counts as this
TINY = 1e-30


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
            axes = self.v.new_zeros(0)
            self.m = new.rotate(self.m)
            self.v = _carried(self.v.mT, DIAGONAL, axes, new.sides.input, new.U_A).mT
            self.v = _carried(self.v, DIAGONAL, axes, new.sides.output, new.U_B)
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


def first_decay(lr: float) -> float:
    """β₁ after a step of this lr: a mean of more gradients where they are of nearly one place.

    m remembers 1/(1 − β₁) steps, in which every coordinate goes lr/(1 − β₁) at most.
    """
    return min(max(FIRST_DECAY, 1 - lr / JOURNEY), SLOW_DECAY) if lr > 0 else FIRST_DECAY


def normalised(moments: Sequence[Moments], rotated: Sequence[Tensor], decay: float) -> list[Tensor]:
    """m/√v of all layers after one more gradient of each, without the bias of their start."""
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
    found = torch._foreach_div(m, roots)
    corrections = []
    for one in moments:
        one.steps += 1
        one.left *= decay
        # Both corrections are one number: m/(1 − Πβ₁) over √(v/(1 − β₂ⁿ)).
        corrections.append(math.sqrt(1 - SECOND_DECAY**one.steps) / (1 - one.left))
    torch._foreach_mul_(found, corrections)
    return list(found)


def _turned(
    m: Tensor, v: Tensor, before: Structure, now: Structure, U: Tensor, V: Tensor
) -> tuple[Tensor, Tensor]:
    """Means m and mean squares v (…, d, e), of rows in the basis U, in the basis V."""
    if before == now:
        R = now.between(U, V)
        return (m, v) if R is None else (now.left(R, m), now.left(R.square(), v))
    return now.rotate(V, before.rotate_back(U, m)), _carried(v, before, U, now, V)


def _carried(v: Tensor, before: Structure, U: Tensor, now: Structure, V: Tensor) -> Tensor:
    """Mean squares v (…, d, e) in the basis U, carried into V; either may be a side's own axes."""
    if before == now:
        return now.carry(v, U, V)
    if before == DIAGONAL:
        return now.left(V.square().mT, v)
    if now == DIAGONAL:
        return before.left(U.square(), v)
    between = now.dense(V).mT @ before.dense(U)
    return between.square() @ v


def restored(kept: Mapping[str, Tensor]) -> Moments:
    """The inverse of `Moments.tensors`."""
    moments = Moments(kept["m"], int(kept["steps"]), float(kept["left"]))
    moments.m, moments.v = kept["m"], kept["v"]
    return moments
