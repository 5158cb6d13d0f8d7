"""The running curvature of all layers: when it is renewed, and how it is applied."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kronewton.errors import NotPositiveDefinite
from kronewton.factors import (
    Factors,
    Moment,
    Observation,
    all_reduced,
    batch_factors,
    best_factors,
    rotated,
    with_corrected,
)
from kronewton.inverse import (
    EigenInverse,
    FactoredInverse,
    Inverse,
    eigen_basis,
    factored_inverse,
)
from kronewton.layers import Layer
from kronewton.types import Statistics

LEAST = 1e-10  # of the scale over the largest that there was


def due(step: int, every: int) -> bool:
    """Every so many steps, and at powers of two before: averages of a few steps change fast."""
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def due_in_turn(step: int, every: int, names: Sequence[str]) -> set[str]:
    """The layers whose inverse is due: all at the start, then each in its own turn."""
    if step < every:
        return set(names) if due(step, every) else set()
    # Spread over the steps: all inversions in one step make it many times the median.
    return {n for i, n in enumerate(names) if (step + i * every // len(names)) % every == 0}


class Curvature:
    """Running factors and inverses by layer name, in one of the three bases."""

    def __init__(self, layers: Sequence[Layer], basis: str, sharing: str = "expand") -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.sharing = sharing
        self._build = best_factors if sharing == "best" else batch_factors
        self.basis = basis
        self.factors: dict[str, Factors] = {}
        self.inverses: dict[str, Inverse] = {}
        self._batch: dict[str, Sequence[Observation]] = {}  # what was learnt in this step
        self.largest = 0.0  # of all scales so far
        self.scale = 0.0  # mean eigenvalue of all blocks together, in units of the loss
        self.dropped = 0  # batches of a layer left out because they were not finite
        self.failed = 0  # inversions that failed, the last good one being kept

    def learn(self, observations: Mapping[str, Sequence[Observation]], decay: float) -> None:
        """Add one batch to the running factors of every layer that took part in it.

        decay: the weight of what is known so far, against one for the batch.
        """
        for name, seen in observations.items():
            seen = all_reduced(seen) if self.sharing == "reduce" else seen
            batch = self._build(seen)
            if not bool(batch.finite()):
                self.dropped += 1
            elif bool((batch.A.count > 0) & (batch.trace() > 0)):
                # Without curvature (all masked, or a saturated softmax) there is nothing to learn.
                self._batch[name] = seen
                self._learn_layer(name, batch, seen, decay)
        if observations and self.factors:
            trace = torch.stack([f.trace() for f in self.factors.values()]).sum()
            scale = float(trace) / sum(f.size for f in self.factors.values())
            self.largest = max(self.largest, scale)
            # Where a loss is all but zero so is its curvature, and dampings must not follow.
            self.scale = max(scale, LEAST * self.largest)

    def _learn_layer(
        self, name: str, batch: Factors, seen: Sequence[Observation], decay: float
    ) -> None:
        before = self.factors.get(name)
        basis = self.inverses.get(name)
        if self.basis == "corrected":
            if not isinstance(basis, EigenInverse):
                basis = eigen_basis(batch.A.mean, batch.B.mean, name)
            batch = with_corrected(batch, seen, basis.U_A, basis.U_B)
        running = batch if before is None else before.then(batch, decay)
        self.factors[name] = running
        if isinstance(basis, EigenInverse) and running.s is not None:
            self.inverses[name] = replace(basis, s=running.s.mean)

    def forget_batch(self) -> None:
        """Let go of the step's rows a and b."""
        self._batch = {}

    def refresh(self, names: Collection[str], damping: float) -> None:
        """Invert again, for the named layers and for those that have no inverse yet.

        An inversion that fails leaves the last good inverse in place and is counted; without one
        NotPositiveDefinite is raised.
        """
        for name in self.factors:
            if name in names or name not in self.inverses:
                try:
                    self._refresh_layer(name, damping)
                except NotPositiveDefinite:
                    self.failed += 1
                    if name not in self.inverses:
                        raise

    def _refresh_layer(self, name: str, damping: float) -> None:
        factors = self.factors[name]
        if self.basis == "factored":
            self.inverses[name] = self._factored(name, damping)
            return
        new = eigen_basis(factors.A.mean, factors.B.mean, name)
        old = self.inverses.get(name)
        if factors.s is not None and isinstance(old, EigenInverse):
            s = self._carried(factors, old, new, self._batch.get(name))
            self.factors[name] = replace(factors, s=s)
            new = replace(new, s=s.mean)
        self.inverses[name] = new

    def _carried(
        self,
        factors: Factors,
        old: EigenInverse,
        new: EigenInverse,
        seen: Sequence[Observation] | None,
    ) -> Moment:
        """Corrected eigenvalues in a new basis: this batch measured again, the rest rotated."""
        assert factors.s is not None
        R_A, R_B = old.U_A.mT @ new.U_A, old.U_B.mT @ new.U_B
        if seen is None:
            return rotated(factors.s, R_A, R_B)
        batch = self._build(seen)
        here = with_corrected(batch, seen, old.U_A, old.U_B).s
        there = with_corrected(batch, seen, new.U_A, new.U_B).s
        assert here is not None
        assert there is not None
        rest = Moment(factors.s.total - here.total, factors.s.count - here.count)
        return rotated(rest, R_A, R_B) + there

    def _factored(self, name: str, damping: float) -> FactoredInverse:
        factors = self.factors[name]
        return factored_inverse(factors.A.mean, factors.B.mean, damping, name)

    def with_damping(self, damping: float) -> dict[str, Inverse]:
        """The inverses as they would be with another damping."""
        if self.basis != "factored":
            return self.inverses  # applied with whatever damping is asked for
        return {name: self._factored(name, damping) for name in self.inverses}

    def apply(self, name: str, G: Tensor, damping: float) -> Tensor:
        """(block + damping·I)⁻¹ G, as well as the basis has it."""
        inverse = self.inverses.get(name)
        if inverse is None:  # no batch has reached this layer so far: descent, scaled by the others
            return G / (self.scale + damping)
        # A model may have been cast since: its factors stay as exact as they were.
        dtype = next(iter(inverse.tensors().values())).dtype
        return inverse.apply(G.to(dtype), damping)

    def memory(self, name: str) -> int:
        """Bytes kept for a layer."""
        return sum(t.numel() * t.element_size() for t in self.tensors(name).values())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All that is kept for a layer, to be saved; empty before the first batch."""
        if name not in self.factors:
            return {}
        factors = self.factors[name]
        kept: dict[str, Tensor] = {}
        for key in ("A", "B", "s"):
            moment = getattr(factors, key)
            if moment is not None:
                kept[f"{key}_total"], kept[f"{key}_count"] = moment.total, moment.count
        if name in self.inverses:
            kept.update({f"inverse_{k}": t for k, t in self.inverses[name].tensors().items()})
        return kept

    def load(self, name: str, kept: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        moments = {
            key: Moment(kept[f"{key}_total"], kept[f"{key}_count"])
            for key in ("A", "B", "s")
            if f"{key}_total" in kept
        }
        self.factors[name] = Factors(**moments)
        inverse = {k.removeprefix("inverse_"): t for k, t in kept.items() if "inverse_" in k}
        if inverse:
            make = FactoredInverse if self.basis == "factored" else EigenInverse
            self.inverses[name] = make(**inverse)


def by_layer(
    parts: Iterable[tuple[Mapping[str, Sequence[Statistics]], Tensor | None]],
) -> dict[str, list[Observation]]:
    """Statistics of a batch's parts, gathered by layer, each with its part's weight."""
    found: dict[str, list[Observation]] = {}
    for statistics, weight in parts:
        if weight is None:
            continue
        for name, seen in statistics.items():
            found.setdefault(name, []).extend((stats, weight) for stats in seen)
    return found
