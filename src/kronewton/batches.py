"""The batches of a step, run again: their loss elsewhere, and their exact quadratic model."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronewton.part import Part
from kronewton.quadratic import QuadraticModel, Term
from kronewton.replay import Autocast, Replayer, tensors_in, versions

MARKED = 64  # numbers of each example that its mark is of, about


@dataclass(frozen=True)
class Trial:
    """What came of a step that was tried on its own batch, per batch and not per part.

    bend: Σ δ'Λδ with δ what the step changed in the criterion's input: Δ'CΔ, but for the model's
    own bend on the way. NaN where the model could not be run there.
    """

    loss: float
    bend: float


class Batches:
    """What the model says of a step's parts, and of those of earlier steps that are kept."""

    def __init__(
        self,
        replayer: Replayer,
        unwatched: Callable[[], AbstractContextManager[None]],
        earlier: int,
    ) -> None:
        self.replayer, self.unwatched = replayer, unwatched
        self._earlier: deque[list[Part]] = deque(maxlen=earlier)
        self._precision: set[tuple[torch.dtype, torch.device]] = set()  # of the model then

    @property
    def keeps(self) -> bool:
        """Whether batches are kept for the curvature of later steps."""
        return bool(self._earlier.maxlen)

    def quadratic(self, parts: Sequence[Part]) -> QuadraticModel:
        """The quadratic model of the parts, with the curvature of the earlier batches, too."""
        self._forget_what_is_cast()
        batches = [parts, *(b for b in self._earlier if all(map(rerunnable, b)))]
        terms = [
            Term(part.call, part.path, part.bridge, at.curvature(), part.weight / len(batches))
            for batch in batches
            for part in batch
            if part.call is not None and part.weight is not None
            for at in [part if batch is parts else self._here(part)]
        ]
        return QuadraticModel(self.replayer, terms, self.unwatched)

    def _here(self, part: Part) -> Part:
        """A part of an earlier batch at the parameters of now."""
        return part.at(self._output(part, None))

    def remember(self, parts: Sequence[Part]) -> None:
        """Keep a batch for the curvature of later steps, without its statistics."""
        self._forget_what_is_cast()
        self._earlier.append([part.at(part.output) for part in parts])

    def _forget_what_is_cast(self) -> None:
        """Let go of earlier batches if the model was cast or moved since: it takes them no more."""
        if not self.keeps:
            return
        now = {(p.dtype, p.device) for p in self.replayer.originals}
        if now != self._precision:
            self.forget()
        self._precision = now

    def forget(self) -> None:
        """Let go of the batches that `remember` kept: they are of another run."""
        self._earlier.clear()

    def _output(
        self,
        part: Part,
        tensors: Sequence[Tensor] | None,
        kept: dict[int, Any] | None = None,
    ) -> Tensor:
        """What the criterion would be given. kept: as for `Replayer.run`."""
        assert part.call is not None
        with self.unwatched():
            output = self.replayer.run(part.call, part.path, tensors, kept)
            return output if part.bridge is None else part.bridge.push(output)

    def _run(
        self, parts: Sequence[Part], tensors: Sequence[Tensor] | None
    ) -> tuple[float, list[tuple[Part, Tensor]]]:
        """The loss with such parameters, and what every part's criterion is given there.

        Infinite, and no part, where the model or a criterion refuses it.
        """
        total, found = 0.0, []
        kept: dict[int, Any] = {}  # a model with two criteria is run once
        for part in parts:
            if part.call is not None and part.weight is not None:
                try:
                    with _as(part.call.autocast):
                        output = self._output(part, tensors, kept)
                    with _as(part.autocast), self.unwatched():
                        loss = part.criterion(output, *part.targets)
                except torch.OutOfMemoryError:
                    raise
                except (ValueError, RuntimeError, ArithmeticError, AssertionError):
                    return math.inf, []  # the model's own checks: too far
                total += part.sign * float(part.weight * loss)
                found.append((part, output))
        return total, found

    def loss_with(self, parts: Sequence[Part], tensors: Sequence[Tensor] | None) -> float:
        """The loss of the step's batch with other parameters, or with those of now."""
        return self._run(parts, tensors)[0]

    def trial(self, parts: Sequence[Part], step: Sequence[Tensor]) -> Trial:
        """What a step would come to: one forward pass, the parameters stay as they are."""
        there = torch._foreach_add(self.replayer.parameters(), list(step))
        loss, found = self._run(parts, there)
        bend = 0.0 if found else math.nan
        for part, output in found:
            assert part.weight is not None
            change = output - part.output
            curved = part.curvature().product(change)
            inner = torch.dot(change.flatten().to(curved.dtype), curved.flatten())
            bend += float(part.weight * inner)
        return Trial(loss, bend)


def _as(autocast: Autocast | None) -> AbstractContextManager[Any]:
    return nullcontext() if autocast is None else autocast.again()


def loss_of(parts: Sequence[Part]) -> float:
    """The objective of the step: every part's loss with the weight that the user gave it."""
    return math.fsum(
        float(part.weight * part.loss)
        for part in parts
        if part.weight is not None and part.loss is not None
    )


def weight_of(parts: Sequence[Part]) -> float:
    """What all positions weigh together: 1 for a mean, their number for a sum."""
    return math.fsum(
        float(part.weight * part.curvature().weights.sum())
        for part in parts
        if part.weight is not None
    )


def rounding(parts: Sequence[Part]) -> float:
    """What a relative change of the loss must exceed to prove anything."""
    return max(8 * torch.finfo(p.loss.dtype).eps for p in parts if p.loss is not None)


def same_loss(parts: Sequence[Part]) -> float:
    """The relative difference of two losses that rounding alone may make."""
    # Of the same batch in another order, whose sums are taken in half precision.
    half = [torch.finfo(p.output.dtype).eps for p in parts if p.output.dtype.itemsize == 2]
    return max([rounding(parts), *half])


def mark(parts: Sequence[Part]) -> float:
    """A number that a batch shares with itself in another order alone; NaN where its loss does.

    In half precision a loss may be that of another batch: at 8,000 tokens they differ by less
    than the outputs' rounding.
    """
    if all(part.output.dtype.itemsize > 2 for part in parts):
        return math.nan
    total = 0.0
    for part in parts:
        assert part.call is not None
        for t in tensors_in((part.call.args, part.call.kwargs, part.targets)):
            if t.layout == torch.strided and t.numel():
                real = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
                rows = real.flatten(1) if real.dim() > 1 else real.reshape(-1, 1)
                some = rows[:, :: max(1, rows.shape[1] // MARKED)]  # of each example
                total += float((1.7 * some.double() + 0.3).cos().sum())
    return total


def half(parts: Sequence[Part]) -> bool:
    """Whether some of what led to the loss was in half precision."""
    casts = [part.call.autocast for part in parts if part.call is not None]
    return same_loss(parts) > rounding(parts) or any(cast and cast.enabled for cast in casts)


def rerunnable(part: Part) -> bool:
    """Whether the model can be run again, as the criterion saw it."""
    if part.call is None or not part.call.intact() or part.versions != versions(part.targets):
        return False
    return part.bridge is None or part.bridge.linear
