"""K-FAC in front of any optimizer: its direction, what stands around it, and its failures."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.optimizer import Optimizer
from torch.utils.checkpoint import checkpoint

import kronewton as kn
from cases import convolutional
from kronewton import KFAC, Preconditioner, preconditioner, watched
from kronewton.errors import (
    CriterionError,
    KronewtonWarning,
    ModelError,
    NotPositiveDefinite,
    OptionError,
    SkippedError,
    StateError,
)
from zoo import ZOO, Entry

BASES = ("factored", "eigen", "corrected")
PLAIN: dict[str, Any] = {"grafting": None, "trust_region": None}
EXACT: dict[str, Any] = {**PLAIN, "fisher": "exact", "factor_every": 1, "inverse_every": 1}
SHORT = {"factor_every": 2, "inverse_every": 3, "factor_decay": 0.9}

float64 = pytest.mark.usefixtures("float64")


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))


def data(N: int = 12, seed: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(N, 3), torch.randint(0, 4, (N,))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Task:
    """A model, its criterion and its preconditioner, on one batch."""

    def __init__(self, criterion: Any = None, **options: Any) -> None:
        self.model, self.criterion = net(), nn.CrossEntropyLoss()
        self.x, self.y = data()
        watched_ones = self.criterion if criterion is None else criterion
        self.preconditioner = Preconditioner(self.model, watched_ones, **options)

    def backward(self, part: slice = slice(None), weight: float = 1.0) -> Tensor:
        loss = weight * self.criterion(self.model(self.x[part]), self.y[part])
        loss.backward()
        return loss.detach()

    def step(self) -> list[Tensor]:
        """The gradients after one step from the whole batch."""
        self.backward()
        self.preconditioner.step()
        return gradients(self.model)

    @property
    def numbers(self) -> dict[str, float]:
        return {k: float(v) for k, v in self.preconditioner.diagnostics().items()}


# The direction.


def solved(model: nn.Linear, criterion: nn.Module, x: Tensor, y: Tensor, damping: float) -> Tensor:
    """The dense damped Newton direction of one linear layer, weights and bias together."""
    p = torch.cat([model.weight.detach().flatten(), model.bias.detach()])

    def loss(v: Tensor) -> Tensor:
        W, bias = v[: model.weight.numel()].view_as(model.weight), v[model.weight.numel() :]
        return criterion(x @ W.T + bias, y)

    H = torch.func.hessian(loss)(p)
    return torch.linalg.solve(H + damping * torch.eye(len(p)), torch.func.grad(loss)(p))


def factored_solve(x: Tensor, G: Tensor, c: float, damping: float) -> Tensor:
    """The same with B = cI and A each damped, G (d_out, d_in): Martens & Grosse, section 6.3."""
    a = torch.cat([x, torch.ones(len(x), 1)], 1)
    A, eye = a.T @ a / len(a), torch.eye(a.shape[1])
    pi = math.sqrt(float(A.trace()) / len(A) / c)
    wanted = G @ torch.linalg.inv(A + pi * math.sqrt(damping) * eye)
    return wanted / (c + math.sqrt(damping) / pi)


def apart(basis: str, reduction: str) -> float:
    """How far from the dense solve, where K-FAC's block is exact: one layer, squared errors."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(3, 2), nn.MSELoss(reduction=reduction)
    x, y = torch.randn(9, 3), torch.randn(9, 2)
    before = Preconditioner(model, criterion, damping=0.07, basis=basis, **EXACT)
    criterion(model(x), y).backward()
    G = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
    before.step()
    found = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
    if basis == "factored":
        wanted = factored_solve(x, G, 1.0 if reduction == "mean" else 18.0, 0.07)
    else:
        flat = solved(model, criterion, x, y, 0.07)
        wanted = torch.cat([flat[:6].view(2, 3), flat[6:, None]], 1)
    return float((found - wanted).norm() / wanted.norm())


@float64
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("basis", BASES)
def test_one_linear_layer_gets_the_dense_damped_newton_direction(basis, reduction):
    assert apart(basis, reduction) < 1e-9


@float64
@pytest.mark.parametrize("mutant", ["gradient", "damping"])
def test_mutants_are_caught(mutant, monkeypatch):
    if mutant == "gradient":
        real = watched._gradient
        monkeypatch.setattr(watched, "_gradient", lambda p: 1.01 * real(p))
    else:
        apply = preconditioner.Preconditioner._applied
        monkeypatch.setattr(
            Preconditioner,
            "_applied",
            lambda self, name, G: apply(self, name, 1.01 * G),
        )
    assert apart("eigen", "mean") > 1e-3


