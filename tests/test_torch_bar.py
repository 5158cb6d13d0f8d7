"""What torch's own suite asks of an optimizer, with AdamW beside K-FAC as the control."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from kronewton import KFAC
from kronewton.errors import ModelError, OptionError, UnsupportedError

pytestmark = pytest.mark.usefixtures("float64")

X, Y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 4
Make = Callable[..., Optimizer]


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))


class Task:
    """A model, its criterion and its optimizer: `kfac`, `fallback` (a bare list) or `adamw`."""

    def __init__(self, kind: str, model: nn.Module | None = None, groups=None, **options) -> None:
        self.model, self.criterion = net() if model is None else model, nn.CrossEntropyLoss()
        params = list(self.model.parameters()) if groups is None else groups(self.model)
        if kind == "kfac":
            self.optimizer = KFAC(params, self.criterion, model=self.model, **options)
        else:
            self.optimizer = {"adamw": AdamW, "fallback": KFAC}[kind](params, **options)

    def backward(self, sign: float = 1.0) -> Tensor:
        self.optimizer.zero_grad()
        loss = sign * self.criterion(self.model(X), Y)
        loss.backward()
        return loss.detach()

    def steps(self, count: int, sign: float = 1.0) -> list[float]:
        losses = []
        for _ in range(count):
            losses.append(float(self.backward(sign)))
            self.optimizer.step()
        return losses

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


EVERY = pytest.mark.parametrize("kind", ["kfac", "fallback", "adamw"])
BOTH = pytest.mark.parametrize("kind", ["kfac", "adamw"])
NUMERIC = {"kfac": {"lr": 0.5, "momentum": 0.0, "damping": 0.1, "trust_region": None,
                    "fisher": "exact"}, "fallback": {}, "adamw": {}}  # fmt: skip


# The constructor.


@EVERY
@pytest.mark.parametrize("option", [{"lr": -1.0}, {"weight_decay": -0.1}, {"unknown": 1}])
def test_options_that_are_none(kind, option):
    words = {"lr": "lr|learning rate"}.get(name := next(iter(option)), name)
    with pytest.raises((ValueError, TypeError), match=words):
        Task(kind, **option)


@EVERY
@pytest.mark.parametrize(
    "wrong",
    ["parameter", "empty", "strings", "numbers", "set", "no params", "non-leaf", "two groups"],
)
def test_parameters_that_are_none(kind, wrong):
    p = nn.Parameter(torch.zeros(3))
    given = {
        "parameter": p, "empty": [], "strings": ["weight"], "numbers": [1, 2],
        "set": [{"params": {p}}], "no params": [{"lr": 1.0}], "non-leaf": [p * 2],
        "two groups": [{"params": [p]}, {"params": [p]}],
    }[wrong]  # fmt: skip
    make = AdamW if kind == "adamw" else KFAC
    model = net() if kind == "kfac" else None
    with pytest.raises((ValueError, TypeError, KeyError)):
        make(given) if model is None else make(given, model=model)
    if model is not None:
        assert not model._forward_hooks


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (nn.Parameter(torch.zeros(3)), "given as Parameter; a model, or a list of parameters"),
        ({nn.Parameter(torch.zeros(3))}, "given as set"),
        (3, "given as int"),
        ([{"lr": 1.0}], "has the keys 'lr' and no 'params'"),
        ([{"params": {nn.Parameter(torch.zeros(3))}}], "'params' of a parameter group is a set"),
    ],
)
def test_parameters_that_are_none_end_in_a_sentence(given, words):
    with pytest.raises(ModelError, match=words):
        KFAC(given)


@EVERY
def test_a_parameter_twice_in_a_group_is_warned_of_and_counts_once(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twice = Task(kind, groups=lambda m: [*m.parameters(), *m.parameters()], **NUMERIC[kind])
    with pytest.warns(UserWarning, match="duplicate"):
        Task(kind, groups=lambda m: [*m.parameters(), *m.parameters()])
    once = Task(kind, **NUMERIC[kind])
    twice.steps(1)
    once.steps(1)
    if kind != "adamw":  # which moves it twice
        assert twice.weights().equal(once.weights())


class Complex(nn.Module):
    """A weight of complex numbers beside a layer that K-FAC covers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.linear, self.phase = nn.Linear(3, 4), nn.Parameter(torch.randn(4) + 1j)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.phase).real


