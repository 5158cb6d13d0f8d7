"""Normalised steps: Adam's moments in the eigenbasis, singular values, pace, and when."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import kronewton as kn
from kronewton.adapt import Fixed, LevenbergMarquardt, Pace, Pacing, Settings
from kronewton.batches import Trial, loss_of
from kronewton.errors import KronewtonWarning, NotPositiveDefinite, OptionError, StateError
from kronewton.inverse import FLAT, METRIC, EigenInverse, eigen_basis
from kronewton.normalised import (
    FIRST_DECAY,
    SECOND_DECAY,
    Moments,
    flattenable,
    in_curvature,
    normalised,
    orthogonalised,
)
from kronewton.pair import Product, of_both
from kronewton.planner import TRIALS
from kronewton.quadratic import flattened
from kronewton.structure import DENSE, DIAGONAL, Blocks, Sides

pytestmark = pytest.mark.usefixtures("float64")

PACING = Pacing()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second_moment(d: int, seed: int) -> Tensor:
    rows = drawn(3 * d, d, seed=seed)
    return rows.T @ rows / (3 * d)


def stepped(moments: Moments, gradient: Tensor, decay: float) -> Tensor:
    return normalised([moments], [gradient], decay)[0]


# The moments.


def test_without_a_curvature_it_is_adam_of_torch():
    parameter = nn.Parameter(torch.zeros(3, 4))
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(FIRST_DECAY, SECOND_DECAY), eps=0.0)
    moments, at = Moments(torch.zeros(3, 4)), torch.zeros(3, 4)
    for k in range(6):
        parameter.grad = drawn(3, 4, seed=k)
        adam.step()
        at += stepped(moments, drawn(3, 4, seed=k), FIRST_DECAY)
    # To the floor under the root, 1e-5 of the layer's root mean square.
    torch.testing.assert_close(at, parameter.detach(), rtol=1e-3, atol=1e-4)


def test_the_mean_of_decays_that_differ_has_no_bias_of_its_start():
    moments, decays = Moments(torch.zeros(3, 4)), (0.8, 0.9, 0.85, 0.8)
    for k, decay in enumerate(decays):
        found = stepped(moments, drawn(3, 4, seed=k), decay)
    shares = [(1 - d) * math.prod(decays[k + 1 :]) for k, d in enumerate(decays)]
    mean = sum(w * drawn(3, 4, seed=k) for k, w in enumerate(shares)) / sum(shares)
    powers = [SECOND_DECAY ** (3 - k) for k in range(4)]
    square = sum(w * drawn(3, 4, seed=k).square() for k, w in enumerate(powers)) / sum(powers)
    torch.testing.assert_close(found, -mean / square.sqrt(), rtol=1e-3, atol=1e-4)


def test_ahead_is_the_mean_as_if_the_gradient_came_once_more():
    moments, decays = Moments(torch.zeros(3, 4)), (0.8, 0.9, 0.85)
    for k, decay in enumerate(decays):
        found = normalised([moments], [drawn(3, 4, seed=k)], decay, ahead=True)[0]
    ahead, left = 0.85 * moments.m + 0.15 * drawn(3, 4, seed=2), math.prod(decays) * 0.85
    square = moments.v / (1 - SECOND_DECAY**3)
    torch.testing.assert_close(found, -ahead / (1 - left) / square.sqrt(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("momentum", "wanted"), [("auto", FIRST_DECAY), (0.7, 0.7)])
def test_momentum_is_the_decay_of_the_mean_gradient(momentum, wanted):
    optimizer, *_ = training(3, noisy, basis="adam", momentum=momentum)
    planner, asked = optimizer._planner, []
    normalise = planner.steering.normalised
    planner.steering = replace(
        planner.steering, normalised=lambda decay: asked.append(decay) or normalise(decay)
    )
    planner._normalised([], flattened(optimizer._gradients()), None)
    assert asked == [wanted]


# Singular values.


def polar(M: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(M, full_matrices=False)
    return U @ V


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (16, 16), (2, 8, 12), (2, 3, 12, 8)])
def test_singular_values_are_made_alike_and_the_length_is_kept(shape):
    M = drawn(*shape)
    M = M + 5 * M.mean((-2, -1), keepdim=True).sign()  # most of it in one direction
    (found,) = orthogonalised([M])
    assert found.shape == M.shape
    torch.testing.assert_close(found.norm(dim=(-2, -1)), M.norm(dim=(-2, -1)))
    before, after = torch.linalg.svdvals(M), torch.linalg.svdvals(found)
    after = after / after.square().mean(-1, keepdim=True).sqrt()
    assert float((before[..., 0] / before[..., -1]).max()) > 8
    # As near as three rounds come; what was below a thirtieth stays small.
    some = before > 0.04 * before.norm(dim=-1, keepdim=True)
    assert float(after.max()) < 1.7
    assert float(after[some].min()) > 0.5


def test_a_matrix_that_is_orthogonal_stays_what_it_is():
    M = 3e-4 * polar(drawn(8, 12))
    torch.testing.assert_close(orthogonalised([M])[0], M)


@pytest.mark.parametrize("shape", [(8, 15), (8, 16), (8, 40)])
def test_products_of_the_shorter_side_alone_give_the_same(shape, monkeypatch):
    M, found = drawn(*shape), []
    for wide in (1, 100):
        monkeypatch.setattr("kronewton.normalised.WIDE", wide)
        found += orthogonalised([M])
    torch.testing.assert_close(*found)


def test_few_matrices_at_a_time_are_as_all_together(monkeypatch):
    some = [drawn(9, 12, seed=k) for k in range(5)]
    some[1][0, 0] = math.nan  # and leaves the others alone
    together = orthogonalised(some)
    monkeypatch.setattr("kronewton.normalised.TOGETHER", 2 * 9 * 12)
    for k, (one, found) in enumerate(zip(together, orthogonalised(some), strict=True)):
        torch.testing.assert_close(one, found, equal_nan=True)
        assert bool(torch.isfinite(one).all()) == (k != 1)


def test_with_more_rounds_it_is_the_polar_factor_in_direction(monkeypatch):
    monkeypatch.setattr("kronewton.normalised.ROUNDS", 6)
    M = drawn(8, 20)
    found, exact = orthogonalised([M])[0], polar(M)
    cosine = float((found * exact).sum() / found.norm() / exact.norm())
    assert cosine > 0.97  # values go around one between 0.7 and 1.2


@pytest.fixture
def in_half(monkeypatch):
    """Products of any size whose result may be rough are made in bfloat16."""
    monkeypatch.setattr("kronewton.linalg.HALF", 0)
    monkeypatch.setattr("kronewton.linalg.multiplies_in_half", lambda: True)


@pytest.mark.parametrize("shape", [(16, 20), (16, 40), (40, 16), (2, 16, 24)])
def test_rounds_in_half_precision_are_those_in_full_to_its_rounding(shape, in_half):
    """As the exact ones of float64, of which none are in half precision."""
    M = drawn(*shape)
    exact, (found,) = orthogonalised([M])[0], orthogonalised([M.float()])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=(-2, -1)), M.float().norm(dim=(-2, -1)))
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 0.02


def test_a_basis_is_left_roughly_where_that_is_asked_for_alone(in_half):
    A, B, G = drawn(24, 24).float(), drawn(18, 18).float(), drawn(18, 24).float()
    basis = eigen_basis(A @ A.T, B @ B.T, "layer")
    exact, rough = basis.rotate_back(G), basis.rotate_back(G, rough=True)
    torch.testing.assert_close(exact, basis.U_B @ G @ basis.U_A.T)
    assert 1e-4 < float((rough - exact).norm() / exact.norm()) < 5e-3
    wide = eigen_basis((A @ A.T).double(), (B @ B.T).double(), "layer")
    assert wide.rotate_back(G.double(), rough=True).equal(wide.rotate_back(G.double()))


@pytest.mark.parametrize("sides", [Sides(DENSE, DIAGONAL), Sides(DIAGONAL, DENSE),
                                   Sides(Blocks(8, 24), DENSE),
                                   Sides(Blocks(7, 24), Blocks(5, 18))])  # fmt: skip
def test_every_structure_is_left_roughly(sides, in_half):
    A, B, G = drawn(24, 24).float(), drawn(18, 18).float(), drawn(18, 24).float()
    A, B = sides.input.of_dense(A @ A.T), sides.output.of_dense(B @ B.T)
    basis = eigen_basis(A, B, "layer", sides)
    exact, rough = basis.rotate_back(G), basis.rotate_back(G, rough=True)
    assert rough.dtype == torch.float32
    assert 1e-4 < float((rough - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.parametrize("units", [False, True])
def test_rounds_that_take_half_the_time_are_for_layers_of_half_the_rows(units, monkeypatch):
    monkeypatch.setattr("kronewton.normalised.HALVED", 16)
    monkeypatch.setattr("kronewton.linalg.HALF", 0)
    monkeypatch.setattr("kronewton.linalg.multiplies_in_half", lambda: units)
    M = drawn(16, 16).float()
    for rows, wanted in ((18, True), (17, units), (9, units), (8, False)):
        assert flattenable(M, Sides(), rows) == wanted
    monkeypatch.setattr("kronewton.normalised.HALVED", 17)
    assert not flattenable(M, Sides(), 9)
    # Rounds are of parts, each of which may be too small where the whole would not be.
    tall = drawn(48, 32).float()
    assert flattenable(tall, Sides(), 16) == units
    assert not flattenable(tall, Sides(DENSE, Blocks(16, 48)), 16)


def test_steps_are_rotated_back_roughly_and_gradients_are_not_turned_so(monkeypatch):
    seen, real = [], EigenInverse.rotate_back
    monkeypatch.setattr(
        EigenInverse,
        "rotate_back",
        lambda self, G, rough=False: seen.append(rough) or real(self, G, rough),
    )
    training(3, noisy, basis="orthogonal")
    assert set(seen) == {True}
    seen.clear()
    training(3, noisy, basis="eigen")  # Newton's
    assert set(seen) == {False}


@pytest.mark.parametrize(
    ("products", "units", "basis", "rows", "said"),
    [
        (0, True, "adam", 4, True),
        (0, False, "orthogonal", 256, False),
        (50_000, True, "orthogonal", 256, True),  # of the rounds alone: rotating takes 34,848
        (50_000, True, "orthogonal", 4, False),  # too few for rounds
        (50_000, True, "adam", 256, False),
        (0, True, "eigen", 256, False),
    ],
)
def test_the_coverage_says_whose_steps_are_in_half_precision(
    monkeypatch, products, units, basis, rows, said
):
    monkeypatch.setattr("kronewton.linalg.HALF", products)
    monkeypatch.setattr("kronewton.linalg.multiplies_in_half", lambda: units)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)).float()
    optimizer = kn.KFAC(model, criterion := nn.CrossEntropyLoss(), basis=basis)
    assert "bfloat16" not in str(optimizer.coverage())  # before the first batch
    x = torch.randn(rows, 32).float() @ torch.randn(32, 32).float()  # or axes would be the basis
    criterion(model(x), torch.randint(3, (rows,))).backward()
    optimizer.step()
    first = optimizer.coverage().rows[:2]  # weight and bias
    assert ["steps in bfloat16" in row.method for row in first] == [said, said]


def test_a_training_in_half_precision_goes_the_same_way(monkeypatch):
    """Steps of one gradient differ by rounding, and no loss by much."""
    steps, losses = [], []
    monkeypatch.setattr("kronewton.linalg.HALF", 0)
    for units in (False, True):
        monkeypatch.setattr("kronewton.linalg.multiplies_in_half", lambda units=units: units)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 20)).float()
        criterion = nn.MSELoss()
        optimizer = kn.KFAC(model, criterion, basis="orthogonal")
        before = parameters_to_vector(model.parameters()).detach().clone()
        for step in range(30):
            x = torch.randn(256, 20, generator=torch.Generator().manual_seed(step)).float()
            optimizer.zero_grad()
            loss = criterion(model(x), x.roll(1, 1))
            loss.backward()
            optimizer.step()
            if step == 0:
                steps.append(parameters_to_vector(model.parameters()).detach() - before)
        losses.append(float(loss.detach()))
    assert 1e-5 < float((steps[0] - steps[1]).norm() / steps[0].norm()) < 0.02
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[0] < 0.5


def power(M: Tensor, exponent: float) -> Tensor:
    s, U = torch.linalg.eigh(M)
    return (U * s**exponent) @ U.T


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5])
def test_a_step_is_orthogonalised_in_a_power_of_its_curvature(exponent, monkeypatch):
    monkeypatch.setattr("kronewton.inverse.METRIC", exponent)
    monkeypatch.setattr("kronewton.inverse.FLAT", 0.0)
    monkeypatch.setattr("kronewton.normalised._in_rounds", polar)
    A, B, G = second_moment(20, 1), second_moment(16, 2), drawn(16, 20, seed=3)
    basis = eigen_basis(A, B, "layer")
    steps = in_curvature({"layer": basis.rotate(G)}, {"layer": basis}, {"layer": 1000})
    found = basis.rotate_back(steps["layer"])
    P, Q = power(B, -exponent), power(A, -exponent)
    wanted = P @ polar(P @ G @ Q) @ Q
    torch.testing.assert_close(found, wanted * G.norm() / wanted.norm())
    # Of all that are no longer in the norm it falls furthest along the gradient.
    size = float(torch.linalg.matrix_norm(torch.linalg.inv(P) @ wanted @ torch.linalg.inv(Q), 2))
    torch.testing.assert_close(size, 1.0)
    most = float(torch.linalg.svdvals(P @ G @ Q).sum())
    torch.testing.assert_close(float((wanted * G).sum()), most)


def test_a_side_without_curvature_is_orthogonalised_as_without_a_metric():
    X, A = drawn(16, 20), second_moment(20, 1)
    basis = replace(eigen_basis(A, torch.eye(16), "layer"), s=torch.zeros(16, 20))
    found = in_curvature({"layer": X}, {"layer": basis}, {"layer": 1000})["layer"]
    torch.testing.assert_close(found, orthogonalised([X])[0])


def test_directions_of_little_curvature_are_stepped_along_further():
    X, s = drawn(18, 18), torch.logspace(0, -3, 18)
    basis = replace(eigen_basis(torch.eye(18), torch.eye(18), "layer"), s=torch.outer(s, s))
    found = in_curvature({"layer": X}, {"layer": basis}, {"layer": 1000})["layer"]
    plain = orthogonalised([X])[0]
    gained = found.norm(dim=0) / plain.norm(dim=0)
    assert float(gained[-1]) > 1.5 * float(gained[0])
    torch.testing.assert_close(found.norm(), X.norm())


@pytest.mark.parametrize("rows", [0, 1000])
@pytest.mark.parametrize("groups", [2, 3])
def test_blocks_of_groups_are_as_each_group_alone(groups, rows):
    X, s = drawn(groups, 48, 40), drawn(groups, 48, 40, seed=1).square()
    sides, none = Sides(DENSE, Blocks(16, 48)), torch.zeros(0)
    found = in_curvature(
        {"layer": X}, {"layer": EigenInverse(none, none, s, sides)}, {"layer": rows}
    )
    for k in range(groups):
        alone = {"layer": EigenInverse(none, none, s[k], sides)}
        one = in_curvature({"layer": X[k]}, alone, {"layer": rows})["layer"]
        torch.testing.assert_close(found["layer"][k], one)


@pytest.mark.parametrize(
    ("shape", "sides", "on_input", "on_output"),
    [
        ((9, 12), Sides(), True, True),
        ((3, 9, 12), Sides(), True, True),
        ((9, 12), Sides(DIAGONAL, DENSE), False, True),
        ((9, 12), Sides(DENSE, DIAGONAL), False, False),
        ((9, 1), Sides(), False, False),
        ((1, 12), Sides(), False, False),
    ],
)
def test_without_rounds_coordinates_are_weighted_and_the_length_is_kept(
    shape, sides, on_input, on_output
):
    X, s = drawn(*shape), drawn(*shape, seed=1).square()
    basis = EigenInverse(torch.zeros(0), torch.zeros(0), s, sides)
    found = in_curvature({"layer": X}, {"layer": basis}, {"layer": 0})["layer"]

    def weights(sums: Tensor) -> Tensor:
        return (sums / sums.mean(-1, keepdim=True) + FLAT) ** -METRIC

    wanted = X
    if on_input:
        wanted = wanted * weights(s.sum(-2)).unsqueeze(-2)
    if on_output:
        wanted = wanted * weights(s.sum(-1)).unsqueeze(-1)
    lengths = [torch.linalg.matrix_norm(M, keepdim=True) for M in (X, wanted)]
    torch.testing.assert_close(found, wanted * lengths[0] / lengths[1])


def test_a_rotation_before_is_a_rotation_after():
    M, U, V = drawn(9, 14), polar(drawn(9, 9, seed=1)), polar(drawn(14, 14, seed=2))
    torch.testing.assert_close(orthogonalised([U @ M @ V])[0], U @ orthogonalised([M])[0] @ V)


def test_matrices_together_are_as_each_alone_in_any_order():
    some = [drawn(8, 12, seed=1), drawn(12, 8, seed=2), drawn(8, 12, seed=3), drawn(9, 9).float(),
            torch.zeros(8, 12), 1e-20 * drawn(8, 12, seed=4)]  # fmt: skip
    for one, found in zip(some, orthogonalised(some), strict=True):
        torch.testing.assert_close(found, orthogonalised([one])[0])
        assert bool(torch.isfinite(found).all())
    assert orthogonalised([]) == []


@pytest.mark.parametrize(
    ("shape", "sides", "wanted"),
    [
        ((16, 16), Sides(), True),
        ((15, 80), Sides(), False),
        ((80, 15), Sides(), False),
        ((60, 20), Sides(DENSE, Blocks(20, 60)), True),
        ((20, 60), Sides(DENSE, Blocks(10, 20)), False),
        ((20, 60), Sides(DENSE, DIAGONAL), False),
        ((20, 60), Sides(DIAGONAL, DENSE), False),
    ],
)
def test_what_has_a_basis_on_both_sides_is_orthogonalised(shape, sides, wanted):
    assert flattenable(drawn(*shape), sides, 1000) == wanted


@pytest.mark.parametrize(("shape", "rows"), [((16, 16), 18), ((48, 16), 10), ((16, 48), 10)])
def test_a_layer_is_orthogonalised_where_that_costs_no_more_than_it_may(shape, rows):
    """18 m³ operations and more of a square matrix, against 2.75 times 6 per weight and row."""
    assert flattenable(drawn(*shape), Sides(), rows)
    assert not flattenable(drawn(*shape), Sides(), rows - 1)


@pytest.mark.parametrize(("options", "flat"), [({}, True), ({"basis": "orthogonal"}, True),
                                               ({"basis": "adam"}, False)])  # fmt: skip
def test_the_default_and_orthogonal_flatten_a_layers_step_and_adam_does_not(options, flat):
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(15, 20), nn.Tanh(), nn.Linear(20, 9)), nn.MSELoss()
    optimizer = kn.KFAC(model, criterion, **options)
    mixing = drawn(15, 1).expand(15, 9)  # all outputs want the same
    for step in range(6):
        x = drawn(64, 15, seed=step)
        optimizer.zero_grad()
        criterion(model(x), (x @ mixing).tanh() + 0.1 * drawn(64, 9, seed=100 + step)).backward()
        before = model[0].weight.detach().clone()
        optimizer.step()
    assert bool(optimizer.diagnostics()["normalised"])
    squares = torch.linalg.svdvals(model[0].weight.detach() - before).square()
    alike = float(squares.sum() ** 2 / squares.square().sum() / len(squares))
    assert (alike > 0.6) == flat
    assert {row.method for row in optimizer.coverage().rows} == {
        f"K-FAC {options.get('basis', 'orthogonal')}"
    }


def test_a_state_of_a_release_whose_default_was_adam_goes_on_as_the_default_does():
    optimizer, _, model, criterion = training(6, noisy, basis="adam")
    state = optimizer.state_dict()
    optimizer.close()
    again = kn.KFAC(model, criterion)
    again.load_state_dict(state)
    assert again._curvature.basis == "orthogonal"
    assert set(again._curvature.moments) == {"0", "2"}
    for basis in ("orthogonal", "eigen"):
        with pytest.raises(StateError, match="saved with basis='adam'"):
            kn.KFAC(model, criterion, basis=basis).load_state_dict(state)


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_a_loss_in_another_unit_gives_the_same_steps(scale):
    one, other = Moments(torch.zeros(3, 4)), Moments(torch.zeros(3, 4))
    for k in range(4):
        g = drawn(3, 4, seed=k)
        torch.testing.assert_close(
            stepped(one, g, 0.8), stepped(other, scale * g, 0.8), rtol=1e-6, atol=0
        )


def test_layers_together_step_as_each_alone():
    gradients = [drawn(3, 4), drawn(1, 2, 2).float(), 1e5 * drawn(5, 1)]
    together, alone = ([Moments(g) for g in gradients] for _ in range(2))
    alone[1].steps = together[1].steps = 7  # seen later than the others
    for _ in range(3):
        found = normalised(together, gradients, 0.8)
        for one, g, moments in zip(found, gradients, alone, strict=True):
            torch.testing.assert_close(one, stepped(moments, g, 0.8), rtol=0, atol=0)
    assert normalised([], [], 0.8) == []


def test_nothing_is_nothing():
    moments = Moments(torch.zeros(2, 2))
    for _ in range(2):
        assert stepped(moments, torch.zeros(2, 2), 0.8).equal(torch.zeros(2, 2))


def test_a_new_basis_leaves_the_mean_gradient_where_it_was():
    old = eigen_basis(second_moment(4, 1), second_moment(3, 2), "layer")
    new = eigen_basis(second_moment(4, 3), second_moment(3, 4), "layer")
    moments, G = Moments(torch.zeros(3, 4)), drawn(3, 4)
    stepped(moments, old.rotate(G), 0.8)
    moments.turn_(old, new)
    torch.testing.assert_close(new.rotate_back(moments.m), 0.2 * G)


@pytest.mark.parametrize("sides", [Sides(), Sides(Blocks(2, 4), DENSE), Sides(DENSE, DIAGONAL)])
def test_a_new_basis_carries_mean_squares_as_if_coordinates_were_uncorrelated(sides):
    def basis(seed: int):
        A, B = second_moment(4, seed), second_moment(3, seed + 1)
        return eigen_basis(sides.input.of_dense(A), sides.output.of_dense(B), "layer", sides)

    old, new = basis(1), basis(3)
    moments = Moments(torch.zeros(3, 4))
    moments.v = drawn(3, 4).square()
    before = moments.v
    moments.turn_(old, new)
    # Of every coordinate's own square, through the model's axes.
    units = torch.eye(12).reshape(12, 3, 4)
    turned = new.rotate(old.rotate_back(units)).reshape(12, 12)
    torch.testing.assert_close(moments.v.reshape(-1), before.reshape(-1) @ turned.square())


def test_a_side_may_go_from_its_own_axes_to_a_basis_and_back():
    on_axes, dense = Sides(DIAGONAL, DENSE), Sides()
    A, B = second_moment(4, 1), second_moment(3, 2)
    own = eigen_basis(A.diagonal().clone(), B, "layer", on_axes)
    full = eigen_basis(A, B, "layer", dense)
    for old, new in ((own, full), (full, own)):
        moments = Moments(torch.zeros(3, 4))
        moments.v = drawn(3, 4).square()
        U = full.U_A if new is full else full.U_A.T
        expected = moments.v @ U.square()
        moments.turn_(old, new)
        torch.testing.assert_close(moments.v, expected)


@pytest.mark.parametrize(
    "kinds", list(itertools.permutations((DENSE, DIAGONAL, Blocks(2, 4), Blocks(3, 4)), 2))
)
def test_a_side_may_be_kept_in_another_way_than_before(kinds):
    A, B = second_moment(4, 1), second_moment(3, 2)
    old, new = (eigen_basis(k.of_dense(A), B, "layer", Sides(k, DENSE)) for k in kinds)
    moments, m, v = Moments(torch.zeros(3, 4)), drawn(3, 4), drawn(3, 4, seed=1).square()
    moments.m, moments.v = m, v
    moments.turn_(old, new)
    torch.testing.assert_close(new.rotate_back(moments.m), old.rotate_back(m))
    units = torch.eye(12).reshape(12, 3, 4)
    turned = new.rotate(old.rotate_back(units)).reshape(12, 12)
    torch.testing.assert_close(moments.v.reshape(-1), v.reshape(-1) @ turned.square())


class Attention(nn.Module):
    """One head of 32 numbers, whose query, key and value are made by one matrix or by three."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.out, whole = nn.Linear(32, 3), nn.Linear(32, 96)
        self.maps = nn.ModuleList([whole] if fused else [nn.Linear(32, 32) for _ in range(3)])
        for k, one in enumerate(self.maps if not fused else ()):
            one.weight.data = whole.weight.data[32 * k : 32 * (k + 1)].clone()
            one.bias.data = whole.bias.data[32 * k : 32 * (k + 1)].clone()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.cat([one(x) for one in self.maps], -1).chunk(3, -1)
        return self.out(((q @ k.mT / 32**0.5).softmax(-1) @ v).mean(1))