def from_zoo(name: str) -> Entry:
    return next(entry for entry in ZOO if entry.name == name)


def follow(entry: Entry, with_kfac: bool, steps: int, **options: Any) -> Tensor:
    """The weights after steps of KFAC with numbers, or of SGD behind the preconditioner."""
    torch.manual_seed(0)
    model, criterion = entry.make()
    torch.manual_seed(1)
    batch = entry.batch()
    if with_kfac:
        optimizer: Optimizer = KFAC(
            model, criterion, lr=1.0, momentum=0.0, trust_region=None, **options
        )
    else:
        before = Preconditioner(model, criterion, grafting=None, trust_region=None, **options)
        optimizer = SGD(model.parameters(), lr=1.0)
        assert before.coverage().covered == 1
    for _ in range(steps):
        optimizer.zero_grad()
        entry.loss(model, criterion, batch).backward()  # type: ignore[operator]
        if not with_kfac:
            before.step()
        optimizer.step()
    return vector(model)


SAME = [
    ("SIREN", {"basis": "eigen"}),
    ("SIREN", {"basis": "corrected", "fisher": "exact"}),
    ("ResNet", {"basis": "factored"}),
    ("ResNet", {"basis": "eigen", "fisher": "empirical", "largest_side": 8}),
    ("GPT, tied", {"basis": "factored"}),
    ("GPT, functional head", {"basis": "eigen"}),
    ("ViT", {"basis": "corrected"}),
    ("nn.Transformer", {"basis": "factored", "sharing": "reduce"}),
    ("PINN, no criterion", {"basis": "factored"}),
    ("two tasks", {"basis": "corrected"}),
]


@float64
@pytest.mark.filterwarnings("ignore::kronewton.errors.KronewtonWarning")
@pytest.mark.parametrize(("name", "options"), SAME)
def test_sgd_behind_it_makes_the_steps_of_kfac(name, options):
    options = {"damping": 3.0, **SHORT, **options}
    ours = follow(from_zoo(name), False, 7, **options)
    kfacs = follow(from_zoo(name), True, 7, **options)
    assert torch.isfinite(ours).all()
    assert ours.equal(kfacs)


@float64
def test_automatic_damping_is_the_mean_eigenvalue_and_scales_with_the_loss():
    one, many = Task(basis="eigen", **EXACT), Task(basis="eigen", **EXACT)
    first = one.step()
    curvature = one.preconditioner._curvature
    factors = [curvature.factors[name] for name in ("0", "2")]
    traces = sum(float(f.A.mean.trace() * f.B.mean.trace()) for f in factors)
    assert one.numbers["damping"] == pytest.approx(traces / len(vector(one.model)), rel=1e-9)
    many.backward(weight=100.0)
    many.preconditioner.step()
    for a, b in zip(first, gradients(many.model), strict=True):
        torch.testing.assert_close(a, b)


# Its length.


def layers_of(grads: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat([g.flatten() for g in grads[i : i + 2]]) for i in (0, 2)]


@float64
@pytest.mark.parametrize("basis", BASES)
def test_grafting_keeps_the_length_of_the_gradient(basis):
    options = {"basis": basis, "fisher": "exact"}
    plain = layers_of(Task(**PLAIN, **options).step())
    task = Task(**options)
    task.backward()
    raw = layers_of(gradients(task.model))
    task.preconditioner.step()
    for r, p, f in zip(raw, plain, layers_of(gradients(task.model)), strict=True):
        torch.testing.assert_close(f, p * r.norm() / p.norm())
        assert float((f - r).norm()) > 0.1 * float(r.norm())
    together = torch.cat(layers_of(Task(grafting="global", **options).step()))
    whole = torch.cat(plain)
    torch.testing.assert_close(together, whole * torch.cat(raw).norm() / whole.norm())


@float64
def test_the_trust_region_shortens_the_whole():
    options = {"fisher": "exact", "basis": "eigen", "grafting": None}
    plain = torch.cat(layers_of(Task(trust_region=None, **options).step()))
    for share, wanted in ((0.02, 0.02), (preconditioner.AUTO, preconditioner.TRUST_REGION)):
        task = Task(trust_region=share, **options)
        loss = float(task.backward())
        raw = torch.cat(layers_of(gradients(task.model)))
        task.preconditioner.step()
        found = torch.cat(layers_of(gradients(task.model)))
        shortened = math.sqrt(wanted * loss / float(0.5 * raw @ plain))
        assert shortened < 0.9
        assert task.numbers["shortened"] == pytest.approx(shortened)
        torch.testing.assert_close(found, shortened * plain)
    task = Task(trust_region=10.0, **options)
    torch.testing.assert_close(torch.cat(layers_of(task.step())), plain)
    assert task.numbers["shortened"] == 1


