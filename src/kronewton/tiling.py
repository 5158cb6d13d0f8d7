"""Where a small matrix U is laid in a large one: W = Σ_s R_s' U C_s, that is vec(W) = K u.

C_s picks the inputs that position s reads, R_s' puts its outputs where they belong. For a
convolution the positions are the locations of its kernel: the output there is the kernel times a
window of the input. A transposed convolution is one too: zeros are spread between its inputs, and
its kernel is turned around. For a module called on tokens the positions are the calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from kronewton.errors import ModelError

MODES = {"zeros": "constant", "circular": "circular", "reflect": "reflect"} | {
    "replicate": "replicate"
}
LARGER = {"circular": 0, "reflect": 1}  # than its padding an input must be, by how much
LIMIT = 4 * 2**30  # bytes of a K; to sort its entries takes about three times as many for a while


@dataclass(frozen=True)
class Geometry:
    """How windows are cut from an input (N, C, *spatial); one number per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]  # between windows
    dilation: tuple[int, ...]  # between a window's entries
    spread: tuple[int, ...]  # between inputs: zeros are put there if it is above 1
    padding: tuple[tuple[int, int], ...]  # before and after; negative: cut off
    mode: str  # of torch.nn.functional.pad

    @property
    def zeros(self) -> tuple[tuple[int, int], ...]:
        """How many zeros the prepared input has before and after, in each dimension, at least."""
        if self.mode != "constant":
            return ((0, 0),) * len(self.kernel)
        return tuple((max(before, 0), max(after, 0)) for before, after in self.padding)

    @property
    def reach(self) -> list[int]:
        """How many entries of a prepared input a window spans."""
        return [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]

    @property
    def least(self) -> list[int]:
        """The smallest spatial size of an input that there is a window of."""
        sizes = []
        sides = zip(self.padding, self.reach, self.spread, strict=True)
        for (before, after), reach, spread in sides:
            window = ceil((reach - 1 - before - after) / spread) + 1
            beyond = max(before, after) + LARGER[self.mode] if self.mode in LARGER else 1
            sizes.append(max(1, window, beyond))
        return sizes

    def locations(self, spatial: tuple[int, ...]) -> int:
        """How many windows there are of an input of this spatial size."""
        padded = [
            s * (n - 1) + 1 + sum(pair)
            for n, s, pair in zip(spatial, self.spread, self.padding, strict=True)
        ]
        return prod(
            (n - r) // s + 1 for n, r, s in zip(padded, self.reach, self.stride, strict=True)
        )

    def prepared(self, x: Tensor) -> Tensor:
        """The input with what is read beyond it: (N, C, *padded)."""
        for dim, step in enumerate(self.spread, start=2):
            if step > 1:
                x = _spread(x, dim, step)
        flat = [*chain(*reversed(self.padding))]  # F.pad counts from the last dimension
        if any(p > 0 for p in flat):
            x = F.pad(x, [max(p, 0) for p in flat], self.mode)
        if any(p < 0 for p in flat):  # afterwards: more may be cut off than there was at first
            x = F.pad(x, [min(p, 0) for p in flat])
        return x

    def windows(self, prepared: Tensor) -> Tensor:
        """A view of all windows of a prepared input: (N, C, *locations, *kernel)."""
        size, strides = prepared.shape[2:], prepared.stride()[2:]
        locations = [
            (n - r) // s + 1 for n, r, s in zip(size, self.reach, self.stride, strict=True)
        ]
        steps = [a * b for a, b in zip(strides, self.stride, strict=True)]
        inner = [a * b for a, b in zip(strides, self.dilation, strict=True)]
        return prepared.as_strided(
            (*prepared.shape[:2], *locations, *self.kernel),
            (*prepared.stride()[:2], *steps, *inner),
            prepared.storage_offset(),
        )


def geometry(
    conv: nn.Module, inputs: tuple[int, ...], outputs: tuple[int, ...] | None = None
) -> Geometry:
    """The geometry of an nn.Conv1d/2d/3d or its transposed form for one spatial size of its input.

    The spatial size of the output is only needed where forward() was given an `output_size`.
    """
    assert isinstance(conv, _ConvNd)
    ones = (1,) * len(conv.kernel_size)
    if isinstance(conv, _ConvTransposeNd):
        padding = _transposed_padding(conv, inputs, outputs)
        return Geometry(conv.kernel_size, ones, conv.dilation, conv.stride, padding, "constant")
    # torch keeps it from the last dimension on, before and after, in numbers also for "same".
    flat = conv._reversed_padding_repeated_twice
    padding = tuple((flat[i], flat[i + 1]) for i in reversed(range(0, len(flat), 2)))
    mode = MODES[conv.padding_mode]
    return Geometry(conv.kernel_size, conv.stride, conv.dilation, ones, padding, mode)