@EVERY
def test_complex_parameters_are_named_and_trained_as_adamw_does(kind):
    task, control = Task(kind, Complex()), Complex()
    adamw = AdamW([control.phase], lr=1e-3, weight_decay=0.0 if kind != "adamw" else 1e-2)
    for _ in range(3):
        control.linear.load_state_dict(task.model.linear.state_dict())
        adamw.zero_grad()
        task.criterion(control(X), Y).backward()
        adamw.step()
        task.steps(1)
    torch.testing.assert_close(task.model.phase, control.phase)
    if kind == "kfac":
        (row,) = [r for r in task.optimizer.coverage().rows if r.parameter == "phase"]
        assert (row.method, row.why) == ("AdamW", "it is not real floating-point numbers")
        with pytest.raises(ModelError, match=r"strict=True.*phase \(it is not real floating"):
            KFAC(task.model, task.criterion, strict=True)


def test_maximize_is_one_for_all_groups():
    with pytest.raises(UnsupportedError, match=r"maximize=True of its own.*to KFAC"):
        KFAC([{"params": list(net().parameters()), "maximize": True}])
    with pytest.raises(OptionError, match="maximize must be True or False, not 'yes'"):
        KFAC(net(), maximize="yes")


@pytest.mark.parametrize("options", [{}, {"fisher": "empirical"}, {"basis": "adam"}])
@BOTH
def test_maximize_climbs_what_minus_descends(kind, options):
    options = options if kind == "kfac" else {}
    up = Task(kind, maximize=True, **options)
    losses = up.steps(6)
    assert losses[-1] > losses[0]
    if kind == "kfac":
        assert float(up.optimizer.diagnostics()["undone"]) == 0
    if kind == "adamw":
        down = Task(kind)
        down.steps(6, sign=-1.0)
        torch.testing.assert_close(up.weights(), down.weights())


@pytest.mark.parametrize("options", [{}, {"lr": 0.5, "momentum": 0.2, "damping": 0.1},
                                     {"basis": "adam", "lr": 0.01}])  # fmt: skip
def test_a_maximised_loss_is_the_descent_of_the_other_gradient(options):
    # K-FAC keeps the curvature and turns loss and gradient: with a gradient that the user turned
    # beforehand, `maximize` is plain descent on the loss, but for what is judged by the loss.
    plain, turned = net(), net()
    criterion = nn.CrossEntropyLoss()
    options = {"trust_region": None, "fisher": "exact", **options}
    if "damping" not in options and "basis" not in options:
        options |= {"damping": 0.1}  # the loss is not judged
    one = KFAC(plain, criterion, **options)
    two = KFAC(turned, criterion, maximize=True, **options)
    for _ in range(4):
        for model, optimizer in ((plain, one), (turned, two)):
            optimizer.zero_grad()
            criterion(model(X), Y).backward()
            if optimizer is two:
                for p in model.parameters():
                    p.grad.neg_()
            optimizer.step()
    for p, q in zip(plain.parameters(), turned.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_fallback_maximises_too():
    p = nn.Parameter(torch.ones(2))
    optimizer = KFAC([p], maximize=True, fallback_lr=0.1)
    p.sum().backward()
    optimizer.step()
    assert bool((p > 1).all())


# Groups and their options.


@EVERY
def test_each_group_has_its_own_lr_and_decay(kind):
    def groups(model: nn.Module) -> list[dict]:
        first, last = list(model[0].parameters()), list(model[2].parameters())
        return [{"params": first, "lr": 0.0}, {"params": last, "weight_decay": 0.5}]

    task = Task(kind, groups=groups, **NUMERIC[kind])
    before = copy.deepcopy(task.model)
    task.steps(1)
    assert task.model[0].weight.equal(before[0].weight)
    assert not task.model[2].weight.equal(before[2].weight)
    assert [g["weight_decay"] for g in task.optimizer.param_groups][1] == 0.5


@EVERY
@pytest.mark.parametrize("later", [False, True])
def test_weight_decay_shrinks_and_can_be_changed_later(kind, later):
    plain = Task(kind, weight_decay=0.0, **NUMERIC[kind])
    task = Task(kind, weight_decay=0.0 if later else 0.1, **NUMERIC[kind])
    if later:
        task.optimizer.param_groups[0]["weight_decay"] = 0.1
    start = plain.weights()
    plain.steps(1)
    task.steps(1)
    lr = {"kfac": 0.5, "fallback": 1e-3, "adamw": 1e-3}[kind]
    torch.testing.assert_close(task.weights() - plain.weights(), -0.1 * lr * start)


@EVERY
def test_a_group_is_added_and_trained(kind):
    task = Task(kind)
    task.steps(1)
    extra = nn.Parameter(torch.zeros(4))
    task.optimizer.add_param_group({"params": [extra], "lr": 0.5})
    task.model.register_parameter("extra", extra)
    task.optimizer.zero_grad()
    task.criterion(task.model(X) + extra, Y).backward()
    task.optimizer.step()
    assert bool(extra.any())
    assert task.optimizer.param_groups[1]["lr"] == 0.5
    with pytest.raises(ValueError, match="more than one parameter group"):
        task.optimizer.add_param_group({"params": [extra]})
    with pytest.raises((ValueError, TypeError)):
        task.optimizer.add_param_group({"params": {extra}})


@EVERY
def test_lr_may_be_a_tensor(kind):
    options = NUMERIC[kind]
    one, other = (
        Task(kind, **{**options, "lr": lr}) for lr in (0.25, torch.tensor(0.25))
    )  # fmt: skip
    assert isinstance(other.optimizer.param_groups[0]["lr"], Tensor)
    one.steps(2)
    other.steps(2)
    torch.testing.assert_close(one.weights(), other.weights())
    other.optimizer.param_groups[0]["lr"].zero_()
    before = other.weights()
    other.steps(1)
    assert other.weights().equal(before)


@EVERY
@pytest.mark.parametrize("lr", [torch.tensor([0.1, 0.2]), torch.tensor(-1.0)])
def test_an_lr_of_several_elements_or_below_zero_is_refused(kind, lr):
    with pytest.raises(ValueError, match=r"lr|learning rate"):
        Task(kind, lr=lr)


@BOTH
def test_a_tensor_lr_is_a_factor_of_the_automatic_one(kind):
    task = Task(kind, groups=lambda m: [{"params": list(m.parameters()), "lr": torch.tensor(0.0)}])
    before = task.weights()
    task.steps(1)
    assert task.weights().equal(before)


# Schedules.

SCHEDULES: dict[str, Callable[[Optimizer], schedulers.LRScheduler]] = {
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 4),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.5, 6, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.5)]
    ),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=2),
}  # fmt: skip