@float64
def test_an_automatic_trust_region_does_not_close_with_the_loss():
    found = []
    for share in (preconditioner.AUTO, preconditioner.TRUST_REGION):
        torch.manual_seed(0)
        model, criterion = nn.Linear(3, 2), nn.MSELoss()
        x = torch.randn(9, 3)
        y = model(x).detach() + 0.01 * torch.randn(9, 2)  # a loss of about 1e-4
        before = Preconditioner(model, criterion, grafting=None, trust_region=share)
        criterion(model(x), y).backward()
        before.step()
        found.append(float(before.diagnostics()["shortened"]))
    assert found[0] == 1
    assert found[1] < 0.5


@float64
def test_without_a_criterion_the_loss_counts_as_one():
    torch.manual_seed(0)
    model = net()
    x, y = data()
    before = Preconditioner(model, grafting=None, trust_region=1e-4)
    nn.CrossEntropyLoss()(model(x), y).backward()
    raw = torch.cat(layers_of(gradients(model)))
    before.step()
    found = torch.cat(layers_of(gradients(model)))
    shortened = float(before.diagnostics()["shortened"])
    assert shortened < 1
    assert 0.5 * float(raw @ found) / shortened * shortened**2 == pytest.approx(1e-4)


# The loop around it.


@float64
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("sizes", [(6, 6), (2, 7, 3)])
def test_accumulated_parts_are_the_whole_batch(sizes, fisher):
    whole = Task(**{**EXACT, "fisher": fisher}).step()
    task, start = Task(**{**EXACT, "fisher": fisher}), 0
    for size in sizes:
        task.backward(slice(start, start + size), size / 12)
        start += size
    task.preconditioner.step()
    for a, b in zip(gradients(task.model), whole, strict=True):
        torch.testing.assert_close(a, b)


def throw_away(task: Task, order: str) -> None:
    """A backward pass whose gradients are thrown away, and a good one after it."""
    bad, good = slice(0, 3), slice(3, 12)
    none = order != "zeros"
    if order == "before backward":
        task.backward(bad)
        loss = task.criterion(task.model(task.x[good]), task.y[good])
        task.model.zero_grad(none)
        loss.backward()
    elif order == "both forward first":
        losses = [task.criterion(task.model(task.x[i]), task.y[i]) for i in (bad, good)]
        losses[0].backward()
        task.model.zero_grad(none)
        losses[1].backward()
    elif order == "same loss":
        loss = task.criterion(task.model(task.x[good]), task.y[good])
        loss.backward(retain_graph=True)
        task.model.zero_grad(none)
        loss.backward()
    elif order == "seen by step()":
        task.backward(bad)
        task.model.zero_grad(none)
        task.preconditioner.step()
        task.backward(good)
    else:
        task.backward(bad)
        task.model.zero_grad(none)
        task.backward(good)


ORDERS = ("None", "zeros", "before backward", "both forward first", "same loss", "seen by step()")


@float64
@pytest.mark.parametrize("criterion", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_statistics_of_gradients_that_are_thrown_away_are_thrown_away(order, criterion):
    options = {**EXACT, "fisher": "exact" if criterion else "empirical"}
    given = None if criterion else ()
    clean, task = Task(given, **options), Task(given, **options)
    clean.backward(slice(3, 12))
    clean.preconditioner.step()
    throw_away(task, order)
    task.preconditioner.step()
    for a, b in zip(gradients(task.model), gradients(clean.model), strict=True):
        torch.testing.assert_close(a, b)


@float64
@pytest.mark.parametrize("criterion", [True, False])
def test_several_forwards_and_one_backward_are_one_batch(criterion):
    options = {**EXACT, "fisher": "exact" if criterion else "empirical"}
    given = None if criterion else ()
    whole, task = Task(given, **options), Task(given, **options)
    wanted = whole.step()
    parts = [task.criterion(task.model(task.x[i]), task.y[i]) for i in (slice(6), slice(6, 12))]
    (0.5 * sum(parts)).backward()
    task.preconditioner.step()
    for a, b in zip(gradients(task.model), wanted, strict=True):
        torch.testing.assert_close(a, b)


@float64
def test_gradients_that_nobody_zeroes_are_warned_of():
    task = Task()
    optimizer = SGD(task.model[2].parameters(), lr=0.01)  # of the last layer only
    task.step()
    optimizer.zero_grad()
    task.backward()
    with pytest.warns(KronewtonWarning, match=r"an earlier step\(\) had replaced already"):
        task.preconditioner.step()


@float64
@pytest.mark.parametrize("how", ["zeroed", "None", "another loss first"])
def test_a_loop_that_zeroes_its_gradients_is_not_warned(how):
    task = Task()
    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)
        for _ in range(3):
            task.model.zero_grad(how != "zeroed")
            if how == "another loss first":
                sum((p.square().sum() for p in task.model.parameters()), torch.zeros(())).backward()
            task.step()


