"""Whatever the options and the order of the calls: a clear error or a finite step, nothing else."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from draws import Drawn, of_kfac, of_preconditioner, play
from kronewton import KFAC, Preconditioner
from kronewton.errors import (
    CriterionError,
    KronewtonWarning,
    ModelError,
    OptionError,
    StateError,
)

BOTH = pytest.mark.parametrize("kind", ["KFAC", "Preconditioner"])
DRAWS = {"KFAC": (of_kfac, 250), "Preconditioner": (of_preconditioner, 250)}
MANY = 10_000
any_time = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def each(kind: str, how: settings, what: Callable[[Drawn], object]) -> None:
    """Do it with each draw."""

    @settings(how)
    @given(DRAWS[kind][0])
    def run(one: Drawn) -> None:
        what(one)

    run()


@BOTH
def test_a_clear_error_or_a_finite_step(kind: str) -> None:
    each(kind, settings(any_time, max_examples=DRAWS[kind][1], derandomize=True), play)


@pytest.mark.slow
@BOTH
def test_a_clear_error_or_a_finite_step_ten_thousand_times(kind: str) -> None:
    each(kind, settings(any_time, max_examples=MANY), play)


def drawn(*calls: tuple[str, int], **changed: Any) -> Drawn:
    """A plain draw, with some of it changed."""
    plain = {"model": "mlp", "criterion": "classes", "given": "model", "with_model": False,
             "behind": "", "options": {}, "strange": None, "calls": list(calls),
             "seed": 0}  # fmt: skip
    return Drawn(**{**plain, **changed})


@BOTH
def test_most_draws_reach_a_step(kind: str) -> None:
    made: list[bool] = []
    how = settings(any_time, max_examples=100, derandomize=True)
    each(kind, how, lambda one: made.append(play(one) > 0))
    assert sum(made) > 0.4 * len(made)


@pytest.mark.parametrize("fault", ["raised", "moved", "not finite"])
def test_a_draw_of_kfac_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: KFAC, closure: Any = None) -> None:
        if fault != "raised":
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan if fault == "not finite" else 9)
        if fault != "not finite":
            raise RuntimeError("torch's") if fault == "raised" else OptionError("a sentence.")

    monkeypatch.setattr(KFAC, "step", broken)
    error = RuntimeError if fault == "raised" else AssertionError
    said = {"raised": "torch's", "moved": "moved, and raised", "not finite": "after train"}
    with pytest.raises(error, match=said[fault]):
        play(drawn(("train", 1)))


@pytest.mark.parametrize("fault", ["raised", "moved", "changed", "left", "not finite"])
def test_a_draw_of_preconditioner_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def broken(self: Preconditioner, scaler: Any = None) -> None:
        p = next(self._watched.model.parameters())
        if fault == "raised":
            raise RuntimeError("torch's")
        if fault == "moved":
            p.mul_(2)
        elif fault == "changed":
            p.grad.mul_(2)
            raise OptionError("a sentence.")
        elif fault == "left":
            p.grad.fill_(1e30)

    error: Any = RuntimeError if fault == "raised" else AssertionError
    said = {"raised": "torch's", "moved": "moved a weight", "changed": "changed gradients, and",
            "left": "left gradients", "not finite": "after train"}  # fmt: skip
    if fault == "not finite":
        monkeypatch.setattr(torch.optim.SGD, "step", lambda self: spoil(self))
    else:
        monkeypatch.setattr(Preconditioner, "step", broken)
    with pytest.raises(error, match=said[fault]):
        play(drawn(("train", 1), behind="SGD"))


@torch.no_grad()
def spoil(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"][0].fill_(math.nan)


# What the draws have found.


class Training:
    """A small training, with a parameter that AdamW trains where `curved` is not set."""

    def __init__(self, curved: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.model, self.criterion = nn.Linear(3, 2), nn.MSELoss()
        given: Any = self.model if curved else list(self.model.parameters())
        self.optimizer = KFAC(given, self.criterion if curved else None, **options)

    def step(self) -> None:
        p = next(self.model.parameters())
        x, y = torch.randn(8, 3, dtype=p.dtype), torch.randn(8, 2, dtype=p.dtype)
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        self.optimizer.step()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.mark.parametrize("curved", [True, False])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, -1.0, 1e300, "fast", None])
def test_a_group_that_was_changed_is_checked_before_a_step(curved, name, value):
    training = Training(curved)
    training.step()
    before = training.weights()
    training.optimizer.param_groups[0][name] = value
    with pytest.raises(OptionError, match=f"{name} must be a number ≥ 0"):
        training.step()
    assert training.weights().equal(before)


@pytest.mark.parametrize(("lr", "decay"), [("auto", 1001.0), (0.5, 2.01)])
def test_a_decay_that_takes_more_than_the_weights_is_refused(lr, decay):
    training = Training(lr=lr, weight_decay=decay)
    before = training.weights()
    with pytest.raises(OptionError, match=r"take 1\.0\d+ times the weights away"):
        training.step()
    assert training.weights().equal(before)
    training.optimizer.param_groups[0]["weight_decay"] = decay / 1.01
    training.step()
    assert not training.weights().equal(before)


@pytest.mark.parametrize("options", [{"fallback_lr": 1e20}, {"lr": 5e-324}])
def test_a_fallback_that_would_overflow_is_refused(options):
    training = Training(curved=False, **options)
    training.optimizer.param_groups[0]["lr"] = 0.5
    before = training.weights()
    with pytest.raises(OptionError, match="parameters without curvature would be trained with lr"):
        training.step()
    assert training.weights().equal(before)


def test_a_fallbacks_decay_that_takes_more_than_the_weights_is_refused():
    training = Training(curved=False, weight_decay=2.0)
    training.optimizer.param_groups[0]["lr"] = 501.0  # times fallback_lr, and times the decay
    with pytest.raises(OptionError, match=r"take 1\.0\d+ times the weights away"):
        training.step()


def test_a_group_that_was_changed_is_checked_before_its_lr_is_told():
    training = Training()
    training.step()
    training.optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(OptionError, match="lr must be a number"):
        training.optimizer.diagnostics()


@pytest.mark.parametrize("name", ["damping", "momentum", "trust_region", "lr"])
def test_whole_numbers_of_more_bits_than_torch_takes_are_numbers(name):
    training = Training(**{name: 2**64})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronewtonWarning)
        for _ in range(3):
            training.step()
    assert bool(torch.isfinite(training.weights()).all())


def test_directions_are_not_averaged_over_a_step_that_is_next_to_nothing():
    play(
        drawn(("cast", 55), ("clip", 35), ("train", 1), ("bad_batch", 3), ("train", 2),
              options={"refine": 1, "trust_region": 5e-324}, model="embedding", criterion="two")
    )  # fmt: skip


@pytest.mark.parametrize("sharing", ["auto", "best"])
def test_a_model_may_be_cast_between_two_parts_of_a_step(sharing):
    calls = [("grads_by_hand", 3), ("cast", 0), ("observe", 0)]
    play(drawn(*calls, model="attention", options={"sharing": sharing}))


@pytest.mark.parametrize("basis", ["factored", "eigen", "corrected"])
def test_rows_that_come_into_sight_take_the_place_of_entries(basis):
    calls = [("freeze", 0), ("train", 0), ("train", 0), ("closure", 0), ("resume", 0), ("train", 0)]
    play(drawn(*calls, model="attention", behind="Adagrad", options={"basis": basis}))


@pytest.mark.parametrize("options", [{"lr": 1e30}, {"lr": 0.1, "momentum": 1e30}])
def test_a_step_that_would_overflow_is_skipped(options):
    training = Training(damping=1e-6, trust_region=None, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronewtonWarning)
        for _ in range(5):
            training.step()
    assert bool(torch.isfinite(training.weights()).all())
    assert float(training.weights().abs().max()) < 1e20
    assert float(training.optimizer.diagnostics()["skipped"]) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{"basis": "adam"}, {"curved": False}])
def test_moments_follow_a_model_that_is_cast(options, dtype, monkeypatch):
    def failing(*_: object) -> None:
        raise torch.linalg.LinAlgError("so that there is no basis, and no factor's dtype")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    training = Training(**options)
    for _ in range(3):
        training.step()
    training.model.to(dtype)
    before = training.weights()
    training.step()
    assert training.weights().dtype == dtype
    assert not training.weights().equal(before)


@pytest.mark.parametrize("given", [[1, 2], ["weight"], [None]])
def test_parameters_that_are_none_are_refused(given):
    with pytest.raises(ModelError, match="torch refuses these parameters: optimizer can only"):
        KFAC(given)


def test_a_group_that_is_none_and_one_that_torch_refuses():
    training = Training()
    with pytest.raises(ModelError, match=r"add_param_group\(\) was given NoneType; a table"):
        training.optimizer.add_param_group(None)
    named = KFAC(list(training.model.named_parameters()))
    with pytest.raises(ModelError, match=r"torch refuses these parameters.*names for all"):
        named.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_the_state_of_a_model_with_another_parameter_is_refused():
    training = Training()
    training.step()
    training.model.weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ModelError, match=r"'weight' of layer .* is another parameter than when"):
        training.optimizer.state_dict()


class Tied(nn.Module):
    """W x, or W'x if `turned`."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.turned = nn.Linear(9, 10, bias=False), False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x @ self.table.weight if self.turned else self.table(x)
        return y


