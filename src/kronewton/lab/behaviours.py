"""What a training loop may ask of an optimizer around the step, tried on several of them.

Eighteen behaviours that torch's own suite asks of its optimizers, and what none of those has: a
batch of NaN that leaves the weights finite. Each answer comes from running it.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

import kronewton as kn
from kronewton.lab.rivals import EXTRA, available, extra, find_rival, has_extra

NAMES = ("kfac", "adamw", "sgd", "soap")
Make = Callable[..., Optimizer]  # (parameters, model, criterion, **options)
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """Whether an optimizer behaves so; `why` is the error that it raised, if it did."""

    behaviour: str
    optimizer: str
    yes: bool
    why: str = ""


class Trial:
    """A small model in float64, its batch, its criterion and one optimizer."""

    def __init__(self, make: Make, model: nn.Module | None = None, **options: Any) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.model = _network() if model is None else model
        self.criterion = nn.CrossEntropyLoss()
        self.x = torch.randn(8, 3, generator=self.generator, dtype=torch.float64)
        self.y = torch.arange(8) % 4
        given = options.pop("groups", lambda model: list(model.parameters()))(self.model)
        self.optimizer = make(given, self.model, self.criterion, **options)

    def loss(self) -> Tensor:
        loss: Tensor = self.criterion(self.model(self.x), self.y)
        return loss

    def steps(self, count: int = 3) -> Trial:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
        return self

    def weights(self) -> Tensor:
        flat = [p.detach().flatten() for p in self.model.parameters()]
        return torch.cat([torch.view_as_real(p).flatten() if p.is_complex() else p for p in flat])

    def moves(self, count: int = 3) -> bool:
        before = self.weights()
        after = self.steps(count).weights()
        return not after.equal(before) and bool(torch.isfinite(after).all())


def _network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
    return made.double()


# The behaviours.


def _bare_list(make: Make) -> bool:
    if make is MAKERS["kfac"]:
        return Trial(lambda params, model, criterion: kn.KFAC(params)).moves()
    return Trial(make).moves()


def _groups(make: Make) -> bool:
    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        still, moving = list(model[0].parameters()), list(model[2].parameters())
        return [{"params": still, "lr": 0.0}, {"params": moving}]

    trial = Trial(make, groups=groups)
    before = copy.deepcopy(trial.model)
    trial.steps()
    pairs = list(zip(trial.model.parameters(), before.parameters(), strict=True))
    return [p.equal(q) for p, q in pairs] == [True, True, False, False]


def _added_group(make: Make) -> bool:
    trial = Trial(make).steps(1)
    added = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    trial.optimizer.add_param_group({"params": [added]})
    for _ in range(3):
        trial.optimizer.zero_grad()
        trial.criterion(trial.model(trial.x) + added, trial.y).backward()
        trial.optimizer.step()
    return bool(added.any())


def _tensor_lr(make: Make) -> bool:
    trial, still = (Trial(make, lr=torch.tensor(lr)) for lr in (0.25, 0.0))
    kept = trial.moves() and float(trial.optimizer.param_groups[0]["lr"]) == 0.25
    return kept and not still.moves()


def _schedule(make: Make) -> bool:
    trial = Trial(make)
    schedule = torch.optim.lr_scheduler.LambdaLR(trial.optimizer, lambda n: float(n < 3))
    for _ in range(3):
        if not trial.moves(2):
            return False
        schedule.step()
    return not trial.moves()


def _changed_decay(make: Make) -> bool:
    one, other = Trial(make, weight_decay=0.0), Trial(make, weight_decay=0.0)
    other.optimizer.param_groups[0]["weight_decay"] = 0.5
    return not one.steps().weights().equal(other.steps().weights())


def _maximize(make: Make) -> bool:
    trial = Trial(make, maximize=True)
    before = float(trial.loss().detach())
    return float(trial.steps().loss().detach()) > before


def _closure(make: Make) -> bool:
    trial, seen = Trial(make), []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        trial.optimizer.zero_grad()
        loss = trial.loss()
        loss.backward()
        return loss

    with torch.no_grad():
        returned = trial.optimizer.step(closure)  # type: ignore[arg-type]
    return seen == [True] and isinstance(returned, Tensor)


def _no_gradient(make: Make) -> bool:
    trial = Trial(make, weight_decay=0.1).steps()
    before = trial.weights()
    trial.optimizer.zero_grad()
    trial.optimizer.step()
    return trial.weights().equal(before)


def _step_hooks(make: Make) -> bool:
    trial, seen = Trial(make, weight_decay=0.0), []
    trial.optimizer.register_step_pre_hook(lambda *_: seen.append(trial.weights()))
    trial.optimizer.register_step_post_hook(lambda *_: seen.append(trial.weights()))
    start = trial.weights()
    trial.steps()
    return len(seen) == 6 and seen[0].equal(start) and seen[5].equal(trial.weights())


def _state_hooks(make: Make) -> bool:
    trial = Trial(make).steps()
    plain, twin = trial.optimizer.state_dict(), Trial(make).steps()
    seen: list[int] = []

    def wrap(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(state["state"]))
        return {"inner": state}

    trial.optimizer.register_state_dict_post_hook(wrap)
    trial.optimizer.register_load_state_dict_pre_hook(lambda _, state: state["inner"])
    trial.optimizer.load_state_dict(copy.deepcopy(trial.optimizer.state_dict()))
    same = trial.steps().weights().equal(twin.steps().weights())
    return same and seen == [len(plain["state"])]


def _strides(make: Make) -> bool:
    model, first = _network(), nn.Linear(3, 6).double()
    first.weight = weight = nn.Parameter(first.weight.detach().t().contiguous().t())
    model[0] = first
    trial = Trial(make, model)
    before = float(trial.loss().detach())
    falls = trial.moves() and float(trial.loss().detach()) < before
    return falls and weight.stride() == (1, 6)


def _no_elements(make: Make) -> bool:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = _network()
            self.none = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x) + self.none.sum()
            return y

    return Trial(make, Model()).moves()


def _complex(make: Make) -> bool:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = _network()
            self.phase = nn.Parameter(torch.full((4,), 1 + 1j, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.body(x) * self.phase
            return z.real + z.imag

    model = Model()
    before = model.phase.detach().clone()
    Trial(make, model).steps()
    return bool(torch.view_as_real(model.phase.detach() - before).all())


def _bfloat16(make: Make) -> bool:
    trial = Trial(make, _network().bfloat16())
    trial.x = trial.x.bfloat16()
    return trial.moves() and trial.weights().dtype == torch.bfloat16


def _copied(make: Make, how: Callable[[Any], Any]) -> bool:
    trial = Trial(make).steps()
    other = Trial(make)
    other.model, other.criterion, other.optimizer = how(
        (trial.model, trial.criterion, trial.optimizer)
    )
    before = trial.weights()
    other.steps()
    return trial.weights().equal(before) and trial.steps().weights().equal(other.weights())


def _deepcopied(make: Make) -> bool:
    return _copied(make, copy.deepcopy)


def _pickled(make: Make) -> bool:
    return _copied(make, lambda given: pickle.loads(pickle.dumps(given)))


def _resumed(make: Make) -> bool:
    trial, stream = Trial(make).steps(), io.BytesIO()
    torch.save([trial.model.state_dict(), trial.optimizer.state_dict()], stream)
    stream.seek(0)
    weights, state = torch.load(stream)  # weights_only, the default
    other = Trial(make)
    other.model.load_state_dict(weights)
    other.optimizer.load_state_dict(state)
    return other.steps().weights().equal(trial.steps().weights())


def _bad_batch(make: Make) -> bool:
    trial = Trial(make).steps()
    good, trial.x = trial.x, trial.x * torch.nan
    trial.steps(1).x = good
    return trial.moves()


BEHAVIOURS: dict[str, Callable[[Make], bool]] = {
    "takes a bare list of parameters": _bare_list,
    "a group has an lr of its own": _groups,
    "a group is added later and trained": _added_group,
    "lr may be a tensor": _tensor_lr,
    "the next step has the schedule's lr": _schedule,
    "weight decay may be changed later": _changed_decay,
    "maximize climbs": _maximize,
    "a closure runs with gradients": _closure,
    "without gradients nothing moves": _no_gradient,
    "hooks run around the step": _step_hooks,
    "hooks run around the state and see it": _state_hooks,
    "a parameter keeps strides of its own": _strides,
    "parameters without elements": _no_elements,
    "complex parameters are trained": _complex,
    "bf16 parameters are trained and stay": _bfloat16,
    "a deep copy goes on as the original": _deepcopied,
    "an unpickled one goes on as the original": _pickled,
    "resumes bit for bit by weights_only": _resumed,
}
BEYOND: dict[str, Callable[[Make], bool]] = {
    "a batch of NaN leaves the weights finite": _bad_batch,
}


def _kfac(params: Any, model: nn.Module, criterion: nn.Module, **options: Any) -> Optimizer:
    return kn.KFAC(params, criterion, model=model, **options)


def _plain(kind: str) -> Make:
    def make(params: Any, model: nn.Module, criterion: nn.Module, **options: Any) -> Optimizer:
        kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        if has_extra():
            kinds["soap"] = extra().SOAP
        optimizer: Optimizer = kinds[kind](params, **{"lr": 0.01, **options})
        return optimizer

    return make


MAKERS: dict[str, Make] = {"kfac": _kfac, **{name: _plain(name) for name in NAMES[1:]}}


def behaviours() -> list[Answer]:
    """Try every behaviour on every optimizer whose package is installed."""
    here = [name for name in NAMES if name not in EXTRA or name in available()]
    every = {**BEHAVIOURS, **BEYOND}
    return [_answer(what, name, run) for what, run in every.items() for name in here]


def _answer(what: str, name: str, run: Callable[[Make], bool]) -> Answer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Answer(what, find_rival(name).label, run(MAKERS[name]))
        except Exception as error:  # whatever it is that it raises, it does not do it
            words = str(error).splitlines()[0] if str(error) else ""
            return Answer(what, find_rival(name).label, False, f"{type(error).__name__}: {words}")


def behaviour_table(answers: Sequence[Answer]) -> Table:
    """One row per behaviour, one column per optimizer, and the counts."""
    names = list(dict.fromkeys(answer.optimizer for answer in answers))
    found = {(a.behaviour, a.optimizer): a.yes for a in answers}
    table = Table()
    table.add_column("behaviour")
    for name in names:
        table.add_column(name, justify="center")
    for what in BEHAVIOURS:
        table.add_row(what, *("yes" if found[what, n] else "no" for n in names))
    counts = [sum(found[what, n] for what in BEHAVIOURS) for n in names]
    table.add_section()
    table.add_row(f"of {len(BEHAVIOURS)}", *map(str, counts))
    table.add_section()
    for what in BEYOND:
        table.add_row(what, *("yes" if found[what, n] else "no" for n in names))
    return table
