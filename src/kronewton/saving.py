"""What is saved of a KFAC beside torch's own part of its state, and how it is taken over again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor

from kronewton.adapt import Pace, Settings
from kronewton.averaging import SAVED, Averages
from kronewton.concerns import require_own_parameters
from kronewton.layers import Layer
from kronewton.options import AUTO, BASES, NORMALISED, ORTHOGONAL
from kronewton.planner import Planner
from kronewton.state import (
    Ours,
    read_scalars,
    require_generator,
    require_same_basis,
    require_same_groups,
    require_same_layers,
    require_same_shapes,
    scalars,
)
from kronewton.watched import Watched

NOT_OF_LAYERS = ("previous", "generator", "scalars", *SAVED)  # in a parameter's part of the state
# The fields of the planner's values, as they are called among the scalars.
SETTINGS = ("damping", "inverse_damping", "probe", "noise")
PACE = (
    "pace", "ceiling", "limit", "slope", "bend", "square", "paced", "look", "gap", "pace_loss",
    "pace_spread",
)  # fmt: skip
PARTIAL = "before its state was saved this training had a loss with terms that were not watched"


@dataclass(frozen=True)
class Saved:
    """What the next steps depend on, to be filed under parameters and taken over again.

    groups: torch's parameter groups as they are now; their order gives a parameter's number.
    """

    watched: Watched
    planner: Planner | None
    averages: Averages
    groups: Sequence[Mapping[str, Any]]

    def packed(self, steps: int, previous: Sequence[Tensor] | None) -> dict[int, dict[str, Tensor]]:
        """The tensors themselves, after so many steps, of which `previous` was the last."""
        watched, index = self.watched, self._index()
        require_own_parameters(watched.layers, index, watched.owner.name)
        entries: dict[int, dict[str, Tensor]] = {i: {} for i in index.values()}
        for layer in watched.layers:
            kept = watched.curvature.tensors(layer.name)
            entries[index[id(_first_of(layer))]].update(_filed(layer, kept))
        for p, step in zip(watched.parameters, previous or [], strict=False):
            entries[index[id(p)]]["previous"] = step
        for p in watched.all:
            entries[index[id(p)]].update(self.averages.tensors(p))
        first = entries[index[id(watched.all[0])]]  # some containers leave out what is frozen
        first["generator"] = watched.fisher.generator.get_state()
        first["scalars"] = scalars({"steps": steps, **self._scalars()})
        return {i: found for i, found in entries.items() if found}

    def require_own(self, theirs: Mapping[str, Any], ours: Ours) -> None:
        """Raise StateError, before anything is changed, unless it is a state of this model."""
        watched, index = self.watched, self._index()
        asked = watched.options.basis
        allowed = ("factored", *NORMALISED) if asked == AUTO else (asked,)
        once = _said_once(ours)
        basis = _basis(read_scalars(once.get("scalars")))
        require_same_basis(basis, asked, allowed, "optimizer")
        require_generator(once.get("generator"))
        require_same_groups(theirs["param_groups"], self.groups)
        names = watched.names
        for p in watched.all:
            i = index[id(p)]
            name = names.get(id(p), str(i))
            require_same_shapes(name, p, theirs["state"].get(i, {}), ours.get(i, {}))
        largest = watched.options.largest_side_of
        require_same_layers(watched.layers, self._by_layer(ours), largest)

    def load(self, ours: Ours) -> tuple[int, list[Tensor] | None]:
        """The inverse of `packed`: steps and previous are given back, the rest is taken over."""
        watched, index = self.watched, self._index()
        once = _said_once(ours)
        numbers = read_scalars(once["scalars"])
        basis = _basis(numbers)
        if watched.options.basis == AUTO and basis in NORMALISED:
            basis = ORTHOGONAL  # before it was one, "auto" had the other
        watched.load(self._by_layer(ours), basis, numbers, once["generator"])
        if watched.watcher is not None:
            watched.watcher.whole.partial = PARTIAL if numbers["partial"] else ""
        self.averages.load([(p, ours.get(index[id(p)], {})) for p in watched.all])
        if self.planner is not None:
            _restore(self.planner, numbers)
        steps = [ours.get(index[id(p)], {}).get("previous") for p in watched.parameters]
        found = [
            t.to(p).clone() for t, p in zip(steps, watched.parameters, strict=True) if t is not None
        ]
        whole = found and len(found) == len(steps)
        return int(numbers["steps"] or 0), found if whole else None

    def _index(self) -> dict[int, int]:
        """Every parameter's number in a state_dict, which is torch's, by its id."""
        listed = [p for group in self.groups for p in group["params"]]
        return {id(p): i for i, p in enumerate(listed)}

    def _by_layer(self, ours: Ours) -> dict[str, dict[str, Tensor]]:
        index = self._index()
        return {
            layer.name: _of_layer(layer, ours.get(index[id(_first_of(layer))], {}))
            for layer in self.watched.layers
        }

    def _scalars(self) -> dict[str, float | None]:
        watched, planner = self.watched, self.planner
        found: dict[str, float | None] = {
            "basis": float(BASES.index(watched.curvature.basis)),
            "partial": watched.watcher is not None and bool(watched.watcher.whole.partial),
            **watched.numbers(),
        }
        return found if planner is None else {**found, **_of_planner(planner)}


def _said_once(ours: Ours) -> Mapping[str, Tensor]:
    """What is filed with the scalars, under one parameter for all."""
    return next((kept for kept in ours.values() if "scalars" in kept), {})


def _first_of(layer: Layer) -> Tensor:
    """The parameter that a layer's state is filed under."""
    return next(iter(layer.whole().values()))


