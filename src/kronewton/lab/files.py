"""Results on disk, written whole or not at all, and read with care."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kronewton.errors import DataError
from kronewton.lab.training import Record

# What reading JSON that somebody else wrote can raise; a deep nest ends in RecursionError.
DAMAGED = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
NUMBER, NUMBER_OR_NONE = (int, float), (int, float, type(None))
FIELDS: dict[str, tuple[type, ...]] = {  # of a record, as JSON has them
    "step": (int,),
    "seconds": NUMBER,
    "loss": NUMBER_OR_NONE,
    "settings": (dict,),
    "train_loss": NUMBER_OR_NONE,
    "test_loss": NUMBER_OR_NONE,
    "metric": NUMBER_OR_NONE,
    "diverged": (bool,),
}


def write_json(path: Path, value: object) -> None:
    """Write dataclasses and plain values as one JSON document; what is not finite becomes null."""
    _write(path, json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n")


def write_lines(path: Path, values: Iterable[object]) -> None:
    """Write one JSON document a line."""
    _write(path, "".join(json.dumps(_plain(value)) + "\n" for value in values))


def append_lines(path: Path, values: Iterable[object]) -> None:
    """Add one JSON document a line, all of them in one write."""
    text = "".join(json.dumps(_plain(value)) + "\n" for value in values)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path} can't be written ({error.strerror}).") from error


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name; it takes its own when all of it is on the disk.

    Whenever the process or the machine stops, the path is the old file or the new one. What a kill
    leaves of the other name is for `sweep`. Raises DataError if the file can't be written.
    """
    temporary = path.with_name(f"{_prefix(path)}{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch has RuntimeError for a disk that is full
        temporary.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise DataError(f"{path} can't be written ({why}); name another file.") from error


def sweep(path: Path) -> None:
    """Remove what killed processes have left of this file."""
    for left in path.parent.glob(f"{_prefix(path)}*"):
        left.unlink(missing_ok=True)


def read_records(path: Path, until: int) -> list[Record]:
    """The records of a run up to a step, from the lines that `write_lines` left."""
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        records = [record_of(line) for line in lines]
    except DAMAGED as error:
        raise DataError(
            f"{path} is missing or damaged, and --resume needs it; train again without --resume."
        ) from error
    return [record for record in records if record.step <= until]


def record_of(line: Any) -> Record:
    """A record as JSON brings it back. Raises TypeError, KeyError or ValueError if it is none."""
    if not isinstance(line, dict) or line.keys() != FIELDS.keys():
        raise TypeError("a record has other fields")
    for name, value in [*line.items(), *(("loss", v) for v in line["settings"].values())]:
        if not isinstance(value, FIELDS[name]) or (isinstance(value, bool) != (name == "diverged")):
            raise TypeError(f"{name} is {type(value).__name__}")
    if line["step"] < 1 or not line["seconds"] >= 0:
        raise ValueError("no step")

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    settings = {key: number(value) for key, value in line["settings"].items()}
    return Record(**{**line, "loss": number(line["loss"]), "settings": settings})


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def _prefix(path: Path) -> str:
    return f".{path.name}."


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system opens folders
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
