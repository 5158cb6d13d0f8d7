"""What the runs say: tables, and one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kronewton.lab.contest import Board, Plan, best_settings, final_loss, first_below
from kronewton.lab.rivals import KFAC, Rival, describe, family
from kronewton.lab.training import Record


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest over the seeds; infinite where a run never got there."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One rival at its best setting. The ratios are its medians over K-FAC's.

    length: the steps that its runs had; last_step and last_seconds: where they ended.
    """

    rival: str
    label: str
    setting: str
    tried: int
    seeds: int
    length: int
    reached: int
    steps: Spread
    seconds: Spread
    step_ratio: float | None
    second_ratio: float | None
    last_step: float
    last_seconds: float
    final: Spread
    lowest_in_grid: float
    test: float
    metric: float | None


@dataclass(frozen=True)
class Match:
    """How soon K-FAC's training loss is where a rival's ended, seed against the same seed.

    steps: of K-FAC's, to the rival's last loss. share: those as a part of the rival's own steps.
    Infinite where K-FAC's run ended before. seeds: how many ended, a diverged rival's left out.
    """

    rival: str
    label: str
    seeds: int
    end: Spread
    steps: Spread
    share: Spread


@dataclass(frozen=True)
class Report:
    """A contest in numbers, with what they depend on."""

    task: str
    unit: str
    target: float
    seeds: tuple[int, ...]
    seconds: float
    device: str
    threads: int
    metric: str | None
    interrupted: bool
    lines: tuple[Line, ...]
    matches: tuple[Match, ...] = ()


def summarise(plan: Plan, tuned: Board, raced: Board, interrupted: bool = False) -> Report:
    """One line per rival that ran, the first to reach the target on top."""
    found = [_line(plan, rival, tuned, raced) for rival in plan.rivals]
    lines = _with_ratios([line for line in found if line is not None])
    return Report(
        task=plan.task.described(),
        unit=plan.task.unit,
        target=plan.target,
        seeds=plan.seeds,
        seconds=plan.budget.seconds,
        device=str(plan.device),
        threads=torch.get_num_threads(),
        metric=plan.task.metric.name if plan.task.metric else None,
        interrupted=interrupted,
        lines=tuple(sorted(lines, key=lambda line: (line.seconds.median, line.final.median))),
        matches=tuple(m for m in (_match(rival, raced) for rival in plan.rivals) if m is not None),
    )


def _match(rival: Rival, raced: Board) -> Match | None:
    """K-FAC against that rival's ends; None if no seed has both."""
    kfac = {lane.seed: records for lane, records in raced.items() if lane.rival == KFAC}
    ends, steps, shares = [], [], []
    for lane, records in raced.items():
        end = final_loss(records)
        if lane.rival != rival.name or family(rival.name) == KFAC or math.isinf(end):
            continue
        first = first_below(kfac.get(lane.seed, ()), end)
        ends.append(end)
        steps.append(math.inf if first is None else first.step)
        shares.append(steps[-1] / records[-1].step)
    if not (kfac and ends):
        return None
    spreads = (spread(values) for values in (ends, steps, shares))
    return Match(rival.name, rival.label, len(ends), *spreads)


def _line(plan: Plan, rival: Rival, tuned: Board, raced: Board) -> Line | None:
    runs = [records for lane, records in raced.items() if lane.rival == rival.name and records]
    if not runs:
        return None
    firsts = [first_below(records, plan.target) for records in runs]
    grid = [final_loss(records) for lane, records in tuned.items() if lane.rival == rival.name]
    finals = [final_loss(records) for records in runs]
    return Line(
        rival=rival.name,
        label=rival.label,
        setting=describe(plan.settings(rival)[best_settings(plan, rival, tuned)[-1]]),
        tried=len(plan.settings(rival)),
        seeds=len(runs),
        length=plan.budget_of(rival.name).steps,
        reached=sum(first is not None for first in firsts),
        steps=spread(math.inf if first is None else first.step for first in firsts),
        seconds=spread(math.inf if first is None else first.seconds for first in firsts),
        step_ratio=None,
        second_ratio=None,
        last_step=median(records[-1].step for records in runs),
        last_seconds=median(records[-1].seconds for records in runs),
        final=spread(finals),
        lowest_in_grid=min([*grid, *finals]),
        test=_last(runs, lambda record: record.test_loss),
        metric=_last(runs, lambda record: record.metric) if plan.task.metric else None,
    )