@pytest.mark.parametrize("basis", ["factored", "eigen", "corrected", "adam", "orthogonal"])
def test_a_model_that_is_cast_between_two_uses_of_a_weight(basis):
    torch.manual_seed(0)
    model, criterion = Tied(), nn.MSELoss()
    optimizer = KFAC(model, criterion, basis=basis, factor_every=1, inverse_every=1)
    for turned, dtype in ((False, torch.float32), (True, torch.float64)):
        model.to(dtype)
        model.turned = turned
        for _ in range(2):
            optimizer.zero_grad()
            output = model(torch.randn(5, 10 if turned else 9, dtype=dtype))
            before = model.table.weight.detach().clone()
            criterion(output, torch.ones_like(output)).backward()
            optimizer.step()
            assert not model.table.weight.equal(before)
    kept = optimizer._curvature.tensors("table")
    assert kept["A_total"].dtype == torch.float32
    assert kept["A_total (turned)"].dtype == torch.float64


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_corrected_eigenvalues_follow_a_model_that_is_cast(dtypes, fisher):
    every = {"factor_every": 1, "inverse_every": 3}
    training = Training(basis="corrected", fisher=fisher, **every)
    for dtype in dtypes:
        training.model.to(dtype)
        for _ in range(5):
            before = training.weights()
            training.step()
            assert training.weights().dtype == dtype
            assert not training.weights().equal(before)