@float64
def test_one_of_two_criteria_and_a_loss_that_is_shown():
    x, y = data()
    found = []
    for how in ("one", "several", "observed"):
        model, criterion = net(), nn.CrossEntropyLoss()
        other = nn.CrossEntropyLoss()
        given = {"one": criterion, "several": (criterion, other), "observed": None}[how]
        fisher = "sampled" if how == "observed" else "exact"
        before = Preconditioner(model, given, **{**EXACT, "fisher": fisher, "seed": 3})
        output = model(x)
        if how == "observed":
            before.observe(output, y, criterion)
            nn.functional.cross_entropy(output, y).backward()
        elif how == "several":
            (0.25 * criterion(output, y) + 0.75 * other(output.flip(0), y.flip(0))).backward()
        else:
            criterion(output, y).backward()
        before.step()
        found.append(torch.cat([g.flatten() for g in gradients(model)]))
    torch.testing.assert_close(found[1], found[0])
    assert float(found[2] @ found[0]) > 0


class Scaled(Task):
    """With a GradScaler around it."""

    def __init__(self, scale: float, **options: Any) -> None:
        super().__init__(**options)
        self.optimizer = SGD(self.model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def scaled_step(self, factor: float = 1.0) -> None:
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(factor * self.x), self.y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.preconditioner.step(self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()


@float64
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_gradscaler_changes_nothing(fisher):
    plain, scaled = Task(damping=0.1, fisher=fisher, **PLAIN), None
    optimizer = SGD(plain.model.parameters(), lr=0.1)
    scaled = Scaled(2.0**12, damping=0.1, fisher=fisher, **PLAIN)
    for _ in range(4):
        optimizer.zero_grad()
        plain.step()
        optimizer.step()
        scaled.scaled_step()
    torch.testing.assert_close(vector(scaled.model), vector(plain.model))


@float64
def test_what_a_gradscaler_finds_is_its_own_business():
    scaled = Scaled(2.0**12, most_skips=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)
        scaled.scaled_step()
        before = vector(scaled.model)
        scaled.scaled_step(math.nan)
    assert vector(scaled.model).equal(before)
    assert scaled.scaler.get_scale() == 2.0**11
    assert scaled.numbers["skipped"] == 0
    scaled.scaled_step()
    assert not vector(scaled.model).equal(before)


def test_a_factor_that_looks_like_a_gradscalers_is_warned_of():
    task = Task()
    task.backward(weight=2.0**16)
    with pytest.warns(KronewtonWarning, match=r"step\(scaler\)"):
        task.preconditioner.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)
        other = Task()
        other.backward(weight=1000.0)
        other.preconditioner.step()


def test_gradients_that_are_none_stay_none_and_tensors_stay_the_same():
    task = Task()
    task.backward()
    task.model[0].bias.grad = None
    tensors = [p.grad for p in task.model.parameters()]
    before = gradients(task.model)
    task.preconditioner.step()
    assert tensors[1] is None
    assert all(p.grad is t for p, t in zip(task.model.parameters(), tensors, strict=True))
    assert not any(a.equal(b) for a, b in zip(gradients(task.model), before, strict=True))


def test_sparse_gradients_become_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(7, 4, mode="mean", sparse=True), nn.Linear(4, 3))
    criterion = nn.CrossEntropyLoss()
    before = Preconditioner(model, criterion)
    for _ in range(2):
        model.zero_grad()
        criterion(model(torch.randint(0, 7, (5, 2))), torch.randint(0, 3, (5,))).backward()
        assert model[0].weight.grad.is_sparse
        before.step()
    assert not model[0].weight.grad.is_sparse
    assert torch.isfinite(model[0].weight.grad).all()


