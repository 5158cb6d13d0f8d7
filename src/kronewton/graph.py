"""Passes through the graph between layers' outputs and a criterion's input."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mode
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kronewton.errors import UnsupportedError
from kronewton.part import LayerCall


def folded(calls: Sequence[LayerCall], output: Tensor) -> int:
    """How many positions of each of the layers' examples the output's first dimension holds."""
    examples = [call.a.counts[0] for call in calls]
    N = mode(examples) if examples else 0
    whole = output.dim() > 1 and N > 0 and len(output) % N == 0
    return len(output) // N if whole else 1


def pulled(output: Tensor, sources: Sequence[Any], u: Tensor) -> list[Tensor | None]:
    """A cotangent at the output, carried back to the sources; None where none leads there."""
    try:
        return list(torch.autograd.grad(output, list(sources), u, True, allow_unused=True))
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise UnsupportedError(
            "a part of the model is checkpointed with use_reentrant=True, which torch can only "
            "differentiate in one backward pass over everything. Give torch.utils.checkpoint "
            "use_reentrant=False; or pass criterion=None, which takes the training gradients."
        ) from error


def leads_to(sources: Sequence[Tensor | GradientEdge], output: Tensor) -> bool:
    """Whether the output depends on any of the sources."""
    zeros = torch.zeros_like(output)
    found = torch.autograd.grad(
        output,
        list(sources),  # type: ignore[arg-type]  # torch takes a mixture
        zeros,
        retain_graph=True,
        allow_unused=True,
    )
    return any(gradient is not None for gradient in found)
