"""Whatever the options and the order of the calls: a clear error or a finite step, nothing else."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from draws import Drawn, World, draws, play
from kronewton import KFAC
from kronewton.errors import KronewtonWarning, ModelError, OptionError

SOME, MANY = 500, 10_000
any_time = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@settings(any_time, max_examples=SOME, derandomize=True)
@given(draws)
def test_a_clear_error_or_a_finite_step(drawn: Drawn) -> None:
    play(drawn)


@pytest.mark.slow
@settings(any_time, max_examples=MANY)
@given(draws)
def test_a_clear_error_or_a_finite_step_ten_thousand_times(drawn: Drawn) -> None:
    play(drawn)


def drawn(*calls: tuple[str, int], **changed: Any) -> Drawn:
    """A plain draw, with some of it changed."""
    plain = {"model": "mlp", "criterion": "classes", "given": "model", "with_model": False,
             "options": {}, "strange": None, "calls": list(calls), "seed": 0}  # fmt: skip
    return Drawn(**{**plain, **changed})


def test_most_draws_reach_a_step() -> None:
    steps: list[int] = []

    class Counting(World):
        def step(self, closure: Any = None) -> None:
            steps.append(1)
            super().step(closure)

    made: list[int] = []

    @settings(any_time, max_examples=100, derandomize=True)
    @given(draws)
    def count(one: Drawn) -> None:
        before = len(steps)
        play(one, Counting)
        made.append(len(steps) > before)

    count()
    assert sum(made) > 0.4 * len(made)


@pytest.mark.parametrize("fault", ["raised", "moved", "not finite"])
def test_a_draw_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
