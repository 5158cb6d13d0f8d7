"""Dense derivatives by autograd, over vec(W): what the note is held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kronewton import derivation as note


def autograd_gradient(loss: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
    """Gradient in the matrix W, (m, n), that can be differentiated again."""
    W = W if W.requires_grad else W.detach().requires_grad_()
    (G,) = torch.autograd.grad(loss(W), W, create_graph=True)
    return G


def autograd_hessian(loss: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
    """Hessian of a function of the matrix W in vec(W), (mn, mn)."""
    m, n = W.shape

    def of_vector(w: Tensor) -> Tensor:
        return loss(note.unvec(w, m, n))

    H: Tensor = torch.autograd.functional.hessian(of_vector, note.vec(W.detach()))
    return H


def damped_solve(H: Tensor, damping: float, g: Tensor) -> Tensor:
    """(H + λI)⁻¹g by a dense solve."""
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    d: Tensor = torch.linalg.solve(H + damping * eye, g)
    return d
