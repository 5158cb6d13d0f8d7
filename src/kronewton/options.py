"""What a user may ask, checked once, at the border."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from kronewton.errors import ModelError, OptionError, UnsupportedError

AUTO = "auto"
FISHERS = ("sampled", "exact", "empirical")
GRAFTINGS = ("layer", "global")
SHARINGS = ("auto", "expand", "reduce", "best")
LARGEST_SIDE = 4096
BASES = ("factored", "eigen", "corrected", "adam", "orthogonal")
ORTHOGONAL = "orthogonal"
NORMALISED = ("adam", ORTHOGONAL)  # the bases of normalised steps
OF_GROUPS = {"lr", "weight_decay"}  # what a parameter group may have of its own
MOST = 1e30  # of a number: what float32 holds, and some of its products with others
LAST_SEED = 2**64 - 1  # of torch's generators
LONGEST = 100  # letters of a value in a sentence


@dataclass(frozen=True, kw_only=True)
class CurvatureOptions:
    """What may be asked of the curvature, whoever uses it. A number fixes what "auto" chooses."""

    damping: float | str
    trust_region: float | str | None
    fisher: str
    sharing: str | Mapping[str, str]
    basis: str
    factor_every: int | str
    inverse_every: int | str
    factor_decay: float | str
    largest_side: int | Mapping[str, int]
    draws: int
    strict: bool
    seed: int
    most_skips: int

    BASES: ClassVar[tuple[str, ...]] = ("factored", "eigen", "corrected")

    def __post_init__(self) -> None:
        _number("damping", self.damping, 0.0, auto=True)
        if self.trust_region is not None:
            _number("trust_region", self.trust_region, 0.0, auto=True, none=True)
        _choice("fisher", self.fisher, FISHERS)
        for pattern, value in _by_pattern("sharing", self.sharing):
            _choice(f"sharing{pattern}", value, SHARINGS)
        for pattern, side in _by_pattern("largest_side", self.largest_side):
            _count(f"largest_side{pattern}", side, 1)
        _choice("basis", self.basis, (AUTO, *self.BASES))
        for name in ("factor_every", "inverse_every"):
            _count(name, getattr(self, name), 1, auto=True)
        _count("draws", self.draws, 1)
        _count("seed", self.seed, 0, most=LAST_SEED)
        _share("factor_decay", self.factor_decay, auto=True)
        _count("most_skips", self.most_skips, 0)
        _flag("strict", self.strict)

    def _take_as_floats(self) -> None:
        """Make numbers floats once they are checked: torch takes no larger integer than 64 bits."""
        for field in fields(self):
            value = getattr(self, field.name)
            if "float" in str(field.type) and isinstance(value, int):
                object.__setattr__(self, field.name, float(value))

    @property
    def first_basis(self) -> str:
        """The basis to start with."""
        return "factored" if self.basis == AUTO else self.basis

    @property
    def uses_model(self) -> bool:
        """Whether something is chosen by the quadratic model."""
        return False

    @property
    def over_all(self) -> bool:
        """Whether steps are over all parameters together, those of no kind included."""
        return False

    def sharing_of(self, layer: str) -> str:
        """What was asked for a layer: of the first pattern that its name matches."""
        return _chosen(self.sharing, layer, AUTO)

    def largest_side_of(self, layer: str) -> int:
        """Likewise the side up to which a layer's factor is kept in full."""
        return _chosen(self.largest_side, layer, LARGEST_SIDE)