def of_attention(fused: bool, basis: str) -> tuple[Attention, nn.Module, kn.KFAC]:
    torch.manual_seed(0)
    model, criterion = Attention(fused), nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, criterion, basis=basis, lr=0.01, sharing="expand")
    return model, criterion, optimizer


def train_attention(
    model: Attention, criterion: nn.Module, optimizer: kn.KFAC, steps: range
) -> None:
    for step in steps:
        x = drawn(64, 5, 32, seed=step) @ drawn(32, 32, seed=-1)
        y = x.sum(1)[:, :3].argmax(1)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("basis", ["adam", "orthogonal"])
def test_a_query_a_key_and_a_value_of_one_matrix_are_stepped_as_if_they_were_three(basis):
    found = {}
    for fused in (True, False):
        model, criterion, optimizer = of_attention(fused, basis)
        before = [one.weight.detach().clone() for one in model.maps]
        train_attention(model, criterion, optimizer, range(1))
        found[fused] = torch.cat(
            [one.weight.detach() - b for one, b in zip(model.maps, before, strict=True)]
        )
        if fused:
            inverse = optimizer._curvature.inverses["maps.0"]
            assert inverse.sides == Sides(DENSE, Blocks(32, 96))
    # To the floor under the root, which goes by the matrix's root mean square.
    torch.testing.assert_close(found[True], found[False], rtol=1e-2, atol=4e-4)


