"""Which parameter is covered how: one row for each, nothing left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from kronewton.curvature import Curvature
from kronewton.inverse import EigenInverse, Inverse
from kronewton.layers import ENTRIES, Layer
from kronewton.layers.lone import LoneKind
from kronewton.structure import Leading

LAZY = (0,)  # the shape of a parameter that has none yet


@dataclass(frozen=True)
class Row:
    """One trained parameter."""

    parameter: str
    shape: tuple[int, ...]
    kind: str
    method: str  # how its step is made
    why: str  # the reason, where it is not K-FAC
    sharing: str  # how one Kronecker product stands for several positions
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

    HEADER = ("parameter", "shape", "kind", "method", "sharing", "share", "memory", "why")

    def cells(self) -> list[tuple[str, ...]]:
        """The table's text, row by row, without the header."""
        total = sum(row.numel for row in self.rows) or 1
        return [
            (
                row.parameter,
                "×".join(map(str, row.shape)) or "scalar",
                row.kind,
                row.method,
                row.sharing,
                f"{row.numel / total:.1%}",
                readable_bytes(row.memory),
                row.why,
            )
            for row in self.rows
        ]

    @property
    def covered(self) -> float:
        """The share of all trained numbers whose step uses curvature."""
        return self._share(row.curved for row in self.rows)

    def _share(self, which: Iterable[bool]) -> float:
        """Of all numbers, by the rows for which it is so."""
        total = sum(row.numel for row in self.rows) or 1
        return sum(row.numel for row, it_is in zip(self.rows, which, strict=True) if it_is) / total

    @property
    def without(self) -> str:
        """The parameters whose step uses no curvature, each with its reason."""
        return "; ".join(f"{row.parameter} ({row.why})" for row in self.rows if not row.curved)

    def summary(self) -> str:
        """One sentence, and what the curvature is made from."""
        said = f"{self.covered:.1%} of the trained numbers are covered by curvature"
        for method, what in (("diagonal", "by a diagonal alone"), ("not yet", "not seen yet")):
            share = self._share(row.method == method for row in self.rows)
            said += f", {share:.1%} {what}" if share else ""
        return f"{said}. {self.note}"

    def __str__(self) -> str:
        return text_table(self.HEADER, self.cells(), self.summary())

    def _repr_html_(self) -> str:
        return html_table(self.HEADER, self.cells(), self.summary())


def row_of(name: str, p: Tensor, layers: Sequence[Layer], curvature: Curvature, why: str) -> Row:
    """The row of a parameter that is in these layers."""
    covers = [covered(layer, curvature, why) for layer in layers]
    methods = dict.fromkeys(method for method, _, _ in covers)
    sharing = dict.fromkeys(sharing for _, sharing, _ in covers)
    kind = ", ".join(dict.fromkeys(layer.kind.name for layer in layers))
    # A layer's memory stands once, with its first parameter.
    own = sum(
        memory
        for layer, (_, _, memory) in zip(layers, covers, strict=True)
        if p is next(iter(layer.whole().values()))
    )
    return Row(name, shape_of(p), kind, ", ".join(methods), why, ", ".join(sharing), own, True)


def row_without(name: str, p: Tensor, refined: bool, method: str, why: str) -> Row:
    """The row of a parameter that is in no layer; refined: the dial is over it, too."""
    method = "joins refine" if refined else method
    return Row(name, shape_of(p), "—", method, why or "no model was given", "—", 0, refined)


def unseen(layers: Sequence[Layer], curvature: Curvature, steps: int) -> str:
    """Why nothing, or only its own gradient, is known of a layer of a known kind."""
    found = [curvature.terms(layer.name) for layer in layers]
    if not all(found):
        return "no gradient has come from it so far" if steps else ""
    if all(term.endswith(ENTRIES) for terms in found for term in terms):
        return "no use of it as a matrix was seen"
    return ""


def covered(layer: Layer, curvature: Curvature, why: str) -> tuple[str, str, int]:
    """How a layer is covered: method, sharing, and the bytes of curvature that it keeps."""
    terms = curvature.terms(layer.name)
    lone = isinstance(layer.kind, LoneKind)
    alone = terms == [layer.name + ENTRIES] or (not terms and lone)
    memory = curvature.memory(layer.name)
    if alone:
        return "diagonal", "—", memory
    sides = [curvature.sides(term) for term in terms or [layer.name] if not lazy(layer)]
    if not terms and curvature.known:
        return "not yet", "—", memory
    parts = ["sum of two K-FAC" if len(terms) == 2 else f"K-FAC {curvature.basis}"]
    parts += dict.fromkeys(s.described() for s in sides if s.described())
    parts += in_part(curvature.inverses.get(layer.name))
    parts += ["steps in bfloat16"] if curvature.in_half(layer.name) else []
    found = dict.fromkeys(curvature.sharing(term) for term in terms or [layer.name])
    # Not chosen yet after a batch: it has seen the layer at one position of each example only.
    sharing = ["—" if how == "auto" and terms else how for how in found]
    return "; ".join(parts), "summed" if layer.kind.sums(layer) else ", ".join(sharing), memory


def in_part(inverse: Inverse | None) -> list[str]:
    """Of which sides there are the leading eigenvectors alone, in a basis of normalised steps."""
    if not isinstance(inverse, EigenInverse):
        return []
    sides = ("input", inverse.sides.input, -1), ("output", inverse.sides.output, -2)
    return [
        f"{what} by {side.k} of {inverse.shape[dim]} eigenvectors"
        for what, side, dim in sides
        if isinstance(side, Leading)
    ]


def lazy(layer: Layer) -> bool:
    """Whether a layer's parameters have no shape yet."""
    return any(isinstance(p, UninitializedParameter) for p in layer.whole().values())


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape; LAZY of one that has none yet."""
    return LAZY if isinstance(parameter, UninitializedParameter) else tuple(parameter.shape)


def text_table(header: Sequence[str], cells: Sequence[Sequence[str]], summary: str) -> str:
    """Columns of text with a rule under the header, and a sentence under all."""
    table = [header, *cells]
    widths = [max(len(row[j]) for row in table) for j in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table
    ]
    lines.insert(1, "  ".join("-" * w for w in widths).rstrip())
    return "\n".join([*lines, "", summary])


def html_table(header: Sequence[str], cells: Sequence[Sequence[str]], summary: str) -> str:
    """The same for a notebook."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells
    )
    return f"<table><tr>{head}</tr>{body}</table><p>{escape(summary)}</p>"


def readable_bytes(count: int) -> str:
    """A size in the unit that keeps it short."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