@dataclass(frozen=True, kw_only=True)
class Options(CurvatureOptions):
    """What may be asked of KFAC."""

    lr: float | str
    momentum: float | str
    weight_decay: float
    refine: int
    refine_tolerance: float
    curvature_batches: int
    adapt_every: int | str
    fallback_lr: float
    maximize: bool
    averaging: float

    BASES: ClassVar[tuple[str, ...]] = BASES

    def __post_init__(self) -> None:
        _number("lr", self.lr, 0.0, auto=True)
        _number("momentum", self.momentum, 0.0, auto=True)
        super().__post_init__()
        _number("weight_decay", self.weight_decay, 0.0)
        _count("adapt_every", self.adapt_every, 1, auto=True)
        _count("refine", self.refine, 0)
        _number("refine_tolerance", self.refine_tolerance, 0.0)
        _count("curvature_batches", self.curvature_batches, 1)
        _share("averaging", self.averaging)
        _number("fallback_lr", self.fallback_lr, 0.0)
        _flag("maximize", self.maximize)
        self._check_normalised()
        self._take_as_floats()

    def _check_normalised(self) -> None:
        if self.basis not in NORMALISED:
            return
        if self.refine:
            raise OptionError(
                f"refine={self.refine} and basis={self.basis!r} exclude each other: a "
                "normalised step is on no way to Newton's. Use another basis, or refine=0."
            )
        if self.damping != AUTO:
            raise OptionError(
                f"damping={self.damping!r} has no use with basis={self.basis!r}: normalised "
                "steps are not damped. Leave it at 'auto', or use basis='eigen'."
            )
        if not isinstance(self.momentum, str) and self.momentum >= 1:
            raise OptionError(
                f"momentum={self.momentum!r} with basis={self.basis!r} is the decay of the mean "
                "gradient, and must lie in [0, 1)."
            )
        if isinstance(self.trust_region, (int, float)):
            raise OptionError(
                f"trust_region={self.trust_region!r} has no use with basis={self.basis!r}: the "
                "quadratic model bounds the pace instead. Leave it at 'auto', or use another basis."
            )

    @property
    def over_all(self) -> bool:
        """Whether steps are over all parameters together, those of no kind included."""
        return self.refine > 0  # the dial is

    @property
    def may_normalise(self) -> bool:
        """Whether the basis may change with the noise: where nothing is fixed by a number."""
        automatic = self.lr == self.momentum == self.damping == AUTO
        return self.basis == AUTO and automatic and not self.refine

    def sharing_of(self, layer: str) -> str:
        """What was asked for a layer: of the first pattern that its name matches."""
        asked = super().sharing_of(layer)
        # A preconditioner must leave no direction out: factors of few rows do.
        return "expand" if asked == AUTO and self.refine else asked

    @property
    def uses_model(self) -> bool:
        """Whether something is chosen by the quadratic model."""
        automatic = AUTO in (self.lr, self.momentum, self.damping)
        return automatic or self.trust_region is not None or self.refine > 0


@dataclass(frozen=True, kw_only=True)
class PreconditionerOptions(CurvatureOptions):
    """What may be asked of Preconditioner."""

    grafting: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._take_as_floats()
        if self.grafting is None:
            return
        _choice("grafting", self.grafting, (*GRAFTINGS, None))
        if self.trust_region not in (AUTO, None):
            raise OptionError(
                f"trust_region={self.trust_region!r} has no use with grafting={self.grafting!r}, "
                "which makes the result as long as the gradient. Leave it out, or give "
                "grafting=None."
            )


T = TypeVar("T")


def _by_pattern(name: str, value: T | Mapping[str, T]) -> list[tuple[str, T]]:
    """The values of an option that may be given by layer, each with the words to name it by."""
    if not isinstance(value, Mapping):
        return [("", value)]
    strange = [key for key in value if not isinstance(key, str)]
    if strange:
        raise OptionError(
            f"{name} maps patterns of layer names to values, and {strange[0]!r} is not a string. "
            f"Write {name}={{'encoder.*': ..., '*': ...}}."
        )
    return [(f"[{key!r}]", entry) for key, entry in value.items()]


def _chosen(value: T | Mapping[str, T], layer: str, default: T) -> T:
    if not isinstance(value, Mapping):
        return value
    return next((v for pattern, v in value.items() if fnmatchcase(layer, pattern)), default)