def _filed(layer: Layer, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is kept for a layer, as it stands among all that is filed under its first parameter."""
    return {_key(layer) + k: t for k, t in kept.items()}


def _of_layer(layer: Layer, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_filed`."""
    key = _key(layer)
    found = {k.removeprefix(key): t for k, t in saved.items() if k.startswith(key)}
    return {k: t for k, t in found.items() if not k.startswith("rows") and k not in NOT_OF_LAYERS}


def _key(layer: Layer) -> str:
    """In front of a layer's entries: several layers may be rows of one parameter."""
    rows = next(iter(layer.parts.values()), None)
    return "" if rows is None else f"rows{rows.start}_"


def _basis(numbers: Mapping[str, float | None]) -> str:
    return BASES[int(numbers["basis"] or 0)]


def _of_planner(planner: Planner) -> dict[str, float | None]:
    """The numbers that the planner's next decisions depend on."""
    settings, (after, change, marked) = planner.settings, planner.outcome or (None, None, None)
    return {
        "asked": planner.asked,
        **({} if settings is None else dict(zip(SETTINGS, astuple(settings), strict=True))),
        "noise_seen": planner.noise,
        "after": after,
        "change": change,
        "mark": marked,
        "undone": planner.undone,
        "broken": planner.broken,
        "lr": planner.lr,
        **dict(zip(PACE, astuple(planner.pace), strict=True)),
        "restless": planner.curvature.restless,
    }


def _restore(planner: Planner, numbers: Mapping[str, float | None]) -> None:
    """The inverse of `_of_planner`. A damping that was given as a number stays as given."""
    planner.asked, planner.undone = int(numbers["asked"] or 0), int(numbers["undone"] or 0)
    planner.broken = int(numbers["broken"] or 0)
    planner.lr, planner.noise = numbers["lr"] or 0.0, numbers["noise_seen"]
    first = zip(PACE, astuple(Pace()), strict=True)
    planner.pace = Pace(*(type(v)(v if numbers[k] is None else numbers[k]) for k, v in first))
    planner.batches.forget()
    restless = numbers["restless"]
    planner.curvature.restless = 1.0 if restless is None else restless
    if isinstance(planner.options.damping, str):
        found = (math.nan if v is None else v for v in map(numbers.get, SETTINGS))
        planner.settings = None if numbers["noise"] is None else Settings(*found)
    after, change, marked = (numbers[key] for key in ("after", "change", "mark"))
    mark = math.nan if marked is None else marked
    planner.outcome = None if after is None or change is None else (after, change, mark)