def test_what_no_kind_covers_keeps_its_gradient_and_coverage_says_so():
    class Phased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.phase = nn.Linear(3, 4), nn.Parameter(torch.randn(4) + 1j)

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x) * self.phase).real

    torch.manual_seed(0)
    model, criterion, (x, y) = Phased(), nn.CrossEntropyLoss(), data()
    before = Preconditioner(model, criterion)
    criterion(model(x), y).backward()
    raw = model.phase.grad.clone()
    before.step()
    assert model.phase.grad.equal(raw)
    (row,) = [r for r in before.coverage().rows if not r.curved]
    assert (row.parameter, row.method) == ("phase", "its own gradient")
    assert "complex" in row.why or "real" in row.why
    before.close()
    assert not model._forward_hooks
    with pytest.raises(ModelError, match=r"strict=True, and the gradients of .* phase"):
        Preconditioner(model, criterion, strict=True)
    assert not model._forward_hooks
    assert Task(strict=True).preconditioner.coverage().covered == 1


def test_half_precision_parameters_have_float32_factors():
    task = Task()
    task.preconditioner.close()
    model = net().bfloat16()
    before = Preconditioner(model, task.criterion)
    task.criterion(model(task.x.bfloat16()), task.y).backward()
    before.step()
    assert all(g.dtype == torch.bfloat16 for g in gradients(model))
    kept = before.state_dict()["layers"]["0"]
    assert {t.dtype for t in kept.values()} == {torch.float32}


# Sentences.


def test_what_is_not_a_use_of_it_ends_in_a_sentence():
    model, criterion = net(), nn.CrossEntropyLoss()
    with pytest.raises(ModelError, match=r"given as list; an nn\.Module"):
        Preconditioner(list(model.parameters()), criterion)  # type: ignore[arg-type]
    frozen = net().requires_grad_(False)
    with pytest.raises(ModelError, match="nothing to precondition"):
        Preconditioner(frozen, criterion)
    lone = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ModelError, match="no parameter of ParameterList is of a kind"):
        Preconditioner(lone, criterion)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grafting": "leaf"}, "grafting must be one of 'layer', 'global', None"),
        ({"trust_region": 1.0}, "Leave it out, or give grafting=None"),
        ({"damping": -1.0}, "damping must be a number"),
        ({"basis": "adam"}, "basis must be one of 'auto', 'factored', 'eigen', 'corrected'"),
        ({"factor_every": 0}, "factor_every"),
        ({"factor_decay": 1.0}, r"factor_decay must lie in \[0, 1\)"),
        ({"sharing": {"9": "reduce"}}, "matches no layer"),
        ({"fisher": "exact", "criterion": ()}, "fisher='exact' needs the Hessian"),
    ],
)
def test_options_that_are_none(options, words):
    with pytest.raises(OptionError, match=words):
        Preconditioner(net(), options.pop("criterion", nn.CrossEntropyLoss()), **options)


def test_gradients_from_elsewhere_are_refused():
    task = Task()
    nn.functional.cross_entropy(task.model(task.x), task.y).backward()
    for words in ("given to Preconditioner", "preconditioner.observe"):
        with pytest.raises(CriterionError, match=words):
            task.preconditioner.step()
    task.model.zero_grad()
    other = net()
    task.criterion(other(task.x), task.y).backward()
    with pytest.raises(CriterionError, match="give Preconditioner that model"):
        task.preconditioner.step()
    without = Task(())
    without.preconditioner.close()
    without.backward()
    late = Preconditioner(without.model)
    with pytest.raises(CriterionError, match="Run the model that was given to Preconditioner"):
        late.step()


def test_a_parameter_that_came_later_is_named():
    task = Task()
    task.model.append(nn.Linear(4, 4))
    task.backward()
    with pytest.warns(
        KronewtonWarning,
        match=r"'3.weight' was not in the model, or was frozen, when Precond.*as it",
    ):
        task.preconditioner.step()
    task.model[0].weight = nn.Parameter(torch.zeros(6, 3))
    task.model.zero_grad()
    task.backward()
    with pytest.raises(ModelError, match="another parameter than when Preconditioner was made"):
        task.preconditioner.step()


def test_a_loss_with_terms_that_were_not_watched_is_said():
    task = Task()
    output = task.model(task.x)
    (task.criterion(output, task.y) + output.square().mean()).backward()
    with pytest.warns(KronewtonWarning, match="the curvature is that of the watched part"):
        task.preconditioner.step()


