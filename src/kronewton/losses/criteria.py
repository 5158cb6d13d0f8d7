"""One builder of Λ per criterion. x is the detached output, in at least float32."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor

from kronewton.losses.base import (
    Categorical,
    Diagonal,
    Likened,
    OutputCurvature,
    class_dimension,
    draw_classes,
)


def squared_error(criterion: Any, x: Tensor, targets: Any, lead: int) -> OutputCurvature:
    """MSELoss; the draws are its Gaussian noise."""
    scale = 2.0 / x.numel() if is_mean(criterion) else 2.0
    return Diagonal(
        x,
        lead,
        lambda: scale,
        lambda generator: _gaussian(x, math.sqrt(scale), generator),
        lambda: element_weights(criterion, x, lead, None),
    )


def absolute_error(criterion: Any, x: Tensor, targets: Any, lead: int) -> OutputCurvature:
    """L1Loss, whose Hessian is zero: the Fisher of a Laplace distribution, which is 1 at scale 1.

    The draws are its scores, a sign each.
    """
    scale = 1.0 / x.numel() if is_mean(criterion) else 1.0

    def sample(generator: Generator) -> Tensor:
        sides = torch.randint(0, 2, x.shape, generator=generator, device=x.device)
        return (2 * sides - 1).to(x.dtype) * math.sqrt(scale)

    return Likened(
        x,
        lead,
        lambda: scale,
        sample,
        lambda: element_weights(criterion, x, lead, None),
        "L1Loss has no curvature of its own; the Fisher of a Laplace distribution is used.",
    )


def cross_entropy(criterion: Any, x: Tensor, targets: Any, lead: int) -> OutputCurvature:
    """CrossEntropyLoss on indices or probabilities: the target only enters its weight ω."""
    (target,) = targets
    dim = class_dimension(x)
    weigh = _soft_weights if target.is_floating_point() else _index_weights
    lead = lead if x.dim() > 1 else 0
    return Categorical(x, dim, lead, lambda: weigh(criterion, x, dim, target))


def likelihood(criterion: Any, x: Tensor, targets: Any, lead: int) -> OutputCurvature:
    """NLLLoss; log-softmax takes a draw −√ω onehot(y) back to √ω (p − onehot(y))."""
    dim = class_dimension(x)
    lead = lead if x.dim() > 1 else 0
    p = x.exp()
    scale = _index_weights(criterion, x, dim, targets[0]).unsqueeze(dim)

    def sample(generator: Generator) -> Tensor:
        drawn = draw_classes(p, dim, generator)
        return torch.zeros_like(p).scatter_(dim, drawn, -scale.sqrt())

    weights = scale.squeeze(dim)
    return Diagonal(
        x,
        lead,
        lambda: p * scale,
        sample,
        lambda: weights if lead else weights.unsqueeze(0),
        "NLLLoss is linear in log-probabilities; the Fisher of a log-softmax is used.",
    )


def alignment(criterion: Any, x: Tensor, targets: Any, lead: int) -> OutputCurvature:
    """CTCLoss on log-probabilities (T, N, C) or (T, C): the Fisher of a label at every frame.

    torch has no second derivative of it. With the alignment's posterior held fixed it is a
    likelihood of soft labels, which bounds it from above, and whose Fisher this is.
    """
    frames = x if x.dim() == 3 else x.unsqueeze(1)  # (T, N, C)
    given, labels = (_lengths(t, frames) for t in targets[1:3])
    weight = given.new_ones(len(labels), dtype=x.dtype)
    if is_mean(criterion):
        weight = weight / (len(labels) * labels.clamp_min(1))
    inside = torch.arange(len(frames), device=x.device).unsqueeze(1) < given  # (T, N)
    omega = (weight * inside).reshape(x.shape[:-1])
    p, scale = x.exp(), omega.unsqueeze(-1)

    def sample(generator: Generator) -> Tensor:
        drawn = draw_classes(p, p.dim() - 1, generator)
        return torch.zeros_like(p).scatter_(-1, drawn, -scale.sqrt().expand_as(drawn))

    return Diagonal(
        x,
        0,
        lambda: p * scale,
        sample,
        lambda: omega.t() if x.dim() == 3 else omega.unsqueeze(0),
        "CTCLoss: the Fisher of a label at every frame, its alignment held fixed.",
    )


def _lengths(given: Any, frames: Tensor) -> Tensor:
    """One length for each sequence: (N,)."""
    return torch.as_tensor(given, device=frames.device).reshape(-1)


def bernoulli(criterion: Any, x: Tensor, targets: Any, lead: int) -> OutputCurvature:
    """BCEWithLogitsLoss: pos_weight makes an element count 1 + (pos_weight − 1)·target times."""
    p = torch.sigmoid(x)
    weight, positive = criterion.weight, criterion.pos_weight
    if positive is not None:
        y = targets[0].detach()
        positive = 1 + (positive.detach().to(x.dtype) - 1) * y
    if weight is not None:
        weight = weight.detach().to(x.dtype)
        positive = weight if positive is None else weight * positive
    unit = 1.0 / x.numel() if is_mean(criterion) else 1.0
    scale: Tensor | float = unit if positive is None else positive * unit

    def sample(generator: Generator) -> Tensor:
        root = math.sqrt(scale) if isinstance(scale, float) else scale.sqrt()
        return (p - (_uniform(p, generator) < p).to(p.dtype)) * root

    return Diagonal(
        x,
        lead,
        lambda: torch.addcmul(p, p, p, value=-1) * scale,
        sample,
        lambda: element_weights(criterion, x, lead, positive),
    )


def poisson(criterion: Any, x: Tensor, targets: Any, lead: int) -> OutputCurvature:
    """PoissonNLLLoss; without log_input Λ depends on the target, and draws are Gaussian."""
    unit = 1.0 / x.numel() if is_mean(criterion) else 1.0
    if criterion.log_input:
        rate = x.exp()
        diagonal = rate * unit
    else:
        rate = None
        diagonal = targets[0].detach().to(x.dtype) / (x + criterion.eps).square() * unit

    def sample(generator: Generator) -> Tensor:
        if rate is None:
            return _gaussian(x, 1.0, generator) * diagonal.sqrt()
        # torch.poisson raises on NaN and counts in int64; the NaN stays in `rate`.
        counts = torch.poisson(rate.nan_to_num(0.0, 0.0).clamp_(max=1e15), generator)
        return (rate - counts) * math.sqrt(unit)

    return Diagonal(
        x,
        lead,
        lambda: diagonal,
        sample,
        lambda: element_weights(criterion, x, lead, None),
    )


def gaussian_likelihood(criterion: Any, x: Tensor, targets: Any, lead: int) -> OutputCurvature:
    """GaussianNLLLoss at the variance it was given."""
    unit = 1.0 / x.numel() if is_mean(criterion) else 1.0
    variance = torch.as_tensor(targets[1], dtype=x.dtype, device=x.device).detach()
    if variance.shape != x.shape and variance.shape == x.shape[:-1]:
        variance = variance.unsqueeze(-1)
    diagonal = (unit / variance.clamp(min=criterion.eps)).expand_as(x)
    return Diagonal(
        x,
        lead,
        lambda: diagonal,
        lambda generator: _gaussian(x, 1.0, generator) * diagonal.sqrt(),
        lambda: element_weights(criterion, x, lead, None),
        "GaussianNLLLoss: the curvature is that of the mean; the variance's own is left out.",
    )


def is_mean(criterion: Any) -> bool:
    """Whether the criterion divides by anything; one that doesn't say is taken to."""
    return getattr(criterion, "reduction", "mean") != "sum"


