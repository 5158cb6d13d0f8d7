"""What the library must know about a kind of layer, and nothing more."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kronewton.structure import DENSE, Sides, Structure, side_of
from kronewton.types import Rows

TURNED = " (turned)"  # behind a layer's name: its matrix in the other orientation
ENTRIES = " (entries)"  # likewise: gradients in its entries, where no rows can be seen


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module, as its hook saw it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def argument(self, place: int, name: str) -> Any:
        """An argument by its place or its name; None if it was not given."""
        if place < len(self.args):
            return self.args[place]
        return self.kwargs.get(name)


@dataclass(frozen=True, eq=False)
class Seen:
    """What one layer showed in one call of its module."""

    a: Rows  # (…, N, S, d_in)
    outputs: tuple[Tensor, ...]  # the gradients in them give the rows b
    rows: Callable[[Sequence[Tensor | None]], Tensor]  # → b (…, N, S, d_out), detached
    present: Tensor | None = None  # (N, S), False for rows that are padding
    batched: bool = True  # or a single example without a dimension for it


class Kind(ABC):
    """One kind of layer: its rows a and b, its weight as a matrix and back."""

    name: str
    weight = "weight"  # the parameter whose tying is understood
    hooked = True  # whether a call of the module shows them

    def layers(self, name: str, module: nn.Module, own: Sequence[str]) -> list[Layer]:
        """The layers that a module is, of those of its parameters that are trained."""
        trained = tuple(k for k in ("weight", "bias") if k in own)
        return [Layer(name, module, self, trained)] if trained else []

    def watch(self, layers: Sequence[Layer], call: Call) -> list[Seen | None]:
        """What each of a module's layers shows in a call of it; None: nothing that is trained."""
        return [self.see(layer, call) for layer in layers]

    def see(self, layer: Layer, call: Call) -> Seen | None:
        """The same for one layer: of one input and one output, unless a kind says otherwise."""
        output = call.output
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        given = call.argument(0, "input")
        inputs = kept(next(iter(call.kwargs.values())) if given is None else given, output)
        a = self.input_rows(layer, inputs, output.shape)

        def rows(gradients: Sequence[Tensor | None]) -> Tensor:
            (u,) = gradients
            assert u is not None
            return self.output_rows(layer, at_least_float32(u))

        return Seen(a, (output,), rows, batched=output.dim() > self.example_dims(layer))

    def sums(self, layer: Layer) -> bool:
        """Whether a is 1, so that gradients can be summed over positions, which is exact."""
        return False

    def example_dims(self, layer: Layer) -> int:
        """How many dimensions the layer's output has for one example."""
        raise NotImplementedError

    def input_rows(self, layer: Layer, inputs: Tensor, outputs: torch.Size) -> Rows:
        """The layer's input as rows a (…, N, S, d_in), the bias entry included."""
        raise NotImplementedError

    def output_rows(self, layer: Layer, gradients: Tensor) -> Tensor:
        """Gradients in the layer's output as rows b (…, N, S, d_out)."""
        raise NotImplementedError

    def sides(self, shape: Sequence[int], largest: int, sharing: str) -> Sides:
        """How the factors of a matrix of this shape (…, d_out, d_in) are stored."""
        d_out, d_in = shape[-2:]
        return Sides(side_of(d_in, d_out, largest), side_of(d_out, d_in, largest))

    def leftover(self, module: nn.Module) -> str:
        """Why a parameter of a covered module is in none of its layers."""
        return "its weight is computed from other parameters"

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
    """A matrix of trained parameters that has a block of its own, and the module that uses it.

    A module that uses the matrix of another one (tied weights) is a layer with an `owner`: what is
    seen of it belongs to the owner's block.
    """

    name: str
    module: nn.Module
    kind: Kind
    trained: tuple[str, ...]  # in the module's own names: ("weight", "bias")
    parts: Mapping[str, slice] = field(default_factory=dict)  # rows of a parameter, if not all
    owner: Layer | None = None
    turned: bool = False  # its matrix is its owner's transposed

    @property
    def term(self) -> str:
        """Under which name its statistics are filed."""
        return (self.owner or self).name + (TURNED if self.turned else "")

    def whole(self) -> dict[str, Tensor]:
        """The trained parameters, looked up now: wrappers may have replaced them."""
        return {name: getattr(self.module, name) for name in self.trained}

    def parameters(self) -> dict[str, Tensor]:
        """The same, of each only what belongs to this layer."""
        return {name: self.cut(name, p) for name, p in self.whole().items()}

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """The layer's own rows of something in the shape of a parameter, as a view."""
        return tensor[self.parts[name]] if name in self.parts else tensor