# Failures.


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params: AdamW(params, lr=0.01),
}
if hasattr(torch.optim, "Muon"):  # of matrices only: biases stay
    OPTIMIZERS["Muon"] = lambda params: torch.optim.Muon([p for p in params if p.dim() == 2], 0.02)
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda t: torch.full_like(t, math.nan),
    "one inf": lambda t: t.clone().index_fill_(0, torch.tensor([0]), math.inf),
    "huge": lambda t: t * 1e25,
    "denormal": lambda t: t * 1e-41,
    "zero": torch.zeros_like,
    "constant": lambda t: torch.full_like(t, 0.5),
}


class Training(Task):
    """With an optimizer behind it, and a fault somewhere."""

    def __init__(self, optimizer: str, **options: Any) -> None:
        super().__init__(**options)
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))

    def kept(self, where: str) -> Iterator[Tensor]:
        curvature = self.preconditioner._curvature
        for layer in self.preconditioner._layers:
            for key, t in curvature.tensors(layer.name).items():
                total = key.startswith(("A_total", "B_total", "s_total"))
                if t.dim() and (total if where == "factor" else key.startswith("inverse_")):
                    yield t

    def one(self, fault: Callable[[Tensor], Tensor] | None = None, where: str = "") -> None:
        x = fault(self.x) if fault is not None and where == "input" else self.x
        for t in self.kept(where) if fault is not None and where in ("factor", "inverse") else ():
            t.copy_(fault(t))
        self.optimizer.zero_grad()
        self.criterion(self.model(x), self.y).backward()
        if fault is not None and where == "gradient":
            for p in self.model.parameters():
                p.grad = fault(p.grad)
        self.preconditioner.step()
        self.optimizer.step()
        assert bool(torch.isfinite(vector(self.model)).all())


@pytest.mark.filterwarnings("ignore::kronewton.errors.KronewtonWarning")
@pytest.mark.parametrize("where", ["input", "gradient", "factor", "inverse"])
@pytest.mark.parametrize(
    ("optimizer", "basis"),
    [
        ("SGD", "factored"),
        ("SGD", "corrected"),
        *((name, "eigen") for name in list(OPTIMIZERS)[1:]),
    ],
)
def test_weights_stay_finite_whatever_is_wrong(optimizer, where, basis):
    for fault in FAULTS.values():
        for at in (0, 20):
            training = Training(optimizer, basis=basis, factor_every=2, inverse_every=5)
            for _ in range(at):
                training.one()
            training.one(fault, where)
            before = vector(training.model)
            for _ in range(5):
                training.one()
            assert not vector(training.model).equal(before)


@pytest.mark.filterwarnings("ignore::kronewton.errors.KronewtonWarning")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_skipped_moves_no_weight_and_is_counted(optimizer):
    for x_or_gradient, options in (("input", {}), ("gradient", {}), ("gradient", PLAIN)):
        training = Training(optimizer, most_skips=2, **options)
        for _ in range(3):
            training.one()
        before = vector(training.model)
        for fault in ("nan", "huge"):
            if (fault, x_or_gradient) != ("huge", "input"):
                training.one(FAULTS[fault], x_or_gradient)
                assert vector(training.model).equal(before)
                assert all(p.grad is None for p in training.model.parameters())
        skipped = training.numbers["skipped"]
        assert skipped >= 1
        training.one()
        assert not vector(training.model).equal(before)
        assert training.numbers["skipped"] == skipped


def test_too_many_skips_in_a_row_are_an_error_and_said_once():
    training = Training("SGD", most_skips=1)
    with pytest.warns(KronewtonWarning, match="The gradients are None now") as said:
        training.one(FAULTS["nan"], "input")
    with pytest.raises(SkippedError, match=r"2 steps in a row .* most_skips of Preconditioner"):
        training.one(FAULTS["nan"], "input")
    assert len(said) == 1
    training.one()


def test_a_batch_without_curvature_is_skipped_unless_a_damping_is_given():
    for options, skipped in (({}, 1), ({"damping": 0.1}, 0)):
        training = Training("SGD", **options)
        training.y = torch.full_like(training.y, -100)
        training.criterion.reduction = "sum"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KronewtonWarning)
            training.one()
        assert training.numbers["skipped"] == skipped


