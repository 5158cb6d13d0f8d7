"""Statistics of some of a batch's examples, from a small pass of the model on them alone.

In the training's own pass a capture costs a second backward pass of all examples, and where
factors run over many batches a quarter of them is enough. So the model is run again, on that
quarter. Only where its outputs are the same then: examples that mix, or that draw (dropout), are
captured in the training's own pass. Batch normalisation is given the moments of the whole batch,
which its running ones tell; what flows back through these moments is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from kronewton.batches import half, rerunnable
from kronewton.capture import Watcher
from kronewton.factors import PART, in_turn
from kronewton.fisher import Fisher
from kronewton.part import Part
from kronewton.replay import Inner, ModelCall, Path, Replayer
from kronewton.rows import joined

MOST = 0.5  # of a batch, for a pass of its own to pay
SAME, SAME_HALF = 1e-3, 3e-2  # relative difference of outputs that rounding may make
FROM = 3  # the age from which on: the first captures compare a loss with its criteria


class Sampler:
    """Runs one model again on some of a batch, and has the watcher take statistics there."""

    def __init__(self, replayer: Replayer, watcher: Watcher, fisher: Fisher) -> None:
        self.replayer, self.watcher, self.fisher = replayer, watcher, fisher

    def pays(self, age: int, rows: int | None, known: int) -> bool:
        """Whether the next capture may wait for the step, after so many of its kind.

        rows: how many are enough of a layer, None for all. known: how many a batch has, in the
        layer that is the most work.
        """
        if rows is None or age < FROM or _share(rows, known) > MOST:
            return False
        return not any(map(_mixes, self.replayer.modules))

    def sample(self, parts: Sequence[Part], rows: int | None, known: int, turn: int) -> bool:
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
                    output = self._run(call, part.path, N / count)
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

    def _run(self, call: ModelCall, path: Path, times: float) -> Tensor:
        """The output for some examples, each one of `times`, normalised as in the batch."""
        modules = self.replayer.modules
        norms = {m: _moments(m, call) for m in modules if m.training and isinstance(m, _BatchNorm)}
        if norms:
            call = replace(call, training=[m.training and m not in norms for m in modules])
        hooks = [m.register_forward_pre_hook(_Moments(*found, times)) for m, found in norms.items()]
        try:
            return self.replayer.run(call, path)
        finally:
            for hook in hooks:
                hook.remove()

    def _cotangents(self, part: Part, within: slice, size: float) -> Iterator[Tensor]:
        """At some of the model's output: fewer stand for all."""
        for drawn in self.fisher.cotangents(part.curvature()):
            u = drawn if part.bridge is None else part.bridge.pull(drawn)
            yield u[within] * size


class _Moments:
    """Before a batch normalisation is run on some examples: has it take the whole batch's moments.

    The replay puts back what they replace.
    """

    def __init__(self, mean: Tensor, var: Tensor, times: float) -> None:
        self.mean, self.var, self.times = mean, var, times

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        count = args[0].numel() / args[0].shape[1] * self.times
        module._buffers["running_mean"] = self.mean
        module._buffers["running_var"] = self.var * (1 - 1 / count)  # it counts one less


def _moments(norm: _BatchNorm, call: ModelCall) -> tuple[Tensor, Tensor]:
    """A batch's mean and variance, by what they changed in the running ones.

    Raises LookupError if they were not changed.
    """
    before = {key: t for table, key, t in call.buffers if table is norm._buffers}
    count = norm.num_batches_tracked
    share = norm.momentum if norm.momentum is not None or count is None else 1 / float(count)
    if not share:
        raise LookupError("running moments that do not follow")
    mean, var = (
        torch.lerp(before[key], norm._buffers[key], 1 / share)  # type: ignore[arg-type]
        for key in ("running_mean", "running_var")
    )
    return mean, var


def _share(rows: int, known: int) -> float:
    """Of a batch: as much as `factors.thinned` takes of a layer that has so many rows."""
    return max(1 / PART, rows / max(1, known))


def _mixes(module: nn.Module) -> bool:
    """Whether a module's output for an example is another one beside others, or is drawn."""
    mixes = isinstance(module, _BatchNorm) and not module.track_running_stats
    # This one awaits a backward pass after each forward.
    waits = isinstance(module, nn.parallel.DistributedDataParallel)
    if mixes or waits or not module.training:
        return mixes or waits
    draws = isinstance(module, _DropoutNd) and module.p > 0
    recurrent = isinstance(module, nn.RNNBase) and module.dropout > 0
    attends = isinstance(module, nn.MultiheadAttention) and module.dropout > 0
    return draws or recurrent or attends


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
