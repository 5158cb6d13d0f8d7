"""The table of layer kinds, and the search of a model for the layers that they cover."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from kronewton.layers.attention import AttentionKind
from kronewton.layers.base import ENTRIES, TURNED, Call, DenseRows, Kind, Layer, Seen
from kronewton.layers.bilinear import BilinearKind
from kronewton.layers.convolution import (
    CONVOLUTIONS,
    TRANSPOSED,
    ConvolutionKind,
    TransposedKind,
)
from kronewton.layers.elementwise import PReLUKind
from kronewton.layers.embedding import BagKind, EmbeddingKind
from kronewton.layers.linear import LINEAR, ConvOneKind, LinearKind, is_conv_one
from kronewton.layers.lone import LoneKind
from kronewton.layers.norm import NORMS, NormKind
from kronewton.layers.recurrent import RECURRENT, RecurrentKind

KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: LINEAR,
    **dict.fromkeys(CONVOLUTIONS, ConvolutionKind()),
    **dict.fromkeys(TRANSPOSED, TransposedKind()),
    **dict.fromkeys(NORMS, NormKind()),
    nn.Embedding: EmbeddingKind(),
    nn.EmbeddingBag: BagKind(),
    nn.MultiheadAttention: AttentionKind(),
    nn.PReLU: PReLUKind(),
    nn.Bilinear: BilinearKind(),
    **dict.fromkeys(RECURRENT, RecurrentKind()),
}
LONE = LoneKind()
CONV_ONE = ConvOneKind()
MATRICES = (LinearKind, EmbeddingKind)  # whose weight may be another one's transposed

__all__ = [
    "ENTRIES",
    "KINDS",
    "LONE",
    "TURNED",
    "Call",
    "DenseRows",
    "Found",
    "Kind",
    "Layer",
    "Seen",
    "find_layers",
]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of the nearest class in the module's ancestry, or None."""
    own = getattr(module, "cls_to_become", None) or type(module)  # a lazy module is not itself yet
    known = next((KINDS[base] for base in own.__mro__ if base in KINDS), None)
    return CONV_ONE if known is None and is_conv_one(module) else known


@dataclass(frozen=True)
class Found:
    """What a search of a model found.

    layers: each has a block of its own. guests: modules that use the matrix of another one.
    reasons: why no kind covers a parameter, by its id; lone parameters have one, too.
    """

    layers: list[Layer] = field(default_factory=list)
    guests: list[Layer] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)

    @property
    def covered(self) -> set[int]:
        """The ids of all parameters that have a part in a layer's block."""
        return {id(p) for layer in self.layers for p in layer.whole().values()}

    def without_lone(self) -> Found:
        """The same less the parameters that are layers on their own."""
        lone = [layer for layer in self.layers if layer.kind is LONE]
        ids = [id(p) for layer in lone for p in layer.whole().values()]
        why = "training gradients come summed over the examples"
        reasons = {i: f"{self.reasons[i]}, and {why}" if self.reasons[i] else why for i in ids}
        rest = [layer for layer in self.layers if layer.kind is not LONE]
        return Found(rest, self.guests, {**self.reasons, **reasons})


def plain_name(name: str) -> str:
    """A module's or a parameter's name, as it is without torch.compile's wrapper."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")


def find_layers(model: nn.Module, trained: Collection[int]) -> Found:
    """The layers of a model, every one of the `trained` parameters (by id) in exactly one of them.

    What no kind knows is a layer of its own, of the kind `LONE`; what is not made of real
    floating-point numbers is in none, and its reason says so.
    """
    reasons: dict[int, str] = {}
    candidates = _candidates(model, trained, set(), reasons)
    layers, guests, odd = _settled(candidates)
    if odd:  # shared in ways that have no matrix in common: entry by entry, whatever the uses are
        owners = _owners(candidates)
        candidates = _candidates(model, trained, odd, reasons)
        layers, guests, _ = _settled(candidates)
        reasons.update({i: f"shared by {' and '.join(owners[i])}" for i in odd})
    return Found(layers, guests, reasons)


def _candidates(
    model: nn.Module, trained: Collection[int], odd: Collection[int], reasons: dict[int, str]
) -> list[Layer]:
    """Every module's own layers, as if it were alone; those in `odd` are always lone, once."""
    found: list[Layer] = []
    done: set[int] = set()
    for place, module in model.named_modules():
        name = plain_name(place)
        own = {k: p for k, p in module.named_parameters(recurse=False) if id(p) in trained}
        strange = [k for k, p in own.items() if id(p) in odd]
        once = [k for k in strange if id(own[k]) not in done]
        done |= {id(own[k]) for k in once}
        found += _lone(name, module, once, "", reasons)
        usual = [k for k in own if k not in strange]
        if usual:
            found += _of_module(name, module, usual, reasons)
    return found


