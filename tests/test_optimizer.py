"""The whole road from outside: what a step is, and what leaves it unchanged."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, jacrev

from kronewton import KFAC, inverse, structure
from kronewton.adapt import FIRST_TRIALS
from kronewton.errors import (
    CriterionError,
    KronewtonError,
    KronewtonWarning,
    ModelError,
)
from kronewton.layers import DenseRows
from kronewton.layers.base import rows_of
from kronewton.layers.linear import LinearKind

pytestmark = pytest.mark.usefixtures("float64")


BASES = ("factored", "eigen", "corrected")
DETERMINISTIC = ("exact", "empirical")
PINNED = {"lr": 0.5, "momentum": 0.3, "damping": 0.05, "trust_region": None}
EVERY_STEP = {"factor_every": 1, "inverse_every": 1}
FIRST = {"lr": 1.0, "momentum": 0.0, "trust_region": None, "fisher": "exact", **EVERY_STEP}

Batch = tuple[Tensor, Tensor]
Loop = Callable[[nn.Module, nn.Module, Tensor, Tensor], None]


def net(*sizes: int, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [nn.Linear(d_in, d_out), act()]
    return nn.Sequential(*layers[:-1])


def batches(count: int, N: int = 6, d_in: int = 3, classes: int = 4) -> list[Batch]:
    return [(torch.randn(N, d_in), torch.randint(0, classes, (N,))) for _ in range(count)]


def whole(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    criterion(model(x), y).backward()


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(
    model: nn.Module, criterion: nn.Module, data: Sequence[Batch], loop: Loop = whole, **options
) -> list[Tensor]:
    """The weights after every step, from a copy of the model."""
    model = copy.deepcopy(model)
    optimizer = KFAC(model, criterion, **options)
    seen = []
    for x, y in data:
        optimizer.zero_grad()
        loop(model, criterion, x, y)
        optimizer.step()
        seen.append(vector(model))
    optimizer.close()
    return seen


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], rtol: float = 1e-9) -> None:
    for f, w in zip(found, wanted, strict=True):
        assert float((f - w).norm() / w.norm()) <= rtol


# The first step against dense matrices.


def by_hand(
    model: nn.Sequential, criterion: nn.Module, x: Tensor, y: Tensor
) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A, B, the exact block and G of every linear layer, by autograd on its output alone."""
    found = {}
    for name, layer in model.named_children():
        if not isinstance(layer, nn.Linear):
            continue
        at = int(name)
        inputs = model[:at](x).detach()
        z = layer(inputs).detach()
        out = model[at + 1 :](z).detach()
        J = jacrev(lambda z, at=at: model[at + 1 :](z).flatten())(z)  # (P, N, d_out)
        H = hessian(lambda o, out=out: criterion(o.reshape(out.shape), y))(out.flatten())
        g = torch.autograd.functional.jacobian(
            lambda z, at=at: criterion(model[at + 1 :](z), y), z
        )  # (N, d_out)
        a = torch.cat([inputs, torch.ones(len(x), 1)], 1)
        B = sum(J[:, n].T @ H @ J[:, n] for n in range(len(x)))
        rows = torch.einsum("pno,ni->poi", J, a).flatten(1)
        found[name] = (a.T @ a / len(x), B, rows.T @ H @ rows, g.T @ a)
    return found


def first_step(model: nn.Sequential, criterion: nn.Module, x: Tensor, y: Tensor, **options):
    """Δ of every linear layer as a matrix, its bias as the last column."""
    model = copy.deepcopy(model)
    before = copy.deepcopy(model)
    optimizer = KFAC(model, criterion, **{**FIRST, **options})
    whole(model, criterion, x, y)
    optimizer.step()
    return {
        name: torch.cat(
            [layer.weight - before[int(name)].weight,
             (layer.bias - before[int(name)].bias).unsqueeze(1)], 1,
        ).detach()
        for name, layer in model.named_children()
        if isinstance(layer, nn.Linear)
    }  # fmt: skip


def damped_solve(matrix: Tensor, G: Tensor, damping: float) -> Tensor:
    eye = torch.eye(len(matrix))
    return torch.linalg.solve(matrix + damping * eye, G.flatten()).reshape(G.shape)


def check_contract(act: type[nn.Module] = nn.ReLU) -> None:
    """The first step is −(B ⊗ A + λI)⁻¹ g, for two losses."""
    model, x = net(3, 5, 4, act=act), torch.randn(7, 3)
    for criterion, y in (
        (nn.MSELoss(), torch.randn(7, 4)),
        (nn.MSELoss(reduction="sum"), torch.randn(7, 4)),
        (nn.CrossEntropyLoss(), torch.randint(0, 4, (7,))),
    ):
        steps = first_step(model, criterion, x, y, damping=0.03, basis="eigen")
        for name, (A, B, _, G) in by_hand(model, criterion, x, y).items():
            wanted = -damped_solve(torch.kron(B, A), G, 0.03)
            assert float((steps[name] - wanted).norm() / wanted.norm()) < 1e-8


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_the_first_step_is_the_contracts(act):
    check_contract(act)


