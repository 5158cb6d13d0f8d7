"""What is kept of one step until it is made: calls of layers, and of the criterion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kronewton.layers import Layer, Seen
from kronewton.losses import OutputCurvature, curvature
from kronewton.replay import Autocast, Bridge, ModelCall, Path
from kronewton.types import Rows, Statistics


@dataclass(eq=False)
class LayerCall:
    """One use of a layer's matrix: its rows a, and where its output is in the graph."""

    layer: Layer  # whose block gets the statistics
    term: str  # the name that they are filed under
    seen: Seen  # without its outputs, which the graph need not keep
    edges: list[GradientEdge]
    forward: int  # which forward of the model it belongs to

    @property
    def a(self) -> Rows:
        return self.seen.a

    def rows(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """b (…, N, S, d_out)."""
        return self.seen.rows(gradients)


@dataclass(eq=False)
class Part:
    """One call of the criterion: a batch, or one of several that make up a step."""

    criterion: nn.Module
    output: Tensor  # detached
    targets: tuple[Tensor, ...]
    versions: list[int]  # of the targets
    loss: Tensor | None = None  # detached
    batched: bool = True
    call: ModelCall | None = None  # None: the model cannot be run again for this part
    path: Path = ()
    bridge: Bridge | None = None
    forwards: frozenset[int] = frozenset()
    weight: Tensor | None = None  # (), None until a gradient has arrived
    statistics: dict[str, list[Statistics]] = field(default_factory=dict)
    expected: dict[int, Tensor] = field(default_factory=dict)  # by output: gradient of the loss
    autocast: Autocast | None = None  # around the criterion
    stands_for: float = (
        1.0  # examples of the batch, for which each that is in the statistics stands
    )
    sign: float = 1.0  # -1 where the criterion is maximised
    _at: OutputCurvature | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for two parts if and only if they share one output."""
        place = self.output.data_ptr(), self.output._version
        return (*place, self.output.shape, self.output.stride())

    def unscaled(self, scale: float) -> Part:
        """The same part without a GradScaler's factor of its loss."""
        if self.weight is None:
            return self
        # Gradients that no criterion explains have it in their rows, which count squared.
        factor = scale if self.loss is not None else scale**2
        return replace(self, weight=self.weight / factor)

    def maximised(self) -> Part:
        """The same part of an objective that is to rise: its loss counts with the other sign."""
        return replace(self, sign=-1.0, loss=None if self.loss is None else -self.loss)

    def at(self, output: Tensor) -> Part:
        """The same batch with another output, and without statistics."""
        return replace(self, output=output.detach(), statistics={}, _at=None)

    def curvature(self) -> OutputCurvature:
        """Λ of the criterion at this part's output."""
        if self._at is None:
            self._at = curvature(self.criterion, self.output, *self.targets, batched=self.batched)
        return self._at


class Wanted:
    """The gradients that one backward pass is asked for, and where each of them will stand."""

    def __init__(
        self, calls: Sequence[LayerCall], alone: Sequence[Layer], new: Sequence[Layer]
    ) -> None:
        self.calls, self.alone, self.new = calls, alone, new
        self.sources: list[Any] = []
        self.of_calls: list[slice] = []
        self.place: dict[int, int] = {}  # of a parameter, by its id
        for call in calls:
            self.of_calls.append(slice(len(self.sources), len(self.sources) + len(call.edges)))
            self.sources += call.edges
        for layer in (*alone, *new):
            for p in layer.whole().values():
                if id(p) not in self.place and p.requires_grad:
                    self.place[id(p)] = len(self.sources)
                    self.sources.append(p)


def numbers(gradient: Tensor) -> Tensor:
    """What a gradient holds: of a sparse one the values that are not zero."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient
