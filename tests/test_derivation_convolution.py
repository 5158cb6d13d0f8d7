"""Section 3 of the note against autograd: vec(W) = K u, H_u, the Newton step on u."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from kronewton import derivation as note
from kronewton.derivation import Ending, Solver, Tying
from kronewton.errors import KronewtonWarning, ModelError, OptionError
from oracles import distance

F64 = torch.float64
EXACT, HESSIAN, SOLVED = 1e-12, 1e-10, 1e-8
REGULAR, FEW = (8, 100), (1, 2)  # (N, p)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def with_numbers(module: nn.Module) -> nn.Module:
    module = module.to_empty(device="cpu").double()
    for i, p in enumerate(module.parameters()):
        p.data = normal(*p.shape, seed=i)
    return module


MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 3)),
    "1d, even, same": (nn.Conv1d(2, 2, 4, padding="same", padding_mode="circular"), (2, 5)),
    "groups, stride, dilation": (nn.Conv2d(4, 2, 2, 2, 1, dilation=2, groups=2), (4, 5, 4)),
    "depthwise, reflect": (nn.Conv2d(3, 3, 3, 1, 1, 1, 3, padding_mode="reflect"), (3, 3, 4)),
    "3d": (nn.Conv3d(1, 2, 2, padding=(0, 1, 1)), (1, 3, 2, 2)),
    "transposed": (nn.ConvTranspose2d(2, 4, 3, 2, 1, 1, groups=2), (2, 2, 3)),
    "tokens": (nn.Linear(3, 2), (4, 3)),
    "one call": (nn.Linear(3, 4), (1, 3)),
}
MODULES = {name: (with_numbers(m), shape) for name, (m, shape) in MODULES.items()}
CONVOLUTIONS = [name for name, (m, _) in MODULES.items() if not isinstance(m, nn.Linear)]


@dataclass(frozen=True)
class Case:
    """The letters of a module, and torch's own way through it."""

    module: nn.Module
    input_shape: tuple[int, ...]
    tying: Tying
    u: Tensor
    A: Tensor
    B: Tensor
    Y: Tensor

    @property
    def K(self) -> Tensor:
        return self.tying.matrix()

    def output(self, u: Tensor) -> Tensor:
        """B'WA with W A by the module, its bias at zero; vec of it."""
        changed = {name: torch.zeros_like(p) for name, p in self.module.named_parameters()}
        changed["weight"] = u.reshape(self.module.weight.shape)
        y = functional_call(self.module, changed, (self.A.T.reshape(-1, *self.input_shape),))
        return note.vec(self.B.T @ y.flatten(1).T)

    def loss(self, u: Tensor) -> Tensor:
        return 0.5 * (note.vec(self.Y) - self.output(u)).square().sum()

    def hessian(self) -> Tensor:
        return torch.autograd.functional.hessian(self.loss, self.u)

    def gradient(self) -> Tensor:
        u = self.u.clone().requires_grad_()
        return torch.autograd.grad(self.loss(u), u)[0]

    def design(self) -> Tensor:
        return torch.autograd.functional.jacobian(self.output, self.u)

    def solver(self, damping: float = 0.0) -> Solver:
        precondition = note.kronecker_preconditioner(self.tying, self.A, self.B, damping)
        return Solver(damping, precondition)

    def step(self, solver: Solver) -> note.TiedStep:
        return note.newton_step_tied(self.u, self.tying, self.A, self.B, self.Y, solver)


def case(name: str, size: tuple[int, int] = REGULAR) -> Case:
    (module, shape), (N, p) = MODULES[name], size
    if isinstance(module, nn.Linear):
        tying = note.tied_calls(*module.weight.shape, shape[0])
    else:
        tying = note.tied_convolution(module, shape)
    m, n = tying.shape
    letters = normal(n, N, seed=2), normal(m, p, seed=3), normal(p, N, seed=4)
    return Case(module, shape, tying, module.weight.detach().flatten(), *letters)


