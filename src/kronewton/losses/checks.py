"""What a criterion may be given. Shapes and dtypes are read always, values when asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kronewton.errors import CriterionError
from kronewton.losses.base import at_least_float32, class_dimension


def told(value: Any) -> str:
    """A tensor's dtype and shape, or what else was given."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _take(criterion: nn.Module, targets: tuple[Any, ...], *names: str) -> Tensor:
    """The first of as many targets as there are names."""
    if len(targets) != len(names) or not isinstance(targets[0], Tensor):
        raise CriterionError(
            f"{type(criterion).__name__} was given after the output: "
            f"{', '.join(map(told, targets)) or 'nothing'}; allowed is {' and '.join(names)}, as "
            f"tensors. Call criterion(output, {', '.join(names)})."
        )
    return targets[0]


def nothing(criterion: Any, output: Tensor, targets: tuple[Any, ...]) -> None:
    """Nothing is known about this criterion's targets."""


def _same_shape(criterion: Any, output: Tensor, target: Tensor) -> None:
    if target.shape != output.shape:
        raise CriterionError(
            f"{type(criterion).__name__} was given an output of shape {tuple(output.shape)} and a "
            f"target of shape {tuple(target.shape)}; equal shapes are allowed, as torch would "
            "compare every example with every other. Reshape one of them, with "
            "target.view_as(output) or output.squeeze(-1)."
        )


def _floating(criterion: Any, target: Tensor) -> None:
    if not target.is_floating_point():
        raise CriterionError(
            f"{type(criterion).__name__} was given a target of {told(target)}; a floating-point "
            "one is allowed. Use target.to(output.dtype), or CrossEntropyLoss for classes."
        )


def counts(criterion: Any, output: Tensor, targets: tuple[Any, ...]) -> None:
    """PoissonNLLLoss: integers are welcome."""
    _same_shape(criterion, output, _take(criterion, targets, "target"))


def elements(criterion: Any, output: Tensor, targets: tuple[Any, ...]) -> None:
    """A loss over elements, with the weights that some of them carry."""
    target = _take(criterion, targets, "target")
    _same_shape(criterion, output, target)
    _floating(criterion, target)
    for name in ("weight", "pos_weight"):
        weight = getattr(criterion, name, None)
        if weight is None:
            continue
        pairs = zip(reversed(weight.shape), reversed(output.shape), strict=False)
        if weight.dim() > output.dim() or any(n not in (1, size) for n, size in pairs):
            raise CriterionError(
                f"{type(criterion).__name__} has a {name} of shape {tuple(weight.shape)} for an "
                f"output of shape {tuple(output.shape)}; one that broadcasts to the output is "
                "allowed. Give it a 1 for each dimension over which it is shared."
            )


def gaussian(criterion: Any, output: Tensor, targets: tuple[Any, ...]) -> None:
    """GaussianNLLLoss: the variance in the shapes that torch accepts."""
    target = _take(criterion, targets, "target", "variance")
    _same_shape(criterion, output, target)
    _floating(criterion, target)
    variance = targets[1]
    if not isinstance(variance, Tensor) or variance.shape in (output.shape, output.shape[:-1]):
        return
    pairs = zip(variance.shape, output.shape, strict=False)
    if variance.dim() != output.dim() or [n for n, size in pairs if n != size] != [1]:
        raise CriterionError(
            f"GaussianNLLLoss was given an output of shape {tuple(output.shape)} and a variance of "
            f"shape {tuple(variance.shape)}; the output's shape, with a 1 in one dimension or "
            "without the last, or a number is allowed. Reshape the variance."
        )


def classes(criterion: Any, output: Tensor, targets: tuple[Any, ...]) -> None:
    """CrossEntropyLoss and NLLLoss: class indices, or for the first also probabilities."""
    target = _take(criterion, targets, "target")
    name, dim = type(criterion).__name__, class_dimension(output)
    C = output.shape[dim] if output.dim() else 0
    index_shape = (*output.shape[:dim], *output.shape[dim + 1 :])
    soft = isinstance(criterion, nn.CrossEntropyLoss)
    allowed = f"class indices of dtype int64 and shape {index_shape}" + (
        f", or probabilities of shape {tuple(output.shape)}," if soft else ""
    )
    if target.is_floating_point():
        fits = soft and target.shape == output.shape
    else:
        fits = target.dtype in (torch.int64, torch.uint8) and target.shape == index_shape
    if not fits or not C:
        raise CriterionError(
            f"{name} was given an output of shape {tuple(output.shape)} and a target of "
            f"{told(target)}; {allowed} are allowed, as the classes are dimension {dim} of the "
            "output. Use target.long() for indices, and movedim(-1, 1) on an output whose classes "
            "come last."
        )
    if criterion.weight is not None and criterion.weight.shape != (C,):
        raise CriterionError(
            f"{name} has class weights of shape {tuple(criterion.weight.shape)}; one for each of "
            f"the {C} classes of the output is allowed: shape ({C},). Correct `weight`."
        )


def class_values(criterion: Any, output: Tensor, targets: tuple[Any, ...]) -> None:
    """Class indices in range, probabilities finite and not negative."""
    target, name = targets[0], type(criterion).__name__
    C = output.shape[class_dimension(output)]
    if target.is_floating_point():
        if not bool((torch.isfinite(target) & (target >= 0)).all()):
            raise CriterionError(
                f"{name} was given probabilities as targets that are negative or not finite; "
                "finite numbers from 0 up are allowed. Look for NaN in the targets."
            )
        return
    bad = ((target < 0) | (target >= C)) & (target != criterion.ignore_index)
    if bool(bad.any()):
        raise CriterionError(
            f"{name} was given class {int(target[bad][0])} for an output with {C} classes; 0 to "
            f"{C - 1} and ignore_index={criterion.ignore_index} are allowed. Correct the labels "
            "(do they start at 1?), or widen the model's output."
        )


def log_probabilities(criterion: Any, output: Tensor, targets: tuple[Any, ...]) -> None:
    """NLLLoss: also whether what it is given are log-probabilities at all."""
    class_values(criterion, output, targets)
    dim = class_dimension(output)
    off = (at_least_float32(output).exp().sum(dim) - 1).abs()
    # bfloat16 keeps two to three digits of each log-probability; NaN passes, as it does in torch.
    if bool((off > max(1e-3, 16 * torch.finfo(output.dtype).eps)).any()):
        raise CriterionError(
            f"NLLLoss was given an output of shape {tuple(output.shape)} whose exponentials do not "
            f"sum to 1 over dimension {dim}; log-probabilities are allowed. Put LogSoftmax(dim="
            f"{dim}) in front, or use CrossEntropyLoss on the logits."
        )


def signs(criterion: Any, output: Tensor, targets: tuple[Any, ...]) -> None:
    """Targets that would make a convex loss concave."""
    weighs = getattr(criterion, "pos_weight", None) is not None
    logarithm = not getattr(criterion, "log_input", True)
    if (weighs or logarithm) and bool((targets[0] < 0).any()):
        raise CriterionError(
            f"{type(criterion).__name__} was given a negative target, which makes the loss concave "
            "there; targets from 0 up are allowed. Correct the targets."
        )
