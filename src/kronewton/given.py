"""What the functions of the note may be given: refusals and warnings at its border."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from kronewton.conjugate import Solution, Solver
from kronewton.errors import KronewtonWarning, ModelError, OptionError

SIDES = {"W": "mn", "dW": "mn", "A": "nN", "B": "mp", "Y": "pN"}


def fit(**given: Tensor) -> None:
    """Raise ModelError unless every letter in SIDES has one size in all the given matrices."""
    check_dtypes(given)
    sizes: dict[str, set[int]] = {}
    for name, matrix in given.items():
        if matrix.dim() != 2:
            raise ModelError(
                f"{name} has shape {tuple(matrix.shape)}; a matrix ({', '.join(SIDES[name])}) is "
                "allowed. Give a single example as a matrix of one column."
            )
        for side, size in zip(SIDES[name], matrix.shape, strict=True):
            sizes.setdefault(side, set()).add(size)
    torn = [
        f"{side} is {' and '.join(map(str, sorted(s)))}" for side, s in sizes.items() if len(s) > 1
    ]
    if torn:
        shapes = ", ".join(
            f"{name} ({', '.join(SIDES[name])}) is {tuple(matrix.shape)}"
            for name, matrix in given.items()
        )
        raise ModelError(
            f"the shapes do not fit the model Y ≈ B'WA: {shapes}, so that {'; '.join(torn)}. One "
            "size per letter is allowed; check what is transposed."
        )


def check_dtypes(given: dict[str, Tensor]) -> None:
    kinds = {(tensor.dtype, tensor.device) for tensor in given.values()}
    if len(kinds) == 1 and kinds.pop()[0] in (torch.float32, torch.float64):
        return
    told = ", ".join(f"{name} is {t.dtype} on {t.device}" for name, t in given.items())
    raise ModelError(
        f"{told}; float32 or float64, the same for all and on one device, is allowed. Convert "
        "them with .to(device, dtype)."
    )


def check_finite(**given: Tensor) -> None:
    broken = [name for name, matrix in given.items() if not bool(torch.isfinite(matrix).all())]
    if broken:
        raise ModelError(
            f"{' and '.join(broken)} holds NaN or infinity; finite numbers are allowed. Check the "
            "data that it was made from."
        )


def check_damping(damping: float) -> None:
    if not 0 <= damping < math.inf:
        raise OptionError(
            f"damping={damping}; a finite number from 0 up is allowed. Give 0 for the note's own "
            "step, or a positive number in units of the loss."
        )


def warn_if_singular(A: Tensor, s_A: Tensor, B: Tensor, s_B: Tensor) -> None:
    n, m = len(A), len(B)
    if (len(s_A), len(s_B)) != (n, m):
        warnings.warn(
            f"AA' ({n}×{n}) has rank {len(s_A)} and BB' ({m}×{m}) has rank {len(s_B)}: the optimum "
            "is not unique. The pseudo-inverse was used: the shortest step that reaches one. Give "
            "damping > 0 for a matrix that has an inverse.",
            KronewtonWarning,
            stacklevel=3,
        )


def warn_of_singular_tying(q: int, solver: Solver) -> None:
    if solver.preconditioner is None:
        taken = "The shortest step that reaches one was taken, as conjugate gradients do."
    else:
        taken = (
            "The step to one of them was taken that is shortest in the preconditioner's norm; "
            "without a preconditioner it is the shortest of all."
        )
    warnings.warn(
        f"H_u = K'(AA' ⊗ BB')K ({q}×{q}) is singular: the optimum is not unique. {taken} Give "
        "damping > 0 for a matrix that has an inverse.",
        KronewtonWarning,
        stacklevel=3,
    )


def warn_of_ending(found: Solution, solver: Solver) -> None:
    warnings.warn(
        f"conjugate gradients were ended by {found.ending} after {found.iterations} iterations, "
        f"at a relative residual of {found.residual:.1e} where {solver.tolerance:.1e} was asked. "
        "The best step so far was taken. Give damping > 0, another preconditioner or a higher "
        "limit.",
        KronewtonWarning,
        stacklevel=3,
    )


def fit_tiling(K: Tensor, A: Tensor, B: Tensor, u: Tensor | None = None) -> None:
    """Raise ModelError unless K has a row for each entry of W (m, n), a column for each of u."""
    fit(A=A, B=B)
    check_dtypes({"K": K, "A": A, "B": B} if u is None else {"u": u, "K": K, "A": A, "B": B})
    m, n = len(B), len(A)
    if K.dim() != 2 or len(K) != m * n or (u is not None and u.shape != K.shape[1:]):
        given = f"K has shape {tuple(K.shape)}, A {tuple(A.shape)} and B {tuple(B.shape)}"
        raise ModelError(
            f"{given if u is None else f'u has shape {tuple(u.shape)}, {given}'}; K (mn, q), "
            f"A (n, N), B (m, p) and u (q) are allowed, which for this A and B is a K of "
            f"{m * n} rows. n counts the inputs of the layer and m its outputs, all positions "
            "together."
        )


def fit_tying(shape: tuple[int, int], A: Tensor, B: Tensor) -> None:
    """Raise ModelError unless a tying's W (m, n) stands between A (n, N) and B (m, p)."""
    fit(A=A, B=B)
    if shape != (len(B), len(A)):
        raise ModelError(
            f"the tying is of a W {shape}, A has shape {tuple(A.shape)} and B {tuple(B.shape)}; "
            f"A ({shape[1]}, N) and B ({shape[0]}, p) are allowed. n counts the inputs of the "
            "layer and m its outputs, all positions together."
        )