@pytest.mark.parametrize("mutant", ["one per cent", "swapped", "no bias", "gradient"])
def test_mutants_of_the_central_pieces_are_caught(mutant, monkeypatch):
    if mutant == "one per cent":
        real = structure.second_moment
        monkeypatch.setattr(structure, "second_moment", lambda *args: 1.01 * real(*args))
    elif mutant == "swapped":
        monkeypatch.setattr(
            inverse.EigenInverse, "apply",
            lambda self, G, damping: self.U_A @ ((self.U_A.T @ G.T @ self.U_B) / (
                self.s.T.flip(0) + damping)) @ self.U_B.T,
        )  # fmt: skip
        real_apply = inverse.EigenInverse.apply
        monkeypatch.setattr(
            inverse.EigenInverse, "apply", lambda self, G, damping: real_apply(self, G, damping).T
        )
    elif mutant == "no bias":

        def without(self, layer, inputs, outputs):
            rows = rows_of(inputs)
            return DenseRows(torch.cat([rows, torch.zeros_like(rows[..., :1])], -1))

        monkeypatch.setattr(LinearKind, "input_rows", without)
    else:
        real = LinearKind.matrix
        monkeypatch.setattr(LinearKind, "matrix", lambda *args: 0.99 * real(*args))
    with pytest.raises((AssertionError, KronewtonWarning)):  # the rows are checked at run time, too
        check_contract()


def test_mutant_with_a_and_b_swapped_in_the_factored_inverse_is_caught(monkeypatch):
    model, criterion, x, y = net(4, 3), nn.MSELoss(), torch.randn(7, 4), torch.randn(7, 3)
    model[0] = nn.Linear(3, 4)  # d_in with its bias entry equals d_out
    x, y = torch.randn(7, 3), torch.randn(7, 4)

    def distance() -> float:
        step = first_step(model, criterion, x, y, damping=0.03, basis="factored")["0"]
        A, B, _, G = by_hand(model, criterion, x, y)["0"]
        pi = ((A.trace() / 4) / (B.trace() / 4)).sqrt()
        root, eye = math.sqrt(0.03), torch.eye(4)
        product = torch.kron(B + root / pi * eye, A + root * pi * eye)
        wanted = -damped_solve(product, G, 0.0)
        return float((step - wanted).norm() / wanted.norm())

    assert distance() < 1e-10
    real = inverse.kronecker_apply
    monkeypatch.setattr(inverse, "kronecker_apply", lambda B, A, G, sides: real(A, B, G))
    assert distance() > 1e-2


def test_where_kfac_is_exact_the_step_is_gauss_newtons():
    deep = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2))
    criterion, x, y = nn.MSELoss(), torch.randn(7, 3), torch.randn(7, 2)
    steps = first_step(deep, criterion, x, y, damping=0.03, basis="eigen")
    for name, (_, _, block, G) in by_hand(deep, criterion, x, y).items():
        wanted = -damped_solve(block, G, 0.03)
        assert float((steps[name] - wanted).norm() / wanted.norm()) < 1e-8


def test_where_it_is_not_the_step_is_not():
    model, criterion = net(3, 5, 4, act=nn.ReLU), nn.CrossEntropyLoss()
    x, y = torch.randn(7, 3), torch.randint(0, 4, (7,))
    steps = first_step(model, criterion, x, y, damping=0.03, basis="eigen")
    for name, (_, _, block, G) in by_hand(model, criterion, x, y).items():
        wanted = -damped_solve(block, G, 0.03)
        assert float((steps[name] - wanted).norm() / wanted.norm()) > 1e-3


# Numbers that are given are what is done.


def one_direction(lr: float, momentum: float, count: int) -> list[Tensor]:
    model, data = net(3, 5, 4), batches(count)
    options = {**PINNED, **EVERY_STEP, "fisher": "exact", "lr": lr, "momentum": momentum}
    return [vector(model), *trained(model, nn.CrossEntropyLoss(), data, **options)]


def test_lr_multiplies_the_direction():
    torch.manual_seed(1)
    start, half = one_direction(0.5, 0.0, 1)
    torch.manual_seed(1)
    _, full = one_direction(1.0, 0.0, 1)
    torch.testing.assert_close(full - start, 2 * (half - start), rtol=1e-10, atol=1e-13)


