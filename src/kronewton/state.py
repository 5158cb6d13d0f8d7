"""What a checkpoint holds: tensors only, all of them under the parameters they belong to.

The numbers that belong to no parameter (counters, dampings, the random generator) are filed under
the first one, as one float64 vector and one byte tensor.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kronewton.errors import StateError
from kronewton.layers import ENTRIES, TURNED, Layer
from kronewton.options import BASES, plain, shown
from kronewton.structure import DENSE, DIAGONAL, coordinates, fused, leading, side_of

VERSION = 8
PRECONDITIONER_VERSION = 1
MOMENTS = {"m", "v", "steps", "left"}
Ours = Mapping[int, Mapping[str, Tensor]]  # our part of a state, by each parameter's number
PREFIX = "kfac_"  # in front of every key of ours, beside those of the fallback
_PRECONDITIONERS = {
    "basis", "steps", "skipped", "capturing", "scale", "largest", "generator", "layers",
}  # fmt: skip
SCALARS = (
    "version", "steps", "asked", "capturing", "scale", "largest", "damping", "inverse_damping",
    "probe", "noise", "noise_seen", "after", "change", "mark", "skipped", "undone", "broken",
    "lr", "basis", "partial", "pace", "ceiling", "limit", "slope", "bend", "square", "paced",
    "look", "gap", "restless", "pace_loss", "pace_spread",
)  # fmt: skip
ADAMW = {"step", "exp_avg", "exp_avg_sq"}
FACTORS = {"A_total", "A_count", "B_total", "B_count"}
CORRECTED = {"s_total", "s_count"}  # EKFAC's eigenvalues, beside them
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
            _require_tensors(f"parameter {index}", mine)
            ours[index] = mine
        if rest:
            theirs[index] = rest
    return {**state_dict, "state": theirs, "param_groups": groups}, ours


def join_(theirs: dict[str, Any], ours: Ours) -> None:
    """The inverse of `split`: put copies of ours into torch's part of a state_dict."""
    for index, entries in ours.items():
        mine = {PREFIX + key: tensor.clone() for key, tensor in entries.items()}
        theirs["state"][index] = {**theirs["state"].get(index, {}), **mine}


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


def require_same_groups(theirs: Sequence[Any], ours: Sequence[Any]) -> None:
    """Raise StateError unless the numbers of parameters in all groups agree."""
    for group in theirs:
        for key in ("lr", "weight_decay"):
            _require_number(f"{key!r} of a parameter group", group.get(key))
    saved, own = ([len(group["params"]) for group in groups] for groups in (theirs, ours))
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
    owner = f"parameter '{name}'"
    moments = {k: v for k, v in theirs.items() if k in ADAMW}
    _require_whole(owner, "moments", set(moments), [ADAMW])
    for key, value in moments.items():
        if not isinstance(value, Tensor):
            raise _no_tensor(key, value, owner)
        if key == "step":
            _require_number(f"'step' of {owner}", value)
        elif value.shape != p.shape:
            raise _of_another_model(f"{key!r}", value, owner, p.shape)
    if "average_steps" in ours:
        _require_count("average_steps", ours["average_steps"], owner)
    for key, what in (("previous", "a step"), ("average", "an average")):
        found = ours.get(key)
        if found is not None:
            _require_kind(key, found, owner, p.is_complex())
            if found.shape != p.shape:
                raise _of_another_model(what, found, owner, p.shape)


def require_same_basis(saved: Any, own: str, allowed: Collection[str], owner: str) -> None:
    """Raise StateError if a state was saved with a basis that its owner cannot go on with."""
    if not isinstance(saved, str) or saved not in allowed:
        raise StateError(
            f"the state_dict was saved with basis={shown(saved)} and this {owner} has {own!r}. "
            "Build it with the basis that the state was saved with."
        )


def require_same_layers(
    layers: Iterable[Layer],
    saved: Mapping[str, Mapping[str, Tensor]],
    largest: Callable[[str], int],
) -> None:
    """Raise StateError if what is saved of a layer has other shapes than it, or lacks a part."""
    for layer in layers:
        if saved.get(layer.name):
            _require_same_layer(layer, saved[layer.name], largest(layer.name))


def _require_same_layer(layer: Layer, kept: Mapping[str, Tensor], largest: int) -> None:
    owner = f"layer '{layer.name}'"
    _require_tensors(owner, kept)
    for key, tensor in kept.items():
        _require_kind(key, tensor, owner, False)
        if "_count" in key or key.startswith(("chance", "seen", "reduced")):
            _require_count(key, tensor, owner)
    shape = layer.kind.matrix(layer, layer.parameters()).shape
    moments = {k.removeprefix("moments_") for k in kept if k.startswith("moments_")}
    _require_whole(owner, "moments m, v, steps and left", moments, [MOMENTS])
    inverse = {k.removeprefix("inverse_") for k in kept if k.startswith("inverse_")}
    _require_whole(owner, "inverse", inverse, INVERSES)
    for how in ("", TURNED, ENTRIES):
        own = {part for part in FACTORS | CORRECTED if part + how in kept}
        _require_whole(owner, "factors' totals and counts", own, [FACTORS, FACTORS | CORRECTED])
    for key, most in (("steps", 2.0**53), ("left", 1.0)):
        number = kept.get(f"moments_{key}")
        if number is not None and number.dim():
            raise _of_another_model("a number of moments", number, owner, torch.Size())
        if number is not None and not 0 <= float(number) <= most:
            raise StateError(
                f"the state_dict has {float(number):g} for the moments' {key} of {owner}: it is "
                "damaged. Load another checkpoint, or start afresh."
            )
    parts = {k: kept[f"inverse_{k}"] for k in inverse}
    of_basis = _require_inverse(owner, shape, parts, largest)
    for key in moments & {"m", "v"}:
        found = kept[f"moments_{key}"]
        if found.shape not in (shape, of_basis, torch.Size((shape.numel(), 1))):
            raise _of_another_model("a moment", found, owner, of_basis)
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
            raise _of_another_model("a factor", tensor, owner, wanted)


