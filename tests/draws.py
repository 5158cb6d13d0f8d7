"""Draws of the constructor's options and of what a user may call in whatever order."""

from __future__ import annotations

import abc
import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import kronewton as kn
from kronewton.errors import KronewtonError, KronewtonWarning, SkippedError
from kronewton.options import CurvatureOptions

HOUSE = str(Path(kn.__file__).parent)

# Options. Tensors and arrays are made anew for each draw, so that none is changed by another.

Make = Callable[[], Any]
HUGE = 10**400  # a whole number that no float holds
STRANGE: list[Make] = [
    lambda: None,
    lambda: "much",
    lambda: "auto",
    lambda: True,
    lambda: -1,
    lambda: -0.5,
    lambda: 1,
    lambda: math.nan,
    lambda: math.inf,
    lambda: 1e300,
    lambda: HUGE,
    lambda: 2**64,
    lambda: 1j,
    lambda: [0.1],
    dict,
    lambda: {3: 1},
    lambda: {"*": None},
    lambda: {"*": 0},
    lambda: {"no layer": "expand"},
    lambda: object(),
    lambda: nn.Linear,
    lambda: np.float32(0.5),
    lambda: np.array([0.1, 0.2]),
    lambda: torch.tensor(0.5),
    lambda: torch.tensor(math.nan),
    lambda: torch.tensor([0.1, 0.2]),
    lambda: torch.tensor([]),
    lambda: torch.tensor(1j),
]
RATES = (0, 0.0, 5e-324, 1e-6, 0.01, 0.3, 1, 10.0, 1e20, 1e30)
EVERY = ("auto", 1, 2, 3, 2**62)
VALID: dict[str, tuple[Any, ...]] = {
    "lr": ("auto", *RATES),
    "momentum": ("auto", *RATES),
    "damping": ("auto", *RATES),
    "weight_decay": RATES,
    "trust_region": ("auto", None, *RATES),
    "fisher": ("sampled", "exact", "empirical"),
    "sharing": ("auto", "expand", "reduce", "best", {"*": "best"}, {}),
    "basis": ("auto", "factored", "eigen", "corrected", "adam", "orthogonal"),
    "refine": (0, 1, 3),
    "refine_tolerance": RATES,
    "curvature_batches": (1, 2, 2**62),
    "factor_every": EVERY,
    "inverse_every": EVERY,
    "adapt_every": EVERY,
    "factor_decay": ("auto", 0, 0.5, 1 - 1e-16),
    "largest_side": (1, 2, 4, 2**62, {"*": 2}),
    "draws": (1, 2),
    "fallback_lr": RATES,
    "strict": (False, True),
    "seed": (0, 7, 2**64 - 1),
    "maximize": (False, True),
    "most_skips": (0, 1, 50, 2**62),
    "averaging": (0.0, 0.5, 1 - 1e-16),
}
OF_PRECONDITIONER: dict[str, tuple[Any, ...]] = {
    **{field.name: VALID[field.name] for field in fields(CurvatureOptions)},
    "grafting": ("layer", "global", None),
    "trust_region": (*["auto", None] * 5, *RATES),  # numbers need grafting=None
}
LOOPED = ("refine", "draws", "curvature_batches")  # a huge one is allowed, and takes for ever


