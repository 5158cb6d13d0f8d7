"""What is done with the rows of layers' calls: weights, masks, several calls as one, gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kronewton.factors import Observation
from kronewton.layers import DenseRows, Layer
from kronewton.layers.base import at_least_float32
from kronewton.layers.embedding import TokenRows
from kronewton.types import Rows, Statistics


def row_weights(weights: Tensor, N: int, S: int) -> Tensor:
    """The weights of a criterion's positions (N, *positions), carried to the rows of a layer.

    Position by position where the shapes agree; summed over an example's positions and spread
    over its rows where only the examples agree; the mean for all rows otherwise.
    """
    if not any(weights.stride()):  # one number, expanded
        return weights.flatten()[0] if weights.numel() else weights.new_zeros(())
    if weights.numel() == N * S:
        return weights.reshape(N, S)
    if weights.dim() > 0 and weights.shape[0] == N:
        return weights.reshape(N, -1).mean(1, keepdim=True).expand(N, S)
    return weights.mean()


def with_mask(weights: Tensor, alive: Tensor) -> Tensor:
    """Weights of rows (N, S) where rows that nothing flows back to are not there.

    A row that the criterion gives no weight but that others depend on (a prompt, through
    attention) is as much there as the average row.
    """
    if weights.device.type == "cpu":  # elsewhere asking would wait for the device
        if bool(alive.all()) and (weights.dim() == 0 or bool((weights > 0).all())):
            return weights
        of_examples = weights.dim() == 0 or not any(weights.stride()[1:])
        first = alive[:, :1]
        if of_examples and alive.shape[1] > 1 and torch.equal(first.expand_as(alive), alive):
            # What holds for an example holds for its positions, which is cheaper to reckon with.
            one = weights if weights.dim() == 0 else weights[:, :1]
            return with_mask(one, first).expand_as(alive)
    spread = weights.expand(alive.shape)
    mean = spread.sum() / (spread > 0).sum().clamp_min(1)
    return torch.where(alive, torch.where(spread > 0, spread, mean), torch.zeros_like(spread))


def joined(calls: list[Statistics]) -> list[Statistics]:
    """A layer's calls in one forward pass as one: its examples at more positions.

    Calls with different numbers of examples stay apart, and so do different forward passes.
    """
    groups: dict[tuple[int, int, int], list[Statistics]] = {}
    for stats in calls:
        key = (stats.forward, stats.a.counts[0], stats.b.shape[-4])
        groups.setdefault(key, []).append(stats)
    return [_joined(group) for group in groups.values()]


def _joined(calls: list[Statistics]) -> Statistics:
    first = calls[0]
    if len(calls) == 1:
        return first
    weights = first.weights
    if any(s.weights.dim() for s in calls):
        weights = torch.cat([s.weights.expand(s.a.counts) for s in calls], 1)
    a = _side_by_side([s.a for s in calls])
    b = torch.cat([s.b for s in calls], -2)
    return replace(first, a=a, b=b, weights=weights)


def _side_by_side(calls: Sequence[Rows]) -> Rows:
    """The rows of several calls as more positions of the same examples."""
    tokens = [a for a in calls if isinstance(a, TokenRows)]
    if len(tokens) == len(calls) and len({(a.size, a.tokens.shape[-1]) for a in tokens}) == 1:
        shares = torch.cat([a.shares for a in tokens], 1)
        return TokenRows(torch.cat([a.tokens for a in tokens], 1), shares, tokens[0].size)
    return DenseRows(torch.cat([a.dense() for a in calls], -2))


def own_gradient(
    layer: Layer, gradients: Sequence[Tensor | None], place: Mapping[int, int]
) -> Tensor | None:
    """The gradient in a layer's parameters as its matrix; None if the output does not need them."""
    whole = layer.whole()
    found = {k: gradients[place[id(p)]] if id(p) in place else None for k, p in whole.items()}
    if all(g is None for g in found.values()):
        return None
    tensors = {}
    for k, g in found.items():
        g = torch.zeros_like(whole[k]) if g is None else g
        tensors[k] = layer.cut(k, at_least_float32(g.to_dense() if g.is_sparse else g))
    return layer.kind.matrix(layer, tensors)


def tolerance(layer: Layer, G: Tensor) -> float:
    """How far a gradient that is made from rows may be from autograd's by rounding alone."""
    half = any(p.dtype not in (torch.float32, torch.float64) for p in layer.whole().values())
    if half or torch.is_autocast_enabled(G.device.type):
        return 0.3
    return 1e-6 if G.dtype == torch.float64 else 1e-2


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
    return {term: _alike(seen) if len(seen) > 1 else seen for term, seen in found.items()}


def _alike(seen: list[Observation]) -> list[Observation]:
    """All in the widest precision of any: a model may have been cast while they came in."""
    if len({stats.b.dtype for stats, _ in seen}) == 1:
        return seen
    widest = max((stats.b.dtype for stats, _ in seen), key=lambda dtype: dtype.itemsize)
    return [
        (replace(stats, a=DenseRows(stats.a.dense().to(widest)), b=stats.b.to(widest)), part)
        for stats, part in seen
    ]
