"""How far to go along the K-FAC direction and the previous step, and with which damping.

Asks the batch's exact quadratic model, compares what it promised with what came, and hands both to
the rule of `adapt`. Where the model cannot be run again, fixed rules take its place.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from kronewton.adapt import (
    FIRST_TRIALS,
    Fixed,
    LevenbergMarquardt,
    Pace,
    Pacing,
    Rule,
    Settings,
    StepInfo,
)
from kronewton.batches import (
    Batches,
    half,
    loss_of,
    mark,
    rerunnable,
    rounding,
    same_loss,
    weight_of,
)
from kronewton.curvature import Curvature
from kronewton.errors import NotPositiveDefinite
from kronewton.normalised import FIRST_DECAY
from kronewton.options import AUTO, MOST, NORMALISED, ORTHOGONAL, Options
from kronewton.part import Part
from kronewton.plan import Candidate, Plan, Steering
from kronewton.quadratic import (
    Dial,
    Line,
    MissingProducts,
    QuadraticModel,
    Refinement,
    Subspace,
    flattened,
    unflattened,
)
from kronewton.renewals import OFTEN, ROWS, SELDOM, decay, due, intervals
from kronewton.replay import Replayer

MOST_MOMENTUM = 0.9  # of an automatic momentum beside a learning rate that is given
MOMENTUM = 0.5  # where no quadratic model chooses it
DAMPING = 10.0  # over the curvature's mean eigenvalue, likewise
DECREASE = 1e-3  # g'(B ⊗ A + λI)⁻¹g of a step over the loss (over 1 if unknown), at most
TRIAL_EVERY, NOISY_TRIAL_EVERY = 5, 20  # steps between trials of γ, which cost inversions
ADAPT_EVERY = 5  # steps between decisions on λ, which cost a forward pass
REFINED_DROP = 0.5  # of λ a step, where the model is all but solved in every one
EARLY = 20  # normalised steps that change so much that noise above zero says nothing
STALLED = 0.02  # of the loss: a Newton step that gains less counts its noise for more
RISEN = 0.25  # of what the model promised of one of the first steps: no more may be lost in it
FAR_WORSE = 0.1  # of the loss's unit: what a normalised step may lose and not be tried shorter
GLIMPSE = 1e-4  # the pace at which a network's outputs are as good as linear in its step
UNKEPT = 0.25  # of what the model promised of a normalised step: with less, the loss's own bend
TRIALS = 4  # of one normalised step, each shorter than the one before
RAISE = 10  # λ after a step of Newton's that is taken back


class Planner:
    """Plans the steps of one optimizer."""

    def __init__(
        self,
        options: Options,
        curvature: Curvature,
        replayer: Replayer,
        unwatched: Callable[[], AbstractContextManager[None]],
        steering: Steering,
    ) -> None:
        self.options, self.curvature, self.replayer = options, curvature, replayer
        self.steering = steering
        self.batches = Batches(replayer, unwatched, options.curvature_batches - 1)
        self.rule, self.pacing, self.pace = _rule(options), Pacing(), Pace()
        self.settings: Settings | None = None  # None: to be found before the first step
        if not isinstance(options.damping, str):
            self.settings = Settings(options.damping, options.damping)
        self.asked = 0  # the step after which the rule was last asked
        # Loss after a step, its change, and the mark of the batch.
        self.outcome: tuple[float, float, float] | None = None
        self.noise: float | None = None
        self.undone = self.broken = 0
        self.partial = False  # the criteria are not the whole loss: no model of a part decides
        self.factor = 1.0  # of an automatic step, by the groups' lr; NaN: not the same for all
        self.lr = 0.0  # of the last step whose length was chosen here

    @property
    def normalising(self) -> bool:
        """Whether steps are normalised, and not Newton's."""
        return self.curvature.basis in NORMALISED

    @property
    def searching(self) -> bool:
        """Whether Newton's steps need dampings that are still to be found."""
        unknown = self.settings is None or math.isnan(self.settings.damping)
        return unknown and not self.normalising

    def settle(self, step: int, parts: Sequence[Part], gradient: Tensor) -> bool:
        """Choose normalised steps or Newton's; True if that is a change.

        Steps begin as normalised ones, which ask least of the first batch; then the noise decides.
        """
        if not self.options.may_normalise:
            return False
        if self.settings is None:
            known = self.curvature.scale > 0 and self.models(parts)
            if not (known and bool(torch.isfinite(gradient).all())):
                return False
            self.curvature.change_basis(ORTHOGONAL)
            self.settings = Settings(math.nan, math.nan, noise=self.rule.assumed)
            return True
        wanted = self.rule.normalises(self.settings, self.normalising)
        if wanted == self.normalising:
            return False
        self.curvature.change_basis(ORTHOGONAL if wanted else self.options.first_basis)
        self.pace, self.asked = self.pacing.midway(), step
        return True

    def direct(self, damping: float) -> list[Tensor]:
        """d = −(B ⊗ A + damping·I)⁻¹ g, times the group's lr where that is a number."""
        found = self.steering.precondition(self.steering.gradients(), damping)
        return self.steering.scaled([t.neg() for t in found])

    # Before the step.

    def intervals(self) -> tuple[int, int]:
        """Steps between renewals of the factors and of the inverses."""
        restless = self.curvature.restless if self.normalising else 1.0
        return intervals(self._known(), restless, self.options)

    def early(self) -> Collection[int]:
        """In which of the first steps both are renewed.

        The first basis is of other weights where the first step went far. Where the same batch
        comes again Newton's steps may follow, by factors of now.
        """
        if not (self.normalising and self.curvature.dear):
            return OFTEN
        again = self.noise == 0 or self.pacing.leapt(self.pace, self.lr)
        return SELDOM | {1} if again else SELDOM

    def age(self, step: int) -> int:
        """Steps of the kind that is made now, which renewals go by: a new kind starts afresh."""
        return self.pace.steps if self.normalising else step

    def decay(self) -> float:
        """The weight of the running factors against one new batch."""
        return decay(self._known(), self.options)

    def rows(self) -> int | None:
        """How many rows of a layer are enough for its factors; None: all that there are."""
        return ROWS if self.normalising and self.options.fisher != "exact" else None

    def remember(self, parts: Sequence[Part]) -> None:
        """Keep a batch for the curvature of later steps, if it can be and is asked for."""
        if self.batches.keeps and self.models(parts):
            self.batches.remember(parts)

    def _known(self) -> str:
        """What is known of the noise: a key of RENEWALS."""
        if self.normalising:
            kind = "early" if self.pace.steps < EARLY else "normalised"
            return kind + ", dear" if self.curvature.dear else kind
        if self.settings is not None and self.rule.averaging(self.settings) > 0:
            return "noise"
        if self.settings is None or self.noise is None or self.options.damping != AUTO:
            return "unknown"
        # The rule's average may not have heard of it yet.
        loud = self.rule.averaging(replace(self.settings, noise=self.noise)) > 0
        return "unknown" if loud else "none"

    def _adapt_every(self) -> int:
        given = self.options.adapt_every
        if isinstance(given, str):
            return 1 if self.options.refine else ADAPT_EVERY
        return given

    def models(self, parts: Sequence[Part]) -> bool:
        """Whether these parts have a quadratic model, and something is to be chosen with it."""
        possible = self.options.uses_model and not self.replayer.without_products
        possible = possible and not self.partial
        return possible and bool(parts) and all(map(rerunnable, parts))

    def look_back(self, parts: Sequence[Part]) -> None:
        """How far apart two batches are at one point, over what the last step gained."""
        if self.outcome is not None and self.models(parts):
            after, change, marked = self.outcome
            difference = abs(loss_of(parts) - after)
            if difference <= same_loss(parts) * abs(after):  # the same batch again, in any order?
                now = mark(parts)
                again = math.isnan(now) or math.isclose(now, marked, rel_tol=1e-9, abs_tol=1e-6)
                difference = 0.0 if again else max(difference, rounding(parts) * abs(after))
            self.noise = difference / max(abs(change), 1e-30)
            if not self.normalising:
                # Where Newton's steps gain little they are not worth their price.
                self.noise *= max(1.0, STALLED * abs(after) / max(abs(change), 1e-30))
            # Far from a minimum every step gains much; only the very same batch says something.
            telling = self.noise == 0 or self.pace.steps >= EARLY
            if self.normalising and self.settings is not None and telling:
                self.settings = self.rule.heard(self.settings, self.noise)
        self.outcome = None

    def search(self, parts: Sequence[Part], gradient: Tensor) -> None:
        """Find the first dampings; they are tried out where the model can be run again."""
        damping = DAMPING * self.curvature.scale
        if self.models(parts):
            with contextlib.suppress(MissingProducts):
                damping = self._first_damping(parts, gradient)
        noise = 0.0 if self.settings is None else self.settings.noise
        self.settings = Settings(damping, damping, noise=noise)

    def _first_damping(self, parts: Sequence[Part], gradient: Tensor) -> float:
        """Of a ladder of dampings, largest first, the last before the loss gets worse again."""
        model = self.batches.quadratic(parts)
        lowest, found = math.inf, FIRST_TRIALS[0] * self.curvature.scale
        for trial in FIRST_TRIALS:
            damping = trial * self.curvature.scale
            self.curvature.refresh(self.curvature.known, damping)
            direction = self.direct(damping)
            subspace = model.subspace(gradient, [model.line(direction)])
            if not subspace.finite():
                break
            x = self._minimised(subspace, damping)
            length = x[0] * self._shortening(subspace.bend(x), parts)
            there = torch._foreach_add(self.replayer.parameters(), direction, alpha=length)
            loss = self.batches.loss_with(parts, there)
            if not loss <= lowest + rounding(parts) * abs(lowest) or math.isinf(loss):
                break
            lowest, found = min(loss, lowest), damping  # the smaller one where losses agree
        return found

    def plan(
        self,
        step: int,
        parts: Sequence[Part],
        gradient: Tensor,
        previous: list[Tensor] | None,
    ) -> Plan | None:
        """Choose the coefficients; None if the gradient or the curvature is not finite."""
        if self.normalising:
            return self._normalised(parts, gradient, previous)
        assert self.settings is not None
        direction = self.direct(self.settings.inverse_damping)
        if self.models(parts):
            try:
                return self._modelled(step, parts, gradient, direction, previous)
            except MissingProducts:
                pass
        return self._unmodelled(gradient, direction, abs(loss_of(parts)) or 1.0)

    def _modelled(
        self,
        step: int,
        parts: Sequence[Part],
        gradient: Tensor,
        direction: list[Tensor],
        previous: list[Tensor] | None,
    ) -> Plan | None:
        """With the coefficients that the quadratic model asks for."""
        assert self.settings is not None
        # When γ is tried, in the whole span: on one line it would be fitted to the line.
        averaging = self.rule.averaging(self.settings)
        every = NOISY_TRIAL_EVERY if averaging else TRIAL_EVERY
        trying = self.options.damping == AUTO and due(step, every)
        averaging = 0.0 if trying else averaging
        model = self.batches.quadratic(parts)
        found = self._candidate(model, gradient, direction, previous, averaging)
        if not found.subspace.finite():
            return None
        if trying and step:
            found = self._probe(model, gradient, found)
        refined = 0
        if self.options.refine and self.options.lr == AUTO:
            return self._refined_step(model, gradient, found, parts)
        if self.options.refine:
            found, refined = self._refined_direction(model, gradient, found)
        x = self._minimised(found.subspace, self.settings.damping)
        shortened = self._shortening(found.subspace.bend(x), parts)
        # Nor may it promise more than there is to gain.
        if isinstance(self.options.trust_region, str):
            promise = abs(found.subspace.value([shortened * v for v in x], self.settings.damping))
            bound = max(abs(loss_of(parts)), weight_of(parts))
            shortened *= min(1.0, bound / max(promise, 1e-300))
        x = [shortened * v for v in x]
        predicted = found.subspace.value([self.factor * v for v in x], self.settings.damping)
        self.lr, momentum = found.coefficients(x)
        # A criterion's curvature is nowhere negative, but minus one's is everywhere.
        made = any(x) or all(p.weight is None or float(p.weight) >= 0 for p in parts)
        return Plan(found.direction, self.lr, momentum, (), refined, predicted, shortened, made)

    def _normalised(
        self, parts: Sequence[Part], gradient: Tensor, previous: list[Tensor] | None
    ) -> Plan | None:
        """A normalised step, at the pace of the rule."""
        # What is not finite would stay in the moments.
        loss = loss_of(parts)
        if not math.isfinite(float(torch.dot(gradient, gradient)) + loss):
            return None
        options = self.options
        given = options.momentum
        decay = FIRST_DECAY if isinstance(given, str) else float(given)
        direction = self.steering.scaled(self.steering.normalised(decay))
        if options.lr != AUTO:
            self.pace = replace(self.pace, steps=self.pace.steps + 1)
            return Plan(direction, 1.0, 0.0)
        self.pace = self.pacing.alarmed(self.pace, loss)
        looking = self.pacing.looks(self.pace) and self.models(parts)
        if looking and math.isinf(self.pace.ceiling):
            self.pace = self._bounded(self.pace, parts, gradient, direction)
        agreement = None
        if previous is not None and self.pace.steps:
            agreement = -float(torch.dot(gradient, flattened(previous))) / self.lr
        noise = self.rule.assumed if self.settings is None else self.settings.noise
        self.pace = self.pacing.agreed(self.pace, agreement, noise)
        if looking:
            return self._on_trial(parts, gradient, direction)
        self.lr = self.pacing.lr(self.pace, tried=False)
        return Plan(direction, self.lr, 0.0)

    def _bounded(
        self, pace: Pace, parts: Sequence[Part], gradient: Tensor, direction: list[Tensor]
    ) -> Pace:
        """The pace within what the batch's quadratic model allows along a direction.

        A step so short that the outputs' change is all but their derivative costs one forward pass.
        In half precision rounding would be most of that change, and forward mode takes its place.
        """
        narrow = any(t.dtype.itemsize == 2 for t in self.replayer.originals)
        if narrow or half(parts):
            with contextlib.suppress(MissingProducts):
                model = self.batches.quadratic(parts)
                found = model.subspace(gradient, [model.line(direction)])
                return self.pacing.modelled(pace, found.slope[0], found.bend([1.0]))
            return pace
        slope = float(torch.dot(gradient, flattened(direction)))
        bend = self.batches.trial(parts, torch._foreach_mul(direction, GLIMPSE)).bend
        return self.pacing.modelled(pace, slope, bend / GLIMPSE**2)

    def _on_trial(self, parts: Sequence[Part], gradient: Tensor, direction: list[Tensor]) -> Plan:
        """A step of the rule's length, tried on its own batch before it is made.

        The change of the model's output in it gives the quadratic model along the step, at the
        scale that counts. Where the step is bad it is tried shorter, and not made if all are.
        """
        before, shorter = loss_of(parts), False
        for _ in range(TRIALS):
            lr = self.pacing.lr(self.pace)
            step = self.steering.change(direction, lr)
            along = float(torch.dot(gradient, flattened(step)))
            if along == 0:  # the groups' lr is zero: there is nothing to try
                self.lr = lr
                return Plan(direction, lr, 0.0)
            trial = self.batches.trial(parts, step)
            change = trial.loss - before
            promised = along + 0.5 * trial.bend
            if self._loss_allows(change, promised, before, parts):
                break
            self.pace, shorter = self.pacing.failed(self.pace, lr, along / lr, change), True
            self.undone += 1
        else:
            return Plan(direction, 0.0, 0.0, made=False)
        # Where the loss itself bends far more; what it cannot show is no curvature.
        shown = abs(change - along) > same_loss(parts) * abs(before)
        steeper = shown and change > UNKEPT * promised
        bend = max(trial.bend, 2 * (change - along)) if steeper else trial.bend
        # The groups' lr shorten whatever the model wants.
        length = lr * (self.factor if 0 < self.factor < math.inf else 1.0)
        self.pace = self.pacing.passed(
            self.pace, along / length, bend / length / length, eased=not shorter
        )
        self.lr = min(lr, self.pacing.lr(self.pace))
        if self.lr == lr:
            self.outcome = (trial.loss, change, mark(parts))
        share = self.lr / lr
        predicted = share * along + 0.5 * share**2 * trial.bend
        return Plan(direction, self.lr, 0.0, predicted=predicted)

    def _loss_allows(
        self, change: float, promised: float, before: float, parts: Sequence[Part]
    ) -> bool:
        """Whether a normalised step may change the loss of its own batch so."""
        # One step on one batch may well be uphill where it is noise; not by so much.
        most = max(abs(before), FAR_WORSE * weight_of(parts))
        if self.pace.steps <= self.pacing.first and promised < 0:
            most = -RISEN * promised
        return change <= most

    def _refined_step(
        self, model: QuadraticModel, gradient: Tensor, found: Candidate, parts: Sequence[Part]
    ) -> Plan:
        """On from the minimum over direction and previous step, by the dial."""
        x = self._minimised(found.subspace, self._damping)
        start = model.combined(found.lines, x)
        fixed = 1 if self.options.momentum != AUTO else len(found.lines)
        refinement = self._refine(model, gradient, start, found.lines[:fixed])
        step = refinement.step
        slope, bent = model.numbers(gradient, step, self._damping)
        norm2 = float(torch.dot(step.flat, step.flat))
        shortened = self._shortening(bent - self._damping * norm2, parts)
        part = self.factor * shortened
        lr, momentum = (shortened * v for v in found.coefficients(x))
        self.lr = lr
        return Plan(
            found.direction,
            lr,
            momentum,
            unflattened(shortened * (step.flat - start.flat), found.direction),
            refinement.directions,
            part * slope + 0.5 * part**2 * bent,
            shortened,
        )

    def _refined_direction(
        self, model: QuadraticModel, gradient: Tensor, found: Candidate
    ) -> tuple[Candidate, int]:
        """The direction in front of a learning rate that is given: the dial's whole step."""
        assert self.settings is not None
        # Without the groups' lr, which multiply the refined direction once, at the end.
        own = self.steering.precondition(self.steering.gradients(), self.settings.inverse_damping)
        line = model.line([t.neg() for t in own])
        alone = model.subspace(gradient, [line])
        start = model.combined([line], alone.minimise(self._damping, {}))
        refinement = self._refine(model, gradient, start, [line])
        direction = self.steering.scaled(refinement.step.vector)
        lines = [model.line(direction), *found.lines[1:]]
        refined = Candidate(direction, lines, model.subspace(gradient, lines))
        return refined, refinement.directions

    def _refine(
        self, model: QuadraticModel, gradient: Tensor, start: Line, within: Sequence[Line]
    ) -> Refinement:
        assert self.settings is not None
        gamma = self.settings.inverse_damping
        dial = Dial(
            self.options.refine,
            self.options.refine_tolerance,
            self._damping,
            lambda vector: self.steering.precondition(vector, gamma),
        )
        refinement = model.refine(gradient, start, within, dial)
        self.broken += refinement.broken
        return refinement

    @property
    def _damping(self) -> float:
        """λ, once there is one."""
        assert self.settings is not None
        return self.settings.damping

    def _candidate(
        self,
        model: QuadraticModel,
        gradient: Tensor,
        direction: list[Tensor],
        previous: list[Tensor] | None,
        averaging: float,
    ) -> Candidate:
        """What is searched with a direction, and the quadratic model there."""
        if previous is None:
            lines = [model.line(direction)]
            return Candidate(direction, lines, model.subspace(gradient, lines))
        automatic = self.options.lr == self.options.momentum == AUTO
        if automatic and 0 < averaging < MOST * self.lr:
            mixed = averaging / self.lr  # previous steps are lr times what is averaged
            lines = [model.line(torch._foreach_add(direction, previous, alpha=mixed))]
            return Candidate(direction, lines, model.subspace(gradient, lines), mixed)
        lines = [model.line(direction), model.line(previous)]
        return Candidate(direction, lines, model.subspace(gradient, lines))

    def _minimised(self, subspace: Subspace, damping: float) -> list[float]:
        """The coefficients that minimise the model, those that are given as numbers being kept."""
        fixed = {}
        if self.options.lr != AUTO:
            fixed[0] = 1.0  # the direction already has it
        if self.options.momentum != AUTO and len(subspace.slope) > 1:
            fixed[1] = float(self.options.momentum)
        x = subspace.minimise(damping, fixed)
        if len(x) > 1 and 0 in fixed and 1 not in fixed:
            # A wrong length of the direction is not for the momentum to make good.
            x[1] = min(max(x[1], 0.0), MOST_MOMENTUM)
        return x

    def _probe(
        self,
        model: QuadraticModel,
        gradient: Tensor,
        found: Candidate,
    ) -> Candidate:
        """Try a neighbour of γ on this batch, and keep it if the quadratic model falls further."""
        assert self.settings is not None
        trial = self.rule.probed(self.settings, True, self.curvature.scale).inverse_damping
        kept = self.curvature.inverses
        try:
            self.curvature.inverses = self.curvature.with_damping(trial)
        except NotPositiveDefinite:
            self.curvature.failed += 1
            return found
        direction = self.direct(trial)
        lines = [model.line(direction), *found.lines[1:]]
        other = Candidate(direction, lines, model.subspace(gradient, lines))
        better = other.subspace.finite() and self._depth(other) < self._depth(found)
        self.settings = self.rule.probed(self.settings, better, self.curvature.scale)
        if better:
            return other
        self.curvature.inverses = kept
        return found

    def _depth(self, candidate: Candidate) -> float:
        """How far the quadratic model falls."""
        assert self.settings is not None
        damping = self.settings.damping
        return candidate.subspace.value(self._minimised(candidate.subspace, damping), damping)

    def _shortening(self, bent: float, parts: Sequence[Part]) -> float:
        """What shortens a step whose ½Δ'CΔ is above its share of the loss, given Δ'CΔ."""
        if self.options.trust_region is None:
            return 1.0
        share = 1.0 if isinstance(self.options.trust_region, str) else self.options.trust_region
        bend, bound = 0.5 * bent, share * abs(loss_of(parts))
        if bend > bound and isinstance(self.options.trust_region, str):
            bound = max(bound, weight_of(parts))  # for losses that may come near zero or cross it
        return math.sqrt(bound / bend) if bend > bound else 1.0

    def _unmodelled(self, gradient: Tensor, direction: list[Tensor], scale: float) -> Plan | None:
        """Fixed rules for what the quadratic model would choose; `scale` is the loss's size."""
        options = self.options
        momentum = MOMENTUM if isinstance(options.momentum, str) else options.momentum
        decrease = -float(torch.dot(gradient, flattened(direction)))
        if not math.isfinite(decrease):
            return None
        if options.trust_region is None or not options.uses_model:
            return Plan(direction, 1.0, momentum)
        share = 1.0 if isinstance(options.trust_region, str) else options.trust_region
        bound = DECREASE * share * scale
        shortened = min(1.0, math.sqrt(bound / max(decrease, 1e-300)))
        return Plan(direction, shortened, momentum, shortened=shortened)

    # After the step.

    def judges(self, step: int, parts: Sequence[Part], plan: Plan) -> bool:
        """Whether the step of this plan will be judged, so that it may have to be taken back."""
        if self.normalising or self.options.damping != AUTO or math.isnan(plan.predicted):
            return False
        # Where curvature is nearly gone promises are small against the loss's unit, or more than
        # there is to gain.
        promise = abs(plan.predicted)
        if due(step, self._adapt_every()) or promise > abs(loss_of(parts)):
            return True
        assert self.settings is not None
        quiet = self.rule.averaging(self.settings) == 0
        return quiet and promise <= rounding(parts) * weight_of(parts)

    def judge(self, step: int, parts: Sequence[Part], plan: Plan) -> bool:
        """Ask the rule. False if the step is so bad that it must be taken back."""
        before, after = loss_of(parts), self.batches.loss_with(parts, None)
        change = after - before
        assert self.settings is not None
        shown = rounding(parts) * abs(before)
        if abs(plan.predicted) <= shown and abs(change) <= shown:
            change = plan.predicted  # less than the loss can show was promised, and came
        info = StepInfo(
            plan.predicted, change, self.curvature.scale, step + 1 - self.asked, self.noise
        )
        self.settings = self.rule.update(self.settings, info)
        self.asked = step + 1
        if math.isfinite(after) and not change > abs(plan.predicted) + shown:
            self.outcome = (after, change, mark(parts))
            return True
        # Worse by more than it promised to be better.
        self.settings = replace(self.settings, damping=self.settings.damping * RAISE)
        self.undone += 1
        return False


def _rule(options: Options) -> Rule:
    if options.damping != AUTO:
        return Fixed()
    return LevenbergMarquardt(drop=REFINED_DROP) if options.refine else LevenbergMarquardt()
