"""`KFAC`: the order of the calls, and the state."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronewton.averaging import Averages
from kronewton.capture import Watcher
from kronewton.concerns import (
    DIFFERENT,
    NO_CURVATURE,
    NO_LENGTH,
    NO_MINIMUM,
    NOT_FINITE,
    Owner,
    of_products,
    of_start,
    of_uncalled,
    require_curved,
)
from kronewton.coverage import Coverage
from kronewton.errors import ModelError
from kronewton.fallback import Fallback
from kronewton.groups import Groups
from kronewton.linalg import all_finite
from kronewton.options import (
    AUTO,
    LARGEST_SIDE,
    Options,
    check_criteria,
    check_group,
    check_pace,
    check_parameters,
    plain,
)
from kronewton.part import Part
from kronewton.plan import Plan, Steering
from kronewton.planner import Planner
from kronewton.quadratic import flattened
from kronewton.renewals import due, due_in_turn, turn_of
from kronewton.replay import Replayer, require_no_graph
from kronewton.sampling import Sampler
from kronewton.saving import Saved
from kronewton.state import Ours, join_, require_mapping, split
from kronewton.watched import Criteria, Watched

OWNER = Owner(
    "KFAC",
    "optimizer",
    "The weights are as they were.",
    "is not trained. Make the optimizer after the model has been changed, or add it with "
    "add_param_group()",
    "until it does, AdamW trains it",
    "AdamW",
    sets_aside=True,
)


class KFAC(Optimizer):
    """K-FAC with learning rate, momentum and damping that choose themselves.

    Pass the model and the loss module that you call; the training loop stays as it is. Where
    batches differ, which is assumed at first, steps are normalised: Adam's moments in the factors'
    eigenbasis, orthogonalised in the curvature, at a pace that trials on the batch bound. Where
    they do not, a step is Newton's: `lr·d + momentum·(previous step)` with
    d = −(B ⊗ A + damping·I)⁻¹ g for each covered layer, lr and momentum from the minimum of the
    batch's exact quadratic model on these two directions (Martens & Grosse 2015, section 7), the
    damping from how well that model predicts. See `basis`.

    lr, momentum, damping: a number ≥ 0 fixes what "auto" chooses, of Newton's steps (of normalised
        ones where basis is "adam" or "orthogonal"); damping has the units of the loss. With
        lr="auto", a group's `lr` starts at 1 and multiplies the automatic one, so that torch's
        schedulers work in both cases.
    weight_decay: decoupled, `lr·weight_decay` per step; lr counts as 1e-3 where it is automatic.
    trust_region: ½Δ'CΔ of a step Δ is at most this multiple of the loss ("auto": 1), or None.
    fisher: "sampled" (draws of the model's own predictions), "exact" (one backward pass for each
        output) or "empirical" (the training gradients; the only one without a criterion).
    criterion: the loss module, or several whose weighted sum is the loss; None: unknown.
    sharing: how one Kronecker product stands for a weight that is used at several positions:
        "expand" (every position an example), "reduce" (positions averaged), "best" (the nearest
        product in the Frobenius norm, at the cost of per-example gradients), or "auto": expand or
        reduce, by what the first batch shows of each layer. A dictionary gives it by patterns of
        layers' names, {"encoder.*": "reduce"}.
    largest_side: up to this many inputs or outputs a layer's factor is kept in full; above, in
        blocks or as its diagonal, see docs/layers.md. A number, or one by pattern.
    refine: the dial from K-FAC (0) to the exact damped Gauss-Newton step: so many conjugate-
        gradient directions, preconditioned by K-FAC, over all parameters together; fewer once two
        in a row lower the quadratic model by less than `refine_tolerance` of its value.
    curvature_batches: how many of the last batches make up the quadratic model's curvature, of
        Newton's steps; they are not saved with the state.
    basis: "factored" (π-damped factors), "eigen" ((B ⊗ A + damping·I)⁻¹ exactly), "corrected"
        (the same with the exact block's diagonal in that basis, EKFAC), "adam" (Adam's moments in
        that basis: normalised steps, undamped; momentum is the first one's decay) or "orthogonal"
        (the same with Nesterov's momentum, each layer's step orthogonalised in its curvature).
        "auto" begins with "orthogonal" and goes between it and "factored" by the noise between
        batches, where lr, momentum and damping are automatic, too, and refine is 0; else it is
        "factored".
    factor_every, inverse_every: steps between renewals. adapt_every: between decisions on λ.
    factor_decay: weight of the running factors against one new batch.
        "auto" goes by what is known of the noise between batches: see docs/adaptation.md.
    draws: backward passes for "sampled". seed: of the draws' own random generator.
    fallback_lr: of the AdamW that trains parameters without curvature, see `coverage()`.
    strict: refuse a model that needs the fallback.
    most_skips: steps in a row that may be skipped before SkippedError is raised; 0: none.
    maximize: steps uphill; loss and gradient change their sign, the curvature keeps it.
    averaging: decay of a running average of the weights, for `averaged()`; 0: none is kept.

    Raises OptionError, ModelError, CriterionError, UnsupportedError; see kronewton.errors.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        criterion: nn.Module | Sequence[nn.Module] | None = None,
        *,
        model: nn.Module | None = None,
        lr: float | Tensor | str = AUTO,
        momentum: float | str = AUTO,
        damping: float | str = AUTO,
        weight_decay: float = 0.0,
        trust_region: float | str | None = AUTO,
        fisher: str = "sampled",
        sharing: str | Mapping[str, str] = AUTO,
        basis: str = AUTO,
        refine: int = 0,
        refine_tolerance: float = 0.0,
        curvature_batches: int = 1,
        factor_every: int | str = AUTO,
        inverse_every: int | str = AUTO,
        adapt_every: int | str = AUTO,
        factor_decay: float | str = AUTO,
        largest_side: int | Mapping[str, int] = LARGEST_SIDE,
        draws: int = 1,
        fallback_lr: float = 1e-3,
        strict: bool = False,
        seed: int = 0,
        maximize: bool = False,
        most_skips: int = 50,
        averaging: float = 0.0,
    ) -> None:
        self.options = Options(
            lr=plain(lr), momentum=momentum, damping=damping, weight_decay=weight_decay,
            trust_region=trust_region, fisher=fisher, sharing=sharing, basis=basis, refine=refine,
            refine_tolerance=refine_tolerance, curvature_batches=curvature_batches,
            factor_every=factor_every, inverse_every=inverse_every, adapt_every=adapt_every,
            factor_decay=factor_decay, largest_side=largest_side, draws=draws,
            fallback_lr=fallback_lr, strict=strict, seed=seed, maximize=maximize,
            most_skips=most_skips, averaging=averaging,
        )  # fmt: skip
        criteria = check_criteria(criterion, fisher)
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise ModelError(
                    f"two models were given, {type(params).__name__} first and model="
                    f"{type(model).__name__}; give one, or parameters and their model."
                )
            model, params = params, list(params.parameters())
        first_lr = 1.0 if isinstance(lr, str) else lr
        groups = check_parameters(params, model)
        super().__init__(groups, {"lr": first_lr, "weight_decay": weight_decay})
        for group in self.param_groups:  # torch warns of what stands in a group twice
            group["params"] = list({id(p): p for p in group["params"]}.values())
        self._watch(model, criteria)
        if strict and (without := self.coverage().without):
            raise ModelError(
                f"strict=True, and these parameters would get the AdamW fallback: {without}. "
                "Freeze them, train them with another optimizer, or leave out strict."
            )

    def _watch(
        self, model: nn.Module | None, criteria: Criteria, kept: Collection[int] = ()
    ) -> None:
        """Find the layers to cover, hook them, and start with no curvature known."""
        options = self.options
        listed = [p for group in self.param_groups for p in group["params"]]
        self._watched = watched = Watched(model, criteria, listed, options, OWNER, kept)
        self._concerns = watched.concerns
        self._layers, self._curvature, self._watcher = (
            watched.layers, watched.curvature, watched.watcher,
        )  # fmt: skip
        self._parameters, self._place, self._all = watched.parameters, watched.place, watched.all
        self._planner: Planner | None = None
        self._concerns.say_all(of_start(model, criteria, self._layers, options.refine))
        if model is not None and self._watcher is not None:
            replayer = Replayer(model, self._parameters)
            steering = Steering(
                watched.precondition,
                lambda direction: self._groups.scaled(direction),
                self._gradients,
                self._normalise,
                lambda direction, lr: self._groups.change(direction, lr),
            )
            self._sampler = Sampler(replayer, self._watcher, watched.fisher)
            self._planner = Planner(
                options, self._curvature, replayer, self._watcher.paused, steering
            )
        rest = [p for p in self._all if id(p) not in self._place]
        self._fallback = Fallback(rest, self.param_groups, options)
        self._averages = Averages(options.averaging)
        self._previous: list[Tensor] | None = None
        self._plan: Plan | None = None
        self._steps = 0
        self._lost = False  # of factors, so that new ones are due
        self._scale = 1.0  # of a GradScaler
        self._unmade: tuple[int, int, set[int]] | None = None  # of a step that it may leave out

    def _watch_anew(self) -> None:
        """Do so where what was frozen is not any more; what is known of the rest goes on."""
        before, saved, plan, averages = self._watched, self._saved, self._plan, self._averages
        if not before.changed:
            return
        steps, previous, self.state = self._steps, self._previous, self._fallback.adamw.state
        before.close()
        self._watch(before.model, before.criteria, {id(p) for p in before.all})
        before.forget_all_but(self._layers)
        self._take_over(saved.packed(steps, previous), before.outside)
        self._watched.go_on_from(before)
        self._concerns, self._plan, self._averages = before.concerns, plan, averages

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step from the gradients and what was watched since the last one."""
        require_no_graph("KFAC.step()")
        self._averages.require_outside("step()")
        loss, made = None, None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for p in self._all):
            if self._watcher is not None and self._watcher.foreign:
                self._collected(self._watcher)
            self._watched.say_what_is_new()
            self._watch_anew()
            return loss
        for group in self.param_groups:  # schedulers and users change them between steps
            check_group(group)
            check_pace(self._groups.shrinkage(group))
        self._fallback.follow(self.param_groups)
        self._concerns.just_skipped, self._unmade = False, None
        if self._watcher is not None and self._watched.moves(self._watcher):
            assert self._planner is not None
            made = self._step_covered(self._watcher, self._planner)
        self._scale = 1.0
        self._set_aside()
        alone = self._fallback.step()
        if alone is False and not self._concerns.just_skipped:
            self._skip()
        made = alone if made is None else made
        if made:
            self._averages.learn(self._all)
        self._concerns.stop_if_stuck()
        self._watch_anew()
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch's GradScaler asks for this right before it calls step(), or leaves it out.

        The factor is told to nobody where gradients were unscaled beforehand, to clip them: the
        statistics still have it, and only the one that asks knows it.
        """
        scaler = sys._getframe(1).f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler):
            self._scale = scaler.get_scale()
            if self._watcher is not None:
                if self._unmade is not None:
                    self._watcher.forget_first(*self._unmade)
                self._unmade = self._watcher.seen
        return False  # gradients are for the scaler to unscale

    def _step_covered(self, watcher: Watcher, planner: Planner) -> bool:
        """Whether a step was made, and not taken back."""
        parts = self._collected(watcher)
        require_curved(parts, self.options.refine)
        planner.partial = bool(watcher.whole.partial)
        if watcher.whole.partial:
            self._concerns.say(
                f"{watcher.whole.partial}. Until then the curvature is that of the watched part, "
                "no quadratic model is asked, and fixed rules choose what is automatic."
            )
        if watcher.capturing:
            self._concerns.say_all(of_uncalled(planner, parts))
        planner.look_back(parts)
        self._learn(watcher, planner, parts)
        if self._previous is not None:  # the model may have been cast since
            self._previous = [
                t.to(p) for t, p in zip(self._previous, self._parameters, strict=True)
            ]
        gradient = flattened(self._gradients())
        planner.factor = self._common_factor()
        names: Collection[str] = ()
        changed = planner.settle(self._steps, parts, gradient)
        if changed:
            self._previous = None  # of steps of the other kind
        if planner.searching and self._curvature.scale > 0:
            planner.search(parts, gradient)
            names = self._curvature.known  # the search leaves inverses of its last trial
        inverse_every = planner.intervals()[1]
        age = planner.age(self._steps)
        if not changed:  # or they are new, or still to be made, anyway
            layers = list(self._curvature.layers)
            names = names or due_in_turn(age, inverse_every, layers, planner.early())
        plan, made = None, False
        if not planner.searching:
            damping = 0.0 if planner.settings is None else planner.settings.inverse_damping
            failed = self._curvature.failed
            self._curvature.refresh(names, damping, (age, inverse_every))
            if self._curvature.failed > failed:
                self._drop_damaged()
            plan = planner.plan(self._steps, parts, gradient, self._previous)
            self._concerns.say_all(of_products(planner, parts))
        if planner.searching:
            self._skip(NO_CURVATURE)
        elif plan is None or not self._far_from_overflow(plan):
            self._skip()
        elif not plan.made:
            self._plan, self._previous = plan, None
            self._skip(NO_LENGTH if planner.normalising else NO_MINIMUM)
        else:
            self._plan = plan
            judged = planner.judges(self._steps, parts, plan)
            kept = [p.clone() for p in self._parameters] if judged else []
            self._move(plan)
            made = not judged or planner.judge(self._steps, parts, plan)
            if not made:
                self._take_back(kept)
        planner.remember(parts)
        self._curvature.forget_batch()
        self._steps += 1
        watcher.capturing = self._lost or (self._captures(planner) and not self._waits(planner))
        self._lost = False
        return made

    def _captures(self, planner: Planner) -> bool:
        """Whether factors are due in the step that comes next."""
        return due(planner.age(self._steps), planner.intervals()[0], planner.early())

    def _waits(self, planner: Planner) -> bool:
        """Whether factors that are due can be made when the batch is there."""
        age, rows = planner.age(self._steps), self._rows(planner)
        return self._sampler.pays(age, rows, self._curvature.most_rows)

    def _rows(self, planner: Planner) -> int | None:
        """How many rows of a layer are enough for its factors; None: all that there are."""
        return None if self._watched.fisher.rides_along else planner.rows()

    def _learn(self, watcher: Watcher, planner: Planner, parts: Sequence[Part]) -> None:
        """Renew the factors by what was captured, or is now sampled from the step's batch."""
        rows, turn = self._rows(planner), turn_of(self._steps, planner.intervals()[0])
        if rows is not None and not watcher.capturing and self._captures(planner):
            known, terms = self._curvature.most_rows, self._curvature.trained_terms
            if self._sampler.sample(parts, rows, known, turn, terms):
                rows = None  # all that were taken
            else:
                self._lost = True  # then in the training's next pass
        self._lost |= self._watched.learn(parts, planner.decay(), rows, turn)

    def _collected(self, watcher: Watcher) -> list[Part]:
        """The parts of this step, as terms of what is minimised."""
        parts = self._watched.collected(watcher, self._scale)
        return [part.maximised() for part in parts] if self.options.maximize else parts

    def _gradients(self) -> list[Tensor]:
        """Of what is minimised, one tensor per stepped parameter."""
        found = self._watched.gradients()
        return [g.neg() for g in found] if self.options.maximize else found

    def _normalise(self, decay: float) -> list[Tensor]:
        """The normalised step of all layers, one tensor per stepped parameter."""
        gradients = self._gradients()
        steps = self._curvature.normalised(self._watched.matrices(gradients), decay)
        return self._watched.vector(steps, gradients)

    def _far_from_overflow(self, plan: Plan) -> bool:
        """Whether a step is finite, and so short that many like it are."""
        most = min(torch.finfo(dtype).max for dtype in {p.dtype for p in self._parameters})
        return bool(self._groups.longest() * plan.length(self._previous or ()) < most**0.5)

    def _move(self, plan: Plan) -> None:
        """Δ = lr·d + momentum·Δ_previous; a group's factor of an automatic lr is applied last."""
        if self._previous is None or plan.momentum == 0:
            self._previous = list(torch._foreach_mul(plan.direction, plan.lr))
        else:
            torch._foreach_mul_(self._previous, plan.momentum)
            torch._foreach_add_(self._previous, plan.direction, alpha=plan.lr)
        if plan.refinement:
            torch._foreach_add_(self._previous, list(plan.refinement))
        self._groups.move(self._previous)

    def _take_back(self, kept: Sequence[Tensor]) -> None:
        """Put copies back: what was added and is subtracted again leaves its rounding behind."""
        torch._foreach_copy_(self._parameters, list(kept))
        self._previous = None

    @property
    def _groups(self) -> Groups:
        """The groups as they are now: schedulers, users and states change them."""
        automatic = self.options.lr == AUTO
        return Groups(self.param_groups, self._parameters, self._place, automatic)

    def _common_factor(self) -> float:
        """What the groups multiply an automatic step with; NaN if they differ."""
        factors = self._groups.factors()
        if len(factors) > 1 and self.options.damping == AUTO:
            self._concerns.say(DIFFERENT)
        return factors.pop() if len(factors) == 1 else math.nan

    def _drop_damaged(self) -> None:
        """Let go of what is kept and is not finite: the next batch starts it afresh."""
        self._lost |= self._curvature.drop_damaged()
        if self._previous is not None and not all_finite(self._previous):
            self._previous = None

    def _skip(self, reason: tuple[str, str] = NOT_FINITE) -> None:
        self._drop_damaged()
        self._concerns.skip(reason)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Throw the gradients away, and with them the statistics that came with them."""
        if set_to_none:  # torch's own also keeps records for its profiler, which take time
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None
        else:
            super().zero_grad(set_to_none)
        self._unmade = None
        if self._watcher is not None:
            self._watcher.discard()
        if self._watcher is None or self._watcher.idle:  # or what ran since is not seen anew
            self._watch_anew()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; once the optimizer is made they are trained by the fallback."""
        if not hasattr(self, "_all"):
            self._add_to_torch(param_group)  # from torch's own constructor
            return
        if not isinstance(param_group, dict):
            raise ModelError(
                f"add_param_group() was given {type(param_group).__name__}; a table with the "
                "list of its parameters under 'params' is allowed."
            )
        check_parameters([param_group], None)
        self._add_to_torch(param_group)
        new = self._watched.add(self.param_groups[-1]["params"])
        self._fallback.add(new, self.param_groups)

    def _add_to_torch(self, param_group: dict[str, Any]) -> None:
        try:
            super().add_param_group(param_group)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"torch refuses these parameters: {str(error).splitlines()[0]}. Give a list of "
                "parameters of the model, with names for all of them or for none, each one once."
            ) from error

    # What a user may ask.

    def observe(self, output: Tensor, target: Any, criterion: nn.Module) -> None:
        """Take statistics of a loss that no watched module computes, before its backward().

        `criterion(output, target)` must be the loss, up to a constant factor, which is read from
        the gradient that arrives at `output`, or at the model's own output where the loss was
        computed from that in another way. A target of several tensors is given as a tuple.
        """
        self._watched.observe(output, target, criterion)

    def averaged(self) -> AbstractContextManager[None]:
        """With this around an evaluation the model has the average of its weights over the steps.

        Afterwards it has those of the training again, bit for bit, whatever happens inside. A step
        that is skipped or taken back adds nothing; before the first one the weights are as they
        are. BatchNorm's running statistics are not averaged:
        `torch.optim.swa_utils.update_bn(loader, model)` inside makes those of the averaged weights,
        and they stay. Raises OptionError without `averaging`, ModelError inside itself.
        """
        return self._averages.in_place(self._all)

    def coverage(self) -> Coverage:
        """Which parameter is covered how: one row for each."""
        return self._watched.coverage(self._steps)

    def diagnostics(self) -> dict[str, Tensor]:
        """What the last step did, as float64 scalars on the CPU."""
        check_group(self.param_groups[0])
        plan, planner = self._plan, self._planner
        settings = None if planner is None else planner.settings
        numbers = {
            "step": self._steps,
            "lr": math.nan if plan is None else plan.lr * self.param_groups[0]["lr"],
            "momentum": math.nan if plan is None else plan.momentum,
            "damping": math.nan if settings is None else settings.damping,
            "inverse_damping": math.nan if settings is None else settings.inverse_damping,
            "predicted": math.nan if plan is None else plan.predicted,
            "shortened": math.nan if plan is None else plan.shortened,
            "refined": 0 if plan is None else plan.refined,
            "broken_refinements": 0 if planner is None else planner.broken,
            "normalised": planner is not None and planner.normalising,
            "noise": math.nan if settings is None else settings.noise,
            "scale": self._curvature.scale,
            "skipped": self._concerns.skipped,
            "undone": 0 if planner is None else planner.undone,
            "dropped_statistics": self._curvature.dropped,
            "failed_inversions": self._curvature.failed,
        }
        told = torch.tensor([float(x) for x in numbers.values()], dtype=torch.float64, device="cpu")
        return dict(zip(numbers, told.unbind(), strict=True))

    # The state.

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on: tensors and numbers only."""
        self.state = self._fallback.adamw.state
        handle = self.register_state_dict_post_hook(  # before a user's hooks see it
            lambda _, found: join_(found, self._saved.packed(self._steps, self._previous)),
            prepend=True,
        )
        try:
            return super().state_dict()  # type: ignore[no-any-return]
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises StateError if it is of another model.

        Factors keep the precision that they were saved with, whatever the parameters' is.
        """
        self._averages.require_outside("load_state_dict()")
        require_mapping(state_dict)
        given: list[Any] = []

        def check(_: Any, found: dict[str, Any]) -> dict[str, Any]:
            given[:] = split(found)
            self._saved.require_own(*given)
            return given[0]  # type: ignore[no-any-return]

        # Behind the user's own hooks, which may give another dictionary, and in front of them.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(
            lambda _: self._take_over(given[1]), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _take_over(self, ours: Ours, outside: Collection[int] | None = None) -> None:
        """Restore what is not torch's; what is has been loaded, and tells what was outside."""
        if outside is None:
            outside = {id(p) for p in self._parameters if "exp_avg" in self.state.get(p, ())}
        self._watched.outside = set(outside)
        self._set_aside()
        self._fallback.adamw.state = self.state
        self._steps, self._previous = self._saved.load(ours)

    def _set_aside(self) -> None:
        """AdamW for what is outside of the watched loss, for as long as it is."""
        outside = [p for p in self._parameters if id(p) in self._watched.outside]
        self._fallback.lend(outside, self.param_groups)

    @property
    def _saved(self) -> Saved:
        return Saved(self._watched, self._planner, self._averages, self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the copy has a model of its own and watches that one."""
        self._averages.require_outside("a copy")
        watcher, planner = self._watcher, self._planner
        return {
            "groups": self.param_groups,
            "criteria": () if watcher is None else watcher.criteria,
            "model": None if planner is None else planner.replayer.model,
            "options": dict(vars(self.options)),
            "state": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the optimizer anew. torch's load_state_dict, too, hands over what it read here."""
        if "options" not in state:
            super().__setstate__(state)
            return
        options = state["options"]
        self.__init__(  # type: ignore[misc]
            state["groups"], state["criteria"] or None, model=state["model"], **options
        )
        self.load_state_dict(state["state"])

    def close(self) -> None:
        """Remove every hook. The optimizer cannot be used afterwards."""
        self._watched.close()