@pytest.mark.parametrize("basis", ["adam", "orthogonal"])
def test_a_training_with_a_basis_of_parts_goes_on_from_its_state(basis):
    model, criterion, optimizer = of_attention(True, basis)
    train_attention(model, criterion, optimizer, range(5))
    other, same, again = of_attention(True, basis)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    assert again._curvature.inverses["maps.0"].sides == Sides(DENSE, Blocks(32, 96))
    train_attention(model, criterion, optimizer, range(5, 12))
    train_attention(other, same, again, range(5, 12))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.equal(q)


@pytest.mark.parametrize("cast", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_may_be_cast_in_mid_training(cast):
    torch.manual_seed(0)
    model, criterion = nn.Linear(80, 3).float(), nn.MSELoss()
    optimizer = kn.KFAC(model, criterion, basis="adam")
    x, y = drawn(32, 80), drawn(32, 3, seed=1)
    for step in range(30):
        if step == 12:
            model.to(cast)
        dtype = model.weight.dtype
        optimizer.zero_grad()
        criterion(model(x.to(dtype)), y.to(dtype)).backward()
        optimizer.step()
    assert model.weight.dtype == cast
    assert float(optimizer.diagnostics()["skipped"]) == 0
    assert float(criterion(model(x.to(cast)), y.to(cast)).detach()) < 0.5


# One basis for two products.


@pytest.mark.parametrize("sides", [Sides(), Sides(DENSE, DIAGONAL)])
def test_the_common_basis_of_a_product_and_itself_is_its_own(sides):
    A, B = second_moment(4, 1), sides.output.of_dense(second_moment(3, 2))
    one = Product(B, A, sides)
    both = of_both(one, one)
    own = eigen_basis(A, B, "layer", sides)
    found = eigen_basis(both.Q, both.P, "layer", sides)
    torch.testing.assert_close(found.s, 2 * own.s)
    torch.testing.assert_close(found.U_A.abs(), own.U_A.abs())


def test_the_common_basis_diagonalises_the_partial_traces():
    first = Product(second_moment(3, 1), second_moment(4, 2), Sides())
    second = Product(second_moment(3, 3), second_moment(4, 4), Sides())
    block = sum(torch.kron(one.P, one.Q) for one in (first, second)).reshape(3, 4, 3, 4)
    both = of_both(first, second)
    basis = eigen_basis(both.Q, both.P, "layer")
    for trace, U in (
        (torch.einsum("aibi->ab", block), basis.U_B),
        (torch.einsum("aiaj->ij", block), basis.U_A),
    ):
        turned = U.T @ trace @ U
        torch.testing.assert_close(turned, turned.diagonal().diag())


# The pace.


def heard(*losses: float) -> Pace:
    """What twenty steps with such losses leave, between two trials."""
    pace = Pace(lr=0.01)
    for loss in losses:
        pace = PACING.alarmed(pace, loss)
    return replace(pace, steps=30, look=45, gap=20)


USUAL = [2.0, 2.1, 1.9, 2.05, 1.95] * 4


def test_a_loss_far_above_the_last_ones_is_a_reason_to_look_at_once():
    pace = heard(*USUAL)
    assert not PACING.looks(pace)
    assert not PACING.looks(PACING.alarmed(pace, 2.15))
    alarmed = PACING.alarmed(pace, 2.6)
    assert PACING.looks(alarmed)
    assert alarmed.gap == 1
    assert alarmed.lr == pace.lr
    assert not PACING.looks(PACING.alarmed(pace, 1.0))  # better is no reason


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_alarm_has_no_unit(unit):
    pace = heard(*[unit * x for x in USUAL])
    assert not PACING.looks(PACING.alarmed(pace, 2.15 * unit))
    assert PACING.looks(PACING.alarmed(pace, 2.6 * unit))


def test_a_loss_that_jumps_between_trials_is_followed_by_a_trial_and_a_short_step():
    optimizer, *_, model, criterion = training(60, noisy, basis="adam")
    planner, tried = optimizer._planner, []
    planner.pace = replace(planner.pace, look=10_000, gap=20, limit=math.inf)
    trial = planner.batches.trial
    planner.batches.trial = lambda *given: tried.append(1) or trial(*given)

    def step(times: float) -> None:
        x, y = noisy(61)
        optimizer.zero_grad()
        criterion(model(x), times * y).backward()
        optimizer.step()

    step(1.0)
    assert not tried
    step(30.0)
    assert tried


def test_the_quadratic_model_bounds_the_pace_from_above_but_for_a_lowest():
    for best, lr in ((0.005, 0.005), (10.0, 0.1), (1e-5, 1e-3), (-1.0, 0.1)):
        pace = PACING.agreed(PACING.modelled(Pace(), -best, 1.0), None)
        # Uphill it says nothing of how far, once; going on so, the running slope does.
        assert PACING.lr(pace) == pytest.approx(lr if best > 0 else 1e-3)
        assert pace.lr == PACING.highest  # it is remembered, for when the model allows it
    assert PACING.lr(PACING.agreed(Pace(), None)) == pytest.approx(PACING.highest)


def test_the_model_of_now_bounds_the_pace_where_it_is_below_the_running_one():
    pace = PACING.modelled(PACING.modelled(Pace(), -1.0, 1.0), -0.01, 1.0)
    assert pace.ceiling == pytest.approx(0.01)
    running = PACING.modelled(pace, -100.0, 1.0)
    assert running.ceiling < 100


def test_a_ceiling_that_rises_does_not_lift_the_pace():
    low = replace(Pace(), lr=0.002, ceiling=0.003, steps=40, square=1.0)
    high = replace(low, ceiling=0.02)
    assert PACING.agreed(high, -1.0).lr == 0.002  # 0.6 · 0.003 is lower, and 0.6 · 0.02 higher
    assert PACING.agreed(low, -1.0).lr < 0.002
    assert PACING.agreed(high, 1.0).lr > 0.002


def test_agreement_raises_the_pace_and_disagreement_lowers_it():
    up = down = Pace(lr=0.01, steps=1)
    for _ in range(5):
        up, down = PACING.agreed(up, 3.0), PACING.agreed(down, -3.0)
    assert PACING.lr(up) > 0.02
    assert PACING.lr(down) == 0.01  # it is not lifted to what holds a pace from above
    for _ in range(200):
        up, down = PACING.agreed(up, 3.0), PACING.agreed(down, -3.0)
    assert PACING.lr(up) == pytest.approx(PACING.highest)
    held = Pace(lr=0.1, steps=1)
    for _ in range(20_000):
        held = PACING.agreed(held, -3.0)
        if held.steps in (100, 400, 1600):
            assert PACING.lr(held) == pytest.approx(0.12 / held.steps**0.5)
    assert PACING.lr(held) == PACING.lowest
    low = Pace(lr=0.01, steps=1, ceiling=0.01)
    for _ in range(200):
        low = PACING.agreed(low, -3.0)
    assert PACING.lr(low) == pytest.approx(PACING.least * 0.01)


def test_patience_is_for_where_a_step_gains_more_than_batches_differ():
    quiet = loud = Pace(lr=0.01, steps=1)
    for _ in range(5):
        quiet, loud = PACING.agreed(quiet, 0.0, 0.0), PACING.agreed(loud, 0.0, 1.5)
    assert quiet.lr == pytest.approx(0.01 * math.exp(5 * PACING.sensitivity * PACING.patience))
    assert loud.lr == pytest.approx(0.01)


def test_trials_are_in_all_first_steps_and_then_rarer_while_the_ceiling_stays():
    pace, times = Pace(lr=0.05), []
    for step in range(100):
        looks = PACING.looks(pace)
        pace = PACING.agreed(pace, None)
        if looks:
            times.append(step)
            pace = PACING.passed(pace, -1.0, 50.0)
    assert times[: PACING.first] == list(range(PACING.first))
    gaps = [b - a for a, b in itertools.pairwise(times[PACING.first :])]
    assert gaps[:4] == [2, 4, 8, 16]
    assert set(gaps[4:]) == {PACING.rarest}
    jumped = PACING.passed(pace, -1.0, 500.0)
    assert jumped.gap == pace.gap // 2


def test_a_ceiling_that_is_of_long_ago_is_left_by_more_trials():
    pace, times = Pace(lr=0.01), []
    for step in range(300):
        pace = PACING.agreed(pace, None)
        if PACING.looks(pace):
            # Slope and bend of a place that is left at step 60 are a thousand times as large.
            slope, bend = (-1000.0, 1e5) if step < 60 else (-1.0, 10.0)
            pace = PACING.modelled(pace, slope, bend)
            times.append((step, pace.ceiling))
    assert dict(times)[next(step for step, _ in times if step >= 60)] == pytest.approx(
        0.01, rel=0.1
    )
    assert pace.ceiling == pytest.approx(0.1, rel=0.1)
    assert next(step for step, ceiling in times if ceiling > 0.09) < 130
    assert len(times) < 60  # and then they are rare again


def test_after_a_bad_trial_steps_have_a_limit_that_doubles_until_it_is_gone():
    pace = Pace(lr=0.05, ceiling=0.05, steps=99, gap=8, look=105)
    # From slope −1 a change of 0.15 at 0.05 is a bend of 160: best at 1/160.
    bad = PACING.failed(pace, 0.05, -1.0, 0.15)
    assert PACING.lr(bad) == pytest.approx(1 / 160)
    assert PACING.looks(bad)
    assert PACING.failed(pace, 0.05, -1.0, math.inf).limit == pytest.approx(0.05 / 16)
    assert PACING.failed(pace, 0.05, -1.0, 0.0).limit == pytest.approx(0.05 / 2)
    for _ in range(3):
        bad = PACING.passed(bad, -1.0, 10.0)
        assert bad.gap == 1
    assert bad.limit == pytest.approx(8 / 160)
    assert PACING.passed(bad, -1.0, 10.0, eased=False).limit == bad.limit
    assert PACING.passed(bad, -1.0, 10.0).limit == math.inf
    for _ in range(20):
        bad = PACING.failed(bad, PACING.lr(bad), 1.0, math.nan)
    assert PACING.lr(bad) == PACING.lowest * PACING.distrust


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_measurement_that_is_no_number_changes_nothing(bad):
    pace = Pace(lr=0.01, ceiling=0.02, slope=-1.0, bend=1.0, steps=3)
    assert replace(PACING.agreed(pace, bad), steps=3) == pace
    assert bad is None or PACING.modelled(pace, bad, 1.0) == pace


# When.


def test_steps_are_normalised_once_they_gain_less_than_batches_differ_and_until_noise_is_gone():
    rule = LevenbergMarquardt()
    at = [Settings(1.0, 1.0, noise=noise) for noise in (0.05, 0.5, 1.0, 2.0)]
    assert [rule.normalises(settings, False) for settings in at] == [False, False, True, True]
    assert [rule.normalises(settings, True) for settings in at] == [False, True, True, True]
    assert rule.heard(at[0], 2.0).noise == pytest.approx(1.025)
    assert rule.heard(at[3], 0.0).noise == 0  # the very same batch
    assert rule.heard(at[0], None) == at[0]
    assert Fixed().heard(at[0], 2.0) == at[0]


def training(steps: int, batches, seed: int = 0, **options):
    """Steps on what `batches(step)` gives; the optimizer and whether each step was normalised."""
    torch.manual_seed(seed)
    model, criterion = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), nn.MSELoss()
    optimizer = kn.KFAC(model, criterion, **options)
    kinds = []
    for step in range(steps):
        x, y = batches(step)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        kinds.append(bool(optimizer.diagnostics()["normalised"]))
    return optimizer, kinds, model, criterion


