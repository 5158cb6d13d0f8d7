"""Statistics of some of a batch's examples, from a small pass of the model on them alone.

In the training's own pass a capture costs a second backward pass of all examples, and where
factors run over many batches a quarter of them is enough. So the model is run again, on that
quarter. Only where its outputs are the same then: examples that mix (batch normalisation), or that
draw (dropout), are captured in the training's own pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from kronewton.batches import half, rerunnable
from kronewton.capture import Watcher
from kronewton.factors import PART, in_turn
from kronewton.fisher import Fisher
from kronewton.part import Part
from kronewton.replay import Inner, Replayer
from kronewton.rows import joined

MOST = 0.5  # of a batch, for a pass of its own to pay
SAME, SAME_HALF = 1e-3, 3e-2  # relative difference of outputs that rounding may make
FROM = 3  # the age from which on: the first captures compare a loss with its criteria


class Sampler:
    """Runs one model again on some of a batch, and has the watcher take statistics there."""

    def __init__(self, replayer: Replayer, watcher: Watcher, fisher: Fisher) -> None:
        self.replayer, self.watcher, self.fisher = replayer, watcher, fisher

    def pays(self, age: int, rows: int | None, known: Mapping[str, int]) -> bool:
        """Whether the next capture may wait for the step, after so many of its kind.

        rows: how many are enough of a layer, None for all. known: of each layer, in a batch.
        """
        if rows is None or age < FROM or not known or _share(rows, known) > MOST:
            return False
        return not any(map(_mixes, self.replayer.model.modules()))

    def sample(
        self, parts: Sequence[Part], rows: int | None, known: Mapping[str, int], turn: int
    ) -> bool:
        """Fill in the statistics of the step's batch; False if that can't be done from a part.

        turn: which examples, others in every one.
        """
        if rows is None or len(parts) != 1:
            return False
        (part,) = parts
        if (
            part.call is None
            or not rerunnable(part)
            or any(isinstance(k, Inner) for k in part.path)
        ):
            return False
        whole = part.output if part.bridge is None else part.bridge.source
        N = len(whole) if whole.dim() else 0
        count = math.ceil(_share(rows, known) * N)
        if not 0 < count <= MOST * N:
            return False
        within = slice(*in_turn(N, count, turn))
        call = replace(
            part.call,
            args=_cut(part.call.args, N, within),
            kwargs=_cut(part.call.kwargs, N, within),
        )
        weights = part.curvature().weights
        if weights.dim() and len(weights) % N == 0:
            T = len(weights) // N  # positions of an example one after the other
            weights = weights[within.start * T : within.stop * T]
        with self.watcher.sampling():
            try:
                with nullcontext() if call.autocast is None else call.autocast.again():
                    output = self.replayer.run(call, part.path)
            except (ValueError, RuntimeError, ArithmeticError, AssertionError, LookupError):
                return False  # its arguments can't be cut
            bound = SAME_HALF if half(parts) else SAME
            if not _same(output.detach(), whole[within], bound):
                return False
            drawn = self._cotangents(part, within, math.sqrt(N / count))
            calls = self.watcher.known_calls()
            found = self.watcher.file(part, calls, output, drawn, weights)
        part.stands_for = N / count
        part.statistics = {term: joined(seen) for term, seen in part.statistics.items()}
        return found

    def _cotangents(self, part: Part, within: slice, size: float) -> Iterator[Tensor]:
        """At some of the model's output: fewer stand for all."""
        for drawn in self.fisher.cotangents(part.curvature()):
            u = drawn if part.bridge is None else part.bridge.pull(drawn)
            yield u[within] * size


def _share(rows: int, known: Mapping[str, int]) -> float:
    """Of a batch: as `factors.thinned` takes of a layer, for most of them."""
    return max(1 / PART, rows / max(1, median(known.values())))


def _mixes(module: nn.Module) -> bool:
    """Whether a module's output for an example is another one beside others, or is drawn."""
    if not module.training:
        return isinstance(module, nn.parallel.DistributedDataParallel)
    draws = isinstance(module, _DropoutNd) and module.p > 0
    recurrent = isinstance(module, nn.RNNBase) and module.dropout > 0
    attends = isinstance(module, nn.MultiheadAttention) and module.dropout > 0
    # The last one awaits a backward pass after each forward.
    mixing = isinstance(module, (_BatchNorm, nn.parallel.DistributedDataParallel))
    return draws or recurrent or attends or mixing


def _same(some: Tensor, wanted: Tensor, bound: float) -> bool:
    """Whether outputs differ by rounding alone."""
    if some.shape != wanted.shape:
        return False
    some, wanted = some.double(), wanted.double()
    return bool((some - wanted).norm() <= bound * wanted.norm())


def _cut(value: Any, N: int, within: slice) -> Any:
    """Some of the examples in a nest of tensors."""
    if isinstance(value, Tensor):
        return value[within] if value.dim() and len(value) == N else value
    if isinstance(value, dict):
        return {key: _cut(item, N, within) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cut(item, N, within) for item in value)
    return value
