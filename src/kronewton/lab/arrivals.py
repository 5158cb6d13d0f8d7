"""Who is at a target first by the clock, seed against the same seed: numbers, tables, a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kronewton.lab.contest import (
    Board,
    Lane,
    Plan,
    best_settings,
    final_loss,
    first_below,
    steps_to,
)
from kronewton.lab.reports import Spread, digits, framed, ranged, spread
from kronewton.lab.rivals import ITERATIONS, KFAC, Rival, describe
from kronewton.lab.training import Record

CLEARLY = 0.8  # of the best rival's seconds: a lead that another day's load does not turn round


@dataclass(frozen=True)
class Arrival:
    """How soon one optimizer, at its best setting for a target, was there.

    train, test and metric: medians at that moment, over the seeds that got there. test_then: the
    test loss when K-FAC arrived on the same seed, where the run had not ended before.
    """

    rival: str
    label: str
    setting: str
    seeds: int
    reached: int
    steps: Spread
    seconds: Spread
    train: float
    test: float
    metric: float | None
    test_then: float


@dataclass(frozen=True)
class Goal:
    """One target of one task. ratio: K-FAC's seconds over those of the best of its rivals.

    best: the rival with the least median of seconds, None if none has one. ratio is then None.
    """

    task: str
    unit: str
    target: float
    kfac: Arrival
    rivals: tuple[Arrival, ...]
    best: Arrival | None
    ratio: Spread | None

    @property
    def first(self) -> bool:
        """Whether K-FAC is first by the clock."""
        if self.ratio is None:
            return math.isfinite(self.kfac.seconds.median)
        return self.ratio.median < 1

    @property
    def better_on_test(self) -> Arrival | None:
        """The rival whose test loss is the lowest, if lower than K-FAC's, when K-FAC arrives."""
        lower = [rival for rival in self.rivals if rival.test_then < self.kfac.test]
        return min(lower, key=lambda rival: rival.test_then, default=None)

    @property
    def won(self) -> bool:
        """Whether K-FAC is first, and no rival's test loss is lower by then."""
        return self.first and self.better_on_test is None


def goals(plan: Plan, tuned: Board, raced: Board) -> tuple[Goal, ...]:
    """All targets of a contest in which K-FAC ran, the highest loss first."""
    return tuple(_goal(plan, tuned, raced, index) for index in range(len(plan.targets)))


def _goal(plan: Plan, tuned: Board, raced: Board, index: int) -> Goal:
    target = plan.targets[index]
    settings = {rival.name: best_settings(plan, rival, tuned)[index] for rival in plan.rivals}

    def runs(name: str) -> list[list[Record]]:
        return [raced[Lane(name, settings[name], seed)] for seed in plan.seeds]

    own = [_seconds(records, target) for records in runs(KFAC)]
    found = [_arrival(plan, r, settings[r.name], runs(r.name), target, own) for r in plan.rivals]
    kfac = next(arrival for arrival in found if arrival.rival == KFAC)
    rivals = sorted(
        (arrival for arrival in found if arrival.rival != KFAC), key=lambda a: a.seconds.median
    )
    best = rivals[0] if rivals and math.isfinite(rivals[0].seconds.median) else None
    theirs = [_seconds(records, target) for records in runs(best.rival)] if best else []
    ratio = spread(map(_ratio, own, theirs)) if best else None
    return Goal(plan.task.name, plan.task.unit, target, kfac, tuple(rivals), best, ratio)


def _arrival(
    plan: Plan,
    rival: Rival,
    setting: int,
    runs: Sequence[Sequence[Record]],
    target: float,
    own: Sequence[float],
) -> Arrival:
    firsts = [first_below(records, target) for records in runs]
    there = [first for first in firsts if first is not None]
    then = [_test_at(records, seconds) for records, seconds in zip(runs, own, strict=True)]
    return Arrival(
        rival=rival.name,
        label=rival.label,
        setting=describe(plan.settings(rival)[setting]),
        seeds=len(runs),
        reached=len(there),
        steps=spread(steps_to(records, target) for records in runs),
        seconds=spread(_seconds(records, target) for records in runs),
        train=_typical([first.train_loss for first in there]),
        test=_typical([first.test_loss for first in there]),
        metric=_typical([first.metric for first in there]) if plan.task.metric else None,
        test_then=_typical(then),
    )