def noisy(step: int) -> tuple[Tensor, Tensor]:
    return drawn(8, 6, seed=2 * step), drawn(8, 3, seed=2 * step + 1)


def test_noise_brings_normalised_steps_and_its_end_brings_newtons_back():
    def batches(step: int) -> tuple[Tensor, Tensor]:
        return noisy(step if step < 60 else 60)

    _, kinds, model, criterion = training(200, batches)
    assert any(kinds[:60])
    assert not kinds[-1]
    x, y = noisy(60)
    with torch.no_grad():  # 8 examples, which a network of 8 hidden units fits
        assert float(criterion(model(x), y)) < 1e-3


def test_without_noise_no_step_is_normalised_once_the_batch_has_come_again():
    _, kinds, _, _ = training(40, lambda step: noisy(0))
    assert not any(kinds[1:])


def test_steps_begin_as_normalised_ones_and_ask_for_no_damping():
    optimizer, kinds, _, _ = training(1, noisy)
    assert kinds == [True]
    assert math.isnan(float(optimizer.diagnostics()["damping"]))


def test_batches_of_any_size_and_a_shift_of_the_data_leave_it_finite_and_it_recovers():
    W = drawn(6, 3, seed=99)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        x = drawn(2 + 7 * step % 31, 6, seed=step)
        sign = 1 if step < 150 else -1  # everything learnt so far is wrong from here on
        return x, torch.tanh(sign * x @ W) + 0.3 * drawn(len(x), 3, seed=1000 + step)

    _, kinds, model, criterion = training(300, batches)
    assert any(kinds)
    x = drawn(200, 6, seed=7)
    with torch.no_grad():
        loss = float(criterion(model(x), torch.tanh(-x @ W)))
        nothing = float(torch.tanh(-x @ W).square().mean())
    assert loss < 0.5 * nothing


