"""Which parameter is covered how: one row for each, nothing left out."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Row:
    """One trained parameter."""

    parameter: str
    shape: tuple[int, ...]
    kind: str
    method: str  # how its step is made
    why: str  # the reason, where it is not K-FAC
    memory: int  # bytes of curvature that the layer of this parameter keeps
    curved: bool  # whether curvature has a part in it

    @property
    def numel(self) -> int:
        """How many numbers the parameter has."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Coverage:
    """A table that prints in a terminal and in a notebook."""

    rows: tuple[Row, ...]
    note: str

    HEADER = ("parameter", "shape", "kind", "method", "share", "memory", "why")

    def cells(self) -> list[tuple[str, ...]]:
        """The table's text, row by row, without the header."""
        total = sum(row.numel for row in self.rows) or 1
        return [
            (
                row.parameter,
                "×".join(map(str, row.shape)) or "scalar",
                row.kind,
                row.method,
                f"{row.numel / total:.1%}",
                _bytes(row.memory),
                row.why,
            )
            for row in self.rows
        ]

    @property
    def covered(self) -> float:
        """The share of all trained numbers whose step uses curvature."""
        total = sum(row.numel for row in self.rows) or 1
        return sum(row.numel for row in self.rows if row.curved) / total

    def summary(self) -> str:
        """One sentence."""
        return f"{self.covered:.1%} of the trained numbers are covered by curvature. {self.note}"

    def __str__(self) -> str:
        table = [self.HEADER, *self.cells()]
        widths = [max(len(cells[j]) for cells in table) for j in range(len(self.HEADER))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()
            for cells in table
        ]
        lines.insert(1, "  ".join("-" * w for w in widths).rstrip())
        return "\n".join([*lines, "", self.summary()])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.HEADER)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in self.cells()
        )
        return f"<table><tr>{head}</tr>{body}</table><p>{escape(self.summary())}</p>"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
