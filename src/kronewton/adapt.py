"""Rules that choose the damping and the pace. Scalars in, scalars out; nothing knows a tensor.

Two dampings are told apart, as in Martens & Grosse 2015, sections 6.5 and 6.6. λ belongs to the
quadratic model and says how far it is trusted; γ goes into the inverses that make the direction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    """What the rules decide. Both dampings are in units of the loss."""

    damping: float  # λ
    inverse_damping: float  # γ
    probe: float = 0.1  # the ratio by which γ is changed when it is next tried
    noise: float = 0.0  # see StepInfo.noise, averaged


@dataclass(frozen=True)
class StepInfo:
    """What a rule may look at after a step."""

    predicted: float  # change of the loss by the quadratic model, negative for a decrease
    actual: float  # change of the loss on the same batch
    scale: float  # mean eigenvalue of the curvature: what makes a damping large or small
    steps: int  # since the rule was last asked
    noise: float | None = None  # difference between two batches at one point, over `actual`


class Rule(ABC):
    """Settings and what happened → the next settings."""

    assumed = 1.0  # the noise, where steps begin without having heard of any

    @abstractmethod
    def update(self, settings: Settings, info: StepInfo) -> Settings:
        """After a step whose result is known."""

    @abstractmethod
    def probed(self, settings: Settings, better: bool, scale: float) -> Settings:
        """After γ·probe was tried in place of γ, and was better for the quadratic model or not."""

    @abstractmethod
    def heard(self, settings: Settings, noise: float | None) -> Settings:
        """After the noise was measured, or not (None), in a step that the rule does not decide."""

    @abstractmethod
    def normalises(self, settings: Settings, now: bool) -> bool:
        """Whether steps should be normalised, given whether they are now."""

    @abstractmethod
    def averaging(self, settings: Settings) -> float:
        """Weight of earlier directions against this one's; 0: whatever the quadratic model says."""


@dataclass(frozen=True)
class Fixed(Rule):
    """Changes nothing."""

    def update(self, settings: Settings, info: StepInfo) -> Settings:
        return settings

    def probed(self, settings: Settings, better: bool, scale: float) -> Settings:
        return settings

    def heard(self, settings: Settings, noise: float | None) -> Settings:
        return settings

    def normalises(self, settings: Settings, now: bool) -> bool:
        return now

    def averaging(self, settings: Settings) -> float:
        return 0.0


@dataclass(frozen=True)
class LevenbergMarquardt(Rule):
    """Less λ while the quadratic model is right, more when it promises too much.

    ρ is the actual over the predicted decrease, on the same batch. Above 3/4, λ falls by `drop` a
    step, below 1/4 it rises by the inverse. Above `right`, without noise, it falls by `drop` to
    the power of `eagerness`: where the model is all but exact, λ is all that holds it back.
    γ is tried at one neighbour at a time and moves when
    the quadratic model falls further with it.

    How far to trust one batch depends on the noise between batches, which is measured for free:
    the loss of the next batch against this batch's, both after the step, over the step's decrease.
    Without noise λ may vanish, and the quadratic model weighs the previous step itself. With noise
    it would fit that weight to one batch: λ keeps a floor, and directions are averaged over
    batches. γ then has a low ceiling: what one batch wants most is a step along its own noise, and
    that is plain gradient descent. All bounds are relative to the curvature's mean eigenvalue, so
    that multiplying the loss changes nothing.

    Where a step gains less than two batches differ (`drowned`), steps are normalised instead, see
    `Pacing`: they cost less and rely on no batch's curvature. Without noise, Newton's return.
    """

    drop: float = 0.7
    right: float = 0.95
    eagerness: float = 3.0
    floor: float = 1e-8
    noisy_floor: float = 0.3  # of λ
    ceiling: float = 1e4
    noisy_ceiling: float = 0.03  # of γ
    noisy_averaging: float = 0.8
    silence: float = 0.1
    drowned: float = 1.0  # the noise from which steps are normalised
    noise_memory: float = 0.5

    def update(self, settings: Settings, info: StepInfo) -> Settings:
        settings = self.heard(settings, info.noise)
        if not info.predicted < 0:
            return settings
        factor = self.drop**info.steps
        damping = settings.damping
        agreement = info.actual / info.predicted
        if agreement > self.right and settings.noise < self.silence:
            damping *= factor**self.eagerness
        elif agreement > 0.75:
            damping *= factor
        elif not agreement >= 0.25:  # also when the loss is not a number
            damping /= factor
        low = max(self.floor, self.noisy_floor * min(1.0, settings.noise)) * info.scale
        damping = min(max(damping, low), self.ceiling * info.scale)
        return self._with_inverse(replace(settings, damping=damping), 1.0, info.scale)

    def heard(self, settings: Settings, noise: float | None) -> Settings:
        return replace(settings, noise=self._noise(settings.noise, noise))

    def normalises(self, settings: Settings, now: bool) -> bool:
        return settings.noise >= (self.silence if now else self.drowned)

    def _with_inverse(self, settings: Settings, factor: float, scale: float) -> Settings:
        """γ times a factor, between its bounds."""
        noisy = settings.noise >= self.silence
        low, high = self.floor * scale, (self.noisy_ceiling if noisy else self.ceiling) * scale
        damping = min(max(settings.inverse_damping * factor, low), high)
        return replace(settings, inverse_damping=damping)

    def _noise(self, before: float, now: float | None) -> float:
        if now is None or not math.isfinite(now):
            return before
        if now == 0:  # the very same batch
            return 0.0
        # Capped: a step that changed almost nothing says little about noise, however large.
        return self.noise_memory * before + (1 - self.noise_memory) * min(now, 2.0)

    def probed(self, settings: Settings, better: bool, scale: float) -> Settings:
        if not better:
            return replace(settings, probe=1 / settings.probe)
        return self._with_inverse(settings, settings.probe, scale)

    def averaging(self, settings: Settings) -> float:
        if settings.noise < self.silence:
            return 0.0
        return self.noisy_averaging * min(1.0, settings.noise)