def test_momentum_adds_the_previous_step():
    torch.manual_seed(1)
    start, first, with_it = one_direction(0.5, 0.3, 2)
    torch.manual_seed(1)
    _, first_again, without = one_direction(0.5, 0.0, 2)
    torch.testing.assert_close(first, first_again)
    torch.testing.assert_close(with_it - without, 0.3 * (first - start), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("given", [{"lr": 0.2}, {"momentum": 0.4}, {"lr": 0.2, "momentum": 0.4}])
def test_numbers_are_kept_beside_automatic_ones(given):
    model, criterion = net(3, 5, 4), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, fisher="exact", trust_region=None, **given)
    previous = None
    for x, y in batches(4):
        optimizer.zero_grad()
        whole(model, criterion, x, y)
        optimizer.step()
        told = optimizer.diagnostics()
        if "lr" in given:
            assert float(told["lr"]) == pytest.approx(0.2)
            assert "momentum" in given or 0 <= float(told["momentum"]) <= 0.9
        if "momentum" in given and previous is not None and not told["undone"]:
            assert float(told["momentum"]) == pytest.approx(0.4)
        previous = told


def test_a_numeric_damping_stays():
    model, criterion = net(3, 5, 4), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, damping=0.7)
    for x, y in batches(7):
        optimizer.zero_grad()
        whole(model, criterion, x, y)
        optimizer.step()
        told = optimizer.diagnostics()
        assert float(told["damping"]) == float(told["inverse_damping"]) == 0.7


def test_the_automatic_step_is_the_minimum_of_the_quadratic_model():
    model, criterion, x, y = net(3, 4), nn.MSELoss(), torch.randn(9, 3), torch.randn(9, 4)
    optimizer = KFAC(model, criterion, fisher="exact", damping=0.1, trust_region=None)
    before, (_, _, C, G) = vector(model), by_hand(model, criterion, x, y)["0"]
    whole(model, criterion, x, y)
    optimizer.step()
    step = vector(model) - before
    d = torch.cat([step[:12].reshape(4, 3), step[12:].reshape(4, 1)], 1).flatten()
    # On the line of the step, the derivative of q at the step is zero.
    slope, bend = d @ G.flatten(), d @ C @ d + 0.1 * d @ d
    assert float(slope) == pytest.approx(-float(bend), rel=1e-8)
    predicted = float(optimizer.diagnostics()["predicted"])
    assert predicted == pytest.approx(float(slope + bend / 2), rel=1e-8)


def test_the_trust_region_bounds_the_curvature_of_a_step():
    model, criterion, x, y = net(3, 4), nn.MSELoss(), torch.randn(9, 3), torch.randn(9, 4)
    free = first_step(model, criterion, x, y, damping=1e-3)["0"]
    bound = 0.01
    held = first_step(model, criterion, x, y, damping=1e-3, trust_region=bound)["0"]
    _, _, C, _ = by_hand(model, criterion, x, y)["0"]
    loss = float(criterion(model(x), y))

    def curve(d: Tensor) -> float:
        return 0.5 * float(d.flatten() @ C @ d.flatten())

    assert curve(free) > bound * loss
    assert curve(held) == pytest.approx(bound * loss, rel=1e-8)
    torch.testing.assert_close(held / held.norm(), free / free.norm())


# What leaves three steps unchanged.


def duplicated(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    whole(model, criterion, torch.cat([x, x]), torch.cat([y, y]))


def parts(*sizes: int) -> Loop:
    def loop(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
        for xi, yi in zip(x.split(sizes), y.split(sizes), strict=True):
            (criterion(model(xi), yi) * (len(xi) / len(x))).backward()

    return loop


def times(c: float) -> Loop:
    return lambda model, criterion, x, y: (c * criterion(model(x), y)).backward()


LOOPS = {"duplicated": duplicated, "2+4": parts(2, 4), "3+3": parts(3, 3), "1x6": parts(*[1] * 6)}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("fisher", DETERMINISTIC)
@pytest.mark.parametrize("basis", BASES)
def test_three_pinned_steps_do_not_depend_on_how_the_batch_is_cut(basis, fisher, loop):
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(3)
    options = {**PINNED, "basis": basis, "fisher": fisher, **EVERY_STEP, "weight_decay": 0.01}
    wanted = trained(model, criterion, data, **options)
    assert_same(trained(model, criterion, data, LOOPS[loop], **options), wanted)


@pytest.mark.parametrize("c", [10.0, 1e-4])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "sampled"])
@pytest.mark.parametrize("basis", BASES)
def test_three_pinned_steps_do_not_depend_on_the_scale_of_loss_and_damping(basis, fisher, c):
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(3)
    options = {**PINNED, "basis": basis, "fisher": fisher, **EVERY_STEP}
    wanted = trained(model, criterion, data, **options)
    scaled = {**options, "damping": c * options["damping"]}
    assert_same(trained(model, criterion, data, times(c), **scaled), wanted)


@pytest.mark.parametrize("c", [64.0, 1e-3])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "sampled"])
@pytest.mark.parametrize("basis", BASES)
def test_with_nothing_set_the_scale_of_the_loss_changes_nothing(basis, fisher, c):
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(8)
    wanted = trained(model, criterion, data, basis=basis, fisher=fisher)
    assert_same(trained(model, criterion, data, times(c), basis=basis, fisher=fisher), wanted, 1e-7)


