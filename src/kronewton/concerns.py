"""What a step may find amiss: refusals, sentences that are said once, steps that are skipped."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn

from kronewton.errors import (
    CriterionError,
    KronewtonWarning,
    ModelError,
    SkippedError,
    UnsupportedError,
)
from kronewton.layers import Layer, plain_name
from kronewton.part import Part, numbers
from kronewton.planner import Planner

LOOK = "Look for NaN or infinity in the batch and in what the model makes of it"
# Why a step was skipped, and what to do.
NOT_FINITE = "the loss, a gradient or the curvature was not finite", f"{LOOK}."
NO_CURVATURE = (
    "the batch has shown no finite curvature so far, so that no damping can be chosen",
    f"{LOOK}, and for a loss that is constant, linear or concave in the model's output: "
    "fisher='empirical' asks for no curvature of the loss.",
)
NO_LENGTH = (
    "every length that was tried made the loss of its own batch far worse, or was refused by the "
    "model or the loss",
    "Look at whether the loss has a minimum, and whether it is a function of the batch alone.",
)
NO_MINIMUM = (
    "the quadratic model of the loss has no minimum along the step: the loss is concave there",
    "If it is minus a criterion, to be climbed, give the criterion itself and maximize=True.",
)
DIFFERENT = (
    "the parameter groups multiply the automatic step by different lr: what the quadratic model "
    "promises is not what is made, and the damping stays as it was found. Give the groups one lr, "
    "or give numbers for lr and damping."
)


@dataclass(frozen=True)
class Owner:
    """Who says it, and how it says what depends on that."""

    name: str
    handle: str  # what the documentation calls the object
    skipped: str  # what a step that could not be made has done
    new: str  # what becomes of a parameter that came to the model later
    unseen: str  # and of one that is outside of the loss that is watched
    method: str  # how a parameter of no kind is trained
    sets_aside: bool = False  # whether it trains so what is outside, and covers what is thawed


class Concerns:
    """Says each sentence once, and counts the steps that could not be made."""

    def __init__(self, owner: Owner, most_skips: int) -> None:
        self.owner, self.most_skips = owner, most_skips
        self.skipped = self.in_row = 0
        self.just_skipped = False
        self._reason = NOT_FINITE
        self._said: set[str] = set()

    def say(self, *sentences: str) -> None:
        """Warn, of each thing once."""
        for sentence in sentences:
            if sentence not in self._said:
                self._said.add(sentence)
                warnings.warn(sentence, KronewtonWarning, stacklevel=users_level())

    def say_all(self, sentences: Iterable[str]) -> None:
        """Warn of several things."""
        self.say(*sentences)

    def skip(self, reason: tuple[str, str]) -> None:
        """Count a step that could not be made, and say why."""
        self.skipped += 1
        self.in_row += 1
        self.just_skipped, self._reason = True, reason
        why, advice = reason
        self.say(
            f"a step was skipped: {why}. {self.owner.skipped} {advice} "
            "diagnostics()['skipped'] counts such steps."
        )

    def stop_if_stuck(self) -> None:
        """Raise SkippedError once more steps in a row were skipped than are allowed."""
        if not self.just_skipped:
            self.in_row = 0
        elif self.in_row > self.most_skips:
            self.in_row = 0
            raise SkippedError(
                f"{self.most_skips + 1} steps in a row were skipped, the last because "
                f"{self._reason[0]}. {self.owner.skipped} {self._reason[1]} Or go back to an "
                f"earlier checkpoint; most_skips of {self.owner.name} is how many in a row are "
                "allowed."
            )


def require_own_parameters(layers: Sequence[Layer], place: Mapping[int, int], owner: str) -> None:
    """Refuse a model whose parameters are no longer the ones that were found in it."""
    for layer in layers:
        for name, p in layer.whole().items():
            if id(p) not in place:
                raise ModelError(
                    f"'{name}' of layer '{layer.name}' is another parameter than when {owner} "
                    "was made. Make it after the model has been changed, or change values in "
                    "place, with copy_()."
                )


def require_python(model: nn.Module, owner: Owner) -> None:
    """Refuse what torch.jit has made: nothing in it can be watched, or run with other weights."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{f'module {name!r}' if name else 'the model'} is TorchScript, which {owner.name} "
                "cannot watch. Give it the module before torch.jit.script() or trace(); "
                "torch.compile() may be used instead."
            )


def require_curved(parts: Sequence[Part], refine: int) -> None:
    """Refuse the dial where its other end is not there: Newton on a loss without curvature."""
    known = [part for part in parts if part.call is not None]
    flat = [part for part in known if refine and not part.curvature().curved]
    if flat:
        raise CriterionError(
            f"refine={refine} walks towards the Newton step, and "
            f"{type(flat[0].criterion).__name__} has no curvature in the model's output here: "
            "its Hessian is zero. Use a criterion that has some (HuberLoss for L1Loss), or "
            "refine=0."
        )


