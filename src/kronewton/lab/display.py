"""Consoles and progress bars."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class Bar:
    """A bar over the steps of several runs, with the name of the one whose turn it is."""

    def __init__(self, progress: Progress, label: str, plan: Plan, lanes: Mapping[Lane, Budget]):
        self._progress, self._lanes = progress, lanes
        self._names = {rival.name: rival.label for rival in plan.rivals}
        self._done: Counter[Lane] = Counter()
        total = sum(budget.steps for budget in lanes.values())
        timed = math.isfinite(plan.budget.seconds)
        self._task = progress.add_task(label, total=None if timed else total, note="")

    def step(self, lane: Lane) -> None:
        """A lane has made a step."""
        going = self._done[lane] < self._lanes[lane].steps  # a lane may run a second time
        self._done[lane] += going
        note = f"{self._names[lane.rival]} {lane.setting + 1}, seed {lane.seed}"
        self._progress.update(self._task, advance=int(going), note=note)

    def close(self, lanes: Sequence[Lane]) -> None:
        """Lanes have ended, maybe before their time."""
        for lane in lanes:
            if lane in self._lanes:
                left = self._lanes[lane].steps - self._done[lane]
                self._done[lane] += left
                self._progress.update(self._task, advance=left)


@contextmanager
def lane_bar(label: str, plan: Plan, lanes: Mapping[Lane, Budget]) -> Iterator[Bar]:
    """A bar over all steps that the lanes may take."""
    with _progress(TextColumn("{task.fields[note]}"), shown=bool(lanes)) as progress:
        yield Bar(progress, label, plan, lanes)


def _progress(*columns: ProgressColumn, shown: bool = True) -> Progress:
    # On stderr, so that what is piped onwards is the result alone.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


def _note(record: Record) -> str:
    parts = [f"loss {record.loss:.4g}"]
    for key, name in (("lr", "lr"), ("damping", "damping")):
        if math.isfinite(record.settings.get(key, math.nan)):
            parts.append(f"{name} {record.settings[key]:.2g}")
    return " ".join(parts)