@pytest.mark.parametrize("options", [{"basis": "factored"}, {"damping": 0.1}, {"lr": 0.1}])
def test_what_is_fixed_stays_newtons(options):
    _, kinds, _, _ = training(40, noisy, **options)
    assert not any(kinds)


def test_a_number_for_lr_is_the_step_of_every_coordinate():
    optimizer, kinds, model, criterion = training(1, noisy, basis="adam", lr=0.0)
    assert kinds == [True]
    before = model[0].weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.01
    x, y = noisy(0)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    moved = model[0].weight.detach() - before
    # An orthogonal basis leaves the root mean square of ±0.01 as it is.
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.01, rel=0.2)


def test_a_gradient_that_is_no_number_does_not_stay_in_the_moments():
    def batches(step: int) -> tuple[Tensor, Tensor]:
        x, y = noisy(step)
        return (x * math.nan, y) if step == 5 else (x, y)

    with pytest.warns(KronewtonWarning, match="skipped"):
        optimizer, _, model, _ = training(12, batches, basis="adam")
    assert float(optimizer.diagnostics()["skipped"]) == 1
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert float(optimizer.diagnostics()["step"]) == 12


def test_the_quadratic_model_holds_back_a_pace_that_is_too_fast():
    torch.manual_seed(0)
    model, criterion = nn.Linear(6, 3), nn.MSELoss()
    optimizer = kn.KFAC(model, criterion, basis="adam")
    optimizer._planner.pacing = Pacing(highest=50.0)
    x, y = noisy(0)
    start = criterion(model(x), y)
    start.backward()
    optimizer.step()
    assert 0 < float(optimizer.diagnostics()["lr"]) < 5
    # 1.6 of the way to the minimum of what is exactly quadratic here: lower than at the start.
    assert float(criterion(model(x), y).detach()) < float(start.detach())