@pytest.mark.parametrize("basis", BASES)
def test_the_last_good_inverse_is_kept(basis, monkeypatch):
    def failing(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    def without_result(matrix: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        shape = matrix.shape[:-2]
        return torch.full_like(matrix, math.nan), torch.ones(shape, dtype=torch.int32)

    training, fresh = (
        Training("SGD", basis=basis, factor_every=1, inverse_every=1) for _ in range(2)
    )
    for _ in range(3):
        training.one()
    for name in ("eigh", "cholesky", "inv", "solve"):
        monkeypatch.setattr(torch.linalg, name, failing)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", without_result)
    before = vector(training.model)
    training.one()
    assert training.numbers["failed_inversions"] > 0
    assert not vector(training.model).equal(before)
    with pytest.raises(NotPositiveDefinite, match="'0'"):
        fresh.one()


@pytest.mark.filterwarnings("ignore::kronewton.errors.KronewtonWarning")
@pytest.mark.parametrize(
    ("value", "places", "skipped"), [(math.nan, ("factor", "inverse"), 0), (1e30, ("inverse",), 1)]
)
def test_what_is_damaged_is_made_anew_from_the_next_batch(value, places, skipped):
    every = 1 if skipped == 0 else 50
    training = Training("SGD", basis="eigen", factor_every=50, inverse_every=every)
    for _ in range(5):
        training.one()
    for where in places:
        for t in training.kept(where):
            t.fill_(value)
    training.one()
    training.one()
    assert training.numbers["skipped"] == skipped
    for where in ("factor", "inverse"):
        assert list(training.kept(where))
        assert all(bool((t.abs() < 1e6).all()) for t in training.kept(where))


# The state.


class Tokens(nn.Module):
    """A table that is tied to the head, rows of a packed matrix, and a lone parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 8), nn.Linear(8, 4, bias=False)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(4))
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        t = self.table((x.float().abs() * 10).long() % 4)
        y: Tensor = self.head(self.mix(t, t, t)[0].mean(1)) * self.scale
        return y


RESUMED: dict[str, tuple[Callable[[], nn.Module], torch.dtype, tuple[int, ...], dict]] = {
    **{b: (net, torch.float32, (12,), {"basis": b, **SHORT}) for b in BASES},
    "nothing set": (net, torch.float32, (12,), {}),
    "plain": (net, torch.float32, (12,), {"grafting": None}),
    "conv": (convolutional, torch.float32, (12,), {"sharing": "best", "basis": "eigen"}),
    "tokens": (Tokens, torch.float32, (12,), {**SHORT}),
    "tokens, eigen": (Tokens, torch.float32, (12,), {"basis": "eigen", **SHORT}),
    "accumulated": (net, torch.float32, (2, 7, 3), {"fisher": "empirical"}),
    "bfloat16": (net, torch.bfloat16, (12,), {}),
}


class Run:
    """A training that can be cut anywhere."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(1)
        make, self.dtype, self.parts, options = RESUMED[name]
        self.model, self.criterion = make().to(self.dtype), nn.CrossEntropyLoss()
        self.preconditioner = Preconditioner(self.model, self.criterion, **options)
        self.optimizer = AdamW(self.model.parameters(), lr=0.01)

    def steps(self, numbers: range) -> Run:
        for number in numbers:
            x, y = data(seed=number)
            self.optimizer.zero_grad()
            pairs = zip(x.to(self.dtype).split(self.parts), y.split(self.parts), strict=True)
            for xs, ys in pairs:
                (self.criterion(self.model(xs), ys) * (len(xs) / 12)).backward()
            self.preconditioner.step()
            self.optimizer.step()
        return self


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_it_goes_on_bit_for_bit(name):
    whole, first = Run(name).steps(range(13)), Run(name).steps(range(7))
    stream = io.BytesIO()
    torch.save([first.model.state_dict(), first.optimizer.state_dict(),
                first.preconditioner.state_dict()], stream)  # fmt: skip
    stream.seek(0)
    again = Run(name)
    members = (again.model, again.optimizer, again.preconditioner)
    for member, state in zip(members, torch.load(stream, weights_only=True), strict=True):
        member.load_state_dict(state)
    mine, theirs = again.preconditioner.state_dict(), first.preconditioner.state_dict()
    assert all(mine[k] == v for k, v in theirs.items() if not isinstance(v, (Tensor, dict)))
    assert vector(again.steps(range(7, 13)).model).equal(vector(whole.model))


@pytest.mark.parametrize("lost", ["generator", "steps", "A_total", "inverse_B_inverse", "scale"])
def test_each_part_of_the_state_is_needed(lost):
    whole, first = Run("factored").steps(range(13)), Run("factored").steps(range(7))
    state = copy.deepcopy(first.preconditioner.state_dict())
    if lost == "generator":
        state["generator"] = torch.Generator().manual_seed(99).get_state()
    elif lost in ("steps", "scale"):
        state[lost] = state[lost] + 1
    else:
        state["layers"]["0"][lost].mul_(1.01)
    if lost == "scale":  # of a layer whose inverse is due before its factors are
        first.preconditioner._steps = state["steps"] = 9
        state["capturing"] = False
    again = Run("factored")
    again.model.load_state_dict(first.model.state_dict())
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    again.preconditioner.load_state_dict(state)
    assert not vector(again.steps(range(7, 13)).model).equal(vector(whole.model))


def test_a_state_of_something_else_is_refused_and_nothing_changes():
    run = Run("factored").steps(range(3))
    own = run.preconditioner.state_dict()
    wide = Preconditioner(nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 4)), run.criterion)
    x, y = data()
    run.criterion(wide._watched.model(x), y).backward()
    wide.step()
    before = copy.deepcopy(own)
    for state, words in (
        (None, "not a state_dict of this version's Preconditioner"),
        ({**own, "version": 0}, "format 1"),
        ({k: v for k, v in own.items() if k != "layers"}, "not a state_dict"),
        ({**own, "basis": "eigen"}, "saved with basis='eigen' and this Preconditioner has"),
        ({**own, "layers": {"9": {}}}, "layer '9', and this model has no such layer"),
        ({**own, "layers": 3}, "not a state_dict"),
        ({**own, "layers": {"0": 3}}, "not a state_dict"),
        (wide.state_dict(), "of shape .* for layer '0'"),
        (KFAC(net(), nn.CrossEntropyLoss()).state_dict(), "not a state_dict"),
    ):
        with pytest.raises(StateError, match=words):
            run.preconditioner.load_state_dict(state)  # type: ignore[arg-type]
        after = run.preconditioner.state_dict()
        assert all(t.equal(before["layers"]["0"][k]) for k, t in after["layers"]["0"].items())
        assert after["steps"] == before["steps"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_copies_go_on_by_themselves(how):
    run = Run("eigen").steps(range(5))
    other = how(run)
    run.steps(range(5, 9))
    assert not vector(other.model).equal(vector(run.model))
    other.steps(range(5, 9))
    assert vector(other.model).equal(vector(run.model))


def test_closed_or_forgotten_it_leaves_no_hooks():
    for end in ("close", "forget"):
        task = Task()
        assert task.criterion._forward_hooks
        if end == "close":
            task.preconditioner.close()
        else:
            del task.preconditioner
            gc.collect()
        assert not task.criterion._forward_hooks
        assert not task.model[0]._forward_hooks


def test_the_code_of_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "preconditioner.md").read_text(encoding="utf-8")
    (code,) = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    model, before = net(), net()
    names = {"torch": torch, "kn": kn, "model": model, "loader": [data(), data(9)]}
    exec(
        compile(code, "docs/preconditioner.md", "exec"),
        {**names, "criterion": nn.CrossEntropyLoss()},
    )
    assert not vector(model).equal(vector(before))