@pytest.mark.parametrize("c", [64.0, 1e-3])
def test_the_scale_changes_nothing_where_the_model_cannot_be_run_again(c):
    model, criterion, data = net(3, 5, 4), nn.NLLLoss(), batches(4)

    def loop(scale: float) -> Loop:
        return lambda model, criterion, x, y: (
            scale * criterion(model(x).log_softmax(1), y)
        ).backward()

    wanted = trained(model, criterion, data, loop(1.0), fisher="exact")
    assert_same(trained(model, criterion, data, loop(c), fisher="exact"), wanted, 1e-8)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("basis", BASES)
def test_with_nothing_set_but_the_fisher_the_cut_changes_nothing(basis, loop):
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(6)
    options = {"fisher": "exact", "basis": basis}
    wanted = trained(model, criterion, data, **options)
    assert_same(trained(model, criterion, data, LOOPS[loop], **options), wanted, 1e-7)


def test_the_same_seed_gives_the_same_steps_and_another_others():
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(3)
    one, same, other = (trained(model, criterion, data, seed=s)[-1] for s in (0, 0, 1))
    assert one.equal(same)
    assert not one.equal(other)


@pytest.mark.parametrize("order", ["before_forward", "before_backward", "after_step"])
def test_zero_grad_may_stand_anywhere_that_torch_allows(order):
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(4)
    wanted = trained(model, criterion, data, fisher="exact")
    model = copy.deepcopy(model)
    optimizer = KFAC(model, criterion, fisher="exact")
    for x, y in data:
        if order == "before_forward":
            optimizer.zero_grad()
        loss = criterion(model(x), y)
        if order == "before_backward":
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if order == "after_step":
            optimizer.zero_grad()
    torch.testing.assert_close(vector(model), wanted[-1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_a_batch_whose_gradient_was_thrown_away_does_not_count(fisher):
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(2)
    (wanted,) = trained(model, criterion, data[:1], fisher=fisher)
    optimizer = KFAC(model, criterion, fisher=fisher)
    whole(model, criterion, *data[1])
    optimizer.zero_grad()  # a loop that leaves out batches, by the size of their gradient
    whole(model, criterion, *data[0])
    optimizer.step()
    torch.testing.assert_close(vector(model), wanted, rtol=1e-10, atol=1e-12)


# Groups, schedules, weight decay.


def test_a_scheduler_with_a_numeric_lr():
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(1)
    options = {**PINNED, "fisher": "exact", **EVERY_STEP, "momentum": 0.0}
    optimizer = KFAC(copy.deepcopy(model), criterion, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    optimizer.close()
    (full,) = trained(model, criterion, data, **options)

    def scheduled(factor: float) -> Tensor:
        inner = copy.deepcopy(model)
        optimizer = KFAC(inner, criterion, **options)
        optimizer.param_groups[0]["lr"] *= factor
        whole(inner, criterion, *data[0])
        optimizer.step()
        return vector(inner)

    step, start = full - vector(model), vector(model)
    torch.testing.assert_close(scheduled(0.1) - start, 0.1 * step, rtol=1e-9, atol=1e-13)
    assert scheduled(0.0).equal(start)


@pytest.mark.parametrize("factor", [0.5, 0.1, 0.0])
@pytest.mark.parametrize("trust_region", [None, "auto"])
def test_a_scheduler_multiplies_the_automatic_lr(factor, trust_region):
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(1)
    options = {"fisher": "exact", "trust_region": trust_region, "damping": 0.1}
    (full,) = trained(model, criterion, data, **options)
    inner = copy.deepcopy(model)
    optimizer = KFAC(inner, criterion, **options)
    assert optimizer.param_groups[0]["lr"] == 1.0
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: factor)
    whole(inner, criterion, *data[0])
    optimizer.step()
    scheduler.step()
    step = vector(inner) - vector(model)
    torch.testing.assert_close(step, factor * (full - vector(model)), rtol=1e-8, atol=1e-12)


def test_each_group_has_its_own_lr_and_weight_decay():
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(1)
    options = {**PINNED, "fisher": "exact", **EVERY_STEP}
    (plain,) = trained(model, criterion, data, **options)
    inner = copy.deepcopy(model)
    groups = [
        {"params": list(inner[0].parameters()), "lr": 0.25, "weight_decay": 0.0},
        {"params": list(inner[2].parameters()), "weight_decay": 0.2},
    ]
    optimizer = KFAC(groups, criterion, model=inner, **options)
    whole(inner, criterion, *data[0])
    optimizer.step()
    start, first = vector(model), 20  # numbers in the first layer
    found, step = vector(inner), plain - vector(model)
    torch.testing.assert_close(found[:first], start[:first] + 0.5 * step[:first])
    decayed = (1 - 0.5 * 0.2) * start[first:]
    torch.testing.assert_close(found[first:], decayed + step[first:])


@pytest.mark.parametrize("form", ["parameters", "groups", "named", "generator_groups", "tuple"])
def test_parameters_in_every_form_that_torch_takes(form):
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(1)
    options = {**PINNED, "fisher": "exact"}
    (wanted,) = trained(model, criterion, data, **options)
    inner = copy.deepcopy(model)
    given = {
        "parameters": lambda: inner.parameters(),
        "groups": lambda: [{"params": list(inner.parameters())}],
        "named": lambda: inner.named_parameters(),
        "generator_groups": lambda: [
            {"params": inner[0].parameters()}, {"params": inner[2].parameters()}
        ],
        "tuple": lambda: tuple(inner.parameters()),
    }[form]()  # fmt: skip
    optimizer = KFAC(given, criterion, model=inner, **options)
    assert optimizer.coverage().covered == 1.0
    whole(inner, criterion, *data[0])
    optimizer.step()
    torch.testing.assert_close(vector(inner), wanted)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_frozen_parameter_in_the_list_is_left_alone(which):
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(3)
    frozen = getattr(model[0], which)
    frozen.requires_grad_(False)
    before = frozen.clone()
    optimizer = KFAC(list(model.parameters()), criterion, model=model, **PINNED)
    for x, y in data:
        optimizer.zero_grad()
        whole(model, criterion, x, y)
        optimizer.step()
    assert frozen.equal(before)


def test_a_group_added_later_is_trained_or_refused():
    model, criterion = net(3, 5, 4), nn.CrossEntropyLoss()
    extra = nn.Parameter(torch.zeros(4))
    optimizer = KFAC(model, criterion, **PINNED)
    refused = None
    try:
        optimizer.add_param_group({"params": [extra]})
    except KronewtonError as error:
        refused = str(error)
    if refused is not None:
        assert "add_param_group" in refused
        return
    x, y = batches(1)[0]
    criterion(model(x) + extra, y).backward()
    optimizer.step()
    assert not extra.equal(torch.zeros(4)), "a parameter was taken and silently not trained"


def test_weight_decay_is_decoupled_and_counts_an_automatic_lr_as_adamws():
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(1)
    start = vector(model)
    for options, unit in ((PINNED, 0.5), ({"damping": 0.1, "trust_region": None}, 1e-3)):
        plain, decayed = (
            trained(model, criterion, data, fisher="exact", weight_decay=w, **options)[0]
            for w in (0.0, 0.1)
        )
        torch.testing.assert_close(decayed - plain, -unit * 0.1 * start, rtol=1e-8, atol=1e-12)


# The loop around it.


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    model, criterion, (batch,) = net(3, 5, 4), nn.CrossEntropyLoss(), batches(1)
    (wanted,) = trained(model, criterion, [batch], fisher="exact")
    optimizer = KFAC(model, criterion, fisher="exact")
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(batch[0]), batch[1])
        loss.backward()
        losses.append(loss)
        return loss

    assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    torch.testing.assert_close(vector(model), wanted)


def test_a_step_without_gradients_does_nothing():
    model, criterion = nn.Sequential(net(3, 5, 4), nn.LayerNorm(4)), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, weight_decay=0.1)
    before = vector(model)
    assert optimizer.step() is None
    assert vector(model).equal(before)
    assert int(optimizer.diagnostics()["step"]) == 0
    for x, y in batches(2):
        optimizer.zero_grad()
        whole(model, criterion, x, y)
        optimizer.step()
    before = vector(model)
    optimizer.zero_grad()
    optimizer.step()
    assert vector(model).equal(before)


