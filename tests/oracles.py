"""Dense curvature of one layer, by autograd alone: what the library is held against.

A layer's matrix M is its weight with the bias as last column, or the trained one of the two. All
blocks are over M.flatten(), torch's row-major order, in which K-FAC reads B ⊗ A. The parameters of
a transposed convolution, which has its inputs first, stand one after the other in M's only row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd


def matrix(model: nn.Module, layer: str) -> Tensor:
    """M, (d_out, d_in), as it is now."""
    module = model.get_submodule(layer)
    trained = [p.detach() for p in module.parameters() if p.requires_grad]
    return torch.cat([p.reshape(_rows(module, p), -1) for p in trained], 1)


def _rows(module: nn.Module, parameter: Tensor) -> int:
    return 1 if getattr(module, "transposed", False) else len(parameter)


def trained_layers(model: nn.Module) -> list[str]:
    """The layers of a covered kind that have anything to train."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, _ConvNd))
        and any(p.requires_grad for p in module.parameters())
    ]


def parts(model: nn.Module, layer: str, M: Tensor) -> dict[str, Tensor]:
    """The layer's trained parameters, by their full names, as M has them."""
    found, column, module = {}, 0, model.get_submodule(layer)
    for name, p in module.named_parameters():
        if p.requires_grad:
            width = p.numel() // _rows(module, p)
            found[f"{layer}.{name}"] = M[:, column : column + width].reshape(p.shape)
            column += width
    return found


def output_of(model: nn.Module, x: Tensor, layer: str) -> Callable[[Tensor], Tensor]:
    """The network's output as a function of M.flatten()."""
    shape = matrix(model, layer).shape

    def output(m: Tensor) -> Tensor:
        return functional_call(model, parts(model, layer, m.reshape(shape)), (x,))

    return output


def gradient(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, layer: str) -> Tensor:
    """∂J/∂M, (d_out, d_in)."""
    M, output = matrix(model, layer), output_of(model, x, layer)
    m = M.flatten().requires_grad_()
    (g,) = torch.autograd.grad(criterion(output(m), y), m)
    return g.reshape(M.shape)


def hessian_block(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, layer: str
) -> Tensor:
    """∂²J/∂M², (d_out·d_in, d_out·d_in)."""
    output = output_of(model, x, layer)
    return torch.autograd.functional.hessian(
        lambda m: criterion(output(m), y), matrix(model, layer).flatten()
    )


def ggn_block(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, layer: str) -> Tensor:
    """J'ΛJ: all examples in one J, and Λ autograd's Hessian of the criterion in the output."""
    m, output = matrix(model, layer).flatten(), output_of(model, x, layer)
    J = torch.autograd.functional.jacobian(output, m).reshape(-1, len(m))
    z = output(m).detach()
    Lambda = torch.autograd.functional.hessian(lambda z: criterion(z, y), z)
    return J.T @ Lambda.reshape(len(J), len(J)) @ J


def damped_steps(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, damping: float
) -> dict[str, Tensor]:
    """−(J'ΛJ + λI)⁻¹g of every trained layer's own block, by a dense solve."""
    steps = {}
    for layer in trained_layers(model):
        g = gradient(model, criterion, x, y, layer)
        block = ggn_block(model, criterion, x, y, layer)
        block.diagonal().add_(damping)
        steps[layer] = -torch.linalg.solve(block, g.flatten()).reshape(g.shape)
    return steps


def distance(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float((found - exact).norm() / exact.norm())


def row_major(H: Tensor, m: int, n: int) -> Tensor:
    """A block over vec(W), columns stacked, as one over W.flatten()."""
    return H.reshape(n, m, n, m).permute(1, 0, 3, 2).reshape(m * n, m * n)
