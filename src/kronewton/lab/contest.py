"""Rivals against each other: every one tuned over its grid, then all in turn, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    targets: training losses to reach, in the task's unit, the last one the lowest. grid: how many
    settings each rival may try. budgets: by name, for the rivals whose runs have a length of their
    own. aims: the targets as settings are chosen by them, where they were rounded for the race.
    """

    task: Task
    rivals: tuple[Rival, ...]
    seeds: tuple[int, ...]
    budget: Budget
    targets: tuple[float, ...]
    grid: int
    device: torch.device
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    aims: tuple[float, ...] = ()

    @property
    def target(self) -> float:
        """The last of the targets."""
        return self.targets[-1]

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
Keep = Callable[[Sequence[Lane]], None]  # told of lanes that have ended and will not change


def forget(lanes: Sequence[Lane]) -> None:
    """Keep nothing."""


def tuning_lanes(plan: Plan) -> list[Lane]:
    """Every setting of every rival that has a choice, on the first seed."""
    return [
        Lane(rival.name, index, plan.seeds[0])
        for rival in plan.rivals
        for index in range(len(plan.settings(rival)))
        if len(plan.settings(rival)) > 1
    ]


def racing_lanes(plan: Plan, tuned: Board) -> dict[Lane, Budget]:
    """Every rival at its best settings, on every seed; rivals next to each other within a seed.

    Where runs end at a target, each goes on to the lowest for which its setting is the best.
    """
    lanes = {}
    for seed in plan.seeds:
        for rival in plan.rivals:
            # A setting that is the best for two targets stands here with the second, lower one.
            lowest = dict(zip(best_settings(plan, rival, tuned), plan.targets, strict=True))
            for setting, target in lowest.items():
                budget = plan.budget_of(rival.name)
                until = target if math.isfinite(budget.until) else budget.until
                lanes[Lane(rival.name, setting, seed)] = replace(budget, until=until)
    return lanes


def best_settings(plan: Plan, rival: Rival, tuned: Board) -> tuple[int, ...]:
    """For each target the setting that reached it in the fewest steps, or else ended lowest.

    By steps and not by the clock: a step of one optimizer costs the same at all its settings.
    """
    lanes = [lane for lane in tuned if lane.rival == rival.name]

    def best(aim: float) -> int:
        def merit(lane: Lane) -> tuple[float, float]:
            return steps_to(tuned[lane], aim), final_loss(tuned[lane])

        return min(lanes, key=merit).setting if lanes else 0

    return tuple(map(best, plan.aims or plan.targets))


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
    return replace(plan, targets=(_rounded_up(lowest),), aims=(lowest,))


def _rounded_up(value: float) -> float:
    if value <= 0:  # at a floor, within rounding
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return max(value, float(f"{math.ceil(value / unit) * unit:.2g}"))


def run_(plan: Plan, lanes: Mapping[Lane, Budget], board: Board) -> Iterator[Lane]:
    """Run lanes in turn onto the board, and tell after each step whose it was."""
    rivals = {rival.name: rival for rival in plan.rivals}
    runs = {}
    for lane, budget in lanes.items():
        rival = rivals[lane.rival]
        setting = plan.settings(rival)[lane.setting]
        runs[lane] = train(start(plan.task, rival, setting, lane.seed, plan.device), budget)
        board[lane] = []
    for lane, record in interleave(runs, _turns(lanes)):
        board[lane].append(record)
        yield lane


def _turns(lanes: Mapping[Lane, Budget]) -> dict[Lane, int]:
    """The steps of each run's turn, in proportion to its length, so that all end together."""
    if any(math.isfinite(budget.seconds) for budget in lanes.values()):
        return dict.fromkeys(lanes, CHUNK)  # the clock ends the runs: steps are no length
    shortest = min(budget.steps for budget in lanes.values())
    return {lane: math.ceil(CHUNK * budget.steps / shortest) for lane, budget in lanes.items()}


def tune_(plan: Plan, board: Board, keep: Keep = forget) -> Iterator[Lane]:
    """Run the grids, one setting after the other: their clocks decide nothing.

    Lanes that the board has are not run again.
    """
    for lane in tuning_lanes(plan):
        if lane not in board:
            yield from run_(plan, {lane: _while_it_can_win(plan, lane, board)}, board)
            keep([lane])


def _while_it_can_win(plan: Plan, lane: Lane, tuned: Board) -> Budget:
    """Where runs end at the last target, no more steps than the best setting so far took to it.

    What another target takes is not lost: the best setting for it takes fewer steps still.
    """
    budget = plan.budget_of(lane.rival)
    others = [records for other, records in tuned.items() if other.rival == lane.rival]
    fewest = min((steps_to(records, budget.until) for records in others), default=math.inf)
    return replace(budget, steps=int(min(budget.steps, fewest)))


def race_(plan: Plan, tuned: Board, board: Board, keep: Keep = forget) -> Iterator[Lane]:
    """Run every rival at its best settings, a seed after the other, all of a seed in turn.

    Seeds of which the board has all lanes are not run again. The others are, whole: clocks are
    compared within a seed, so that they must have run beside each other.
    """
    lanes = racing_lanes(plan, tuned)
    groups = [{lane: b for lane, b in lanes.items() if lane.seed == seed} for seed in plan.seeds]
    left = [group for group in groups if not all(lane in board for lane in group)]
    # What a process does only once (loading kernels, first allocations) falls on no one's clock.
    for _ in run_(plan, dict.fromkeys(left[0], Budget(steps=WARM_UP)), {}) if left else ():
        pass
    for group in left:
        yield from run_(plan, group, board)
        keep(list(group))


def steps_to(records: Sequence[Record], target: float) -> float:
    """The first evaluated step whose training loss is at the target or below; infinite if none."""
    reached = first_below(records, target)
    return math.inf if reached is None else reached.step


def first_below(records: Sequence[Record], target: float) -> Record | None:
    """The record of that step."""
    for record in records:
        if record.train_loss is not None and record.train_loss <= target:
            return record
    return None


def final_loss(records: Sequence[Record]) -> float:
    """The training loss at the last evaluation, infinite if the run diverged or never began."""
    if not records or records[-1].diverged:
        return math.inf
    return next((r.train_loss for r in reversed(records) if r.train_loss is not None), math.inf)
