"""`nn.PReLU`: y = max(x, 0) + w∘min(x, 0), a slope for all channels or for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from kronewton.layers.base import (
    Call,
    Kind,
    Layer,
    Seen,
    as_column,
    at_least_float32,
    from_column,
    kept,
    not_of_torch,
    ones_like_examples,
)


class PReLUKind(Kind):
    """The slopes as one column: A = [1], b an example's own gradient. Exact for any batch."""

    name = "PReLU"

    def see(self, layer: Layer, call: Call) -> Seen | None:
        output = call.output
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        x = kept(call.argument(0, "input"))
        batched = x.dim() > 1
        below = x.clamp(max=0)
        below = below if batched else below.unsqueeze(0)
        slopes = layer.parameters()["weight"].numel()

        def rows(gradients: Sequence[Tensor | None]) -> Tensor:
            (u,) = gradients
            assert u is not None
            moved = at_least_float32(u).reshape(below.shape) * below  # (N, C, *positions)
            if slopes == 1:
                return moved.flatten(1).sum(1).reshape(-1, 1, 1)
            return moved.flatten(2).sum(2).unsqueeze(1) if moved.dim() > 2 else moved.unsqueeze(1)

        return Seen(ones_like_examples(len(below), below), (output,), rows, batched=batched)

    def sums(self, layer: Layer) -> bool:
        return True

    def matrix(self, layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
        return as_column(tensors)

    def split(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        return from_column(layer, matrix)

    def refusal(self, module: nn.Module) -> str:
        return not_of_torch(module, (nn.PReLU,))
