"""What K-FAC makes of each layer of a model on one batch: its matrix, its cost, its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from kronewton.capture import Watcher
from kronewton.coverage import html_table, readable_bytes, text_table
from kronewton.errors import CriterionError, ModelError, OptionError
from kronewton.factors import Observation
from kronewton.fisher import Fisher
from kronewton.ladder import Distances, distances
from kronewton.layers import ENTRIES, TURNED, Found, Layer, find_layers, plain_name
from kronewton.options import check_criterion
from kronewton.part import Part
from kronewton.replay import ModelCall, Replayer, random_state
from kronewton.rows import by_layer

DISTANCES = tuple(field.name for field in fields(Distances))
MOST_COLUMNS = 512  # of the criterion's square root Hessian: each is a backward pass


@dataclass(frozen=True)
class LayerRow:
    """One layer: its matrix, and how far each approximation of its block is from the exact one."""

    layer: str
    kind: str
    matrix: tuple[
        int, ...
    ]  # (d_out, d_in), with the number of blocks in front if there are several
    positions: int  # at which an example uses the weight
    memory: int  # bytes of its two factors
    distances: Distances


@dataclass(frozen=True)
class Explanation:
    """A table that prints in a terminal and in a notebook."""

    rows: tuple[LayerRow, ...]
    uncovered: dict[str, str]  # parameter → why no kind covers it
    note: str

    HEADER = ("layer", "kind", "matrix", "positions", "memory", *DISTANCES)

    def cells(self) -> list[tuple[str, ...]]:
        """The table's text, row by row, without the header."""
        return [
            (
                row.layer or "the model",
                row.kind,
                "×".join(map(str, row.matrix)),
                str(row.positions),
                readable_bytes(row.memory),
                *(_shown(getattr(row.distances, name)) for name in DISTANCES),
            )
            for row in self.rows
        ]

    def summary(self) -> str:
        """What the numbers are, and what they leave out."""
        left_out = "; ".join(f"{name} ({why})" for name, why in self.uncovered.items())
        return (
            "Distances to each layer's Gauss-Newton block, relative, in the Frobenius norm. "
            f"{self.note}" + (f" Not covered: {left_out}." if left_out else "")
        )

    def __str__(self) -> str:
        return text_table(self.HEADER, self.cells(), self.summary())

    def _repr_html_(self) -> str:
        return html_table(self.HEADER, self.cells(), self.summary())


def explain(
    model: nn.Module,
    criterion: nn.Module,
    batch: Sequence[Any],
    *,
    fisher: str = "exact",
    draws: int = 1,
    seed: int = 0,
) -> Explanation:
    """Measure, on one batch, how far K-FAC and its neighbours are from each layer's exact block.

    batch: the model's input (a tuple for several) and what the criterion takes after the output.
    fisher: "exact", or "sampled" with so many `draws`: then the block too is the sampled one.
    Nothing of the model changes: gradients, buffers and random streams stay as they are.
    Raises OptionError if this would take too many backward passes or too much memory, ModelError
    if no layer is of a covered kind, CriterionError if the criterion does not fit the batch.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model was given as {type(model).__name__}; an nn.Module is allowed.")
    check_criterion(criterion, fisher)
    if fisher not in ("exact", "sampled"):
        raise OptionError(f"fisher must be 'exact' or 'sampled' here, not {fisher!r}.")
    trained = {id(p): plain_name(n) for n, p in model.named_parameters() if p.requires_grad}
    found = find_layers(model, trained)
    if not found.layers:
        raise ModelError(
            f"no layer of {type(model).__name__} is of a kind that K-FAC covers, so that there is "
            "nothing to explain. KFAC(model, criterion).coverage() names the reasons."
        )
    part = _observed(model, criterion, batch, found, _fisher(model, fisher, draws, seed))
    seen = by_layer([(part.statistics, part.weight)])
    rows = tuple(
        _row(layer, term, seen[term])
        for layer in found.layers
        for term in (layer.name, layer.name + TURNED)
        if term in seen
    )
    alone = {id(p) for n in found.layers if n.name + ENTRIES in seen for p in n.whole().values()}
    reasons = {i: found.reasons.get(i) or "entry by entry" for i in [*found.reasons, *alone]}
    return Explanation(rows, {trained[i]: why for i, why in reasons.items()}, _note(part, fisher))


def _fisher(model: nn.Module, fisher: str, draws: int, seed: int) -> Fisher:
    generator = torch.Generator(next(model.parameters()).device)
    return Fisher(fisher, draws, generator.manual_seed(seed))


def _observed(
    model: nn.Module,
    criterion: nn.Module,
    batch: Sequence[Any],
    found: Found,
    fisher: Fisher,
) -> Part:
    """One forward and backward pass, watched, without a trace."""
    if not isinstance(batch, (tuple, list)) or not batch:
        raise CriterionError(
            f"explain() was given a batch of type {type(batch).__name__}; a pair of input and "
            "target is allowed. Call explain(model, criterion, (x, y))."
        )
    inputs, *targets = batch
    inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    parameters = [p for layer in found.layers for p in layer.whole().values()]
    watcher = Watcher(model, (criterion,), found, _Bounded(fisher), replays=False)
    try:
        with torch.enable_grad():
            call = ModelCall(tuple(inputs), {}, random_state())
            output = Replayer(model, parameters).run(call, ())
            loss = criterion(output, *targets)
            if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
                torch.autograd.grad(loss, parameters, allow_unused=True)
        parts, _ = watcher.collect()
    except TypeError as error:
        raise CriterionError(
            f"explain() could not run {type(model).__name__} and its criterion on the batch "
            f"({error}). Give a model that returns the tensor which the criterion takes, and the "
            "batch as (input, target)."
        ) from error
    finally:
        watcher.close()
    if not parts:
        raise CriterionError(
            f"the output of {type(model).__name__} does not depend on any watched layer, or its "
            "loss was not a number that can be differentiated. Give the batch as the loop has it."
        )
    return parts[0]


class _Bounded(Fisher):
    """A Fisher that refuses more backward passes than anybody would wait for."""

    def __init__(self, fisher: Fisher) -> None:
        super().__init__(fisher.mode, fisher.draws, fisher.generator)

    def cotangents(self, at: Any, folded: int = 1) -> Any:
        if self.mode == "exact" and at.column_count > MOST_COLUMNS:
            raise OptionError(
                f"the exact block takes {at.column_count} backward passes here, one for each "
                f"output of an example; up to {MOST_COLUMNS} are made. Use fisher='sampled'."
            )
        return super().cotangents(at, folded)


def _row(layer: Layer, term: str, seen: Sequence[Observation]) -> LayerRow:
    G: Tensor = layer.kind.matrix(layer, layer.parameters())
    shape = tuple(G.mT.shape if term.endswith(TURNED) else G.shape)
    blocks, (d_out, d_in) = G.shape[:-2].numel(), G.shape[-2:]
    memory = blocks * (d_out**2 + d_in**2) * max(4, G.element_size())
    positions = max(stats.a.counts[1] for stats, _ in seen)
    measured = distances(seen, layer.name)
    return LayerRow(term, layer.kind.name, shape, positions, memory, measured)


def _note(part: Part, fisher: str) -> str:
    how = (
        "The exact block"
        if fisher == "exact"
        else ("The block of draws from the model's own predictions, which is itself an estimate")
    )
    return " ".join(filter(None, (f"{how}, {len(part.output)} examples.", part.curvature().note)))


def _shown(distance: float) -> str:
    return "0" if distance < 1e-6 else f"{distance:.3f}" if distance >= 1e-3 else f"{distance:.0e}"