def test_a_normalised_step_that_loses_far_too_much_is_made_shorter():
    torch.manual_seed(0)
    model, criterion = nn.Linear(6, 3), nn.MSELoss()
    optimizer = kn.KFAC(model, criterion, basis="adam")
    optimizer._planner.pacing = Pacing(lowest=50.0, highest=50.0)
    x, y = noisy(0)
    before = criterion(model(x), y)
    before.backward()
    optimizer.step()
    assert float(optimizer.diagnostics()["undone"]) >= 1
    assert optimizer._planner.pace.limit < 50
    assert float(criterion(model(x), y).detach()) < 2 * float(before.detach())


def test_a_limit_that_a_step_has_just_got_is_not_doubled_by_its_own_shorter_trial(monkeypatch):
    optimizer, *_ = training(3, noisy, basis="adam")
    planner = optimizer._planner
    planner.pace, lengths, model, (x, y) = Pace(lr=0.05), [], planner.replayer.model, noisy(9)

    def tried(parts, step):
        lengths.append(float(sum(t.abs().sum() for t in step)))
        return Trial(math.inf if len(lengths) == 1 else loss_of(parts), 1e-3)

    monkeypatch.setattr(planner.batches, "trial", tried)
    monkeypatch.setattr(planner, "_bounded", lambda pace, *_: replace(pace, ceiling=0.05))
    optimizer.zero_grad()
    optimizer._watcher.criteria[0](model(x), y).backward()
    optimizer.step()
    assert lengths[1] == pytest.approx(lengths[0] / 16)
    assert planner.pace.limit == pytest.approx(0.05 / 16)


