"""The running average of the weights: what it is, when it is in the model, and that it is saved."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kronewton import KFAC
from kronewton.errors import KronewtonWarning, ModelError, OptionError, StateError

pytestmark = pytest.mark.usefixtures("float64")


class Scaled(nn.Module):
    """A linear layer, and a parameter of no kind: AdamW trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.ones(5, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) * self.scale.abs())


class Run:
    """A training on batches that differ, and the weights after each step."""

    def __init__(self, model: Callable[[], nn.Module] = Scaled, **options) -> None:
        torch.manual_seed(0)
        self.model, self.criterion = model(), nn.MSELoss()
        self.optimizer = KFAC(self.model, self.criterion, **{"averaging": 0.8, **options})
        self.seen: list[list[Tensor]] = []
        self.number = 0

    def step(self, factor: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(self.number)
        self.number += 1
        dtype = list(self.model.parameters())[-1].dtype
        x, y = (torch.randn(8, n, generator=generator).to(dtype) for n in (3, 2))
        self.optimizer.zero_grad()
        self.criterion(self.model(factor * x), y).backward()
        self.optimizer.step()
        self.seen.append(self.weights())

    def steps(self, count: int) -> Run:
        for _ in range(count):
            self.step()
        return self

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def averaged(self) -> list[Tensor]:
        with self.optimizer.averaged():
            return self.weights()


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(p.equal(q) for p, q in zip(one, other, strict=True))


def shares(decay: float, n: int) -> list[float]:
    """What each of n steps has in the average, the last one last."""
    past = [min(decay, 1 - 1 / k) for k in range(1, n + 1)]
    return [(1 - past[k]) * math.prod(past[k + 1 :]) for k in range(n)]


def mean_of(seen: list[list[Tensor]], decay: float) -> list[Tensor]:
    weighted = zip(seen, shares(decay, len(seen)), strict=True)
    scaled = [[share * p for p in weights] for weights, share in weighted]
    return [torch.stack(one).sum(0) for one in zip(*scaled, strict=True)]


# What it is.


def test_the_shares_are_equal_at_first_and_one_in_all():
    assert shares(0.8, 5) == pytest.approx([0.2] * 5)
    assert sum(shares(0.8, 30)) == pytest.approx(1)
    assert shares(0.8, 30)[-2:] == pytest.approx([0.16, 0.2])


@pytest.mark.parametrize("options", [{}, {"basis": "adam"}, {"refine": 2}, {"fisher": "empirical"}])
@pytest.mark.parametrize("steps", [1, 4, 12])
def test_it_is_the_average_of_the_steps_and_not_of_the_start(options, steps):
    run = Run(**options).steps(steps)
    assert len(run.seen[0]) == 5  # the one of AdamW's among them
    torch.testing.assert_close(run.averaged(), mean_of(run.seen, 0.8), rtol=1e-12, atol=1e-14)
    assert same(run.averaged(), run.seen[-1]) is (steps == 1)


def test_a_bare_list_of_parameters_is_averaged_too():
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3))
    optimizer, seen = KFAC([parameter], averaging=0.8), []
    for k in range(12):
        parameter.grad = torch.randn(3, generator=torch.Generator().manual_seed(k))
        optimizer.step()
        seen.append([parameter.detach().clone()])
    with optimizer.averaged():
        torch.testing.assert_close([parameter.detach()], mean_of(seen, 0.8))


def test_a_group_that_is_added_is_averaged_from_its_own_first_step():
    run = Run().steps(12)
    late = nn.Parameter(torch.zeros(2))
    run.optimizer.add_param_group({"params": [late], "lr": 1.0})
    run.optimizer.register_step_pre_hook(lambda *_: setattr(late, "grad", torch.ones(2)))
    seen = []
    for _ in range(2):
        run.step()
        seen.append([late.detach().clone()])
    with run.optimizer.averaged():
        torch.testing.assert_close([late.detach()], mean_of(seen, 0.8))
        assert not late.equal(seen[-1][0])