def _transposed_padding(
    conv: _ConvTransposeNd, inputs: tuple[int, ...], outputs: tuple[int, ...] | None
) -> tuple[tuple[int, int], ...]:
    pairs = []
    for d in range(len(conv.kernel_size)):
        assert not isinstance(conv.padding, str)
        before = conv.dilation[d] * (conv.kernel_size[d] - 1) - conv.padding[d]
        after = before + conv.output_padding[d]
        if outputs is not None:  # windows · 1 = outputs
            whole = conv.stride[d] * (inputs[d] - 1) + 1
            after = outputs[d] + conv.dilation[d] * (conv.kernel_size[d] - 1) - whole - before
        pairs.append((before, after))
    return tuple(pairs)


def _spread(x: Tensor, dim: int, step: int) -> Tensor:
    """Zeros between neighbours along one dimension: n entries become step·(n − 1) + 1."""
    shape = list(x.shape)
    shape[dim] = step * (shape[dim] - 1) + 1
    wide = x.new_zeros(shape)
    wide.narrow(dim, 0, shape[dim])[(slice(None),) * dim + (slice(None, None, step),)] = x
    return wide


@dataclass(frozen=True)
class Tying:
    """W = Σ_s R_s' U C_s as positions: what each of them reads, and where it puts what it makes.

    With groups each has a U of its own, and W is the sum over the groups too.
    """

    shape: tuple[int, int]  # (m, n) of W
    inputs: Tensor  # (groups, S, d_in): which of the n inputs is read; −1: padding
    outputs: Tensor  # (groups, S, d_out): which of the m outputs is made; −1: none
    entries: Tensor  # (groups, d_out, d_in): which entry of u is here in U; each of them once

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """K (mn, size of u), sparse: vec(W) = K u, vec stacking columns.

        COO and coalesced: it is transposed for nothing, and CSR is not finished in torch.
        """
        m, n = self.shape
        group, s, i = (self.inputs >= 0).nonzero(as_tuple=True)
        outputs = self.outputs[group, s]  # (·, d_out)
        rows = self.inputs[group, s, i].unsqueeze(1) * m + outputs
        columns = self.entries.mT[group, i]  # (·, d_out)
        index = torch.stack([rows, columns])[:, outputs >= 0]
        ones = torch.ones(index.shape[1], dtype=dtype, device=index.device)
        size = (m * n, self.entries.numel())
        with torch.sparse.check_sparse_tensor_invariants(enable=False):  # some torch warn if unsaid
            return torch.sparse_coo_tensor(index, ones, size).coalesce()

    def read(self, A: Tensor) -> Tensor:
        """C_s A for every position: (n, N) → (groups, S, d_in, N)."""
        return _picked(A, self.inputs)

    def made(self, B: Tensor) -> Tensor:
        """R_s B for every position: (m, p) → (groups, S, d_out, p)."""
        return _picked(B, self.outputs)

    def small(self, u: Tensor) -> Tensor:
        """U of every group: (size of u) → (groups, d_out, d_in)."""
        return u[self.entries]

    def flat(self, U: Tensor) -> Tensor:
        """The u that these U are made of: `small` undone."""
        u = U.new_empty(U.numel())
        u[self.entries.flatten()] = U.flatten()
        return u


def _picked(rows: Tensor, index: Tensor) -> Tensor:
    return torch.cat([rows, torch.zeros_like(rows[:1])])[index]  # −1 is the row of zeros