def options(valid: dict[str, tuple[Any, ...]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(sorted(valid)), st.integers(0, 10**6), max_size=4).map(
        lambda found: {name: valid[name][i % len(valid[name])] for name, i in found.items()}
    )


def strange(valid: dict[str, tuple[Any, ...]]) -> st.SearchStrategy[tuple[str, int] | None]:
    found = st.tuples(st.sampled_from(sorted(valid)), st.integers(0, len(STRANGE) - 1))
    return st.one_of(*[st.none()] * 9, found)


# Models, each with its inputs and targets.


class Tied(nn.Module):
    """A table that is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.table(x)))  # (N, 3, 4)
        return (h @ self.table.weight.mT).transpose(1, 2)


class Attends(nn.Module):
    """One layer of attention, with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Lone(nn.Module):
    """Parameters of no layer, one of them used by a function, and one by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.scale = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.ones(5))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.W) * self.scale


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(4, 5))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2, padding=1), nn.BatchNorm1d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def tokens(n: int) -> Tensor:
    return torch.randint(0, 5, (n, 3))


def words(sparse: bool = False) -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 5))


@dataclass(frozen=True)
class Kind:
    """A model, and what it takes."""

    make: Callable[[], nn.Module]
    x: Callable[[int], Tensor] = lambda n: torch.randn(n, 3)
    at: tuple[int, ...] = ()  # positions of the output, behind the examples


KINDS = {
    "mlp": Kind(mlp),
    "conv": Kind(conv),
    "embedding": Kind(words, tokens),
    "sparse": Kind(lambda: words(sparse=True), tokens),
    "attention": Kind(Attends, lambda n: torch.randn(n, 3, 4)),
    "tied": Kind(Tied, tokens, (3,)),
    "lone": Kind(Lone),
}
CRITERIA: dict[str, Callable[[], Any]] = {
    "classes": nn.CrossEntropyLoss,
    "classes, summed": lambda: nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
    "squares": nn.MSELoss,
    "nothing": lambda: None,
    "two": lambda: [nn.MSELoss(), nn.CrossEntropyLoss()],
    "unreduced": lambda: nn.MSELoss(reduction="none"),
    "function": lambda: nn.functional.cross_entropy,
    "word": lambda: "mse",
    "a list with None": lambda: [None, nn.MSELoss()],
    "class": lambda: nn.MSELoss,
}
GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "model": lambda m: m,
    "parameters": lambda m: m.parameters(),
    "list": lambda m: list(m.parameters()),
    "names": lambda m: list(m.named_parameters()),
    "groups": lambda m: [
        {"params": list(m.parameters())[:1], "lr": 0.5},
        {"params": list(m.parameters())[1:], "weight_decay": 0.1},
    ],
    "strange group": lambda m: [{"params": list(m.parameters()), "lr": "fast"}],
    "numbers": lambda m: [1, 2],
    "none": lambda m: None,
    "empty": lambda m: [],
    "table": lambda m: {"params": list(m.parameters())},
    "tensor": lambda m: next(m.parameters()),
}
OFTEN = 25  # times as likely as a strange one


def mostly(common: list[str], rare: list[str]) -> st.SearchStrategy[str]:
    return st.sampled_from(common * OFTEN + rare)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True, maximize=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    "two groups": lambda ps: torch.optim.NAdam([{"params": ps[:1], "lr": 0.1}, {"params": ps[1:]}]),
    "some": lambda ps: torch.optim.SGD(ps[-2:], lr=0.1),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2], 0.02)


class UsersOwn(Exception):
    """What the model, the criterion or autograd raised at the user's own call."""


class Noticed(AssertionError):
    """What must not be."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Noticed(what)


class World(abc.ABC):
    """A model, what watches it (`ours`), the optimizer that moves it, and what is done with them.

    steps: how many have moved a weight.
    """

    def __init__(self, drawn: Drawn) -> None:
        torch.manual_seed(drawn.seed)
        self.drawn, self.kind, self.steps = drawn, KINDS[drawn.model], 0
        self.model, self.criterion = self.kind.make(), CRITERIA[drawn.criterion]()
        self.dtype = torch.float32
        self.ours, self.optimizer = self.made(self.model, self.criterion)

    @abc.abstractmethod
    def made(self, model: nn.Module, criterion: Any) -> tuple[Any, Optimizer]:
        """What watches the model, and the optimizer."""

    @abc.abstractmethod
    def make_step(self, closure: Callable[[], Any] | None) -> None:
        """All that a step is."""

    @abc.abstractmethod
    def scaled_step(self, scaler: torch.amp.GradScaler, n: int) -> None:
        """The same with a GradScaler."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        before = self.weights()
        self.make_step(closure)
        self.steps += not self.same(before)

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def same(self, before: list[Tensor]) -> bool:
        return all(_equal(p, q) for p, q in zip(self.model.parameters(), before, strict=True))

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        x = self.kind.x(n)
        x = x.to(self.dtype) if x.is_floating_point() else x
        return x, torch.randint(0, 5, (n, *self.kind.at))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The forward pass and the loss, as the user writes them."""
        output, criterion = self.model(x), self.criterion
        every = criterion if isinstance(criterion, list) else [criterion]
        total = torch.zeros(())
        for one in every:
            one = one if isinstance(one, nn.Module) else nn.CrossEntropyLoss()
            squares = isinstance(one, nn.MSELoss)
            total = total + one(output, torch.zeros_like(output) if squares else y)
        return total

    @contextmanager
    def own(self) -> Iterator[None]:
        """What is raised inside is the user's matter, unless it comes from our code."""
        try:
            yield
        except (KronewtonError, UsersOwn, Noticed):
            raise
        except Exception as error:
            if _ours(error):
                raise
            raise UsersOwn from error

    def backward(self, x: Tensor, y: Tensor, times: int = 1) -> Tensor:
        with self.own():
            loss = self.loss(x, y)
            for turn in range(times):
                loss.backward(retain_graph=turn + 1 < times)
        return loss.detach()


class Alone(World):
    """KFAC, whose step changes nothing if it raises."""

    ours: kn.KFAC

    def made(self, model: nn.Module, criterion: Any) -> tuple[kn.KFAC, kn.KFAC]:
        given = GIVEN[self.drawn.given](model)
        whole = model if self.drawn.with_model else None
        made = kn.KFAC(given, criterion, model=whole, **self.drawn.all_options())
        return made, made

    def scaled_step(self, scaler: torch.amp.GradScaler, n: int) -> None:
        scaler.step(self.optimizer)
        scaler.update()

    def make_step(self, closure: Callable[[], Any] | None) -> None:
        before = self.weights()
        try:
            self.optimizer.step(closure)
        except Exception:
            require(self.same(before), "moved, and raised")
            raise


class InFront(World):
    """Preconditioner, which moves nothing, in front of an optimizer."""

    ours: kn.Preconditioner

    def made(self, model: nn.Module, criterion: Any) -> tuple[kn.Preconditioner, Optimizer]:
        given = GIVEN[self.drawn.given](model)
        made = kn.Preconditioner(given, criterion, **self.drawn.all_options())
        return made, OPTIMIZERS[self.drawn.behind](list(model.parameters()))

    def precondition(self, *scaler: Any) -> None:
        """Gradients that any optimizer can go on with, or as they were if something is raised."""
        before, raw = self.weights(), self.gradients()
        try:
            self.ours.step(*scaler)
        except Exception as error:
            now = zip(self.gradients(), raw, strict=True)
            unchanged = isinstance(error, SkippedError) or all(_equal(a, b) for a, b in now)
            require(unchanged, "changed gradients, and raised")
            raise
        finally:
            require(self.same(before), "moved a weight")
        require(self.sound(), "left gradients that are not finite")

    def scaled_step(self, scaler: torch.amp.GradScaler, n: int) -> None:
        """As the page has it, or without its first line, or without the scaler."""
        with self.own():
            if n % 3:
                scaler.unscale_(self.optimizer)
        self.precondition(*[scaler] if n % 5 else [])
        with self.own():
            scaler.step(self.optimizer)
            scaler.update()

    def gradients(self) -> list[Tensor | None]:
        grads = [p.grad for p in self.model.parameters()]
        return [None if g is None else g.detach().to_dense().clone() for g in grads]

    def sound(self) -> bool:
        """Whether all gradients are finite, and their squares."""
        grads = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in self.gradients()
                 if g is not None]  # fmt: skip
        return all(bool(torch.isfinite(g.square().sum())) for g in grads)

    def make_step(self, closure: Callable[[], Any] | None) -> None:
        if closure is None:
            self.precondition()

        def whole() -> Any:
            loss = closure() if closure is not None else None
            self.precondition()
            return loss

        with self.own():
            self.optimizer.step() if closure is None else self.optimizer.step(whole)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def _ours(error: BaseException) -> bool:
    """Whether the package has a part in it, but for passing a call on."""
    trace, files = error.__traceback__, []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return any(file.startswith(HOUSE) and not file.endswith("recording.py") for file in files)


