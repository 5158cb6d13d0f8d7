"""Which parameters are used as matrices without a module's call: a record of torch's functions.

`F.linear(x, table.weight)`, `x @ self.W` and the projections inside torch's own attention leave no
module's hook a trace. While a model that is watched runs forward, a torch function mode sees them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

INSIDE = ("_in_projection_packed", "_in_projection", "multi_head_attention_forward")


@dataclass(frozen=True, eq=False)
class Use:
    """One use of a matrix: y = x W' + bias, or rows of W looked up by tokens."""

    weight: Tensor  # as it was given, (d_out, d_in): a parameter or a view of one
    bias: Tensor | None
    x: Tensor  # (…, d_in), or tokens
    output: Tensor
    edge: GradientEdge
    looked_up: bool = False
    examples: int | None = None  # inside torch's attention, which has its examples second


class Recorder(TorchFunctionMode):
    """Records every use of a matrix for as long as it is entered."""

    def __init__(self, seen: Callable[[Use], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Any, kinds: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            query = args[0] if args else kwargs["query"]
            N = query.shape[1] if query.dim() == 3 else 1
            return _attention(partial(self._linear, N))(*args, **kwargs)
        result = func(*args, **kwargs)
        shown = isinstance(result, Tensor) and result.requires_grad and result.numel() > 0
        if func in WATCHED and shown:
            found = WATCHED[func](args, kwargs, result)
            if found is not None:
                self.seen(found)
        return result

    def _linear(self, N: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` inside attention on N examples."""
        y = F.linear(x, weight, bias)
        if y.requires_grad and y.numel():
            self.seen(Use(weight, bias, x, y, get_gradient_edge(y), examples=N))
        return y


def _attention(linear: Callable[..., Tensor]) -> Callable[..., Any]:
    """torch's own attention, its linear layers made with another function than torch's."""
    own = dict(vars(F))
    own.update(linear=linear, has_torch_function=lambda tensors: False)
    for name in INSIDE:
        code = getattr(F, name)
        made = types.FunctionType(code.__code__, own, name, code.__defaults__, code.__closure__)
        made.__kwdefaults__ = code.__kwdefaults__
        own[name] = made
    function: Callable[..., Any] = own[INSIDE[-1]]
    return function


def _of_linear(args: Sequence[Any], kwargs: dict[str, Any], y: Tensor) -> Use | None:
    x, weight, bias = _arguments(args, kwargs, ("input", "weight", "bias"))
    return Use(weight, bias, x, y, get_gradient_edge(y))


def _of_product(args: Sequence[Any], kwargs: dict[str, Any], y: Tensor) -> Use | None:
    x, matrix = _arguments(args, kwargs, ("input", "other"))[:2]
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or not isinstance(x, Tensor):
        return None
    return Use(matrix.t(), None, x, y, get_gradient_edge(y))


def _of_sum(args: Sequence[Any], kwargs: dict[str, Any], y: Tensor) -> Use | None:
    bias, x, matrix = _arguments(args, kwargs, ("input", "mat1", "mat2"))
    plain = kwargs.get("alpha", 1) == 1 and kwargs.get("beta", 1) == 1 and len(args) <= 3
    if not plain or not isinstance(matrix, Tensor):
        return None
    return Use(matrix.t(), bias, x, y, get_gradient_edge(y))


def _of_look_up(args: Sequence[Any], kwargs: dict[str, Any], y: Tensor) -> Use | None:
    tokens, table = _arguments(args, kwargs, ("input", "weight"))[:2]
    odd = ("padding_idx", "max_norm", "scale_grad_by_freq")
    if len(args) > 2 or any(kwargs.get(name) not in (None, False) for name in odd):
        return None
    return Use(table, None, tokens, y, get_gradient_edge(y), looked_up=True)


def _arguments(args: Sequence[Any], kwargs: dict[str, Any], names: Sequence[str]) -> list[Any]:
    """The named arguments, None where one was not given."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


WATCHED: dict[Any, Callable[[Sequence[Any], dict[str, Any], Tensor], Use | None]] = {
    F.linear: _of_linear,
    torch.matmul: _of_product,
    torch.mm: _of_product,
    Tensor.matmul: _of_product,
    Tensor.mm: _of_product,
    Tensor.__matmul__: _of_product,
    torch.addmm: _of_sum,
    F.embedding: _of_look_up,
}


@dataclass(frozen=True)
class Place:
    """Where in a parameter a matrix that was used lies."""

    parameter: int  # its id
    rows: slice | None  # None: all of it
    turned: bool


def placed(weight: Tensor) -> Place | None:
    """The parameter that a matrix is, or is rows of, or is the transposed of; None for others."""
    if isinstance(weight, nn.Parameter):
        return Place(id(weight), None, turned=False)
    base = weight._base
    if base is None or base.dim() != 2 or weight.dim() != 2 or not isinstance(base, nn.Parameter):
        return None
    if weight.shape == base.t().shape and weight.stride() == base.t().stride():
        same = weight.data_ptr() == base.data_ptr()
        return Place(id(base), None, turned=True) if same else None
    if weight.shape[1] != base.shape[1] or weight.stride() != base.stride():
        return None
    first, rest = divmod(int(weight.storage_offset() - base.storage_offset()), base.stride(0))
    if rest:
        return None
    rows = None if len(weight) == len(base) else slice(first, first + len(weight))
    return Place(id(base), rows, turned=False)
