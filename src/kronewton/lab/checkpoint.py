"""A training run on disk: written whole or not at all, and read without running any code."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kronewton.errors import DataError, StateError
from kronewton.lab.training import Record, Run

FILE = "checkpoint.pt"
VERSION = 1
DAMAGED = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError)


def save(folder: Path, run: Run, last: Record) -> None:
    """Write model, optimizer, random state and position of a run to the folder's checkpoint."""
    content = {
        "version": VERSION,
        "run": _identity(run),
        "last": asdict(last),
        "model": run.problem.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    # A crash while writing leaves the old file: the new one takes its name only when complete.
    temporary = folder / f".{FILE}.{os.getpid()}"
    try:
        torch.save(content, temporary)
        os.replace(temporary, folder / FILE)
    finally:
        temporary.unlink(missing_ok=True)


def load_(folder: Path, run: Run) -> Record:
    """Bring a run to where the folder's checkpoint left it, and return its last record.

    Raises DataError if there is no readable checkpoint, StateError if it is of another run.
    """
    file = folder / FILE
    content = _read(file, run.problem.train.x.device)
    _check(file, content["run"], _identity(run))
    try:
        run.problem.model.load_state_dict(content["model"])
        run.optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"].cpu())
        return Record(**content["last"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(
            f"{file} does not fit this run ({str(error).splitlines()[0]}); "
            "train again without --resume, or resume with what wrote it."
        ) from error


def _identity(run: Run) -> dict[str, Any]:
    """What must be the same for a run to go on exactly."""
    shapes = [list(p.shape) for p in run.problem.model.parameters()]
    return {
        "task": run.task.name,
        "optimizer": run.rival.name,
        "settings": dict(run.setting),
        "seed": run.seed,
        "batch size": run.task.batch_size,
        "number of training examples": len(run.problem.train),
        "shapes of the parameters": shapes,
    }


def _read(file: Path, device: torch.device) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(
            f"{file} does not exist; --resume continues a run whose --out is the same folder: "
            "start it without --resume."
        )
    try:
        content = torch.load(file, map_location=device, weights_only=True)
    except DAMAGED as error:
        raise DataError(_unreadable(file)) from error
    if not _is_checkpoint(content):
        raise DataError(_unreadable(file))
    return dict(content)


def _is_checkpoint(content: object) -> bool:
    keys = {"version", "run", "last", "model", "optimizer", "random"}
    if not isinstance(content, dict) or content.keys() != keys:
        return False
    return content["version"] == VERSION and isinstance(content["run"], dict)


def _unreadable(file: Path) -> str:
    return (
        f"{file} is damaged or is no checkpoint of kronewton's; delete it and train again "
        "without --resume."
    )


def _check(file: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for what, value in wanted.items():
        if found.get(what) != value:
            raise StateError(
                f"{file} has {what} {found.get(what)!r} where this run has {value!r}; "
                "resume with what the run was started with, or train without --resume."
            )