Op = Callable[[Any, int], None]
OPS: dict[str, Op] = {}


def op(function: Op) -> Op:
    """Add what is called of the worlds that `w` is annotated with."""
    OPS[function.__name__] = function
    return function


@op
def train(w: World, n: int) -> None:
    for _ in range(2):
        w.optimizer.zero_grad()
        w.backward(*w.batch(1 + n % 6))
        w.step()


@op
def train_again(w: World, n: int) -> None:
    train(w, n)


@op
def closure(w: World, n: int) -> None:
    x, y = w.batch(2 + n % 3)

    def loss() -> Tensor:
        w.optimizer.zero_grad(set_to_none=bool(n % 2))
        return w.backward(x, y)

    w.step(loss)


@op
def empty_closure(w: World, n: int) -> None:
    w.step(lambda: [None, 1.0, "loss"][n % 3])


@op
def step_only(w: World, n: int) -> None:
    w.step()


@op
def backward_twice(w: World, n: int) -> None:
    w.backward(*w.batch(2 + n % 3), times=2)
    w.step()


@op
def accumulate(w: World, n: int) -> None:
    w.optimizer.zero_grad()
    for size in (1 + n % 3, 2):
        w.backward(*w.batch(size))
    w.step()


@op
def zero_grad(w: World, n: int) -> None:
    (w.model if n % 5 == 0 else w.optimizer).zero_grad(set_to_none=bool(n % 2))
    if n % 3 == 0:
        w.step()