def check_patterns(options: CurvatureOptions, layers: Sequence[str]) -> None:
    """Refuse a pattern that no layer's name matches: it would change nothing in silence."""
    for name in ("sharing", "largest_side"):
        value = getattr(options, name)
        for pattern in value if isinstance(value, Mapping) else ():
            if pattern != "*" and not any(fnmatchcase(layer, pattern) for layer in layers):
                raise OptionError(
                    f"{name}[{pattern!r}] matches no layer. The layers are: "
                    f"{', '.join(map(repr, layers)) or 'none'}."
                )


def check_group(group: Mapping[str, Any]) -> None:
    """A parameter group's own options: numbers, in automatic runs too, where lr is a factor."""
    for name in ("lr", "weight_decay"):
        if name in group:
            _number(name, plain(group[name]), 0.0)
    if "maximize" in group:
        raise UnsupportedError(
            f"a parameter group has maximize={group['maximize']!r} of its own, and there is one "
            "objective for all of them: give maximize to KFAC."
        )


def check_pace(shrink: float) -> None:
    """Refuse a step that takes more than the weights away: they would grow with every step."""
    if not shrink <= 1:
        raise OptionError(
            f"lr and weight_decay of a parameter group take {shrink:g} times the weights away in "
            "one step; once at most is allowed. Lower one of the two."
        )


def check_fallback(lr: float, dtype: torch.dtype) -> None:
    """Refuse what AdamW cannot go on with: its steps are as long as its lr in every entry."""
    if not lr <= torch.finfo(dtype).max ** 0.5:
        raise OptionError(
            f"the parameters without curvature would be trained with lr={lr:g}, which is "
            "fallback_lr times what their group's lr has become of the first lr. Lower one of them."
        )


