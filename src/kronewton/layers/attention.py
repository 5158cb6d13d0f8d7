"""`nn.MultiheadAttention`: four linear layers that are never called as modules.

The projections of queries, keys and values are rows of one packed matrix, or three matrices with
rows of one packed bias; each is a layer of its own. What they see is recorded from inside torch's
own attention (`recording`), with examples in front.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kronewton.layers.base import Layer, not_of_torch
from kronewton.layers.linear import LinearKind

PROJECTIONS = ("q", "k", "v")


class ProjectionKind(LinearKind):
    """One of the projections, of the module's parameters whose names it is made with."""

    name = "attention"
    hooked = False

    def __init__(self, weight: str, bias: str) -> None:
        self.weight, self.bias = weight, bias

    def matrix(self, layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
        return super().matrix(self._named(layer), self._renamed(tensors))

    def split(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        own = {"weight": self.weight, "bias": self.bias}
        found = super().split(self._named(layer), matrix)
        return {own[name]: tensor for name, tensor in found.items()}

    def _renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {self.weight: "weight", self.bias: "bias"}
        return {own[name]: tensor for name, tensor in tensors.items()}

    def _named(self, layer: Layer) -> Layer:
        """The layer as a linear one."""
        own = {self.weight: "weight", self.bias: "bias"}
        return Layer(layer.name, layer.module, self, tuple(own[name] for name in layer.trained))


class AttentionKind(LinearKind):
    """The module as a whole: which layers it is."""

    name = "attention"

    def layers(self, name: str, module: nn.Module, own: Sequence[str]) -> list[Layer]:
        assert isinstance(module, nn.MultiheadAttention)
        E, dot = module.embed_dim, f"{name}." if name else ""
        found = []
        for i, letter in enumerate(PROJECTIONS):
            packed = module.in_proj_weight is not None
            weight = "in_proj_weight" if packed else f"{letter}_proj_weight"
            kind = ProjectionKind(weight, "in_proj_bias")
            rows = slice(i * E, (i + 1) * E)
            parts = {"in_proj_bias": rows, **({weight: rows} if packed else {})}
            trained = tuple(k for k in (weight, "in_proj_bias") if k in own)
            if trained:
                layer = Layer(f"{dot}{letter}_proj", module, kind, trained, parts)
                found.append(layer)
        return found

    def leftover(self, module: nn.Module) -> str:
        return "it is joined to keys or values"

    def refusal(self, module: nn.Module) -> str:
        return not_of_torch(module, (nn.MultiheadAttention,))