def check_channels(K: Tensor, m: int, channels: int) -> None:
    if channels < 1 or m < 1 or m % channels or len(K) % m:
        raise ModelError(
            f"m={m}, channels={channels} and a K of {len(K)} rows are given; m = channels·S and "
            "mn rows are allowed. Give the number of outputs of one example and the convolution's "
            "out_channels."
        )


def check_blocks(A: Tensor, B: Tensor, Lambda: Tensor | None) -> None:
    check_dtypes({"A": A, "B": B} if Lambda is None else {"A": A, "B": B, "Lambda": Lambda})
    if A.dim() != 2 or B.dim() != 3 or len(A) != len(B):
        raise ModelError(
            f"A has shape {tuple(A.shape)} and B has shape {tuple(B.shape)}; A (N, n) and "
            "B (N, m, p) with the same N are allowed. `jacobian_blocks` returns them so."
        )
    N, p = len(B), B.shape[2]
    if Lambda is not None and Lambda.shape not in ((N, p, p), (p, p)):
        raise ModelError(
            f"Lambda has shape {tuple(Lambda.shape)} and B has shape {tuple(B.shape)}; "
            f"({N}, {p}, {p}), or ({p}, {p}) for all examples, is allowed. Give the Hessian of "
            "each example's loss in its own outputs."
        )


def find_linear(model: nn.Module, layer: nn.Linear | str) -> tuple[str, nn.Linear]:
    modules = dict(model.named_modules())
    linears = [f"'{name}'" for name, module in modules.items() if isinstance(module, nn.Linear)]
    allowed = f"its nn.Linear layers are {', '.join(linears) or 'none'}. Choose one of them."
    name = next((name for name, module in modules.items() if layer in (name, module)), None)
    if name is None:
        given = f"named '{layer}'" if isinstance(layer, str) else f"that is this {layer}"
        raise ModelError(f"{type(model).__name__} has no layer {given}; {allowed}")
    linear = modules[name]
    if not isinstance(linear, nn.Linear):
        raise ModelError(f"layer '{name}' is of type {type(linear).__name__}; {allowed}")
    tied = [f"'{other}'" for other, module in modules.items() if _owns(module, linear.weight)]
    if len(tied) > 1:
        raise ModelError(
            f"layers {' and '.join(tied)} share one weight; a weight of one layer is allowed. "
            "Choose another layer, or give each a weight of its own."
        )
    return name, linear


def _owns(module: nn.Module, weight: Tensor) -> bool:
    return any(p is weight for p in module.parameters(recurse=False))


def check_call(A: Tensor, z: Any, name: str) -> None:
    if A.dim() != 2:
        raise ModelError(
            f"the input of layer '{name}' has shape {tuple(A.shape)}; (N, d_in) is allowed, one "
            "row per example. Give a single example as a batch of one; a weight that is used at "
            "several positions of an example has no single A_i."
        )
    told = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"type {type(z).__name__}"
    if not isinstance(z, Tensor) or z.dim() == 0 or len(z) != len(A) or z.numel() == 0:
        raise ModelError(
            f"the output of the network has {told}; a tensor ({len(A)}, …) is allowed, one row "
            f"for each row that layer '{name}' was given. Wrap the network in a module that "
            "returns it."
        )
    if not z.requires_grad:
        raise ModelError(
            f"the output of the network has no gradient in the output of layer '{name}'; a "
            "network that autograd follows is allowed. Take out detach, no_grad and argmax."
        )
