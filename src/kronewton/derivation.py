"""The note, equation by equation, on plain tensors: sections 1 and 2.

"KFAC derivation as Newton step" (Yaroslav Bulatov, 2017). Its letters, its order, its layout:
vec(W) stacks the columns of W. Nothing here is fast and everything is exact, so that the tests
and `kronewton verify` can hold the library against it.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from kronewton.errors import KronewtonWarning, ModelError, OptionError

# 1. Linear network: Y ≈ B'WA.
#
# A (n, N) has one example per column, W (m, n) is the layer to train, B' (p, m) is all that comes
# after it, Y (p, N) are the targets.
SIDES = {"W": "mn", "dW": "mn", "A": "nN", "B": "mp", "Y": "pN"}


def vec(W: Tensor) -> Tensor:
    """Stack the columns: (m, n) → (mn). Then vec(B X A') = (A ⊗ B) vec(X)."""
    return W.mT.flatten()


def unvec(w: Tensor, m: int, n: int) -> Tensor:
    """Put the columns side by side again: (mn) → (m, n)."""
    return w.reshape(n, m).mT


def error(W: Tensor, A: Tensor, B: Tensor, Y: Tensor) -> Tensor:
    """e = Y − B'WA, (p, N)."""
    _fit(W=W, A=A, B=B, Y=Y)
    return Y - B.mT @ W @ A


def loss(W: Tensor, A: Tensor, B: Tensor, Y: Tensor) -> Tensor:
    """J = ½ tr(e'e), ()."""
    e = error(W, A, B, Y)
    return 0.5 * (e * e).sum()  # tr(x'y) sums the products of entries: x'y itself is N×N


def differential_of_error(dW: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """de = −B' dW A, (p, N)."""
    _fit(dW=dW, A=A, B=B)
    return -(B.mT @ dW @ A)


def differential_of_loss(dW: Tensor, W: Tensor, A: Tensor, B: Tensor, Y: Tensor) -> Tensor:
    """dJ = tr(e'de), ().

    Put de in: dJ = −tr(e'B' dW A) = −tr(Ae'B' dW), and what stands before dW is G'.
    """
    e, de = error(W, A, B, Y), differential_of_error(dW, A, B)
    return (e * de).sum()


def gradient(W: Tensor, A: Tensor, B: Tensor, Y: Tensor) -> Tensor:
    """G = −B e A', (m, n), so that dJ = tr(G' dW)."""
    return -(B @ error(W, A, B, Y) @ A.mT)


def differential_of_gradient(dW: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """dG = −B de A' = BB' dW AA', (m, n)."""
    _fit(dW=dW, A=A, B=B)
    return (B @ B.mT) @ dW @ (A @ A.mT)


def hessian(A: Tensor, B: Tensor) -> Tensor:
    """H = AA' ⊗ BB', (mn, mn): vec(dG) = H vec(dW). For small cases, it has (mn)² entries."""
    _fit(A=A, B=B)
    return torch.kron(A @ A.mT, B @ B.mT)


def newton_step(W: Tensor, A: Tensor, B: Tensor, Y: Tensor, damping: float = 0.0) -> Tensor:
    """The W after one step: vec(W) − (H + λI)⁻¹vec(G), without ever forming H.

    With λ = 0 it is W − (BB')⁻¹ G (AA')⁻¹, the least-squares optimum from any W. Where AA' or BB'
    is singular its pseudo-inverse takes the step of least norm to one of the optima, and a
    KronewtonWarning says so. The damping λ is in units of the loss, and exact.
    """
    _check_damping(damping)
    G = gradient(W, A, B, Y)
    _check_finite(W=W, A=A, B=B, Y=Y)
    (s_A, U_A), (s_B, U_B) = _eigen(A), _eigen(B)
    if damping == 0:
        _warn_if_singular(A, s_A, B, s_B)
    # H = (U_A ⊗ U_B) diag(s_A ⊗ s_B) (U_A ⊗ U_B)', and G = −B e A' has no part outside of it.
    curvature = torch.outer(s_B, s_A) + damping
    return W - U_B @ ((U_B.mT @ G @ U_A) / curvature) @ U_A.mT


def _eigen(A: Tensor) -> tuple[Tensor, Tensor]:
    """AA' = U diag(s) U' over the non-zero s: s (r,) and U (n, r), r the rank of A (n, N)."""
    # Not eigh of AA': half of the digits that tell a small s from zero are lost in the product.
    # A' = QR has the singular values and U in R alone, which is short however large N is.
    R = torch.linalg.qr(A.mT, mode="r").R
    U, root, _ = torch.linalg.svd(R.mT, full_matrices=False)
    rounding = max(A.shape) * torch.finfo(A.dtype).eps
    r = int((root > rounding * root.amax()).sum()) if root.numel() else 0
    return root[:r].square(), U[:, :r]


# 2. Piecewise-linear network: every example i sees a linear map of its own.
#
# A_i is its input column, B_i' the Jacobian of the network's output in the layer's output, and
# J = Σ J_i. They are kept as A (N, n) and B (N, m, p), one example after the other.


@torch.enable_grad()
def jacobian_blocks(model: nn.Module, layer: nn.Linear | str, x: Tensor) -> tuple[Tensor, Tensor]:
    """A_i and B_i of one nn.Linear in any network: A (N, d_in), B (N, d_out, p).

    p counts the elements of the network's output for one example. The layer is the module or its
    name; the entry 1 that a bias adds to A_i is left to the caller. Raises ModelError where a
    layer has no such blocks: called twice, on (N, S, d_in), or in a network that mixes examples.
    """
    name, linear = _find(model, layer)
    A, y, z = _watched_forward(model, name, linear, x)
    _check_call(A, z, name)
    z = z.reshape(len(z), -1)  # (N, p)
    _refuse_mixed_examples(y, z, name)
    # Examples don't mix, so that one backward pass gives a column of every B_i.
    columns = [_pull(column.sum(), y) for column in z.unbind(1)]  # p times (N, d_out)
    return A, torch.stack(columns, 2)


def hessian_block(A: Tensor, B: Tensor, Lambda: Tensor | None = None) -> Tensor:
    """H = Σ_i A_iA_i' ⊗ B_iΛ_iB_i', (mn, mn), for A (N, n) and B (N, m, p).

    Λ_i is the Hessian of the loss in the output: (N, p, p), or (p, p) for all examples, or None
    for the identity that ½ tr(e'e) has. The exact block of a piecewise-linear network, and the
    generalised Gauss-Newton block of any other.
    """
    BB = _curved(A, B, Lambda)  # (N, m, m)
    mn = A.shape[1] * B.shape[1]
    return torch.einsum("ni,nj,nop->iojp", A, A, BB).reshape(mn, mn)


def kronecker_block(A: Tensor, B: Tensor, Lambda: Tensor | None = None) -> Tensor:
    """H ≈ (1/N Σ_i A_iA_i') ⊗ (Σ_i B_iΛ_iB_i'), (mn, mn), with the shapes of `hessian_block`.

    Only one factor is a sum: with two, a batch given twice would count four times, and in the
    exact block it counts twice. Exact if the A_iA_i' or the B_iΛ_iB_i' of all examples agree.
    """
    BB = _curved(A, B, Lambda)  # (N, m, m)
    return torch.kron(A.mT @ A / max(len(A), 1), BB.sum(0))


def _curved(A: Tensor, B: Tensor, Lambda: Tensor | None) -> Tensor:
    _check_blocks(A, B, Lambda)
    return B @ B.mT if Lambda is None else B @ Lambda @ B.mT


def _watched_forward(
    model: nn.Module, name: str, linear: nn.Linear, x: Tensor
) -> tuple[Tensor, Tensor, Any]:
    """One forward pass: the layer's input A, its output y as a leaf of the graph, the output z."""
    calls: list[tuple[Tensor, Tensor]] = []

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        (A,) = (*args, *kwargs.values())
        y = y.detach().requires_grad_()
        calls.append((A.detach().clone(), y))
        return y.clone()  # not y itself: an in-place ReLU that follows would overwrite it

    handle = linear.register_forward_hook(watch, with_kwargs=True)
    try:
        z = model(x)
    finally:
        handle.remove()
    if len(calls) != 1:
        raise ModelError(
            f"layer '{name}' was called {len(calls)} times in one forward pass of "
            f"{type(model).__name__}; exactly one call is allowed. Choose another layer, or give "
            "each call a module of its own."
        )
    return *calls[0], z


def _pull(scalar: Tensor, y: Tensor) -> Tensor:
    (pulled,) = torch.autograd.grad(
        scalar, y, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return pulled


# What may be given.


def _fit(**given: Tensor) -> None:
    """Raise ModelError unless every letter in SIDES has one size in all the given matrices."""
    _check_dtypes(given)
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


def _check_dtypes(given: dict[str, Tensor]) -> None:
    kinds = {(tensor.dtype, tensor.device) for tensor in given.values()}
    if len(kinds) == 1 and kinds.pop()[0] in (torch.float32, torch.float64):
        return
    told = ", ".join(f"{name} is {t.dtype} on {t.device}" for name, t in given.items())
    raise ModelError(
        f"{told}; float32 or float64, the same for all and on one device, is allowed. Convert "
        "them with .to(device, dtype)."
    )


def _check_finite(**given: Tensor) -> None:
    broken = [name for name, matrix in given.items() if not bool(torch.isfinite(matrix).all())]
    if broken:
        raise ModelError(
            f"{' and '.join(broken)} holds NaN or infinity; finite numbers are allowed. Check the "
            "data that it was made from."
        )


def _check_damping(damping: float) -> None:
    if not 0 <= damping < math.inf:
        raise OptionError(
            f"damping={damping}; a finite number from 0 up is allowed. Give 0 for the note's own "
            "step, or a positive number in units of the loss."
        )


def _warn_if_singular(A: Tensor, s_A: Tensor, B: Tensor, s_B: Tensor) -> None:
    n, m = len(A), len(B)
    if (len(s_A), len(s_B)) != (n, m):
        warnings.warn(
            f"AA' ({n}×{n}) has rank {len(s_A)} and BB' ({m}×{m}) has rank {len(s_B)}: the optimum "
            "is not unique. The pseudo-inverse was used: the shortest step that reaches one. Give "
            "damping > 0 for a matrix that has an inverse.",
            KronewtonWarning,
            stacklevel=3,
        )


def _check_blocks(A: Tensor, B: Tensor, Lambda: Tensor | None) -> None:
    _check_dtypes({"A": A, "B": B} if Lambda is None else {"A": A, "B": B, "Lambda": Lambda})
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


def _find(model: nn.Module, layer: nn.Linear | str) -> tuple[str, nn.Linear]:
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


def _check_call(A: Tensor, z: Any, name: str) -> None:
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


def _refuse_mixed_examples(y: Tensor, z: Tensor, name: str) -> None:
    """Raise ModelError if the first or the last example's output depends on another example."""
    # Uneven weights: an output that sums to one, like softmax, would hide everything in its sum.
    weights = torch.linspace(1, 2, z.shape[1], dtype=z.dtype, device=z.device)
    for i in (0, len(z) - 1):
        others = torch.arange(len(z), device=z.device) != i
        if bool(_pull((z[i] * weights).sum(), y)[others].any()):
            raise ModelError(
                f"the network mixes examples after layer '{name}', as batch normalisation does "
                "while training; a network that maps each example by itself is allowed. Call "
                "model.eval(), or give a batch of one."
            )
