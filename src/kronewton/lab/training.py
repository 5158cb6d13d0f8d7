"""One loop for every optimizer: the user's own, with a clock around the step and nothing else."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

import kronewton as kn
from kronewton.errors import OptionError
from kronewton.lab.problems import Examples, Problem
from kronewton.lab.rivals import Rival, Setting
from kronewton.lab.tasks import Task

Key = TypeVar("Key", bound=Hashable)
# What an optimizer raises on numbers that have gone: the run has diverged, the program is well.
BROKEN = (ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Run:
    """A task, a model at some weights and the optimizer that trains it."""

    task: Task
    problem: Problem
    rival: Rival
    setting: Setting
    seed: int
    optimizer: Optimizer


@dataclass(frozen=True)
class Budget:
    """Where a run ends, by steps or by seconds of training, and how often it is evaluated.

    every: steps from one evaluation to the next, or where that is more this share of the steps
    made. until: the run ends as soon as an evaluation finds a training loss this low.
    """

    steps: int
    seconds: float = math.inf
    every: int = 1
    share: float = 0.0
    until: float = -math.inf


@dataclass(frozen=True)
class Record:
    """One step. Losses are in the task's unit; those of the sets only when evaluated.

    seconds: training since the first step, evaluation excluded. settings: learning rate,
    momentum, damping and what else the optimizer tells.
    """

    step: int
    seconds: float
    loss: float
    settings: Mapping[str, float] = field(default_factory=dict)
    train_loss: float | None = None
    test_loss: float | None = None
    metric: float | None = None
    diverged: bool = False


def start(task: Task, rival: Rival, setting: Setting, seed: int, device: torch.device) -> Run:
    """A run before its first step. Raises OptionError if the batch is larger than the data."""
    problem = task.build(seed, device)
    if task.batch_size is not None and not 1 <= task.batch_size <= len(problem.train):
        raise OptionError(
            f"a batch of {task.batch_size} was asked for; {task.name} has {len(problem.train)} "
            "training examples: give --batch-size a number from 1 to that, or leave it out."
        )
    criteria = problem.terms or (problem.criterion,)
    optimizer = rival.make(problem.model, criteria, setting)
    # Python's collector looks through all records of all runs so far, a fifth of a second in the
    # middle of whoever's step: what is there already is left out.
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    return Run(task, problem, rival, setting, seed, optimizer)


def train(run: Run, budget: Budget, last: Record | None = None) -> Iterator[Record]:
    """Step until the budget is spent or the loss low enough or no number, from `last` if given."""
    step, seconds = (0, 0.0) if last is None else (last.step, last.seconds)
    ended = last is not None and _ended(last, budget)
    while step < budget.steps and seconds < budget.seconds and not ended:
        x, y = batch_of(run, step)
        _draw_by(_seed_of(run, step), x.device)
        began = _clock(x.device)
        loss = _step(run, x, y)
        seconds += _clock(x.device) - began
        step += 1
        record = _record(run, step, seconds, loss, due=_due(budget, step, seconds))
        ended = _ended(record, budget)
        yield record


def interleave(
    runs: Mapping[Key, Iterator[Record]], chunks: Mapping[Key, int]
) -> Iterator[tuple[Key, Record]]:
    """Advance several runs in turn, so that what else the machine does falls on all of them.

    chunks: how many steps a turn of each run has.
    """
    alive = dict(runs)
    while alive:
        for key in list(alive):
            taken = 0
            for record in islice(alive[key], chunks[key]):
                taken += 1
                yield key, record
            if taken < chunks[key]:
                del alive[key]


@contextlib.contextmanager
def own_statistics(run: Run) -> Iterator[None]:
    """Batch normalisation inside by the statistics of the training set, at the weights of now.

    Running averages forget where a training began by a tenth in each step: twenty or thirty steps
    long a loss by them says how old a training is, and not what has been learnt (Wu & Johnson
    2021). Nothing of it stays.
    """
    model = run.problem.model
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [{name: b.clone() for name, b in m.named_buffers()} for m in norms]
    momenta = [m.momentum for m in norms]
    try:
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # the average of what comes
        if norms:
            _draw_by(run.seed, next(model.parameters()).device)
            with torch.no_grad():
                model(_measured(run.problem).x)
        yield
    finally:
        for m, buffers, momentum in zip(norms, kept, momenta, strict=True):
            m.momentum = momentum
            for name, b in m.named_buffers():
                b.copy_(buffers[name])


def evaluate(run: Run, data: Examples) -> tuple[float, float | None]:
    """The objective on all the examples, and the task's metric if it has one."""
    model, metric = run.problem.model, run.task.metric
    model.eval()
    _draw_by(run.seed, data.x.device)  # the same noise whenever it is asked
    with torch.no_grad():
        output = model(data.x)
        loss = float(objective(run, output, data.y))
    model.train()
    return loss, None if metric is None else metric.of(output, data.y)


