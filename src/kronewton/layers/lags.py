"""The second moment of a convolution's windows from its lags: fewer products than windows have.

At stride 1 the block of A for kernel offsets i and j is Σ_m x(m) x(m + j − i)' over the places m
that the window's entry i visits. All offsets visit the same places but for strips at the border,
so that every block is the sum over the whole input, which depends on the lag j − i alone, less
its strips. A 3×3 kernel has 81 pairs of offsets and 15 lags up to symmetry. The sums over all lags
are the weight gradient of a convolution of the input with itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight


@dataclass(frozen=True)
class Plane:
    """A prepared input as an image, and how windows are cut from it at stride 1."""

    x: Tensor  # (N, groups·C, H, W), each example times its weight
    wide: Tensor  # without weights, with zeros as far as a lag reaches: sideways and below
    kernel: tuple[int, ...]  # two numbers, as everything here
    dilation: tuple[int, ...]
    groups: int
    border: tuple[tuple[int, ...], tuple[int, ...]]  # rows and columns that some offset leaves out

    @property
    def reach(self) -> tuple[int, int]:
        """How far apart two entries of a window are at most."""
        (kh, kw), (dh, dw) = self.kernel, self.dilation
        return dh * (kh - 1), dw * (kw - 1)

    def lagged(self, rows: slice, columns: slice) -> Tensor:
        """Σ x(m) x(m + lag)' over the m of some rows and columns: (groups, C, C, kh, 2kw − 1)."""
        (down, across), (kh, kw) = self.reach, self.kernel
        top, height = rows.start, rows.stop - rows.start
        left, width = columns.start, columns.stop - columns.start
        wide = self.wide[:, :, top : top + height + down, left : left + width + 2 * across]
        C = self.x.shape[1] // self.groups
        size = (self.x.shape[1], C, kh, 2 * kw - 1)
        given = self.x[:, :, rows, columns]
        found: Tensor = conv2d_weight(wide, size, given, dilation=self.dilation, groups=self.groups)
        return found.reshape(self.groups, C, *size[1:])


def lag_moment(
    x: Tensor,
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    weights: Tensor | None,
    zeros: Sequence[tuple[int, int]],
) -> Tensor:
    """Second moment of all windows of x (N, groups·C, H, W): (groups, C·kernel, C·kernel).

    weights: (N,), of the examples. zeros: how many rows and columns at either border of x are
    known to be zero, which saves their strips.
    """
    weighted = x if weights is None else x * weights.reshape(-1, 1, 1, 1)
    down, across = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    # Lags go down only: those that go up are the transposes of their opposites.
    wide = F.pad(x, (across, across, 0, down))
    rows, columns = _border(x.shape[2], down, zeros[0]), _border(x.shape[3], across, zeros[1])
    plane = Plane(weighted, wide, kernel, dilation, groups, (rows, columns))
    return _assembled(_by_offset(plane), kernel)


def _border(size: int, reach: int, zeros: tuple[int, int]) -> tuple[int, ...]:
    """The lines that some offset leaves out, those aside that hold zeros."""
    left_out = {*range(reach), *range(size - reach, size)}
    return tuple(sorted(left_out & set(range(zeros[0], size - zeros[1]))))


def _by_offset(plane: Plane) -> Tensor:
    """Σ x(m) x(m + lag)' over what each offset visits: (kh, kw, groups, C, C, kh, 2kw − 1)."""
    H, W = plane.x.shape[2:]
    rows, columns = plane.border
    whole = plane.lagged(slice(0, H), slice(0, W))
    L = whole.expand(*plane.kernel, *whole.shape).clone()
    out_rows, out_columns = (_left_out(plane, axis) for axis in (0, 1))  # (kh, rows), (kw, columns)
    for r, leaving in zip(rows, out_rows.T, strict=True):
        L -= leaving.reshape(-1, *[1] * 6) * plane.lagged(slice(r, r + 1), slice(0, W))
    for c, leaving in zip(columns, out_columns.T, strict=True):
        L -= leaving.reshape(-1, *[1] * 5) * plane.lagged(slice(0, H), slice(c, c + 1))
    for (i, r), (j, c) in product(enumerate(rows), enumerate(columns)):
        both = torch.outer(out_rows[:, i], out_columns[:, j])  # taken off twice above
        L += both.reshape(*both.shape, *[1] * 5) * plane.lagged(slice(r, r + 1), slice(c, c + 1))
    return L


def _left_out(plane: Plane, axis: int) -> Tensor:
    """Whether an offset leaves a border line out, (offsets, lines) of 0 and 1."""
    lines = torch.tensor(plane.border[axis], dtype=torch.long, device="cpu")
    start = plane.dilation[axis] * torch.arange(plane.kernel[axis], device="cpu").unsqueeze(1)
    visits = plane.x.shape[2 + axis] - plane.reach[axis]
    return ((lines < start) | (lines >= start + visits)).to(plane.x)


def _assembled(L: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The blocks of all pairs of offsets, (groups, C·kernel, C·kernel)."""
    kh, kw = kernel
    offsets = torch.tensor(list(product(range(kh), range(kw))), device="cpu")
    first, second = (
        o.flatten()
        for o in torch.meshgrid(*[torch.arange(kh * kw, device="cpu")] * 2, indexing="ij")
    )
    up = offsets[second, 0] < offsets[first, 0]  # a lag that goes up: the opposite, transposed
    i, j = torch.where(up, second, first), torch.where(up, first, second)
    lag = offsets[j] - offsets[i]
    blocks = L[offsets[i, 0], offsets[i, 1], :, :, :, lag[:, 0], lag[:, 1] + kw - 1]
    blocks = torch.where(up.to(L.device).reshape(-1, 1, 1, 1), blocks.mT, blocks)
    groups, C = blocks.shape[1:3]
    blocks = blocks.reshape(kh * kw, kh * kw, groups, C, C)  # (first, second, groups, C, C')
    size = C * kh * kw
    return blocks.permute(2, 3, 0, 4, 1).reshape(groups, size, size)
