"""What a K-FAC step costs, as a ratio to a step of a plain optimizer in the same process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import median, quantiles

import torch
from rich.table import Table

from kronewton.lab.rivals import Setting, find_rival
from kronewton.lab.tasks import Task
from kronewton.lab.training import Budget, Record, start, train

# Small learning rates, so that nothing diverges: the cost of a step does not depend on them.
SETTINGS: dict[str, Setting] = {
    "kfac": {},
    "adamw": {"lr": 1e-3, "beta1": 0.9},
    "sgd": {"lr": 1e-3, "momentum": 0.9},
}
CHUNK = 20  # steps timed together: long enough that scheduled work falls into every chunk


@dataclass(frozen=True)
class StepCost:
    """K-FAC's mean step against another optimizer's, over chunks that took turns."""

    task: str
    base: str
    kfac_milliseconds: float
    base_milliseconds: float
    first: float  # ratio in the first chunk, where curvature is new and refreshed most often
    ratio: float  # median ratio of the later chunks
    low: float
    high: float


def step_cost(task: Task, chunks: int, seed: int, device: torch.device) -> list[StepCost]:
    """Time chunks of steps of all optimizers in turn, evaluation left out."""
    budget = Budget(steps=(chunks + 1) * CHUNK, every=(chunks + 2) * CHUNK)
    for name in SETTINGS:  # a warm-up of libraries and caches, thrown away
        list(islice(_records(task, name, seed, device, budget), 3))
    runs = {name: _records(task, name, seed, device, budget) for name in SETTINGS}
    ends: dict[str, list[float]] = {name: [0.0] for name in SETTINGS}
    for _ in range(chunks + 1):
        for name, records in runs.items():
            ends[name].append(list(islice(records, CHUNK))[-1].seconds)
    times = {name: [1e3 * (b - a) / CHUNK for a, b in pairwise(ends[name])] for name in SETTINGS}
    return [_compare(task, base, times["kfac"], times[base]) for base in ("adamw", "sgd")]


def cost_table(costs: Sequence[StepCost]) -> Table:
    """One row per task and base."""
    table = Table(
        caption=(
            f"median and quartiles of the ratio over interleaved chunks of {CHUNK} steps; first: "
            f"the first chunk; {torch.get_num_threads()} threads"
        ),
    )
    for head in ("task", "against", "K-FAC ms", "its ms", "ratio", "quartiles", "first"):
        table.add_column(head, justify="left" if head in ("task", "against") else "right")
    for cost in costs:
        table.add_row(
            cost.task,
            find_rival(cost.base).label,
            f"{cost.kfac_milliseconds:.3g}",
            f"{cost.base_milliseconds:.3g}",
            f"{cost.ratio:.2f}",
            f"{cost.low:.2f}–{cost.high:.2f}",
            f"{cost.first:.2f}",
        )
    return table


def _records(
    task: Task, name: str, seed: int, device: torch.device, budget: Budget
) -> Iterator[Record]:
    return train(start(task, find_rival(name), SETTINGS[name], seed, device), budget)


def _compare(task: Task, base: str, kfac: list[float], other: list[float]) -> StepCost:
    ratios = [a / b for a, b in zip(kfac, other, strict=True)]
    low, _, high = quantiles(ratios[1:], n=4)
    return StepCost(
        task=task.name,
        base=base,
        kfac_milliseconds=median(kfac[1:]),
        base_milliseconds=median(other[1:]),
        first=ratios[0],
        ratio=median(ratios[1:]),
        low=low,
        high=high,
    )
