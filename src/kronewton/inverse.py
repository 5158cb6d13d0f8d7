"""Factors and a damping → an object that applies the inverse curvature of one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kronewton.linalg import rough_dtype
from kronewton.structure import DIAGONAL, PLAIN, Leading, Sides, in_parts, kronecker_apply

METRIC = 0.25  # the power of each factor that a step is orthogonalised in: 0 Muon's, ½ Newton's
FLAT = 0.1  # of the mean eigenvalue, that is added to each there
TINY = 1e-30


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

    A_inverse: Tensor  # (d_in, d_in), or as the sides store it
    B_inverse: Tensor  # (d_out, d_out)
    sides: Sides = PLAIN

    def apply(self, G: Tensor, damping: float) -> Tensor:
        return kronecker_apply(self.B_inverse, self.A_inverse, G, self.sides)

    def tensors(self) -> dict[str, Tensor]:
        return {"A_inverse": self.A_inverse, "B_inverse": self.B_inverse}


@dataclass(frozen=True)
class EigenInverse(Inverse):
    """U_B [(U_B' G U_A) / (s + damping)] U_A': exact for every damping.

    s is s_B s_A' for the Kronecker product itself, or the corrected eigenvalues of EKFAC.
    """

    U_A: Tensor  # (d_in, d_in), or as the sides store it
    U_B: Tensor  # (d_out, d_out)
    s: Tensor  # (d_out, d_in), or more where a side has more coordinates: see `Leading`
    sides: Sides = PLAIN

    @cached_property
    def shape(self) -> torch.Size:
        """Of the matrices that it applies to, (…, d_out, d_in)."""
        d_out, d_in = (
            U.shape[-2] if isinstance(side, Leading) else d
            for side, U, d in zip(
                (self.sides.output, self.sides.input),
                (self.U_B, self.U_A),
                self.s.shape[-2:],
                strict=True,
            )
        )
        return torch.Size((*self.s.shape[:-2], d_out, d_in))

    @property
    def basis(self) -> tuple[Tensor, Tensor]:
        """U_A and U_B."""
        return self.U_A, self.U_B

    @cached_property
    def spectra(self) -> tuple[Tensor, Tensor]:
        """The sums of s along either side, (…, d_in) and (…, d_out).

        Of a Kronecker product they are the eigenvalues of A and B, up to a factor of each.
        """
        return self.s.sum(-2), self.s.sum(-1)

    @cached_property
    def metric(self) -> tuple[Tensor, ...]:
        """What the coordinates of a step are multiplied with: its rows, and then its columns.

        The curvature's power −METRIC in its eigenbasis, (…, d_out, 1) and (…, 1, d_in), for steps
        in parts as `in_parts` has them; of the outputs alone where the inputs' own axes are their
        basis: a token that is rare is no direction of little curvature.
        """
        of_input, of_output = self.spectra
        rows = _power(in_parts(of_output.unsqueeze(-1), self.sides), -2)
        if self.sides.input == DIAGONAL:
            return (rows,)
        columns = _power(of_input, -1).unsqueeze(-2)
        columns = columns.unsqueeze(-3) if rows.dim() > columns.dim() else columns
        return rows, columns.expand(*rows.shape[:-2], 1, -1)

    def apply(self, G: Tensor, damping: float) -> Tensor:
        return self.rotate_back(divided(self.rotate(G), self.s, damping))

    def rotate(self, G: Tensor) -> Tensor:
        """U_B' G U_A."""
        on_input, on_output = self.sides
        if isinstance(on_output, Leading):  # last what makes more coordinates
            return on_output.rotate(self.U_B, on_input.rotate_rows(G, self.U_A))
        return on_input.rotate_rows(on_output.rotate(self.U_B, G), self.U_A)

    def rotate_back(self, G: Tensor, rough: bool = False) -> Tensor:
        """U_B G U_A'. rough: in half precision where that is faster, to 0.4 % of the length."""
        on_input, on_output = self.sides
        U_A, U_B, given = self.U_A, self.U_B, G.dtype
        if rough and (dtype := self.rough_dtype(given)) != given:
            U_A, U_B, G = U_A.to(dtype), U_B.to(dtype), G.to(dtype)
        if isinstance(on_input, Leading):  # first what makes fewer coordinates
            return on_output.rotate_back(U_B, on_input.rotate_rows_back(G, U_A)).to(given)
        return on_input.rotate_rows_back(on_output.rotate_back(U_B, G), U_A).to(given)

    def rough_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The precision in which a matrix of such numbers is rotated back if that may be rough."""
        longest = max(U.shape[-1] for U in self.basis)  # none along a side's own axes
        return rough_dtype(dtype, self.s.device, self.s.numel() * longest)

    def tensors(self) -> dict[str, Tensor]:
        return {"U_A": self.U_A, "U_B": self.U_B, "s": self.s}


def _power(s: Tensor, dim: int) -> Tensor:
    """The power of eigenvalues, in units of their mean."""
    mean = s.mean(dim, keepdim=True)
    return (s / mean.clamp_min(TINY)).clamp_min(0).add_(FLAT).pow_(-METRIC)


def divided(rotated: Tensor, s: Tensor, damping: float) -> Tensor:
    """rotated / (s + damping); without damping, zero where there is no curvature."""
    # A direction without curvature and without damping is left alone: the pseudo-inverse.
    scale = s + damping
    floor = torch.finfo(scale.dtype).eps * scale.max() if damping == 0 else 0.0
    # What is NaN is not: it must be seen, and not leave a layer where it is.
    return torch.where(scale <= floor, torch.zeros_like(rotated), rotated / scale)


def factored_inverse(
    A: Tensor, B: Tensor, damping: float, name: str, sides: Sides = PLAIN
) -> FactoredInverse:
    """Invert B ⊗ A + damping·I approximately, by damping each factor.

    π√λ·I is added to A and √λ/π·I to B (Martens & Grosse 2015, section 6.3). Exact only when A or
    B is a multiple of I; where one of them is a number, all damping goes to the other, and it is
    exact. Scale the loss and the damping by c, and the inverse scales by 1/c.
    Raises NotPositiveDefinite, naming the layer, if a factor is not finite.
    """
    on_A, on_B = _shares(A, B, damping, sides)
    return FactoredInverse(
        sides.input.inverse(A, on_A, f"the input factor A of layer '{name}'"),
        sides.output.inverse(B, on_B, f"the gradient factor B of layer '{name}'"),
        sides,
    )


def _shares(A: Tensor, B: Tensor, damping: float, sides: Sides) -> tuple[Tensor, Tensor]:
    """What is added to A and to B, (…) each."""
    a, b = sides.input.diagonal(A), sides.output.diagonal(B)
    pi = balance(A, B, sides)
    on_A, on_B = damping**0.5 * pi, damping**0.5 / pi
    nothing = torch.zeros_like(on_A)
    if a.shape[-1] == 1:
        alone = a[..., 0] > 0
        return on_A.where(~alone, nothing), torch.where(alone, damping / a[..., 0], on_B)
    if b.shape[-1] == 1:
        alone = b[..., 0] > 0
        return torch.where(alone, damping / b[..., 0], on_A), on_B.where(~alone, nothing)
    return on_A, on_B


def balance(A: Tensor, B: Tensor, sides: Sides = PLAIN) -> Tensor:
    """π = √((tr A / d_A) / (tr B / d_B)), (…); 1 where a factor is zero and it has no meaning."""
    a, b = sides.input.diagonal(A).mean(-1), sides.output.diagonal(B).mean(-1)
    meaningful = (a > 0) & (b > 0)
    return torch.where(meaningful, (a / b.where(meaningful, torch.ones_like(b))).sqrt(), 1.0)


def eigen_basis(A: Tensor, B: Tensor, name: str, sides: Sides = PLAIN) -> EigenInverse:
    """Diagonalise B ⊗ A through its factors; raises NotPositiveDefinite, naming the layer."""
    s_A, U_A = sides.input.eigen(A, f"the input factor A of layer '{name}'")
    s_B, U_B = sides.output.eigen(B, f"the gradient factor B of layer '{name}'")
    return EigenInverse(U_A, U_B, s_B.unsqueeze(-1) * s_A.unsqueeze(-2), sides)
