"""Sections 1 and 2 of the note against autograd, planted mistakes, and every refusal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracles
from kronewton import derivation as note
from kronewton.errors import KronewtonWarning, ModelError, OptionError
from oracles import distance

F64 = torch.float64
EXACT = 1e-12
REGULAR = [(3, 4, 6, 9), (4, 3, 8, 12), (1, 5, 3, 12), (5, 1, 9, 3)]  # (m, n, p, N)
SINGULAR = [(5, 4, 3, 9), (3, 6, 7, 4), (5, 6, 2, 3), (2, 3, 4, 1)]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def letters(shape: tuple[int, int, int, int]) -> Four:
    m, n, p, N = shape
    return normal(m, n), normal(n, N, seed=1), normal(m, p, seed=2), normal(p, N, seed=3)


def half_square(W: Tensor, A: Tensor, B: Tensor, Y: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(B.T @ W @ A, Y, reduction="sum")


def autograd_gradient(W: Tensor, A: Tensor, B: Tensor, Y: Tensor) -> Tensor:
    W = W.clone().requires_grad_()
    (G,) = torch.autograd.grad(half_square(W, A, B, Y), W)
    return G


def autograd_hessian(W: Tensor, A: Tensor, B: Tensor, Y: Tensor) -> Tensor:
    """Over vec(W): differentiated in W', whose rows are W's columns."""
    H = torch.autograd.functional.hessian(lambda V: half_square(V.T, A, B, Y), W.T.contiguous())
    return H.reshape(W.numel(), W.numel())


# 1. Linear network.


def test_vec_stacks_columns() -> None:
    W = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert note.vec(W).tolist() == [1, 4, 2, 5, 3, 6]
    assert torch.equal(note.unvec(note.vec(W), 2, 3), W)


@pytest.mark.parametrize("shape", REGULAR + SINGULAR)
def test_loss_gradient_and_hessian_are_autograds(shape: tuple[int, int, int, int]) -> None:
    given = letters(shape)
    assert distance(note.loss(*given), half_square(*given)) <= EXACT
    assert distance(note.gradient(*given), autograd_gradient(*given)) <= EXACT
    assert distance(note.hessian(*given[1:3]), autograd_hessian(*given)) <= EXACT


@pytest.mark.parametrize("shape", REGULAR + SINGULAR)
def test_differentials_are_differences(shape: tuple[int, int, int, int]) -> None:
    """e and G are affine in W and J is quadratic, so that differences are exact."""
    W, A, B, Y = letters(shape)
    dW = normal(*W.shape, seed=4)
    e, G = (f(W + dW, A, B, Y) - f(W, A, B, Y) for f in (note.error, note.gradient))
    dJ = (note.loss(W + dW, A, B, Y) - note.loss(W - dW, A, B, Y)) / 2
    assert distance(note.differential_of_error(dW, A, B), e) <= EXACT
    assert distance(note.differential_of_gradient(dW, A, B), G) <= EXACT
    assert distance(note.differential_of_loss(dW, W, A, B, Y), dJ) <= EXACT


@pytest.mark.parametrize("shape", REGULAR)
def test_newton_step_is_least_squares_from_any_start(shape: tuple[int, int, int, int]) -> None:
    W, A, B, Y = letters(shape)
    left = torch.linalg.lstsq(B.T, Y).solution  # (m, N)
    best = torch.linalg.lstsq(A.T, left.T).solution.T  # (m, n)
    for start in (W, torch.zeros_like(W), 1e3 * W):
        assert (note.newton_step(start, A, B, Y) - best).norm() <= EXACT * (1 + start.norm())


@pytest.mark.parametrize("shape", SINGULAR)
def test_singular_newton_step_is_the_shortest_and_says_so(
    shape: tuple[int, int, int, int],
) -> None:
    given = letters(shape)
    with pytest.warns(KronewtonWarning, match=r"has rank .* pseudo-inverse was used.*damping > 0"):
        new = note.newton_step(*given)
    shortest = -torch.linalg.pinv(autograd_hessian(*given)) @ note.vec(autograd_gradient(*given))
    assert (
        distance(note.vec(new - given[0]), shortest) <= 1e-10
    )  # pinv of H has its condition number
    assert note.gradient(new, *given[1:]).norm() <= EXACT * note.gradient(*given).norm()


def test_singular_warning_names_both_ranks() -> None:
    W, A, B, Y = letters((5, 6, 2, 3))
    with pytest.warns(KronewtonWarning) as said:
        note.newton_step(W, A, B, Y)
    assert "AA' (6×6) has rank 3 and BB' (5×5) has rank 2" in str(said[0].message)
    assert said[0].filename == __file__


def test_rank_does_not_lose_half_of_the_digits() -> None:
    """A singular value of 1e-9 is far from zero, its square in AA' is not."""
    A = torch.diag(torch.tensor([1.0, 1e-9], dtype=F64))
    W, B, Y = normal(2, 2), torch.eye(2, dtype=F64), normal(2, 2, seed=1)
    assert distance(note.newton_step(W, A, B, Y) @ A, Y) <= 1e-6


