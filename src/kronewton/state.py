"""What a checkpoint holds: tensors only, all of them under the parameters they belong to.

The numbers that belong to no parameter (counters, dampings, the random generator) are filed under
the first one, as one float64 vector and one byte tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kronewton.adapt import Pace, Settings
from kronewton.averaging import SAVED
from kronewton.errors import StateError
from kronewton.layers import ENTRIES, TURNED, Layer
from kronewton.options import BASES
from kronewton.planner import Planner
from kronewton.structure import DENSE, DIAGONAL, side_of

VERSION = 6
PRECONDITIONER_VERSION = 1
NOT_OF_LAYERS = ("previous", "generator", "scalars", *SAVED)  # in a parameter's part of the state
PREFIX = "kfac_"  # in front of every key of ours, beside those of the fallback
_PRECONDITIONERS = {
    "basis", "steps", "skipped", "capturing", "scale", "largest", "generator", "layers",
}  # fmt: skip
SCALARS = (
    "version",
    "steps",
    "asked",
    "capturing",
    "scale",
    "largest",
    "damping",
    "inverse_damping",
    "probe",
    "noise",
    "noise_seen",
    "after",
    "change",
    "skipped",
    "undone",
    "broken",
    "lr",
    "basis",
    "partial",
    "pace",
    "ceiling",
    "limit",
    "slope",
    "bend",
    "square",
    "paced",
    "look",
    "gap",
    "restless",
)
FACTORS = {"A_total", "A_count", "B_total", "B_count"}
INVERSES = (  # by the fields of each kind
    {"A_inverse", "B_inverse"},
    {"U_A", "U_B", "s"},
    {"X", "Y", "s"},
    {"X", "Y", "s", "P1", "Q1", "P2", "Q2"},
)
COUNTS = ("steps", "asked", "skipped", "undone", "broken", "paced", "look", "gap")
WHOLE = {  # of them, with the last that each may be
    **dict.fromkeys(COUNTS, 2**53),
    **dict.fromkeys(("capturing", "partial"), 1),
    "basis": len(BASES) - 1,
}


def scalars(numbers: Mapping[str, float | None]) -> Tensor:
    """The numbers in the order of SCALARS, None as NaN: (len(SCALARS),) float64."""
    filled = {"version": VERSION, **numbers}
    row = [math.nan if filled.get(k) is None else float(filled[k] or 0.0) for k in SCALARS]
    return torch.tensor(row, dtype=torch.float64, device="cpu")


def read_scalars(row: Any) -> dict[str, float | None]:
    """The inverse of `scalars`; raises StateError for another format or version."""
    if not isinstance(row, Tensor) or row.shape != (len(SCALARS),) or row[0] != VERSION:
        raise StateError(
            "the state_dict is not one of this version's KFAC (format "
            f"{VERSION}): load it with the version of kronewton that wrote it, or start afresh."
        )
    values = zip(SCALARS, row.tolist(), strict=True)
    numbers = {k: None if math.isnan(v) else v for k, v in values}
    for key, last in WHOLE.items():
        value = numbers[key]
        if value is not None and not (0 <= value <= last and value == int(value)):
            raise StateError(
                f"the state_dict has {value:g} for {key!r}, which is a whole number from 0 to "
                f"{last:g}: it is damaged. Load another checkpoint, or start afresh."
            )
    return numbers


def planner_scalars(planner: Planner) -> dict[str, float | None]:
    """The numbers that the planner's next decisions depend on."""
    settings, outcome = planner.settings, planner.outcome
    return {
        "asked": planner.asked,
        "scale": planner.curvature.scale,
        "largest": planner.curvature.largest,
        "damping": None if settings is None else settings.damping,  # NaN: still to be found
        "inverse_damping": None if settings is None else settings.inverse_damping,
        "probe": None if settings is None else settings.probe,
        "noise": None if settings is None else settings.noise,
        "noise_seen": planner.noise,
        "after": None if outcome is None else outcome[0],
        "change": None if outcome is None else outcome[1],
        "undone": planner.undone,
        "broken": planner.broken,
        "lr": planner.lr,
        "pace": planner.pace.lr,
        "ceiling": planner.pace.ceiling,
        "limit": planner.pace.limit,
        "slope": planner.pace.slope,
        "bend": planner.pace.bend,
        "square": planner.pace.square,
        "paced": planner.pace.steps,
        "look": planner.pace.look,
        "gap": planner.pace.gap,
        "restless": planner.curvature.restless,
    }