def tied_convolution(conv: nn.Module, input_shape: tuple[int, ...]) -> Tying:
    """A convolution of one example: W is C_out·locations × C_in·spatial, u the flattened weight.

    input_shape is (C_in, *spatial); a batch size in front is ignored, all examples share W. The
    bias is no part of W. Raises ModelError for what is no convolution or does not fit, and if
    the tiling matrix would be larger than LIMIT.
    """
    conv = _checked(conv)
    spatial = _spatial(conv, input_shape)
    cut = geometry(conv, spatial)
    _check_size(conv, cut, spatial, input_shape)
    S, G, C_in, C_out = cut.locations(spatial), conv.groups, conv.in_channels, conv.out_channels
    transposed = isinstance(conv, _ConvTransposeNd)
    # Whichever way it is turned, an entry of u stands at most once at every place of the smaller.
    uses = min(S, prod(spatial)) if transposed else S
    _refuse_above_limit(uses * conv.weight.numel(), conv.weight.element_size())
    # The windows of an image of indices say where the entries of a window come from.
    m, n, device = C_out * S, C_in * prod(spatial), conv.weight.device
    image = torch.arange(1, n + 1, dtype=torch.float64, device=device)
    windows = cut.windows(cut.prepared(image.reshape(1, C_in, *spatial)))
    inputs = windows.reshape(G, C_in // G, S, -1).transpose(1, 2).reshape(G, S, -1)
    outputs = torch.arange(m, device=device).reshape(G, C_out // G, S).mT
    return Tying((m, n), inputs.long() - 1, outputs, _entries(conv))


def tied_calls(d_out: int, d_in: int, calls: int, device: torch.device | str = "cpu") -> Tying:
    """A d_out × d_in matrix used in several calls or on several tokens: W has it on its diagonal.

    The inputs of one call stand together, and so do its outputs; u is the matrix row by row, as
    torch flattens a weight.
    """
    if min(d_out, d_in, calls) < 1:
        raise ModelError(
            f"d_out={d_out}, d_in={d_in} and calls={calls} are given; whole numbers from 1 up are "
            "allowed. Give the two sides of the weight and how often it is used."
        )
    _refuse_above_limit(calls * d_out * d_in, 8)
    inputs, outputs = (
        torch.arange(calls * d, device=device).reshape(1, calls, d) for d in (d_in, d_out)
    )
    entries = torch.arange(d_out * d_in, device=device).reshape(1, d_out, d_in)
    return Tying((calls * d_out, calls * d_in), inputs, outputs, entries)


def _entries(conv: _ConvNd) -> Tensor:
    """Where the entries of the flattened weight stand in U: (groups, d_out, d_in)."""
    numbered = torch.arange(conv.weight.numel(), device=conv.weight.device)
    G, C_in, C_out = conv.groups, conv.in_channels // conv.groups, conv.out_channels // conv.groups
    if not isinstance(conv, _ConvTransposeNd):
        return numbered.reshape(G, C_out, -1)
    turned = numbered.reshape(G, C_in, C_out, -1).flip(-1)  # all spatial dimensions at once
    return turned.transpose(1, 2).reshape(G, C_out, -1)


def _checked(conv: nn.Module) -> _ConvNd:
    if not isinstance(conv, _ConvNd):
        raise ModelError(
            f"a module of type {type(conv).__name__} is given; nn.Conv1d, 2d, 3d and "
            "nn.ConvTranspose1d, 2d, 3d are allowed. For a module that is called on several "
            "positions see tied_calls."
        )
    if is_lazy(conv.weight) or conv.weight.is_meta:
        raise ModelError(
            f"{type(conv).__name__} has a weight without numbers (lazy, or on the meta device); a "
            "weight of known shape and device is allowed. Call the module once, or move it with "
            ".to_empty(device=…)."
        )
    return conv


def _spatial(conv: _ConvNd, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The spatial part of an input's shape."""
    dims, shape = len(conv.kernel_size), tuple(input_shape)
    example = shape[-dims - 1 :]
    if len(shape) - dims not in (1, 2) or example[0] != conv.in_channels or min(shape) < 1:
        sides = ", ".join("DHW"[-dims:])
        raise ModelError(
            f"input_shape={shape} is given for {conv}; ({conv.in_channels}, {sides}) is allowed, "
            "with a batch size in front or without. Give the shape of one example as the "
            "convolution is given it."
        )
    return example[1:]


def _check_size(
    conv: _ConvNd, cut: Geometry, spatial: tuple[int, ...], input_shape: tuple[int, ...]
) -> None:
    sides = zip(conv.output_padding, conv.stride, conv.dilation, strict=True)
    if any(extra >= max(stride, dilation) for extra, stride, dilation in sides if extra):
        raise ModelError(
            f"{conv} has an output_padding as large as its stride and its dilation, which torch "
            "does not run; less than the larger of the two is allowed. Make it smaller."
        )
    least = (conv.in_channels, *cut.least)
    if any(n < fewest for n, fewest in zip(spatial, cut.least, strict=True)):
        raise ModelError(
            f"input_shape={tuple(input_shape)} is too small for {conv}; from {least} on is "
            "allowed. Give a larger input, or the convolution another padding."
        )


def _refuse_above_limit(entries: int, element_size: int) -> None:
    size = entries * (16 + element_size)  # two indices and a value
    if size > LIMIT:
        raise ModelError(
            f"the tiling matrix K would take {size:,} bytes ({size / 2**30:.1f} GiB); up to "
            f"{LIMIT / 2**30:g} GiB is allowed. Give a smaller input, or products with the "
            "curvature that need no K: kronewton.operators."
        )