def test_a_step_of_which_every_trial_is_bad_is_not_made_and_leaves_the_weights():
    class Picky(nn.Linear):
        """Refuses all weights but its first."""

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "first"):
                self.first = self.weight.detach().clone()
            if not torch.equal(self.first, self.weight):
                raise ValueError("not these")
            return super().forward(x)

    model, criterion = Picky(6, 3), nn.MSELoss()
    optimizer = kn.KFAC(model, criterion, basis="adam")
    optimizer._planner._bounded = lambda pace, *_: replace(pace, ceiling=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = noisy(0)
    for step in range(3):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        with pytest.warns(KronewtonWarning, match="every length") if step == 0 else nullcontext():
            optimizer.step()
    assert all(p.equal(q) for p, q in zip(model.parameters(), before, strict=True))
    told = optimizer.diagnostics()
    assert float(told["undone"]) == 3 * TRIALS
    assert float(told["skipped"]) == 3
    assert float(told["lr"]) == 0


def in_groups(model: nn.Module, criterion: nn.Module, *lrs: float) -> kn.KFAC:
    groups = [
        {"params": list(m.parameters()), "lr": lr} for m, lr in zip(model[::2], lrs, strict=True)
    ]
    return kn.KFAC(groups, criterion, model=model, basis="adam")


@pytest.mark.filterwarnings("ignore:the parameter groups multiply")
@pytest.mark.parametrize("case", ["decay", "groups", "nothing", "frozen", "maximised"])
def test_what_is_tried_is_what_is_made(case):
    """The loss that a trial saw is the loss of the same batch after the step."""
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), nn.MSELoss()
    make = {
        "decay": lambda m: kn.KFAC(m, criterion, basis="adam", weight_decay=30.0),
        "groups": lambda m: in_groups(m, criterion, 0.1, 1.0),
        "nothing": lambda m: in_groups(m, criterion, 0.0, 0.0),
        "frozen": lambda m: kn.KFAC(m, criterion, basis="adam"),
        "maximised": lambda m: kn.KFAC(m, criterion, basis="adam", maximize=True),
    }[case]
    optimizer, (x, y) = make(model), noisy(0)
    sign, seen = (-1.0 if case == "maximised" else 1.0), 0
    for step in range(12):
        if case == "frozen" and step == 5:
            model[0].requires_grad_(False)
        optimizer.zero_grad()
        optimizer.step(lambda: (loss := criterion(model(x), y)).backward() or loss)
        outcome = optimizer._planner.outcome
        if outcome is not None:
            seen += 1
            now = sign * float(criterion(model(x), y).detach())
            assert outcome[0] == pytest.approx(now, rel=1e-12)
    assert seen > 3 or case == "nothing"


def test_what_the_loss_cannot_show_is_no_curvature():
    """With a large constant in the loss, or a tiny step, a parabola is all rounding."""

    class Shifted(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return (output - target).square().mean() + 1e12

    ceilings = []
    for criterion in (nn.MSELoss(), Shifted()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = kn.KFAC(model, criterion, basis="adam")
        for step in range(8):
            optimizer.zero_grad()
            x, y = noisy(step)
            criterion(model(x), y).backward()
            optimizer.step()
        ceilings.append(optimizer._planner.pace.ceiling)
    assert ceilings[1] > 0.3 * ceilings[0]


def test_a_basis_that_cannot_be_found_leaves_adam_in_the_entries(monkeypatch):
    def fails(*args):
        raise NotPositiveDefinite("no basis")

    monkeypatch.setattr("kronewton.drift.Renewal.basis", fails)
    optimizer, _, model, _ = training(5, noisy, basis="adam")
    assert float(optimizer.diagnostics()["failed_inversions"]) > 0
    assert float(optimizer.diagnostics()["step"]) == 5
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": 2}, "refine=2 and basis='adam' exclude each other"),
        ({"damping": 0.1}, "damping=0.1 has no use with basis='adam'"),
        ({"momentum": 1.0}, r"must lie in \[0, 1\)"),
        ({"trust_region": 0.5}, "trust_region=0.5 has no use with basis='adam'"),
    ],
)
def test_what_normalised_steps_cannot_do_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        kn.KFAC(nn.Linear(2, 2), nn.MSELoss(), basis="adam", **options)


def test_a_state_from_normalised_steps_goes_into_auto_and_orthogonal_only():
    optimizer, kinds, model, criterion = training(30, noisy)
    assert kinds[-1]
    state = optimizer.state_dict()
    optimizer.close()
    for basis in ("factored", "adam"):
        with pytest.raises(StateError, match="saved with basis='orthogonal'"):
            kn.KFAC(model, criterion, basis=basis).load_state_dict(state)
    kn.KFAC(model, criterion, basis="orthogonal").load_state_dict(state)
    again = kn.KFAC(model, criterion)
    again.load_state_dict(state)
    assert bool(again.diagnostics()["normalised"])


