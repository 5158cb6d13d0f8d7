"""Factors and a damping → an object that applies the inverse curvature of one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kronewton.linalg import damped_inverse, diagonal, kronecker_apply, symmetric_eigen


class Inverse(ABC):
    """Applies (block + damping·I)⁻¹ to a gradient matrix. The damping is in units of the loss.

    Every tensor may have one dimension more in front: a batch of blocks.
    """

    @abstractmethod
    def apply(self, G: Tensor, damping: float) -> Tensor:
        """(d_out, d_in) → (d_out, d_in)."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that must be saved to apply it again, by field name."""


@dataclass(frozen=True)
class FactoredInverse(Inverse):
    """B⁻¹ G A⁻¹ with damped factors: the damping is the one it was made with."""

    A_inverse: Tensor  # (d_in, d_in)
    B_inverse: Tensor  # (d_out, d_out)

    def apply(self, G: Tensor, damping: float) -> Tensor:
        return kronecker_apply(self.B_inverse, self.A_inverse, G)

    def tensors(self) -> dict[str, Tensor]:
        return {"A_inverse": self.A_inverse, "B_inverse": self.B_inverse}


@dataclass(frozen=True)
class EigenInverse(Inverse):
    """U_B [(U_B' G U_A) / (s + damping)] U_A': exact for every damping.

    s is s_B s_A' for the Kronecker product itself, or the corrected eigenvalues of EKFAC.
    """

    U_A: Tensor  # (d_in, d_in)
    U_B: Tensor  # (d_out, d_out)
    s: Tensor  # (d_out, d_in)

    def apply(self, G: Tensor, damping: float) -> Tensor:
        rotated = (self.U_B.mT @ G) @ self.U_A
        # A direction without curvature and without damping is left alone: the pseudo-inverse.
        scale = self.s + damping
        floor = torch.finfo(scale.dtype).eps * scale.max() if damping == 0 else 0.0
        rotated = torch.where(scale > floor, rotated / scale, torch.zeros_like(rotated))
        return (self.U_B @ rotated) @ self.U_A.mT

    def tensors(self) -> dict[str, Tensor]:
        return {"U_A": self.U_A, "U_B": self.U_B, "s": self.s}


def factored_inverse(A: Tensor, B: Tensor, damping: float, name: str) -> FactoredInverse:
    """Invert B ⊗ A + damping·I approximately, by damping each factor.

    π√λ·I is added to A and √λ/π·I to B (Martens & Grosse 2015, section 6.3). Exact only when A or
    B is a multiple of I. Scale the loss and the damping by c, and the inverse scales by 1/c.
    Raises NotPositiveDefinite, naming the layer, if a factor is not finite.
    """
    pi = balance(A, B)
    root = damping**0.5
    return FactoredInverse(
        damped_inverse(A, root * pi, f"the input factor A of layer '{name}'"),
        damped_inverse(B, root / pi, f"the gradient factor B of layer '{name}'"),
    )


def balance(A: Tensor, B: Tensor) -> Tensor:
    """π = √((tr A / d_A) / (tr B / d_B)), (…); 1 where a factor is zero and it has no meaning."""
    a, b = diagonal(A).mean(-1), diagonal(B).mean(-1)
    meaningful = (a > 0) & (b > 0)
    return torch.where(meaningful, (a / b.where(meaningful, torch.ones_like(b))).sqrt(), 1.0)


def eigen_basis(A: Tensor, B: Tensor, name: str) -> EigenInverse:
    """Diagonalise B ⊗ A through its factors; raises NotPositiveDefinite, naming the layer."""
    s_A, U_A = symmetric_eigen(A, f"the input factor A of layer '{name}'")
    s_B, U_B = symmetric_eigen(B, f"the gradient factor B of layer '{name}'")
    return EigenInverse(U_A, U_B, s_B.unsqueeze(-1) * s_A.unsqueeze(-2))
