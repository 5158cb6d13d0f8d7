"""Statistics of some of a batch's examples, from a small pass of the model on them alone.

In the training's own pass a capture costs a second backward pass of all examples, and where
factors run over many batches a quarter of them is enough. So the model is run again, on that
quarter. Only where its outputs are the same then: examples that mix, or that draw (dropout), are
captured in the training's own pass. Batch normalisation is given the moments of the whole batch,
which its running ones tell; what flows back through these moments is left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext, suppress
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
from kronewton.replay import Inner, ModelCall, Path, Replayer, tensors_in
from kronewton.rows import joined

MOST = 0.5  # of a batch, for a pass of its own to pay
SAME = 1e-3  # of what examples' outputs differ by, that rounding may make
ROUNDING, SAME_HALF = 1e-5, 3e-2  # of the outputs themselves, in full precision and in half
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

    def sample(
        self, parts: Sequence[Part], rows: int | None, known: int, turn: int, terms: Collection[str]
    ) -> bool:
        """Fill in the statistics of the step's batch; False if that can't be done from a part.

        turn: which examples, others in every one. terms: what they must be of.
        """
        if rows is None or len(parts) != 1:
            return False
        (part,) = parts
        if not self._repeats(part):
            return False
        whole = part.output if part.bridge is None else part.bridge.source
        N = len(whole) if whole.dim() else 0
        count = math.ceil(_share(rows, known) * N)
        if not 0 < count <= MOST * N or not _divides(part, N):
            return False
        within = slice(*in_turn(N, count, turn))
        # Whatever a model refuses a part of its batch with: its own next pass is captured then.
        with self.watcher.sampling(), suppress(Exception):
            found = self._taken(part, within, N)
            seen = [sum(math.prod(s.a.counts) for s in own) for own in found.statistics.values()]
            if max(seen, default=0) >= rows and set(terms) <= set(found.statistics):
                part.statistics, part.stands_for = found.statistics, N / count
                return True
        return False

    def _repeats(self, part: Part) -> bool:
        """Whether one call of the model on its arguments is all that led to a part's output."""
        if part.call is None or not rerunnable(part):
            return False
        if any(isinstance(k, Inner) for k in part.path):
            return False
        # A matrix that the criterion's input depends on beside the model's output.
        if part.bridge is not None and self.watcher.filing.unexplained:
            return False
        given = tensors_in((part.call.args, part.call.kwargs))
        return not any(t.grad_fn is not None for t in given)  # of calls before this one

    def _taken(self, part: Part, within: slice, N: int) -> Part:
        """The same part with the statistics of some of its N examples; without, if they differ."""
        assert part.call is not None
        whole = part.output if part.bridge is None else part.bridge.source
        call = replace(
            part.call,
            args=_cut(part.call.args, N, within),
            kwargs=_cut(part.call.kwargs, N, within),
        )
        times = N / (within.stop - within.start)
        found = replace(part, statistics={})
        with nullcontext() if call.autocast is None else call.autocast.again():
            output = self._run(call, part.path, times)
        if not _same(output.detach(), _turned(whole, within), half([part])):
            return found
        weights = _weights(part.curvature().weights, N, within)
        drawn = list(self._cotangents(part, within, math.sqrt(times)))
        # A checkpointed part of the model is run once more in the backward pass.
        with self.replayer.kept_buffers():
            self.watcher.file(found, self.watcher.known_calls(), output, drawn, weights)
        found.statistics = {term: joined(seen) for term, seen in found.statistics.items()}
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
            yield _turned(u, within) * size


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


def _divides(part: Part, N: int) -> bool:
    """Whether a part of the arguments is examples, and none an index of what else would be cut."""
    assert part.call is not None
    given = [t for t in tensors_in((part.call.args, part.call.kwargs)) if t.dim()]
    cut = [len(t) == N for t in given]
    if not any(cut) or part.output.device.type == "cpu":
        return any(cut)
    # An index that is out of its range is an error here, and the end of a process on a device.
    numbers = [
        not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool) for t in given
    ]
    return not any(numbers) or (all(cut) and all(numbers))


def _same(some: Tensor, wanted: Tensor, half: bool) -> bool:
    """Whether outputs differ by rounding alone, beside which examples differ."""
    if some.shape != wanted.shape:
        return False
    some, wanted = some.double(), wanted.double()
    if half:
        bound = SAME_HALF * wanted.norm()
    else:
        bound = SAME * (wanted - wanted.mean(0)).norm() + ROUNDING * wanted.norm()
    return bool((some - wanted).norm() <= bound)


def _turned(t: Tensor, within: slice) -> Tensor:
    """Some of the examples, the last one first.

    Where what stands first is time and not examples, each then lacks its past, and outputs tell.
    """
    return t[within].flip(0)


def _weights(weights: Tensor, N: int, within: slice) -> Tensor:
    """The weights of some examples' positions, one after the other or (N, *positions)."""
    if not weights.dim() or len(weights) % N:
        return weights
    T = len(weights) // N
    some = weights[within.start * T : within.stop * T]
    # One number for all, expanded, stays one.
    return some.unflatten(0, (-1, T)).flip(0).flatten(0, 1) if any(weights.stride()) else some


def _cut(value: Any, N: int, within: slice) -> Any:
    """Some of the examples in a nest of tensors."""
    if isinstance(value, Tensor):
        return _turned(value, within) if value.dim() and len(value) == N else value
    if type(value) is dict:
        return {key: _cut(item, N, within) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cut(item, N, within) for item in value)
    return value