def test_of_bf16_weights_it_is_kept_in_float32_and_rounded_where_it_is_used():
    run = Run(lambda: nn.Linear(3, 2).bfloat16(), averaging=0.95).steps(30)
    kept = [run.optimizer.state_dict()["state"][i]["kfac_average"] for i in range(2)]
    assert [t.dtype for t in kept] == [torch.float32] * 2
    exact = mean_of([[p.double() for p in weights] for weights in run.seen], 0.95)
    torch.testing.assert_close([t.double() for t in kept], exact, rtol=1e-5, atol=1e-6)
    assert same(run.averaged(), [t.bfloat16() for t in kept])


def test_a_model_that_was_cast_in_between_keeps_its_average():
    run = Run(lambda: nn.Linear(3, 2).float(), basis="factored").steps(3)
    run.model.double()
    run.steps(3)
    exact = mean_of([[p.double() for p in weights] for weights in run.seen], 0.8)
    torch.testing.assert_close(run.averaged(), exact, rtol=1e-5, atol=1e-6)


# Nothing new.


def test_before_the_first_step_the_weights_are_as_they_are():
    run = Run()
    assert same(run.averaged(), run.weights())


def test_a_skipped_step_adds_nothing():
    run = Run().steps(4)
    before = run.averaged()
    with pytest.warns(KronewtonWarning, match="skipped"):
        run.step(math.nan)
    assert same(run.averaged(), before)
    run.step()
    del run.seen[4]
    torch.testing.assert_close(run.averaged(), mean_of(run.seen, 0.8))


def test_a_step_that_is_taken_back_adds_nothing(monkeypatch):
    run = Run().steps(4)
    before = run.averaged()
    with monkeypatch.context() as patch:
        patch.setattr(run.optimizer._planner, "judges", lambda *args: True)
        patch.setattr(run.optimizer._planner, "judge", lambda *args: False)
        run.step()
    assert same(run.seen[-1][1:], run.seen[-2][1:])
    assert not same(run.seen[-1][:1], run.seen[-2][:1])  # AdamW's own step stays
    assert same(run.averaged(), before)
    run.step()
    assert not same(run.averaged(), before)


def test_a_call_of_step_without_a_batch_adds_nothing():
    run = Run(lambda: nn.Linear(3, 2)).steps(4)
    before = run.averaged()
    for set_to_none in (True, False):  # the other leaves zeros
        run.optimizer.zero_grad(set_to_none)
        run.optimizer.step()
    assert same(run.averaged(), before)


# In the model, and out of it.


def test_training_does_not_notice_it():
    plain, watched = Run(averaging=0.0).steps(12), Run()
    x = torch.randn(4, 3)
    for _ in range(12):
        watched.step()
        with watched.optimizer.averaged(), torch.no_grad():
            watched.criterion(watched.model(x), torch.zeros(4, 2))
        assert same(watched.weights(), watched.seen[-1])
    assert all(same(a, b) for a, b in zip(watched.seen, plain.seen, strict=True))


def test_between_backward_and_step_it_changes_nothing_either():
    plain, watched = Run().steps(8), Run()
    step = watched.optimizer.step

    def later() -> None:
        with watched.optimizer.averaged(), torch.no_grad():
            watched.model(torch.ones(2, 3))
        step()

    watched.optimizer.step = later
    watched.steps(8)
    assert same(watched.weights(), plain.weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_exception_inside_puts_the_weights_back(dtype):
    run = Run(lambda: nn.Linear(3, 2).to(dtype)).steps(6)

    def evaluate() -> None:
        with run.optimizer.averaged():
            assert not same(run.weights(), run.seen[-1])
            run.model.weight.data.fill_(math.nan)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        evaluate()
    assert same(run.weights(), run.seen[-1])
    run.step()  # and the optimizer is as before
    assert all(bool(torch.isfinite(p).all()) for p in run.weights())


def test_under_inference_mode():
    run = Run().steps(6)
    expected = run.averaged()
    with torch.inference_mode(), run.optimizer.averaged():
        assert same(run.weights(), expected)
    run.step()


def test_running_statistics_are_not_averaged():
    run = Run(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    run.steps(6)
    before = [b.clone() for b in run.model.buffers()]
    with run.optimizer.averaged():
        assert same(list(run.model.buffers()), before)
        batches = [torch.randn(8, 3) for _ in range(3)]
        torch.optim.swa_utils.update_bn(batches, run.model)
        fresh = [b.clone() for b in run.model.buffers()]
    assert not fresh[0].equal(before[0])
    assert same(list(run.model.buffers()), fresh)
    assert same(run.weights(), run.seen[-1])


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda run: run.optimizer.averaged().__enter__(), "averaged() a second time"),
        (lambda run: run.step(), "step()"),
        (lambda run: run.optimizer.step(lambda: 1 / 0), "step()"),
        (lambda run: run.optimizer.load_state_dict({}), "load_state_dict()"),
        (lambda run: copy.deepcopy(run.optimizer), "a copy"),
    ],
)
def test_what_must_not_meet_averaged_weights_is_refused(act, what):
    run = Run().steps(6)
    expected = run.averaged()
    with run.optimizer.averaged():
        with pytest.raises(ModelError) as caught:
            act(run)
        assert same(run.weights(), expected)
    assert str(caught.value).startswith(f"{what} was called inside `with optimizer.averaged()`")
    assert str(caught.value).endswith("Leave the context first.")
    assert same(run.weights(), run.seen[5])
    run.step()


