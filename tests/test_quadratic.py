"""The quadratic model against the dense Gauss-Newton matrix and least squares."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, jvp

from kronewton.losses import curvature
from kronewton.quadratic import QuadraticModel, Subspace, Term, flattened
from kronewton.replay import Bridge, ModelCall, Replayer, random_state

pytestmark = pytest.mark.usefixtures("float64")


MODELS = {
    "relu": lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)),
    "sigmoid": lambda: nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 4)),
    "layernorm": lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 4)),
    "batchnorm": lambda: nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 4)
    ),
}


class Case:
    """A model on one batch, its quadratic model and the dense matrix."""

    def __init__(self, model: nn.Module, criterion: nn.Module, sizes: tuple[int, ...] = (6,)):
        self.model, self.criterion = model, criterion
        self.parameters = [p.detach() for p in model.parameters()]
        self.replayer = Replayer(model, list(model.parameters()))
        self.terms, self.dense, self.gradient = (
            [],
            0,
            [torch.zeros_like(p) for p in self.parameters],
        )
        for n in sizes:
            self.add(torch.randn(n, 3), n / sum(sizes))

    def add(self, x: Tensor, weight: float) -> None:
        y = torch.randint(0, 4, (len(x),))
        y = y if isinstance(self.criterion, nn.CrossEntropyLoss) else torch.randn(len(x), 4)
        call = ModelCall((x,), {}, random_state())
        output = self.model(x)
        at = curvature(self.criterion, output.detach(), y)
        self.terms.append(Term(call, (), None, at, torch.tensor(weight)))
        J = jacobian(self.model, x)
        H = hessian(lambda z: self.criterion(z.reshape(output.shape), y))(output.detach().flatten())
        self.dense = self.dense + weight * J.T @ H @ J
        found = torch.autograd.grad(self.criterion(output, y), list(self.model.parameters()))
        self.gradient = [g + weight * h for g, h in zip(self.gradient, found, strict=True)]

    def quadratic(self) -> QuadraticModel:
        return QuadraticModel(self.replayer, self.terms, contextlib.nullcontext)

    def direction(self) -> list[Tensor]:
        return [torch.randn_like(p) for p in self.parameters]


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    names = [n for n, _ in model.named_parameters()]
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    values = {n: p.detach() for n, p in model.named_parameters()}
    found = jacrev(lambda p: functional_call(model, (p, buffers), (x,)).flatten())(values)
    return torch.cat([found[n].flatten(1) for n in names], 1)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_pushed_directions_are_the_jacobian_times_them(name, fallback):
    case = Case(MODELS[name](), nn.MSELoss())
    if fallback:
        case.replayer.without_forward_mode = "asked for by a test"
    v, (x,) = case.direction(), case.terms[0].call.args
    ((Jv, LJv),) = case.quadratic().line(v).pushed
    names = [n for n, _ in case.model.named_parameters()]
    point = dict(zip(names, case.parameters, strict=True))
    tangent = dict(zip(names, v, strict=True))
    buffers = {k: b.clone() for k, b in case.model.named_buffers()}
    _, wanted = jvp(lambda p: functional_call(case.model, (p, buffers), (x,)), (point,), (tangent,))
    torch.testing.assert_close(Jv, wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(LJv, wanted * 2 / wanted.numel(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")]
)
@pytest.mark.parametrize("sizes", [(6,), (2, 4)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_subspace_numbers_are_those_of_the_dense_matrix(criterion, sizes, k):
    case = Case(MODELS["sigmoid"](), criterion, sizes)
    directions = [case.direction() for _ in range(k)]
    model = case.quadratic()
    found = model.subspace(flattened(case.gradient), [model.line(d) for d in directions])
    D = torch.stack([flattened(d) for d in directions], 1)
    wanted = D.T @ case.dense @ D
    np.testing.assert_allclose(found.curvature, wanted.numpy(), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(found.squares, (D.T @ D).numpy(), rtol=1e-11)
    np.testing.assert_allclose(found.slope, (D.T @ flattened(case.gradient)).numpy(), rtol=1e-11)
    x = [0.7, -0.3, 2.0][:k]
    d = D @ torch.tensor(x)
    q = d @ flattened(case.gradient) + 0.5 * d @ (case.dense @ d) + 0.5 * 0.1 * d @ d
    assert found.value(x, 0.1) == pytest.approx(float(q), rel=1e-10)
    assert found.bend(x) == pytest.approx(float(d @ case.dense @ d), rel=1e-10)


def test_a_scaled_curvature_is_noticed_by_the_dense_matrix(monkeypatch):
    case = Case(MODELS["sigmoid"](), nn.MSELoss())
    v, model = case.direction(), case.quadratic()
    wanted = float(flattened(v) @ case.dense @ flattened(v))
    real = QuadraticModel._bend
    monkeypatch.setattr(QuadraticModel, "_bend", lambda self, x, y: 1.01 * real(self, x, y))
    found = model.subspace(flattened(case.gradient), [model.line(v)]).curvature[0][0]
    assert found != pytest.approx(wanted, rel=1e-3)


def test_double_backward_equals_forward_mode():
    case = Case(MODELS["sigmoid"](), nn.CrossEntropyLoss(), (2, 4))
    v, model = case.direction(), case.quadratic()
    forward = model.line(v).pushed
    case.replayer.without_forward_mode = "asked for by a test"
    for (x, Lx), (y, Ly) in zip(forward, model.line(v).pushed, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(Lx, Ly, rtol=1e-11, atol=1e-13)


def test_parameters_off_the_path_have_no_part_in_double_backward():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 4), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, x, y = Unused(), torch.randn(5, 3), torch.randn(5, 4)
    replayer = Replayer(model, list(model.parameters()))
    term = Term(
        ModelCall((x,), {}, random_state()), (), None,
        curvature(nn.MSELoss(), model(x).detach(), y), torch.tensor(1.0),
    )  # fmt: skip
    quadratic = QuadraticModel(replayer, [term], contextlib.nullcontext)
    v = [torch.randn_like(p) for p in model.parameters()]
    forward = quadratic.line(v).pushed[0][0]
    replayer.without_forward_mode = "asked for by a test"
    torch.testing.assert_close(quadratic.line(v).pushed[0][0], forward)
    torch.testing.assert_close(forward, x @ v[0].T + v[1])
    assert all(p.grad is None for p in model.parameters())


class Once(torch.autograd.Function):
    """A function of a user that has no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Square(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_a_model_without_forward_mode_falls_back_by_itself_and_says_why():
    def case(function) -> Case:
        torch.manual_seed(3)
        return Case(nn.Sequential(nn.Linear(3, 5), Square(function), nn.Linear(5, 4)), nn.MSELoss())

    with_it, plain = case(torch.square), case(torch.square)
    with_it.model[1].function = Once.apply
    v = plain.direction()
    found = with_it.quadratic().line(v).pushed[0][0]
    torch.testing.assert_close(found, plain.quadratic().line(v).pushed[0][0])
    assert with_it.replayer.without_forward_mode
    assert not plain.replayer.without_forward_mode


def test_an_error_of_the_model_itself_is_not_taken_for_a_missing_forward_mode():
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("the user's own mistake")

    case = Case(MODELS["relu"](), nn.MSELoss())
    case.model[1] = Square(fails)
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        case.quadratic().line(case.direction())
    assert not case.replayer.without_forward_mode


def test_a_bridge_stands_between_the_model_and_the_criterion():
    model, x, y = nn.Linear(3, 1), torch.randn(5, 3), torch.randn(5)
    z = model(x)
    bridge = Bridge(z, z.squeeze(-1), ())
    at = curvature(nn.MSELoss(), z.squeeze(-1).detach(), y)
    term = Term(ModelCall((x,), {}, random_state()), (), bridge, at, torch.tensor(1.0))
    quadratic = QuadraticModel(
        Replayer(model, list(model.parameters())), [term], contextlib.nullcontext
    )
    v = [torch.randn_like(p) for p in model.parameters()]
    Jv = x @ v[0].flatten() + v[1]
    g = [torch.zeros_like(p) for p in v]
    found = quadratic.subspace(flattened(g), [quadratic.line(v)]).curvature[0][0]
    assert found == pytest.approx(float(2 / 5 * Jv.square().sum()), rel=1e-12)


def test_flattened_is_every_tensor_in_order():
    x, y = torch.randn(2, 3), torch.randn(4)
    assert flattened([x.T, y]).equal(torch.cat([x.T.flatten(), y]))


# The minimiser.


def random_subspace(k: int) -> Subspace:
    rng = np.random.default_rng(k)
    C, D, g = rng.normal(size=(5, k)), rng.normal(size=(7, k)), rng.normal(size=k)
    return Subspace(g.tolist(), (C.T @ C).tolist(), (D.T @ D).tolist())


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("damping", [0.0, 0.3, 100.0])
def test_minimise_solves_the_normal_equations(k, damping):
    s = random_subspace(k)
    H = np.array(s.curvature) + damping * np.array(s.squares)
    np.testing.assert_allclose(s.minimise(damping, {}), -np.linalg.solve(H, s.slope), rtol=1e-8)


@pytest.mark.parametrize("fixed", [{0: 1.0}, {1: 0.9}, {0: 2.0, 2: -1.0}, {0: 1.0, 1: 2.0, 2: 3.0}])
def test_minimise_with_given_coefficients_minimises_over_the_others(fixed):
    s = random_subspace(3)
    H, g = np.array(s.curvature) + 0.1 * np.array(s.squares), np.array(s.slope)
    free = [j for j in range(3) if j not in fixed]
    held = np.array([fixed.get(j, 0.0) for j in range(3)])
    x = held.copy()
    if free:
        x[free] = -np.linalg.solve(H[np.ix_(free, free)], (g + H @ held)[free])
    found = s.minimise(0.1, fixed)
    np.testing.assert_allclose(found, x, rtol=1e-9)
    assert all(found[j] == value for j, value in fixed.items())


def test_minimise_of_dependent_directions_reaches_the_least_squares_value():
    rng = np.random.default_rng(0)
    C, w = rng.normal(size=(6, 2)), np.array([[1.0, 0.0, 3.0], [0.0, 1.0, -2.0]])
    D = C @ w  # the third is a combination of the first two
    g = w.T @ rng.normal(size=2)
    s = Subspace(g.tolist(), (D.T @ D).tolist(), (w.T @ w).tolist())
    best = np.linalg.lstsq(D.T @ D, -g, rcond=None)[0]
    found = s.minimise(0.0, {})
    assert found[2] == 0.0
    assert s.value(found, 0.0) == pytest.approx(s.value(best.tolist(), 0.0), rel=1e-9)


def test_minimise_gives_nothing_to_a_direction_that_is_zero():
    s = Subspace([0.0, -2.0], [[0.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]])
    assert s.minimise(0.0, {}) == [0.0, 0.5]
    assert s.minimise(0.1, {})[0] == 0.0


def test_minimise_is_never_above_the_start():
    for k in range(1, 5):
        s = random_subspace(k)
        assert s.value(s.minimise(0.05, {}), 0.05) <= 0


def test_scaling_loss_and_damping_leaves_the_coefficients():
    s, c = random_subspace(2), 1e-7
    scaled = Subspace(
        [c * g for g in s.slope], [[c * v for v in row] for row in s.curvature], s.squares
    )
    np.testing.assert_allclose(scaled.minimise(c * 0.3, {}), s.minimise(0.3, {}), rtol=1e-10)


@pytest.mark.parametrize("where", ["slope", "curvature", "squares"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_found(where, bad):
    s = random_subspace(2)
    assert s.finite()
    numbers = getattr(s, where)
    (numbers if where == "slope" else numbers[1])[0] = bad
    assert not s.finite()
