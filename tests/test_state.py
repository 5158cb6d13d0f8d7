"""What is saved, that it is enough to go on as if nothing had happened, and what is refused."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from kronewton import KFAC, state
from kronewton.errors import StateError

pytestmark = pytest.mark.usefixtures("float64")


BASES = ("factored", "eigen", "corrected", "adam", "orthogonal")
FISHERS = ("exact", "sampled", "empirical")
NUMERIC = {"lr": 0.3, "momentum": 0.5, "damping": 0.05, "trust_region": None}
SHORT = {"factor_every": 2, "inverse_every": 3, "adapt_every": 2}
STEPS = 8


def mixed(width: int = 5) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, width), nn.LayerNorm(width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 4)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(6, 3, generator=generator)
    return x, torch.randint(0, 4, (6,), generator=generator)


class Run:
    """A training that can be cut: the state is that of the model and of the optimizer."""

    def __init__(self, model: nn.Module | None = None, **options) -> None:
        torch.manual_seed(1)
        self.model, self.criterion = mixed() if model is None else model, nn.CrossEntropyLoss()
        self.optimizer = KFAC(self.model, self.criterion, **options)

    def steps(self, numbers: range) -> Run:
        for number in numbers:
            torch.manual_seed(number)
            x, y = batch(number)
            self.optimizer.zero_grad()
            self.criterion(self.model(x), y).backward()
            self.optimizer.step()
        return self

    def saved(self) -> bytes:
        stream = io.BytesIO()
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(states, stream)
        return stream.getvalue()

    def load(self, saved: bytes) -> Run:
        states = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        return self

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def values(nest: object) -> Iterator[object]:
    if isinstance(nest, dict):
        for key, value in nest.items():
            yield key
            yield from values(value)
    elif isinstance(nest, (list, tuple)):
        for value in nest:
            yield from values(value)
    else:
        yield nest


@pytest.mark.parametrize("settings", ["automatic", "numeric"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("basis", BASES)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(basis, fisher, settings):
    options = {"basis": basis, "fisher": fisher, **SHORT}
    options |= {"automatic": {}, "numeric": NUMERIC}[settings]
    if basis in ("adam", "orthogonal"):
        options.pop("damping", None)  # it has none
    whole = Run(**options).steps(range(STEPS))
    for cut in (0, 1, 4, 7):
        first = Run(**options).steps(range(cut))
        resumed = Run(**options).load(first.saved()).steps(range(cut, STEPS))
        assert resumed.weights().equal(whole.weights()), f"cut before step {cut}"
        one, other = whole.optimizer.diagnostics(), resumed.optimizer.diagnostics()
        for key in ("step", "damping", "inverse_damping", "noise", "scale", "lr", "momentum"):
            assert torch.equal(one[key].nan_to_num(), other[key].nan_to_num()), key


@pytest.mark.parametrize("options", [{}, {"fisher": "empirical"}, {"weight_decay": 0.1}])
def test_a_resumed_training_with_the_default_schedules(options):
    whole = Run(**options).steps(range(STEPS))
    resumed = Run(**options).load(Run(**options).steps(range(3)).saved()).steps(range(3, STEPS))
    assert resumed.weights().equal(whole.weights())


def test_a_resumed_training_without_a_criterion():
    class Bare(Run):
        def __init__(self) -> None:
            torch.manual_seed(1)
            self.model, self.criterion = mixed(), nn.CrossEntropyLoss()
            self.optimizer = KFAC(self.model)

    whole = Bare().steps(range(STEPS))
    resumed = Bare().load(Bare().steps(range(3)).saved()).steps(range(3, STEPS))
    assert resumed.weights().equal(whole.weights())


def test_a_schedule_of_the_lr_is_resumed():
    def run() -> tuple[Run, torch.optim.lr_scheduler.LRScheduler]:
        made = Run(**NUMERIC)
        return made, torch.optim.lr_scheduler.ExponentialLR(made.optimizer, 0.5)

    whole, scheduler = run()
    for step in range(4):
        whole.steps(range(step, step + 1))
        scheduler.step()
        if step == 1:
            saved, schedule = whole.saved(), scheduler.state_dict()
    resumed, scheduler = run()
    resumed.load(saved)
    scheduler.load_state_dict(schedule)
    for step in range(2, 4):
        resumed.steps(range(step, step + 1))
        scheduler.step()
    assert resumed.weights().equal(whole.weights())


@pytest.mark.parametrize("cut", [0, 3])
def test_going_back_in_the_same_optimizer_is_starting_there(cut):
    options = {"fisher": "sampled", "basis": "corrected", **SHORT}
    run = Run(**options).steps(range(cut))
    saved = run.saved()
    run.steps(range(cut, STEPS))
    gone_back = run.load(saved).steps(range(cut, STEPS)).weights()
    assert gone_back.equal(Run(**options).steps(range(STEPS)).weights())


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_state_is_tensors_and_numbers_under_its_parameters(basis, steps):
    run = Run(basis=basis).steps(range(steps))
    state = run.optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    count = len(list(run.model.parameters()))
    assert set(state["state"]) <= set(range(count))
    assert all(isinstance(t, Tensor) for entry in state["state"].values() for t in entry.values())
    assert all(isinstance(v, (Tensor, int, float, str, bool)) for v in values(state))
    run.load(run.saved())  # weights_only=True


def test_a_state_does_not_change_with_the_steps_that_follow():
    run = Run(basis="corrected").steps(range(3))
    state = run.optimizer.state_dict()
    ours = {
        (i, k): t.clone()
        for i, entry in state["state"].items()
        for k, t in entry.items()
        if k.startswith("kfac_")
    }
    run.steps(range(3, 6))
    assert len(ours) > 5
    assert all(
        torch.equal(state["state"][i][k].nan_to_num(), t.nan_to_num()) for (i, k), t in ours.items()
    )


def test_a_loaded_state_is_not_shared_with_the_one_that_was_given():
    state = Run().steps(range(3)).optimizer.state_dict()
    kept = copy.deepcopy(state)
    run = Run()
    run.optimizer.load_state_dict(state)
    run.steps(range(3, 6))
    for index, entry in kept["state"].items():
        for key, tensor in entry.items():
            if key.startswith("kfac_"):
                assert torch.equal(state["state"][index][key].nan_to_num(), tensor.nan_to_num())


def test_a_damping_that_is_given_wins_over_the_saved_one():
    saved = Run().steps(range(3)).optimizer.state_dict()
    run = Run(damping=0.123)
    run.optimizer.load_state_dict(saved)
    assert float(run.optimizer.diagnostics()["damping"]) == 0.123


@pytest.mark.parametrize("basis", BASES)
def test_half_precision_parameters_keep_their_factors_in_float32(basis):
    saved = Run(mixed().float(), basis=basis)
    for step in range(3):
        x, y = batch(step)
        saved.optimizer.zero_grad()
        saved.criterion(saved.model(x.float()), y).backward()
        saved.optimizer.step()
    state = saved.optimizer.state_dict()
    run = Run(mixed().bfloat16(), basis=basis)
    run.optimizer.load_state_dict(state)
    for name in ("0", "4"):
        kept, wanted = (r.optimizer._curvature.tensors(name) for r in (run, saved))
        assert kept.keys() == wanted.keys()
        for key, tensor in kept.items():
            assert tensor.dtype == (torch.float64 if key == "moments_left" else torch.float32)
            assert tensor.equal(wanted[key])
    assert all(p.dtype == torch.bfloat16 for p in run.model.parameters())


# Refused.


def refused(run: Run, state: object) -> str:
    weights, before = run.weights(), copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(StateError) as caught:
        run.optimizer.load_state_dict(state)
    assert isinstance(caught.value, ValueError)
    assert run.weights().equal(weights)
    after = run.optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for index, entry in before["state"].items():
        for key, tensor in entry.items():
            assert torch.equal(after["state"][index][key].nan_to_num(), tensor.nan_to_num())
    return str(caught.value)


@pytest.mark.parametrize(
    "garbage",
    [None, [], 3, "path.pt", {}, {"state": {}}, {"state": [], "param_groups": []},
     {"state": {0: 1}, "param_groups": []}],
)  # fmt: skip
def test_what_is_no_state_is_refused(garbage):
    message = refused(Run().steps(range(2)), garbage)
    assert "state_dict" in message


def test_the_state_of_another_optimizer_is_refused():
    model = mixed()
    other = torch.optim.AdamW(model.parameters())
    model(batch(0)[0]).sum().backward()
    other.step()
    message = refused(Run().steps(range(2)), other.state_dict())
    assert "not one of this version's KFAC" in message
    assert "start afresh" in message


def test_another_version_is_refused():
    run = Run().steps(range(2))
    state = copy.deepcopy(run.optimizer.state_dict())
    state["state"][0]["kfac_scalars"][0] = 99
    assert "not one of this version's KFAC (format 8)" in refused(run, state)
    state["state"][0]["kfac_scalars"] = state["state"][0]["kfac_scalars"][:3]
    assert "not one of this version's KFAC" in refused(run, state)


def test_a_state_of_other_groups_is_refused_with_both_counts():
    state = Run(nn.Sequential(nn.Linear(3, 4))).steps(range(2)).optimizer.state_dict()
    message = refused(Run().steps(range(1)), state)
    assert "[2]" in message
    assert "[6]" in message
    assert "as it was when the state was saved" in message


def test_a_state_of_other_shapes_is_refused_with_the_parameters_name():
    state = Run(mixed(width=7)).steps(range(2)).optimizer.state_dict()
    message = refused(Run().steps(range(1)), state)
    assert "'0.weight'" in message
    assert "(7, 3)" in message
    assert "(5, 3)" in message


def test_other_shapes_are_found_where_no_step_was_saved():
    state = copy.deepcopy(Run(mixed(width=7)).steps(range(2)).optimizer.state_dict())
    for entry in state["state"].values():
        entry.pop("kfac_previous", None)  # as after a step that was taken back
    assert "another model" in refused(Run().steps(range(1)), state)


@pytest.mark.parametrize("given", BASES)
@pytest.mark.parametrize("saved", BASES)
def test_a_state_of_another_basis_is_refused(saved, given):
    state = Run(basis=saved).steps(range(4)).optimizer.state_dict()
    run = Run(basis=given)
    if saved != given:
        assert "basis" in refused(run, state)
        return
    run.optimizer.load_state_dict(state)
    run.steps(range(4, 7))
    assert torch.isfinite(run.weights()).all()
    undamped = math.isnan(float(run.optimizer.diagnostics()["damping"]))
    assert undamped == (given in ("adam", "orthogonal"))


@pytest.mark.parametrize("key", state.WHOLE)
@pytest.mark.parametrize("value", [-1.0, 0.5, math.inf, 1e300])
def test_numbers_that_are_not_whole_are_refused(key, value):
    saved = Run().steps(range(2)).optimizer.state_dict()
    saved["state"][0]["kfac_scalars"][state.SCALARS.index(key)] = value
    other = Run()
    before = other.weights()
    with pytest.raises(StateError, match=rf"for '{key}', which is a whole number from 0 to"):
        other.optimizer.load_state_dict(saved)
    assert other.weights().equal(before)


@pytest.mark.parametrize("what", ["A_count", "chance"])
@pytest.mark.parametrize("count", [torch.ones(3), torch.ones(1, 1)])
def test_a_count_that_is_no_single_number_is_refused(count: Tensor, what: str) -> None:
    saved = Run().steps(range(2)).optimizer.state_dict()
    other = Run()
    before = other.weights()
    key = next(k for k in saved["state"][0] if k.endswith(what))
    saved["state"][0][key] = count
    with pytest.raises(
        StateError, match=r"a count of shape \(.*\) for layer '.*', which needs \(\)"
    ):
        other.optimizer.load_state_dict(saved)
    assert other.weights().equal(before)


@pytest.mark.parametrize("basis", BASES)
def test_an_inverse_of_other_shapes_is_refused_before_anything_changes(basis: str) -> None:
    saved = Run(basis=basis).steps(range(2)).optimizer.state_dict()
    keys = [
        (i, key)
        for i, kept in saved["state"].items()
        for key, found in kept.items()
        if "inverse_" in key and found.numel()
    ]
    assert len(keys) >= 4
    for i, key in keys:
        damaged = copy.deepcopy(saved)
        damaged["state"][i][key] = damaged["state"][i][key][..., 1:]
        other = Run(basis=basis)
        before = other.weights()
        with pytest.raises(
            StateError, match=r"of an inverse of shape \(.*\) for layer '.*', which"
        ):
            other.optimizer.load_state_dict(damaged)
        assert other.weights().equal(before)


@pytest.mark.parametrize("basis", BASES)
def test_a_state_that_lacks_any_part_of_a_layer_is_refused_by_name(basis: str) -> None:
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, basis=basis)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
        optimizer.step()
    parts = ("kfac_A_", "kfac_B_", "kfac_inverse_", "kfac_moments_")
    keys = [k for k in optimizer.state_dict()["state"][0] if k.startswith(parts)]
    assert len(keys) >= 6
    for key in keys:
        state = optimizer.state_dict()
        state["state"][0].pop(key)
        with pytest.raises(StateError, match="it is damaged"):
            KFAC(model, criterion, basis=basis).load_state_dict(state)


DAMAGE: dict[str, Callable[[dict], object]] = {
    "no generator": lambda s: s["state"][0].pop("kfac_generator"),
    "rows that are no number": lambda s: s["state"][0].update(kfac_seen=torch.tensor(math.nan)),
    "rows that are several": lambda s: s["state"][0].update(kfac_seen=torch.ones(2)),
    "steps of an average": lambda s: s["state"][0].update(
        kfac_average_steps=torch.tensor(math.nan)
    ),
    "no count of corrected values": lambda s: s["state"][0].pop("kfac_s_count"),
    "a sparse factor": lambda s: s["state"][0].update(
        kfac_A_total=s["state"][0]["kfac_A_total"].to_sparse()
    ),
    "a group without lr": lambda s: s["param_groups"][0].pop("lr"),
    "a group with a word for weight_decay": lambda s: s["param_groups"][0].update(weight_decay="x"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_refused_before_anything_is_changed(what):
    run = Run(basis="corrected", averaging=0.9).steps(range(3))
    other = Run(basis="corrected", averaging=0.9).steps(range(2))
    saved, before = run.optimizer.state_dict(), other.weights()
    DAMAGE[what](saved)
    with pytest.raises(StateError, match=r"damaged|another model|start afresh"):
        other.optimizer.load_state_dict(saved)
    assert other.weights().equal(before)
    assert int(other.optimizer.diagnostics()["step"]) == 2


def test_an_empty_inverse_is_refused():
    run = Run(basis="factored", damping=0.1).steps(range(3))
    saved = run.optimizer.state_dict()
    saved["state"][0]["kfac_inverse_A_inverse"] = torch.zeros(0)
    with pytest.raises(StateError, match="A_inverse of an inverse of shape"):
        Run(basis="factored", damping=0.1).optimizer.load_state_dict(saved)
