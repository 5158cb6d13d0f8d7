"""Each kind of layer, one row for each form of it; the tests of layers run over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from zoo import Conv1D


@dataclass(frozen=True)
class Case:
    """A layer, and the shape of one example of its input, or its inputs where they are others."""

    name: str
    make: Callable[[], nn.Module]
    example: tuple[int, ...] = ()
    inputs: Callable[[], tuple[torch.Tensor, ...]] | None = None

    def drawn(self) -> tuple[torch.Tensor, ...]:
        """Inputs of a batch of several examples."""
        return (torch.randn(4, *self.example),) if self.inputs is None else self.inputs()

    def __str__(self) -> str:
        return self.name


def normal(*shape: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randn(shape),)


def tokens() -> tuple[torch.Tensor, ...]:
    return (_tokens(4, 3),)


CASES = [
    Case("linear", lambda: nn.Linear(3, 2), (3,)),
    Case("linear, tokens", lambda: nn.Linear(3, 2), (4, 3)),
    Case("linear, an image of tokens", lambda: nn.Linear(3, 2), (2, 3, 3)),
    Case("linear, no bias", lambda: nn.Linear(3, 2, bias=False), (3,)),
    Case("GPT-2's Conv1D", lambda: Conv1D(2, 3), inputs=normal(4, 3)),
    Case("GPT-2's Conv1D, tokens", lambda: Conv1D(2, 3), inputs=normal(4, 5, 3)),
    Case("conv1d", lambda: nn.Conv1d(2, 3, 2), (2, 5)),
    Case("conv1d, one window", lambda: nn.Conv1d(2, 3, 4), (2, 4)),
    Case("conv1d, causal reach", lambda: nn.Conv1d(2, 3, 2, dilation=3, padding=3), (2, 5)),
    Case("conv1d, same", lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 5)),
    Case("conv2d", lambda: nn.Conv2d(2, 3, 2), (2, 3, 4)),
    Case("conv2d, no bias", lambda: nn.Conv2d(2, 3, 2, bias=False), (2, 3, 4)),
    Case("conv2d, 1×1", lambda: nn.Conv2d(2, 3, 1), (2, 3, 2)),
    Case("conv2d, stride", lambda: nn.Conv2d(2, 3, 3, (2, 1), 1), (2, 5, 4)),
    Case("conv2d, same", lambda: nn.Conv2d(1, 2, (2, 3), padding="same"), (1, 3, 4)),
    Case("conv2d, valid", lambda: nn.Conv2d(1, 2, 2, padding="valid"), (1, 3, 4)),
    Case("conv2d, dilation", lambda: nn.Conv2d(2, 3, 2, 1, (1, 2), (2, 3)), (2, 5, 4)),
    Case("conv2d, circular", lambda: _padded("circular"), (2, 4, 3)),
    Case("conv2d, reflect", lambda: _padded("reflect"), (2, 4, 3)),
    Case("conv2d, replicate", lambda: _padded("replicate"), (2, 4, 3)),
    Case("conv2d, two groups", lambda: nn.Conv2d(4, 6, 2, groups=2), (4, 3, 3)),
    Case("conv2d, depthwise", lambda: nn.Conv2d(3, 3, 3, 1, 1, groups=3), (3, 3, 3)),
    Case("conv2d, multiplier", lambda: nn.Conv2d(2, 4, 2, groups=2, bias=False), (2, 3, 3)),
    Case("conv3d", lambda: nn.Conv3d(2, 2, 2, (1, 2, 1), (0, 1, 0)), (2, 2, 2, 3)),
    Case("transposed 1d", lambda: nn.ConvTranspose1d(2, 3, 3, 2, 1, 1), (2, 3)),
    Case("transposed 2d", lambda: nn.ConvTranspose2d(3, 2, 2), (3, 2, 3)),
    Case("transposed 2d, no bias", lambda: nn.ConvTranspose2d(2, 2, 3, 2, bias=False), (2, 2, 2)),
    Case("transposed 2d, cropped", lambda: nn.ConvTranspose2d(2, 3, 2, 2, 2), (2, 4, 3)),
    Case("transposed 2d, two groups", lambda: nn.ConvTranspose2d(4, 6, 2, 2, groups=2), (4, 2, 2)),
    Case(
        "transposed 2d, dilation",
        lambda: nn.ConvTranspose2d(2, 3, 2, (1, 2), 1, (1, 0), dilation=2),
        (2, 3, 2),
    ),
    Case("transposed 3d", lambda: nn.ConvTranspose3d(2, 2, 2, (1, 2, 1)), (2, 1, 2, 2)),
    Case("linear on tokens", lambda: nn.Embedding(6, 3), inputs=tokens),
    Case("padded tokens", lambda: nn.Embedding(6, 3, padding_idx=1), inputs=tokens),
    Case("bag, sum", lambda: nn.EmbeddingBag(6, 3, mode="sum"), inputs=tokens),
    Case("bag, mean", lambda: nn.EmbeddingBag(6, 3, padding_idx=2), inputs=tokens),
    Case(
        "bag, offsets",
        lambda: nn.EmbeddingBag(6, 3),
        inputs=lambda: (_tokens(7), torch.tensor([0, 2, 2, 6])),
    ),
    Case(
        "bag, last offset and weights",
        lambda: nn.EmbeddingBag(6, 3, mode="sum", include_last_offset=True),
        inputs=lambda: (_tokens(7), torch.tensor([0, 3, 7]), torch.rand(7)),
    ),
    Case("layer norm", lambda: nn.LayerNorm(3), inputs=normal(4, 2, 3)),
    Case("layer norm, images", lambda: nn.LayerNorm((2, 3)), inputs=normal(4, 2, 3)),
    Case("RMS norm", lambda: nn.RMSNorm(3), inputs=normal(4, 2, 3)),
    Case("group norm", lambda: nn.GroupNorm(2, 4), inputs=normal(4, 4, 3, 2)),
    Case("batch norm", lambda: nn.BatchNorm1d(3), inputs=normal(4, 3)),
    Case("batch norm 2d", lambda: nn.BatchNorm2d(3), inputs=normal(4, 3, 2, 2)),
    Case("batch norm, fixed", lambda: nn.BatchNorm1d(3).eval(), inputs=normal(4, 3)),
    Case(
        "instance norm",
        lambda: nn.InstanceNorm1d(3, affine=True),
        inputs=normal(4, 3, 5),
    ),
    Case(
        "instance norm, tracked and fixed",
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval(),
        inputs=normal(4, 3, 2, 2),
    ),
    Case("PReLU", lambda: nn.PReLU(), inputs=normal(4, 3)),
    Case("PReLU, images", lambda: nn.PReLU(3), inputs=normal(4, 3, 2, 2)),
    Case(
        "bilinear",
        lambda: nn.Bilinear(2, 3, 4),
        inputs=lambda: (torch.randn(4, 2), torch.randn(4, 3)),
    ),
    Case(
        "bilinear, no bias, positions",
        lambda: nn.Bilinear(2, 3, 4, bias=False),
        inputs=lambda: (torch.randn(4, 5, 2), torch.randn(4, 5, 3)),
    ),
]
PLAIN = [case for case in CASES if case.inputs is None and case.example]  # one float input


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 6, shape)


def _padded(mode: str) -> nn.Module:
    return nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode=mode)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