def of_start(
    model: nn.Module | None, criteria: Sequence[nn.Module], layers: Sequence[Layer], refine: int
) -> Iterator[str]:
    """What was given to KFAC, or asked of it, and is of no use."""
    if criteria and model is None:
        yield (
            "a criterion was given and no model, so that nothing can be watched and AdamW "
            "trains all parameters. Pass KFAC(model, criterion), or "
            "KFAC(parameters, criterion, model=model)."
        )
    if refine and not layers:
        yield (
            f"refine={refine} was asked for, and no layer of the model is of a kind "
            "that K-FAC covers: without its factors there is nothing to start from, and AdamW "
            "trains all parameters."
        )


def of_products(planner: Planner, parts: Sequence[Part]) -> Iterator[str]:
    """Where the exact products come from, if not from where they should."""
    replayer, refine = planner.replayer, planner.options.refine
    missing = replayer.without_forward_mode
    if replayer.without_products:
        yield (
            "torch can differentiate a part of this model only once "
            f"({replayer.without_products}): there is no quadratic model, and fixed "
            "rules choose lr, momentum and damping. Replace that part, or give numbers."
        )
    elif missing:
        yield (
            f"torch has no forward mode for a part of this model ({missing}): "
            "products with its Jacobian are made by differentiating twice backward, which is exact "
            "and takes about half as long again."
        )
    if refine and not replayer.without_products and not planner.models(parts):
        yield (
            f"refine={refine} was asked for, and the model cannot be run again on "
            "this batch: its loss is not computed from what the model returns, or the batch "
            "was overwritten before step(). The step is K-FAC's own. Return the output that "
            "the criterion takes, and keep the batch until the step is made."
        )


def of_uncalled(planner: Planner, parts: Sequence[Part]) -> Iterator[str]:
    """Where the model that was given is not what the loop calls, and so cannot be run again."""
    watched = [part for part in parts if part.loss is not None and part.call is None]
    # Calls of the model are numbered from 1.
    if planner.options.uses_model and any(0 in part.forwards for part in watched):
        name = type(planner.replayer.model).__name__
        yield (
            f"the loss was computed from modules inside {name}, and {name} itself was not called: "
            "the batch cannot be run again, there is no quadratic model, and fixed rules choose "
            f"what is automatic. Give KFAC the module that the loop calls, or call {name}."
        )


def processes() -> int:
    """How many train together, as far as torch knows."""
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if known else 1


def of_processes(model: nn.Module, owner: Owner) -> Iterator[str]:
    """What several processes come to, none of which knows the others' curvature.

    Raises UnsupportedError where gradients are certain to be shared: weights would drift apart.
    """
    count = processes()
    if count == 1:
        return
    each = (
        f"each of {count} processes would step by the curvature and the trials of its own batch, "
        "and their weights would drift apart"
    )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise UnsupportedError(
            f"{owner.name} was given a model in DistributedDataParallel: {each}. Several processes "
            "are not supported yet: train in one, or with another optimizer."
        )
    yield (
        f"torch.distributed has {count} processes. If they share gradients, {each}: several are "
        f"not supported yet. If each trains a model of its own, all is well."
    )


def of_new(model: nn.Module, known: Collection[int], owner: Owner) -> Iterator[str]:
    """Which parameters have come to the model since, for they are not covered."""
    for name, p in model.named_parameters():
        if id(p) not in known and p.grad is not None:
            yield (
                f"parameter '{plain_name(name)}' was not in the model, or was frozen, when "
                f"{owner.name} was made, and {owner.new}."
            )


def of_unexplained(reasons: Mapping[str, str]) -> Iterator[str]:
    """Which layers' rows are not what their gradient is made of."""
    for name, why in reasons.items():
        yield (
            f"the rows that layer '{name}' showed do not give its gradient: {why}. It gets a "
            "diagonal block from its own gradients instead, and coverage() says so."
        )


def of_unseen(layers: Sequence[Layer], seen: Collection[str]) -> Iterator[Layer]:
    """Which of these layers, of which nothing is known, have a gradient all the same."""
    for layer in layers:
        grads = [p.grad for p in layer.whole().values() if p.grad is not None]
        # Zeros are those of an expert that nothing chose.
        if layer.name not in seen and any(bool(numbers(g).any()) for g in grads):
            yield layer


def unseen_said(layer: Layer, owner: Owner) -> str:
    """What becomes of such a layer."""
    return (
        f"layer '{layer.name}' has a gradient, but nothing in the loss that was watched depends on "
        f"it in a way that can be seen: {owner.unseen}. Train it with the loss that {owner.name} "
        "was given, or with another optimizer."
    )


def users_level() -> int:
    """How far up the stack, from who asks, the user's own line is: a warning points there."""
    level, frame = 1, inspect.currentframe()
    frame = None if frame is None else frame.f_back
    while frame is not None and _inner(frame):
        level, frame = level + 1, frame.f_back
    return level


def _inner(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").split(".")[0] in ("kronewton", "torch")
