"""A running average of the weights, to evaluate with: noise moves each iterate about it.

Polyak & Juditsky 1992 average all iterates alike; here the first of them are forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kronewton.errors import ModelError, OptionError

SAVED = ("average", "average_steps")  # in a parameter's part of the state


class Averages:
    """Of each parameter after its n-th step, with the weight min(decay, 1 − 1/n) on the past.

    The plain mean of the steps up to the 1/(1 − decay)-th, so that the first weights never count.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._means: dict[int, Tensor] = {}
        self._steps: dict[int, int] = {}
        self._inside = False

    def learn(self, parameters: Sequence[Tensor]) -> None:
        """Take in the weights of one more step; nothing without a decay."""
        for p in parameters if self.decay else ():
            n = self._steps[id(p)] = self._steps.get(id(p), 0) + 1
            now = _widened(p)
            if n == 1:
                self._means[id(p)] = now.clone()
            else:  # .to: the model may have been cast or moved since
                mean = self._means[id(p)] = self._means[id(p)].to(now)
                mean.lerp_(now, 1 - min(self.decay, 1 - 1 / n))

    @contextmanager
    def in_place(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Put the averages into the parameters, and afterwards their own values back."""
        if not self.decay:
            raise OptionError(
                "averaged() was called, and averaging=0 keeps no average of the weights. Make the "
                "optimizer with averaging=0.95, or evaluate the model as it is."
            )
        self.require_outside("averaged() a second time")
        own = [p.detach().clone() for p in parameters]
        self._inside = True
        try:
            _copy_(parameters, [self._means.get(id(p), p) for p in parameters])
            yield
        finally:
            _copy_(parameters, own)
            self._inside = False

    def require_outside(self, what: str) -> None:
        """Refuse what must not meet averaged weights in the model."""
        if self._inside:
            raise ModelError(
                f"{what} was called inside `with optimizer.averaged()`, where the model has "
                "averaged weights and not those that are trained. Leave the context first."
            )

    def tensors(self, p: Tensor) -> dict[str, Tensor]:
        """All that must be saved of a parameter."""
        if id(p) not in self._means:
            return {}
        mean, steps = self._means[id(p)], float(self._steps[id(p)])
        count = torch.tensor(steps, dtype=torch.float64, device="cpu")
        return dict(zip(SAVED, (mean, count), strict=True))

    def load(self, saved: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> None:
        """The inverse of `tensors` for all parameters; where nothing was saved it starts afresh."""
        found = [(p, kept) for p, kept in saved if self.decay and set(SAVED) <= set(kept)]
        self._means = {id(p): kept["average"].to(p.device).clone() for p, kept in found}
        self._steps = {id(p): int(kept["average_steps"]) for p, kept in found}


def _widened(p: Tensor) -> Tensor:
    """Half precision as float32: a bf16 mean would round 1 − decay of a small step away."""
    return p.detach().to(torch.promote_types(p.dtype, torch.float32))


@torch.no_grad()
def _copy_(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