FIRST_TRIALS = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
"""Dampings tried before the first step, over the curvature's mean eigenvalue, largest first."""


@dataclass(frozen=True)
class Pace:
    """The learning rate of normalised steps, and what it was chosen by."""

    lr: float = math.nan  # of one coordinate; NaN: not chosen yet
    ceiling: float = math.inf  # what the quadratic model allows
    limit: float = math.inf  # after steps that were too bad, until as long ones are not
    slope: float = 0.0  # of the model along the steps, running
    bend: float = 0.0  # Δ'CΔ along them, running
    square: float = 0.0  # of the agreement, running
    steps: int = 0
    look: int = 0  # the step at which the model is asked next
    gap: int = 0  # steps between its last two
    loss: float = math.nan  # of batches, running
    spread: float = 0.0  # their mean distance from it, running


@dataclass(frozen=True)
class Pacing:
    """The length of normalised steps, from two measurements.

    The batch's quadratic model along the step has its minimum at −slope/bend: the ceiling is that.
    Slope and bend are averaged apart, for their ratio is what noise distorts, and the model of now
    may only lower it.
    Below it, from the highest down, the agreement of successive steps decides (Riedmiller & Braun
    1993, of the whole step): where the new gradient still wants the last step, lr grows, where it
    wants it back, lr falls. Both look one step ahead and would, with noise, stop at once what pays
    only later (Wu et al. 2018). Against that short sight `patience` is added to the agreement
    where a step still gains more than two batches differ, and lr does not fall below `least` of the
    ceiling, or below a floor where that is lower: `first_floor` over the root of the steps, by
    which noise averages out in the end and lengths still add up without bound (Robbins & Monro
    1951). A ceiling that rises does not lift lr. After the first steps it comes down to a ceiling
    above the floor, or agreement would long move what decides nothing.
    A model of the outputs knows nothing of what bends the loss beyond it. So a step is tried on its
    batch before it is made, now and then, and where little of what was promised comes, the parabola
    through the loss here, its slope and the loss there takes the model's place. Trials are in each
    of the `first` steps, then rarer by a factor of two whenever the ceiling has changed by less
    than a factor of `sudden`, and less rare when by more, or when the model of now allows more than
    `sudden` squared times as much; `rarest` steps apart at most. A step that
    is not tried keeps to `untried` of the last trial's ceiling, which may have come down since.
    """

    least: float = 0.6
    first_floor: float = 0.12
    lowest: float = 1e-3
    highest: float = 0.1
    usual: float = 1e-2
    sensitivity: float = 0.2  # of log lr
    patience: float = 0.5
    agreement_memory: float = 0.9
    model_memory: float = 0.5
    distrust: float = 1 / 64  # of the lowest, the least that a limit is
    first: int = 7
    sudden: float = 1.5
    rarest: int = 20
    untried: float = 0.8
    loss_memory: float = 0.8
    alarming: float = 4.0
    leap: float = 0.25

    def floor(self, steps: int) -> float:
        """What disagreement does not bring the lr below, after so many steps."""
        return self.first_floor / math.sqrt(max(1, steps))

    def looks(self, pace: Pace) -> bool:
        """Whether the model should be asked about the step that is made now."""
        return pace.steps >= pace.look

    def alarmed(self, pace: Pace, loss: float) -> Pace:
        """After a batch's loss is known: where it is far above the last ones, look at once."""
        if math.isnan(pace.loss):
            return replace(pace, loss=loss)
        w, away = self.loss_memory, loss - pace.loss
        alarm = pace.steps > self.first and away > self.alarming * pace.spread
        pace = replace(
            pace,
            loss=w * pace.loss + (1 - w) * loss,
            spread=w * pace.spread + (1 - w) * abs(away),
        )
        return replace(pace, look=pace.steps, gap=1) if alarm else pace

    def modelled(self, pace: Pace, slope: float, bend: float) -> Pace:
        """After the quadratic model was asked along this step: its slope, and Δ'CΔ, for lr 1."""
        if not (math.isfinite(slope) and math.isfinite(bend)):
            return pace
        now = -slope / bend if slope < 0 < bend else math.inf
        w = self.model_memory
        slope, bend = w * pace.slope + (1 - w) * slope, w * pace.bend + (1 - w) * bend
        running = max(-slope, 0.0) / bend if bend > 0 else math.inf
        ceiling = min(now, running)
        calm = pace.ceiling / self.sudden <= ceiling <= pace.ceiling * self.sudden
        # The running means are of what was steeper, for long.
        calm = calm and not self.sudden**2 * ceiling < now < math.inf
        gap = min(2 * pace.gap, self.rarest) if calm else pace.gap // 2
        always = pace.steps <= self.first or math.isfinite(pace.limit)
        gap = 1 if always else max(1, gap)
        bounded = min(pace.lr, max(ceiling, self.floor(pace.steps)))
        lr = bounded if pace.steps > self.first else pace.lr
        look = pace.steps + gap - 1
        return replace(pace, lr=lr, slope=slope, bend=bend, ceiling=ceiling, gap=gap, look=look)

    def passed(self, pace: Pace, slope: float, bend: float, eased: bool = True) -> Pace:
        """After a step was tried and was good: its slope and its bend, for lr 1.

        A limit is twice as high, unless it is of this very step.
        """
        limit = 2 * pace.limit if eased else pace.limit
        pace = replace(pace, limit=limit if limit < self.highest else math.inf)
        return self.modelled(pace, slope, bend)

    def failed(self, pace: Pace, lr: float, slope: float, change: float) -> Pace:
        """After a step of this length was tried and was too bad: one as the parabola wants it.

        It is between a sixteenth and a half as long.
        """
        bend = 2 * (change - lr * slope) / lr / lr
        best = -slope / bend if 0 < bend < math.inf else 0.0
        limit = max(min(max(best, lr / 16), lr / 2), self.lowest * self.distrust)
        return replace(pace, limit=limit, gap=1, look=pace.steps)

    def agreed(self, pace: Pace, agreement: float | None, noise: float = 1.0) -> Pace:
        """One step on. agreement: −⟨gradient, last step⟩ for lr 1; None: there was none."""
        steps = pace.steps + 1
        if math.isnan(pace.lr):
            return replace(pace, steps=steps, lr=self.highest)
        if agreement is None or not math.isfinite(agreement):
            return replace(pace, steps=steps)
        w = self.agreement_memory
        square = w * pace.square + (1 - w) * agreement**2
        size = math.sqrt(square / (1 - w ** (steps - 1)))
        relative = min(1.0, max(-1.0, agreement / size)) if size > 0 else 0.0
        patience = self.patience * max(0.0, 1.0 - noise)
        lr = pace.lr * math.exp(self.sensitivity * (relative + patience))
        low = max(self.lowest, min(self.floor(steps), self.least * pace.ceiling, pace.lr))
        lr = min(max(lr, low), self.highest)
        return replace(pace, steps=steps, lr=lr, square=square)

    def lr(self, pace: Pace, tried: bool = True) -> float:
        """Of the step that is made now."""
        ceiling = pace.ceiling if tried else self.untried * pace.ceiling
        return min(pace.lr, max(ceiling, self.lowest), pace.limit)

    def leapt(self, pace: Pace, lr: float) -> bool:
        """Whether the last step, of this lr, may have gone far, in the weights and in the loss.

        It was as long as any may be, for no ceiling was below, and was promised a share of the
        loss; by running means, which begin at zero. Or no model told of it.
        """
        promised = -lr * (pace.slope + 0.5 * lr * pace.bend)
        far = lr >= self.highest and promised > self.leap * abs(pace.loss)
        return far or not pace.bend > 0

    def midway(self) -> Pace:
        """To begin with where Newton's steps have gone before."""
        return Pace(lr=self.usual)
