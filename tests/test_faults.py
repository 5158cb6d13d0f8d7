"""Faults on purpose: the weights stay finite, and training is back within forty good steps."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from kronewton import KFAC, Preconditioner
from kronewton.errors import CriterionError, KronewtonWarning, NotPositiveDefinite, SkippedError

AFTER = 40  # good steps
WORSE = 1.5  # times the loss of a run without the fault
SLOW = pytest.mark.slow
# All bases are `make slow`'s; what runs always has the one that a user gets, which knows two.
EVERY = ("factored", "eigen", "corrected", "adam", "orthogonal")
BASES = ["auto", *(pytest.param(basis, marks=SLOW) for basis in EVERY)]


def constant(t: Tensor) -> Tensor:
    return torch.full_like(t, 0.5)


def rank_one(t: Tensor) -> Tensor:
    if not t.numel():
        return t
    flat = t.reshape(len(t), -1) if t.dim() > 1 else t.reshape(1, -1)
    return (flat[:, :1] @ flat[:1]).reshape(t.shape)


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda t: torch.full_like(t, math.nan),
    "one nan": lambda t: t.clone().index_fill_(0, torch.arange(min(1, len(t))), math.nan),
    "inf": lambda t: torch.full_like(t, math.inf),
    "huge": lambda t: t * 1e25,
    "denormal": lambda t: t * 1e-41,
    "zero": torch.zeros_like,
    "constant": constant,
    "rank one": rank_one,
    "empty": lambda t: t[:0],
}


FAULTS_OF_TENSORS = [name for name in FAULTS if name != "empty"]


class Task:
    """Batches of a task with noise, and a fault in one of them or in what is kept between them."""

    def __init__(self, regression: bool, **options) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(256, 9)
        scores = self.x @ torch.randn(9, 3) + 2 * torch.randn(256, 3)
        self.y = scores if regression else scores.argmax(1)
        self.model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 3))
        self.criterion: nn.Module = nn.MSELoss() if regression else nn.CrossEntropyLoss()
        self.optimizer = KFAC(self.model, self.criterion, **options)
        self.regression, self.number = regression, 0

    def batch(self) -> tuple[Tensor, Tensor]:
        at = (torch.arange(64) + 64 * self.number) % 256
        self.number += 1
        return self.x[at], self.y[at]

    def step(self, x: Tensor, y: Tensor, fault: Callable[[Tensor], Tensor] | None = None) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        for p in self.model.parameters() if fault is not None else ():
            p.grad = fault(p.grad)
        self.optimizer.step()
        assert all(bool(torch.isfinite(p).all()) for p in self.model.parameters())

    def good(self, count: int) -> None:
        for _ in range(count):
            self.step(*self.batch())

    def loss(self) -> float:
        return float(self.criterion(self.model(self.x), self.y).detach())

    def kept(self, what: str) -> Iterator[Tensor]:
        """The tensors of the running factors or of the inverses."""
        for layer in self.optimizer._layers:
            for key, t in self.optimizer._curvature.tensors(layer.name).items():
                total = key.startswith(("A_total", "B_total", "s_total"))
                if t.dim() and (total if what == "factor" else key.startswith("inverse_")):
                    yield t


def disturb(task: Task, where: str, fault: Callable[[Tensor], Tensor]) -> None:
    """One bad step, or a fault in what is kept."""
    if where in ("factor", "inverse"):
        for t in task.kept(where):
            t.copy_(fault(t))
        return
    x, y = task.batch()
    task.number -= 1  # the good steps see the same batches as without it
    if where == "input":
        task.step(fault(x), y if len(fault(x)) else y[:0])
    elif where == "target":
        task.step(x, fault(y))
    else:
        task.step(x, y, fault)


PLAIN: dict[tuple, float] = {}


def undisturbed(at: int, regression: bool, basis: str) -> float:
    if (at, regression, basis) not in PLAIN:
        task = Task(regression, basis=basis)
        task.good(at + AFTER)
        PLAIN[at, regression, basis] = task.loss()
    return PLAIN[at, regression, basis]


def recovers(task: Task, at: int, basis: str, where: str, fault: Callable) -> None:
    task.good(at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronewtonWarning)
        if where == "input" and not len(fault(task.x)):
            with pytest.raises(CriterionError, match="empty batch"):
                disturb(task, where, fault)
        else:
            disturb(task, where, fault)
        task.good(AFTER)
    assert task.loss() <= WORSE * undisturbed(at, task.regression, basis)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("at", [0, 20])
@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("regression", [True, False])
def test_a_fault_in_the_input(regression, what, at, basis):
    recovers(Task(regression, basis=basis), at, basis, "input", FAULTS[what])


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("at", [0, 20])
@pytest.mark.parametrize("what", FAULTS_OF_TENSORS)
def test_a_fault_in_the_target(what, at, basis):
    recovers(Task(True, basis=basis), at, basis, "target", FAULTS[what])


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("at", [0, 20])
def test_a_batch_that_is_masked_everywhere(at, basis):
    def masked(y: Tensor) -> Tensor:
        return torch.full_like(y, -100)

    recovers(Task(False, basis=basis), at, basis, "target", masked)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("at", [0, 20])
@pytest.mark.parametrize("what", FAULTS_OF_TENSORS)
def test_a_fault_in_the_gradient(what, at, basis):
    recovers(Task(False, basis=basis), at, basis, "gradient", FAULTS[what])


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("at", [1, 20])
@pytest.mark.parametrize("what", FAULTS_OF_TENSORS)
@pytest.mark.parametrize("where", ["factor", "inverse"])
def test_a_fault_in_what_is_kept(where, what, at, basis):
    recovers(Task(False, basis=basis), at, basis, where, FAULTS[what])


# What is done about it.


@pytest.mark.parametrize("at", [1, 2])  # where the next step renews the basis, corrected by it
def test_a_basis_that_is_lost_as_it_is_renewed_is_said_and_leaves_no_layer_where_it_is(at):
    task = Task(False, basis="corrected")
    task.good(at)
    disturb(task, "inverse", FAULTS["nan"])
    with pytest.warns(KronewtonWarning, match="a step was skipped"):
        task.good(1)
    before = [p.detach().clone() for p in task.model.parameters()]
    task.good(2)
    assert not any(map(torch.equal, before, task.model.parameters()))


@pytest.mark.parametrize("basis", [*EVERY, "auto"])
@pytest.mark.parametrize("times", [1e2, 1e8, 1e25])
def test_factors_that_have_grown_by_themselves_are_made_anew(times, basis):
    # Finite numbers: no inversion fails, and every step would be next to nothing from here on.
    task = Task(False, basis=basis)
    task.good(6)
    scale = float(task.optimizer.diagnostics()["scale"])
    for t in task.kept("factor"):
        t.mul_(times)
    task.good(20)
    told = task.optimizer.diagnostics()
    assert float(told["dropped_statistics"]) == 1
    assert 0.1 * scale < float(told["scale"]) < 10 * scale
    assert float(told["lr"]) > 0


@pytest.mark.parametrize("basis", EVERY)
def test_the_batch_that_finds_damaged_factors_takes_their_place(basis):
    task = Task(False, basis=basis, factor_every=1)
    task.good(6)
    for t in task.kept("factor"):
        t.mul_(1e6)
    task.good(1)
    curvature = task.optimizer._curvature
    assert set(curvature.factors) == {"0", "2", "3"}
    assert curvature.scale == pytest.approx(
        sum(float(f.trace()) for f in curvature.factors.values())
        / sum(f.size for f in curvature.factors.values())
    )
    assert curvature.scale < 10


@pytest.mark.parametrize("basis", [*EVERY, "auto"])
def test_an_earlier_state_is_not_taken_for_factors_that_have_grown(basis):
    def rolled(used: bool) -> Task:
        task = Task(False, basis=basis)
        task.good(3)
        state = copy.deepcopy(task.optimizer.state_dict())
        weights = copy.deepcopy(task.model.state_dict())
        if used:
            task.good(30)
            for total in task.optimizer._curvature._last_traces:  # as if it had fallen since
                task.optimizer._curvature._last_traces[total] *= 1e-3
        task.number = 3
        task.model.load_state_dict(weights)
        task.optimizer.load_state_dict(state)
        task.good(6)
        assert float(task.optimizer.diagnostics()["dropped_statistics"]) == 0
        return task

    one, other = rolled(False), rolled(True)
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert p.equal(q)


class Unseen(nn.Module):
    """A matrix whose rows nobody sees: its block is of single entries, in one column."""

    def __init__(self, d: int = 9, seen: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(d, 5)
        self.second = nn.Linear(5, 3)
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        if self.seen:
            return self.second(self.first(x).tanh())
        hidden = torch.einsum("ni,oi->no", x, self.first.weight) + self.first.bias
        return self.second(hidden.tanh())


@pytest.mark.parametrize("basis", [*EVERY, "auto"])
def test_rows_may_come_into_sight_where_damaged_entries_were(basis):
    torch.manual_seed(0)
    x, y = torch.randn(4, 32, 100), torch.randint(3, (4, 32))
    model, criterion = Unseen(100), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, basis=basis, factor_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronewtonWarning)
        for k in range(20):
            if k == 8:
                for t in optimizer._curvature.factors["first (entries)"].totals():
                    t.fill_(math.nan)
                optimizer._drop_damaged()
            model.seen = k >= 8
            optimizer.zero_grad()
            criterion(model(x[k % 4]), y[k % 4]).backward()
            optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert "first" in optimizer._curvature.factors


@pytest.mark.parametrize("basis", [*EVERY, "auto"])
@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_damaged_factors_of_single_entries_are_made_anew(value, basis):
    task = Task(False)
    task.optimizer.close()
    task.model = Unseen()
    task.optimizer = KFAC(task.model, task.criterion, basis=basis)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronewtonWarning)
        task.good(6)
        assert "first (entries)" in task.optimizer._curvature.factors
        for t in task.kept("factor"):
            t.fill_(value)
        before = task.model.first.weight.detach().clone()
        task.good(20)
    assert float(task.optimizer.diagnostics()["dropped_statistics"]) > 0
    assert "first (entries)" in task.optimizer._curvature.factors
    assert not task.model.first.weight.equal(before)


def test_a_preconditioner_makes_its_factors_anew_when_they_have_grown():
    task = Task(False)
    task.optimizer.close()
    scales = []
    front = Preconditioner(task.model, task.criterion)
    behind = torch.optim.SGD(task.model.parameters(), lr=0.01)
    for k in range(20):
        behind.zero_grad()
        x, y = task.batch()
        task.criterion(task.model(x), y).backward()
        front.step()
        behind.step()
        scales.append(float(front.diagnostics()["scale"]))
        if k == 6:
            for layer in front._layers:
                for key, t in front._curvature.tensors(layer.name).items():
                    t.mul_(1e9 if key.endswith("_total") else 1)
    assert float(front.diagnostics()["dropped_statistics"]) == 1
    assert scales[-1] < 10 * scales[6]


def warned(task: Task, count: int, fault: Callable[[Tensor], Tensor]) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", KronewtonWarning)
        for _ in range(count):
            x, y = task.batch()
            task.step(fault(x), y)
    return [str(w.message) for w in said if issubclass(w.category, KronewtonWarning)]


@pytest.mark.parametrize("basis", ["factored", "adam", "orthogonal"])
@pytest.mark.parametrize("at", [0, 5])
def test_too_many_skips_in_a_row_end_in_a_sentence(at, basis):
    task = Task(False, basis=basis, most_skips=3)
    task.good(at)
    before = [p.detach().clone() for p in task.model.parameters()]
    said = warned(task, 3, FAULTS["nan"])
    assert len(said) == 1
    x, y = task.batch()
    with pytest.raises(SkippedError) as caught:
        task.step(FAULTS["nan"](x), y)
    for words in ("4 steps in a row", "finite", "as they were", "most_skips", "checkpoint"):
        assert words in str(caught.value)
    assert isinstance(caught.value, ArithmeticError)
    assert all(p.equal(q) for p, q in zip(task.model.parameters(), before, strict=True))
    assert float(task.optimizer.diagnostics()["skipped"]) == 4
    task.good(2)  # whoever catches it may go on
    assert not next(task.model.parameters()).equal(before[0])


def test_a_good_step_between_bad_ones_starts_the_count_afresh():
    task = Task(False, most_skips=2)
    for _ in range(4):
        warned(task, 2, FAULTS["nan"])
        task.good(1)
    assert float(task.optimizer.diagnostics()["skipped"]) == 8


@pytest.mark.parametrize("kind", ["kfac", "fallback"])
def test_no_skips_allowed_is_an_error_at_once(kind):
    task = Task(False, most_skips=0)
    if kind == "fallback":
        task.optimizer.close()
        task.optimizer = KFAC(list(task.model.parameters()), most_skips=0)
    x, y = task.batch()
    with pytest.warns(KronewtonWarning, match="skipped"), pytest.raises(SkippedError) as caught:
        task.step(FAULTS["nan"](x), y)
    assert str(caught.value).startswith("1 steps in a row were skipped")


def test_what_is_kept_and_damaged_is_dropped_and_made_anew():
    task = Task(False, basis="eigen", factor_every=1, inverse_every=1)
    task.good(5)
    for t in task.kept("factor"):
        t.fill_(math.nan)
    warned(task, 1, lambda x: x)
    assert float(task.optimizer.diagnostics()["dropped_statistics"]) == 1
    task.good(3)
    assert all(bool(torch.isfinite(t).all()) for t in task.kept("factor"))
    task.good(3)
    assert float(task.optimizer.diagnostics()["dropped_statistics"]) == 1


def test_factors_damaged_between_batches_are_dropped_when_their_inversion_fails():
    task = Task(False, basis="eigen", factor_every=100, inverse_every=1)
    task.good(70)  # the next factors are due at step 100
    for t in task.kept("factor"):
        t.fill_(math.nan)
    warned(task, 1, lambda x: x)
    before = float(task.optimizer.diagnostics()["failed_inversions"])
    assert before > 0
    task.good(3)
    assert all(bool(torch.isfinite(t).all()) for t in task.kept("factor"))
    assert float(task.optimizer.diagnostics()["failed_inversions"]) == before


@pytest.mark.parametrize("basis", [*EVERY, "auto"])
@pytest.mark.parametrize("at", [0, 3])
def test_torchs_errors_of_linear_algebra_do_not_reach_the_user(at, basis, monkeypatch):
    def failing(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    def without_result(matrix: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        shape = matrix.shape[:-2]
        return torch.full_like(matrix, math.nan), torch.ones(shape, dtype=torch.int32)

    task = Task(False, basis=basis, factor_every=1, inverse_every=1)
    task.good(at)
    for name in ("eigh", "cholesky", "inv", "solve"):
        monkeypatch.setattr(torch.linalg, name, failing)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", without_result)
    if at or basis in ("adam", "orthogonal", "auto"):  # a good inverse is kept, or none needed
        task.good(2)
        assert float(task.optimizer.diagnostics()["failed_inversions"]) > 0
    else:
        before = next(task.model.parameters()).detach().clone()
        with pytest.raises(NotPositiveDefinite, match=r"layer '0'|'0'"):
            task.good(1)
        assert next(task.model.parameters()).equal(before)
    monkeypatch.undo()
    task.good(2)


def test_a_huge_gradient_does_not_stay_in_the_second_moments():
    for make in (lambda m, c: KFAC(m, c, basis="adam"), lambda m, c: KFAC(list(m.parameters()))):
        task = Task(False)
        task.optimizer.close()
        task.optimizer = make(task.model, task.criterion)
        x, y = task.batch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KronewtonWarning)
            task.step(x, y, lambda g: g * 1e25)
        before = next(task.model.parameters()).detach().clone()
        task.good(2)
        assert not next(task.model.parameters()).equal(before)


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def out_of_python(*_: object, **__: object) -> None:
    raise MemoryError


def out_of_allocator(*_: object, **__: object) -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def of_nan(matrix: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    return torch.ones_like(matrix[..., 0]), torch.full_like(matrix, math.nan)


INVERTING = ("eigh", "cholesky_ex", "cholesky", "inv", "solve")
GONE = {"GPU": out_of_memory, "Python": out_of_python, "CPU": out_of_allocator}


@pytest.mark.parametrize("basis", [*EVERY, "auto"])
@pytest.mark.parametrize("where", GONE)
def test_memory_that_runs_out_in_an_inversion_keeps_the_last_good_one(where, basis, monkeypatch):
    task = Task(False, basis=basis, factor_every=1, inverse_every=1)
    task.good(5)
    kept = [t.clone() for t in task.kept("inverse")]
    for name in INVERTING:
        monkeypatch.setattr(torch.linalg, name, GONE[where])
    task.good(1)
    assert float(task.optimizer.diagnostics()["failed_inversions"]) > 0
    if basis != "corrected":  # whose eigenvalues, in the old basis, are measured in every batch
        assert all(a.equal(b) for a, b in zip(task.kept("inverse"), kept, strict=True))
    monkeypatch.undo()
    task.good(AFTER)
    assert task.loss() <= WORSE * undisturbed(6, False, basis)


@pytest.mark.parametrize("basis", ["factored", "eigen"])
@pytest.mark.parametrize("where", GONE)
def test_memory_that_runs_out_in_the_first_inversion_is_said(where, basis, monkeypatch):
    task = Task(False, basis=basis)
    before = next(task.model.parameters()).detach().clone()
    for name in INVERTING:
        monkeypatch.setattr(torch.linalg, name, GONE[where])
    with pytest.raises(NotPositiveDefinite, match=r"not enough memory .*'0'; give it a lower larg"):
        task.good(1)
    assert next(task.model.parameters()).equal(before)
    monkeypatch.undo()
    task.good(2)


def test_another_error_is_not_taken_for_memory(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake")

    task = Task(False, basis="factored", factor_every=1, inverse_every=1)
    task.good(3)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        task.good(1)


@pytest.mark.parametrize("basis", ["eigen", "corrected", "adam", "orthogonal"])
def test_eigenvectors_that_are_nan_are_not_taken(basis, monkeypatch):
    task = Task(False, basis=basis, factor_every=1, inverse_every=1)
    task.good(5)
    monkeypatch.setattr(torch.linalg, "eigh", of_nan)
    task.good(2)
    assert float(task.optimizer.diagnostics()["failed_inversions"]) > 0
    assert float(task.optimizer.diagnostics()["skipped"]) == 0
    assert all(bool(torch.isfinite(t).all()) for t in task.kept("inverse"))


def test_a_cholesky_that_fails_is_tried_again_with_more_on_the_diagonal(monkeypatch):
    own, tried = torch.linalg.cholesky_ex, []

    def once(matrix: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        factor, info = own(matrix, **options)
        tried.append(matrix.dtype)
        return factor, info + (matrix.dtype == torch.float32)

    task = Task(False, basis="factored", factor_every=1, inverse_every=1)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", once)
    task.good(3)
    assert torch.float64 in tried
    assert float(task.optimizer.diagnostics()["failed_inversions"]) == 0
