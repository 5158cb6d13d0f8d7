"""What Λ can do, and its two closed forms: one number per output element, and softmax."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

FEW_CLASSES = 32  # up to it a softmax down the columns of the transpose is several times faster


class OutputCurvature(ABC):
    """Λ at one output; tensors in and out have the output's shape and are detached from it."""

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """ω (N, *positions): the weight of each position; an example of weight 2 is two examples.

        A mean without class or element weights sums to 1, a sum to the number of positions.
        """

    @property
    @abstractmethod
    def note(self) -> str:
        """What is assumed or approximated, in a sentence; empty if nothing is."""

    @property
    def curved(self) -> bool:
        """Whether the loss has a Hessian that is not zero, for Newton's step to go by."""
        return True

    @property
    @abstractmethod
    def column_count(self) -> int:
        """How many columns there are."""

    @abstractmethod
    def columns(self) -> Iterator[Tensor]:
        """u₁, u₂, …: an example's block of Λ is the sum of uu' over its own rows of them.

        One column serves all examples at once, and only one position of each: what lies behind
        two positions of an example may be shared (attention), behind two examples it is not.
        """

    @abstractmethod
    def draw(self, generator: Generator) -> Tensor:
        """u with E[uu'] = Λ, drawn from the model's own predictions where the loss has some."""

    @abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """Λv."""


@dataclass(frozen=True)
class Diagonal(OutputCurvature):
    """Every output element for itself; what a caller may not ask for is computed when asked."""

    like: Tensor  # the output, for its shape, dtype and device
    lead: int  # 1: dimension 0 counts examples, 0: there is one example and no such dimension
    hessian: Callable[[], Tensor | float]
    sample: Callable[[Generator], Tensor]
    weigh: Callable[[], Tensor]
    note: str = ""

    @cached_property
    def weights(self) -> Tensor:
        return self.weigh()

    @cached_property
    def diagonal(self) -> Tensor | float:
        return self.hessian()

    @property
    def column_count(self) -> int:
        return math.prod(self.like.shape[self.lead :])

    def columns(self) -> Iterator[Tensor]:
        root = (torch.ones_like(self.like) * self.diagonal).sqrt()
        for position in positions(self.like.shape[self.lead :]):
            column = torch.zeros_like(self.like)
            column[position] = root[position]
            yield column

    def draw(self, generator: Generator) -> Tensor:
        return self.sample(generator)

    def product(self, v: Tensor) -> Tensor:
        return at_least_float32(v) * self.diagonal


@dataclass(frozen=True)
class Likened(Diagonal):
    """The Fisher of a distribution whose likelihood the loss is, where its own Hessian is zero."""

    @property
    def curved(self) -> bool:
        return False


@dataclass(frozen=True)
class Categorical(OutputCurvature):
    """ω (diag(p) − pp') at each position, p the softmax of the logits over one dimension."""

    logits: Tensor
    dim: int  # of the classes
    lead: int  # as in Diagonal
    weigh: Callable[[], Tensor]  # ω in the shape of the logits without the class dimension
    note: str = ""

    @cached_property
    def p(self) -> Tensor:
        x = self.logits
        if x.dim() == 2 and self.dim == 1 and x.shape[1] <= FEW_CLASSES:
            return torch.softmax(x.t(), 0).t()
        return torch.softmax(x, self.dim)

    @cached_property
    def scale(self) -> Tensor:
        return self.weigh().unsqueeze(self.dim)

    @cached_property
    def weights(self) -> Tensor:
        scale = self.scale.squeeze(self.dim)
        return scale if self.lead else scale.unsqueeze(0)

    @property
    def column_count(self) -> int:
        return self.logits.numel() // (self.logits.shape[0] if self.lead else 1)

    def columns(self) -> Iterator[Tensor]:
        # √(ω pᶜ) (eᶜ − p) over all classes c: every possible draw, each at its own probability.
        p = self.p.movedim(self.dim, -1)  # (N, *positions, C)
        root = (self.p * self.scale).sqrt().movedim(self.dim, -1)
        for position in positions(p.shape[self.lead : -1]):
            at = (*position, slice(None))
            for c in range(p.shape[-1]):
                column = torch.zeros_like(self.logits)
                rows = column.movedim(self.dim, -1)[at]  # (N, C), a view
                rows -= root[at][..., c : c + 1] * p[at]
                rows[..., c] += root[at][..., c]
                yield column

    def draw(self, generator: Generator) -> Tensor:
        root = self.scale.sqrt()
        drawn = draw_classes(self.p, self.dim, generator)
        return (self.p * root).scatter_add_(self.dim, drawn, -root)

    def product(self, v: Tensor) -> Tensor:
        pv = self.p * v
        pv = torch.addcmul(pv, self.p, pv.sum(self.dim, keepdim=True), value=-1)
        return pv * self.scale


def draw_classes(p: Tensor, dim: int, generator: Generator) -> Tensor:
    """One class per position, as (N, 1, *positions): where a uniform draw meets the running sum."""
    # Not torch.multinomial: it takes three times as long, and raises on NaN.
    last = dim == p.dim() - 1
    below = (p if last else p.movedim(dim, -1)).cumsum(-1)
    shape = (*below.shape[:-1], 1)
    at = torch.rand(shape, generator=generator, dtype=p.dtype, device=p.device)
    drawn = torch.searchsorted(below, at).clamp_(max=p.shape[dim] - 1)
    return drawn if last else drawn.movedim(-1, dim)


def positions(shape: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Every index into the last dimensions of a tensor, with an ellipsis for those before."""
    for index in itertools.product(*map(range, shape)):
        yield (..., *index)


def class_dimension(output: Tensor) -> int:
    """Where torch's classification losses have the classes: (N, C, *positions), or (C,)."""
    return min(max(output.dim() - 1, 0), 1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision is widened: probabilities and their products lose most of their digits."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
