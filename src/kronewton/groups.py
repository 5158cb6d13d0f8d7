"""What parameter groups make of a step: their lr, and their decay of the weights.

A learning rate that is a number is a group's `lr` itself and is in the direction from the start; an
automatic one is multiplied by it last, so that torch's schedulers work in both cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

UNIT = 1e-3  # lr of an automatic step, for its weight decay: AdamW's usual one


@dataclass(frozen=True)
class Groups:
    """The groups of one optimizer as they are now, and the parameters that its steps move."""

    groups: Sequence[Mapping[str, Any]]
    parameters: Sequence[Tensor]  # those with a layer
    place: Mapping[int, int]  # of them, by id
    automatic: bool  # the learning rate

    def scaled(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """A direction times the groups' lr, where that is a number."""
        if self.automatic:
            return list(direction)
        lr = {id(p): float(g["lr"]) for g in self.groups for p in g["params"]}
        pairs = zip(self.parameters, direction, strict=True)
        return [d if lr[id(p)] == 1 else d * lr[id(p)] for p, d in pairs]

    def factors(self) -> set[float]:
        """What an automatic step of the parameters with a layer is multiplied with."""
        if not self.automatic:
            return {1.0}
        return {
            float(group["lr"])
            for group in self.groups
            if any(id(p) in self.place for p in group["params"])
        }

    def longest(self) -> float:
        """The largest lr, 1 at least."""
        return max(1.0, *[float(group["lr"]) for group in self.groups])

    def shrinkage(self, group: Mapping[str, Any]) -> float:
        """The part of a group's weights that a step takes away."""
        unit = UNIT if self.automatic else 1.0
        return unit * float(group["lr"]) * float(group["weight_decay"])

    def change(self, direction: Sequence[Tensor], lr: float) -> list[Tensor]:
        """What a step of this length changes in the parameters, all things considered."""
        found = list(torch._foreach_mul(list(direction), lr))
        moving: set[int] = set()
        for group, at in self._moving():
            factor, shrink = self._factor(group), self.shrinkage(group)
            moving.update(at)
            for i in at if factor != 1 or shrink else ():
                found[i] = factor * found[i] - shrink * self.parameters[i].detach()
        for i in set(range(len(found))) - moving:
            found[i] = torch.zeros_like(found[i])
        return found

    def move(self, step: Sequence[Tensor]) -> None:
        """Shrink the weights once, and add a step to the parameters that have a gradient."""
        for group, at in self._moving():
            moved = [self.parameters[i] for i in at]
            if not moved:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(moved, 1 - self.shrinkage(group))
            torch._foreach_add_(moved, [step[i] for i in at], alpha=self._factor(group))

    def _factor(self, group: Mapping[str, Any]) -> float:
        return float(group["lr"]) if self.automatic else 1.0

    def _moving(self) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
        """Of each group the places of its parameters with a layer that have a gradient."""
        for group in self.groups:
            at = [self.place[id(p)] for p in group["params"] if id(p) in self.place]
            yield group, [i for i in at if self.parameters[i].grad is not None]
