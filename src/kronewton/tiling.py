"""Where a convolution's kernel is laid: the geometry that ties the entries of its matrix W.

At every location the output is the kernel times a window of the input. A transposed convolution
is one too: zeros are spread between its inputs, and its kernel is turned around.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

MODES = {"zeros": "constant", "circular": "circular", "reflect": "reflect"} | {
    "replicate": "replicate"
}


@dataclass(frozen=True)
class Geometry:
    """How windows are cut from an input (N, C, *spatial); one number per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]  # between windows
    dilation: tuple[int, ...]  # between a window's entries
    spread: tuple[int, ...]  # between inputs: zeros are put there if it is above 1
    padding: tuple[tuple[int, int], ...]  # before and after; negative: cut off
    mode: str  # of torch.nn.functional.pad

    def prepared(self, x: Tensor) -> Tensor:
        """The input with what is read beyond it: (N, C, *padded)."""
        for dim, step in enumerate(self.spread, start=2):
            if step > 1:
                x = _spread(x, dim, step)
        if not any(chain(*self.padding)):
            return x
        # F.pad counts from the last dimension.
        return F.pad(x, [*chain(*reversed(self.padding))], self.mode)

    def windows(self, prepared: Tensor) -> Tensor:
        """A view of all windows of a prepared input: (N, C, *locations, *kernel)."""
        size, strides = prepared.shape[2:], prepared.stride()[2:]
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        locations = [(n - r) // s + 1 for n, r, s in zip(size, reach, self.stride, strict=True)]
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