def restore_planner(planner: Planner, numbers: Mapping[str, float | None]) -> None:
    """The inverse of `planner_scalars`. A damping that was given as a number stays as given."""
    planner.asked, planner.undone = int(numbers["asked"] or 0), int(numbers["undone"] or 0)
    planner.broken = int(numbers["broken"] or 0)
    planner.lr = numbers["lr"] or 0.0
    planner.pace = _pace(numbers)
    planner.batches.forget()
    restless = numbers["restless"]
    planner.curvature.restless = 1.0 if restless is None else restless
    planner.curvature.largest = numbers["largest"] or 0.0
    planner.curvature.scale, planner.noise = numbers["scale"] or 0.0, numbers["noise_seen"]
    if isinstance(planner.options.damping, str):
        planner.settings = None
    if isinstance(planner.options.damping, str) and numbers["noise"] is not None:
        found = (numbers[k] for k in ("damping", "inverse_damping", "probe", "noise"))
        planner.settings = Settings(*[math.nan if v is None else v for v in found])
    after, change = numbers["after"], numbers["change"]
    planner.outcome = None if after is None or change is None else (after, change)


def _pace(numbers: Mapping[str, float | None]) -> Pace:
    lr, ceiling, limit = (numbers[k] for k in ("pace", "ceiling", "limit"))
    return Pace(
        math.nan if lr is None else lr,
        math.inf if ceiling is None else ceiling,
        math.inf if limit is None else limit,
        numbers["slope"] or 0.0,
        numbers["bend"] or 0.0,
        numbers["square"] or 0.0,
        int(numbers["paced"] or 0),
        int(numbers["look"] or 0),
        int(numbers["gap"] or 0),
    )


def require_mapping(state_dict: Any, keys: Iterable[str] = ()) -> None:
    """Raise StateError unless it is a dictionary with these keys."""
    if not isinstance(state_dict, Mapping) or not set(keys) <= set(state_dict):
        raise StateError(
            "load_state_dict was given something that is not a state_dict: a dictionary with "
            "'state' and 'param_groups' is needed, as optimizer.state_dict() returns it."
        )