# vec(W) = K u.


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_is_its_matrix(name: str) -> None:
    conv, shape = MODULES[name]
    K, x = note.tiling_matrix(conv, shape), normal(3, *shape)
    n = x[0].numel()
    W = note.unvec(K @ conv.weight.detach().flatten(), len(K) // n, n)
    bias = conv(torch.zeros_like(x)).detach().flatten(1)
    assert distance(x.flatten(1) @ W.T + bias, conv(x).detach().flatten(1)) <= EXACT


def test_tiling_matrix_is_in_the_weights_dtype_and_any_batch_size_will_do() -> None:
    conv = nn.Conv2d(2, 3, 3)
    K = note.tiling_matrix(conv, (5, 2, 4, 4))
    assert (K.dtype, K.layout, K.is_coalesced()) == (torch.float32, torch.sparse_coo, True)
    assert torch.equal(K.to_dense(), note.tiling_matrix(conv, (2, 4, 4)).to_dense())


@pytest.mark.parametrize(("d_in", "d_out", "size"), [(2, 3, (4, 5)), (1, 4, (3, 3))])
def test_output_channel_outermost_is_identity_kron_one_channel(
    d_in: int, d_out: int, size: tuple[int, int]
) -> None:
    one, every = (
        note.tiling_matrix(nn.Conv2d(d_in, d, 2, 2, 1), (d_in, *size)) for d in (1, d_out)
    )
    m = len(every) // (d_in * size[0] * size[1])
    found = note.channels_outermost(every, m, d_out).to_dense()
    assert torch.equal(found, torch.kron(torch.eye(d_out), one.to_dense()))
    assert not torch.equal(every.to_dense(), found)


# H_u = K'(AA' ⊗ BB')K.


@pytest.mark.parametrize("size", [REGULAR, FEW])
@pytest.mark.parametrize("name", MODULES)
def test_gradient_hessian_and_product_are_autograds(name: str, size: tuple[int, int]) -> None:
    net, v = case(name, size), normal(case(name).u.numel(), seed=5)
    H = net.hessian()
    assert distance(note.tied_gradient(net.u, net.K, net.A, net.B, net.Y), net.gradient()) <= EXACT
    assert distance(note.convolution_hessian(net.K, net.A, net.B), H) <= HESSIAN
    product = note.convolution_product(net.K, net.A, net.B)
    assert distance(product(v), H @ v) <= HESSIAN
    assert distance(product(torch.stack([v, 2 * v], 1)), H @ torch.stack([v, 2 * v], 1)) <= HESSIAN


@pytest.mark.parametrize("name", ["plain", "tokens"])
def test_hessian_is_the_same_in_any_chunks_and_from_any_layout(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = case(name)
    H = note.convolution_hessian(net.K, net.A, net.B)
    assert distance(note.convolution_hessian(net.K.to_dense(), net.A, net.B), H) <= EXACT
    for chunk in (1, 5 * len(net.K)):
        monkeypatch.setattr(note, "CHUNK", chunk)
        assert distance(note.convolution_hessian(net.K, net.A, net.B), H) <= EXACT


def test_hessian_is_the_chain_rule_of_section_1() -> None:
    net = case("plain", FEW)
    K = net.K.to_dense()
    full = K.T @ note.hessian(net.A, net.B) @ K
    assert distance(note.convolution_hessian(net.K, net.A, net.B), full) <= EXACT


@pytest.mark.parametrize("name", MODULES)
def test_inverse_goes_through_a_square_matrix_only(name: str) -> None:
    net = case(name, (120, 120))
    X, inverse = note.distributed_inverse(net.K, net.A, net.B), net.hessian().inverse()
    at_best_length = (inverse * X).sum() / (X * X).sum() * X
    if name == "one call":
        assert distance(X, inverse) <= HESSIAN
    else:
        assert distance(at_best_length, inverse) >= 1e-2


# The Kronecker approximation.


@pytest.mark.parametrize("name", MODULES)
def test_expand_is_the_sum_over_positions(name: str) -> None:
    net = case(name)
    AA, BB = note.expand(net.tying, net.A, net.B)
    groups, S, d_in = net.tying.inputs.shape
    a, b = torch.zeros_like(AA), torch.zeros_like(BB)
    for g in range(groups):
        for s in range(S):
            C = torch.zeros(d_in, len(net.A), dtype=F64)
            for i, j in enumerate(net.tying.inputs[g, s].tolist()):
                if j >= 0:
                    C[i, j] = 1
            R = torch.eye(len(net.B), dtype=F64)[net.tying.outputs[g, s]]
            a[g] += C @ net.A @ net.A.T @ C.T / S
            b[g] += R @ net.B @ net.B.T @ R.T
    assert distance(AA, a) <= EXACT
    assert distance(BB, b) <= EXACT
    assert (groups, len(BB)) == (len(AA), groups)


def test_expand_is_exact_for_one_position_only() -> None:
    for name, exact in (("one call", True), ("tokens", False)):
        net = case(name)
        (AA,), (BB,) = note.expand(net.tying, net.A, net.B)
        apart = distance(torch.kron(BB, AA), net.hessian())  # u is the weight row by row
        assert (apart <= EXACT) if exact else (apart > 1e-3)


@pytest.mark.parametrize("damping", [0.0, 3.0])
@pytest.mark.parametrize("name", MODULES)
def test_preconditioner_is_the_dense_inverse(name: str, damping: float) -> None:
    net = case(name)
    AA, BB = note.expand(net.tying, net.A, net.B)
    blocks = torch.block_diag(*(torch.kron(b, a) for a, b in zip(AA, BB, strict=True)))
    r = normal(len(net.u), seed=5)
    R, order = net.tying.small(r).flatten(), net.tying.entries.flatten()
    solved = torch.zeros_like(r)
    solved[order] = torch.linalg.solve(blocks + damping * torch.eye(len(r), dtype=F64), R)
    found = note.kronecker_preconditioner(net.tying, net.A, net.B, damping)(r)
    assert distance(found, solved) <= HESSIAN


def test_preconditioner_stays_finite_where_it_is_singular() -> None:
    net = case("groups, stride, dilation", FEW)
    dead = net.A * (torch.arange(len(net.A)) < len(net.A) // 2).unsqueeze(1)  # group 2 sees zeros
    precondition = note.kronecker_preconditioner(net.tying, dead, net.B)
    P = torch.stack([precondition(row) for row in torch.eye(len(net.u), dtype=F64)])
    assert bool(torch.isfinite(P).all())
    assert float(torch.linalg.eigvalsh(P).amin()) > 0


# The Newton step on u.


@pytest.mark.parametrize("name", MODULES)
def test_step_is_least_squares_from_any_start(name: str) -> None:
    net = case(name)
    best = torch.linalg.lstsq(net.design(), note.vec(net.Y).unsqueeze(1)).solution.squeeze(1)
    for solver in (Solver(), net.solver()):
        for u in (net.u, 0 * net.u, 100 * net.u):
            step = note.newton_step_tied(u, net.tying, net.A, net.B, net.Y, solver)
            assert (step.u - best).norm() <= SOLVED * (1 + u.norm())
            assert step.residual <= 1e-10
            assert (step.singular, step.ending) == (False, Ending.CONVERGED)


@pytest.mark.parametrize("name", MODULES)
def test_damped_step_is_the_dense_one(name: str) -> None:
    for size in (REGULAR, FEW):
        net = case(name, size)
        H = net.hessian()
        damping = float(H.diagonal().mean())
        d = torch.linalg.solve(H + damping * torch.eye(len(H), dtype=F64), -net.gradient())
        for solver in (Solver(damping), net.solver(damping)):
            step = net.step(solver)
            assert distance(step.u - net.u, d) <= SOLVED
            assert not step.singular


SINGULAR = [name for name in MODULES if name != "one call"]


@pytest.mark.parametrize("name", SINGULAR)
def test_singular_step_is_the_shortest_and_says_so(name: str) -> None:
    net = case(name, FEW)
    with pytest.warns(KronewtonWarning, match=r"is singular: .* The shortest step .*damping > 0"):
        step = net.step(Solver())
    shortest = torch.linalg.pinv(net.design()) @ (note.vec(net.Y) - net.output(net.u))
    assert distance(step.u - net.u, shortest) <= SOLVED
    assert step.singular


@pytest.mark.parametrize("name", SINGULAR)
def test_singular_step_with_a_preconditioner_is_one_of_the_optima(name: str) -> None:
    net = case(name, FEW)
    with pytest.warns(KronewtonWarning, match=r"one of them .* preconditioner's norm; without a"):
        step = net.step(net.solver())
    best = torch.linalg.pinv(net.design()) @ (note.vec(net.Y) - net.output(net.u))
    assert distance(net.output(step.u - net.u), net.output(best)) <= SOLVED
    assert step.singular
    assert step.residual <= 1e-10


def test_singular_by_its_geometry() -> None:
    """A circular kernel whose first and last entry always meet the same input."""
    conv = nn.Conv1d(1, 2, 3, padding=2, dilation=2, padding_mode="circular", dtype=F64)
    tying = note.tied_convolution(conv, (1, 4))
    m, n = tying.shape
    A, B, Y = normal(n, 20), normal(m, 20, seed=1), normal(20, 20, seed=2)
    with pytest.warns(KronewtonWarning, match=r"\(6×6\) is singular"):
        step = note.newton_step_tied(normal(6, seed=3), tying, A, B, Y)
    assert step.singular


def test_nothing_to_learn_leaves_u_alone() -> None:
    net = case("plain")
    with pytest.warns(KronewtonWarning, match="is singular"):
        step = note.newton_step_tied(net.u, net.tying, net.A, 0 * net.B, net.Y)
    assert torch.equal(step.u, net.u)


def correlated(seed: int) -> Case:
    """3 → 8 channels, 3×3, on images whose neighbours and channels are alike."""
    conv, shape, N, p = nn.Conv2d(3, 8, 3, padding=1, dtype=F64), (3, 6, 6), 30, 40
    x = normal(N, *shape, seed=seed)
    x = x / 4 + 3 * F.avg_pool2d(x, 3, 1, 1) + 2 * x.mean(1, keepdim=True)
    tying = note.tied_convolution(conv, shape)
    B, Y = normal(tying.shape[0], p, seed=seed + 1), normal(p, N, seed=seed + 2)
    return Case(conv, shape, tying, normal(216, seed=seed + 3), x.flatten(1).T, B, Y)


@pytest.mark.parametrize("seed", [0, 10])
def test_preconditioner_takes_at_most_a_third_of_the_iterations(seed: int) -> None:
    net = correlated(seed)
    s = torch.linalg.eigvalsh(note.convolution_hessian(net.K, net.A, net.B))
    assert 100 < s[-1] / s[0] < 1000
    plain, fast = net.step(Solver()), net.step(net.solver())
    assert max(plain.residual, fast.residual) <= 1e-10
    assert fast.iterations <= plain.iterations / 3
    assert distance(fast.u - net.u, plain.u - net.u) <= SOLVED


def test_step_that_does_not_arrive_says_how_far_it_came() -> None:
    net = case("plain")
    with pytest.warns(
        KronewtonWarning,
        match=r"ended by the limit of iterations after 3 iterations, at a relative residual of "
        r"\S+ where 1.0e-10 was asked.*best step so far",
    ) as said:
        step = net.step(Solver(limit=3))
    assert (step.iterations, step.ending) == (3, Ending.LIMIT)
    assert float(net.loss(step.u)) < float(net.loss(net.u))
    assert said[0].filename == __file__


@pytest.mark.parametrize(
    ("precondition", "ending"),
    [(lambda r: r * float("nan"), Ending.NOT_FINITE), (lambda r: -r, Ending.CURVATURE)],
)
def test_broken_preconditioner_ends_and_is_reported(
    precondition: Callable[[Tensor], Tensor], ending: Ending
) -> None:
    net = case("plain")
    with pytest.warns(KronewtonWarning, match=f"ended by {ending} after 0 iterations"):
        step = net.step(Solver(1.0, precondition))
    assert step.ending is ending
    assert torch.equal(step.u, net.u)


def test_float32_stays_float32() -> None:
    net = case("plain")
    narrow = [t.float() for t in (net.A, net.B, net.Y)]
    step = note.newton_step_tied(net.u.float(), net.tying, *narrow, Solver(tolerance=1e-5))
    assert step.u.dtype == torch.float32
    assert distance(step.u.double(), net.step(Solver()).u) <= 1e-3


# Planted mistakes: each must move what the tests above compare.


def scaled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: 1.01 * function(*given)


def changed_tying(change: Callable[[Tensor], Tensor]) -> Callable[..., Tying]:
    right = note.tied_convolution

    def wrong(conv: nn.Module, shape: tuple[int, ...]) -> Tying:
        tying = right(conv, shape)
        return Tying(tying.shape, tying.inputs, tying.outputs, change(tying.entries))

    return wrong


@pytest.mark.parametrize("change", [lambda e: e.flip(2), lambda e: e.roll(1, 1)])
@pytest.mark.parametrize("name", ["plain", "transposed"])
def test_oracles_catch_a_kernel_laid_wrongly(
    name: str, change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned around, or its output channels permuted."""
    monkeypatch.setattr(note, "tied_convolution", changed_tying(change))
    for test in (
        test_convolution_is_its_matrix,
        lambda name: test_gradient_hessian_and_product_are_autograds(name, REGULAR),
        test_step_is_least_squares_from_any_start,
    ):
        with pytest.raises(AssertionError):
            test(name)


def rows_for_columns(K: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """BB' ⊗ AA' for AA' ⊗ BB', on a W that is square."""
    return HESSIAN_OF(K, B, A)


def without_cross_terms(K: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Every entry of W for itself: diag(AA' ⊗ BB') for AA' ⊗ BB'."""
    diagonal = torch.kron(A.square().sum(1), B.square().sum(1))
    return K.to_dense().T @ (diagonal.unsqueeze(1) * K.to_dense())


HESSIAN_OF = note.convolution_hessian


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("tied_gradient", scaled(note.tied_gradient)),
        ("convolution_hessian", scaled(note.convolution_hessian)),
        ("convolution_hessian", without_cross_terms),
        ("convolution_product", lambda K, A, B: lambda v: 1.01 * (HESSIAN_OF(K, A, B) @ v)),
    ],
)
def test_hessian_oracle_catches(
    name: str, mistake: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(note, name, mistake)
    with pytest.raises(AssertionError):
        test_gradient_hessian_and_product_are_autograds("plain", REGULAR)


def test_hessian_oracle_catches_swapped_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "depthwise, reflect"  # 3 channels of 3×4 in and out: W is square
    test_gradient_hessian_and_product_are_autograds(name, REGULAR)
    monkeypatch.setattr(note, "convolution_hessian", rows_for_columns)
    with pytest.raises(AssertionError):
        test_gradient_hessian_and_product_are_autograds(name, REGULAR)


def test_expand_oracle_catches_two_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    expand = note.expand

    def two_sums(tying: Tying, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        AA, BB = expand(tying, A, B)
        return AA * tying.inputs.shape[1], BB

    monkeypatch.setattr(note, "expand", two_sums)
    with pytest.raises(AssertionError):
        test_expand_is_the_sum_over_positions("plain")


def test_step_oracle_catches_one_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(note, "tied_gradient", scaled(note.tied_gradient))
    with pytest.raises(AssertionError):
        test_step_is_least_squares_from_any_start("plain")


# What is refused, and in which words.


def test_letters_that_do_not_fit_the_tiling() -> None:
    net = case("plain")
    K, A, B = net.K, net.A, net.B
    for call in (note.convolution_hessian, note.convolution_product, note.distributed_inverse):
        with pytest.raises(ModelError, match=r"K has shape \(864, 54\), A \(36, 8\).* of 1296 row"):
            call(K, B[:, :8], B)
        with pytest.raises(ModelError, match=r"K is torch.float32 on cpu, A is torch.float64"):
            call(K.float(), A, B)
        with pytest.raises(ModelError, match=r"A has shape \(24,\); a matrix \(n, N\) is allowed"):
            call(K, A[:, 0], B)
    with pytest.raises(ModelError, match=r"u has shape \(53,\), K has shape \(864, 54\)"):
        note.tied_gradient(net.u[1:], K, A, B, net.Y)
    with pytest.raises(ModelError, match=r"u is torch.float32"):
        note.tied_gradient(net.u.float(), K, A, B, net.Y)


def test_letters_that_do_not_fit_the_tying() -> None:
    net = case("plain")
    for call in (
        lambda A, B: note.expand(net.tying, A, B),
        lambda A, B: note.kronecker_preconditioner(net.tying, A, B),
        lambda A, B: note.newton_step_tied(net.u, net.tying, A, B, net.Y),
    ):
        with pytest.raises(
            ModelError,
            match=r"tying is of a W \(36, 24\), A has shape \(36, 100\).*A \(24, N\)",
        ):
            call(net.B, net.A)


def test_channels_that_do_not_divide() -> None:
    K = case("plain").K
    for m, channels in ((36, 5), (36, 0), (0, 3), (35, 5)):
        with pytest.raises(ModelError, match=rf"m={m}, channels={channels} and a K of 864 rows"):
            note.channels_outermost(K, m, channels)


@pytest.mark.parametrize("name", "uABY")
def test_numbers_that_are_not_finite(name: str) -> None:
    net = case("plain")
    letters = {"u": net.u, "A": net.A, "B": net.B, "Y": net.Y}
    letters = {key: t.clone() for key, t in letters.items()}
    letters[name].view(-1)[0] = float("nan")
    u, A, B, Y = letters.values()
    with pytest.raises(ModelError, match=rf"^{name} holds NaN or infinity"):
        note.newton_step_tied(u, net.tying, A, B, Y)


def test_damping_of_the_preconditioner_out_of_range() -> None:
    net = case("plain")
    with pytest.raises(OptionError, match=r"damping=-1.0; a finite number from 0 up"):
        note.kronecker_preconditioner(net.tying, net.A, net.B, -1.0)


def test_no_warning_of_torch_reaches_the_user() -> None:
    net = case("plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note.convolution_hessian(note.tiling_matrix(net.module, net.input_shape), net.A, net.B)
        net.step(net.solver())