def spread(values: Iterable[float]) -> Spread:
    """Median and range of some numbers, one at least."""
    ordered = sorted(values)
    return Spread(median(ordered), ordered[0], ordered[-1])


def _last(runs: Sequence[Sequence[Record]], of: Callable[[Record], float | None]) -> float:
    """The median over runs of a value at their last evaluation."""
    values = [[v for v in map(of, records) if v is not None] for records in runs]
    return median(v[-1] if v else math.nan for v in values)


def _with_ratios(lines: list[Line]) -> list[Line]:
    base = next((line for line in lines if line.rival == KFAC), None)
    if base is None or math.isinf(base.steps.median):
        return lines
    return [
        replace(
            line,
            step_ratio=line.steps.median / base.steps.median,
            second_ratio=line.seconds.median / base.seconds.median,
        )
        for line in lines
    ]


def contest_tables(report: Report) -> Group:
    """How soon each rival got there, and how it stood at the end; K-FAC in bold."""
    name = report.task.split(":")[0]
    soon = framed(f"{name}: to a training loss of {report.target:g}")
    for head in ("optimizer", "best setting", "steps", "×", "seconds", "×"):
        soon.add_column(head, justify="left" if head in ("optimizer", "best setting") else "right")
    end = framed(f"{name}: at the end of {limit(report)}")
    heads = ["optimizer", "steps", "seconds", "training loss", "lowest\nin grid", "test\nloss"]
    for head in heads + ([report.metric] if report.metric else []):
        end.add_column(head, justify="left" if head == "optimizer" else "right")
    for line in report.lines:
        style = "bold" if line.rival == KFAC else ""
        soon.add_row(*_soon(line), style=style)
        end.add_row(*_end(line), style=style)
    return Group(soon, end, Text(_conditions(report)))


def framed(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)


def _soon(line: Line) -> list[str]:
    return [
        line.label,
        line.setting,
        steps_to_target(line),
        _ratio(line.step_ratio),
        seconds_to_target(line),
        _ratio(line.second_ratio),
    ]


def steps_to_target(line: Line) -> str:
    return ranged(line.steps, lambda value: "never" if math.isinf(value) else f"{value:.0f}")


def seconds_to_target(line: Line) -> str:
    return ranged(line.seconds, lambda value: "never" if math.isinf(value) else digits(value))


def _end(line: Line) -> list[str]:
    cells = [
        line.label,
        f"{line.last_step:.0f}",
        digits(line.last_seconds),
        ranged(line.final, number),
        number(line.lowest_in_grid),
        number(line.test),
    ]
    return cells + ([] if line.metric is None else [f"{100 * line.metric:.1f} %"])


def limit(report: Report) -> str:
    if report.interrupted:
        return "what was run before Ctrl-C"
    if math.isfinite(report.seconds):
        return f"{report.seconds:g} s"
    lengths = [line.length for line in report.lines]
    low, high = min(lengths), max(lengths)
    return f"{low} steps" if low == high else f"{low} to {high} steps"


def _conditions(report: Report) -> str:
    return (
        f"{seeds_said(report)} {tuning_said(report)} ×: as a multiple of K-FAC's. "
        f"{clock_said(report)}"
    )


def seeds_said(report: Report) -> str:
    seeds = ", ".join(map(str, report.seeds))
    return f"Losses are {report.unit}. Median [range] over seeds {seeds}."


def tuning_said(report: Report) -> str:
    tried = max(line.tried for line in report.lines)
    return (
        f"Each rival's setting is the best of {tried} settings on seed {report.seeds[0]}, by the "
        "fewest steps or else by the lowest loss."
    )