@pytest.mark.parametrize("zero", ["A", "B"])
def test_zero_factor_leaves_the_weights_alone(zero: str) -> None:
    W, A, B, Y = letters((3, 4, 6, 9))
    A, B = (A * (zero != "A")), (B * (zero != "B"))
    with pytest.warns(KronewtonWarning, match="rank 0"):
        assert torch.equal(note.newton_step(W, A, B, Y), W)
    assert torch.equal(note.newton_step(W, A, B, Y, damping=1.0), W)


@pytest.mark.parametrize("damping", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("shape", REGULAR + SINGULAR)
def test_damping_is_exact(shape: tuple[int, int, int, int], damping: float) -> None:
    given = W, *_ = letters(shape)
    H = autograd_hessian(*given) + damping * torch.eye(W.numel(), dtype=F64)
    step = note.vec(note.newton_step(*given, damping=damping) - W)
    G = note.vec(autograd_gradient(*given))
    assert float((H @ step + G).norm() / (H.norm() * step.norm() + G.norm())) <= EXACT


def test_float32_stays_float32() -> None:
    W, A, B, Y = letters((3, 4, 6, 9))
    narrow = note.newton_step(*(t.float() for t in (W, A, B, Y)))
    assert narrow.dtype == torch.float32
    assert distance(narrow.double(), note.newton_step(W, A, B, Y)) <= 1e-4


MEMORY = """
import resource, sys, warnings
import torch
from kronewton import derivation
N = int(sys.argv[1])
generator = torch.Generator().manual_seed(0)
shapes = ((4096, 4096), (4096, N), (4096, N), (N, N))
W, A, B, Y = (torch.randn(shape, generator=generator) for shape in shapes)
warnings.simplefilter("ignore")
for damping in map(float, sys.argv[2:]):
    new = derivation.newton_step(W, A, B, Y, damping)
    assert torch.isfinite(new).all() and not torch.equal(new, W)
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def peak_memory(*arguments: str) -> int:
    """Bytes that a process needs for 4096×4096 weights in float32, torch included."""
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True
    )
    return int(ran.stdout)


def test_large_weights_fit_in_memory() -> None:
    assert peak_memory("128", "0", "1") < 3 * 2**30


# 2. Piecewise-linear network.


class Network(nn.Module):
    """An MLP whose output has a shape of its own, with an activation written in place."""

    def __init__(
        self,
        widths: tuple[int, ...],
        activation: Callable[[Tensor], Tensor] = F.relu_,
        bias: bool = True,
        tail: tuple[int, ...] = (-1,),
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(
                nn.Linear(d_in, d_out, bias=bias, dtype=F64) for d_in, d_out in pairwise(widths)
            )
        self.activation, self.tail = activation, tail

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = self.activation(layer(x))
        return last(x).reshape(len(x), *self.tail)


class HalfSquare(nn.Module):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (z - y).square().sum()


X, Y_REAL = normal(6, 4), normal(6, 3, seed=1)
Y_CLASS = torch.tensor([0, 2, 1, 1, 0, 2])
LAYERS = ["layers.0", "layers.1", "layers.2"]


def with_ones(A: Tensor) -> Tensor:
    return torch.cat([A, torch.ones_like(A[:, :1])], 1)


def output_hessians(criterion: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    """Λ_i, (N, p, p)."""
    H = torch.autograd.functional.hessian(lambda z: criterion(z, y), z.detach())
    return torch.stack([H[i, :, i] for i in range(len(z))])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_blocks_give_autograds_hessian_of_a_relu_network(layer: str, bias: bool) -> None:
    model = Network((4, 5, 4, 3), bias=bias)
    A, B = note.jacobian_blocks(model, layer, X)
    a = with_ones(A) if bias else A
    m, n = B.shape[1], a.shape[1]
    exact = oracles.hessian_block(model, HalfSquare(), X, Y_REAL, layer)
    assert distance(oracles.row_major(note.hessian_block(a, B), m, n), exact) <= EXACT
    softmax = nn.CrossEntropyLoss()
    exact = oracles.hessian_block(model, softmax, X, Y_CLASS, layer)
    Lambda = output_hessians(softmax, model(X), Y_CLASS)
    assert distance(oracles.row_major(note.hessian_block(a, B, Lambda), m, n), exact) <= EXACT


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("activation", [torch.tanh, torch.sigmoid, F.gelu])
def test_blocks_give_the_gauss_newton_block_of_any_network(
    layer: str, activation: Callable[[Tensor], Tensor]
) -> None:
    model, criterion = Network((4, 5, 4, 3), activation), nn.CrossEntropyLoss()
    A, B = note.jacobian_blocks(model, layer, X)
    Lambda = output_hessians(criterion, model(X), Y_CLASS)
    block = note.hessian_block(with_ones(A), B, Lambda)
    exact = oracles.ggn_block(model, criterion, X, Y_CLASS, layer)
    assert distance(oracles.row_major(block, B.shape[1], A.shape[1] + 1), exact) <= EXACT


def test_output_of_any_shape_is_flattened_per_example() -> None:
    A, B = note.jacobian_blocks(Network((4, 5, 6), tail=(2, 3)), "layers.0", X)
    flat = note.jacobian_blocks(Network((4, 5, 6)), "layers.0", X)
    assert (A.shape, B.shape) == ((6, 4), (6, 5, 6))
    assert torch.equal(A, flat[0])
    assert torch.equal(B, flat[1])


def test_layer_by_name_or_by_module_frozen_or_not() -> None:
    model = Network((4, 5, 3))
    expected = note.jacobian_blocks(model, "layers.0", X)
    model.requires_grad_(False)
    with torch.no_grad():
        found = note.jacobian_blocks(model, model.layers[0], X)
    assert torch.equal(found[0], X)
    assert torch.equal(found[1], expected[1])


def test_a_layer_alone_is_a_network() -> None:
    layer = nn.Linear(4, 3, dtype=F64)
    A, B = note.jacobian_blocks(layer, layer, X)
    assert torch.equal(A, X)
    assert torch.equal(B, torch.eye(3, dtype=F64).expand(6, 3, 3))


def test_jacobian_blocks_leave_no_trace() -> None:
    model = Network((4, 5, 3))
    before = model(X)
    note.jacobian_blocks(model, "layers.0", X)
    assert not model.layers[0]._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(X), before)


def test_lambda_for_all_examples_and_none() -> None:
    A, B = note.jacobian_blocks(Network((4, 5, 3)), "layers.0", X)
    L = normal(3, 3)
    L, eye = L @ L.T, torch.eye(3, dtype=F64)
    for block in (note.hessian_block, note.kronecker_block):
        assert distance(block(A, B, L), block(A, B, L.expand(6, 3, 3))) <= EXACT
        assert distance(block(A, B, eye), block(A, B)) <= EXACT


def test_a_batch_given_twice_counts_twice() -> None:
    A, B = note.jacobian_blocks(Network((4, 5, 3)), "layers.0", X)
    A2, B2 = torch.cat([A, A]), torch.cat([B, B])
    for block in (note.hessian_block, note.kronecker_block):
        assert distance(block(A2, B2), 2 * block(A, B)) <= EXACT


@pytest.mark.parametrize("layer", LAYERS)
def test_kronecker_block_is_exact_for_deep_linear_and_copies_only(layer: str) -> None:
    deep_linear, smooth = Network((4, 5, 4, 3), torch.clone), Network((4, 5, 4, 3), torch.tanh)
    copies = X[:1].expand(5, 4)
    for model, x, exact in [(deep_linear, X, True), (smooth, copies, True), (smooth, X, False)]:
        A, B = note.jacobian_blocks(model, layer, x)
        apart = distance(note.kronecker_block(A, B), note.hessian_block(A, B))
        assert (apart <= EXACT) if exact or layer == LAYERS[-1] else (apart > 1e-3)


# Planted mistakes: each must move what the tests above compare.


def swapped(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """B ⊗ A for A ⊗ B."""

    def wrong(A: Tensor, B: Tensor, *rest: Tensor) -> Tensor:
        m, n = (B.shape[0], A.shape[0]) if A.dim() == B.dim() else (B.shape[1], A.shape[1])
        return oracles.row_major(block(A, B, *rest), m, n)

    return wrong


def scaled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: 1.01 * function(*given)


def transposed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The W of a square problem read by rows."""
    return lambda *given: function(*given).mT


LINEAR_TESTS = {
    "hessian": test_loss_gradient_and_hessian_are_autograds,
    "gradient": test_loss_gradient_and_hessian_are_autograds,
    "loss": test_loss_gradient_and_hessian_are_autograds,
    "error": test_differentials_are_differences,
    "differential_of_error": test_differentials_are_differences,
    "differential_of_loss": test_differentials_are_differences,
    "differential_of_gradient": test_differentials_are_differences,
    "newton_step": test_newton_step_is_least_squares_from_any_start,
}
SQUARE = (4, 4, 6, 9)


@pytest.mark.parametrize("name", LINEAR_TESTS)
def test_linear_oracles_catch_one_percent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(note, name, scaled(getattr(note, name)))
    with pytest.raises(AssertionError):
        LINEAR_TESTS[name]((3, 4, 6, 9))


@pytest.mark.parametrize("name", ["gradient", "differential_of_gradient", "newton_step"])
def test_linear_oracles_catch_a_transpose(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    LINEAR_TESTS[name](SQUARE)
    monkeypatch.setattr(note, name, transposed(getattr(note, name)))
    with pytest.raises(AssertionError):
        LINEAR_TESTS[name](SQUARE)


def test_linear_oracle_catches_swapped_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(note, "hessian", swapped(note.hessian))
    with pytest.raises(AssertionError):
        test_loss_gradient_and_hessian_are_autograds(SQUARE)


@pytest.mark.parametrize("mutant", [scaled, swapped])
@pytest.mark.parametrize("layer", LAYERS)
def test_block_oracle_catches(
    layer: str, mutant: Callable[..., Callable[..., Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(note, "hessian_block", mutant(note.hessian_block))
    with pytest.raises(AssertionError):
        test_blocks_give_autograds_hessian_of_a_relu_network(layer, bias=True)


def test_block_oracle_catches_a_transposed_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = note.jacobian_blocks
    model = Network((4, 3, 4, 3))  # B_i of layers.0 is square: only its values can tell

    def wrong(*given: object) -> tuple[Tensor, Tensor]:
        A, B = blocks(*given)
        return A, B.mT

    def compare() -> None:
        A, B = note.jacobian_blocks(model, "layers.0", X)
        exact = oracles.hessian_block(model, HalfSquare(), X, Y_REAL, "layers.0")
        block = note.hessian_block(with_ones(A), B)
        assert distance(oracles.row_major(block, 3, 5), exact) <= EXACT

    compare()
    monkeypatch.setattr(note, "jacobian_blocks", wrong)
    with pytest.raises(AssertionError):
        compare()


def test_count_test_catches_two_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    block = note.kronecker_block
    monkeypatch.setattr(note, "kronecker_block", lambda A, B: len(A) * block(A, B))
    with pytest.raises(AssertionError):
        test_a_batch_given_twice_counts_twice()


# What is refused, and in which words.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": normal(3, 9)}, r"A \(n, N\) is \(3, 9\).* so that n is 3 and 4"),
        ({"B": normal(6, 3)}, r"m is 3 and 6; p is 3 and 6.* check what is transposed"),
        ({"Y": normal(6, 8)}, r"N is 8 and 9"),
        ({"A": normal(4)}, r"A has shape \(4,\); a matrix \(n, N\) is allowed.* one column"),
        ({"W": normal(3, 4).float()}, r"W is torch.float32 on cpu, .*float32 or float64, the same"),
        ({"Y": torch.ones(6, 9, dtype=torch.int64)}, r"Y is torch.int64 on cpu"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    given = {**dict(zip("WABY", letters((3, 4, 6, 9)), strict=True)), **change}
    for function in (note.loss, note.gradient, note.newton_step, note.error):
        with pytest.raises(ModelError, match=message):
            function(*given.values())


def test_differentials_and_hessian_refuse_what_does_not_fit() -> None:
    W, A, B, _ = letters((3, 4, 6, 9))
    for function in (note.differential_of_error, note.differential_of_gradient):
        with pytest.raises(ModelError, match=r"dW \(m, n\) is \(4, 3\)"):
            function(W.T, A, B)
    with pytest.raises(ModelError, match=r"B has shape \(1, 3, 6\); a matrix \(m, p\) is allowed"):
        note.hessian(A, B[None])


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_damping_out_of_range(damping: float) -> None:
    with pytest.raises(OptionError, match=rf"damping={damping}; a finite number from 0 up"):
        note.newton_step(*letters((3, 4, 6, 9)), damping=damping)


@pytest.mark.parametrize("name", "WABY")
def test_numbers_that_are_not_finite(name: str) -> None:
    given = dict(zip("WABY", letters((3, 4, 6, 9)), strict=True))
    given[name][0, 0] = float("nan")
    with pytest.raises(ModelError, match=rf"^{name} holds NaN or infinity; finite numbers"):
        note.newton_step(*given.values())


@pytest.mark.parametrize(
    ("A", "B", "Lambda", "message"),
    [
        (normal(6, 4), normal(5, 3, 2), None, r"A has shape \(6, 4\) and B has shape \(5, 3, 2\)"),
        (normal(6, 4), normal(3, 2), None, r"A \(N, n\) and B \(N, m, p\) with the same N"),
        (
            normal(5, 4),
            normal(5, 3, 2),
            normal(3, 3),
            r"Lambda has shape \(3, 3\).*\(5, 2, 2\), or",
        ),
        (normal(5, 4), normal(5, 3, 2).float(), None, r"B is torch.float32"),
        (normal(5, 4), normal(5, 3, 2), normal(2, 2).float(), r"Lambda is torch.float32"),
    ],
)
def test_blocks_that_do_not_fit(A: Tensor, B: Tensor, Lambda: Tensor | None, message: str) -> None:
    for block in (note.hessian_block, note.kronecker_block):
        with pytest.raises(ModelError, match=message):
            block(A, B, Lambda)


class Odd(nn.Module):
    """Calls one linear layer in the way that a test asks for."""

    def __init__(self, forward: Callable[[nn.Linear, Tensor], object]) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(4, 4, dtype=F64), nn.ReLU()
        self.how = forward

    def forward(self, x: Tensor) -> object:
        return self.how(self.linear, x)


def batch_norm(z: Tensor) -> Tensor:
    return (z - z.mean(0)) / z.std(0)


@pytest.mark.parametrize(
    ("forward", "x", "message"),
    [
        (lambda f, x: f(f(x)), X, r"'linear' was called 2 times in one forward pass of Odd"),
        (lambda f, x: x, X, r"'linear' was called 0 times"),
        (lambda f, x: f(x), normal(6, 2, 4), r"'linear' has shape \(6, 2, 4\); \(N, d_in\)"),
        (lambda f, x: f(x), X[0], r"'linear' has shape \(4,\).*as a batch of one"),
        (lambda f, x: (f(x),), X, r"has type tuple; a tensor \(6, …\) is allowed"),
        (lambda f, x: f(x).sum(), X, r"the output of the network has shape \(\)"),
        (lambda f, x: f(x)[1:], X, r"has shape \(5, 4\); a tensor \(6, …\)"),
        (lambda f, x: f(x)[:, :0], X, r"has shape \(6, 0\)"),
        (lambda f, x: f(x).detach(), X, r"has no gradient in the output of layer 'linear'"),
        (lambda f, x: batch_norm(f(x)), X, r"mixes examples after layer 'linear'.*model.eval\(\)"),
        (lambda f, x: batch_norm(f(x)).softmax(1), X, r"mixes examples"),
        (lambda f, x: f(x).cumsum(0), X, r"mixes examples"),
    ],
)
def test_networks_without_blocks(
    forward: Callable[[nn.Linear, Tensor], object], x: Tensor, message: str
) -> None:
    model = Odd(forward)
    with pytest.raises(ModelError, match=message):
        note.jacobian_blocks(model, "linear", x)
    assert not model.linear._forward_hooks


def test_layers_that_are_not_there_or_not_linear() -> None:
    model = Odd(lambda f, x: f(x))
    with pytest.raises(ModelError, match=r"Odd has no layer named 'fc'; its .* are 'linear'"):
        note.jacobian_blocks(model, "fc", X)
    with pytest.raises(ModelError, match=r"Odd has no layer that is this Linear\(in_features=2"):
        note.jacobian_blocks(model, nn.Linear(2, 2), X)
    with pytest.raises(ModelError, match=r"layer 'other' is of type ReLU"):
        note.jacobian_blocks(model, "other", X)
    with pytest.raises(ModelError, match=r"its nn.Linear layers are none"):
        note.jacobian_blocks(nn.Sequential(nn.ReLU()), "0", X)


def test_tied_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=F64), nn.Linear(4, 4, dtype=F64))
    model[1].weight = model[0].weight
    with pytest.raises(ModelError, match=r"layers '0' and '1' share one weight"):
        note.jacobian_blocks(model, "0", X)