def objective(run: Run, output: Tensor, y: Tensor) -> Tensor:
    """What is trained: the criterion's loss in the task's unit."""
    loss: Tensor = run.task.scale * run.problem.criterion(output, y)
    return loss


def _step(run: Run, x: Tensor, y: Tensor) -> float:
    """The user's loop body. Not a number if the optimizer gave up on this batch."""
    model, optimizer = run.problem.model, run.optimizer

    def backward() -> Tensor:
        optimizer.zero_grad()
        loss = objective(run, model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    try:
        if run.rival.closure:
            return optimizer.step(lambda: float(backward()))
        loss = backward()
        optimizer.step()
    except BROKEN:
        return math.nan
    return float(loss)


def batch_of(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step, a function of the seed and the step alone: resuming needs no state."""
    data, size = run.problem.train, run.task.batch_size
    if size is None:
        return data.x, data.y
    epoch, position = divmod(step, len(data) // size)
    generator = torch.Generator().manual_seed(_seed_of(run, epoch))
    order = torch.randperm(len(data), generator=generator)  # the last, partial batch is left out
    rows = order[position * size : (position + 1) * size].to(data.x.device)
    return data.x[rows], data.y[rows]


def _seed_of(run: Run, place: int) -> int:
    """What is drawn in a step (a VAE's noise) is a function of these too, in whatever company."""
    return 1_000_003 * run.seed + place


def _draw_by(seed: int, device: torch.device) -> None:
    # Not torch.manual_seed, which takes two milliseconds to reach devices that are not there.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _ended(record: Record, budget: Budget) -> bool:
    return record.diverged or (record.train_loss is not None and record.train_loss <= budget.until)


def _due(budget: Budget, step: int, seconds: float) -> bool:
    last = step == budget.steps or seconds >= budget.seconds
    return last or step == 1 or step % max(budget.every, int(budget.share * step)) == 0


def _record(run: Run, step: int, seconds: float, loss: float, due: bool) -> Record:
    floor, settings = run.task.scale * run.problem.floor, _settings(run.optimizer)
    shown = loss - floor
    if not math.isfinite(loss):
        return Record(step, seconds, shown, settings, diverged=True)
    if not due:
        return Record(step, seconds, shown, settings)
    with own_statistics(run):
        train_loss, _ = evaluate(run, _measured(run.problem))
        test_loss, metric = evaluate(run, run.problem.test)
    return Record(
        step,
        seconds,
        shown,
        settings,
        train_loss=train_loss - floor,
        test_loss=test_loss,
        metric=metric,
        diverged=not math.isfinite(train_loss),
    )


def _measured(problem: Problem) -> Examples:
    return problem.train if problem.measured is None else problem.measured


def _settings(optimizer: Optimizer) -> dict[str, float]:
    if isinstance(optimizer, kn.KFAC):
        return {name: float(value) for name, value in optimizer.diagnostics().items()}
    return {"lr": float(optimizer.param_groups[0]["lr"])}