def test_a_layer_that_is_used_later_starts_then():
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.deep = nn.Linear(3, 4), nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(x.tanh()) if self.deep else x

    model, criterion = Growing(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, fisher="exact")
    before = model.second.weight.clone()
    for step, (x, y) in enumerate(batches(6)):
        model.deep = step >= 3
        optimizer.zero_grad()
        whole(model, criterion, x, y)
        optimizer.step()
        if not model.deep:
            assert model.second.weight.equal(before)
    assert not model.second.weight.equal(before)
    assert torch.isfinite(vector(model)).all()


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("options", [PINNED, {}])
def test_observe_equals_a_watched_criterion(fisher, options):
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(3)
    wanted = trained(model, criterion, data, fisher=fisher, **options)
    inner = copy.deepcopy(model)
    optimizer = KFAC(inner, nn.CrossEntropyLoss(), fisher=fisher, **options)
    for (x, y), weights in zip(data, wanted, strict=True):
        optimizer.zero_grad()
        output = inner(x)
        optimizer.observe(output, y, criterion)
        nn.functional.cross_entropy(output, y).backward()
        optimizer.step()
        assert float((vector(inner) - weights).norm() / weights.norm()) <= 1e-9


class OwnLoss(nn.Module):
    """As Hugging Face's models: the loss is computed inside, from all but the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(3, 5, 4)

    def forward(self, x, y):
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 4), y[:, 1:].reshape(-1))
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("options", [PINNED, {}])
def test_observe_equals_a_watched_criterion_where_the_model_computes_the_loss(
    fisher, options, parts
):
    weights = []
    for inside in (False, True):
        torch.manual_seed(5)
        model, criterion = OwnLoss(), nn.CrossEntropyLoss()
        optimizer = KFAC(model, criterion, fisher=fisher, **options)
        for _ in range(3):
            x, y = torch.randn(6, 4, 3), torch.randint(0, 4, (6, 4))
            optimizer.zero_grad()
            for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
                told = model(x_part, y_part)
                output, target = told["logits"][:, :-1].flatten(0, 1), y_part[:, 1:].flatten()
                if inside:
                    optimizer.observe(output, target, criterion)
                loss = told["loss"] if inside else criterion(output, target)
                (loss / parts).backward()
            optimizer.step()
        weights.append(vector(model))
        assert options or math.isfinite(float(optimizer.diagnostics()["predicted"]))
    assert float((weights[1] - weights[0]).norm() / weights[0].norm()) <= 1e-9


def test_observe_without_a_criterion_is_empirical():
    model, criterion, data = net(3, 5, 4), nn.CrossEntropyLoss(), batches(3)
    wanted = trained(model, criterion, data, fisher="empirical")
    optimizer = KFAC(model)
    for x, y in data:
        optimizer.zero_grad()
        output = model(x)
        optimizer.observe(output, y, criterion)
        nn.functional.cross_entropy(output, y).backward()
        optimizer.step()
    assert float((vector(model) - wanted[-1]).norm() / wanted[-1].norm()) <= 1e-9


@pytest.mark.parametrize("options", [{}, PINNED])
@pytest.mark.parametrize("basis", BASES)
def test_a_small_net_is_trained_without_a_criterion(basis, options):
    model = net(2, 16, 2)
    x = torch.randn(64, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = KFAC(model, basis=basis, **options)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert float((model(x).argmax(1) == y).double().mean()) > 0.95


# Parameters that no kind covers.


def mixed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4))


class Scaled(nn.Module):
    """A parameter of its own, of which training gradients tell nothing example by example."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 4), nn.Parameter(torch.ones(4))
        self.linear.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def test_uncovered_parameters_are_trained_as_by_adamw():
    model, criterion, data = Scaled(), nn.CrossEntropyLoss(), batches(4)
    plain = copy.deepcopy(model)
    options = {"fallback_lr": 0.02, "weight_decay": 0.1, "fisher": "empirical"}
    found = trained(model, criterion, data, **options)
    adamw = torch.optim.AdamW([plain.scale], lr=0.02, weight_decay=0.1)
    for x, y in data:
        adamw.zero_grad()
        whole(plain, criterion, x, y)
        adamw.step()
    torch.testing.assert_close(found[-1], vector(plain))


