"""`nn.Linear`, and the same with W laid the other way: the bias is the matrix's last column."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kronewton.layers.base import DenseRows, Kind, Layer, not_of_torch, rows_of
from kronewton.types import Rows


class LinearKind(Kind):
    """y = W a + bias for inputs of any leading shape (N, *positions, d_in)."""

    name = "linear"

    def example_dims(self, layer: Layer) -> int:
        return 1

    def input_rows(self, layer: Layer, inputs: Tensor, outputs: torch.Size) -> Rows:
        rows = rows_of(inputs)
        if "weight" not in layer.trained:
            return DenseRows(rows.new_ones(*rows.shape[:-1], 1))
        return DenseRows(rows, "bias" in layer.trained)

    def output_rows(self, layer: Layer, gradients: Tensor) -> Tensor:
        return rows_of(gradients)

    def matrix(self, layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
        parts = [
            tensors[name] if name == "weight" else tensors[name].unsqueeze(1)
            for name in layer.trained
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def split(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        if layer.trained == ("weight",):
            return {"weight": matrix}
        if layer.trained == ("bias",):
            return {"bias": matrix[:, 0]}
        return {"weight": matrix[:, :-1], "bias": matrix[:, -1]}

    def refusal(self, module: nn.Module) -> str:
        return not_of_torch(module, (nn.Linear,))


class ConvOneKind(Kind):
    """`Conv1D` of Hugging Face's GPT-2, a linear layer whose weight is W', (d_in, d_out).

    Known by its name and its shapes, so that nothing need be imported and copies of it count, too.
    """

    name = "linear"

    def example_dims(self, layer: Layer) -> int:
        return 1

    def input_rows(self, layer: Layer, inputs: Tensor, outputs: torch.Size) -> Rows:
        return LINEAR.input_rows(layer, inputs, outputs)

    def output_rows(self, layer: Layer, gradients: Tensor) -> Tensor:
        return rows_of(gradients)

    def matrix(self, layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
        return LINEAR.matrix(layer, _turned(tensors))

    def split(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        return _turned(LINEAR.split(layer, matrix))

    def refusal(self, module: nn.Module) -> str:
        return ""


LINEAR = LinearKind()


def is_conv_one(module: nn.Module) -> bool:
    """Whether a module has the name, the parameters and the number of outputs of a `Conv1D`."""
    own = dict(module.named_parameters(recurse=False))
    if type(module).__name__ != "Conv1D" or set(own) != {"weight", "bias"}:
        return False
    d_out = getattr(module, "nf", None)
    return own["weight"].dim() == 2 and own["weight"].shape[1:] == own["bias"].shape == (d_out,)


def _turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.mT if name == "weight" else t for name, t in tensors.items()}