def _seconds(records: Sequence[Record], target: float) -> float:
    first = first_below(records, target)
    return math.inf if first is None else first.seconds


def _ratio(own: float, other: float) -> float:
    if math.isinf(own):
        return math.inf  # K-FAC did not arrive: the worse for it, whatever the other did
    return 0.0 if math.isinf(other) else own / other


def _test_at(records: Sequence[Record], seconds: float) -> float | None:
    """The test loss at the last evaluation up to then; None if the run did not go on so long."""
    seen = [r.test_loss for r in records if r.test_loss is not None and r.seconds <= seconds]
    return seen[-1] if seen and records[-1].seconds >= seconds else None


def _typical(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return median(known) if known else math.nan


def task_table(plan: Plan, found: Sequence[Goal]) -> Group:
    """Everyone at every target of one task, the first to arrive on top; K-FAC in bold."""
    table = framed(f"{plan.task.name}: training loss ({plan.task.unit})")
    metric = [plan.task.metric.name] if plan.task.metric else []
    table.add_column("target", justify="right")
    table.add_column("optimizer")
    for head in ("steps", "seconds", "test\nloss", *metric, "test\nthen"):
        table.add_column(head, justify="right", no_wrap=True)
    for goal in found:
        every = sorted((goal.kfac, *goal.rivals), key=lambda a: (a.seconds.median, a.label))
        for place, arrival in enumerate(every):
            style = "bold" if arrival.rival == KFAC else ""
            first = "" if place else f"{goal.target:g}"
            table.add_row(first, *_cells(arrival), style=style)
        table.add_section()
    return Group(table, Text(_conditions(plan)))


def _cells(arrival: Arrival) -> list[str]:
    metric = [] if arrival.metric is None else [_percent(arrival.metric)]
    cells = [_named(arrival), _steps(arrival), _time(arrival)]
    return [*cells, _number(arrival.test), *metric, _number(arrival.test_then)]


def _named(arrival: Arrival) -> str:
    return arrival.label if arrival.rival == KFAC else f"{arrival.label}, {arrival.setting}"


def _conditions(plan: Plan) -> str:
    tried = max(len(plan.settings(rival)) for rival in plan.rivals)
    closures = [rival.label for rival in plan.rivals if rival.closure]
    return (
        f"Median [range] over seeds {', '.join(map(str, plan.seeds))}. K-FAC has nothing set; each "
        f"rival's setting is for each target the best of {tried} on seed {plan.seeds[0]}, by the "
        "fewest steps. Test loss: when the target is reached; then: when K-FAC reaches it. Seconds "
        "are of training alone."
        + (f" A step of {closures[0]} is {ITERATIONS} iterations." if closures else "")
    )


def summary_table(found: Sequence[Goal]) -> Table:
    """One row per target of every task: K-FAC against the best of its rivals."""
    table = framed("K-FAC with nothing set against the best tuned rival, by the clock")
    left = ("task", "best rival")
    for head in ("task", "target", "K-FAC s", "best rival", "its s", "ratio", "steps"):
        table.add_column(head, justify="left" if head in left else "right")
    for goal in found:
        table.add_row(*_summary_cells(goal), style="bold" if goal.won else "")
    return table


def _summary_cells(goal: Goal) -> list[str]:
    own = digits_or_never(goal.kfac.seconds.median)
    steps = _whole(goal.kfac.steps.median)
    if goal.best is None:
        return [goal.task, f"{goal.target:g}", own, "none arrives", "–", "–", steps]
    best = goal.best
    return [
        goal.task,
        f"{goal.target:g}",
        own,
        _named(best),
        digits_or_never(best.seconds.median),
        ratio_said(goal.ratio),
        f"{steps} : {_whole(best.steps.median)}",
    ]


def summary_markdown(found: Sequence[Goal]) -> str:
    """The same for a page, with test losses at each one's arrival, and others' at K-FAC's."""
    heads = [
        "task, training loss",
        "K-FAC: steps, seconds, test loss",
        "best rival",
        "its steps, seconds, test loss",
        "ratio",
        "rivals' lowest test loss when K-FAC is there",
    ]
    rows = [heads, ["---"] * len(heads), *map(_markdown_cells, found)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _markdown_cells(goal: Goal) -> list[str]:
    then = [r.test_then for r in goal.rivals if math.isfinite(r.test_then)]
    best = ["none arrives", "–"] if goal.best is None else [_named(goal.best), _told(goal.best)]
    ratio = f"**{ratio_said(goal.ratio)}**" if goal.won else ratio_said(goal.ratio)
    where = f"{goal.task}, {goal.target:g}"
    return [where, _told(goal.kfac), *best, ratio, _number(min(then, default=math.nan))]


def _told(arrival: Arrival) -> str:
    if math.isinf(arrival.steps.median):
        return "never"
    steps, seconds = _whole(arrival.steps.median), digits(arrival.seconds.median)
    return f"{steps}, {seconds}, {_number(arrival.test)}"


def ratio_said(ratio: Spread | None) -> str:
    """A ratio with its interval, never where K-FAC does not arrive."""
    return "–" if ratio is None else ranged(ratio, _times)


def _times(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.2f}"


def _steps(arrival: Arrival) -> str:
    return ranged(arrival.steps, _whole)


def _time(arrival: Arrival) -> str:
    return ranged(arrival.seconds, digits_or_never)


def _whole(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.0f}"


def digits_or_never(value: float) -> str:
    return "never" if math.isinf(value) else digits(value)


def _number(value: float) -> str:
    return digits(value) if math.isfinite(value) else "–"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


def verdict(found: Sequence[Goal]) -> str:
    """What the clock says over all targets, for better or worse."""
    if not found:
        return "No task was run to its end: there is nothing to say yet. With --out, run it again."
    won = [goal for goal in found if goal.won]
    clearly = [goal for goal in won if goal.ratio is None or goal.ratio.median <= CLEARLY]
    lost = [goal for goal in found if not goal.won]
    said = f"K-FAC with nothing set wins {len(won)} of {len(found)} on the clock"
    said += f", {len(clearly)} of them by a fifth or more." if won else "."
    return f"{said} Not ahead: {'; '.join(map(_behind, lost))}." if lost else said


def _behind(goal: Goal) -> str:
    place = f"{goal.task} at {goal.target:g}"
    better = goal.better_on_test
    if goal.first and better is not None:
        return f"{place} (first, but {better.label}'s test loss is lower by then)"
    if goal.best is None:
        return f"{place} (neither it nor a rival arrives)"
    if goal.ratio is None or math.isinf(goal.ratio.median):
        return f"{place} (K-FAC does not arrive, {goal.best.label} does)"
    return f"{place} ({goal.ratio.median:.2f} times {goal.best.label}'s seconds)"


def tuning_told(plan: Plan, tuned: Board) -> list[dict[str, Any]]:
    """Every run of the tuning, with the steps to each target and where it ended, for a file."""
    grids = {rival.name: plan.settings(rival) for rival in plan.rivals}
    return [
        {
            **asdict(lane),
            "described": describe(grids[lane.rival][lane.setting]),
            "steps to targets": [steps_to(records, target) for target in plan.targets],
            "steps": records[-1].step,
            "final": final_loss(records),
        }
        for lane, records in tuned.items()
    ]
