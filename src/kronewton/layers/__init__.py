"""The table of layer kinds, and the search of a model for the layers that they cover."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from kronewton.layers.base import DenseRows, Kind, Layer
from kronewton.layers.convolution import (
    CONVOLUTIONS,
    TRANSPOSED,
    ConvolutionKind,
    TransposedKind,
)
from kronewton.layers.linear import LinearKind

KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: LinearKind(),
    **dict.fromkeys(CONVOLUTIONS, ConvolutionKind()),
    **dict.fromkeys(TRANSPOSED, TransposedKind()),
}

__all__ = ["KINDS", "DenseRows", "Kind", "Layer", "find_layers"]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of the nearest class in the module's ancestry, or None."""
    return next((KINDS[base] for base in type(module).__mro__ if base in KINDS), None)


def find_layers(model: nn.Module, trained: Collection[int]) -> tuple[list[Layer], dict[int, str]]:
    """The layers that can be covered, and for every other trained parameter the reason why not.

    `trained` holds the ids of the parameters to train. The reasons are keyed by the same ids.
    """
    reasons: dict[int, str] = {}
    owners: dict[int, list[str]] = {}
    candidates: list[Layer] = []
    for name, module in model.named_modules():
        own = {k: p for k, p in module.named_parameters(recurse=False) if id(p) in trained}
        for parameter in own.values():
            owners.setdefault(id(parameter), []).append(name or "the model")
        kind = kind_of(module)
        why = f"{type(module).__name__} has no kind yet" if kind is None else kind.refusal(module)
        order = tuple(k for k in ("weight", "bias") if k in own)
        if kind is not None and len(order) < len(own):
            why = why or "its weight is computed from other parameters"
        reasons.update({id(p): why for p in own.values()})
        if kind is not None and not why and own:
            candidates.append(Layer(name, module, kind, order))
    layers = []
    for layer in candidates:
        ids = [id(p) for p in layer.parameters().values()]
        tied = [i for i in ids if len(owners[i]) > 1]
        if tied:
            # A parameter of two modules has a curvature that is a sum of two Kronecker products.
            shared = f"shared by {' and '.join(owners[tied[0]])}"
            reasons.update(dict.fromkeys(ids, shared))
        else:
            layers.append(layer)
            for i in ids:
                reasons.pop(i)
    return layers, reasons