def test_coverage_has_one_row_for_each_parameter_and_says_why():
    model = mixed()
    optimizer = KFAC(model, nn.CrossEntropyLoss(), basis="eigen")
    coverage = optimizer.coverage()
    rows = {row.parameter: row for row in coverage.rows}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert rows["0.weight"].method == "K-FAC eigen"
    assert rows["0.weight"].kind == "linear"
    assert (rows["1.weight"].kind, rows["1.weight"].sharing) == ("norm", "summed")
    assert coverage.covered == 1
    assert [row.numel for row in coverage.rows] == [p.numel() for p in model.parameters()]
    text, html = str(coverage), coverage._repr_html_()
    for name in rows:
        assert name in text
        assert name in html
    assert "Fisher: sampled" in text


def test_coverage_counts_the_memory_that_is_kept():
    model, criterion = net(3, 5), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, basis="factored")
    assert optimizer.coverage().rows[0].memory == 0
    whole(model, criterion, *batches(1)[0])
    optimizer.step()
    # A and B, their counts, the number of their rows and their inverses, in float64.
    assert optimizer.coverage().rows[0].memory == 8 * (2 * (16 + 25) + 3)


def test_parameters_without_a_model_are_trained_by_the_fallback():
    w = nn.Parameter(torch.ones(3))
    optimizer = KFAC([w], fallback_lr=0.1)
    (row,) = optimizer.coverage().rows
    assert row.why == "no model was given"
    (w * torch.arange(3.0)).sum().backward()
    optimizer.step()
    assert w.tolist() == pytest.approx([1.0, 0.9, 0.9])


def test_strict_refuses_the_fallback_and_names_the_parameters():
    with pytest.raises(ModelError) as caught:
        KFAC(Scaled(), nn.CrossEntropyLoss(), strict=True, fisher="empirical")
    assert "scale (Scaled has no kind, and training gradients come summed" in str(caught.value)
    KFAC(mixed(), nn.CrossEntropyLoss(), strict=True).close()
    KFAC(net(3, 5, 4), nn.CrossEntropyLoss(), strict=True).close()


