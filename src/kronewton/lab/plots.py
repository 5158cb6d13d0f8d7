"""Pictures: loss against steps and against seconds, K-FAC in front."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, whatever the machine

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from kronewton import Explanation
from kronewton.errors import DataError
from kronewton.lab.arrivals import CLEARLY, Goal
from kronewton.lab.bench import StepCost
from kronewton.lab.contest import Board, Plan, first_below
from kronewton.lab.dial import Notch
from kronewton.lab.ladder import DRAWS, RUNGS, Ladder
from kronewton.lab.reports import Line, Spread, digits
from kronewton.lab.rivals import KFAC, Rival, family, find_rival
from kronewton.lab.tasks import Task
from kronewton.lab.training import Record

# Okabe and Ito's colours, which stay apart for the colour-blind; grey for the plainest method.
COLOURS = {
    "kfac": "#D55E00",
    "sgd": "#8C8C8C",
    "adam": "#56B4E9",
    "adamw": "#0072B2",
    "lbfgs": "#000000",
    "soap": "#009E73",
    "shampoo": "#CC79A7",
    "muon": "#E69F00",
}
RUNG_COLOURS = {
    "diagonal": "#8C8C8C",
    "expand": "#D55E00",
    "reduce": "#E69F00",
    "best": "#009E73",
    "corrected": "#0072B2",
}
RUNG_GAP = 0.16  # of the distance between two layers
BLANK = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}  # behind words
INK = "#333333"
LEAST = 1e-16  # what a log axis shows of a loss at its floor
PLAIN = 500  # up to this ratio of losses, an axis has their numbers without exponents
LONG = 5  # from this ratio of lengths on, steps are on a log axis
FEW = 4  # up to so many rivals there is room for words at their ends
Point = tuple[int, float, float, float, float]


def contest_plot(plan: Plan, raced: Board, path: Path) -> None:
    """Training loss of every rival against steps and against seconds, medians and ranges."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    _race(axes, plan, raced, COLOURS)
    axes[1].legend(frameon=False, fontsize=9, loc="upper right")
    _title(figure, plan.task, f"each rival at its best setting, {_seeds(plan)}")
    _save(figure, path)


def dial_plot(
    plan: Plan, raced: Board, found: Sequence[Notch], others: Sequence[Line], path: Path
) -> None:
    """Steps and seconds to the target over the dial above, the races they come from below."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.6), layout="constrained")
    axes[1, 1].sharey(axes[1, 0])
    colours = {**COLOURS, **_ramp([notch.line.rival for notch in found])}
    _dial_panel(axes[0, 0], found, others, colours, lambda line: line.steps)
    _dial_panel(axes[0, 1], found, others, colours, lambda line: line.seconds)
    for ax, unit in zip(axes[0], ("steps", "seconds of training"), strict=True):
        ax.set(xlabel="refine", ylabel=f"{unit} to a training loss of {plan.target:g}")
    _race(axes[1], plan, raced, colours)
    axes[1, 1].tick_params(labelleft=False)
    handles, labels = axes[1, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    _title(figure, plan.task, f"K-FAC with the dial at each setting, {_seeds(plan)}")
    _save(figure, path)


def _ramp(names: Sequence[str]) -> dict[str, str]:
    """K-FAC's colours from light to dark as the dial is turned up."""
    ramp = matplotlib.colormaps["YlOrBr"]
    places = [0.4 + 0.6 * i / max(1, len(names) - 1) for i in range(len(names))]
    return {name: to_hex(ramp(place)) for name, place in zip(names, places, strict=True)}


def _dial_panel(
    ax: Axes,
    found: Sequence[Notch],
    others: Sequence[Line],
    colours: Mapping[str, str],
    of: Callable[[Line], Spread],
) -> None:
    """Medians over the dial with their ranges, and what other rivals take as lines across."""
    spreads = [of(notch.line) for notch in found]
    ends = [v for spread in spreads for v in (spread.median, spread.high) if math.isfinite(v)]
    high = max(ends, default=1.0)
    beside = [of(line).median for line in others]
    top = 1.15 * max([high, *(value for value in beside if value < LONG * high)])
    ax.plot(range(len(found)), [s.median for s in spreads], color="#BBBBBB", zorder=2)
    for place, (notch, spread) in enumerate(zip(found, spreads, strict=True)):
        _point(ax, place, spread, colours[notch.line.rival], top)
    lines = sorted(zip(beside, others, strict=True), key=lambda pair: -pair[0])
    _across(ax, [(value, line) for value, line in lines if value < top], len(found) - 0.5)
    _out_of_sight(ax, [(value, line) for value, line in lines if value >= top])
    ax.set_xticks(range(len(found)), [str(notch.refine) for notch in found])
    ax.set(xlim=(-0.5, len(found) - 0.5), ylim=(0, top))
    _frame(ax)


