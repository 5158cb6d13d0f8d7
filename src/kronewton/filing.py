"""Gradients in layers' outputs → the statistics of a part, checked before they are believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kronewton.layers import ENTRIES, TURNED, DenseRows, Layer
from kronewton.part import LayerCall, Part, Wanted
from kronewton.rows import own_gradient, row_weights, tolerance, with_mask
from kronewton.types import Statistics


class Filing:
    """What rows are made of for the layers of one model, and which of them have proved right."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.unexplained: dict[str, str] = {}  # layers whose rows do not give their gradient: why
        self._verified: set[str] = set()

    def wanted(self, calls: Sequence[LayerCall]) -> Wanted:
        """In what gradients are needed: outputs of layers, and some parameters themselves."""
        shown = {call.layer.name for call in calls}
        alone = [
            layer
            for layer in self.layers
            if layer.name not in shown and any(p.requires_grad for p in layer.whole().values())
        ]
        new = [
            layer
            for layer in self.layers
            if layer.name in shown and layer.name not in self._verified
        ]
        return Wanted(calls, alone, new)

    @torch.no_grad()
    def file(
        self,
        part: Part,
        wanted: Wanted,
        rows: Sequence[Sequence[Tensor | None]],
        weights: Tensor,
    ) -> bool:
        """Fill in a part's statistics from the gradients of its draws; False if there are none."""
        reached: dict[str, list[tuple[LayerCall, Tensor]]] = {}
        for call, at in zip(wanted.calls, wanted.of_calls, strict=True):
            found = [gradients[at] for gradients in rows]
            if all(any(g is not None for g in draw) for draw in found):
                b = _side_by_side([call.rows(draw) for draw in found])
                reached.setdefault(call.term, []).append((call, b))
        alone = {
            layer.name: [own_gradient(layer, draw, wanted.place) for draw in rows]
            for layer in (*wanted.alone, *wanted.new)
        }
        for layer in wanted.new:
            self._verify(layer, reached, alone[layer.name])
            if layer.name not in self.unexplained:
                alone.pop(layer.name)
        for name, G in alone.items():
            if all(g is not None for g in G):
                self._file_entries(part, name, torch.stack([g for g in G if g is not None]))
        for term, seen in reached.items():
            if seen[0][0].layer.name not in self.unexplained:
                part.statistics[term] = [self.statistics(call, b, weights) for call, b in seen]
        used = {call.forward for seen in reached.values() for call, _ in seen}
        part.forwards = part.forwards | used
        return bool(used or part.statistics)

    def _verify(
        self,
        layer: Layer,
        reached: Mapping[str, list[tuple[LayerCall, Tensor]]],
        exact: Sequence[Tensor | None],
    ) -> None:
        """Compare a layer's gradient with what its rows make of it, when it is first seen.

        A matrix that is used in ways that nobody has seen (by a function that is not watched, or
        by a module that is not what it seems) would have a block that is wrong without a word.
        """
        G = exact[0]
        if G is None or not bool(G.any()):
            return
        self._verified.add(layer.name)
        own = [
            (term, call, b.select(-4, 0))  # (…, N, S, d_out)
            for term, seen in reached.items()
            for call, b in seen
            if call.layer is layer
        ]
        made = torch.zeros_like(G)
        for term, call, b in own:
            g = call.a.product(b)
            made += g.mT if term.endswith(TURNED) else g
        left, bound = (made - G).norm(), tolerance(layer, G) * G.norm()
        if bool(left <= bound):
            return
        # Rounding of what may have cancelled.
        size = sum(float(b.norm() * call.a.squares().sqrt()) for _, call, b in own)
        if bool(left > bound + 100 * torch.finfo(G.dtype).eps * size):
            self.unexplained[layer.name] = (
                "it is used in a way that cannot be watched, beside or instead of its module's call"
            )
            self._verified.discard(layer.name)

    def _file_entries(self, part: Part, name: str, G: Tensor) -> None:
        """Gradients in a layer's own entries (V, …) as rows of one example."""
        b = G.flatten(1)[:, None, None, :]  # (V, 1, 1, numbers)
        ones = DenseRows(b.new_ones(1, 1, 1))
        stats = Statistics(ones, b, b.new_ones(()), 1, max(part.forwards, default=0))
        part.statistics[name + ENTRIES] = [stats]

    def statistics(self, call: LayerCall, b: Tensor, weights: Tensor) -> Statistics:
        """Of one call of a layer, with the criterion's weights of its positions."""
        N, S = call.a.counts
        w = row_weights(weights, N, S)
        if call.seen.present is not None:
            w = with_mask(w, call.seen.present & _alive(b))
        elif S > 1 and not call.layer.kind.sums(call.layer) and b.dim() == 4:
            w = with_mask(w, _alive(b))
        return Statistics(call.a, b, w, weights.numel() // N if weights.dim() else 0, call.forward)


def _side_by_side(draws: Sequence[Tensor]) -> Tensor:
    """Rows (…, N, S, d_out) of several draws as (…, V, N, S, d_out); of one without a copy."""
    return draws[0].unsqueeze(-4) if len(draws) == 1 else torch.stack(list(draws), -4)


def _alive(b: Tensor) -> Tensor:
    """Of rows b (V, N, S, d_out) those that anything flows back to, (N, S)."""
    first = (b[..., 0] != 0).any(0)
    if b.device.type == "cpu" and bool(first.all()):
        return first  # one entry of each row is enough to tell
    return (b != 0).any(-1).any(0)
