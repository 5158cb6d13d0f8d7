"""`Preconditioner`: K-FAC's inverse in front of any optimizer."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronewton.batches import loss_of, weight_of
from kronewton.capture import Watcher
from kronewton.concerns import NO_CURVATURE, NOT_FINITE, Owner
from kronewton.coverage import Coverage
from kronewton.errors import ModelError, OptionError
from kronewton.layers.base import at_least_float32
from kronewton.linalg import all_finite
from kronewton.options import AUTO, LARGEST_SIDE, PreconditionerOptions, check_criteria
from kronewton.part import Part
from kronewton.renewals import due, due_in_turn
from kronewton.replay import require_no_graph
from kronewton.state import PRECONDITIONER_VERSION, require_preconditioners
from kronewton.watched import Watched

DAMPING = 1.0  # over the curvature's mean eigenvalue
TRUST_REGION = 1e-3  # of the loss
FACTOR_EVERY, INVERSE_EVERY = 5, 20  # steps
FACTOR_DECAY = 0.95
OWNER = Owner(
    "Preconditioner",
    "preconditioner",
    "The gradients are None now, so that the optimizer leaves the weights as they are.",
    "its gradient stays as it is. Make the Preconditioner after the model has been changed or "
    "unfrozen",
    "until it does, its gradient is only scaled",
    "its own gradient",
)


class Preconditioner:
    """K-FAC in front of any optimizer: `step()` replaces gradients g by (B ⊗ A + damping·I)⁻¹ g.

    >>> preconditioner = kn.Preconditioner(model, criterion)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> loss.backward(); preconditioner.step(); optimizer.step(); optimizer.zero_grad()

    Layer by layer the result is as long as the gradient, so that the optimizer keeps its learning
    rate; `grafting=None, trust_region=None` gives the equation as it stands. Clip after it. The
    gradients of parameters without curvature stay as they are, see `coverage()`; None stays None.

    criterion, fisher, sharing, largest_side, draws, seed: as for `KFAC`. All of the model's
        parameters that need a gradient are preconditioned: freeze what no optimizer has.
    basis: "factored" (π-damped factors), "eigen" ((B ⊗ A + damping·I)⁻¹ exactly) or "corrected"
        (the same with the exact block's diagonal in that basis, EKFAC). "auto": "factored".
    damping: a number in units of the loss, or "auto": the mean eigenvalue of the curvature.
    grafting: the direction with the gradient's length (Agarwal et al. 2020), "layer" by layer or
        "global". None: Newton's own length, of which the optimizer's lr is a share.
    trust_region: without grafting, ½g'(B ⊗ A + damping·I)⁻¹g is at most this multiple of the loss
        (of 1 where no criterion tells it), or the whole result is shortened: KL clipping, Ba et
        al. 2017, for a step of lr 1. "auto": 0.001, of a loss that counts as 1 per unit of weight
        at least, for it may come near zero or cross it. None: as long as it is.
    factor_every, inverse_every: steps between renewals, "auto": 5 and 20; more often at first.
    factor_decay: weight of the running factors against one new batch, "auto": 0.95.
    strict: refuse a model with parameters without curvature.
    most_skips: steps in a row that may be skipped before SkippedError is raised; 0: none.

    Raises OptionError, ModelError, CriterionError, UnsupportedError; see kronewton.errors.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Sequence[nn.Module] | None = None,
        *,
        damping: float | str = AUTO,
        grafting: str | None = "layer",
        trust_region: float | str | None = AUTO,
        fisher: str = "sampled",
        sharing: str | Mapping[str, str] = AUTO,
        basis: str = AUTO,
        factor_every: int | str = AUTO,
        inverse_every: int | str = AUTO,
        factor_decay: float | str = AUTO,
        largest_side: int | Mapping[str, int] = LARGEST_SIDE,
        draws: int = 1,
        strict: bool = False,
        seed: int = 0,
        most_skips: int = 50,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"the model was given as {type(model).__name__}; an nn.Module is allowed, whose "
                "layers can be watched. Pass the model and not its parameters."
            )
        self.options = PreconditionerOptions(
            damping=damping, grafting=grafting, trust_region=trust_region, fisher=fisher,
            sharing=sharing, basis=basis, factor_every=factor_every, inverse_every=inverse_every,
            factor_decay=factor_decay, largest_side=largest_side, draws=draws, strict=strict,
            seed=seed, most_skips=most_skips,
        )  # fmt: skip
        criteria = check_criteria(criterion, fisher)
        trained = list(model.parameters())
        if not any(p.requires_grad for p in trained):
            raise ModelError(
                "there is nothing to precondition: the model has no parameter with "
                "requires_grad=True. Unfreeze a layer."
            )
        self._steps = 0
        self._watched = Watched(model, criteria, trained, self.options, OWNER)
        self._layers, self._curvature = self._watched.layers, self._watched.curvature
        self._watcher = self._required_watcher()
        self._watcher.heeds_gradients = True
        self._lost = False  # of factors, so that new ones are due
        self._damping = self._shortened = math.nan  # of the last step
        self._replaced: list[weakref.ref[Tensor]] = []  # gradients of the last step

    def _required_watcher(self) -> Watcher:
        """The watcher, unless there is nothing to watch, or something that is not."""
        without, watcher = self.coverage().without, self._watched.watcher
        if watcher is None:
            raise ModelError(
                f"no parameter of {type(self._watched.model).__name__} is of a kind that K-FAC "
                f"covers, so that every gradient would stay as it is: {without}. Leave the "
                "Preconditioner out."
            )
        if self.options.strict and without:
            watcher.close()
            raise ModelError(
                "strict=True, and the gradients of these parameters would stay as they are: "
                f"{without}. Freeze them, or leave out strict."
            )
        return watcher

    # The step.

    @torch.no_grad()
    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Replace the gradients in place, from what was watched since the last call.

        A step that would not be finite sets every gradient of the model to None instead: whatever
        optimizer follows leaves those weights as they are. It is counted and said once.

        scaler: a GradScaler in use, whose factor is in the statistics; call
        `scaler.unscale_(optimizer)` before, and what it finds not finite is not counted here.
        Statistics of gradients that were thrown away are thrown away with them.
        Raises CriterionError if gradients do not come from the criterion, SkippedError, and
        UnsupportedError while a CUDA graph is being captured.
        """
        require_no_graph("Preconditioner.step()")
        if scaler is not None:
            _require_scaler(scaler)
        watched, watcher = self._watched, self._watcher
        if not (watched.moves(watcher) or watcher.foreign):
            watched.say_what_is_new()
            return
        watched.concerns.just_skipped = False
        parts = watched.collected(watcher, 1.0 if scaler is None else scaler.get_scale())
        if scaler is not None and not all_finite(_dense(watched.all)):
            self._throw_away()  # scales that are too large are the scaler's business
            return
        self._warn_of(watcher, parts if scaler is None else [])
        self._step(watcher, parts)
        watched.concerns.stop_if_stuck()

    def _step(self, watcher: Watcher, parts: list[Part]) -> None:
        every = self._every("factor_every", FACTOR_EVERY)
        decay = self.options.factor_decay
        decay = FACTOR_DECAY if isinstance(decay, str) else decay
        self._lost |= self._watched.learn(parts, decay)
        if self._curvature.scale == 0 and self.options.damping == AUTO:
            self._skip(NO_CURVATURE)
        else:
            found = self._preconditioned(parts)
            if self._squares_finite(found):
                self._replace(found)
            else:
                if self._squares_finite([]):  # no fault of the gradients
                    self._start_afresh()
                self._skip(NOT_FINITE)
        self._curvature.forget_batch()
        self._steps += 1
        watcher.capturing = due(self._steps, every) or self._lost
        self._lost = False

    def _every(self, option: str, automatic: int) -> int:
        given = getattr(self.options, option)
        return automatic if isinstance(given, str) else int(given)

    def _warn_of(self, watcher: Watcher, parts: Sequence[Part]) -> None:
        say = self._watched.concerns.say
        if watcher.whole.partial:
            say(f"{watcher.whole.partial}. Until then the curvature is that of the watched part.")
        there = {id(p.grad) for p in self._watched.parameters}
        if watcher.stale and any(id(ref()) in there for ref in self._replaced if ref() is not None):
            say(
                "backward() added to gradients that an earlier step() had replaced already, and "
                "they were replaced once more. Call zero_grad() in each step, and freeze the "
                "parameters that no optimizer has (requires_grad=False)."
            )
        watcher.stale = False
        if self._steps == 0 and _looks_scaled(parts):
            say(
                "the loss was multiplied by a large power of two between the criterion and "
                "backward(), and the statistics have that factor. If it is a GradScaler's, call "
                "preconditioner.step(scaler) after scaler.unscale_(optimizer)."
            )

    def _preconditioned(self, parts: Sequence[Part]) -> list[Tensor]:
        """One tensor per covered parameter, as long as it was asked for."""
        curvature, given = self._curvature, self.options.damping
        self._damping = DAMPING * curvature.scale if isinstance(given, str) else given
        every, failed = self._every("inverse_every", INVERSE_EVERY), curvature.failed
        names = due_in_turn(self._steps, every, list(curvature.layers))
        curvature.refresh(names, self._damping, (self._steps, every))
        if curvature.failed > failed:
            self._drop_damaged()
        gradients = self._watched.gradients()
        by_layer = self._grafted if self.options.grafting == "layer" else self._applied
        found = self._watched.by_layer(gradients, by_layer)
        self._shortened = 1.0
        if self.options.grafting is None:
            self._shortened = self._within(_dot(gradients, found), parts)
        factor = self._shortened
        if self.options.grafting == "global":
            square = _dot(found, found)
            factor = math.sqrt(_dot(gradients, gradients) / square) if square > 0 else 1.0
        return found if factor == 1 else [t * factor for t in found]

    def _applied(self, name: str, G: Tensor) -> Tensor:
        """(B ⊗ A + damping·I)⁻¹ G of a layer."""
        return self._curvature.apply(name, G, self._damping)

    def _grafted(self, name: str, G: Tensor) -> Tensor:
        """The same, as long as G."""
        D = self._applied(name, G)
        # In float64, where squares do not vanish.
        own, made = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (G, D))
        ratio: Tensor = own / made.clamp_min(torch.finfo(torch.float64).tiny)
        return D * ratio.to(D.dtype)

    def _within(self, decrease: float, parts: Sequence[Part]) -> float:
        """What shortens a result whose g'(B ⊗ A + damping·I)⁻¹g is this, by the trust region."""
        asked = self.options.trust_region
        if asked is None or not math.isfinite(decrease):
            return 1.0
        known = [part for part in parts if part.loss is not None]
        share = TRUST_REGION if isinstance(asked, str) else asked
        bound = share * (abs(loss_of(known)) if known else 1.0)
        if 0.5 * decrease > bound and isinstance(asked, str):
            with self._watcher.paused():
                bound = max(bound, share * weight_of(known))
        return math.sqrt(bound / (0.5 * decrease)) if 0.5 * decrease > bound else 1.0

    def _squares_finite(self, found: Sequence[Tensor]) -> bool:
        """Whether gradients and results are finite, and so are their squares.

        Those would stay in the second moments of an optimizer that keeps some.
        """
        grads = [p.grad for p in self._watched.all if p.grad is not None]
        squares = [_square(t) for t in (*grads, *found)]
        if not squares:
            return True
        return bool(torch.isfinite(torch.stack([s.to(squares[0]) for s in squares]).sum()))

    def _replace(self, found: Sequence[Tensor]) -> None:
        self._replaced = []
        for p, t in zip(self._watched.parameters, found, strict=True):
            if p.grad is not None and p.grad.is_sparse:
                p.grad = t
            elif p.grad is not None:
                p.grad.copy_(t)
            if p.grad is not None:
                self._replaced.append(weakref.ref(p.grad))

    def _skip(self, reason: tuple[str, str]) -> None:
        self._drop_damaged()
        self._throw_away()
        self._watched.concerns.skip(reason)

    def _throw_away(self) -> None:
        """Leave the optimizer nothing to step with: zeros would still move it by its momentum."""
        assert self._watched.model is not None
        for p in (*self._watched.all, *self._watched.model.parameters()):  # some came later
            p.grad = None

    def _start_afresh(self) -> None:
        """Let go of a curvature whose numbers are finite, and wrong."""
        self._curvature.start_afresh()
        self._lost = True

    def _drop_damaged(self) -> None:
        self._lost |= self._curvature.drop_damaged()

    # What a user may ask.

    def observe(self, output: Tensor, target: Any, criterion: nn.Module) -> None:
        """Take statistics of a loss that no watched module computes, before its backward().

        As `KFAC.observe`.
        """
        self._watched.observe(output, target, criterion)

    def coverage(self) -> Coverage:
        """Which parameter is covered how: one row for each."""
        return self._watched.coverage(self._steps)

    def diagnostics(self) -> dict[str, Tensor]:
        """What the last step did, as float64 scalars on the CPU."""
        numbers = {
            "step": self._steps,
            "damping": self._damping,
            "shortened": self._shortened,
            "scale": self._curvature.scale,
            "skipped": self._watched.concerns.skipped,
            "dropped_statistics": self._curvature.dropped,
            "failed_inversions": self._curvature.failed,
        }
        told = torch.tensor([float(x) for x in numbers.values()], dtype=torch.float64, device="cpu")
        return dict(zip(numbers, told.unbind(), strict=True))

    # The state.

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on: tensors, numbers and words only."""
        kept = {layer.name: self._curvature.tensors(layer.name) for layer in self._layers}
        return {
            "version": PRECONDITIONER_VERSION,
            "basis": self._curvature.basis,
            "steps": self._steps,
            **self._watched.numbers(),
            "generator": self._watched.fisher.generator.get_state(),
            "layers": {n: {k: t.clone() for k, t in own.items()} for n, own in kept.items() if own},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises StateError, before anything is changed.

        Factors keep the precision that they were saved with, whatever the parameters' is.
        """
        basis, largest = self._curvature.basis, self.options.largest_side_of
        require_preconditioners(state_dict, basis, self._curvature.layers, largest)
        self._watched.load(state_dict["layers"], basis, state_dict, state_dict["generator"])
        self._steps = int(state_dict["steps"])

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the copy has a model of its own and watches that one."""
        return {
            "model": self._watched.model,
            "criterion": self._watcher.criteria or None,
            "options": dict(vars(self.options)),
            "state": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make it anew."""
        self.__init__(state["model"], state["criterion"], **state["options"])  # type: ignore[misc]
        self.load_state_dict(state["state"])

    def close(self) -> None:
        """Remove every hook. It cannot be used afterwards."""
        self._watched.close()


def _require_scaler(given: Any) -> None:
    if not callable(getattr(given, "get_scale", None)):
        raise OptionError(
            f"step() was given {type(given).__name__}; a GradScaler or nothing is allowed. A "
            "closure is for the optimizer that follows, and may call step() after its backward()."
        )


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    products = [
        (at_least_float32(a) * at_least_float32(b)).sum().double()
        for a, b in zip(first, second, strict=True)
    ]
    return float(torch.stack(products).sum())


def _dense(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients that there are."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return [g.to_dense() if g.is_sparse else g for g in grads]


def _square(tensor: Tensor) -> Tensor:
    """The squared length of a tensor, complex and sparse ones included: ()."""
    t = tensor.coalesce().values() if tensor.is_sparse else tensor
    t = torch.view_as_real(t) if t.is_complex() else t
    return at_least_float32(t).square().sum()


def _looks_scaled(parts: Sequence[Part]) -> bool:
    """Whether a loss was multiplied by what might be a GradScaler's factor: a large power of 2."""
    weights = [float(part.weight) for part in parts if part.weight is not None]
    return any(w >= 1024 and math.frexp(w)[0] == 0.5 for w in weights)
