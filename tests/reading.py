"""What the optimizer holds for a layer, read from outside.

Whatever that is, a step is linear in the gradient. Put one unit vector after the other where the
gradient is, and the steps are the columns of −(C + λI)⁻¹: so C itself is read, and compared with
dense blocks from autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kronewton as kn
import oracles
from oracles import distance

F64 = torch.float64
EXACT = 1e-12
PINNED: dict[str, Any] = {
    "lr": 1.0,
    "momentum": 0.0,
    "trust_region": None,
    "weight_decay": 0.0,
    "fisher": "exact",
    "basis": "eigen",
    "factor_every": 1,
    "inverse_every": 1,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def scale_of(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, layer: str | None = None
) -> float:
    """The trace of a layer's block: an upper bound of its eigenvalues. Without one, the largest."""
    layers = oracles.trained_layers(model) if layer is None else [layer]
    return max(float(oracles.ggn_block(model, criterion, x, y, k).trace()) for k in layers)


def backward(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, sizes: Sequence[int] = ()
) -> None:
    """The gradient of a batch, or of micro-batches of the given sizes that make it up."""
    total = 1 if getattr(criterion, "reduction", "mean") == "sum" else len(x)
    for xs, ys in zip(x.split(sizes or len(x)), y.split(sizes or len(x)), strict=True):
        share = 1 if total == 1 else len(xs) / total
        (criterion(model(xs), ys) * share).backward()


def read_blocks(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, **how: Any
) -> dict[str, Tensor]:
    """C of every trained layer, over the rows of its matrix one after the other."""
    blocks = {}
    for layer in oracles.trained_layers(model):
        # Damped by as much as C is large: then no digit of C is lost.
        damping = scale_of(model, criterion, x, y, layer)
        M = oracles.matrix(model, layer)
        units = torch.eye(M.numel(), dtype=F64)
        columns = [
            -_step(model, criterion, x, y, layer, unit.reshape(M.shape), damping=damping, **how)
            for unit in units
        ]
        blocks[layer] = torch.linalg.inv(torch.stack(columns, 1)) - damping * units
    return blocks


def _step(
    model: nn.Module,
    criterion: nn.Module,
    x: Tensor,
    y: Tensor,
    layer: str,
    gradient: Tensor,
    sizes: Sequence[int] = (),
    order: Callable[[list[Tensor]], Any] = list,
    **options: Any,
) -> Tensor:
    """The first step of a copy's layer with a gradient of our choice, flattened."""
    model, before = copy.deepcopy(model), oracles.matrix(model, layer)
    parameters = list(order([p for p in model.parameters() if p.requires_grad]))
    optimizer = kn.KFAC(parameters, criterion, model=model, **{**PINNED, **options})
    backward(model, criterion, x, y, sizes)
    for name, part in oracles.parts(model, layer, gradient).items():
        model.get_parameter(name).grad = part.clone()
    optimizer.step()
    optimizer.close()
    return (oracles.matrix(model, layer) - before).flatten()


def apart(
    blocks: dict[str, Tensor], model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor
) -> list[float]:
    """Distance of each layer's block from autograd's, the first layer first."""
    assert blocks
    return [
        distance(block, oracles.ggn_block(model, criterion, x, y, layer))
        for layer, block in blocks.items()
    ]


def after(
    model: nn.Module,
    criterion: nn.Module,
    x: Tensor,
    y: Tensor,
    sizes: Sequence[int] = (),
    factor: float = 1.0,
    steps: int = 1,
    **options: Any,
) -> Tensor:
    """How far some steps take a copy of the model, all its parameters in one vector."""
    model, start = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
    options = {**PINNED, **options, "damping": factor * options["damping"]}
    optimizer = kn.KFAC(model, criterion, **options)

    def scaled(z: Tensor, y: Tensor) -> Tensor:
        return factor * criterion(z, y)

    scaled.reduction = criterion.reduction
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, scaled, x, y, sizes)
        optimizer.step()
    optimizer.close()
    moved = [p.detach() - s for p, s in zip(model.parameters(), start, strict=True)]
    return torch.cat([m.flatten() for m in moved])
