"""Draws of the constructor's options and of what a user may call in whatever order."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import kronewton as kn
from kronewton.errors import KronewtonError, KronewtonWarning

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
    "basis": ("auto", "factored", "eigen", "corrected", "adam"),
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
LOOPED = ("refine", "draws", "curvature_batches")  # a huge one is allowed, and takes for ever
options = st.dictionaries(st.sampled_from(sorted(VALID)), st.integers(0, 10**6), max_size=4).map(
    lambda found: {name: VALID[name][i % len(VALID[name])] for name, i in found.items()}
)
strange = st.one_of(
    *[st.none()] * 9,
    st.tuples(st.sampled_from(sorted(VALID)), st.integers(0, len(STRANGE) - 1)),
)

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


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 5))


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


class UsersOwn(Exception):
    """What the model, the criterion or autograd raised at the user's own call."""


class World:
    """A model and its optimizer, and what is done with them."""

    def __init__(self, drawn: Drawn) -> None:
        torch.manual_seed(drawn.seed)
        self.drawn, self.kind = drawn, KINDS[drawn.model]
        self.model, self.criterion = self.kind.make(), CRITERIA[drawn.criterion]()
        self.dtype, self.closed = torch.float32, False
        self.optimizer = self.made(self.model, self.criterion)

    def made(self, model: nn.Module, criterion: Any) -> kn.KFAC:
        given = GIVEN[self.drawn.given](model)
        whole = model if self.drawn.with_model else None
        return kn.KFAC(given, criterion, model=whole, **self.drawn.all_options())

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
        except KronewtonError:
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

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """step(), which changes nothing if it raises."""
        before = [p.detach().clone() for p in self.model.parameters()]
        try:
            self.optimizer.step(closure)
        except Exception:
            now = self.model.parameters()
            assert all(p.equal(q) for p, q in zip(now, before, strict=True)), "moved, and raised"
            raise


def _ours(error: BaseException) -> bool:
    """Whether the package has a part in it, but for passing a call on."""
    trace, files = error.__traceback__, []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return any(file.startswith(HOUSE) and not file.endswith("recording.py") for file in files)


Op = Callable[[World, int], None]
OPS: dict[str, Op] = {}


def op(function: Op) -> Op:
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
    w.optimizer.zero_grad(set_to_none=bool(n % 2))
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
    stream = io.BytesIO()
    torch.save({"m": w.model.state_dict(), "o": w.optimizer.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    model = w.kind.make().to(w.dtype)
    criterion = CRITERIA[w.drawn.criterion]()
    model.load_state_dict(saved["m"])
    optimizer = w.made(model, criterion)
    optimizer.load_state_dict(saved["o"])
    w.model, w.criterion, w.optimizer = model, criterion, optimizer


@op
def load_what_it_is_not(w: World, n: int) -> None:
    other = kn.KFAC(nn.Linear(2, 2), nn.MSELoss()).state_dict()
    own = w.optimizer.state_dict()
    states: list[Any] = [other, {}, None, {"state": {}, "param_groups": []}, {**own, "state": {}}]
    w.optimizer.load_state_dict(states[n % len(states)])


@op
def copied(w: World, n: int) -> None:
    together = (w.model, w.criterion, w.optimizer)
    if n % 2:
        w.model, w.criterion, w.optimizer = copy.deepcopy(together)
    else:
        w.model, w.criterion, w.optimizer = pickle.loads(pickle.dumps(together))


@op
def add_group(w: World, n: int) -> None:
    new = nn.Parameter(torch.ones(2))
    groups: list[Any] = [{"params": [new]}, {"params": new, "lr": 0.1}, {"params": []}, {}, None]
    w.optimizer.add_param_group(groups[n % len(groups)])
    new.grad = torch.ones(2)
    w.step()


@op
def freeze(w: World, n: int) -> None:
    every = list(w.model.parameters())
    p = every[n % len(every)]
    p.requires_grad_(not p.requires_grad)


@op
def change_lr(w: World, n: int) -> None:
    group = w.optimizer.param_groups[n % len(w.optimizer.param_groups)]
    rates: list[Any] = [0.0, 1e-3, 3.0, 1, torch.tensor(0.1), 1e300, -1.0, math.nan, "fast", None]
    group[("lr", "weight_decay")[n % 3 == 0]] = rates[n % len(rates)]


@op
def evaluate_averaged(w: World, n: int) -> None:
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
    w.optimizer.observe(output, targets[n % len(targets)], nn.CrossEntropyLoss())
    with w.own():
        loss.backward()
    w.step()


@op
def ask(w: World, n: int) -> None:
    str(w.optimizer.coverage())
    w.optimizer.diagnostics()
    repr(w.optimizer)
    w.optimizer.state_dict()


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
        scaler.step(w.optimizer)
        scaler.update()


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
    w.optimizer.close()


RARE = {"change_lr", "another_parameter", "close", "add_group", "load_what_it_is_not"}
OFTEN_OPS = [name for name in OPS if name not in RARE]
ops = st.tuples(st.sampled_from(OFTEN_OPS * 2 + sorted(RARE)), st.integers(0, 59))


@dataclass(frozen=True)
class Drawn:
    """One draw: what is made, with which options, and what is called."""

    model: str
    criterion: str
    given: str
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


draws = st.builds(
    Drawn,
    model=st.sampled_from(sorted(KINDS)),
    criterion=mostly(["classes", "classes", "classes, summed", "squares", "nothing", "two"],
                     ["unreduced", "function", "word", "a list with None", "class"]),
    given=mostly(["model", "model", "model", "groups", "names", "parameters"],
                 ["list", "strange group", "numbers", "none", "empty", "table", "tensor"]),
    with_model=st.booleans(),
    options=options,
    strange=strange,
    calls=st.lists(ops, min_size=1, max_size=9),
    seed=st.integers(0, 99),
)  # fmt: skip


def require_a_sentence(error: KronewtonError) -> None:
    """Long enough to say what was given and what is allowed, in one line."""
    text = str(error)
    assert text.endswith("."), text
    assert len(text.split()) > 5, text
    assert "\n" not in text, text


def play(drawn: Drawn, make: Callable[[Drawn], World] = World) -> None:
    """Make what was drawn and call it, each call whatever came of the one before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronewtonWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            world = make(drawn)
        except KronewtonError as error:
            require_a_sentence(error)
            return
        for name, n in drawn.calls:
            try:
                OPS[name](world, n)
            except KronewtonError as error:
                require_a_sentence(error)
            except UsersOwn:
                pass
            finite = [bool(torch.isfinite(p).all()) for p in world.model.parameters()]
            assert all(finite), f"after {name}, {n}"