def split(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
    """torch's part of a state_dict, and ours by the parameter's number."""
    require_mapping(state_dict, ("state", "param_groups"))
    state = state_dict["state"]
    if not isinstance(state, Mapping) or not all(isinstance(e, Mapping) for e in state.values()):
        raise StateError(
            "load_state_dict was given a dictionary whose 'state' is not one table for each "
            "parameter. Pass what optimizer.state_dict() returned."
        )
    theirs: dict[Any, dict[str, Any]] = {}
    ours: dict[int, dict[str, Tensor]] = {}
    groups, place = _numbered(state_dict["param_groups"])
    for key, entries in state_dict["state"].items():
        index = place.get(str(key), key)
        mine = {k.removeprefix(PREFIX): v for k, v in entries.items() if k.startswith(PREFIX)}
        rest = {k: v for k, v in entries.items() if not k.startswith(PREFIX)}
        if mine:
            ours[index] = mine
        if rest:
            theirs[index] = rest
    return {**state_dict, "state": theirs, "param_groups": groups}, ours


def _numbered(groups: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The groups with their parameters' numbers, and the numbers by what is saved.

    torch.distributed.checkpoint saves parameters' names, or numbers as words.
    """
    if not isinstance(groups, (list, tuple)) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple))
        for group in groups
    ):
        raise StateError(
            "load_state_dict was given a dictionary whose 'param_groups' are not tables with a "
            "list of 'params'. Pass what optimizer.state_dict() returned."
        )
    place: dict[str, int] = {}
    numbered = []
    for group in groups:
        own = [place.setdefault(str(key), len(place)) for key in group["params"]]
        numbered.append({**group, "params": own})
    return numbered, place


def require_same_groups(saved: list[int], own: list[int]) -> None:
    """Raise StateError unless the numbers of parameters in all groups agree."""
    if saved != own:
        raise StateError(
            f"the state_dict has parameter groups of {saved} parameters and this optimizer has "
            f"{own}: it was saved for another model or another grouping. Build the optimizer "
            "as it was when the state was saved."
        )


def require_same_shapes(
    name: str, p: Tensor, theirs: Mapping[str, Any], ours: Mapping[str, Tensor]
) -> None:
    """Raise StateError if what is saved of a parameter has another shape than it."""
    for key, value in theirs.items():
        if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
            raise _of_another_model(f"{key!r}", value, f"parameter '{name}'", p.shape)
    for key, what in (("previous", "a step"), ("average", "an average")):
        found = ours.get(key)
        if found is not None and found.shape != p.shape:
            raise _of_another_model(what, found, f"parameter '{name}'", p.shape)


def require_same_layer(layer: Layer, kept: Mapping[str, Tensor], largest: int) -> None:
    """Raise StateError if what is saved of a layer has other shapes than it, or lacks a part."""
    if not kept:
        return
    shape = layer.kind.matrix(layer, layer.parameters()).shape
    moments = {k.removeprefix("moments_") for k in kept if k.startswith("moments_")}
    _require_whole(layer, "moments m, v and steps", moments, [{"m", "v", "steps"}])
    inverse = {k.removeprefix("inverse_") for k in kept if k.startswith("inverse_")}
    _require_whole(layer, "inverse", inverse, INVERSES)
    for how in ("", TURNED, ENTRIES):
        own = {part for part in FACTORS if part + how in kept}
        _require_whole(layer, "factors' totals and counts", own, [FACTORS])
    for key in moments - {"steps"}:
        found = kept[f"moments_{key}"]
        if found.shape not in (shape, torch.Size((shape.numel(), 1))):
            raise _of_another_model("a moment", found, f"layer '{layer.name}'", shape)
    d_out, d_in = shape[-2:]
    for key, tensor in kept.items():
        if not key.startswith(("A_total", "B_total")):
            continue
        d, other = (d_in, d_out) if key[0] == "A" else (d_out, d_in)
        if key.endswith(TURNED):
            d, other = other, d
        if key.endswith(ENTRIES):
            d, other = (1, 1) if key[0] == "A" else (shape.numel(), 1)
        allowed = [s.stored(d) for s in (DENSE, DIAGONAL, side_of(d, other, largest))]
        if tensor.shape not in [torch.Size((*shape[:-2], *one)) for one in allowed]:
            wanted = torch.Size((*shape[:-2], *allowed[0]))
            raise _of_another_model("a factor", tensor, f"layer '{layer.name}'", wanted)


def _require_whole(layer: Layer, what: str, found: set[str], allowed: Sequence[set[str]]) -> None:
    """Raise StateError if there is something of a layer, and not all that belongs to it."""
    if found and found not in allowed:
        raise StateError(
            f"the state_dict holds only {', '.join(sorted(found))} of the {what} "
            f"of layer '{layer.name}': it is damaged. Load another checkpoint, or start afresh."
        )


def require_preconditioners(state_dict: Any, basis: str, layers: Mapping[str, Layer]) -> None:
    """Raise StateError unless it is the state of a Preconditioner with this basis and model."""
    entries = state_dict if isinstance(state_dict, Mapping) else {}
    kept = entries.get("layers")
    tables = isinstance(kept, Mapping) and all(isinstance(t, Mapping) for t in kept.values())
    complete = tables and set(entries) >= _PRECONDITIONERS
    if entries.get("version") != PRECONDITIONER_VERSION or not complete:
        raise StateError(
            "load_state_dict was given something that is not a state_dict of this version's "
            f"Preconditioner (format {PRECONDITIONER_VERSION}). Pass what "
            "preconditioner.state_dict() returned, with the version of kronewton that wrote it."
        )
    if entries["basis"] != basis:
        raise StateError(
            f"the state_dict was saved with basis={entries['basis']!r} and this Preconditioner has "
            f"{basis!r}. Build it with the basis that the state was saved with."
        )
    strange = [name for name in entries["layers"] if name not in layers]
    if strange:
        raise StateError(
            f"the state_dict holds the curvature of layer '{strange[0]}', and this model has no "
            "such layer: it was saved for another model. Load the state of this model."
        )


def first_of(layer: Layer) -> Tensor:
    """The parameter that a layer's state is filed under."""
    return next(iter(layer.whole().values()))


def filed(layer: Layer, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is kept for a layer, as it stands among all that is filed under its first parameter."""
    return {_key(layer) + k: t for k, t in kept.items()}


def of_layer(layer: Layer, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `filed`."""
    key = _key(layer)
    found = {k.removeprefix(key): t for k, t in saved.items() if k.startswith(key)}
    return {k: t for k, t in found.items() if not k.startswith("rows") and k not in NOT_OF_LAYERS}


def _key(layer: Layer) -> str:
    """In front of a layer's entries: several layers may be rows of one parameter."""
    rows = next(iter(layer.parts.values()), None)
    return "" if rows is None else f"rows{rows.start}_"


def _of_another_model(what: str, saved: Tensor, owner: str, wanted: torch.Size) -> StateError:
    return StateError(
        f"the state_dict holds {what} of shape {tuple(saved.shape)} for {owner}, which needs "
        f"{tuple(wanted)}: it was saved for another model. Load the state of this model, or start "
        "afresh."
    )