def test_coverage_says_so():
    optimizer, kinds, _, _ = training(30, noisy)
    assert kinds[-1]
    assert {row.method for row in optimizer.coverage().rows} == {"K-FAC orthogonal"}


@pytest.mark.parametrize("cut", [1, 4, 9, 22])
def test_a_training_that_changes_its_steps_is_resumed_bit_for_bit(cut):
    def batches(step: int) -> tuple[Tensor, Tensor]:
        return noisy(99 if 3 <= step < 6 else step)

    _, kinds, whole, _ = training(30, batches)
    assert [kinds[0], kinds[9], kinds[-1]] == [True, False, True]
    first, _, model, criterion = training(cut, batches)
    state = first.state_dict()
    first.close()
    resumed = kn.KFAC(model, criterion)
    resumed.load_state_dict(state)
    for step in range(cut, 30):
        x, y = batches(step)
        resumed.zero_grad()
        criterion(model(x), y).backward()
        resumed.step()
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda entry: entry.pop("kfac_moments_v"), "only left, m, steps of the moments"),
        (
            lambda entry: entry.update(kfac_moments_m=torch.zeros(2, 2)),
            r"a moment of shape \(2, 2\)",
        ),
        (lambda entry: entry["kfac_moments_left"].fill_(1.25), "has 1.25 for the moments' left"),
        (lambda entry: entry["kfac_moments_left"].fill_(math.nan), "has nan for the moments' left"),
        (lambda entry: entry["kfac_moments_steps"].fill_(-1), "has -1 for the moments' steps"),
        (lambda entry: entry["kfac_moments_steps"].fill_(math.inf), "has inf for the moments'"),
        (
            lambda entry: entry.update(kfac_moments_left=torch.zeros(2, 2)),
            r"a number of moments of shape \(2, 2\)",
        ),
    ],
)
def test_damaged_moments_are_refused(damage, message):
    optimizer, _, model, criterion = training(3, noisy, basis="adam")
    state = optimizer.state_dict()
    damage(state["state"][0])
    optimizer.close()
    with pytest.raises(StateError, match=message):
        kn.KFAC(model, criterion, basis="adam").load_state_dict(state)


def test_captures_learn_from_all_quarters_of_a_batch_in_turn(monkeypatch):
    turns = []
    real = kn.curvature.thinned
    monkeypatch.setattr(
        "kronewton.curvature.thinned",
        lambda seen, rows, turn, reduce: turns.append(turn) or real(seen, rows, turn, reduce),
    )
    training(151, noisy, basis="adam")
    assert {turn % 4 for turn in turns} == {0, 1, 2, 3}


@pytest.mark.parametrize(("kept", "own_bend"), [(0.2, True), (0.3, False)])
def test_where_little_of_the_promise_comes_the_losses_own_bend_is_the_ceiling(
    monkeypatch, kept, own_bend
):
    optimizer, *_ = training(3, noisy, basis="adam")
    planner, seen = optimizer._planner, {}

    def tried(parts, step):
        flat = torch.cat([t.reshape(-1) for t in step])
        along = float(torch.dot(flattened(optimizer._gradients()), flat))
        seen["along"], seen["change"] = along, kept * 0.9 * along  # with the bend 0.9 is promised
        return Trial(loss_of(parts) + seen["change"], -0.2 * along)

    monkeypatch.setattr(planner.batches, "trial", tried)
    monkeypatch.setattr(
        Pacing,
        "passed",
        lambda self, pace, slope, bend, eased: seen.update(bend=bend / slope) or pace,
    )
    model, (x, y) = planner.replayer.model, noisy(9)
    optimizer.zero_grad()
    optimizer._watcher.criteria[0](model(x), y).backward()
    optimizer.step()
    # As a share of slope·lr: the outputs' −0.2, or the parabola's 2(change − along)/along.
    expected = 2 * (kept * 0.9 - 1) if own_bend else -0.2
    assert seen["bend"] * planner.lr == pytest.approx(expected, rel=1e-6)


def test_a_step_that_is_not_tried_keeps_below_the_ceiling(monkeypatch):
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), nn.MSELoss()
    optimizer = kn.KFAC(model, criterion, basis="adam")
    seen: list[bool] = []
    own = Pacing.lr

    def watched(self: Pacing, pace: Pace, tried: bool = True) -> float:
        found = own(self, pace, tried)
        if not tried:
            assert found <= max(0.8 * pace.ceiling, self.lowest)
        seen.append(tried)
        return found

    monkeypatch.setattr(Pacing, "lr", watched)
    for _ in range(30):
        optimizer.zero_grad()
        criterion(model(torch.randn(64, 6)), torch.randn(64, 3)).backward()
        optimizer.step()
    assert False in seen
    bound = replace(optimizer._planner.pace, lr=0.1, ceiling=0.05, limit=math.inf)
    assert own(Pacing(), bound) == 0.05
    assert own(Pacing(), bound, tried=False) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("steps", "ceiling", "lr"),
    [
        (30, 0.04, 0.04),
        (30, 0.004, 0.12 / 30**0.5),
        (3000, 0.004, 0.004),
        (30, 0.2, 0.09),
        (5, 0.04, 0.09),
    ],
    ids=["above", "floor", "late", "below", "first"],
)
def test_a_pace_comes_down_to_its_ceiling_after_the_first_steps(steps, ceiling, lr):
    """Or agreement would have to lower for long what decides nothing, before it decides again."""
    pace = Pace(lr=0.09, ceiling=ceiling, steps=steps, slope=-ceiling, bend=1.0)
    found = PACING.modelled(pace, -ceiling, 1.0)
    assert found.ceiling == pytest.approx(ceiling)
    assert found.lr == pytest.approx(lr)


class Widening(nn.CrossEntropyLoss):
    """As on a GPU, where autocast takes the loss of half precision in float32."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return super().forward(output.float(), target)


@pytest.mark.parametrize("again", [True, False])
def test_a_model_in_half_precision_does_not_take_batches_of_like_losses_for_one(again):
    """Its loss is of few digits, too: of random labels nearly all losses are the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).bfloat16()
    criterion = nn.CrossEntropyLoss()
    optimizer, kinds = kn.KFAC(model, criterion), []
    for step in range(20):
        x, y = drawn(256, 8, seed=0 if again else step).bfloat16(), torch.arange(256) % 4
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        kinds.append(bool(optimizer.diagnostics()["normalised"]))
    assert all(kinds) != again


@pytest.mark.parametrize("again", [True, False])
def test_in_half_precision_batches_of_like_losses_are_not_taken_for_one(again):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).float()
    criterion = Widening()
    optimizer = kn.KFAC(model, criterion)
    x, y = torch.randn(8000, 8), torch.randint(4, (8000,))
    kinds = []
    for _ in range(20):
        order = torch.randperm(8000)
        if not again:
            x, y = torch.randn(8000, 8), torch.randint(4, (8000,))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model(x[order].float()), y[order])
        loss.backward()
        optimizer.step()
        kinds.append(float(optimizer.diagnostics()["normalised"]))
    assert all(kinds) != again
