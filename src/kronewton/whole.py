"""Whether the criteria are the whole loss: what arrives in the model's outputs, against theirs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kronewton.layers.base import at_least_float32
from kronewton.part import Part

CHECKED = 3  # captures in which they are compared, the first ones
SHARE = 0.02  # of the gradient in the model's outputs that may come from elsewhere
HALF_SHARE = 0.3  # in half precision


class Whole:
    """Gradients in the outputs of one model, until they have been compared often enough."""

    def __init__(self, criteria: Sequence[nn.Module], checks: int) -> None:
        self.criteria, self.left = criteria, checks  # that are still to be made
        self.partial = ""  # why the criteria are not the whole loss, once that has shown
        self.received: dict[int, Tensor] = {}  # of the whole loss, by the outputs' ids

    @staticmethod
    def expect(part: Part, loss: Tensor, outputs: Iterable[Tensor]) -> None:
        """Note a criterion's own gradient in everything that the model has returned."""
        moving = [t for t in outputs if t.requires_grad]
        if moving:
            found = torch.autograd.grad(loss, moving, retain_graph=True, allow_unused=True)
            pairs = zip(moving, found, strict=True)
            part.expected = {id(t): g.detach() for t, g in pairs if g is not None}

    def add(self, i: int, gradient: Tensor) -> None:
        """Add up what arrives in an output in several backward passes."""
        known = self.received.get(i)
        self.received[i] = gradient if known is None else known + gradient

    def forget(self, outputs: Collection[int]) -> None:
        """Let go of what has arrived in some of the outputs."""
        self.received = {i: g for i, g in self.received.items() if i not in outputs}

    @torch.no_grad()
    def compare(self, parts: Sequence[Part]) -> None:
        """Whether what has arrived is what the criteria gave."""
        if not parts or not all(p.call is not None and p.expected for p in parts):
            return
        self.left -= 1
        half = any(g.dtype not in (torch.float32, torch.float64) for g in self.received.values())
        # A scaler's first scale, 65536, is infinite in half precision.
        rest = {i: at_least_float32(g) for i, g in self.received.items()}
        for part in parts:
            for i, g in part.expected.items():
                if part.weight is not None and i in rest:
                    rest[i] = rest[i] - part.weight * at_least_float32(g)
        left, whole = (_length(gradients) for gradients in (rest, self.received))
        if bool(left > (HALF_SHARE if half else SHARE) * whole):
            self.partial = (
                "the gradient in the model's outputs is not that of "
                f"{' and '.join(type(c).__name__ for c in self.criteria)} alone: the loss has "
                "terms that were not watched. Pass all of its criteria, criterion=(first, "
                "second), or one criterion that computes the whole loss"
            )


def _length(gradients: Mapping[int, Tensor]) -> Tensor:
    """The norm of several tensors together."""
    squares = [g.double().square().sum() for g in gradients.values()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
