"""`nn.Conv1d/2d/3d` and their transposed forms: one row a for each location, its window.

A location is a position that shares the weight. Groups are a batch of blocks beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kronewton.layers.base import DenseRows, Kind, Layer, with_bias_entry
from kronewton.layers.lags import lag_moment
from kronewton.linalg import second_moment
from kronewton.structure import DENSE, Structure
from kronewton.tiling import Geometry, geometry
from kronewton.types import Rows

CHUNK = 1 << 22  # numbers in the windows that are laid out at a time
LEAST_CHANNELS = 16  # for lags to pay
MOST_ENTRIES = 25  # of a kernel, likewise: lags grow with their square
STRIPS = 4  # times the border that some offset leaves out must fit into the input
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TORCHS = [
    (kind.forward, getattr(kind, "_conv_forward", None)) for kind in CONVOLUTIONS + TRANSPOSED
]


class ConvolutionKind(Kind):
    """y = W a + bias at every location; d_in counts the entries of a window of one group."""

    name = "convolution"

    def example_dims(self, layer: Layer) -> int:
        return len(_conv(layer).kernel_size) + 1

    def input_rows(self, layer: Layer, inputs: Tensor, outputs: torch.Size) -> Rows:
        conv, D = _conv(layer), self.example_dims(layer)
        x = inputs if inputs.dim() > D else inputs.unsqueeze(0)  # (N, C, *spatial)
        locations = tuple(outputs[-D + 1 :])
        if "weight" not in layer.trained:
            ones = x.new_ones(len(x), math.prod(locations), 1)
            return DenseRows(ones if conv.groups == 1 else ones.expand(conv.groups, *ones.shape))
        cut = geometry(conv, tuple(x.shape[2:]), locations)
        # Channels last: what lies together in a window then lies together in memory, too.
        prepared = cut.prepared(x).movedim(1, -1).contiguous().movedim(-1, 1)
        return Windows(prepared, cut, conv.groups, "bias" in layer.trained)

    def output_rows(self, layer: Layer, gradients: Tensor) -> Tensor:
        conv, D = _conv(layer), self.example_dims(layer)
        u = gradients if gradients.dim() > D else gradients.unsqueeze(0)
        N, C = u.shape[:2]
        rows = u.reshape(N, conv.groups, C // conv.groups, math.prod(u.shape[2:]))
        return _without_one(rows.permute(1, 0, 3, 2))  # (groups, N, S, d_out)

    def matrix(self, layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
        groups = _conv(layer).groups
        parts = []
        if "weight" in layer.trained:
            parts.append(self._flattened(tensors["weight"], groups))
        if "bias" in layer.trained:
            parts.append(tensors["bias"].reshape(groups, -1, 1))
        return _without_one(parts[0] if len(parts) == 1 else torch.cat(parts, -1))

    def split(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        blocks = matrix if matrix.dim() == 3 else matrix.unsqueeze(0)  # (groups, d_out, d_in)
        found = {}
        if "bias" in layer.trained:
            found["bias"] = blocks[..., -1].reshape(-1)
            blocks = blocks[..., :-1]
        if "weight" in layer.trained:
            weight = layer.parameters()["weight"]
            found["weight"] = self._unflattened(blocks, weight.shape)
        return found

    def _flattened(self, weight: Tensor, groups: int) -> Tensor:
        """(C_out, C_in/groups, *kernel) → (groups, C_out/groups, C_in/groups·kernel)."""
        return weight.reshape(groups, len(weight) // groups, -1)

    def _unflattened(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks.reshape(shape)

    def refusal(self, module: nn.Module) -> str:
        own = type(module).forward, getattr(type(module), "_conv_forward", None)
        replaced = vars(module).keys() & {"forward", "_conv_forward"}
        if not isinstance(module, _ConvNd) or own not in TORCHS or replaced:
            return "its forward is not that of torch's convolution"
        if not all(p.is_floating_point() for p in module.parameters()):
            return "its parameters are not real floating-point numbers"
        return ""


class TransposedKind(ConvolutionKind):
    """The same on an input with zeros spread in it, with the kernel turned around."""

    name = "transposed convolution"

    def _flattened(self, weight: Tensor, groups: int) -> Tensor:
        """(C_in, C_out/groups, *kernel) → (groups, C_out/groups, C_in/groups·kernel)."""
        turned = weight.flip(*range(2, weight.dim()))
        split = turned.reshape(groups, len(weight) // groups, *weight.shape[1:])
        return split.transpose(1, 2).flatten(2)

    def _unflattened(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        groups, d_out = blocks.shape[:2]
        split = blocks.reshape(groups, d_out, shape[0] // groups, *shape[2:])
        return split.transpose(1, 2).reshape(shape).flip(*range(2, len(shape)))


@dataclass(frozen=True, eq=False)
class Windows(Rows):
    """The windows of an input, one row for each location, laid out a chunk at a time."""

    prepared: Tensor  # (N, C, *padded), channels last in memory
    cut: Geometry
    groups: int
    bias: bool

    @cached_property
    def counts(self) -> tuple[int, int]:
        D = len(self.cut.kernel)
        return len(self.prepared), self._view.shape[2 : 2 + D].numel()

    @cached_property
    def _view(self) -> Tensor:
        return self.cut.windows(self.prepared)  # (N, C, *locations, *kernel)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        (_, S), D = self.counts, len(self.cut.kernel)
        view = self._view[start:stop].flatten(2 + D)  # (n, C, *locations, kernel)
        n, C, kernel = len(view), view.shape[1], view.shape[-1]
        rows = view.reshape(n, self.groups, C // self.groups, S, kernel)
        rows = rows.permute(1, 0, 3, 2, 4).flatten(3)  # (groups, n, S, d_in)
        return _without_one(with_bias_entry(rows) if self.bias else rows)

    @property
    def width(self) -> int:
        C = self.prepared.shape[1] // self.groups
        return C * math.prod(self.cut.kernel) + self.bias

    def second_moment(self, weights: Tensor | None = None, structure: Structure = DENSE) -> Tensor:
        if structure != DENSE:
            return self._in_part(weights, structure)
        of_examples = weights is None or weights.shape[1] == 1 or not any(weights.stride()[1:])
        if of_examples and self._pays():
            return self._from_lags(None if weights is None else weights[:, 0])
        return self._from_chunks(weights)

    def _in_part(self, weights: Tensor | None, structure: Structure) -> Tensor:
        """What a structure keeps, laying windows out a chunk of examples at a time."""
        step = self._step
        moments = [
            structure.second_moment(
                self.dense(n, n + step).flatten(-3, -2),
                None if weights is None else weights[n : n + step].reshape(-1),
            )
            for n in range(0, self.counts[0], step)
        ]
        return torch.stack(moments).sum(0)

    def _pays(self) -> bool:
        """Whether lags are cheaper than windows; measured on a CPU only."""
        cut, sizes = self.cut, self.prepared.shape[2:]
        return (
            len(cut.kernel) <= 2
            and all(stride == 1 for stride in cut.stride)
            and 1 < math.prod(cut.kernel) <= MOST_ENTRIES
            and all(n >= STRIPS * (r - 1) for n, r in zip(sizes, cut.reach, strict=True))
            and self.prepared.shape[1] >= LEAST_CHANNELS
            and self.prepared.device.type == "cpu"
        )

    def _from_lags(self, weights: Tensor | None) -> Tensor:
        """Through `lags`, a bias entry added; `weights` (N,) are those of the examples."""
        x, cut = self.prepared, self.cut
        if len(cut.kernel) == 1:
            x = x.unsqueeze(2)
        kernel, dilation = ((1, *n)[-2:] for n in (cut.kernel, cut.dilation))
        zeros = ((0, 0), *cut.zeros)[-2:]
        moment = lag_moment(x, kernel, dilation, self.groups, weights, zeros)
        if not self.bias:
            return _without_one(moment)
        weighted = x if weights is None else x * weights.reshape(-1, 1, 1, 1)
        N, S = self.counts
        count = x.new_tensor(N * S) if weights is None else weights.sum() * S
        image = weighted.sum(0, keepdim=True).reshape(1, *self.prepared.shape[1:])
        D = len(cut.kernel)
        sums = cut.windows(image).sum(tuple(range(2, 2 + D)))  # (1, groups·C, *kernel)
        last = torch.cat([sums.reshape(self.groups, -1), count.expand(self.groups, 1)], 1)
        with_row = torch.cat([moment, last[:, None, :-1]], 1)
        return _without_one(torch.cat([with_row, last.unsqueeze(-1)], 2))

    def _from_chunks(self, weights: Tensor | None) -> Tensor:
        """Laying windows out, a chunk of examples at a time."""
        C, kernel = self.prepared.shape[1] // self.groups, math.prod(self.cut.kernel)
        moment: Tensor | None = None
        for rows, weight in self._chunks(weights):
            part = second_moment(with_bias_entry(rows) if self.bias else rows, weight)
            moment = part if moment is None else moment.add_(part)
        if moment is None:
            moment = self.prepared.new_zeros(self.groups, self.width, self.width)
        return _without_one(_channels_first(moment, C, kernel))

    def squares(self) -> Tensor:
        N, S = self.counts
        squared = Windows(self.prepared.square(), self.cut, self.groups, False)
        return squared._sums().sum() + (self.groups * N * S if self.bias else 0)

    def product(self, b: Tensor) -> Tensor:
        C, kernel = self.prepared.shape[1] // self.groups, math.prod(self.cut.kernel)
        step = self._step
        b = b if b.dim() == 4 else b.unsqueeze(0)  # (groups, N, S, d_out)
        total = b.new_zeros(self.groups, b.shape[-1], kernel * C)
        for i, (rows, _) in enumerate(self._chunks(None)):
            total += b[:, i * step : (i + 1) * step].flatten(1, 2).mT @ rows.to(b.dtype)
        found = total.unflatten(-1, (kernel, C)).mT.flatten(-2)  # as torch's weights have it
        if self.bias:
            found = torch.cat([found, b.sum((1, 2)).unsqueeze(-1)], -1)
        return _without_one(found)

    def some(self, start: int, stop: int) -> Rows:
        return Windows(self.prepared[start:stop], self.cut, self.groups, self.bias)

    def averaged(self, shares: Tensor | None = None) -> Rows:
        if shares is None:
            mean = self._sums() / self.counts[1]  # (N, C, *kernel)
            rows = mean.reshape(len(mean), self.groups, 1, -1).transpose(0, 1)
            return DenseRows(_without_one(rows), self.bias)
        step = self._step
        found = [
            shares[n : n + step].unsqueeze(-2) @ self.dense(n, n + step)
            for n in range(0, len(shares), step)
        ]
        return DenseRows(torch.cat(found, -3))  # (…, N, 1, d_in)

    def _sums(self) -> Tensor:
        """Of all windows of an example, added one axis at a time: (N, C, *kernel)."""
        cut, found = self.cut, self.prepared
        axes = zip(cut.kernel, cut.stride, cut.dilation, self._view.shape[2:], strict=False)
        for kernel, stride, dilation, locations in axes:
            reach = stride * (locations - 1) + 1
            starts = range(0, kernel * dilation, dilation)
            # The axis that is done goes last, and the next one is third again.
            sums = [found.narrow(2, i, reach)[:, :, ::stride].sum(2) for i in starts]
            found = torch.stack(sums, -1)
        return found

    @property
    def _step(self) -> int:
        """Examples in a chunk."""
        return max(1, CHUNK // max(1, self._view[:1].numel()))

    def _chunks(self, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Some examples' rows (groups, n·S, kernel·C), channels innermost, and their weights."""
        N, S = self.counts
        view = self._view.movedim(1, -1)  # (N, *locations, *kernel, C)
        step = self._step
        for n in range(0, N, step):
            part = view[n : n + step]
            rows = part.reshape(len(part) * S, math.prod(self.cut.kernel), self.groups, -1)
            rows = rows.movedim(2, 0).flatten(2)
            yield rows, None if weights is None else weights[n : n + step].reshape(-1)


def _channels_first(moment: Tensor, C: int, kernel: int) -> Tensor:
    """Rows (kernel, C) in the order of torch's weights, (C, kernel); a bias entry stays last."""
    if C == 1 or kernel == 1:
        return moment
    d = C * kernel
    inner = moment[:, :d, :d].unflatten(2, (kernel, C)).unflatten(1, (kernel, C))
    turned: Tensor = inner.permute(0, 2, 1, 4, 3)
    if moment.shape[-1] == d:
        return turned.reshape(moment.shape)
    found = torch.empty_like(moment)
    found[:, :d, :d].unflatten(2, (C, kernel)).unflatten(1, (C, kernel)).copy_(turned)
    last = moment[:, d, :d].unflatten(1, (kernel, C)).mT.flatten(1)
    found[:, d, :d], found[:, :d, d], found[:, d, d] = last, last, moment[:, d, d]
    return found


def _conv(layer: Layer) -> _ConvNd:
    assert isinstance(layer.module, _ConvNd)
    return layer.module


def _without_one(blocks: Tensor) -> Tensor:
    """A batch of one block as the block itself."""
    return blocks.squeeze(0) if blocks.shape[0] == 1 else blocks
