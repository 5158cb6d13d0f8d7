"""Parameters that no kind knows: positional tables, class tokens, layer scales, odd weights.

Nothing is known of how they are used, so that there are no rows. Their own gradients under draws
of the model's predictions are: with independent draws the square of their sum over examples is an
unbiased estimate of the sum of squares, which is the diagonal of the block. A parameter that is
seen as a matrix in a product (`x @ W`, `F.linear`, `F.embedding`) has rows all the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kronewton.layers.base import Kind, Layer, as_column, from_column


class LoneKind(Kind):
    """A parameter on its own: itself where it is a matrix, else a column."""

    name = "parameter"
    hooked = False

    def sums(self, layer: Layer) -> bool:
        return layer.parameters()[layer.trained[0]].dim() != 2

    def matrix(self, layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
        (tensor,) = tensors.values()
        return tensor if tensor.dim() == 2 else as_column(tensors)

    def split(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        (name,) = layer.trained
        if layer.parameters()[name].dim() == 2:
            return {name: matrix}
        return from_column(layer, matrix)

    def refusal(self, module: nn.Module) -> str:
        return ""
