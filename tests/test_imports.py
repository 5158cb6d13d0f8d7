"""Who may import whom: the last column of the table of rooms in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import kronewton as kn

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "kronewton"
FILES = [file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or file.stem[0] != "_"]


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


ROOMS = {room_of(file) for file in FILES}


def allowed() -> dict[str, set[str]]:
    """What each room may import, as documented."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)(?:\.py|/)` \|.*\|([^|]*)\|$", text, re.MULTILINE)
    named = {room: set(re.findall(r"`(\w+)`", column)) for room, column in rows}
    return {
        room: ROOMS - named[room] if "all but" in column else named[room] for room, column in rows
    }


def imported(room: str) -> set[str]:
    """The other rooms that a room imports; "" stands for the whole package."""
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))) if room_of(file) == room else []:
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.name} has a relative import: name the room"
                found |= {f"{node.module}.{name.name}" for name in node.names}
            elif isinstance(node, ast.Import):
                found |= {name.name for name in node.names}
    parts = [name.split(".") for name in found]
    return {p[1] if p[1:] else "" for p in parts if p[0] == "kronewton"} - {room}


def test_every_room_has_a_row() -> None:
    assert set(allowed()) == ROOMS


@pytest.mark.parametrize("room", sorted(ROOMS - {"lab"}))
def test_a_room_imports_only_what_its_row_allows(room: str) -> None:
    assert imported(room) <= allowed()[room]


def test_the_lab_uses_public_names_and_nothing_imports_it() -> None:
    assert imported("lab") <= {"", *kn.__all__}
    assert not [room for room in ROOMS if "lab" in imported(room)]


def test_imports_are_seen() -> None:
    assert imported("factors") == {"linalg", "structure", "types"}
    assert {"capture", "replay"} <= imported("optimizer")
