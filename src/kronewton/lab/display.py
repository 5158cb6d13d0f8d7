"""Consoles and progress bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kronewton.lab.contest import Lane, Plan
from kronewton.lab.training import Budget, Record

WIDTH = 100  # of tables that go to a file or through a pipe


def output() -> Console:
    """Where results go: as wide as the terminal, or wide enough for a table."""
    console = Console(soft_wrap=False)
    return console if console.is_terminal else Console(width=WIDTH)


@contextmanager
def step_bar(label: str, budget: Budget, done: int) -> Iterator[Callable[[Record], None]]:
    """A bar over the steps of one run, with loss, learning rate and damping."""
    with _progress(TextColumn("{task.fields[note]}")) as progress:
        bar = progress.add_task(label, total=budget.steps, completed=done, note="")
        yield lambda record: progress.update(bar, completed=record.step, note=_note(record))


@contextmanager
def lane_bar(label: str, plan: Plan, lanes: Sequence[Lane]) -> Iterator[Callable[[Lane], None]]:
    """A bar over all steps of several runs, with the name of the one whose turn it is."""
    steps = sum(plan.budget_of(lane.rival).steps for lane in lanes)
    total = steps if math.isinf(plan.budget.seconds) else None
    names = {rival.name: rival.label for rival in plan.rivals}
    with _progress(TextColumn("{task.fields[note]}")) as progress:
        bar = progress.add_task(label, total=total, note="")
        yield lambda lane: progress.update(
            bar,
            advance=1,
            note=f"{names[lane.rival]}, setting {lane.setting + 1}, seed {lane.seed}",
        )


def _progress(*columns: ProgressColumn) -> Progress:
    # On stderr, so that what is piped onwards is the result alone.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _note(record: Record) -> str:
    parts = [f"loss {record.loss:.4g}"]
    for key, name in (("lr", "lr"), ("damping", "damping")):
        if key in record.settings:
            parts.append(f"{name} {record.settings[key]:.2g}")
    return " ".join(parts)
