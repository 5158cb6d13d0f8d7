"""What the library must know about a kind of layer, and nothing more."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronewton.linalg import second_moment
from kronewton.types import Rows


class Kind(ABC):
    """One kind of layer: its rows a and b, its weight as a matrix and back."""

    name: str

    @abstractmethod
    def example_dims(self, layer: Layer) -> int:
        """How many dimensions the layer's output has for one example."""

    @abstractmethod
    def input_rows(self, layer: Layer, inputs: Tensor, outputs: torch.Size) -> Rows:
        """The layer's input as rows a (…, N, S, d_in), the bias entry included."""

    @abstractmethod
    def output_rows(self, layer: Layer, gradients: Tensor) -> Tensor:
        """Gradients in the layer's output as rows b (…, N, S, d_out)."""

    @abstractmethod
    def matrix(self, layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
        """Tensors shaped like the layer's trained parameters, as one matrix (…, d_out, d_in)."""

    @abstractmethod
    def split(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of `matrix`: one tensor for each trained parameter."""

    @abstractmethod
    def refusal(self, module: nn.Module) -> str:
        """Why this module cannot be covered, in a few words; empty if it can."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A module of the model that a kind covers, and which of its parameters are trained."""

    name: str
    module: nn.Module
    kind: Kind
    trained: tuple[str, ...]  # in the module's own names: ("weight", "bias")

    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters, looked up now: wrappers may have replaced them."""
        return {name: getattr(self.module, name) for name in self.trained}


@dataclass(frozen=True, eq=False)
class DenseRows(Rows):
    """Rows that are laid out in memory."""

    rows: Tensor  # (…, N, S, d_in)

    @property
    def counts(self) -> tuple[int, int]:
        N, S = self.rows.shape[-3:-1]
        return N, S

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.rows[..., start:stop, :, :]

    def second_moment(self, weights: Tensor | None = None) -> Tensor:
        flat = None if weights is None else weights.reshape(-1)
        return second_moment(self.rows.flatten(-3, -2), flat)

    def averaged(self, shares: Tensor | None = None) -> Rows:
        if shares is None:
            return DenseRows(self.rows.mean(-2, keepdim=True))
        return DenseRows(shares.unsqueeze(-2) @ self.rows)  # (N, 1, S) times (…, N, S, d_in)


def rows_of(tensor: Tensor) -> Tensor:
    """A tensor (N, *positions, d), or (d,) without a batch, as (N, S, d)."""
    if tensor.dim() == 1:
        return tensor.reshape(1, 1, -1)
    # Not −1: an empty batch leaves it undefined.
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:-1]), tensor.shape[-1])


def with_bias_entry(rows: Tensor) -> Tensor:
    """Append the constant 1 that multiplies the bias: (N, S, d) to (N, S, d + 1)."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
