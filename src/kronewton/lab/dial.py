"""The dial: K-FAC at several settings of `refine` and nothing else set, as rivals of each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from rich.console import Group
from rich.text import Text

from kronewton.errors import OptionError
from kronewton.lab import reports
from kronewton.lab.contest import Board, Plan
from kronewton.lab.entries import Entry
from kronewton.lab.reports import Line, Report, digits
from kronewton.lab.rivals import KFAC, Rival, find_rival
from kronewton.lab.training import Record

REFINE = "refine"
FIRST = 20  # steps over which the quadratic model's promises are looked at


@dataclass(frozen=True)
class Notch:
    """One setting of the dial: how its runs went, and what the quadratic model promised them.

    decrease: of the loss by the quadratic model, in the task's unit, a step. share: the same in
    parts of the batch's loss before the step, for as the loss falls there is less to take away.
    directions: how many refine added, as diagnostics() tells. All three are medians over the first
    steps, then over the seeds, and not a number where K-FAC does not tell.
    """

    refine: int
    line: Line
    decrease: float
    share: float
    directions: float


def read_dial(text: str) -> tuple[int, ...]:
    """The settings of a list with commas, least first. Raises OptionError if it is not one."""
    items = [item.strip() for item in text.split(",")]
    # isascii too: '²' is a digit to Python and no number.
    if not all(item.isascii() and item.isdigit() for item in items):
        raise OptionError(
            f"--refine must be whole numbers with commas, 0 or more, not {text!r}; "
            "give for example --refine 0,1,2,4,8."
        )
    settings = sorted(map(int, items))
    if len(set(settings)) < len(settings):
        raise OptionError(f"--refine names a setting twice in {text!r}; name each once.")
    return tuple(settings)


def with_dial(entries: Sequence[Entry], settings: Sequence[int]) -> tuple[Entry, ...]:
    """K-FAC at each setting, with K-FAC's own length if it is named, then the other entries."""
    steps = next((entry.steps for entry in entries if entry.rival.name == KFAC), None)
    others = [entry for entry in entries if entry.rival.name != KFAC]
    return (*(Entry(_turned(refine), steps) for refine in settings), *others)


def _turned(refine: int) -> Rival:
    # At 0 it is K-FAC as it always is, under its name: the others are held against it.
    name = f"{KFAC}+{refine}" if refine else KFAC
    return replace(
        find_rival(KFAC), name=name, label=f"K-FAC, refine {refine}", grid=({REFINE: refine},)
    )


def notches(plan: Plan, report: Report, raced: Board) -> tuple[Notch, ...]:
    """The settings of the dial that ran, least first; none if the contest is not about it."""
    lines = {line.rival: line for line in report.lines}
    turned = [r for r in plan.rivals if REFINE in r.grid[0] and r.name in lines]
    return tuple(_notch(rival, lines[rival.name], raced) for rival in turned)


def _notch(rival: Rival, line: Line, raced: Board) -> Notch:
    runs = [records[:FIRST] for lane, records in raced.items() if lane.rival == rival.name]

    def decrease(record: Record) -> float:
        return -record.settings.get("predicted", math.nan)

    return Notch(
        refine=int(rival.grid[0][REFINE]),
        line=line,
        decrease=_typical(runs, decrease),
        share=_typical(runs, lambda r: decrease(r) / r.loss if r.loss > 0 else math.nan),
        directions=_typical(runs, lambda r: r.settings.get("refined", math.nan)),
    )


def _typical(runs: Sequence[Sequence[Record]], of: Callable[[Record], float]) -> float:
    """The median over seeds of the medians over steps, where there are numbers."""
    found = [[v for v in map(of, records) if math.isfinite(v)] for records in runs]
    return median([median(values) for values in found if values] or [math.nan])


def dial_table(report: Report, found: Sequence[Notch]) -> Group:
    """A row for each setting, then the other rivals at their best."""
    name = report.task.split(":")[0]
    table = reports.framed(f"{name}: the dial, to a training loss of {report.target:g}")
    table.add_column("optimizer")
    heads = ("steps", "seconds", "training\nloss", "decrease\na step", "of the\nloss")
    for head in (*heads, "direc-\ntions"):
        table.add_column(head, justify="right")
    for notch in found:
        table.add_row(notch.line.label, *_cells(notch.line), *_promises(notch), style="bold")
    for line in others(report, found):
        table.add_row(line.label, *_cells(line), "–", "–", "–")
    return Group(table, Text(_conditions(report, found)))


def others(report: Report, found: Sequence[Notch]) -> list[Line]:
    """The lines of rivals that stand beside the dial."""
    turned = {notch.line.rival for notch in found}
    return [line for line in report.lines if line.rival not in turned]


def _cells(line: Line) -> list[str]:
    end = reports.number(line.final.median)
    return [reports.steps_to_target(line), reports.seconds_to_target(line), end]


def _promises(notch: Notch) -> list[str]:
    values = (notch.decrease, 100 * notch.share, notch.directions)
    shown = ["–" if math.isnan(value) else digits(value) for value in values]
    return [shown[0], shown[1] if math.isnan(notch.share) else f"{shown[1]} %", shown[2]]


def _conditions(report: Report, found: Sequence[Notch]) -> str:
    beside = [f"{line.label} at {line.setting}" for line in others(report, found)]
    tuned = f" {reports.tuning_said(report)} {'; '.join(beside)}." if beside else ""
    return (
        f"{reports.seeds_said(report)} Training loss: at the end of {reports.limit(report)}. "
        "Decrease a step: what the quadratic model promised, a median over the first "
        f"{FIRST} steps; of the loss: in parts of the batch's loss before the step; directions: "
        f"how many refine added.{tuned} {reports.clock_said(report)}"
    )


def dial_verdict(report: Report, found: Sequence[Notch]) -> str:
    """Which setting is best by steps and which by the clock, against the least of them."""
    name = report.task.split(":")[0]
    goal = f"a training loss of {report.target:g}"
    done = [notch for notch in found if math.isfinite(notch.line.steps.median)]
    if not done:
        best = min(found, key=lambda notch: notch.line.final.median)
        end = reports.number(best.line.final.median)
        return (
            f"On {name}, no setting of the dial reaches {goal}; the lowest, refine "
            f"{best.refine}, ends at {end}."
        )
    soon = min(done, key=lambda notch: (notch.line.steps.median, notch.line.seconds.median))
    fast = min(done, key=lambda notch: (notch.line.seconds.median, notch.line.steps.median))
    first = found[0]
    return (
        f"On {name}, {goal} takes the fewest steps at refine {soon.refine} "
        f"({_against(soon, first, _steps_of)}) and the least time at refine {fast.refine} "
        f"({_against(fast, first, _seconds_of)})."
    )


def _against(best: Notch, first: Notch, said: Callable[[Line], str]) -> str:
    if best.refine == first.refine:
        return said(best.line)
    return f"{said(best.line)}; at refine {first.refine}, {said(first.line)}"


def _steps_of(line: Line) -> str:
    return "never" if math.isinf(line.steps.median) else f"{line.steps.median:.0f}"


def _seconds_of(line: Line) -> str:
    return "never" if math.isinf(line.seconds.median) else f"{digits(line.seconds.median)} s"