def _of_module(
    name: str, module: nn.Module, own: list[str], reasons: dict[int, str]
) -> list[Layer]:
    kind = kind_of(module)
    why = f"{type(module).__name__} has no kind" if kind is None else kind.refusal(module)
    if kind is None or why:
        return _lone(name, module, own, why, reasons)
    layers = kind.layers(name, module, own)
    rest = [k for k in own if not any(k in layer.trained for layer in layers)]
    return layers + _lone(name, module, rest, kind.leftover(module), reasons)


def _lone(
    name: str, module: nn.Module, own: list[str], why: str, reasons: dict[int, str]
) -> list[Layer]:
    """A layer for each of a module's parameters, with the reason why it is alone."""
    layers, dot = [], f"{name}." if name else ""
    for k in own:
        p = getattr(module, k)
        reasons[id(p)] = why if p.is_floating_point() else "it is not real floating-point numbers"
        if p.is_floating_point():
            layers.append(Layer(f"{dot}{k}", module, LONE, (k,)))
    return layers


def _owners(candidates: Sequence[Layer]) -> dict[int, list[str]]:
    """The names of the layers that each parameter stands in, by its id."""
    found: dict[int, list[str]] = {}
    for layer in candidates:
        for p in layer.whole().values():
            found.setdefault(id(p), []).append(layer.name or "the model")
    return found


def _settled(candidates: Sequence[Layer]) -> tuple[list[Layer], list[Layer], set[int]]:
    """Layers with a block of their own, guests in another one's, and what cannot be either."""
    users: dict[int, set[int]] = {}
    for n, candidate in enumerate(candidates):
        for p in candidate.whole().values():
            users.setdefault(id(p), set()).add(n)
    layers: list[Layer] = []
    guests: list[Layer] = []
    odd: set[int] = set()
    owners: dict[int, Layer] = {}
    for layer in [part for n, c in enumerate(candidates) for part in _divided(c, n, users)]:
        ids = {id(p) for p in layer.whole().values()}
        before = {id(o): o for i in ids if (o := owners.get(i)) and not _beside(layer, o)}
        if not before:
            layers.append(layer)
            owners.update(dict.fromkeys(ids, layer))
            continue
        owner = next(iter(before.values()))
        turned = _orientation(layer, owner) if len(before) == 1 else None
        if turned is None:
            odd |= ids & owners.keys()
        else:
            guests.append(replace(layer, owner=owner, turned=turned))
    return layers, guests, odd


def _divided(layer: Layer, n: int, users: Mapping[int, set[int]]) -> list[Layer]:
    """A layer whose parameters are shared by different modules, in one for each parameter."""
    whole = layer.whole()
    if (
        len({frozenset(users[id(p)]) for p in whole.values()}) < 2
        or layer.kind.sums(layer)
        or layer.parts
    ):
        return [layer]
    return [
        replace(
            layer, name=layer.name if k == layer.kind.weight else f"{layer.name}.{k}", trained=(k,)
        )
        for k in layer.trained
    ]


def _beside(layer: Layer, other: Layer) -> bool:
    """Whether two layers have rows of one packed parameter each."""
    return layer.module is other.module and bool(layer.parts) and bool(other.parts)


def _orientation(layer: Layer, owner: Layer) -> bool | None:
    """Whether a guest's matrix is its owner's transposed; None if they have nothing in common."""
    ids, theirs = ({id(p) for p in one.whole().values()} for one in (layer, owner))
    if ids != theirs or layer.parts or owner.parts:
        return None
    if type(layer.kind) is type(owner.kind):
        return False
    if type(layer.kind) in MATRICES and type(owner.kind) in MATRICES:
        return True
    return None