def plain(value: Any) -> Any:
    """A number that is given as a tensor of one element, as torch allows for lr; or the value."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.item()
    return value


def criteria_of(criterion: Any) -> tuple[Any, ...]:
    """The criteria that were given: one, several, or none."""
    if isinstance(criterion, (list, tuple, nn.ModuleList)):
        return tuple(criterion)
    return () if criterion is None else (criterion,)


def check_criteria(criterion: Any, fisher: str) -> tuple[nn.Module, ...]:
    """The criteria, each of them checked."""
    criteria = criteria_of(criterion)
    if any(one is None for one in criteria):
        raise OptionError(
            "criterion is a list with None in it; loss modules are allowed. Leave it out, or pass "
            "criterion=None where no module computes the loss."
        )
    for one in criteria or (None,):
        check_criterion(one, fisher)
    if len({id(one) for one in criteria}) < len(criteria):
        raise OptionError(
            "criterion names one module twice; each call of it is a term of the loss in any case. "
            "Name it once."
        )
    return criteria


def check_criterion(criterion: Any, fisher: str) -> None:
    """Refuse what cannot be watched, and a Fisher that needs a criterion without one."""
    if criterion is None:
        if fisher == "exact":
            raise OptionError(
                "fisher='exact' needs the Hessian of a criterion and none was given. Pass your "
                "loss as a module, (model, nn.CrossEntropyLoss()), or use fisher='empirical'."
            )
        return
    if not isinstance(criterion, nn.Module):
        given = getattr(criterion, "__name__", type(criterion).__name__)
        raise OptionError(
            f"criterion must be an nn.Module whose calls can be watched, not {given!r}. Use the "
            "module form (nn.CrossEntropyLoss() for F.cross_entropy), or pass None and call "
            "observe(output, target, criterion) in your loop."
        )
    if getattr(criterion, "reduction", "mean") == "none":
        raise UnsupportedError(
            f"{type(criterion).__name__}(reduction='none') leaves the loss unreduced, and then its "
            "weights are not known when it is called. Use reduction='mean' or 'sum'."
        )


def check_parameters(params: Iterable[Any], model: nn.Module | None) -> list[Any]:
    """The parameters or groups, after checking that there are some, and of the model."""
    if isinstance(params, (Tensor, str, Mapping, Set)) or not isinstance(params, Iterable):
        raise ModelError(
            f"the parameters were given as {type(params).__name__}; a model, or a list of "
            "parameters or of groups in a fixed order is allowed. Pass model, or [parameter]."
        )
    groups = [_group(entry) for entry in params]
    if not groups:
        raise ModelError(
            "there is nothing to train: the model has no parameter with requires_grad=True, or the "
            "list of parameters is empty. Unfreeze a layer, or pass the parameters to train."
        )
    given: list[Any] = []
    for group in groups:
        given += group["params"] if isinstance(group, dict) else [group]
    if model is not None:
        own = {id(p) for p in model.parameters()}
        every = [entry[-1] if isinstance(entry, tuple) else entry for entry in given]
        strangers = [tuple(p.shape) for p in every if isinstance(p, Tensor) and id(p) not in own]
        if strangers:
            raise ModelError(
                f"{len(strangers)} of the parameters, the first of shape {strangers[0]}, do not "
                "belong to the model that was given. Pass parameters of that model only, or give "
                "each model an optimizer of its own."
            )
    return groups


def _group(entry: Any) -> Any:
    """A parameter group with its parameters in a list: they may come from a generator."""
    if not isinstance(entry, dict):
        return entry
    if "params" not in entry:
        raise ModelError(
            f"a parameter group has the keys {', '.join(map(repr, entry)) or '(none)'} and no "
            "'params'. Give it the list of its parameters under 'params'."
        )
    check_group(entry)
    ours = sorted(set(entry) & {field.name for field in fields(Options)} - OF_GROUPS)
    if ours:
        raise OptionError(
            f"a parameter group sets {', '.join(ours)}: a group has an lr and a weight_decay of "
            "its own, and all else is one for all. Give it to KFAC(...), or by layers' names where "
            "it may be a table, as sharing and largest_side."
        )
    given = entry["params"]
    if isinstance(given, (Set, str)):
        raise ModelError(
            f"'params' of a parameter group is a {type(given).__name__}; a parameter or a list of "
            "parameters in a fixed order is allowed. Pass list(params)."
        )
    return {**entry, "params": [given] if isinstance(given, Tensor) else list(given)}


def _number(name: str, value: Any, least: float, *, auto: bool = False, none: bool = False) -> None:
    if auto and _is(value, AUTO):
        return
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if ok and least <= value <= MOST:  # NaN is neither
        return
    number = f"a number ≥ {least:g}"
    number += f" and ≤ {MOST:g}" if ok and value > MOST else ""
    allowed = [number, *(["'auto'"] if auto else []), *(["None"] if none else [])]
    raise OptionError(f"{name} must be {' or '.join(allowed)}, not {shown(value)}.")


def _count(
    name: str, value: Any, least: int, *, auto: bool = False, most: int = sys.maxsize
) -> None:
    if auto and _is(value, AUTO):
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        above = f" and ≤ {most}" if whole and value > most else ""
        raise OptionError(f"{name} must be a whole number ≥ {least}{above}, not {shown(value)}.")


def _share(name: str, value: Any, *, auto: bool = False) -> None:
    _number(name, value, 0.0, auto=auto)
    if not isinstance(value, str) and value >= 1:
        raise OptionError(f"{name} must lie in [0, 1), not {value!r}.")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be True or False, not {shown(value)}.")


def _choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if value is None and None in allowed:
        return
    if not any(_is(value, one) for one in allowed if one is not None):
        choices = ", ".join(map(repr, allowed))
        raise OptionError(f"{name} must be one of {choices}, not {shown(value)}.")


def _is(value: Any, word: str) -> bool:
    """Whether it is that word; an array would compare entry by entry."""
    return isinstance(value, str) and value == word


def shown(value: Any) -> str:
    """The value as a sentence has it: on one line, and not longer than it can be read."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LAST_SEED:
        return "a number of more than 64 bits"  # Python may refuse to print all its digits
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
