"""The note, equation by equation, on plain tensors.

"KFAC derivation as Newton step" (Yaroslav Bulatov, 2017). Its letters, its order, its layout:
vec(W) stacks the columns of W. Nothing here is fast and everything is exact, so that the tests
and `kronewton verify` can hold the library against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronewton import given
from kronewton.conjugate import PLAIN, Product, conjugate_gradients, seems_singular
from kronewton.conjugate import Ending as Ending
from kronewton.conjugate import Solver as Solver
from kronewton.errors import ModelError
from kronewton.tiling import Tying as Tying
from kronewton.tiling import tied_calls as tied_calls
from kronewton.tiling import tied_convolution as tied_convolution

# 1. Linear network: Y ≈ B'WA.
#
# A (n, N) has one example per column, W (m, n) is the layer to train, B' (p, m) is all that comes
# after it, Y (p, N) are the targets.


def vec(W: Tensor) -> Tensor:
    """Stack the columns: (m, n) → (mn). Then vec(B X A') = (A ⊗ B) vec(X)."""
    return W.mT.flatten()


def unvec(w: Tensor, m: int, n: int) -> Tensor:
    """Put the columns side by side again: (mn) → (m, n)."""
    return w.reshape(n, m).mT


def error(W: Tensor, A: Tensor, B: Tensor, Y: Tensor) -> Tensor:
    """e = Y − B'WA, (p, N)."""
    given.fit(W=W, A=A, B=B, Y=Y)
    return Y - B.mT @ W @ A


def loss(W: Tensor, A: Tensor, B: Tensor, Y: Tensor) -> Tensor:
    """J = ½ tr(e'e), ()."""
    e = error(W, A, B, Y)
    return 0.5 * (e * e).sum()  # tr(x'y) sums the products of entries: x'y itself is N×N


def differential_of_error(dW: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """de = −B' dW A, (p, N)."""
    given.fit(dW=dW, A=A, B=B)
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
    given.fit(dW=dW, A=A, B=B)
    return (B @ B.mT) @ dW @ (A @ A.mT)


def hessian(A: Tensor, B: Tensor) -> Tensor:
    """H = AA' ⊗ BB', (mn, mn): vec(dG) = H vec(dW). For small cases, it has (mn)² entries."""
    given.fit(A=A, B=B)
    return torch.kron(A @ A.mT, B @ B.mT)


def newton_step(W: Tensor, A: Tensor, B: Tensor, Y: Tensor, damping: float = 0.0) -> Tensor:
    """The W after one step: vec(W) − (H + λI)⁻¹vec(G), without ever forming H.

    With λ = 0 it is W − (BB')⁻¹ G (AA')⁻¹, the least-squares optimum from any W. Where AA' or BB'
    is singular its pseudo-inverse takes the step of least norm to one of the optima, and a
    KronewtonWarning says so. The damping λ is in units of the loss, and exact.
    """
    given.check_damping(damping)
    G = gradient(W, A, B, Y)
    given.check_finite(W=W, A=A, B=B, Y=Y)
    (s_A, U_A), (s_B, U_B) = _eigen(A), _eigen(B)
    if damping == 0:
        given.warn_if_singular(A, s_A, B, s_B)
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
    name, linear = given.find_linear(model, layer)
    A, y, z = _watched_forward(model, name, linear, x)
    given.check_call(A, z, name)
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
    given.check_blocks(A, B, Lambda)
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


def _pull(scalar: Tensor, y: Tensor) -> Tensor:
    (pulled,) = torch.autograd.grad(
        scalar, y, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return pulled


# 3. Convolution: a matrix product whose matrix repeats its parameters, vec(W) = K u.
#
# u (q) is the kernel as torch flattens it, K (mn, q) the tiling matrix, sparse. With the output
# channel outermost one K₁ serves every channel: dW/dU = I ⊗ K₁. Whatever else repeats its
# parameters has a K too (see `Tying`), and all that follows takes it.

CHUNK = 2**22  # entries of W in all columns of K that are in hand at once


def tiling_matrix(conv: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    """K (mn, q), sparse, with conv(x) = unvec(K u) x + bias for flattened x and conv(x).

    For nn.Conv1d, 2d, 3d and nn.ConvTranspose1d, 2d, 3d with any of their options, in the
    weight's dtype. input_shape is (C_in, *spatial); a batch size in front is ignored.
    """
    tying = tied_convolution(conv, input_shape)
    assert isinstance(conv.weight, Tensor)
    return tying.matrix(conv.weight.dtype)


def channels_outermost(K: Tensor, m: int, channels: int) -> Tensor:
    """The rows of K reordered, the output channel outermost: I ⊗ K₁ for a convolution.

    That is dW/dU where W (nS, C_out) = K₁ U and U (C_in·k, C_out) have a column for every output
    channel, and vec(U) = u. K₁ is the tiling matrix of a convolution with one output channel.
    """
    given.check_channels(K, m, channels)
    K = K.to_sparse_coo().coalesce()
    row, column = K.indices()
    j, channel, s = row // m, row % m // (m // channels), row % (m // channels)
    row = channel * (len(K) // channels) + j * (m // channels) + s
    index = torch.stack([row, column])
    return torch.sparse_coo_tensor(index, K.values(), K.shape, check_invariants=False).coalesce()


def tied_gradient(u: Tensor, K: Tensor, A: Tensor, B: Tensor, Y: Tensor) -> Tensor:
    """g = K'vec(G), (q), with G = −B e A' at vec(W) = K u."""
    given.fit_tiling(K, A, B, u)
    W = unvec(K @ u, len(B), len(A))
    return K.mT @ vec(gradient(W, A, B, Y))


def convolution_product(K: Tensor, A: Tensor, B: Tensor) -> Product:
    """v ↦ H_u v = K' vec(BB' unvec(K v) AA'), for v (q) or columns (q, ·): no H_u is formed."""
    given.fit_tiling(K, A, B)
    return _through(K, A @ A.mT, B @ B.mT)


def convolution_hessian(K: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """H_u = K'(AA' ⊗ BB')K, (q, q), for A (n, N) and B (m, p): the chain rule.

    A few columns of K at a time; the Kronecker product, (mn)² entries, is not formed.
    """
    given.fit_tiling(K, A, B)
    return _dense(K, A @ A.mT, B @ B.mT)


def distributed_inverse(K: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """K⁺((AA')⁻¹ ⊗ (BB')⁻¹)K⁺', (q, q): what H_u⁻¹ would be if the inverse went through K.

    It is not, unless K is square: where parameters repeat, the sum over their places comes
    before the inverse. K⁺ is (K'K)⁻¹K', and where an inverse is missing a pseudo-inverse serves.
    """
    given.fit_tiling(K, A, B)
    AA, BB = (torch.linalg.pinv(X @ X.mT, hermitian=True) for X in (A, B))
    KK = _dense(K, *(torch.eye(len(X), dtype=X.dtype, device=X.device) for X in (A, B)))
    KK_inverse: Tensor = torch.linalg.pinv(KK, hermitian=True)
    return KK_inverse @ _dense(K, AA, BB) @ KK_inverse


def expand(tying: Tying, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Â = 1/S Σ_s C_sAA'C_s', B̂ = Σ_s R_sBB'R_s', one for each group: H_u ≈ Â ⊗ B̂ on vec(U).

    (groups, d_in, d_in) and (groups, d_out, d_out). H_u is a sum over two positions, s of U and
    s' of U'; this keeps the terms with s = s' and takes a mean of products for the product of
    means (KFC, Grosse & Martens 2016). Exact for S = 1.
    """
    given.fit_tying(tying.shape, A, B)
    a, b = tying.read(A), tying.made(B)  # (groups, S, d_in, N), (groups, S, d_out, p)
    AA = torch.einsum("gsiN,gsjN->gij", a, a) / a.shape[1]
    return AA, torch.einsum("gsop,gsqp->goq", b, b)


def kronecker_preconditioner(tying: Tying, A: Tensor, B: Tensor, damping: float = 0.0) -> Product:
    """r ↦ (Â ⊗ B̂ + λI)⁻¹r, exactly, with the factors of `expand`.

    Eigenvalues near zero are raised to √eps times the largest of the group: where Â ⊗ B̂ is
    singular and λ = 0 an inverse would follow rounding.
    """
    given.check_damping(damping)
    (s_A, U_A), (s_B, U_B) = map(torch.linalg.eigh, expand(tying, A, B))
    s = s_B.unsqueeze(2) * s_A.unsqueeze(1) + damping  # (groups, d_out, d_in)
    least = torch.finfo(s.dtype).eps ** 0.5 * s.amax((1, 2), keepdim=True)
    s = s.clamp(min=torch.where(least > 0, least, 1.0))  # a group of zeros has no gradient

    def precondition(r: Tensor) -> Tensor:
        R = U_B.mT @ tying.small(r) @ U_A
        return tying.flat(U_B @ (R / s) @ U_A.mT)

    return precondition


@dataclass(frozen=True)
class TiedStep:
    """The u after one Newton step, and how well the step was found."""

    u: Tensor  # (q)
    iterations: int
    residual: float  # ‖g + (H_u + λI)d‖ / ‖g‖ of the step d
    singular: bool  # H_u + λI, as far as a random direction tells
    ending: Ending


def newton_step_tied(
    u: Tensor, tying: Tying, A: Tensor, B: Tensor, Y: Tensor, solver: Solver = PLAIN
) -> TiedStep:
    """u − (H_u + λI)⁻¹g by conjugate gradients: with λ = 0 a least-squares optimum from any u.

    Where H_u is singular the plain method takes the shortest step to one of the optima, and a
    preconditioned one the step that is shortest in the preconditioner's norm. A KronewtonWarning
    says so, and also if the residual did not come down to the solver's tolerance.
    """
    given.fit_tying(tying.shape, A, B)
    K = tying.matrix(u.dtype)
    g = tied_gradient(u, K, A, B, Y)
    given.check_finite(u=u, A=A, B=B, Y=Y)
    product = convolution_product(K, A, B)
    found = conjugate_gradients(product, -g, solver)
    singular = solver.damping == 0 and seems_singular(product, u, solver)
    if singular:
        given.warn_of_singular_tying(len(u), solver)
    if found.ending is not Ending.CONVERGED:
        given.warn_of_ending(found, solver)
    return TiedStep(u + found.x, found.iterations, found.residual, singular, found.ending)


def _through(K: Tensor, AA: Tensor, BB: Tensor) -> Product:
    """v ↦ K'(AA ⊗ BB)K v for v (q) or columns (q, ·)."""
    K = K.to_sparse_coo().coalesce()
    K_transposed = K.mT.coalesce()  # sorted once, not at every product

    def product(v: Tensor) -> Tensor:
        W = K @ (v if v.dim() == 2 else v.unsqueeze(1))  # (mn, ·)
        W = W.mT.reshape(-1, len(AA), len(BB)).mT  # (·, m, n): unvec of every column
        G = (BB @ W @ AA).mT.flatten(1).mT  # (mn, ·): vec of every matrix
        return (K_transposed @ G).reshape(v.shape)

    return product


def _dense(K: Tensor, AA: Tensor, BB: Tensor) -> Tensor:
    product, eye = _through(K, AA, BB), torch.eye(K.shape[1], dtype=AA.dtype, device=AA.device)
    return torch.cat([product(few) for few in eye.split(max(1, CHUNK // len(K)), 1)], 1)
