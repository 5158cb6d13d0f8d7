"""A model that is watched: its layers, their running curvature, and how that is applied."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronewton.capture import Watcher
from kronewton.concerns import (
    Concerns,
    Owner,
    of_new,
    of_processes,
    of_unexplained,
    of_unseen,
    require_own_parameters,
    require_python,
    unseen_said,
)
from kronewton.coverage import LAZY, Coverage, row_of, row_without, shape_of, unseen
from kronewton.curvature import Curvature, layer_of
from kronewton.errors import CriterionError, ModelError
from kronewton.fisher import Fisher
from kronewton.layers import Found, Layer, find_layers, plain_name
from kronewton.layers.base import at_least_float32
from kronewton.options import CurvatureOptions, check_criterion, check_patterns
from kronewton.part import Part
from kronewton.quadratic import Vector
from kronewton.rows import by_layer

Criteria = Sequence[nn.Module]
NOWHERE = "(no layer)"
OUTSIDE = "nothing in the loss that was watched depends on it"


class Watched:
    """The layers of one model, hooked with its criteria, and the curvature known of them.

    trained: the parameters that are asked for; kept: by their ids, those of them that are, though
    frozen now. Those that steps are made for by curvature are `parameters`, one tensor for each in
    every vector; `place` has their numbers by their ids.
    """

    def __init__(
        self,
        model: nn.Module | None,
        criteria: Criteria,
        trained: Sequence[Tensor],
        options: CurvatureOptions,
        owner: Owner,
        kept: Collection[int] = (),
    ) -> None:
        self.model, self.criteria, self.options, self.owner = model, criteria, options, owner
        if model is not None:
            require_python(model, owner)
        self.concerns = Concerns(owner, options.most_skips)
        self.all = [p for p in trained if p.requires_grad or id(p) in kept]
        own = {id(p) for p in self.all}
        self.frozen = [p for p in trained if id(p) not in own]
        if not self.all:
            raise ModelError(
                "there is nothing to train: no parameter that was given has requires_grad=True. "
                "Unfreeze a layer, or pass the parameters to train."
            )
        mode = options.fisher if criteria else "empirical"
        found = Found() if model is None else find_layers(model, {id(p) for p in self.all})
        # Training gradients come summed over the examples: of a lone parameter they say nothing.
        found = found.without_lone() if mode == "empirical" else found
        self.outside: set[int] = set()  # parameters of layers that only get a gradient otherwise
        self.layers, self.guests, self.reasons = found.layers, found.guests, found.reasons
        # Who trains otherwise what is outside covers what is thawed; others are warned of it.
        unknown = set() if owner.sets_aside else {id(p) for p in self.frozen}
        self.known = set() if model is None else {id(p) for p in model.parameters()} - unknown
        check_patterns(options, [layer.name for layer in found.layers])
        covered, together = found.covered, options.over_all and bool(found.layers)
        self.parameters = [
            p for p in self.all if id(p) in covered or (together and p.is_floating_point())
        ]
        self.place = {id(p): i for i, p in enumerate(self.parameters)}
        self._shapes = [shape_of(p) for p in self.parameters]
        self._uncovered = [i for i, p in enumerate(self.parameters) if id(p) not in covered]
        generator = torch.Generator(self.all[0].device).manual_seed(options.seed)
        self.fisher = Fisher(mode, options.draws, generator)
        self.curvature = Curvature(
            found.layers, options.first_basis, options.sharing_of, options.largest_side_of
        )
        self.watcher: Watcher | None = None
        if model is not None and found.layers:
            self.watcher = Watcher(model, criteria, found, self.fisher, options.uses_model)

    @property
    def names(self) -> dict[int, str]:
        """Of all of the model's parameters, as they are now, by their ids."""
        named = () if self.model is None else self.model.named_parameters()
        return {id(p): plain_name(name) for name, p in named}

    @property
    def changed(self) -> bool:
        """Whether other parameters are to be covered: some that were frozen are not any more."""
        return any(p.requires_grad for p in self.frozen)

    def forget_all_but(self, layers: Sequence[Layer]) -> None:
        """Let go of what is known of layers that are not among these, or are others there."""
        there = {layer.name: _what(layer) for layer in layers}
        for layer in self.layers:
            if there.get(layer.name) != _what(layer):
                for term in self.curvature.terms(layer.name):
                    del self.curvature.factors[term]
                self.curvature.inverses.pop(layer.name, None)
                self.curvature.moments.pop(layer.name, None)

    def go_on_from(self, before: Watched) -> None:
        """Take over what is said and counted, and see the next batch whole."""
        self.concerns = before.concerns
        self.curvature.dropped, self.curvature.failed = (
            before.curvature.dropped, before.curvature.failed,
        )  # fmt: skip
        if self.watcher is not None:
            self.watcher.capturing = True

    def add(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Take in parameters that came later; those of them that are trained are given back."""
        self.frozen += [p for p in parameters if not p.requires_grad]
        new = [p for p in parameters if p.requires_grad]
        self.all += new
        self.known |= {id(p) for p in parameters}
        self.reasons.update({id(p): "added after the optimizer was made" for p in new})
        return new

    # What a step starts with.

    def moves(self, watcher: Watcher) -> bool:
        """Whether there is a step to make: zeros without a batch are nobody's gradient.

        zero_grad(set_to_none=False) leaves them, and torch.distributed.checkpoint sets them.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if watcher.pending or (not watcher.criteria and not watcher.capturing):
            return bool(grads)
        return any(bool(g.any()) for g in grads)

    def collected(self, watcher: Watcher, scale: float = 1.0) -> list[Part]:
        """The parts of this step, without a GradScaler's factor; or a sentence why there is none.

        Raises CriterionError if the gradients do not come from what is watched.
        """
        assert self.model is not None
        self.concerns.say_all(of_processes(self.model, self.owner))
        criteria, foreign, capturing = watcher.criteria, watcher.foreign, watcher.capturing
        owner, name = self.owner.name, " or ".join(type(c).__name__ for c in criteria)
        parts, twice = watcher.collect()
        if twice:
            self.concerns.say(
                f"{twice} was called more than once on the same output, and "
                "each call's loss was differentiated: gradient and curvature count every call, "
                "weighted as you weighted its loss. If one was only meant for logging, call it "
                "under torch.no_grad()."
            )
        if parts or (not criteria and not capturing):
            return [part.unscaled(scale) for part in parts] if scale != 1 else parts
        if not criteria:
            raise CriterionError(
                "step() found gradients, but no watched layer was run forward and backward since "
                f"the last step. Run the model that was given to {owner} before each step."
            )
        if foreign:
            raise CriterionError(
                f"{name} was called on an output that no watched layer of the model leads to. "
                f"Call it on what the model that was given to {owner} returns, or give {owner} "
                "that model."
            )
        raise CriterionError(
            f"step() found gradients, but the watched {name} was not called on the model's output, "
            "or its loss was not differentiated. Compute the loss with the very module that was "
            f"given to {owner}; for a loss that is computed otherwise pass criterion=None, or call "
            f"{self.owner.handle}.observe(output, target, criterion) before backward()."
        )

    def learn(
        self, parts: Sequence[Part], decay: float, rows: int | None = None, turn: int = 0
    ) -> bool:
        """Add a batch to the running factors; say what is amiss. As `Curvature.learn`."""
        assert self.model is not None
        assert self.watcher is not None
        seen = by_layer((part.statistics, part.weight) for part in parts)
        times = max((part.stands_for for part in parts), default=1.0)
        lost = self.curvature.learn(seen, decay, rows, turn, times)
        owner, say = self.owner, self.concerns.say_all
        require_own_parameters([*self.layers, *self.guests], self.place, owner.name)
        self._require_same_shapes()
        if self.watcher.capturing or seen:
            layers = [layer for layer in self.layers if not self.curvature.terms(layer.name)]
            say(of_unexplained(self.watcher.filing.unexplained))
            unseen_layers = list(of_unseen(layers, {layer_of(term) for term in seen}))
            say(unseen_said(layer, owner) for layer in unseen_layers)
            if owner.sets_aside:
                self.outside |= _ids(unseen_layers)
            say(of_new(self.model, self.known, owner))
        if self.outside:  # what has been seen since is not, any more
            self.outside -= _ids(x for x in self.layers if self.curvature.terms(x.name))
        return lost

    def _require_same_shapes(self) -> None:
        for i, (p, before) in enumerate(zip(self.parameters, self._shapes, strict=True)):
            if p.shape == before:
                continue
            if before != LAZY:
                raise ModelError(
                    f"parameter '{self.names.get(id(p), f'#{i}')}' has the shape {tuple(p.shape)} "
                    f"and had {before} when {self.owner.name} was made. Make it after the model "
                    "has been changed."
                )
            self._shapes[i] = tuple(p.shape)

    def say_what_is_new(self) -> None:
        """Say which parameters came later, where no other has a gradient."""
        if self.model is not None and self.watcher is not None and self.watcher.pending:
            self.concerns.say_all(of_new(self.model, self.known, self.owner))

    # How the curvature is applied.

    def gradients(self) -> list[Tensor]:
        """One tensor per stepped parameter; zeros where that is outside of the watched loss."""
        return [
            torch.zeros_like(p) if id(p) in self.outside else _gradient(p) for p in self.parameters
        ]

    def precondition(self, vector: Vector, damping: float) -> list[Tensor]:
        """(B ⊗ A + damping·I)⁻¹ v for one tensor per stepped parameter."""
        return self.by_layer(vector, lambda name, G: self.curvature.apply(name, G, damping))

    def by_layer(self, vector: Vector, of_layer: Callable[[str, Tensor], Tensor]) -> list[Tensor]:
        """What becomes of one tensor per stepped parameter, layer by layer as matrices."""
        matrices = self.matrices(vector)
        return self.vector({name: of_layer(name, G) for name, G in matrices.items()}, vector)

    def matrices(self, vector: Vector) -> dict[str, Tensor]:
        """Of one tensor per stepped parameter each layer's matrix, (…, d_out, d_in), by its name.

        What is in the quadratic model but of no kind comes as it is, by its place.
        """
        found = {}
        for layer in self.layers:
            tensors = {
                name: layer.cut(name, vector[self.place[id(p)]])
                for name, p in layer.whole().items()
            }
            found[layer.name] = at_least_float32(layer.kind.matrix(layer, tensors))
        return found | {f"{NOWHERE} {i}": vector[i] for i in self._uncovered}

    def vector(self, matrices: Mapping[str, Tensor], like: Vector) -> list[Tensor]:
        """The inverse of `matrices`."""
        found: list[Tensor | None] = [None] * len(self.parameters)
        for layer in self.layers:
            split = layer.kind.split(layer, matrices[layer.name])
            for name, p in layer.whole().items():
                self._put(found, self.place[id(p)], layer.parts.get(name), split[name])
        for i in self._uncovered:
            found[i] = matrices[f"{NOWHERE} {i}"]
        # Rows of a packed parameter that are in no layer do not move.
        return [torch.zeros_like(v) if f is None else f for f, v in zip(found, like, strict=True)]

    def _put(self, found: list[Tensor | None], i: int, rows: slice | None, tensor: Tensor) -> None:
        """A direction for a parameter, or for some of its rows, in the parameter's own dtype."""
        p, whole = self.parameters[i], found[i]
        if rows is None:
            found[i] = tensor.to(p.dtype)
            return
        if whole is None:
            whole = found[i] = torch.zeros_like(p)
        whole[rows] = tensor.to(p.dtype)

    # What a user may ask.

    def observe(self, output: Tensor, target: Any, criterion: nn.Module) -> None:
        """Take statistics of a loss that no watched module computes, before its backward()."""
        check_criterion(criterion, self.options.fisher)
        if not isinstance(output, Tensor):
            raise CriterionError(
                f"observe() was given {type(output).__name__} for the output; a tensor that the "
                "model made is allowed."
            )
        if self.watcher is not None:
            targets = target if isinstance(target, tuple) else (target,)
            self.watcher.observe(criterion, output, targets)

    def coverage(self, steps: int) -> Coverage:
        """Which parameter is covered how, after so many steps: one row for each."""
        layers: dict[int, list[Layer]] = {}
        for layer in self.layers:
            for p in layer.whole().values():
                layers.setdefault(id(p), []).append(layer)
        unexplained = self.watcher.filing.unexplained if self.watcher is not None else {}
        rows, names = [], self.names
        for i, p in enumerate(self.all):
            name, why = names.get(id(p), f"#{i}"), self.reasons.get(id(p), "")
            own = layers.get(id(p), [])
            if id(p) in self.outside:
                rows.append(row_without(name, p, False, self.owner.method, OUTSIDE))
            elif own:
                why = unexplained.get(own[0].name, why) or unseen(own, self.curvature, steps)
                rows.append(row_of(name, p, own, self.curvature, why))
            else:
                joins = id(p) in self.place
                rows.append(row_without(name, p, joins, self.owner.method, why))
        return Coverage(tuple(rows), f"Fisher: {self.fisher.mode}.")

    # What is saved, beside what `Curvature.tensors` gives of each layer.

    def numbers(self) -> dict[str, float]:
        """The numbers that the next steps depend on."""
        found: dict[str, float] = {"skipped": self.concerns.skipped, "capturing": False}
        if self.watcher is not None:
            found["capturing"] = self.watcher.capturing
            found["scale"], found["largest"] = self.curvature.scale, self.curvature.largest
        return found

    def load(
        self,
        saved: Mapping[str, Mapping[str, Tensor]],
        basis: str,
        numbers: Mapping[str, Any],
        generator: Tensor,
    ) -> None:
        """Take over each layer's tensors, in the precision they have, `numbers` and the draws."""
        self.curvature.start_afresh(basis)
        for layer in self.layers:
            device = next(iter(layer.whole().values())).device
            kept = {k: t.to(device).clone() for k, t in saved.get(layer.name, {}).items()}
            if kept:
                self.curvature.load(layer.name, kept)
        self.fisher.resume(generator, self.all[0].device)
        self.concerns.skipped = int(numbers["skipped"] or 0)
        if self.watcher is not None:
            self.watcher.capturing = bool(numbers["capturing"])
            self.curvature.scale = float(numbers["scale"] or 0.0)
            self.curvature.largest = float(numbers["largest"] or 0.0)

    def close(self) -> None:
        """Remove every hook."""
        if self.watcher is not None:
            self.watcher.close()


def _ids(layers: Iterable[Layer]) -> set[int]:
    return {id(p) for layer in layers for p in layer.whole().values()}


def _what(layer: Layer) -> tuple[object, ...]:
    """What makes a layer's matrix."""
    return type(layer.kind), layer.trained, dict(layer.parts)


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient, or zeros where none arrived."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