def test_diagnostics_are_scalars():
    model, criterion = net(3, 5, 4), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, basis="factored")
    fresh = optimizer.diagnostics()
    whole(model, criterion, *batches(1)[0])
    optimizer.step()
    told = optimizer.diagnostics()
    assert fresh.keys() == told.keys()
    assert all(t.shape == () and t.dtype == torch.float64 for t in told.values())
    assert float(told["step"]) == 1
    assert math.isfinite(float(told["damping"]))
    assert float(told["predicted"]) < 0


# What is not finite.


def poisoned(options: dict, fisher: str, at: int, what: str) -> tuple[list[Tensor], KFAC, list]:
    model, criterion = mixed(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, fisher=fisher, weight_decay=0.1, **options)
    seen = [vector(model)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step, (x, y) in enumerate(batches(at + 4)):
            if step in (at, at + 1):
                x[0, 0] = {"nan": math.nan, "inf": math.inf}[what]
            optimizer.zero_grad()
            whole(model, criterion, x, y)
            optimizer.step()
            seen.append(vector(model))
    return seen, optimizer, [w for w in said if issubclass(w.category, KronewtonWarning)]


@pytest.mark.parametrize("what", ["nan", "inf"])
@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("settings", ["automatic", "pinned"])
def test_a_bad_batch_leaves_every_weight_bit_for_bit(settings, fisher, at, what):
    options = {"automatic": {}, "pinned": PINNED}[settings]
    seen, optimizer, said = poisoned(options, fisher, at, what)
    assert seen[at + 1].equal(seen[at])
    assert seen[at + 2].equal(seen[at])
    first = slice(0, 15)  # the weight of a covered layer
    assert not seen[at + 3][first].equal(seen[at][first]), "training does not go on"
    assert torch.isfinite(seen[-1]).all()
    assert len(said) == 1
    assert "a step was skipped" in str(said[0].message)
    assert float(optimizer.diagnostics()["skipped"]) == 2


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("at", [1, 2, 4])
def test_training_goes_on_after_a_bad_batch_in_every_basis(basis, at):
    seen, optimizer, _ = poisoned({"basis": basis, **EVERY_STEP}, "exact", at, "nan")
    first = slice(0, 15)  # the weight of a covered layer
    assert not seen[at + 3][first].equal(seen[at + 2][first])
    assert not seen[at + 4][first].equal(seen[at + 3][first])
    assert torch.isfinite(seen[-1]).all()
    assert float(optimizer.diagnostics()["dropped_statistics"]) > 0


def test_a_bad_first_batch_does_not_settle_the_damping():
    model, criterion, ((x, y),) = net(3, 5, 4), nn.CrossEntropyLoss(), batches(1)
    optimizer = KFAC(model, criterion, fisher="exact", basis="factored")
    whole(model, criterion, x * math.nan, y)
    with pytest.warns(KronewtonWarning, match="skipped"):
        optimizer.step()
    optimizer.zero_grad()
    whole(model, criterion, x, y)
    optimizer.step()
    told = optimizer.diagnostics()
    # At least the smallest of the first trials, and one probe below it.
    least = 0.1 * min(FIRST_TRIALS) * float(told["scale"])
    assert float(told["inverse_damping"]) > 0.99 * least
    assert float(told["damping"]) > 0.99 * least


@pytest.mark.parametrize("fisher", ["exact", "sampled"])
@pytest.mark.parametrize("basis", BASES)
def test_a_batch_without_curvature_is_no_accident(basis, fisher):
    # The softmax is so sure of itself that it has no curvature left, and its mistakes a gradient.
    model, criterion = nn.Sequential(nn.Linear(3, 2)), nn.CrossEntropyLoss()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([2000.0, -2000.0]))
    optimizer, before = KFAC(model, criterion, fisher=fisher, basis=basis), vector(model)
    (x, y) = batches(1, classes=2)[0]
    whole(model, criterion, x, y)
    with pytest.warns(KronewtonWarning, match="no finite curvature so far"):
        optimizer.step()
    assert vector(model).equal(before)


def test_constant_inputs_of_zero_leave_the_weights_finite():
    model, criterion = net(3, 5, 4, act=nn.ReLU), nn.CrossEntropyLoss()
    with torch.no_grad():
        model[0].bias.fill_(-1)  # every unit is dead
    optimizer = KFAC(model, criterion, fisher="exact")
    for _ in range(3):
        optimizer.zero_grad()
        whole(model, criterion, torch.zeros(6, 3), torch.randint(0, 4, (6,)))
        optimizer.step()
    assert torch.isfinite(vector(model)).all()


# Precision.


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("options", [{}, PINNED])
def test_bf16_parameters_are_trained_with_float32_factors(basis, options):
    model, criterion = net(3, 5, 4).bfloat16(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, basis=basis, **options)
    before = vector(model)
    for x, y in batches(3):
        optimizer.zero_grad()
        whole(model, criterion, x.bfloat16(), y)
        optimizer.step()
    assert vector(model).dtype == torch.bfloat16
    assert not vector(model).equal(before)
    assert torch.isfinite(vector(model)).all()
    for name in ("0", "2"):
        kept = optimizer._curvature.tensors(name)
        assert {t.dtype for t in kept.values()} == {torch.float32}