def test_the_dial_takes_sparse_gradients():
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 5))
        criterion = nn.CrossEntropyLoss()
        optimizer = KFAC(model, criterion, refine=3)
        for _ in range(3):
            optimizer.zero_grad()
            criterion(model(torch.randint(0, 5, (8, 3))), torch.randint(0, 5, (8,))).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_batches_of_before_a_cast_are_not_asked():
    training = Training(curvature_batches=3)
    for dtype, kept in ((torch.float32, 2), (torch.float64, 1)):
        training.model.to(dtype)
        for _ in range(2 if dtype == torch.float32 else 1):
            training.step()
        assert len(training.optimizer._planner.batches._earlier) == kept
    assert not math.isnan(training.optimizer.diagnostics()["predicted"])


def test_an_output_without_a_gradient_is_not_observed():
    training = Training()
    with torch.no_grad():
        output = training.model(torch.randn(4, 3))
    with pytest.raises(CriterionError, match="an output that does not require a gradient"):
        training.optimizer.observe(output, torch.zeros(4, 2), training.criterion)


@pytest.mark.parametrize("given", [0.5, "scaler", lambda: 1.0, torch.ones(2)])
def test_what_is_no_scaler_is_refused(given):
    preconditioner = Preconditioner(nn.Linear(3, 2), nn.MSELoss())
    with pytest.raises(OptionError, match=r"a GradScaler or nothing is allowed"):
        preconditioner.step(given)


def test_a_skipped_step_leaves_no_gradient_to_what_came_later():
    model, criterion = nn.Sequential(nn.Linear(3, 2)), nn.MSELoss()
    preconditioner = Preconditioner(model, criterion)
    model.append(nn.Linear(2, 2))
    criterion(model(torch.full((4, 3), math.nan)), torch.zeros(4, 2)).backward()
    with pytest.warns(KronewtonWarning):
        preconditioner.step()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("value", ["much", None, math.nan, -1, 10**400, torch.ones(2), {}])
@pytest.mark.parametrize("key", ["version", "basis", "steps", "skipped", "scale", "generator"])
def test_a_preconditioners_state_is_read_entry_by_entry(key, value):
    preconditioner = Preconditioner(nn.Linear(3, 2), nn.MSELoss())
    state = preconditioner.state_dict()
    with pytest.raises(StateError, match=r"start afresh|that wrote it|was saved with"):
        preconditioner.load_state_dict({**state, key: value})
    assert preconditioner.state_dict().keys() == state.keys()


@pytest.mark.parametrize("value", ["much", None, 0.5, torch.tensor(1j)])
def test_a_state_with_something_else_in_a_tensors_place_is_refused(value):
    training = Training()
    training.step()
    state = copy.deepcopy(training.optimizer.state_dict())
    state["state"][0]["kfac_A_total"] = value
    with pytest.raises(StateError, match=r"for 'A_total' of (parameter|layer) .*it is damaged"):
        training.optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("exp_avg", None, "has None for 'exp_avg' of parameter"),
        ("exp_avg_sq", torch.ones(()), r"'exp_avg_sq' of shape \(\) for parameter"),
        ("step", torch.tensor(math.nan), "'step' of parameter .* finite number ≥ 0"),
        ("step", True, "has True for 'step' of parameter"),
    ],
)
def test_a_fallbacks_damaged_moments_are_refused(key, value, words):
    training = Training(curved=False)
    training.step()
    state = copy.deepcopy(training.optimizer.state_dict())
    state["state"][0][key] = value
    with pytest.raises(StateError, match=words):
        training.optimizer.load_state_dict(state)
    del state["state"][0][key]
    with pytest.raises(StateError, match=r"holds only .* of the moments of parameter"):
        training.optimizer.load_state_dict(state)
