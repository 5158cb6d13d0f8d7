"""Problems in double precision on the whole training set: a known optimum, or a smooth target."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronewton.lab.problems import DATA_SEED, Examples, Problem, drawn_by, network

NEWTON_STEPS = 50  # many more than it takes


def _least_squares_floor(data: Examples, bias: bool) -> float:
    """The mean squared error that no linear map of the inputs can beat."""
    x = torch.cat([data.x, torch.ones_like(data.x[:, :1])], 1) if bias else data.x
    residual = data.y - x @ torch.linalg.lstsq(x, data.y).solution
    return float(residual.square().mean())


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear_regression(seed: int, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(DATA_SEED)
    x = _normal(generator, 400, 7) * torch.logspace(0, math.log10(0.03), 7, dtype=torch.float64)
    y = x @ _normal(generator, 7, 1) + 0.5 + 0.1 * _normal(generator, 400, 1)
    train, test = Examples(x[:200], y[:200]), Examples(x[200:], y[200:])
    model = network((7, 1), nn.Identity, seed).to(device, torch.float64)
    floor = _least_squares_floor(train, bias=True)
    return Problem(model, nn.MSELoss(), train.to(device), test.to(device), floor)


def deep_linear(seed: int, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(DATA_SEED)
    x = _normal(generator, 768, 16) * torch.logspace(0, -2, 16, dtype=torch.float64)
    y = x @ _normal(generator, 16, 8) + 0.01 * _normal(generator, 768, 8)
    train, test = Examples(x[:512], y[:512]), Examples(x[512:], y[512:])
    model = network((16, 32, 32, 32, 8), nn.Identity, seed).to(device, torch.float64)
    floor = _least_squares_floor(train, bias=True)
    return Problem(model, nn.MSELoss(), train.to(device), test.to(device), floor)


def _frequencies(size: int) -> Tensor:
    """The length of the frequency at every place of a two-dimensional Fourier transform."""
    k = torch.fft.fftfreq(size, d=1 / size, dtype=torch.float64)
    return torch.hypot(k.unsqueeze(1), k)  # (size, size)


def _colour_images(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Clouds, whose amplitude falls with the frequency as that of photographs does."""
    noise = torch.fft.fft2(_normal(generator, count, 3, size, size))
    images: Tensor = torch.fft.ifft2(noise / (1 + _frequencies(size))).real
    return images


def _blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each colour out of focus by its own width, all three bled into each other, and noise."""
    widths = torch.tensor([0.8, 1.0, 1.2], dtype=torch.float64).view(3, 1, 1)  # in pixels
    size = images.shape[-1]
    transfer = torch.exp(-0.5 * (2 * math.pi / size * widths * _frequencies(size)).square())
    blurred = torch.fft.ifft2(torch.fft.fft2(images) * transfer).real
    bleeding = torch.eye(3, dtype=torch.float64) + 0.3 * _normal(generator, 3, 3)
    mixed = torch.einsum("oc,nchw->nohw", bleeding, blurred)
    return mixed + 0.01 * _normal(generator, *images.shape)


def _tiled(data: Examples, reach: int) -> Examples:
    """The same data with a row for each location: the circular window around it, its target."""
    padded = F.pad(data.x, (reach,) * 4, mode="circular")
    windows = F.unfold(padded, 2 * reach + 1)  # (N, channels × window, locations)
    return Examples(windows.mT.flatten(0, 1), data.y.flatten(2).mT.flatten(0, 1))


def circular_deconvolution(seed: int, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(DATA_SEED)
    y = _colour_images(64, 16, generator)
    x = _blurred(y, generator)
    train, test = Examples(x[:32], y[:32]), Examples(x[32:], y[32:])
    with drawn_by(seed):
        model = nn.Conv2d(3, 3, 5, padding=2, padding_mode="circular").to(device, torch.float64)
    floor = _least_squares_floor(_tiled(train, reach=2), bias=True)
    return Problem(model, nn.MSELoss(), train.to(device), test.to(device), floor)


def _wave(x: Tensor) -> Tensor:
    """A smooth function on the square, as smooth as a heat equation's solution."""
    return torch.sin(math.pi * x[:, :1]) * torch.sin(2 * math.pi * x[:, 1:])


def smooth_regression(seed: int, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(DATA_SEED)
    x = 2 * torch.rand(1200, 2, generator=generator, dtype=torch.float64) - 1
    train, test = Examples(x[:600], _wave(x[:600])), Examples(x[600:], _wave(x[600:]))
    model = network((2, 64, 64, 64, 1), nn.Tanh, seed).to(device, torch.float64)
    return Problem(model, nn.MSELoss(), train.to(device), test.to(device))


def _logistic_floor(data: Examples) -> float:
    """The least cross-entropy of a linear map with a bias, by Newton's method.

    Columns are scaled alike first, which moves no optimum. A step is halved until the loss falls.
    """
    x = torch.cat([data.x / data.x.std(0), torch.ones_like(data.x[:, :1])], 1)
    w = torch.zeros(x.shape[1], 1, dtype=x.dtype)
    loss = F.binary_cross_entropy_with_logits(x @ w, data.y)
    for _ in range(NEWTON_STEPS):
        p = (x @ w).sigmoid()
        hessian = x.T @ (p * (1 - p) * x) / len(x)
        step = torch.linalg.solve(hessian, x.T @ (p - data.y) / len(x))
        after = F.binary_cross_entropy_with_logits(x @ (w - step), data.y)
        while after > loss and bool(step.abs().max() > 1e-12):
            step = step / 2
            after = F.binary_cross_entropy_with_logits(x @ (w - step), data.y)
        w, loss = w - step, after
    return float(loss)


def scaled_logistic(seed: int, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(DATA_SEED)
    columns = _normal(generator, 2000, 40)
    # Labels are drawn, not cut: the classes overlap, so that the optimum is finite.
    logits = columns @ (0.4 * _normal(generator, 40, 1)) + 0.5
    y = (torch.rand(2000, 1, generator=generator, dtype=torch.float64) < logits.sigmoid()).double()
    x = columns * torch.logspace(0, -3, 40, dtype=torch.float64)
    train, test = Examples(x[:1000], y[:1000]), Examples(x[1000:], y[1000:])
    model = network((40, 1), nn.Identity, seed).to(device, torch.float64)
    floor = _logistic_floor(train)
    return Problem(model, nn.BCEWithLogitsLoss(), train.to(device), test.to(device), floor)
