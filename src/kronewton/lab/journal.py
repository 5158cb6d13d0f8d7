"""The lanes of a contest that have ended, a line each in a file, so that it can go on later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kronewton.errors import DataError, StateError
from kronewton.lab.contest import Board, Lane, Plan
from kronewton.lab.files import DAMAGED, append_lines, record_of, sweep, write_whole
from kronewton.lab.training import Record

VERSION = 1


@dataclass(frozen=True)
class Journal:
    """What has been run, and where it is kept; nowhere if there is no path."""

    path: Path | None = None
    tuned: Board = field(default_factory=dict)
    raced: Board = field(default_factory=dict)

    def keep_tuned(self, lanes: Sequence[Lane]) -> None:
        """Write down lanes of the tuning that have ended."""
        self._keep("tuning", lanes, self.tuned)

    def keep_raced(self, lanes: Sequence[Lane]) -> None:
        """Write down lanes of the race that have ended."""
        self._keep("race", lanes, self.raced)

    def _keep(self, phase: str, lanes: Sequence[Lane], board: Board) -> None:
        if self.path is not None:
            lines = [
                {"phase": phase, **asdict(lane), "records": _telling(board[lane])} for lane in lanes
            ]
            append_lines(self.path, lines)


def open_journal(path: Path, plan: Plan) -> Journal:
    """The journal at a path, begun if there is none, with all that it holds of this plan.

    A last line that a crash has cut short is dropped; its lane runs again.
    Raises StateError if it is of another contest, DataError if it can't be read.
    """
    wanted = _identity(plan)
    sweep(path)
    if not path.exists():
        append_lines(path, [wanted])
        return Journal(path)
    try:
        whole = path.read_text("utf-8").rpartition("\n")[0]
        first, *lines = [json.loads(line) for line in whole.splitlines()] or [wanted]
        journal = Journal(path)
        for line in lines:
            board = {"tuning": journal.tuned, "race": journal.raced}[line["phase"]]
            lane = _lane_of(line)
            board[lane] = [record_of(record) for record in line["records"]]
    except DAMAGED as error:
        raise DataError(
            f"{path} is damaged or is no journal of kronewton's; delete it, or name another --out."
        ) from error
    _check(path, first, wanted)
    kept = (whole or json.dumps(wanted)) + "\n"
    write_whole(path, lambda file: file.write(kept.encode()))
    return journal


def _lane_of(line: dict[str, Any]) -> Lane:
    lane = Lane(line["rival"], line["setting"], line["seed"])
    if [type(value) for value in vars(lane).values()] != [str, int, int]:
        raise TypeError("no lane")
    return lane


def _telling(records: Sequence[Record]) -> list[Record]:
    """The records that were evaluated, and the one in which a run diverged."""
    return [r for r in records if r.train_loss is not None or r.diverged]


def _identity(plan: Plan) -> dict[str, Any]:
    """What must be the same for lanes to belong to one contest; seeds may be added."""
    return {
        "version": VERSION,
        "task": plan.task.described(),
        "targets": list(plan.targets),
        "rivals": [rival.name for rival in plan.rivals],
        **{f"settings of {r.name}": [dict(s) for s in plan.settings(r)] for r in plan.rivals},
        "steps": [plan.budget_of(rival.name).steps for rival in plan.rivals],
        "first seed": plan.seeds[0],
        "device": str(plan.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _check(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    for what, value in wanted.items():
        if not isinstance(found, dict) or found.get(what) != value:
            other = found.get(what) if isinstance(found, dict) else None
            raise StateError(
                f"{path} has {what} {other!r} where this contest has {value!r}; give the same "
                "options again to go on with it, or name another --out."
            )
