"""A training run on disk: written whole or not at all, and read without running any code."""

from __future__ import annotations

import json
import reprlib
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronewton.errors import DataError, StateError
from kronewton.lab.files import record_of, write_whole
from kronewton.lab.training import Record, Run

FILE = "checkpoint.pt"
VERSION = 1
KEYS = {"version", "run", "last", "model", "optimizer", "random"}
SHARED = 2  # times a checkpoint's size, that its tensors may have where they share their numbers


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
    write_whole(folder / FILE, lambda file: torch.save(content, file))


def load_(folder: Path, run: Run) -> Record:
    """Bring a run to where the folder's checkpoint left it, and return its last record.

    Raises DataError if there is no readable checkpoint, StateError if it is of another run. Then
    the run may be half loaded, and is of no more use.
    """
    file = folder / FILE
    content = _read(file, run.problem.train.x.device)
    _check(file, content["run"], _identity(run))
    try:
        run.problem.model.load_state_dict(content["model"])
        run.optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"].cpu())
        return record_of(content["last"])
    except Exception as error:  # whatever torch's own optimizers make of what is in the file
        raise unfit(file, error) from error


def unfit(file: Path, error: Exception) -> StateError:
    """What to say of a checkpoint that can be read, and not be used."""
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return StateError(
        f"{file} does not fit this run ({why}); train again without --resume, or resume with what "
        "wrote it."
    )


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
    try:
        _require_sound(file)
        content = torch.load(file, map_location=device, weights_only=True)
        _require_small(content, file.stat().st_size)
        _require_checkpoint(content)
    except (
        Exception
    ) as error:  # whatever zip, pickle and torch make of a file that is no checkpoint
        raise DataError(
            f"{file} is damaged or is no checkpoint of kronewton's; delete it and train again."
        ) from error
    return dict(content)


def _require_sound(file: Path) -> None:
    """Raise ValueError unless it is a zip file of torch's, packed by nothing and with no bit lost.

    torch itself unpacks whatever size a file declares, and compares no checksums.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is packed")
        if sum(member.file_size for member in members) > file.stat().st_size:
            raise ValueError("it declares more than it holds")
        if archive.testzip() is not None:
            raise ValueError("a checksum is wrong")


def _require_small(content: Any, size: int) -> None:
    """Raise ValueError for what takes little in a file of that many bytes, and much in use.

    One number can stand for a tensor of any shape, and one list for all the members of another.
    """
    room, parts, left = SHARED * size, size, [content]
    while left:
        part = left.pop()
        parts -= 1
        if isinstance(part, Tensor):
            if type(part) is not Tensor or part.layout != torch.strided or part.is_meta:
                raise ValueError("a tensor is of another kind")
            room -= part.numel() * part.element_size()
        elif isinstance(part, dict):
            left += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            left += part
        elif not isinstance(part, str | int | float | None):
            raise ValueError("it holds neither tensors nor numbers")
        if room < 0 or parts < len(left):
            raise ValueError("it is larger than its file")


def _require_checkpoint(content: Any) -> None:
    if not isinstance(content, dict) or content.keys() != KEYS or content["version"] != VERSION:
        raise ValueError("it has other parts")
    if not isinstance(content["run"], dict):
        raise ValueError("it is of no run")
    json.dumps(content["run"])  # what is compared are words and numbers


def _check(file: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for what, value in wanted.items():
        if found.get(what) != value:
            shown = reprlib.repr(found.get(what))  # of bounded length
            raise StateError(
                f"{file} has {what} {shown} where this run has {value!r}; "
                "resume with what the run was started with, or train without --resume."
            )
