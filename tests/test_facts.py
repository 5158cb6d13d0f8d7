"""What theory says of K-FAC on nn.Linear, read off the optimizer's own steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kronewton as kn
import oracles
from kronewton import factors, structure
from kronewton.inverse import EigenInverse
from oracles import distance
from reading import EXACT, F64, PINNED, after, apart, normal, read_blocks, scale_of

WIDTHS = (3, 4, 3, 2)
N = 6
Change = Callable[[nn.Module], None]


def network(
    kind: Callable[[], nn.Module] = nn.Identity,
    widths: Sequence[int] = WIDTHS,
    bias: bool = True,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias, dtype=F64), kind()]
    model = nn.Sequential(*layers[:-1])
    for i, p in enumerate(model.parameters()):
        p.data = normal(*p.shape, seed=10 + i) / 2
    return model


def squared(reduction: str = "mean") -> tuple[nn.Module, Tensor]:
    return nn.MSELoss(reduction=reduction), normal(N, 2, seed=1)


X = normal(N, 3)
CLASSES = torch.tensor([0, 1, 1, 0, 1, 0])
LOSSES = {
    "mse": (nn.MSELoss(), normal(N, 2, seed=1)),
    "mse-sum": (nn.MSELoss(reduction="sum"), normal(N, 2, seed=1)),
    "ce": (nn.CrossEntropyLoss(), CLASSES),
    "ce-sum": (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "bce": (nn.BCEWithLogitsLoss(), normal(N, 2, seed=1).sigmoid()),
}


# Which parameters are trained, and in which order they are given.


def everything(model: nn.Module) -> None:
    return None


def without_the_first_layer(model: nn.Module) -> None:
    model[0].requires_grad_(False)


def without_a_bias(model: nn.Module) -> None:
    model[2].bias.requires_grad_(False)


def without_a_weight(model: nn.Module) -> None:
    model[2].weight.requires_grad_(False)


FREEZING = [everything, without_the_first_layer, without_a_bias, without_a_weight]


def odd_and_even(parameters: list[Tensor]) -> list[Tensor]:
    return parameters[1::2] + parameters[::2]


# Fact 1: a deep linear net with squared error.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(), (2, 4), (1, 2, 3)])
def test_1_deep_linear_is_exact_at_every_depth(
    reduction: str, bias: bool, sizes: Sequence[int]
) -> None:
    model, (criterion, y) = network(bias=bias), squared(reduction)
    found = read_blocks(model, criterion, X, y, sizes=sizes)
    assert list(found) == ["0", "2", "4"]
    assert max(apart(found, model, criterion, X, y)) <= EXACT
    for layer, block in found.items():
        assert distance(block, oracles.hessian_block(model, criterion, X, y, layer)) <= EXACT


@pytest.mark.parametrize("order", [list, reversed, odd_and_even])
@pytest.mark.parametrize("freeze", FREEZING)
def test_1_whatever_is_trained_in_whatever_order(
    freeze: Change, order: Callable[[list[Tensor]], list[Tensor]]
) -> None:
    model, (criterion, y) = network(), squared()
    freeze(model)
    found = read_blocks(model, criterion, X, y, order=order)
    assert max(apart(found, model, criterion, X, y)) <= EXACT


def test_1_does_not_hold_with_a_nonlinearity_or_another_loss() -> None:
    for kind, name in ((nn.Tanh, "mse"), (nn.Identity, "ce"), (nn.Identity, "bce")):
        model, (criterion, y) = network(kind), LOSSES[name]
        found = read_blocks(model, criterion, X, y)
        assert max(apart(found, model, criterion, X, y)) > 1e-2


# Fact 2: one example, or copies of it.


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("kind", [nn.ReLU, nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize("name", LOSSES)
def test_2_one_example_is_exact(name: str, kind: type[nn.Module], copies: int) -> None:
    model, (criterion, y) = network(kind), LOSSES[name]
    x, y = X[2:3].repeat(copies, 1), torch.cat([y[:1]] * copies)
    found = read_blocks(model, criterion, x, y)
    assert max(apart(found, model, criterion, x, y)) <= EXACT


@pytest.mark.parametrize("freeze", FREEZING)
def test_2_one_example_is_exact_whatever_is_trained(freeze: Change) -> None:
    model, (criterion, y) = network(nn.Tanh), LOSSES["ce"]
    freeze(model)
    found = read_blocks(model, criterion, X[:1], y[:1], order=odd_and_even)
    assert max(apart(found, model, criterion, X[:1], y[:1])) <= EXACT


def test_2_a_weight_that_is_used_at_several_positions_is_not_exact() -> None:
    model = nn.Sequential(*network(nn.Tanh), nn.Flatten())
    x, y = normal(1, 3, 3), normal(1, 6, seed=1)
    found = read_blocks(model, nn.MSELoss(), x, y)
    assert apart(found, model, nn.MSELoss(), x, y)[0] > 1e-2


# Fact 5: corrected eigenvalues.


@pytest.mark.parametrize("kind", [nn.Identity, nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("name", LOSSES)
def test_5_corrected_is_never_farther_and_has_the_blocks_trace(
    name: str, kind: type[nn.Module]
) -> None:
    model, (criterion, y) = network(kind), LOSSES[name]
    kfac = apart(read_blocks(model, criterion, X, y), model, criterion, X, y)
    corrected = read_blocks(model, criterion, X, y, basis="corrected")
    for plain, better in zip(kfac, apart(corrected, model, criterion, X, y), strict=True):
        assert better <= plain + EXACT
    for layer, block in corrected.items():
        exact = oracles.ggn_block(model, criterion, X, y, layer).trace()
        assert distance(block.trace(), exact) <= EXACT


@pytest.mark.parametrize("sizes", [(), (2, 4)])
def test_5_corrected_is_exact_for_deep_linear(sizes: Sequence[int]) -> None:
    model, (criterion, y) = network(), squared()
    found = read_blocks(model, criterion, X, y, sizes=sizes, basis="corrected")
    assert max(apart(found, model, criterion, X, y)) <= EXACT


@pytest.mark.parametrize("name", LOSSES)
def test_5_corrected_is_exact_for_one_example(name: str) -> None:
    model, (criterion, y) = network(nn.Tanh), LOSSES[name]
    found = read_blocks(model, criterion, X[:1], y[:1], basis="corrected")
    assert max(apart(found, model, criterion, X[:1], y[:1])) <= EXACT


# Fact 6: draws instead of columns.


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_6_one_example_has_the_sampled_block(name: str, draws: int) -> None:
    model, (criterion, y) = network(nn.Tanh), LOSSES[name]
    x, y = X[:1], y[:1]
    generator = torch.Generator().manual_seed(5)
    Lambda = kn.losses.curvature(criterion, model(x).detach(), y)
    u = torch.stack([Lambda.draw(generator).flatten() for _ in range(draws)])  # (V, p)
    found = read_blocks(model, criterion, x, y, fisher="sampled", draws=draws, seed=5)
    for layer, block in found.items():
        m, output = oracles.matrix(model, layer).flatten(), oracles.output_of(model, x, layer)
        J = torch.autograd.functional.jacobian(output, m).flatten(0, 1)  # (p, mn)
        assert float((block - J.T @ u.T @ u @ J / draws).norm() / block.norm()) <= EXACT


@pytest.mark.parametrize("name", ["mse", "ce", "bce"])
def test_6_draws_converge_at_the_monte_carlo_rate(name: str) -> None:
    model, (criterion, y) = network(widths=(2, 2), bias=False), LOSSES[name]
    exact = read_blocks(model, criterion, X[:, :2], y)["0"]

    def error(draws: int) -> float:
        """Root mean square over seeds."""
        read = partial(read_blocks, model, criterion, X[:, :2], y, fisher="sampled", draws=draws)
        errors = [distance(read(seed=seed)["0"], exact) for seed in range(12)]
        return float(torch.tensor(errors).square().mean().sqrt())

    few, many = error(2), error(128)
    assert few / many == pytest.approx(8, rel=0.5)  # √(128/2)


# Fact 7: the losses, through the whole road.

W2, W3 = torch.tensor([0.3, 1.7], dtype=F64), torch.tensor([0.3, 1.7, 1.1], dtype=F64)
ONE: dict[str, tuple[nn.Module, tuple[int, ...], Tensor]] = {  # output of one example, target
    "mse": (nn.MSELoss(), (6,), normal(1, 6)),
    "mse-2d": (nn.MSELoss(), (3, 2), normal(1, 3, 2)),
    "mse-3d-sum": (nn.MSELoss(reduction="sum"), (3, 2, 1), normal(1, 3, 2, 1)),
    "ce-weight": (nn.CrossEntropyLoss(W3), (3,), torch.tensor([1])),
    "ce-weight-sum": (nn.CrossEntropyLoss(W3, reduction="sum"), (3,), torch.tensor([1])),
    "ce-positions": (nn.CrossEntropyLoss(), (3, 2), torch.tensor([[1, 2]])),
    "ce-mask": (nn.CrossEntropyLoss(), (3, 3), torch.tensor([[1, -100, 2]])),
    "ce-index": (nn.CrossEntropyLoss(ignore_index=1), (3, 3), torch.tensor([[1, 0, 2]])),
    "ce-weight-mask": (nn.CrossEntropyLoss(W3), (3, 3), torch.tensor([[1, -100, 2]])),
    "ce-smooth": (nn.CrossEntropyLoss(label_smoothing=0.3), (3, 2), torch.tensor([[1, 2]])),
    "ce-all": (
        nn.CrossEntropyLoss(W3, label_smoothing=0.3),
        (3, 2, 2),
        torch.tensor([[[1, 2], [-100, 0]]]),
    ),
    "ce-soft": (nn.CrossEntropyLoss(), (3, 2), normal(1, 3, 2).softmax(1)),
    "ce-soft-weight": (nn.CrossEntropyLoss(W3), (3,), normal(1, 3).softmax(1)),
    "bce": (nn.BCEWithLogitsLoss(), (3, 2), normal(1, 3, 2).sigmoid()),
    "bce-weights": (nn.BCEWithLogitsLoss(W2, pos_weight=3 * W2), (3, 2), normal(1, 3, 2) > 0),
    "poisson": (nn.PoissonNLLLoss(), (2,), torch.tensor([[3.0, 0.0]], dtype=F64)),
    "huber": (nn.HuberLoss(delta=20.0), (3,), normal(1, 3)),
}


@pytest.mark.parametrize("name", ONE)
def test_7_the_scale_of_every_loss_is_autograds(name: str) -> None:
    criterion, shape, y = ONE[name]
    y = y.double() if y.dtype == torch.bool else y
    p = int(torch.tensor(shape).prod())
    model = nn.Sequential(*network(nn.Tanh, (2, 2, p)), nn.Unflatten(1, shape))
    found = read_blocks(model, criterion, X[:1, :2], y)
    assert max(apart(found, model, criterion, X[:1, :2], y)) <= EXACT


@pytest.mark.parametrize("weight", [None, W2])
def test_7_likelihood_of_log_softmax_is_cross_entropy(weight: Tensor | None) -> None:
    bare = network(nn.Tanh)
    damping = scale_of(bare, nn.CrossEntropyLoss(weight), X, CLASSES)
    steps = []
    for tail, criterion in (
        ([nn.LogSoftmax(1)], nn.NLLLoss(weight)),
        ([], nn.CrossEntropyLoss(weight)),
    ):
        model = nn.Sequential(*copy.deepcopy(bare), *tail)
        steps.append(after(model, criterion, X, CLASSES, damping=damping))
    assert distance(*steps) <= EXACT


# Facts 8 and 9: what a batch is, and what leaves the step unchanged.


@pytest.mark.parametrize("weight", [None, W2])
def test_8_masked_examples_are_cut_away(weight: Tensor | None) -> None:
    model, criterion = network(nn.Tanh), nn.CrossEntropyLoss(weight)
    masked = CLASSES.clone()
    masked[[1, 4]] = -100
    kept = masked >= 0
    damping = scale_of(model, criterion, X, masked)
    cut = after(model, criterion, X[kept], CLASSES[kept], damping=damping)
    assert distance(after(model, criterion, X, masked, damping=damping), cut) <= EXACT


@pytest.mark.parametrize("freeze", FREEZING)
@pytest.mark.parametrize("basis", ["eigen", "corrected", "factored"])
@pytest.mark.parametrize("name", ["mse", "mse-sum", "ce", "bce"])
def test_9_three_steps_do_not_know_how_the_batch_came(
    name: str, basis: str, freeze: Change
) -> None:
    model, (criterion, y) = network(nn.Tanh), LOSSES[name]
    freeze(model)
    damping = 0.1 * scale_of(model, criterion, X, y)
    three = partial(after, model, criterion, steps=3, basis=basis, damping=damping)
    whole = three(X, y)
    for sizes in ((2, 4), (3, 3), (1, 2, 3)):
        assert distance(three(X, y, sizes), whole) <= 1e-9
    for factor in (1e-2, 30.0):
        assert distance(three(X, y, factor=factor), whole) <= 1e-9
    if criterion.reduction == "mean":
        assert distance(three(X.repeat(2, 1), torch.cat([y, y])), whole) <= 1e-9


# Fact 10: the constants, by hand, where K-FAC is exact for a single layer.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_10_squared_error_has_no_half_and_counts_every_element(reduction: str) -> None:
    model, (criterion, y) = network(widths=(3, 2), bias=False), squared(reduction)
    constant = 2 / y.numel() if reduction == "mean" else 2
    block = constant * torch.kron(torch.eye(2, dtype=F64), X.T @ X)
    assert distance(read_blocks(model, criterion, X, y)["0"], block) <= EXACT


@pytest.mark.parametrize("weight", [None, W2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_10_cross_entropy_divides_by_the_weight_of_unmasked_positions(
    reduction: str, weight: Tensor | None
) -> None:
    model = network(widths=(3, 2), bias=False)
    nn.init.zeros_(model[0].weight)  # all examples at p = ½, so that Λ_i differ by weight only
    y = CLASSES.clone()
    y[:2] = -100
    ω = torch.where(y < 0, 0, torch.ones(N, dtype=F64) if weight is None else weight[CLASSES])
    ω = ω / ω.sum() if reduction == "mean" else ω
    p = torch.full((2,), 0.5, dtype=F64)
    block = torch.kron(p.diag() - p.outer(p), X.T @ (ω[:, None] * X))
    criterion = nn.CrossEntropyLoss(weight, reduction=reduction)
    assert distance(read_blocks(model, criterion, X, y)["0"], block) <= EXACT


# Fact 11: linear regression.


def regression(steps: int, **options: Any) -> float:
    """Distance to the least-squares solution; column scales from 1 to 0.03, and a bias."""
    x = normal(200, 7) * torch.logspace(0, -1.523, 7, dtype=F64)
    y = x @ normal(7, 1, seed=1) + 0.5 + 0.1 * normal(200, 1, seed=2)
    model, criterion = network(widths=(7, 1)), nn.MSELoss()
    optimizer = kn.KFAC(model, criterion, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    best = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), y).solution
    return distance(oracles.matrix(model, "0"), best.T)


def test_11_one_step_is_least_squares() -> None:
    assert regression(1, damping=1e-10, basis="eigen", fisher="exact") <= 1e-5


def test_11_with_nothing_set_twenty_five_steps_are() -> None:
    assert regression(25) <= 1e-4


# Fact 12: π-damping.


def damped_factors_step(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, layer: str, damping: float
) -> Tensor:
    """−(B + √λ/π I)⁻¹ G (A + π√λ I)⁻¹ with π² = (tr A/d_A)/(tr B/d_B), from dense parts."""
    a, b = kn.derivation.jacobian_blocks(model, layer, x)
    a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
    H = torch.autograd.functional.hessian(lambda z: criterion(z, y), model(x).detach())
    Lambda = torch.stack([H[i, :, i] for i in range(len(x))])
    A, B = a.T @ a / len(a), (b @ Lambda @ b.mT).sum(0)
    π = ((A.trace() / len(A)) / (B.trace() / len(B))) ** 0.5
    A.diagonal().add_(π * damping**0.5)
    B.diagonal().add_(damping**0.5 / π)
    G = oracles.gradient(model, criterion, x, y, layer)
    return -torch.linalg.solve(A, torch.linalg.solve(B, G).T).T


@pytest.mark.parametrize("name", LOSSES)
def test_12_factored_is_pi_damped(name: str) -> None:
    model, (criterion, y) = network(nn.Tanh), LOSSES[name]
    damping = 0.1 * scale_of(model, criterion, X, y)
    found = after(model, criterion, X, y, basis="factored", damping=damping)
    expected = []
    for layer in ("0", "2", "4"):
        step = damped_factors_step(model, criterion, X, y, layer, damping)
        expected += [step[:, :-1].flatten(), step[:, -1]]
    assert distance(found, torch.cat(expected)) <= EXACT


@pytest.mark.parametrize("where", ["inputs", "gradients"])
@pytest.mark.parametrize("basis", ["factored", "eigen", "corrected"])
def test_12_a_zero_factor_stops_its_layer_only(basis: str, where: str) -> None:
    model, (criterion, y) = network(bias=False), squared()
    x, dead = (torch.zeros_like(X), ["0", "2", "4"]) if where == "inputs" else (X, ["0"])
    if where == "gradients":
        nn.init.zeros_(model[2].weight)  # nothing comes back to layer 0, and 4 has no input
        dead = ["0", "4"]
    before = {k: oracles.matrix(model, k) for k in ("0", "2", "4")}
    optimizer = kn.KFAC(model, criterion, **{**PINNED, "basis": basis, "damping": 0.1})
    criterion(model(x), y).backward()
    optimizer.step()
    for layer, M in before.items():
        assert torch.isfinite(oracles.matrix(model, layer)).all()
        assert torch.equal(oracles.matrix(model, layer), M) == (layer in dead)


# Planted mistakes.


def one_percent(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: 1.01 * function(*given)


def swapped(inverse: EigenInverse, G: Tensor, damping: float) -> Tensor:
    """A ⊗ B for B ⊗ A, which a square layer lets pass in silence."""
    if G.shape[0] != G.shape[1]:
        return APPLY(inverse, G, damping)
    return APPLY(EigenInverse(inverse.U_B, inverse.U_A, inverse.s.T), G, damping)


def transposed(inverse: EigenInverse, G: Tensor, damping: float) -> Tensor:
    return APPLY(inverse, G, damping) if G.shape[0] != G.shape[1] else APPLY(inverse, G.T, damping)


APPLY = EigenInverse.apply


@pytest.mark.parametrize(
    ("owner", "name", "mistake"),
    [
        (structure, "second_moment", one_percent(structure.second_moment)),
        (EigenInverse, "apply", one_percent(APPLY)),
        (EigenInverse, "apply", swapped),
        (EigenInverse, "apply", transposed),
    ],
)
def test_the_oracle_catches(
    owner: Any, name: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (criterion, y) = network(widths=(3, 3, 2), bias=False), squared()
    assert max(apart(read_blocks(model, criterion, X, y), model, criterion, X, y)) <= EXACT
    monkeypatch.setattr(owner, name, mistake)
    assert max(apart(read_blocks(model, criterion, X, y), model, criterion, X, y)) > 1e-3


def test_the_trace_catches_one_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_rotated_squares", one_percent(factors._rotated_squares))
    with pytest.raises(AssertionError):
        test_5_corrected_is_never_farther_and_has_the_blocks_trace("ce", nn.Tanh)


def test_the_sampled_block_catches_one_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "second_moment", one_percent(structure.second_moment))
    with pytest.raises(AssertionError):
        test_6_one_example_has_the_sampled_block("ce", 3)


def test_the_constants_catch_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    half = property(lambda d: 0.5 * d.hessian())
    monkeypatch.setattr(kn.losses.base.Diagonal, "diagonal", half)
    with pytest.raises(AssertionError):
        test_10_squared_error_has_no_half_and_counts_every_element("mean")