def test_it_is_a_public_name():
    assert kn.Preconditioner is Preconditioner


def test_a_curvature_that_is_started_afresh_is_as_if_it_had_never_been() -> None:
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    made = Preconditioner(model, criterion)
    criterion(model(1e8 * x), y).backward()
    made.step()
    made._start_afresh()
    assert made._curvature.scale == made._curvature.largest == 0
    assert not made._curvature.factors
    model.zero_grad()
    criterion(model(x), y).backward()
    made.step()
    assert made._curvature.scale == made._curvature.largest < 10


def test_a_reentrant_checkpoint_is_one_backward_pass() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = checkpoint(self.inner, x, use_reentrant=True)
            return self.last(h)

    torch.manual_seed(0)
    model, criterion = Checkpointed(), nn.CrossEntropyLoss()
    made = Preconditioner(model, criterion, fisher="empirical")
    x = torch.randn(8, 4, requires_grad=True)
    criterion(model(x), torch.arange(8) % 3).backward()
    made.step()
    assert float(made.diagnostics()["skipped"]) == 0
    assert set(made._curvature.factors) == {"inner", "last"}


@pytest.mark.parametrize("unit", [1e-21, 1e-22])
def test_a_layer_is_as_long_as_its_gradient_in_any_unit(unit: float) -> None:
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    made = Preconditioner(model, criterion, trust_region=None)
    (unit * criterion(model(torch.randn(8, 4)), torch.arange(8) % 3)).backward()
    before = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    made.step()
    after = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    length, wanted = (float(t.double().norm()) for t in (after, before))
    assert length == pytest.approx(wanted, rel=1e-3)
