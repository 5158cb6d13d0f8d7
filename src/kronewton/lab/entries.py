"""Who races, as a user writes it: `kfac:100,adam:3000`."""

from __future__ import annotations

from dataclasses import dataclass

from kronewton.errors import OptionError
from kronewton.lab.rivals import Rival, available, find_rival


@dataclass(frozen=True)
class Entry:
    """A rival, and the steps of its runs where they are its own."""

    rival: Rival
    steps: int | None = None


def read_entries(text: str | None) -> tuple[Entry, ...]:
    """The rivals of a list with commas, all that are installed if there is none.

    Raises OptionError for a name that is none, a length that is none, and two lengths for one name.
    """
    if text is None:
        return tuple(Entry(find_rival(name)) for name in available())
    entries: dict[str, Entry] = {}
    for item in text.split(","):
        entry = _entry(item.strip())
        if entries.setdefault(entry.rival.name, entry) != entry:
            raise OptionError(
                f"--rivals names {entry.rival.name} twice, with different lengths; name it once."
            )
    return tuple(entries.values())


def _entry(item: str) -> Entry:
    name, colon, length = item.partition(":")
    rival = find_rival(name.strip())
    if not colon:
        return Entry(rival)
    # isascii too: '²' is a digit to Python and no number.
    if not (length.isascii() and length.isdigit() and int(length) > 0):
        raise OptionError(
            f"--rivals has {item!r}; after the colon stands a number of steps, 1 or more, "
            "as in adam:3000."
        )
    return Entry(rival, int(length))