def _point(ax: Axes, place: int, spread: Spread, colour: str, top: float) -> None:
    """A median with its range; a cross at the top where the median is never."""
    if math.isinf(spread.median):
        ax.plot(place, 0.97 * top, "x", color=colour, markersize=9, markeredgewidth=2.5)
        ax.annotate("never", (place, 0.97 * top), xytext=(8, 0), textcoords="offset points",
                    va="center", fontsize=8, color=INK)  # fmt: skip
    else:
        ax.vlines(place, spread.low, min(spread.high, top), color=colour, linewidth=6, alpha=0.35)
        ax.plot(place, spread.median, "o", color=colour, markersize=9, zorder=5)


def _across(ax: Axes, lines: Sequence[tuple[float, Line]], right: float) -> None:
    """Other rivals' lines, highest first, named above and below in turn: two may lie close."""
    for index, (value, line) in enumerate(lines):
        colour = COLOURS[line.rival]
        ax.axhline(value, color=colour, linewidth=1.5, zorder=1.8)
        side = ("bottom", "top")[index % 2]
        place = (right - 0.7 * (index // 2), value)
        ax.annotate(line.label, place, xytext=(-4, 2 if side == "bottom" else -3), va=side,
                    ha="right", textcoords="offset points", fontsize=8, color=colour)  # fmt: skip


def _out_of_sight(ax: Axes, lines: Sequence[tuple[float, Line]]) -> None:
    """Name the rivals whose lines would lie far above the dial's points."""
    words = [f"{line.label} {'never' if math.isinf(v) else digits(v)}" for v, line in lines]
    if words:
        text = f"above: {', '.join(words)}"
        ax.text(1, 1.02, text, transform=ax.transAxes, ha="right", fontsize=8, color=INK)


def arrival_plot(plan: Plan, raced: Board, found: Sequence[Goal], path: Path) -> None:
    """Training loss against seconds, a line for each run, and a dot where it is at a target."""
    figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for rival in plan.rivals:
        runs = [records for lane, records in raced.items() if lane.rival == rival.name]
        for place, records in enumerate(runs):
            _approach(ax, rival, records, plan.targets, label="_" if place else rival.label)
    _dress(ax)
    for target in plan.targets:
        ax.axhline(target, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ax.set(xlabel="seconds of training", ylabel=f"training loss ({plan.task.unit})")
    ax.set_xlim(0, _seconds_to_see(found, raced))
    ax.legend(frameon=False, fontsize=9, loc="upper right")
    count = f"{len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed"
    _title(figure, plan.task, f"each rival at its best settings, {count}; dashed: the targets")
    _save(figure, path)


def _approach(
    ax: Axes, rival: Rival, records: Sequence[Record], targets: Sequence[float], label: str
) -> None:
    colour, front = COLOURS[rival.name], rival.name == KFAC
    seen = [r for r in records if r.train_loss is not None and not r.diverged]
    points = [(r.seconds, max(r.train_loss or LEAST, LEAST)) for r in seen]
    width, order = (2, 5) if front else (1.2, 3)
    ax.plot(*zip(*points, strict=True), color=colour, linewidth=width, zorder=order, label=label)
    for first in filter(None, (first_below(records, target) for target in targets)):
        height = max(first.train_loss or LEAST, LEAST)
        ax.plot(first.seconds, height, "o", color=colour, markersize=4, zorder=order)


def _seconds_to_see(found: Sequence[Goal], raced: Board) -> float:
    """Until all have arrived that do before long: who is late runs out of the picture."""
    ends = sorted(a.seconds.high for goal in found for a in (goal.kfac, *goal.rivals))
    known = [end for end in ends if math.isfinite(end)]
    if not known:
        return max(records[-1].seconds for records in raced.values())
    kfac = [goal.kfac.seconds.high for goal in found if math.isfinite(goal.kfac.seconds.high)]
    return 1.05 * min(known[-1], max(20 * known[0], *(2.5 * end for end in kfac), 0.0))


def ratio_plot(found: Sequence[Goal], path: Path) -> None:
    """K-FAC's seconds in parts of the best rival's, median and range, a line for each target."""
    figure, ax = plt.subplots(figsize=(8, 1.4 + 0.36 * len(found)), layout="constrained")
    rows = list(enumerate(reversed(found)))
    ends = [v for goal in found if goal.ratio for v in (goal.ratio.low, goal.ratio.high)]
    known = [v for v in ends if 0 < v < math.inf]
    low, high = min([0.4, *known]) / 1.5, 1.5 * max([2.0, *known])
    for row, goal in rows:
        _ratio_mark(ax, row, goal, low, high)
    ax.set_yticks([row for row, _ in rows], [f"{g.task}, {g.target:g}" for _, g in rows])
    ax.set_xscale("log")
    ax.set(xlim=(low, high), ylim=(-0.7, len(found) - 0.3))
    ax.set_xlabel("K-FAC's seconds in parts of the best tuned rival's", fontsize=9, color=INK)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    _frame(ax)
    ax.grid(False, axis="y")
    ax.axvline(1, color=INK, linewidth=1, zorder=1)
    ax.axvline(CLEARLY, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    said = "Time to a training loss, K-FAC with nothing set: median and range over seeds"
    figure.suptitle(said, x=0.01, ha="left", fontsize=10, color=INK)
    _save(figure, path)


def _ratio_mark(ax: Axes, row: int, goal: Goal, low: float, high: float) -> None:
    """A dot with its range and the rival's name; a word at an edge where there is no ratio."""
    colour = COLOURS[KFAC] if goal.won else COLOURS["sgd"]
    if goal.best is None or goal.ratio is None:
        said, place = ("no rival arrives", low) if goal.won else ("none arrives", 1.0)
        ax.text(1.04 * place, row, said, va="center", fontsize=8, color=colour)
        return
    middle = goal.ratio.median
    if math.isinf(middle):
        ax.text(high / 1.04, row, f"K-FAC never, {goal.best.label} does", va="center", ha="right",
                fontsize=8, color=colour)  # fmt: skip
        return
    ends = (max(goal.ratio.low, low), min(goal.ratio.high, high))
    ax.plot(ends, (row, row), color=colour, linewidth=6, alpha=0.35, solid_capstyle="butt")
    ax.plot(max(middle, low), row, "o", color=colour, markersize=7, zorder=4)
    ax.annotate(goal.best.label, (ends[1], row), xytext=(7, 0), textcoords="offset points",
                va="center", fontsize=8, color=INK, bbox=BLANK)  # fmt: skip


def run_plot(task: Task, label: str, name: str, records: Sequence[Record], path: Path) -> None:
    """One run: its losses above, what the optimizer chose below."""
    figure, axes = plt.subplots(2, 1, figsize=(8, 6.4), sharex=True, layout="constrained")
    seen = [r for r in records if r.train_loss is not None]
    steps = [r.step for r in records]
    colour = COLOURS[name]
    if task.batch_size is not None:
        losses = [max(r.loss, LEAST) for r in records]
        axes[0].plot(steps, losses, color=colour, alpha=0.35, linewidth=0.8, label="batch")
    for key, style in (("train_loss", "-"), ("test_loss", "--")):
        values = [max(getattr(r, key), LEAST) for r in seen]
        axes[0].plot([r.step for r in seen], values, style, color=colour, label=key.split("_")[0])
    axes[0].set(ylabel=task.unit)
    _choices(axes[1], records)
    for ax in axes:
        _dress(ax)
        ax.legend(frameon=False, fontsize=9)
    axes[1].set(xlabel="steps")
    _title(figure, task, label)
    _save(figure, path)


def cost_plot(costs: Sequence[StepCost], path: Path) -> None:
    """K-FAC's step as a multiple of the others', median and quartiles, a line per task and base."""
    figure, ax = plt.subplots(figsize=(7, 0.9 + 0.4 * len(costs)), layout="constrained")
    for row, cost in enumerate(reversed(costs)):
        ax.plot((cost.low, cost.high), (row, row), color=COLOURS[cost.base], linewidth=5, alpha=0.3)
        ax.plot(cost.ratio, row, "o", color=COLOURS[cost.base])
    names = [f"{cost.task}, {find_rival(cost.base).label}" for cost in reversed(costs)]
    ax.set_yticks(range(len(costs)), names)
    ax.set(xlim=(0, None), ylim=(-0.6, len(costs) - 0.4))
    ax.set_xlabel("a K-FAC step, nothing set, in steps of the other", fontsize=9, color=INK)
    ax.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=INK, labelsize=9)
    _save(figure, path)


def ladder_plot(task: Task, found: Ladder, path: Path) -> None:
    """A group per layer, a mark per approximation, as high as it is far from the exact block."""
    assert found.explanation is not None
    rows = found.explanation.rows
    figure, ax = plt.subplots(figsize=(max(7.4, 0.8 + 1.75 * len(rows)), 4.4), layout="constrained")
    for index, (field, label) in enumerate(RUNGS.items()):
        places = [layer + RUNG_GAP * (index - (len(RUNGS) - 1) / 2) for layer in range(len(rows))]
        values = [getattr(row.distances, field) for row in rows]
        _rung(ax, places, values, RUNG_COLOURS[field], label)
    _ladder_axes(ax, found.explanation)
    figure.legend(loc="outside lower center", ncols=len(RUNGS), frameon=False, fontsize=9,
                  handletextpad=0.1, columnspacing=1.4)  # fmt: skip
    exact = f"that of {DRAWS} draws" if found.remark else "the exact one"
    figure.suptitle(
        f"{task.name}, {found.when()}\n"
        f"how far each approximation of a layer's Gauss-Newton block is from {exact}",
        x=0.01, ha="left", fontsize=10, color=INK,
    )  # fmt: skip
    _save(figure, path)


def _rung(
    ax: Axes, places: Sequence[float], values: Sequence[float], colour: str, label: str
) -> None:
    """One approximation in every layer: stems, marks, and their heights in digits."""
    ax.vlines(places, 0, values, color=colour, linewidth=3.5, alpha=0.35, zorder=2)
    ax.plot(places, values, "o", color=colour, markersize=8, zorder=4, clip_on=False, label=label)
    for place, value in zip(places, values, strict=True):
        ax.annotate(_short(value), (place, value), xytext=(0, 7), textcoords="offset points",
                    ha="center", fontsize=7.5, color=colour, zorder=3, bbox=BLANK)  # fmt: skip


def _short(distance: float) -> str:
    """Two digits after the point, unless they would say 0 or 1 of what is neither."""
    if distance < 1e-6:
        return "0"
    if distance < 0.005:
        return f"{distance:.0e}".replace("e-0", "e-")
    return f"{distance:.2f}" if distance < 0.995 or distance >= 1 else f"{distance:.3f}"


def _layer_name(name: str, kind: str, matrix: str, positions: str) -> str:
    first = f"layer {name}" if name.isdigit() else name
    return f"{first}\n{kind}\n{matrix}, {positions} position{'' if positions == '1' else 's'}"


def _ladder_axes(ax: Axes, told: Explanation) -> None:
    names = [_layer_name(*cells[:4]) for cells in told.cells()]
    top = max(1.0, *(getattr(row.distances, field) for row in told.rows for field in RUNGS))
    ax.set_xticks(range(len(names)), names)
    ax.set(xlim=(-0.5, len(names) - 0.5), ylim=(0, 1.16 * top))
    ax.set_ylabel("relative distance", fontsize=9, color=INK)
    ax.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ax.text(0.995, 0.99, "dashed: as far off as the zero matrix", transform=ax.transAxes,
            ha="right", va="top", fontsize=8, color=INK)  # fmt: skip
    _frame(ax)
    ax.grid(False, axis="x")
    ax.tick_params(axis="x", length=0, pad=8)  # clear of marks at 0


def _race(axes: Sequence[Axes], plan: Plan, raced: Board, colours: Mapping[str, str]) -> None:
    """Training loss against steps and against seconds, with the target across both."""
    ends = []
    longest = max((rs[-1].step for rs in raced.values() if rs), default=0)
    for rival in plan.rivals:
        runs = [rs for lane, rs in raced.items() if lane.rival == rival.name]
        points = _median_curve([[r for r in rs if r.train_loss is not None] for rs in runs])
        if not points:
            continue
        _draw(axes, points, rival, colours[rival.name])
        if not plan.equal and len(plan.rivals) <= FEW:
            early = points[-1][0] < longest / 3
            _mark_end(axes, points, rival, colours[rival.name], early)
        if not any(rs and rs[-1].diverged for rs in runs):
            ends.append(points[-1][0])
    for ax in axes:
        _dress(ax)
        ax.axhline(plan.target, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes[0].annotate(
        f"target {plan.target:g}",
        (0.5, plan.target),
        xycoords=("axes fraction", "data"),
        xytext=(0, -10),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=INK,
    )
    axes[0].set(xlabel="steps", ylabel=f"training loss ({plan.task.unit})")
    _span_steps(axes[0], ends)
    axes[1].set(xlabel="seconds of training", xlim=(0, _seconds_shown(plan, raced)))


def _span_steps(ax: Axes, ends: Sequence[int]) -> None:
    """A log axis where the shortest run would be a stroke at the edge of the longest."""
    if ends and max(ends) > LONG * min(ends):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlim(1, None)
    else:
        ax.set_xlim(0, None)


def _seeds(plan: Plan) -> str:
    return f"median and range of {len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed"


def _median_curve(runs: Sequence[Sequence[Record]]) -> list[Point]:
    """(step, median seconds, median, least, greatest loss) where every run was evaluated."""
    points = []
    for rows in zip(*runs, strict=False):
        losses = [max(r.train_loss or LEAST, LEAST) for r in rows]
        if len({r.step for r in rows}) == 1 and all(map(math.isfinite, losses)):
            seconds = median(r.seconds for r in rows)
            points.append((rows[0].step, seconds, median(losses), min(losses), max(losses)))
    return points


def _draw(
    axes: Sequence[Axes],
    points: Sequence[Point],
    rival: Rival,
    colour: str,
) -> None:
    steps, seconds, middle, low, high = zip(*points, strict=True)
    front = family(rival.name) == KFAC
    for ax, x in zip(axes, (steps, seconds), strict=True):
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(
            x,
            middle,
            color=colour,
            linewidth=2.4 if front else 1.5,
            zorder=5 if front else 3,
            label=rival.label,
        )


def _mark_end(
    axes: Sequence[Axes],
    points: Sequence[Point],
    rival: Rival,
    colour: str,
    early: bool,
) -> None:
    """A dot where a run of its own length ends, with what it came to: to the right if early."""
    step, seconds, loss, *_ = points[-1]
    said = (f"{rival.label}, {step} steps: {digits(loss)}", f"{digits(seconds)} s")
    for ax, x, text in zip(axes, (step, seconds), said, strict=True):
        ax.plot(x, loss, "o", color=colour, markersize=6, zorder=6)
        ax.margins(y=0.12)  # room for the words under the lowest
        ax.annotate(
            text,
            (x, loss),
            xytext=(0, -8),
            textcoords="offset points",
            ha="left" if early else "right",
            va="top",
            fontsize=8,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
            zorder=6,
        )


def _choices(ax: Axes, records: Sequence[Record]) -> None:
    """Learning rate, momentum and damping where they are positive, on one log axis."""
    colours = {"lr": "#0072B2", "momentum": "#009E73", "damping": "#CC79A7"}
    for key, colour in colours.items():
        pairs = [(r.step, r.settings[key]) for r in records if r.settings.get(key, 0.0) > 0]
        if pairs:
            ax.plot(*zip(*pairs, strict=True), color=colour, linewidth=1.2, label=key)


def _seconds_shown(plan: Plan, raced: Board) -> float:
    """Where the clock's axis ends: slower rivals run out of the picture, not the others into it.

    Unless their lengths were chosen: then every run is seen to its end.
    """
    ends = [
        median(rs[-1].seconds for lane, rs in raced.items() if lane.rival == rival.name and rs)
        for rival in plan.rivals
        if any(rs for lane, rs in raced.items() if lane.rival == rival.name)
    ]
    if not ends:
        return 1.0
    return min(max(ends), 3 * median(ends)) if plan.equal else 1.03 * max(ends)


def _dress(ax: Axes) -> None:
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < PLAIN * low:  # 2 and 5 instead of 2 × 10⁰ and 5 × 10⁰
        ax.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
    _frame(ax)


def _frame(ax: Axes) -> None:
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(which="both", colors=INK, labelsize=9)


def _title(figure: Figure, task: Task, below: str) -> None:
    figure.suptitle(f"{task.described()}\n{below}", x=0.01, ha="left", fontsize=10, color=INK)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DataError(
            f"{path} can't be written ({error.strerror}); name another --out."
        ) from error
    finally:
        plt.close(figure)
