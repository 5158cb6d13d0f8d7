"""`nn.Bilinear`: y = W (x₁ ⊗ x₂) + bias, a linear layer on the products of two inputs' entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kronewton.layers.base import (
    Call,
    DenseRows,
    Kind,
    Layer,
    Seen,
    at_least_float32,
    kept,
    not_of_torch,
    rows_of,
    with_bias_entry,
)


class BilinearKind(Kind):
    """The weight (d_out, d₁, d₂) as (d_out, d₁·d₂), the bias its last column."""

    name = "bilinear"

    def see(self, layer: Layer, call: Call) -> Seen | None:
        output = call.output
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        x1, x2 = (rows_of(kept(call.argument(i, f"input{i + 1}"))) for i in (0, 1))
        a = (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2)  # (N, S, d₁·d₂)
        if "weight" not in layer.trained:
            a = a.new_ones(*a.shape[:-1], 1)
        elif "bias" in layer.trained:
            a = with_bias_entry(a)

        def rows(gradients: Sequence[Tensor | None]) -> Tensor:
            (u,) = gradients
            assert u is not None
            return rows_of(at_least_float32(u))

        return Seen(DenseRows(a), (output,), rows, batched=output.dim() > 1)

    def matrix(self, layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
        d_out = len(next(iter(tensors.values())))
        return torch.cat([t.reshape(d_out, -1) for t in tensors.values()], 1)

    def split(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        own = layer.parameters()
        widths = [p.numel() // len(p) for p in own.values()]
        pieces = zip(own.items(), matrix.split(widths, 1), strict=True)
        return {name: piece.reshape(p.shape) for (name, p), piece in pieces}

    def refusal(self, module: nn.Module) -> str:
        return not_of_torch(module, (nn.Bilinear,))