def _require_inverse(
    owner: str, shape: torch.Size, kept: Mapping[str, Tensor], largest: int
) -> torch.Size:
    """The shape of coordinates in what is kept of an inverse.

    Raises StateError if parts of it don't fit a layer's sides, however those are kept.
    """
    lead, (d_out, d_in) = shape[:-2], shape[-2:]
    sides = {(d_in, d_out), (d_out, d_in), (1, shape.numel()), (shape.numel(), 1)}
    ways = {
        (way, d)
        for d, other in sides
        for way in {DENSE, DIAGONAL, side_of(d, other, largest), fused(d, other)}
        | {leading(d), leading(d, other)}
        if way is not None
    }
    stored = {torch.Size((*lead, *way.stored(d))) for way, d in ways}
    bases = {torch.Size((*lead, *way.stored_basis(d))) for way, d in ways} | {torch.Size((0,))}
    for key in kept.keys() - {"s"}:
        if kept[key].shape not in (stored | bases if key.startswith("U_") else stored):
            wanted = torch.Size((*lead, d_in, d_in))
            raise _of_another_model(f"{key} of an inverse", kept[key], owner, wanted)
    in_basis = shape
    if "U_A" in kept:
        in_basis = torch.Size(
            (*lead, coordinates(kept["U_B"], d_out), coordinates(kept["U_A"], d_in))
        )
    others = torch.Size((*lead, d_in, d_out)), torch.Size((shape.numel(), 1))
    if "s" in kept and kept["s"].shape not in (in_basis, *others):
        raise _of_another_model("s of an inverse", kept["s"], owner, in_basis)
    return in_basis


def _require_tensors(owner: str, kept: Mapping[str, Any]) -> None:
    """Raise StateError if something that was saved is no tensor."""
    for key, found in kept.items():
        if not isinstance(found, Tensor) or found.layout != torch.strided:
            raise _no_tensor(key, found, owner)


def require_generator(found: Any) -> None:
    """Raise StateError if it is no state of torch's random numbers."""
    if not isinstance(found, Tensor) or found.dtype != torch.uint8:
        raise _no_tensor("generator", found, "the random draws")


def _require_count(key: str, found: Tensor, owner: str) -> None:
    """Raise StateError if it is not one finite number."""
    if found.dim():
        raise _of_another_model("a count", found, owner, torch.Size())
    _require_number(f"{key!r} of {owner}", found.item())


def _require_kind(key: str, found: Tensor, owner: str, is_complex: bool) -> None:
    """Raise StateError if a tensor has complex numbers where real ones belong, or the reverse."""
    if found.is_complex() != is_complex:
        raise _no_tensor(key, found, owner)


def _require_number(what: str, value: Any) -> None:
    number = plain(value)
    if not isinstance(number, (int, float)) or not 0 <= number <= sys.float_info.max:
        raise StateError(
            f"the state_dict has {shown(value)} for {what}, which is a finite number ≥ 0: it is "
            "damaged. Load another checkpoint, or start afresh."
        )


def _require_whole(owner: str, what: str, found: set[str], allowed: Sequence[set[str]]) -> None:
    """Raise StateError if there is something of this kind, and not all that belongs to it."""
    if found and found not in allowed:
        raise StateError(
            f"the state_dict holds only {', '.join(sorted(found))} of the {what} of {owner}: it is "
            "damaged. Load another checkpoint, or start afresh."
        )


def require_preconditioners(
    state_dict: Any, basis: str, layers: Mapping[str, Layer], largest: Callable[[str], int]
) -> None:
    """Raise StateError unless it is the state of a Preconditioner with this basis and model."""
    entries = state_dict if isinstance(state_dict, Mapping) else {}
    kept = entries.get("layers")
    tables = isinstance(kept, Mapping) and all(isinstance(t, Mapping) for t in kept.values())
    complete = tables and set(entries) >= _PRECONDITIONERS
    version = entries.get("version")
    if not isinstance(version, int) or version != PRECONDITIONER_VERSION or not complete:
        raise StateError(
            "load_state_dict was given something that is not a state_dict of this version's "
            f"Preconditioner (format {PRECONDITIONER_VERSION}). Pass what "
            "preconditioner.state_dict() returned, with the version of kronewton that wrote it."
        )
    require_same_basis(entries["basis"], basis, (basis,), "Preconditioner")
    for key in ("steps", "skipped", "capturing", "scale", "largest"):
        _require_number(f"{key!r}", entries[key])
    require_generator(entries["generator"])
    strange = [name for name in entries["layers"] if name not in layers]
    if strange:
        raise StateError(
            f"the state_dict holds the curvature of layer '{strange[0]}', and this model has no "
            "such layer: it was saved for another model. Load the state of this model."
        )
    require_same_layers(layers.values(), entries["layers"], largest)


def _no_tensor(key: str, found: Any, owner: str) -> StateError:
    return StateError(
        f"the state_dict has {shown(found)} for {key!r} of {owner}, where a tensor of another kind "
        "belongs: it is damaged. Load another checkpoint, or start afresh."
    )


def _of_another_model(what: str, saved: Tensor, owner: str, wanted: torch.Size) -> StateError:
    return StateError(
        f"the state_dict holds {what} of shape {tuple(saved.shape)} for {owner}, which needs "
        f"{tuple(wanted)}: it was saved for another model. Load the state of this model, or start "
        "afresh."
    )
