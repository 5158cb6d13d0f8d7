"""How parameters without curvature are trained: AdamW, which follows what becomes of their groups.

Its lr is `fallback_lr` where a group's own is the first one, and as many times that one otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kronewton.options import Options, check_fallback, check_pace

Groups = Sequence[Mapping[str, Any]]  # torch's parameter groups


class Fallback:
    """AdamW for some of the parameters in these groups, each of them in a group of its own."""

    def __init__(self, parameters: Sequence[Tensor], groups: Groups, options: Options) -> None:
        self.options = options
        own = list(_one_by_one(parameters, groups))
        nothing: list[dict[str, Any]] = [{"params": []}]  # torch wants a group
        self.adamw = torch.optim.AdamW(
            own or nothing, lr=options.fallback_lr, maximize=options.maximize
        )
        self.lent: set[int] = set()  # by ids: their weights decay elsewhere

    def add(self, parameters: Sequence[Tensor], groups: Groups) -> None:
        """Train these, too."""
        for group in _one_by_one(parameters, groups):
            self.adamw.add_param_group(group)

    def lend(self, parameters: Sequence[Tensor], groups: Groups) -> None:
        """Train these and no others of those that were lent before."""
        now = {id(p) for p in parameters}
        if now == self.lent:
            return
        gone = self.lent - now
        kept = [g for g in self.adamw.param_groups if not any(id(p) in gone for p in g["params"])]
        self.adamw.param_groups = kept
        for p in [p for p in self.adamw.state if id(p) in gone]:
            del self.adamw.state[p]
        new = [p for p in parameters if id(p) not in self.lent]
        self.lent = now
        self.add(new, groups)
        self.follow(groups)

    def follow(self, groups: Groups) -> None:
        """Take the groups' lr and decay of now. Raises OptionError if AdamW can't."""
        first = 1.0 if isinstance(self.options.lr, str) else self.options.lr or 1.0
        own = {id(p): g for g in groups for p in g["params"]}
        for group in self._each():
            (p,) = group["params"]
            group["lr"] = self.options.fallback_lr * float(own[id(p)]["lr"]) / first
            decay = 0.0 if id(p) in self.lent else own[id(p)]["weight_decay"]
            group["weight_decay"] = decay
            check_fallback(group["lr"], p.dtype)
            check_pace(group["lr"] * group["weight_decay"])

    def _each(self) -> list[dict[str, Any]]:
        return [group for group in self.adamw.param_groups if group["params"]]

    def step(self) -> bool | None:
        """Whether a step was made: not from gradients that are not finite; None without any."""
        for group in self._each():
            (p,) = group["params"]
            if p.grad is not None and p.grad.is_sparse:  # AdamW takes none
                p.grad = p.grad.to_dense()
            state = self.adamw.state.get(p, {})
            for key, moment in state.items():  # the model may have been cast
                if key != "step" and moment.dtype != p.dtype:
                    state[key] = moment.to(p.dtype)
        grads = [p.grad for g in self.adamw.param_groups for p in g["params"] if p.grad is not None]
        if not grads:
            return None
        # Squared: what overflows there would stay in AdamW's second moment.
        if not bool(torch.isfinite(torch.stack([(g * g.conj()).sum() for g in grads]).sum())):
            return False
        self.adamw.step()
        return True


def _one_by_one(parameters: Sequence[Tensor], groups: Groups) -> Iterator[dict[str, Any]]:
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for p in parameters:
        yield {"params": [p], "weight_decay": decay[id(p)]}
