"""What a use of a matrix without a module's call shows of the layers that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kronewton.layers.base import DenseRows, Layer, Seen, at_least_float32, kept, rows_of
from kronewton.layers.embedding import EmbeddingKind, token_sight
from kronewton.layers.linear import LinearKind
from kronewton.layers.lone import LoneKind
from kronewton.recording import Use, placed

Owners = Mapping[int, Sequence[tuple[Layer, str]]]  # of a parameter: layers, and its name there


def matrices(layers: Sequence[Layer]) -> Owners:
    """By the id of a parameter, the layers that it can be seen as a matrix or a bias of."""
    found: dict[int, list[tuple[Layer, str]]] = {}
    for layer in layers:
        if isinstance(layer.kind, (LinearKind, EmbeddingKind, LoneKind)):
            for name, p in layer.whole().items():
                found.setdefault(id(p), []).append((layer, name))
    return found


def sightings(use: Use, owners: Owners) -> Iterator[tuple[Layer, bool, Seen]]:
    """The layers whose matrix was used, whether turned, and what was seen of each."""
    place = placed(use.weight)
    done: set[int] = set()
    for layer, name in owners.get(place.parameter, ()) if place else ():
        assert place is not None
        if name == _weight(layer) and layer.whole()[name].dim() == 2:
            cut = _cut(layer.parts.get(name), place.rows)
            if cut is not None:
                turned = (place.turned != use.looked_up) != isinstance(layer.kind, EmbeddingKind)
                yield layer, turned, _of_matrix(layer, use, turned, cut)
                done.add(id(layer))
    bias = None if use.bias is None else placed_vector(use.bias)
    for layer, name in owners.get(bias, ()) if bias is not None else ():
        whole = len(layer.whole()[name]) == len(use.bias if use.bias is not None else ())
        if id(layer) not in done and layer.trained == (name,) and whole and not layer.parts:
            yield layer, False, _of_bias(use)


def placed_vector(bias: Tensor) -> int | None:
    """The id of the parameter that a bias is or is a part of."""
    base = bias if bias._base is None else bias._base
    return id(base)


def _weight(layer: Layer) -> str:
    """The name of the parameter that is a layer's matrix."""
    return layer.trained[0] if isinstance(layer.kind, LoneKind) else layer.kind.weight


def _cut(own: slice | None, used: slice | None) -> slice | None:
    """The layer's rows among those that were used; None if not all of them were."""
    if used is None:
        return own or slice(None)
    if own is None or own.start < used.start or own.stop > used.stop:
        return None
    return slice(own.start - used.start, own.stop - used.start)


def _of_matrix(layer: Layer, use: Use, turned: bool, cut: slice) -> Seen:
    """Rows of y = x W', or of a look-up; a layer with a bias gets an entry 1 or 0 for it."""
    if use.looked_up:
        seen = token_sight(use.x, use.output, len(use.weight), None)
        return replace(seen, rows=lambda g: _padded(layer, seen.rows(g), turned))
    x = _examples_first(kept(use.x, use.output), use)
    a = x if turned or "bias" not in _roles(layer) else _with_bias(x, layer, use)

    def rows(gradients: Sequence[Tensor | None]) -> Tensor:
        (u,) = gradients
        assert u is not None
        b = _examples_first(at_least_float32(u), use)[..., cut]
        return _padded(layer, b, turned)

    return Seen(DenseRows(a), (), rows, batched=use.x.dim() > 1)


def _roles(layer: Layer) -> Sequence[str]:
    """The layer's parameters by what they are."""
    return ["weight" if k == _weight(layer) else "bias" for k in layer.trained]


def _with_bias(x: Tensor, layer: Layer, use: Use) -> Tensor:
    own = [p for k, p in layer.whole().items() if k != _weight(layer)]
    used = use.bias is not None and placed_vector(use.bias) in [id(p) for p in own]
    return torch.cat([x, x.new_full((*x.shape[:-1], 1), float(used))], -1)


def _padded(layer: Layer, b: Tensor, turned: bool) -> Tensor:
    """Of a turned matrix with a bias column, that column is a row, and not used."""
    if not turned or "bias" not in _roles(layer):
        return b
    return torch.cat([b, b.new_zeros(*b.shape[:-1], 1)], -1)


def _examples_first(x: Tensor, use: Use) -> Tensor:
    """(N, S, d); torch's attention has (T, N, d), or both in one."""
    if use.examples is None:
        return rows_of(x)
    return x.reshape(-1, use.examples, x.shape[-1]).transpose(0, 1)


def _of_bias(use: Use) -> Seen:
    """A bias of its own: A = [1], gradients summed over positions."""

    def rows(gradients: Sequence[Tensor | None]) -> Tensor:
        (u,) = gradients
        assert u is not None
        return _examples_first(at_least_float32(u), use).sum(1, keepdim=True)

    N = len(_examples_first(use.output.detach(), use))
    return Seen(DenseRows(at_least_float32(use.output.detach()).new_ones(N, 1, 1)), (), rows)