def test_every_schedule_of_torch_is_here():
    kinds = {
        name
        for name, kind in vars(schedulers).items()
        if isinstance(kind, type) and issubclass(kind, schedulers.LRScheduler)
    }
    assert kinds - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULES)


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
@EVERY
def test_every_schedule_sets_what_the_next_step_uses(kind, name, automatic):
    options = {} if automatic else NUMERIC[kind]
    task, control = Task(kind, **options), AdamW([nn.Parameter(torch.zeros(1))])
    control.param_groups[0]["lr"] = task.optimizer.param_groups[0]["lr"]
    schedule, theirs = SCHEDULES[name](task.optimizer), SCHEDULES[name](control)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a scheduler's own argument `epoch`
        for _ in range(5):
            task.steps(1)
            control.step()
            for one in (schedule, theirs):
                one.step(1.0) if name == "ReduceLROnPlateau" else one.step()
            assert task.optimizer.param_groups[0]["lr"] == control.param_groups[0]["lr"]
    task.optimizer.param_groups[0]["lr"] = 0.0
    before = task.weights()
    task.steps(1)
    assert task.weights().equal(before)


@EVERY
def test_averages_of_the_model(kind):
    task = Task(kind)
    mean = AveragedModel(task.model)
    ema = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    seen = []
    for _ in range(4):
        task.steps(1)
        mean.update_parameters(task.model)
        ema.update_parameters(task.model)
        seen.append(task.weights())
    found = torch.cat([p.detach().flatten() for p in mean.module.parameters()])
    torch.testing.assert_close(found, torch.stack(seen).mean(0))
    twin = Task(kind)
    twin.steps(4)
    assert twin.weights().equal(task.weights())
    before = task.weights()
    task.criterion(ema(X), Y).backward()  # the average is a model, and not the watched one
    assert task.weights().equal(before)


# Hooks.


@EVERY
def test_hooks_before_and_after_the_step(kind):
    task, log = Task(kind), []
    first = task.optimizer.register_step_pre_hook(lambda *_: log.append(task.weights()))
    task.optimizer.register_step_post_hook(lambda *_: log.append(task.weights()))
    start = task.weights()
    task.steps(1)
    before, after = log
    assert before.equal(start)
    assert after.equal(task.weights())
    assert not after.equal(start)
    first.remove()
    task.steps(1)
    assert len(log) == 3


