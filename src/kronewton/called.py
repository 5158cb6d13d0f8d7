"""What a module was called with."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from kronewton.errors import CriterionError
from kronewton.replay import tensors_in


def device_of(args: Any, kwargs: Any) -> str:
    """The type of device of the first tensor that a module was given."""
    return next((t.device.type for t in tensors_in((args, kwargs))), "cpu")


def arguments_of(criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a criterion was given, by position. Raises CriterionError if that can't be told."""
    if not kwargs:
        given = list(args)
    else:
        bound = inspect.signature(criterion.forward).bind(*args, **kwargs)
        if bound.kwargs:
            raise CriterionError(
                f"{type(criterion).__name__} takes {', '.join(bound.kwargs)} by name only; a "
                "watched criterion takes the model's output and its targets by position. Let its "
                "forward accept them so, or pass criterion=None."
            )
        given = list(bound.args)
    if not given or not isinstance(given[0], Tensor):
        raise CriterionError(
            f"{type(criterion).__name__} was called with {type(given[0]).__name__ if given else 0} "
            "as its first argument; a watched criterion takes the model's output first, as a "
            "tensor. Pass criterion=None, or call observe(output, target, criterion)."
        )
    return given
