"""A criterion's Hessian Λ in the model's output: as square-root columns, as draws, as products.

Λ carries the criterion's whole scale: normaliser, mask, class and element weights. Here x is the
output, ω the weight with which a position enters the loss, p what the model predicts:

| criterion | Λ at one position |
|---|---|
| MSELoss | 2/numel · I for a mean, 2 · I for a sum: torch has no ½ |
| CrossEntropyLoss | ω (diag(p) − pp'), ω the class weight of the target over the normaliser |
| NLLLoss | ω diag(exp x), the Fisher: log-softmax pulls it back to ω (diag(p) − pp') |
| CTCLoss | ω diag(exp x) at every frame, its alignment held fixed: torch has no Hessian of it |
| BCEWithLogitsLoss | ω diag(p (1 − p)) |
| PoissonNLLLoss | ω diag(exp x), or ω diag(y / (x + eps)²) without log_input |
| GaussianNLLLoss | ω diag(1 / variance), in the mean only |
| L1Loss | ω I, the Fisher of a Laplace distribution of scale 1: it has no Hessian |
| any other | autograd's Hessian, negative eigenvalues projected to zero |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronewton.errors import CriterionError, UnsupportedError
from kronewton.losses import checks, criteria
from kronewton.losses.base import OutputCurvature, at_least_float32
from kronewton.losses.generic import Projected

__all__ = ["OutputCurvature", "check", "check_values", "curvature"]


def curvature(
    criterion: nn.Module, output: Tensor, *targets: Any, batched: bool = True
) -> OutputCurvature:
    """Λ of the criterion at this output; not batched: the output belongs to a single example."""
    criterion = _eager(criterion)
    x = at_least_float32(output.detach())
    return _kind(criterion).build(criterion, x, targets, 1 if batched and x.dim() > 0 else 0)


def check(criterion: nn.Module, output: Tensor, *targets: Any) -> None:
    """Refuse shapes and dtypes that torch would broadcast, or whose message would not help.

    Reads no values. Raises CriterionError, and UnsupportedError for reduction="none".
    """
    criterion = _eager(criterion)
    name = type(criterion).__name__
    if getattr(criterion, "reduction", None) == "none":
        raise UnsupportedError(
            f'{name} has reduction="none"; "mean" and "sum" are allowed, as the weight of each '
            "example in the objective is unknown otherwise. Choose one of them, or write the "
            "weighted mean as a criterion of your own."
        )
    if not output.is_floating_point():
        raise CriterionError(
            f"{name} was given an output of {checks.told(output)}; a floating-point one is "
            "allowed. Pass what the model's last layer returns."
        )
    if output.numel() == 0:
        raise CriterionError(
            f"{name} was given an empty batch: an output of {checks.told(output)}. At least one "
            "example is needed; skip empty batches, or set drop_last=True in the loader."
        )
    _kind(criterion).check(criterion, output, targets)


def check_values(criterion: nn.Module, output: Tensor, *targets: Any) -> None:
    """Refuse target values without a meaning. Synchronises. Raises CriterionError."""
    criterion = _eager(criterion)
    with torch.no_grad():
        _kind(criterion).check_values(criterion, output.detach(), targets)


Checker = Callable[[Any, Tensor, tuple[Any, ...]], None]


@dataclass(frozen=True)
class Kind:
    """What is known about one criterion."""

    build: Callable[[Any, Tensor, tuple[Any, ...], int], OutputCurvature] = Projected
    check: Checker = checks.nothing
    check_values: Checker = checks.nothing


OTHER = Kind()
# By the forward itself: a subclass that overrides it is another criterion.
KINDS: dict[Any, Kind] = {
    nn.MSELoss.forward: Kind(criteria.squared_error, checks.elements),
    nn.CrossEntropyLoss.forward: Kind(criteria.cross_entropy, checks.classes, checks.class_values),
    nn.NLLLoss.forward: Kind(criteria.likelihood, checks.classes, checks.log_probabilities),
    nn.BCEWithLogitsLoss.forward: Kind(criteria.bernoulli, checks.elements, checks.signs),
    nn.CTCLoss.forward: Kind(criteria.alignment),
    nn.PoissonNLLLoss.forward: Kind(criteria.poisson, checks.counts, checks.signs),
    nn.GaussianNLLLoss.forward: Kind(criteria.gaussian_likelihood, checks.gaussian),
    nn.BCELoss.forward: Kind(check=checks.elements),
    nn.L1Loss.forward: Kind(criteria.absolute_error, checks.elements),
    nn.SmoothL1Loss.forward: Kind(check=checks.elements),
    nn.HuberLoss.forward: Kind(check=checks.elements),
}


def _kind(criterion: nn.Module) -> Kind:
    if "forward" in vars(criterion):
        return OTHER
    return KINDS.get(type(criterion).forward, OTHER)


def _eager(criterion: nn.Module) -> nn.Module:
    """What torch.compile was given: the compiled module can't be differentiated twice."""
    return criterion._modules.get("_orig_mod") or criterion
