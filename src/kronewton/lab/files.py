"""Results as JSON, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from kronewton.errors import DataError
from kronewton.lab.training import Record


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
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        raise DataError(f"{path} can't be written ({error.strerror}).") from error


def read_records(path: Path, until: int) -> list[Record]:
    """The records of a run up to a step, from the lines that `write_lines` left."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        records = [record_of(line) for line in lines]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} is missing or damaged, and --resume needs it; train again without --resume."
        ) from error
    return [record for record in records if record.step <= until]


def record_of(line: dict[str, Any]) -> Record:
    """A record as JSON brings it back. Raises TypeError or KeyError if it is none."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    settings = {key: number(value) for key, value in line["settings"].items()}
    return Record(**{**line, "loss": number(line["loss"]), "settings": settings})


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)  # whole or not at all
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"{path} can't be written ({error.strerror}); name another file."
        ) from error


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