@dataclass(frozen=True, eq=False)
class DenseRows(Rows):
    """Rows that are laid out in memory, but for the constant 1 that multiplies a bias."""

    rows: Tensor  # (…, N, S, d_in), or one less
    bias: bool = False

    @property
    def counts(self) -> tuple[int, int]:
        N, S = self.rows.shape[-3:-1]
        return N, S

    @property
    def width(self) -> int:
        return self.rows.shape[-1] + self.bias

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        rows = self.rows[..., start:stop, :, :]
        return with_bias_entry(rows) if self.bias else rows

    def second_moment(self, weights: Tensor | None = None, structure: Structure = DENSE) -> Tensor:
        flat = None if weights is None else weights.reshape(-1)
        return structure.second_moment(self.dense().flatten(-3, -2), flat)

    def squares(self) -> Tensor:
        entries = self.rows.shape[:-1].numel() if self.bias else 0
        return self.rows.square().sum() + entries

    def some(self, start: int, stop: int) -> Rows:
        return DenseRows(self.rows[..., start:stop, :, :], self.bias)

    def averaged(self, shares: Tensor | None = None) -> Rows:
        if shares is None:
            return DenseRows(self.rows.mean(-2, keepdim=True), self.bias)
        return DenseRows(shares.unsqueeze(-2) @ self.dense())  # (N, 1, S) times (…, N, S, d_in)


def ones_like_examples(N: int, like: Tensor) -> DenseRows:
    """Rows a = [1], one for each example: (N, 1, 1)."""
    return DenseRows(like.new_ones(N, 1, 1))


def rows_of(tensor: Tensor) -> Tensor:
    """A tensor (N, *positions, d), or (d,) without a batch, as (N, S, d)."""
    if tensor.dim() == 1:
        return tensor.reshape(1, 1, -1)
    # Not −1: an empty batch leaves it undefined.
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:-1]), tensor.shape[-1])


def with_bias_entry(rows: Tensor) -> Tensor:
    """Append the constant 1 that multiplies the bias: (N, S, d) to (N, S, d + 1)."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


def as_column(tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors one after the other as a matrix of one column: (numbers, 1)."""
    return torch.cat([t.reshape(-1) for t in tensors.values()]).unsqueeze(1)


def from_column(layer: Layer, column: Tensor) -> dict[str, Tensor]:
    """The inverse of `as_column`, for a layer's trained parameters."""
    shapes = {name: p.shape for name, p in layer.parameters().items()}
    pieces = column.squeeze(-1).split([shape.numel() for shape in shapes.values()])
    return {n: t.reshape(s) for (n, s), t in zip(shapes.items(), pieces, strict=True)}


def kept(tensor: Tensor, output: Tensor | None = None) -> Tensor:
    """A module's input as it is now, in at least float32."""
    # The user may put the next batch where this one is. Activations stay as they are, for autograd
    # has them too; but where autocast has made a copy for it, they may be changed in place.
    stays = tensor.requires_grad and (output is None or output.dtype == tensor.dtype)
    return at_least_float32(tensor.detach() if stays else tensor.detach().clone())


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision is widened: second moments of bf16 numbers lose most of their digits."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def not_of_torch(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str:
    """Why a module is not what torch's class of that kind is; empty if it is."""
    own = "forward" not in vars(module)
    if own and any(type(module).forward is kind.forward for kind in kinds):
        return "" if _real(module) else "its parameters are not real floating-point numbers"
    nearest = next((k.__name__ for k in kinds if isinstance(module, k)), kinds[0].__name__)
    return f"its forward is not that of nn.{nearest}"


def _real(module: nn.Module) -> bool:
    parameters = module.parameters(recurse=False)
    return all(isinstance(p, Tensor) and p.is_floating_point() for p in parameters)
