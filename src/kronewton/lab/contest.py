"""Rivals against each other: every one tuned over its grid, then all seeds in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from kronewton.errors import OptionError
from kronewton.lab.rivals import KFAC, Rival, Setting, family
from kronewton.lab.tasks import Task
from kronewton.lab.training import Budget, Record, Run, interleave, start, train

WARM_UP = 3
CHUNK = 10  # steps that the shortest run takes before the next one's turn
BY_TUNING = -math.inf  # the target before it is known: no loss is low enough


@dataclass(frozen=True)
class Plan:
    """Who runs what, how long and how often.

    target: training loss to reach, in the task's unit. grid: how many settings each rival may try.
    budgets: by name, for the rivals whose runs have a length of their own. aim: the target as
    settings are chosen by it, where it was rounded for the race.
    """

    task: Task
    rivals: tuple[Rival, ...]
    seeds: tuple[int, ...]
    budget: Budget
    target: float
    grid: int
    device: torch.device
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    aim: float | None = None

    def settings(self, rival: Rival) -> tuple[Setting, ...]:
        return rival.grid[: self.grid]

    def budget_of(self, rival: str) -> Budget:
        return self.budgets.get(rival, self.budget)

    @property
    def equal(self) -> bool:
        """Whether all runs have the same length."""
        return len({self.budget_of(rival.name).steps for rival in self.rivals}) <= 1


@dataclass(frozen=True)
class Lane:
    """One run of a contest: a rival, the place of its setting in the grid, a seed."""

    rival: str
    setting: int
    seed: int


Board = dict[Lane, list[Record]]


def tuning_lanes(plan: Plan) -> list[Lane]:
    """Every setting of every rival that has a choice, on the first seed."""
    return [
        Lane(rival.name, index, plan.seeds[0])
        for rival in plan.rivals
        for index in range(len(plan.settings(rival)))
        if len(plan.settings(rival)) > 1
    ]


def racing_lanes(plan: Plan, tuned: Board) -> list[Lane]:
    """Every rival at its best setting, on every seed; rivals next to each other within a seed."""
    best = {rival.name: best_setting(plan, rival, tuned) for rival in plan.rivals}
    return [Lane(name, best[name], seed) for seed in plan.seeds for name in best]


def best_setting(plan: Plan, rival: Rival, tuned: Board) -> int:
    """The setting that reached the target in the fewest steps, or else ended lowest."""
    lanes = [lane for lane in tuned if lane.rival == rival.name]
    aim = plan.target if plan.aim is None else plan.aim

    def merit(lane: Lane) -> tuple[float, float]:
        reached = first_below(tuned[lane], aim)
        return (math.inf if reached is None else reached.step), final_loss(tuned[lane])

    return min(lanes, key=merit).setting if lanes else 0


def check(plan: Plan) -> list[Run]:
    """Start every rival once, so that what refuses does so before the tuning and not after it.

    Returns the runs, none of which has made a step.
    Raises OptionError if tuning is to find the target and no rival of K-FAC's is tuned.
    """
    runs = [
        start(plan.task, rival, plan.settings(rival)[0], plan.seeds[0], plan.device)
        for rival in plan.rivals
    ]
    lanes = tuning_lanes(plan)
    if plan.target == BY_TUNING and all(family(lane.rival) == KFAC for lane in lanes):
        raise OptionError(
            "--target auto is the loss at which the best tuned rival of K-FAC's ends, and none is "
            "tuned here: name one in --rivals with a --grid-budget of 2 or more, or give a number."
        )
    return runs


def with_target(plan: Plan, tuned: Board) -> Plan:
    """The plan, its target the lowest loss at which a rival of K-FAC's ended its tuning.

    Rounded up to two digits, so that the same run again, with another seed's luck, can reach it;
    settings are still chosen by the loss itself, or one that ends higher could win.
    Raises OptionError if every one of them diverged.
    """
    if plan.target != BY_TUNING:
        return plan
    lowest = min(final_loss(rs) for lane, rs in tuned.items() if family(lane.rival) != KFAC)
    if math.isinf(lowest):
        raise OptionError("--target auto found no loss: every tuned run diverged; give a number.")
    return replace(plan, target=_rounded_up(lowest), aim=lowest)


def _rounded_up(value: float) -> float:
    if value <= 0:  # at a floor, within rounding
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return max(value, float(f"{math.ceil(value / unit) * unit:.2g}"))


def run_(plan: Plan, lanes: Sequence[Lane], board: Board) -> Iterator[Lane]:
    """Run lanes in turn onto the board, and tell after each step whose it was."""
    rivals = {rival.name: rival for rival in plan.rivals}
    runs = {}
    for lane in lanes:
        rival = rivals[lane.rival]
        setting = plan.settings(rival)[lane.setting]
        run = start(plan.task, rival, setting, lane.seed, plan.device)
        runs[lane] = train(run, plan.budget_of(lane.rival))
        board[lane] = []
    for lane, record in interleave(runs, _turns(plan, lanes)):
        board[lane].append(record)
        yield lane


def _turns(plan: Plan, lanes: Sequence[Lane]) -> dict[Lane, int]:
    """The steps of each run's turn, in proportion to its length, so that all end together."""
    steps = {lane: plan.budget_of(lane.rival).steps for lane in lanes}
    if math.isfinite(plan.budget.seconds):  # the clock ends the runs: steps are no length
        return dict.fromkeys(steps, CHUNK)
    shortest = min(steps.values())
    return {lane: math.ceil(CHUNK * count / shortest) for lane, count in steps.items()}


def tune_(plan: Plan, board: Board) -> Iterator[Lane]:
    """Run the grids, one setting after the other: their clocks decide nothing."""
    for lane in tuning_lanes(plan):
        yield from run_(plan, [lane], board)


def race_(plan: Plan, tuned: Board, board: Board) -> Iterator[Lane]:
    """Run every rival at its best setting on every seed, all in turn in one process."""
    lanes = racing_lanes(plan, tuned)
    # What a process does only once (loading kernels, first allocations) falls on no one's clock.
    warm = replace(plan, budget=Budget(steps=WARM_UP), budgets={})
    for _ in run_(warm, lanes[: len(plan.rivals)], {}):
        pass
    yield from run_(plan, lanes, board)


def first_below(records: Sequence[Record], target: float) -> Record | None:
    """The first evaluated step whose training loss is at the target or below."""
    for record in records:
        if record.train_loss is not None and record.train_loss <= target:
            return record
    return None


def final_loss(records: Sequence[Record]) -> float:
    """The training loss at the last evaluation, infinite if the run diverged or never began."""
    if not records or records[-1].diverged:
        return math.inf
    return next((r.train_loss for r in reversed(records) if r.train_loss is not None), math.inf)
