"""Each kind of layer, one row for each form of it; the tests of layers run over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Case:
    """A layer, and the shape of one example of its input."""

    name: str
    make: Callable[[], nn.Module]
    example: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("linear", lambda: nn.Linear(3, 2), (3,)),
    Case("linear, tokens", lambda: nn.Linear(3, 2), (4, 3)),
    Case("linear, an image of tokens", lambda: nn.Linear(3, 2), (2, 3, 3)),
    Case("linear, no bias", lambda: nn.Linear(3, 2, bias=False), (3,)),
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
]


def _padded(mode: str) -> nn.Module:
    return nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode=mode)