def clock_said(report: Report) -> str:
    threads = f"{report.threads} thread{'s' if report.threads > 1 else ''}"
    return f"Seconds are of training alone, {report.device}, {threads}."


def ranged(values: Spread, show: Callable[[float], str]) -> str:
    """The median as shown, and the range behind it if it is one."""
    text = show(values.median)
    if values.low == values.high or math.isinf(values.median):
        return text
    return f"{text} [{show(values.low)}–{show(values.high)}]"


def _ratio(value: float | None) -> str:
    return "–" if value is None or math.isinf(value) else f"{value:.2f}"


def number(value: float) -> str:
    return digits(value) if math.isfinite(value) else "diverged"


def digits(value: float) -> str:
    """Two digits, or all before the point: 236, not 2.4e+02."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value:.2g}"


def verdict(report: Report) -> str:
    """What the numbers say about K-FAC in a sentence or two, for better or worse."""
    kfac = next((line for line in report.lines if line.rival == KFAC), None)
    name = report.task.split(":")[0]
    goal = f"a training loss of {report.target:g}"
    others = [line for line in report.lines if line.rival != KFAC]
    done = [line for line in others if math.isfinite(line.steps.median)]
    if kfac is None:
        first = min(others, key=lambda line: (line.steps.median, line.final.median))
        return f"On {name}, {first.label} is first of {len(others)} by steps; K-FAC did not run."
    if math.isinf(kfac.steps.median):
        who = ", ".join(line.label for line in done) or "none"
        return (
            f"On {name}, K-FAC does not reach {goal} (it ends at {number(kfac.final.median)}); "
            f"those that do: {who}."
        )
    opening = (
        f"On {name}, K-FAC with nothing set reaches {goal} in {kfac.steps.median:.0f} steps and "
        f"{digits(kfac.seconds.median)} s ({_seeds(kfac.seeds)})"
    )
    if not done:
        return f"{opening}{_also_ran(kfac, others)}."
    steps = _standing(done, "steps", lambda line: line.step_ratio)
    seconds = _standing(done, "seconds", lambda line: line.second_ratio)
    return f"{opening}. {steps} {seconds}"


def match_said(match: Match) -> str:
    """What share of a rival's steps K-FAC took to the loss at which that rival ended."""
    end = f"the training loss at which {match.label} ends ({number(match.end.median)})"
    over = f"{match.seeds} seeds, each against its own" if match.seeds > 1 else "one seed"
    if math.isinf(match.share.median):
        return f"K-FAC does not reach {end} in its steps ({over})."
    share = ranged(match.share, lambda value: "never" if math.isinf(value) else f"{value:.2f}")
    steps = f"{match.steps.median:.0f} step{'' if match.steps.median == 1 else 's'}"
    return f"K-FAC reaches {end} in {steps}, {share} of {match.label}'s ({over})."


def _also_ran(kfac: Line, others: Sequence[Line]) -> str:
    if not others:
        return ""
    best = min(others, key=lambda line: line.final.median)
    after = "" if best.length == kfac.length else f" after {best.last_step:.0f} steps"
    return (
        f"; of {len(others)} tuned rivals none does, and the lowest, {best.label}, ends at "
        f"{number(best.final.median)}{after}"
    )


def _seeds(count: int) -> str:
    return f"medians over {count} seeds" if count > 1 else "one seed"


def _standing(done: Sequence[Line], unit: str, of: Callable[[Line], float | None]) -> str:
    best = min(done, key=lambda line: of(line) or math.inf)
    ratio = of(best) or math.inf
    if ratio > 1:
        return f"It is first by {unit}: {best.label}, the next, takes {ratio:.2g} times as many."
    if ratio == 1:
        return f"By {unit} it is level with {best.label}."
    return f"By {unit} it is behind: {best.label} takes {ratio:.2g} times as many."


def curves(raced: Board) -> list[dict[str, Any]]:
    """The evaluated records of every run, for a file."""
    return [
        {**asdict(lane), "records": [r for r in records if r.train_loss is not None or r.diverged]}
        for lane, records in raced.items()
    ]