@EVERY
def test_a_hook_before_the_step_may_change_the_gradients(kind):
    task = Task(kind, **NUMERIC[kind])

    def zeros(*_: object) -> None:
        for p in task.model.parameters():
            p.grad.zero_()

    task.optimizer.register_step_pre_hook(zeros)
    before = task.weights()
    task.optimizer.param_groups[0]["weight_decay"] = 0.0
    task.steps(1)
    assert task.weights().equal(before)


@EVERY
def test_hooks_around_the_state_see_all_of_it(kind):
    task, log = Task(kind), []
    task.steps(2)
    full = task.optimizer.state_dict()
    task.optimizer.register_state_dict_pre_hook(lambda _: log.append("before saving"))

    def after(_: Optimizer, state: dict) -> dict:
        assert state["state"][0].keys() == full["state"][0].keys()
        return {"inner": state, "more": 3}

    task.optimizer.register_state_dict_post_hook(after)
    task.optimizer.register_load_state_dict_pre_hook(lambda _, state: state["inner"])
    task.optimizer.register_load_state_dict_post_hook(
        lambda o: log.append(sorted(o.state_dict()["inner"]["state"][0]))
    )
    saved = copy.deepcopy(task.optimizer.state_dict())
    assert saved["more"] == 3
    task.steps(2)
    end, losses = task.weights(), []
    task.optimizer.load_state_dict(saved)
    assert log == ["before saving", "before saving", sorted(full["state"][0])]
    assert not losses
    assert end.equal(task.weights())  # loading a state moves nothing


# Gradients.


@pytest.mark.parametrize("set_to_none", [True, False])
@EVERY
def test_zero_grad_either_way(kind, set_to_none):
    task = Task(kind, weight_decay=0.0, **NUMERIC[kind])
    task.backward()
    task.optimizer.zero_grad(set_to_none=set_to_none)
    before = task.weights()
    for p in task.model.parameters():
        assert p.grad is None if set_to_none else not bool(p.grad.any())
    task.optimizer.step()
    assert task.weights().equal(before)
    task.steps(1)
    assert not task.weights().equal(before)


@EVERY
def test_no_gradient_no_step_and_no_state(kind):
    task = Task(kind, weight_decay=0.1)
    before = task.weights()
    task.optimizer.step()
    assert task.weights().equal(before)
    assert len(task.optimizer.state) == 0


@EVERY
def test_a_parameter_without_gradient_stays(kind):
    task = Task(kind, weight_decay=0.1, **NUMERIC[kind])
    task.backward()
    bias = task.model[0].bias
    before, bias.grad = bias.clone(), None
    weight = task.model[0].weight.clone()
    task.optimizer.step()
    assert bias.equal(before)
    assert not task.model[0].weight.equal(weight)


class Odd(nn.Module):
    """Tables with sparse gradients, weights of no elements and of other strides."""

    def __init__(self, sparse: bool = False, turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Embedding(9, 5, sparse=sparse)
        self.linear, self.none = nn.Linear(5, 4), nn.Linear(0, 4, bias=False)
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        if turned:
            self.linear.weight = nn.Parameter(self.linear.weight.detach().t().contiguous().t())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens.long().sum(1).abs() % 9)
        return self.linear(x) + self.none(x[:, :0]) + self.nothing.sum()