def element_weights(criterion: Any, x: Tensor, lead: int, weight: Tensor | None) -> Tensor:
    """ω (N, *positions) of a loss over elements: their weights' mean over the last dimension."""
    last = x.shape[-1] if x.dim() > lead else 1
    shape = (*x.shape[:lead], *x.shape[lead:-1]) if lead else (1, *x.shape[:-1])
    unit = last / x.numel() if is_mean(criterion) else 1.0
    if weight is None:
        return x.new_full((), unit).expand(shape)
    weight = weight.expand_as(x)
    return (weight.mean(-1) if x.dim() > lead else weight).reshape(shape) * unit


def _index_weights(criterion: Any, x: Tensor, dim: int, target: Tensor) -> Tensor:
    """ω of class indices: Σ_c w_c q_c over the normaliser, q the smoothed target; masked 0."""
    kept: Tensor = (target != criterion.ignore_index).to(x.dtype)
    if criterion.weight is None:
        return kept.div_(kept.sum()) if is_mean(criterion) else kept
    w = criterion.weight.detach().to(x.dtype)
    own = w.take(target.long().masked_fill(kept == 0, 0)).mul_(kept)
    smoothing: float = getattr(criterion, "label_smoothing", 0.0)
    mass: Tensor = own
    if smoothing:
        mass = (1 - smoothing) * own + (smoothing / x.shape[dim]) * w.sum() * kept
    return mass / own.sum() if is_mean(criterion) else mass


def _soft_weights(criterion: Any, x: Tensor, dim: int, target: Tensor) -> Tensor:
    """ω of probabilities as targets: Σ_c w_c q_c; torch divides by positions, not by weights."""
    q: Tensor = target.detach().to(x.dtype)
    smoothing: float = criterion.label_smoothing
    w = x.new_ones(x.shape[dim])
    if criterion.weight is not None:
        w = criterion.weight.detach().to(x.dtype)
    own = (q.movedim(dim, -1) * w).sum(-1)
    mass: Tensor = (1 - smoothing) * own + (smoothing / x.shape[dim]) * w.sum()
    return mass / mass.numel() if is_mean(criterion) else mass


def _gaussian(x: Tensor, std: float, generator: Generator) -> Tensor:
    return torch.empty_like(x).normal_(0.0, std, generator=generator)


def _uniform(x: Tensor, generator: Generator) -> Tensor:
    return torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
