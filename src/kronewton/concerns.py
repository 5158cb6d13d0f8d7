"""What a step may find amiss: refusals, and sentences of warning for the optimizer to say once."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import FrameType

from torch import nn

from kronewton.errors import CriterionError, ModelError
from kronewton.layers import Layer
from kronewton.part import Part
from kronewton.planner import Planner


def require_own_parameters(layers: Sequence[Layer], place: Mapping[int, int]) -> None:
    """Refuse a model whose parameters are no longer the ones that the optimizer was given."""
    for layer in layers:
        for name, p in layer.whole().items():
            if id(p) not in place:
                raise ModelError(
                    f"'{name}' of layer '{layer.name}' is another parameter than when KFAC was "
                    "made. Make the optimizer after the model has been changed, or change "
                    "values in place, with copy_()."
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


def of_new(model: nn.Module, known: Collection[int]) -> Iterator[str]:
    """Which parameters have come to the model since, for they are not trained."""
    for name, p in model.named_parameters():
        if id(p) not in known and p.grad is not None:
            yield (
                f"parameter '{name}' was not in the model when KFAC was made, and is not "
                "trained. Make the optimizer after the model has been changed, or add it with "
                "add_param_group()."
            )


def of_unexplained(reasons: Mapping[str, str]) -> Iterator[str]:
    """Which layers' rows are not what their gradient is made of."""
    for name, why in reasons.items():
        yield (
            f"the rows that layer '{name}' showed do not give its gradient: {why}. It gets a "
            "diagonal block from its own gradients instead, and coverage() says so."
        )


def of_unseen(layers: Sequence[Layer], seen: Collection[str]) -> Iterator[str]:
    """Which of these layers, of which nothing is known, have a gradient: they only descend."""
    for layer in layers:
        moving = any(p.grad is not None for p in layer.whole().values())
        if moving and layer.name not in seen:
            yield (
                f"layer '{layer.name}' has a gradient, but nothing in the loss that was "
                "watched depends on it in a way that can be seen: until it does, its step is "
                "plain gradient descent. Train it with the loss that KFAC was given, or with "
                "another optimizer."
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
