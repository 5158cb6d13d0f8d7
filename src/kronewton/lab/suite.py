"""Time to a target on many tasks: which tasks and rivals, how long, and how a contest is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kronewton.errors import OptionError
from kronewton.lab import arrivals, contest, display
from kronewton.lab.arrivals import Goal
from kronewton.lab.contest import Keep, Lane, Plan
from kronewton.lab.entries import Entry, read_entries
from kronewton.lab.journal import Journal
from kronewton.lab.reports import curves
from kronewton.lab.rivals import KFAC, available, describe
from kronewton.lab.tasks import MNIST, MNIST_LARGE, MNIST_SMALL, Options, Task, find_task
from kronewton.lab.training import Budget

# Of the steps made, from one evaluation to the next. A share, so that what an arrival is late by
# being seen only then is the same part of everyone's time, many cheap steps or few dear ones.
SHARE = 1 / 16
EVALUATIONS = 400  # at most, over a run's whole length: they take time that is not on the clock
MNIST_EXAMPLES, MNIST_BATCH = 8000, 1000


@dataclass(frozen=True)
class Suite:
    """A set of tasks with the rivals and the grid that fit the time there is for it.

    full_batch: rivals for tasks without noise, on top of the others.
    """

    tasks: tuple[str, ...]
    rivals: tuple[str, ...]
    grid: int
    full_batch: tuple[str, ...] = ("lbfgs",)


QUICK = Suite(
    ("digits-mlp", "digits-bn-cnn", "scaled-logistic", "deep-linear"), ("adamw", "sgd", "soap"), 3
)
FULL = Suite(
    (
        MNIST_SMALL,
        MNIST_LARGE,
        "digits-mlp",
        "digits-bn-cnn",
        "digits-resnet",
        "char-gpt",
        "char-lstm",
        "digits-vit",
        "digits-vae",
        "smooth-regression",
        "scaled-logistic",
        "deep-linear",
    ),
    ("adamw", "adam", "sgd", "soap", "shampoo", "muon"),
    12,
)


@dataclass(frozen=True)
class Order:
    """What the user has set; None leaves it to the suite and to the task."""

    seeds: tuple[int, ...]
    device: torch.device
    rivals: str | None = None
    grid: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Result:
    """One task that has been run, for a file: what came out, and all that it came out of."""

    task: str
    unit: str
    seeds: tuple[int, ...]
    device: str
    grids: Mapping[str, Sequence[str]]
    goals: tuple[Goal, ...]
    tuning: Sequence[Mapping[str, Any]]
    curves: Sequence[Mapping[str, Any]]


def result_of(plan: Plan, board: Journal) -> Result:
    """What a contest that has been run to its end has come to."""
    return Result(
        task=plan.task.described(),
        unit=plan.task.unit,
        seeds=plan.seeds,
        device=str(plan.device),
        grids={rival.name: [describe(s) for s in plan.settings(rival)] for rival in plan.rivals},
        goals=arrivals.goals(plan, board.tuned, board.raced),
        tuning=arrivals.tuning_told(plan, board.tuned),
        curves=curves(board.raced),
    )


def find_tasks(suite: Suite, names: Sequence[str], data: Path | None) -> list[Task]:
    """The named tasks, or the suite's: without data, those that need it are left out."""
    wanted = names or [name for name in suite.tasks if data is not None or name not in MNIST]
    tasks = [find_task(name, _options(name, data)) for name in wanted]
    if data is not None and not any(name in MNIST for name in wanted):
        raise OptionError(f"--data is of use to {' and '.join(MNIST)} alone, and none is run here.")
    return tasks


def _options(name: str, data: Path | None) -> Options:
    return Options(MNIST_BATCH, data, examples=MNIST_EXAMPLES) if name in MNIST else Options()


def plan_of(suite: Suite, order: Order, task: Task) -> Plan:
    """K-FAC and its rivals on a task, each run up to the task's last target.

    A run has at most the task's steps, or the user's, times its optimizer's patience.
    """
    entries = _entries(suite, order, task)
    steps = order.steps or task.steps
    return Plan(
        task=task,
        rivals=tuple(entry.rival for entry in entries),
        seeds=order.seeds,
        budget=_budget(task, steps),
        targets=task.targets,
        grid=order.grid or suite.grid,
        device=order.device,
        budgets={e.rival.name: _budget(task, e.steps or steps * e.rival.patience) for e in entries},
    )


def _entries(suite: Suite, order: Order, task: Task) -> tuple[Entry, ...]:
    """Who races, K-FAC always among them."""
    if order.rivals is not None:
        named = read_entries(order.rivals)
        return (*(() if KFAC in {e.rival.name for e in named} else read_entries(KFAC)), *named)
    names = (*suite.rivals, *(suite.full_batch if task.batch_size is None else ()))
    return read_entries(",".join([KFAC, *(name for name in names if name in available())]))


def _budget(task: Task, steps: int) -> Budget:
    return Budget(steps, every=max(1, steps // EVALUATIONS), share=SHARE, until=task.target)


def compete_(plan: Plan, journal: Journal, pressed: Callable[[], bool], title: str = "") -> Plan:
    """Tune and race onto the journal's boards, up to Ctrl-C, under a bar that says how long yet.

    Returns the plan, with a target where the tuning was to find it.
    """
    tuned, raced = journal.tuned, journal.raced
    lanes = {lane: plan.budget_of(lane.rival) for lane in contest.tuning_lanes(plan)}
    with display.lane_bar(f"{title}tuning", plan, lanes) as bar:
        bar.close(list(tuned))
        keep = _both(journal.keep_tuned, bar.close)
        _advance(contest.tune_(plan, tuned, keep), bar, pressed)
    if pressed():
        return plan
    plan = contest.with_target(plan, tuned)
    with display.lane_bar(f"{title}racing", plan, contest.racing_lanes(plan, tuned)) as bar:
        bar.close(list(raced))
        keep = _both(journal.keep_raced, bar.close)
        _advance(contest.race_(plan, tuned, raced, keep), bar, pressed)
    return plan


def _advance(turns: Iterator[Lane], bar: display.Bar, pressed: Callable[[], bool]) -> None:
    for lane in turns:
        bar.step(lane)
        if pressed():
            return


def _both(first: Keep, second: Keep) -> Keep:
    def keep(lanes: Sequence[Lane]) -> None:
        first(lanes)
        second(lanes)

    return keep