@op
def forward_only(w: World, n: int) -> None:
    x, y = w.batch(1 + n % 3)
    with w.own():
        if n % 2:
            with torch.no_grad():
                w.loss(x, y)
        else:
            w.loss(x, y)


@op
def forget_the_loss(w: World, n: int) -> None:
    with w.own():
        w.model(w.batch(2)[0]).sum().backward()
    w.step()


@op
def eval_and_train(w: World, n: int) -> None:
    w.model.train(bool(n % 2))


@op
def resume(w: World, n: int) -> None:
    saved = [w.model.state_dict(), w.ours.state_dict(), w.optimizer.state_dict()]
    stream = io.BytesIO()
    torch.save(saved, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    model, criterion = w.kind.make().to(w.dtype), CRITERIA[w.drawn.criterion]()
    with w.own():  # the model may have got another parameter
        model.load_state_dict(saved[0])
    ours, optimizer = w.made(model, criterion)
    ours.load_state_dict(saved[1])
    if optimizer is not ours:
        with w.own():
            optimizer.load_state_dict(saved[2])
    w.model, w.criterion, w.ours, w.optimizer = model, criterion, ours, optimizer


@op
def load_what_it_is_not(w: World, n: int) -> None:
    other = type(w.ours)(nn.Linear(2, 2), nn.MSELoss()).state_dict()
    own = w.ours.state_dict()
    states: list[Any] = [other, {}, None, {"state": {}, "param_groups": []}, {**own, "state": {}}]
    w.ours.load_state_dict(states[n % len(states)])


@op
def load_what_is_damaged(w: World, n: int) -> None:
    own = copy.deepcopy(w.ours.state_dict())
    within: Any = own
    while n % 3 and isinstance(within[key := sorted(within, key=str)[n % len(within)]], dict):
        if not within[key]:
            return
        within = within[key]
    within[sorted(within, key=str)[n % len(within)]] = STRANGE[n % len(STRANGE)]()
    w.ours.load_state_dict(own)


@op
def copied(w: World, n: int) -> None:
    together = (w.model, w.criterion, w.ours, w.optimizer)
    made = copy.deepcopy(together) if n % 2 else pickle.loads(pickle.dumps(together))
    w.model, w.criterion, w.ours, w.optimizer = made


@op
def add_group(w: Alone, n: int) -> None:
    new = nn.Parameter(torch.ones(2))
    groups: list[Any] = [{"params": [new]}, {"params": new, "lr": 0.1}, {"params": []}, {}, None]
    w.optimizer.add_param_group(groups[n % len(groups)])
    new.grad = torch.ones(2)
    w.step()


@op
def add_to_the_one_behind(w: InFront, n: int) -> None:
    new = nn.Parameter(torch.ones(2))
    if n % 2:
        w.model.register_parameter(f"new{n}", new)
    with w.own():
        w.optimizer.add_param_group({"params": [new]})
    new.grad = torch.full((2,), math.nan if n % 3 == 0 else 1.0)
    train(w, n)


@op
def freeze(w: World, n: int) -> None:
    every = list(w.model.parameters())
    p = every[n % len(every)]
    p.requires_grad_(not p.requires_grad)


@op
def change_lr(w: Alone, n: int) -> None:
    group = w.optimizer.param_groups[n % len(w.optimizer.param_groups)]
    rates: list[Any] = [0.0, 1e-3, 3.0, 1, torch.tensor(0.1), 1e300, -1.0, math.nan, "fast", None]
    group[("lr", "weight_decay")[n % 3 == 0]] = rates[n % len(rates)]


@op
def evaluate_averaged(w: Alone, n: int) -> None:
    with w.optimizer.averaged():
        forward_only(w, n)
        if n % 3 == 0:
            w.step()


@op
def observe(w: World, n: int) -> None:
    x, y = w.batch(2)
    with w.own():
        output = w.model(x)
        loss = nn.functional.cross_entropy(output, y)
    targets: list[Any] = [y, (y,), y[:1], None]
    w.ours.observe(output, targets[n % len(targets)], nn.CrossEntropyLoss())
    with w.own():
        loss.backward()
    w.step()


@op
def ask(w: World, n: int) -> None:
    str(w.ours.coverage())
    w.ours.diagnostics()
    repr(w.ours)
    w.ours.state_dict()


@op
def empty_batch(w: World, n: int) -> None:
    w.optimizer.zero_grad()
    w.backward(*w.batch(0))
    w.step()


def _spoilt(w: World, value: float) -> None:
    x, y = w.batch(3)
    if x.is_floating_point():
        x = x.clone()
        x[0] = value
    w.optimizer.zero_grad()
    w.backward(x, y)
    w.step()


@op
def bad_batch(w: World, n: int) -> None:
    _spoilt(w, (math.nan, math.inf, 1e20, 0.0, 1e-40)[n % 5])


@op
def wrong_target(w: World, n: int) -> None:
    x, y = w.batch(3)
    w.optimizer.zero_grad()
    w.backward(x, [y[:2], y + 100, y.double(), torch.full_like(y, -100)][n % 4])
    w.step()


@op
def cast(w: World, n: int) -> None:
    w.dtype = (torch.float64, torch.bfloat16, torch.float32)[n % 3]
    w.model.to(w.dtype)
    if w.optimizer is not w.ours:  # its buffers stay as they were, and would overflow by themselves
        w.optimizer.load_state_dict(w.optimizer.state_dict())


@op
def grads_by_hand(w: World, n: int) -> None:
    if n % 2:
        w.backward(*w.batch(3))
    for p in w.model.parameters():
        made = [torch.randn_like, torch.zeros_like, lambda t: torch.full_like(t, math.nan)]
        p.grad = None if n % 4 == 3 else made[n % 3](p.detach())
    w.step()


@op
def clip(w: World, n: int) -> None:
    w.optimizer.zero_grad()
    w.backward(*w.batch(3))
    with w.own():  # it takes no sparse gradients
        nn.utils.clip_grad_norm_(w.model.parameters(), 0.1)
    w.step()


@op
def autocast(w: World, n: int) -> None:
    w.optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        x, y = w.batch(3)
        with w.own():
            loss = w.loss(x, y)
    with w.own():
        loss.backward()
    w.step()


@op
def scaled(w: World, n: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    w.optimizer.zero_grad()
    with w.own():
        scaler.scale(w.loss(*w.batch(3))).backward()
    if any(p.grad is not None for g in w.optimizer.param_groups for p in g["params"]):
        w.scaled_step(scaler, n)


@op
def touch_weights(w: World, n: int) -> None:
    with torch.no_grad():
        for p in w.model.parameters():
            p.mul_(0.5)


@op
def another_parameter(w: World, n: int) -> None:
    for module in w.model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone())
            return


@op
def close(w: World, n: int) -> None:
    w.ours.close()


@op
def clip_what_was_preconditioned(w: InFront, n: int) -> None:
    w.optimizer.zero_grad()
    w.backward(*w.batch(3))
    w.precondition()
    nn.utils.clip_grad_norm_(w.model.parameters(), 0.1)
    with w.own():
        w.optimizer.step()


@op
def precondition_twice(w: InFront, n: int) -> None:
    w.backward(*w.batch(1 + n % 3))
    w.precondition()
    if n % 2:
        w.backward(*w.batch(2))
    w.step()


@op
def the_one_behind_first(w: InFront, n: int) -> None:
    if n % 2:
        w.backward(*w.batch(2))
    if w.sound():  # or what comes of it is no fault of ours
        with w.own():
            w.optimizer.step()
    w.precondition()


@op
def strange_scaler(w: InFront, n: int) -> None:
    w.backward(*w.batch(2))
    w.precondition(STRANGE[n % len(STRANGE)]())


RARE = {"change_lr", "another_parameter", "close", "add_group", "load_what_it_is_not",
        "load_what_is_damaged", "add_to_the_one_behind", "strange_scaler"}  # fmt: skip


def calls(kind: type[World]) -> st.SearchStrategy[list[tuple[str, int]]]:
    of = ("World", kind.__name__)
    names = [name for name, function in OPS.items() if function.__annotations__["w"] in of]
    often = [name for name in names if name not in RARE]
    drawn = st.sampled_from(often * 2 + sorted(set(names) & RARE))
    drawn_ones = st.lists(st.tuples(drawn, st.integers(0, 59)), min_size=1, max_size=9)
    return st.one_of(drawn_ones, drawn_ones.map(lambda later: [("train", len(later)), *later]))


@dataclass(frozen=True)
class Drawn:
    """One draw: what is made, with which options, and what is called.

    behind: the optimizer behind a Preconditioner, or "" for KFAC.
    """

    model: str
    criterion: str
    given: str
    behind: str
    with_model: bool
    options: dict[str, Any]
    strange: tuple[str, int] | None
    calls: list[tuple[str, int]]
    seed: int

    def all_options(self) -> dict[str, Any]:
        found = dict(self.options)
        if self.strange is not None:
            name, i = self.strange
            value = STRANGE[i]()
            if not (name in LOOPED and isinstance(value, int) and value > 100):
                found[name] = value
        return found


def drawn(
    kind: type[World], valid: dict[str, tuple[Any, ...]], given: list[str], behind: list[str]
) -> st.SearchStrategy[Drawn]:
    return st.builds(
        Drawn,
        model=st.sampled_from(sorted(KINDS)),
        criterion=mostly(["classes", "classes", "classes, summed", "squares", "nothing", "two"],
                         ["unreduced", "function", "word", "a list with None", "class"]),
        given=mostly(given, sorted(set(GIVEN) - set(given))),
        behind=st.sampled_from(behind),
        with_model=st.booleans(),
        options=options(valid),
        strange=strange(valid),
        calls=calls(kind),
        seed=st.integers(0, 99),
    )  # fmt: skip


OF_KFAC = ["model", "model", "model", "groups", "names", "parameters"]
of_kfac = drawn(Alone, VALID, OF_KFAC, [""])
of_preconditioner = drawn(InFront, OF_PRECONDITIONER, ["model"] * 6, sorted(OPTIMIZERS))


def require_a_sentence(error: KronewtonError) -> None:
    """Long enough to say what was given and what is allowed, in one line."""
    text = str(error)
    require(text.endswith("."), text)
    require(len(text.split()) > 5, text)
    require("\n" not in text, text)


def play(drawn: Drawn) -> int:
    """Make what was drawn and call it, each call whatever came of the one before.

    How many steps have moved a weight.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronewtonWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            world = InFront(drawn) if drawn.behind else Alone(drawn)
        except KronewtonError as error:
            require_a_sentence(error)
            return 0
        for name, n in drawn.calls:
            try:
                OPS[name](world, n)
            except KronewtonError as error:
                require_a_sentence(error)
            except UsersOwn:
                pass
            finite = [bool(torch.isfinite(p).all()) for p in world.model.parameters()]
            require(all(finite), f"after {name}, {n}")
        return world.steps