def test_a_clipped_gradient_is_the_one_that_is_used():
    model, criterion, (batch,) = net(3, 5, 4), nn.CrossEntropyLoss(), batches(1)
    options = {**PINNED, "fisher": "exact"}
    (plain,) = trained(model, criterion, [batch], **options)
    start = vector(model)
    optimizer = KFAC(model, criterion, **options)
    whole(model, criterion, *batch)
    for p in model.parameters():
        p.grad.mul_(0.1)
    optimizer.step()
    torch.testing.assert_close(vector(model) - start, 0.1 * (plain - start), rtol=1e-9, atol=1e-13)


def test_a_model_in_which_a_module_is_called_twice_takes_the_summed_step():
    cell, criterion = nn.Linear(3, 3), nn.MSELoss()
    model = nn.Sequential(cell, cell)
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    W, h = cell.weight.detach().clone(), cell(x).detach()
    rows = torch.cat([torch.cat([r, torch.ones(5, 1)], 1) for r in (x, h)])
    A, B = rows.T @ rows / 10, 2 / 3 * (torch.eye(3) + W.T @ W)
    before = vector(model)
    optimizer = KFAC(model, criterion, damping=0.03, basis="eigen", sharing="expand", **FIRST)
    whole(model, criterion, x, y)
    G = torch.cat([cell.weight.grad, cell.bias.grad[:, None]], 1)
    optimizer.step()
    step = vector(model) - before
    found = torch.cat([step[:9].reshape(3, 3), step[9:, None]], 1)
    torch.testing.assert_close(found, -damped_solve(torch.kron(B, A), G, 0.03), rtol=1e-8, atol=0)


def test_inverses_are_renewed_on_their_schedule(monkeypatch):
    model, criterion = net(3, 5, 4), nn.CrossEntropyLoss()
    options = {**PINNED, "factor_every": 3, "inverse_every": 4, "basis": "eigen"}
    optimizer = KFAC(model, criterion, **options)
    renewed, captured = [], []
    real = optimizer._curvature._refresh_layer
    monkeypatch.setattr(
        optimizer._curvature, "_refresh_layer",
        lambda name, *args: renewed.append((step, name)) or real(name, *args),
    )  # fmt: skip
    for step, (x, y) in enumerate(batches(13)):  # noqa: B007, the recorder reads it
        captured.append(optimizer._watcher.capturing)
        optimizer.zero_grad()
        whole(model, criterion, x, y)
        optimizer.step()
    assert [s for s, due in enumerate(captured) if due] == [0, 1, 2, 3, 6, 9, 12]
    start = [(s, n) for s, n in itertools.product((0, 1, 2), ("0", "2"))]
    assert renewed == [*start, (4, "0"), (6, "2"), (8, "0"), (10, "2"), (12, "0")]


def test_a_user_who_never_calls_the_criterion_is_told_before_anything_moves():
    model, criterion = net(3, 5, 4), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion)
    before = vector(model)
    x, y = batches(1)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(CriterionError, match=r"optimizer.observe\(output, target, criterion\)"):
        optimizer.step()
    assert vector(model).equal(before)


class Uncalled(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.uncalled = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.called(x))
        return nn.functional.linear(h, self.uncalled.weight, self.uncalled.bias)


class Hidden(Uncalled):
    """Adds the bias by itself, where nobody sees that it is one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.called(x)) @ self.uncalled.weight.T + self.uncalled.bias


def test_a_layer_that_is_not_called_has_the_rows_of_the_function_that_uses_it():
    model, criterion, ((x, y),) = Uncalled(), nn.CrossEntropyLoss(), batches(1)
    optimizer = KFAC(model, criterion, fisher="exact", basis="factored")
    before = model.uncalled.weight.clone()
    whole(model, criterion, x, y)
    optimizer.step()
    assert not model.uncalled.weight.equal(before)
    rows = {row.parameter: row for row in optimizer.coverage().rows}
    assert rows["uncalled.weight"].method == "K-FAC factored"
    assert rows["uncalled.weight"].memory > 0


def test_rows_that_do_not_give_the_gradient_are_named_and_not_used():
    model, criterion, ((x, y),) = Hidden(), nn.CrossEntropyLoss(), batches(1)
    optimizer, before = KFAC(model, criterion, fisher="exact"), model.uncalled.bias.clone()
    whole(model, criterion, x, y)
    with pytest.warns(KronewtonWarning, match="rows that layer 'uncalled' showed do not give its"):
        optimizer.step()
    assert not model.uncalled.bias.equal(before)
    rows = {row.parameter: row for row in optimizer.coverage().rows}
    assert rows["uncalled.weight"].method == rows["uncalled.bias"].method == "diagonal"
    assert "cannot be watched" in rows["uncalled.weight"].why
