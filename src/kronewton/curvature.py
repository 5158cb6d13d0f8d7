"""The running curvature of all layers: when it is renewed, and how it is applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from kronewton.drift import AT_LEAST, Renewal, by_products, find_by_products, pays, price
from kronewton.errors import NotPositiveDefinite
from kronewton.factors import (
    Factors,
    Moment,
    Observation,
    all_reduced,
    batch_factors,
    best_factors,
    nearer_sharing,
    rotated,
    thinned,
    with_corrected,
)
from kronewton.inverse import (
    EigenInverse,
    FactoredInverse,
    Inverse,
    eigen_basis,
    factored_inverse,
)
from kronewton.layers import ENTRIES, TURNED, Layer
from kronewton.linalg import all_finite, memory_for
from kronewton.normalised import Moments, half_flattened, in_curvature, normalised, restored
from kronewton.options import NORMALISED, ORTHOGONAL
from kronewton.pair import (
    ExactPairInverse,
    PairInverse,
    Product,
    common_sides,
    exact_pair,
    of_both,
    oriented,
    pair_inverse,
)
from kronewton.structure import DENSE, DIAGONAL, Sides, in_full, of_basis, side_of

HOW = ("", TURNED, ENTRIES)  # a layer's matrix can be seen
ENTRIES_DECAY = 0.95  # of running squares of gradients, at least
RESTLESS_MEMORY = 20  # sides
GROWN = 2.0  # times what they were: factors that are damaged
LEAST = 1e-10  # of the scale over the largest that there was
DEAR = 4  # runs of the model on a batch: renewals that cost more are seldom


class Curvature:
    """Running factors and inverses of all layers, in one of `options.BASES`.

    A layer's block is the sum of its terms: its matrix as it is, turned (a table that is also a
    linear layer), or, where no rows can be seen, entry by entry.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        basis: str,
        sharing: Callable[[str], str],
        largest: Callable[[str], int],
    ) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.basis = basis
        self.asked, self.largest_side = sharing, largest
        self.chosen: dict[str, str] = {}  # of a term: expand or reduce, where that is automatic
        self.factors: dict[str, Factors] = {}  # of a term
        self.inverses: dict[str, Inverse] = {}  # of a layer
        self.moments: dict[str, Moments] = {}  # of a layer, for normalised steps
        self.rows: dict[str, int] = {}  # of a layer, in the last batch that was learnt from
        self._batch: dict[str, Sequence[Observation]] = {}  # what was learnt in this step
        self.largest = 0.0  # of all scales so far
        self.scale = 0.0  # mean eigenvalue of all blocks together, in units of the loss
        self._sound = 0.0, 0.0  # scale and largest, as they were before the batch
        self._last_traces: dict[str, float] = {}  # the traces of terms, after the last batch
        self.dropped = 0  # batches of a layer that were not finite, or that found factors damaged
        self.restless = 1.0  # running share of the sides whose basis had drifted when it was due
        self.failed = 0  # inversions that failed, the last good one being kept
        self._prices: tuple[float, float] | None = None  # None: not known for what was seen last

    def terms(self, name: str) -> list[str]:
        """The terms of a layer's block that are known; entries only where there is nothing else."""
        seen = [name + how for how in ("", TURNED) if name + how in self.factors]
        return seen or [t for t in (name + ENTRIES,) if t in self.factors]

    def sharing(self, term: str) -> str:
        """How one Kronecker product stands for several positions; "auto" until it is chosen."""
        layer = self.layers[layer_of(term)]
        if layer.kind.sums(layer) or term.endswith(ENTRIES):
            return "reduce"  # a is 1: gradients summed over positions are exact
        asked = self.asked(layer.name)
        return self.chosen.get(term, asked) if asked == "auto" else asked

    def sides(self, term: str) -> Sides:
        """How the factors of a term are stored."""
        layer = self.layers[layer_of(term)]
        shape = layer.kind.matrix(layer, layer.parameters()).shape
        if term.endswith(ENTRIES):
            return Sides(DENSE, DIAGONAL)
        if term.endswith(TURNED):
            d_out, d_in = shape[-2:]
            largest = self.largest_side(layer.name)
            return Sides(side_of(d_out, d_in, largest), side_of(d_in, d_out, largest))
        return layer.kind.sides(shape, self.largest_side(layer.name), self.sharing(term))

    def learn(
        self,
        observations: Mapping[str, Sequence[Observation]],
        decay: float,
        rows: int | None = None,
        turn: int = 0,
        times: float = 1.0,
    ) -> bool:
        """Add one batch to the running factors of every term that took part in it.

        decay: the weight of what is known so far, against one for the batch. rows: how many are
        enough of a layer, None for all; turn: which ones, see `thinned`. times: how many rows of
        the batch each of these stands for.
        Factors that have grown since the last batch, or whose product overflows, are damaged, and
        begin afresh with this one: every step would be next to nothing for as long as they are
        remembered. Whether there were such is returned.
        """
        self._sound = self.scale, self.largest
        if not observations:
            return False
        self._prices = None
        before, learnt = self._traces(), {}
        self.rows.update(dict.fromkeys(map(layer_of, observations), 0))
        for term, found in observations.items():
            seen = sum(math.prod(stats.a.counts) for stats, _ in found)
            self.rows[layer_of(term)] += round(times * seen)
            batch = self._of_batch(term, found, rows, turn)
            if batch is not None:
                learnt[term] = batch
                self._learn_term(term, *batch, decay)
        after = self._traces()
        if not after:
            return False
        told = torch.stack([*before.values(), *after.values()]).tolist()  # one wait
        was = dict(zip(before, told[: len(before)], strict=True))
        now = dict(zip(after, told[len(before) :], strict=True))
        damaged = {t for t in was if not was[t] <= GROWN * abs(self._last_traces.get(t, math.inf))}
        damaged |= {t for t in now if not math.isfinite(now[t])}
        self._let_go(damaged)
        self.dropped += bool(damaged)
        for term in damaged & learnt.keys():  # the batch itself is no worse for that
            now[term] = float(learnt[term][0].trace())
            if math.isfinite(now[term]):
                self._learn_term(term, *learnt[term], decay)
        self._last_traces = {t: now[t] for t in now if t in self.factors}
        if self._last_traces:
            self._rescale()
        return bool(damaged)

    def _of_batch(
        self, term: str, found: Sequence[Observation], rows: int | None, turn: int
    ) -> tuple[Factors, Sequence[Observation]] | None:
        """A batch's factors of a term, and what they are made from; None: nothing to learn."""
        shared = self._shared(term, found, rows, turn)
        sides = self.factors[term].sides if term in self.factors else self.sides(term)
        batch = self._build(term, shared, sides)
        finite, curved = batch.found()
        self.dropped += not finite
        # Without curvature all is masked, or a softmax saturated.
        return (batch, shared) if finite and curved else None

    def _rescale(self) -> None:
        """Take the mean eigenvalue of all blocks together from their traces."""
        sizes = {layer_of(term): self.factors[term].size for term in self._last_traces}
        scale = math.fsum(self._last_traces.values()) / sum(sizes.values())
        self.largest = max(self.largest, scale)
        # Where a loss is all but zero so is its curvature, and dampings must not follow.
        self.scale = max(scale, LEAST * self.largest)

    def _traces(self) -> dict[str, Tensor]:
        """The trace of every term."""
        # In the layers' order, which a resumed training shares; not in the order of arrival.
        every = [name + how for name in self.layers for how in HOW]
        return {term: self.factors[term].trace() for term in every if term in self.factors}

    def _let_go(self, terms: Collection[str]) -> None:
        """Let go of terms whose factors are damaged, and of inverses that are made from these."""
        self._prices = None
        for term in terms:
            self.factors.pop(term, None)
            self._batch.pop(term, None)
            # A damped inverse is made again from its factors; a basis can do without them, unless
            # it is of entries, and the layer's rows will be seen.
            if self.basis not in NORMALISED or term.endswith(ENTRIES):
                self.inverses.pop(layer_of(term), None)

    def _shared(
        self, term: str, seen: Sequence[Observation], rows: int | None, turn: int
    ) -> Sequence[Observation]:
        """The statistics as the term's sharing takes them, of as many examples as are enough."""
        several = any(stats.a.counts[1] > 1 for stats, _ in seen)
        if several and self.sharing(term) == "auto":
            self.chosen[term] = nearer_sharing(seen)
        reduce = self.sharing(term) == "reduce"
        seen = seen if rows is None else thinned(seen, rows, turn, reduce)
        return all_reduced(seen) if reduce else seen

    def _build(self, term: str, seen: Sequence[Observation], sides: Sides) -> Factors:
        if self.sharing(term) == "best" and sides.dense:
            return best_factors(seen)
        return batch_factors(seen, sides)

    def _learn_term(
        self, term: str, batch: Factors, seen: Sequence[Observation], decay: float
    ) -> None:
        """Add a batch's factors of a term, made from what was seen, to the running ones."""
        self._batch[term] = seen
        before = self.factors.get(term)
        if before is None and self.terms(layer_of(term)) == [layer_of(term) + ENTRIES]:
            # Its rows can be seen now: an inverse of its entries is none of its matrix.
            self.inverses.pop(layer_of(term), None)
        if self.basis == "corrected":
            basis = self._own_basis(term) or eigen_basis(
                batch.A.mean, batch.B.mean, term, batch.sides
            )
            batch = with_corrected(batch, seen, *basis.basis)
            self.inverses.setdefault(layer_of(term), basis)
        # One draw says little about an entry: it takes the average of many.
        own = max(decay, ENTRIES_DECAY) if term.endswith(ENTRIES) else decay
        running = batch if before is None else before.then(batch, own)
        self.factors[term] = running
        mine = self._own_basis(term)
        if mine is not None and running.s is not None:
            self.inverses[layer_of(term)] = replace(mine, s=running.s.mean.to(mine.s.dtype))

    def _own_basis(self, term: str) -> EigenInverse | None:
        """The eigenbasis of a term that is all there is of its layer."""
        inverse, terms = self.inverses.get(layer_of(term)), self.terms(layer_of(term))
        alone = terms in ([], [term])
        return inverse if alone and isinstance(inverse, EigenInverse) else None

    def drop_damaged(self) -> bool:
        """Let go of what is not finite: the next batch starts it afresh. Whether factors were."""
        any_lost = False
        for name in self.layers:
            lost = [t for t in self.terms(name) if not all_finite(self.factors[t].totals())]
            self._let_go(lost)
            any_lost |= bool(lost)
            inverse = self.inverses.get(name)
            if inverse is not None and not all_finite(inverse.tensors().values()):
                del self.inverses[name]
            moments = self.moments.get(name)
            if moments is not None and not all_finite(moments.tensors().values()):
                del self.moments[name]
        if not (math.isfinite(self.largest) and math.isfinite(self.scale)):
            self.scale, self.largest = self._sound  # which the dampings go by
        return any_lost

    def start_afresh(self, basis: str | None = None) -> None:
        """Let go of all that is known, and go on in a basis."""
        self.factors, self.chosen, self._last_traces = {}, {}, {}
        self._prices = None
        self.change_basis(self.basis if basis is None else basis)
        self.scale = self.largest = 0.0

    @property
    def most_rows(self) -> int:
        """Of the layer that is the most work, in the last batch; 0 before there was one."""
        sizes = {layer_of(term): factors.size for term, factors in self.factors.items()}
        work = [(rows * sizes.get(name, 0), rows) for name, rows in self.rows.items()]
        return max(work, default=(0, 0))[1]

    @property
    def trained_terms(self) -> list[str]:
        """The terms that are known of layers which are trained now: a batch should tell of each."""
        return [
            term
            for name, layer in self.layers.items()
            if any(p.requires_grad for p in layer.whole().values())
            for term in self.terms(name)
        ]

    def forget_batch(self) -> None:
        """Let go of the step's rows a and b."""
        self._batch = {}

    @property
    def known(self) -> list[str]:
        """The layers of which anything is known."""
        some = {layer_of(term) for term in self.factors}
        return [name for name in self.layers if name in some]

    def refresh(
        self, names: Collection[str], damping: float, turn: tuple[int, int] = (0, 1)
    ) -> None:
        """Invert again, for the named layers and for those that have no inverse yet.

        turn: the step, and how many there are from one renewal to the next.
        An inversion that fails leaves the last good inverse in place and is counted; without one
        NotPositiveDefinite is raised, but for normalised steps, which need no basis.
        """
        asked = [name for name in self.known if name in names or not self._up_to_date(name)]
        if self.basis in NORMALISED:
            # Together where that is faster; it takes the memory of all.
            faster = any(by_products(self.factors[self.terms(name)[0]].A.total) for name in asked)
            for some in [asked] if faster else [[name] for name in asked]:
                self._renew(some, turn)
            return
        for name in asked:
            with self._counting(name):
                self._refresh_layer(name, damping)

    @contextmanager
    def _counting(self, name: str) -> Iterator[None]:
        """What fails inside is counted, and raised where there is nothing to go on with."""
        try:
            with memory_for(name):
                yield
        except NotPositiveDefinite:
            self.failed += 1
            if name not in self.inverses and self.basis not in NORMALISED:
                raise

    def _renew(self, names: Sequence[str], turn: tuple[int, int]) -> None:
        """Renew the bases of normalised steps."""
        renewals = {}
        for name in names:
            with self._counting(name):
                renewals[name] = self._renewal(name, turn)
        find_by_products(renewals.values())
        for name, renewal in renewals.items():
            with self._counting(name):
                old, new = self._eigen(name), renewal.basis()
                then = new.shape if old is None else old.s.shape
                if name in self.moments and self.moments[name].m.shape != then:
                    del self.moments[name]  # its rows can be seen now: its entries had no basis
                if name in self.moments:
                    self.moments[name].turn_(old, new)
                self.inverses[name] = new
                for moved in renewal.moved(new):
                    self.restless += (float(moved) - self.restless) / RESTLESS_MEMORY

    def _up_to_date(self, name: str) -> bool:
        """Whether a layer has an inverse, and of all its terms."""
        if self.basis in NORMALISED:
            return name in self.inverses
        pair = isinstance(self.inverses.get(name), (PairInverse, ExactPairInverse))
        return name in self.inverses and pair == (len(self.terms(name)) == 2)

    def _refresh_layer(self, name: str, damping: float) -> None:
        terms = self.terms(name)
        if self.basis == "factored" or len(terms) == 2:
            self.inverses[name] = self._damped(name, damping)
            return
        (term,) = terms
        factors = self.factors[term]
        new = eigen_basis(factors.A.mean, factors.B.mean, name, factors.sides)
        old = self._own_basis(term)
        if factors.s is not None and old is not None:
            s = self._carried(factors, old, new, term)
            self.factors[term] = replace(factors, s=s)
            new = replace(new, s=s.mean.to(new.s.dtype))
        self.inverses[name] = new

    def _carried(self, factors: Factors, old: EigenInverse, new: EigenInverse, term: str) -> Moment:
        """Corrected eigenvalues in a new basis: this batch measured again, the rest rotated."""
        assert factors.s is not None
        seen = self._batch.get(term)
        if seen is None:
            return rotated(factors.s, old.basis, new.basis, factors.sides)
        batch = self._build(term, seen, factors.sides)
        here = with_corrected(batch, seen, *old.basis).s
        there = with_corrected(batch, seen, *new.basis).s
        assert here is not None
        assert there is not None
        rest = Moment(factors.s.total - here.total, factors.s.count - here.count)
        return rotated(rest, old.basis, new.basis, factors.sides) + there

    def _damped(self, name: str, damping: float) -> Inverse:
        """The inverse that depends on the damping: of damped factors, or of two products."""
        terms = self.terms(name)
        if len(terms) == 1:
            f = self.factors[terms[0]]
            return factored_inverse(f.A.mean, f.B.mean, damping, name, f.sides)
        first, second = self._products(name)
        make = pair_inverse if self.basis == "factored" else exact_pair
        return make(first, second, damping, name)

    def _products(self, name: str) -> list[Product]:
        """A layer's terms on the sides of its own matrix."""
        found = [(t, self.factors[t]) for t in self.terms(name)]
        # The model may have been cast since one of two was seen.
        dtype = max((f.A.total.dtype for _, f in found), key=lambda dtype: dtype.itemsize)
        return [
            oriented(f.B.mean.to(dtype), f.A.mean.to(dtype), f.sides, t.endswith(TURNED))
            for t, f in found
        ]

    def _renewal(self, name: str, turn: tuple[int, int]) -> Renewal:
        """Of one eigenbasis for all terms of a layer, on the sides of its own matrix."""
        products = self._products(name)
        one = of_both(products[0], products[1]) if len(products) == 2 else products[0]
        work = self._work(name)
        # A column of scales and shifts is too little to be turned at the other layers' expense.
        most = self._prices_of_all()[0] if min(one.Q.shape[-1], one.P.shape[-1]) > 1 else math.inf
        bases = zip((one.Q, one.P), in_full(one.sides, *one.shape), strict=True)
        worth = [pays(price(M, basis, work), most, *turn) for M, basis in bases]
        rows = math.inf if len(products) == 2 else self.factors[self.terms(name)[0]].rows
        return Renewal(one, self._eigen(name), name, worth, rows)

    def _work(self, name: str) -> int:
        """Multiplications in a layer for a batch, forward and backward."""
        return 3 * self.rows.get(name, 0) * self.factors[self.terms(name)[0]].size

    @property
    def dear(self) -> bool:
        """Whether bases and their factors cost so much that they are renewed but seldom."""
        return self._prices_of_all()[1] > DEAR

    def _prices_of_all(self) -> tuple[float, float]:
        """What all bases cost, and with their factors, in runs of the model on a batch."""
        if self._prices is None:
            known = [self.factors[self.terms(name)[0]] for name in self.known]
            work = sum(map(self._work, self.known))
            bases = sum(
                price(moment.total, basis, work)
                for f in known
                for moment, basis in zip((f.A, f.B), in_full(f.sides, *f.shape), strict=True)
                if basis != DIAGONAL  # a side's own axes are no basis to be found
            )
            self._prices = bases, bases + AT_LEAST * len(known) / max(1, work)
        return self._prices

    def _own_sides(self, term: str) -> Sides:
        """How a term's factors are stored, on the sides of the layer's own matrix."""
        sides = self.factors[term].sides
        return Sides(sides.output, sides.input) if term.endswith(TURNED) else sides

    def _eigen(self, name: str) -> EigenInverse | None:
        inverse = self.inverses.get(name)
        return inverse if isinstance(inverse, EigenInverse) else None

    def change_basis(self, basis: str) -> None:
        """Let go of all inverses, and keep them in another form from now on."""
        self.basis = basis
        self.inverses, self.moments = {}, {}
        self.restless = 1.0

    def normalised(self, gradients: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
        """Adam's step down each layer's gradient, in its eigenbasis; in its own entries without.

        In basis "orthogonal" each is then orthogonalised in its curvature.
        """
        orthogonal = self.basis == ORTHOGONAL
        bases = {name: basis for name in gradients if (basis := self._eigen(name)) is not None}
        moments, rotated = [], []
        for name, G in gradients.items():
            if name in bases:
                # The basis of entries has them in one column.
                basis = bases[name]
                G = basis.rotate(G.reshape(basis.shape).to(basis.s.dtype))
            if name not in self.moments or self.moments[name].m.shape != G.shape:
                self.moments[name] = Moments(G)
            moments.append(self.moments[name])
            rotated.append(G)
        made = normalised(moments, rotated, decay, ahead=orthogonal)
        steps = dict(zip(gradients, made, strict=True))
        if orthogonal:
            steps = in_curvature(steps, bases, self.rows)
        for name, basis in bases.items():
            steps[name] = basis.rotate_back(steps[name], rough=True).reshape(gradients[name].shape)
        return steps

    def in_half(self, name: str) -> bool:
        """Whether a layer's normalised steps are, in part, products in half precision."""
        basis = self._eigen(name) if self.basis in NORMALISED else None
        if basis is None or basis.rough_dtype(basis.s.dtype) != basis.s.dtype:
            return basis is not None
        flat = half_flattened(basis.s, basis.sides, self.rows.get(name, 0))
        return flat and self.basis == ORTHOGONAL

    def with_damping(self, damping: float) -> dict[str, Inverse]:
        """The inverses as they would be with another damping."""
        if self.basis != "factored":
            return self.inverses  # applied with whatever damping is asked for
        found = {}
        for name in self.inverses:
            with memory_for(name):
                found[name] = self._damped(name, damping)
        return found

    def apply(self, name: str, G: Tensor, damping: float) -> Tensor:
        """(block + damping·I)⁻¹ G, as well as the basis has it."""
        inverse = self.inverses.get(name)
        if inverse is None:  # no batch has reached this layer so far: descent, scaled by the others
            return G / (self.scale + damping)
        # A model may have been cast since: its factors stay as exact as they were.
        dtype = next(iter(inverse.tensors().values())).dtype
        terms = self.terms(name)
        if terms == [name + ENTRIES]:
            return inverse.apply(G.reshape(-1, 1).to(dtype), damping).reshape(G.shape)
        if terms == [name + TURNED]:
            return inverse.apply(G.mT.to(dtype), damping).mT
        return inverse.apply(G.to(dtype), damping)

    def memory(self, name: str) -> int:
        """Bytes kept for a layer."""
        return sum(t.numel() * t.element_size() for t in self.tensors(name).values())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All that is kept for a layer, to be saved; empty before the first batch."""
        kept: dict[str, Tensor] = {}
        for how in HOW:
            factors = self.factors.get(name + how)
            for key in ("A", "B", "s") if factors else ():
                moment = getattr(factors, key)
                if moment is not None:
                    kept[f"{key}_total{how}"] = moment.total
                    kept[f"{key}_count{how}"] = moment.count
            if factors and factors.chance is not None:
                kept[f"chance{how}"] = factors.chance
            if factors and name + how in self.chosen:
                reduced = self.chosen[name + how] == "reduce"
                kept[f"reduced{how}"] = factors.A.count.new_tensor(float(reduced))
        if kept and self.basis in NORMALISED and name in self.rows:
            kept["seen"] = next(iter(kept.values())).new_tensor(float(self.rows[name]))
        if kept and name in self.inverses:
            kept.update({f"inverse_{k}": t for k, t in self.inverses[name].tensors().items()})
        if name in self.moments:
            kept.update({f"moments_{k}": t for k, t in self.moments[name].tensors().items()})
        return kept

    def load(self, name: str, kept: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        self._prices = None
        for how in HOW:
            term = name + how
            if f"reduced{how}" in kept:
                self.chosen[term] = "reduce" if bool(kept[f"reduced{how}"]) else "expand"
            if f"A_total{how}" in kept:
                moments = {
                    key: Moment(kept[f"{key}_total{how}"], kept[f"{key}_count{how}"])
                    for key in ("A", "B", "s")
                    if f"{key}_total{how}" in kept
                }
                sides = self._sides_of(term, [moments[key].total for key in "AB"])
                chance = kept.get(f"chance{how}")
                self.factors[term] = Factors(**moments, sides=sides, chance=chance)
        if "seen" in kept:
            self.rows[name] = int(kept["seen"])
        inverse = {k.removeprefix("inverse_"): t for k, t in kept.items() if "inverse_" in k}
        if inverse and self.terms(name):  # or its factors were lost just before it was saved
            self.inverses[name] = self._restored(name, inverse)
        steps = {k.removeprefix("moments_"): t for k, t in kept.items() if "moments_" in k}
        if steps:
            self.moments[name] = restored(steps)

    def _sides_of(self, term: str, totals: Sequence[Tensor]) -> Sides:
        """How A and B that were saved are stored: `largest_side` may have been another one."""
        sides = self.sides(term)
        if term.endswith(ENTRIES):
            return sides
        layer = self.layers[layer_of(term)]
        lead = layer.kind.matrix(layer, layer.parameters()).dim() - 2
        of_dims = {1: DIAGONAL, 2: DENSE}  # blocks have three, and are those of now
        return Sides(*(of_dims.get(t.dim() - lead, s) for t, s in zip(totals, sides, strict=True)))

    def _restored(self, name: str, kept: Mapping[str, Tensor]) -> Inverse:
        terms = self.terms(name)
        if self.basis in NORMALISED:
            own = [self._own_sides(term) for term in terms]
            sides = common_sides(own[0], own[-1])
            d_out, d_in = kept["s"].shape[-2:]
            on_input = of_basis(kept["U_A"], d_in, sides.input, kept["s"].dim())
            on_output = of_basis(kept["U_B"], d_out, sides.output, kept["s"].dim())
            return EigenInverse(**kept, sides=Sides(on_input, on_output))
        if len(terms) == 1:
            make = FactoredInverse if self.basis == "factored" else EigenInverse
            return make(**kept, sides=self.factors[terms[0]].sides)
        first, second = (self.factors[t].sides for t in terms)
        turned = Sides(second.output, second.input)
        near = PairInverse(kept["X"], kept["Y"], kept["s"], common_sides(first, turned))
        if self.basis == "factored":
            return near
        return ExactPairInverse(
            Product(kept["P1"], kept["Q1"], first), Product(kept["P2"], kept["Q2"], turned), near
        )


def layer_of(term: str) -> str:
    """The layer that a term belongs to."""
    return term.removesuffix(TURNED).removesuffix(ENTRIES)