def test_without_averaging_it_says_what_to_do():
    run = Run(averaging=0.0).steps(2)
    with pytest.raises(OptionError, match=r"Make the optimizer with averaging=0.95, or evaluate"):
        run.averaged()
    assert not [k for e in run.optimizer.state_dict()["state"].values() for k in e if "aver" in k]


# Saved.


def stored(state: dict) -> dict:
    stream = io.BytesIO()
    torch.save(state, stream)
    return torch.load(io.BytesIO(stream.getvalue()), weights_only=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cut", [0, 1, 3, 9])
def test_a_resumed_average_is_the_uninterrupted_one_bit_for_bit(cut, dtype):
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)

    whole, first = Run(model).steps(12), Run(model).steps(cut)
    resumed = Run(model)
    resumed.model.load_state_dict(stored(first.model.state_dict()))
    resumed.optimizer.load_state_dict(stored(first.optimizer.state_dict()))
    resumed.number = cut
    assert same(resumed.averaged(), first.averaged())
    resumed.steps(12 - cut)
    assert same(resumed.weights(), whole.weights())
    kept = [run.optimizer.state_dict()["state"] for run in (resumed, whole)]
    for i in range(4):
        assert kept[0][i]["kfac_average"].equal(kept[1][i]["kfac_average"])


def test_the_average_of_a_parameter_of_the_fallbacks_is_saved_and_not_cast():
    run = Run().steps(7)
    again = Run()
    again.optimizer.load_state_dict(stored(run.optimizer.state_dict()))
    with again.optimizer.averaged():
        assert again.model.scale.dtype == torch.complex128
        assert same(again.weights(), run.averaged())


def test_a_state_without_an_average_starts_one_and_one_that_is_not_asked_for_is_left():
    plain, run = Run(averaging=0.0).steps(3), Run().steps(5)
    run.optimizer.load_state_dict(plain.optimizer.state_dict())
    assert same(run.averaged(), run.weights())
    run.step()
    assert same(run.averaged(), run.weights())
    plain.optimizer.load_state_dict(run.optimizer.state_dict())
    assert "kfac_average" not in plain.optimizer.state_dict()["state"][0]


def test_a_saved_average_is_not_changed_by_later_steps():
    run = Run().steps(5)
    state, expected = run.optimizer.state_dict(), run.averaged()
    run.steps(3)
    run.optimizer.load_state_dict(state)
    run.step()
    again = Run()
    again.optimizer.load_state_dict(state)
    assert same(again.averaged(), expected)


def test_an_average_of_another_shape_is_refused():
    run = Run().steps(2)
    state = run.optimizer.state_dict()
    state["state"][1]["kfac_average"] = torch.zeros(7)
    with pytest.raises(StateError, match=r"an average of shape \(7,\) for parameter 'first.*"):
        run.optimizer.load_state_dict(state)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_copy_has_an_average_of_its_own(how):
    run = Run(lambda: nn.Linear(3, 2)).steps(6)
    whole = (run.model, run.criterion, run.optimizer)
    model, _, optimizer = how(whole)
    expected = run.averaged()
    run.steps(3)
    assert not same(run.averaged(), expected)
    with optimizer.averaged():
        assert same([p.detach() for p in model.parameters()], expected)