def odd_run(kind: str, **form) -> tuple[Task, list[float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, of weights without elements
        task = Task(kind, Odd(**form))
    return task, task.steps(4)


@pytest.mark.parametrize("form", [{"turned": True}, {"sparse": True}])
@EVERY
def test_strides_and_sparse_gradients_change_nothing(kind, form):
    plain, losses = odd_run(kind)
    assert losses[-1] < losses[0]
    if form.get("sparse") and kind == "adamw":
        with pytest.raises(RuntimeError, match="sparse"):
            odd_run(kind, **form)
        return
    other, _ = odd_run(kind, **form)
    assert plain.model.linear.weight.shape == other.model.linear.weight.shape
    # Sums round by where tensors lie in memory, and normalised steps make more of it.
    torch.testing.assert_close(plain.weights(), other.weights(), rtol=1e-6, atol=1e-9)
    assert other.model.linear.weight.is_contiguous() is not bool(form.get("turned"))


@EVERY
def test_closures_run_with_gradients_and_their_loss_is_returned(kind):
    task, seen = Task(kind), []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        return task.backward()

    with torch.no_grad():
        loss = task.optimizer.step(closure)
    assert seen == [True]
    assert float(loss) == pytest.approx(float(nn.CrossEntropyLoss()(net()(X), Y)))


@EVERY
@pytest.mark.parametrize("count", [1, 40])
def test_losses_fall(kind, count):
    # Rosenbrock's valley, for what torch's suite asks of steps as such.
    p = nn.Parameter(torch.tensor([1.5, 1.5]))
    optimizer = AdamW([p], lr=1e-2) if kind == "adamw" else KFAC([p], fallback_lr=1e-2)

    def value() -> Tensor:
        return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2

    start = float(value().detach())
    for _ in range(count):
        optimizer.zero_grad()
        value().backward()
        optimizer.step()
    assert float(value().detach()) < start


# Copies and states.


def copied(task: Task, how: Callable) -> Task:
    other = copy.copy(task)
    other.model, other.criterion, other.optimizer = how(
        (task.model, task.criterion, task.optimizer)
    )
    return other


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda given: pickle.loads(pickle.dumps(given))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps", [0, 3])
@EVERY
def test_a_copy_goes_on_as_the_original_and_apart_from_it(kind, steps, how):
    task = Task(kind)
    schedule = schedulers.ExponentialLR(task.optimizer, 0.9)
    task.steps(steps)
    if steps:
        schedule.step()
    other = copied(task, COPIES[how])
    assert other.optimizer.param_groups[0]["params"][0] is next(iter(other.model.parameters()))
    assert other.optimizer.param_groups[0]["lr"] == task.optimizer.param_groups[0]["lr"]
    before = task.weights()
    other.steps(3)
    assert task.weights().equal(before)
    task.steps(3)
    assert task.weights().equal(other.weights())


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_keeps_every_option(how):
    options = {"basis": "corrected", "fisher": "exact", "seed": 7, "sharing": {"*": "reduce"}}
    optimizer = KFAC(net(), nn.CrossEntropyLoss(), **options)
    assert COPIES[how](optimizer).options == optimizer.options
    names = [{n for n in vars(o) if n[0] != "_"} for o in (optimizer, COPIES[how](optimizer))]
    assert names[0] == names[1]


@EVERY
def test_it_can_be_printed(kind):
    text = repr(Task(kind, weight_decay=0.25).optimizer)
    assert text.startswith("AdamW" if kind == "adamw" else "KFAC")
    assert "weight_decay: 0.25" in text


@EVERY
def test_state_is_made_by_the_first_step(kind):
    task = Task(kind)
    assert len(task.optimizer.state) == 0
    fresh = task.optimizer.state_dict()
    task.steps(1)
    full = task.optimizer.state_dict()
    assert len(full["state"]) == 4
    assert len(fresh["state"]) < 2  # K-FAC's random stream is there from the beginning
    assert all(isinstance(i, int) for i in full["state"])


@EVERY
def test_a_state_is_read_into_other_hyperparameters(kind):
    task = Task(kind, **{**NUMERIC[kind], "lr": 0.25, "weight_decay": 0.1})
    task.steps(2)
    state = copy.deepcopy(task.optimizer.state_dict())
    lr = 0.25 if kind == "fallback" else 0.5  # where a group's lr is a factor of fallback_lr
    other = Task(kind, **{**NUMERIC[kind], "lr": lr, "weight_decay": 0.0})
    other.model.load_state_dict(task.model.state_dict())
    other.optimizer.load_state_dict(state)
    group = other.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.1)
    task.steps(2)
    other.steps(2)
    torch.testing.assert_close(task.weights(), other.weights(), rtol=1e-12, atol=0)
    state["param_groups"][0]["lr"] = 0.0
    other.optimizer.load_state_dict(state)
    before = other.weights()
    other.steps(1)
    assert other.weights().equal(before)


@EVERY
def test_a_state_of_other_groups_is_refused(kind):
    state = Task(kind).optimizer.state_dict()
    half = Task(kind, groups=lambda m: [{"params": list(m[0].parameters())}])
    with pytest.raises(ValueError, match="group"):
        half.optimizer.load_state_dict(state)


@EVERY
def test_the_same_run_twice_is_the_same(kind):
    one, two = Task(kind), Task(kind)
    one.steps(5)
    two.steps(5)
    assert one.weights().equal(two.weights())
    assert math.isfinite(float(one.weights().sum()))
