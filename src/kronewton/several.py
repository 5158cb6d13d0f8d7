"""A criterion of several outputs, as a triplet loss is, as one of all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronewton.losses.generic import DENSE_LIMIT


class Together(nn.Module):
    """The criterion, of a stack of the arguments at these places (N, places, …) and the others."""

    def __init__(self, criterion: nn.Module, places: Sequence[int]) -> None:
        super().__init__()
        self.criterion, self.places = criterion, list(places)
        self.reduction = getattr(criterion, "reduction", "mean")

    def forward(self, stack: Tensor, *others: Any) -> Any:
        given = list(others)
        for place, output in zip(self.places, stack.unbind(1), strict=True):
            given.insert(place, output)
        return self.criterion.forward(*given)


@torch.enable_grad()
def together(
    criterion: nn.Module, arguments: Sequence[Any]
) -> tuple[nn.Module, Tensor, list[Any]] | None:
    """The criterion of the stack of all arguments with a gradient, the stack, and the others.

    None where they are not of one shape, or may have too many numbers for a Hessian of all.
    """
    places = [i for i, t in enumerate(arguments) if isinstance(t, Tensor) and t.requires_grad]
    outputs = [arguments[i] for i in places]
    first = outputs[0]
    alike = all((t.shape, t.dtype, t.device) == (first.shape, first.dtype, first.device)
                for t in outputs)  # fmt: skip
    if not alike or first.dim() == 0 or len(outputs) * first[0].numel() > DENSE_LIMIT:
        return None
    others = [t for i, t in enumerate(arguments) if i not in places]
    return Together(criterion, places), torch.stack(outputs, 1), others
