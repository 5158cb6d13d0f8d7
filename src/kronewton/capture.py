"""The only place with hooks: watches the model and the criterion, hands over statistics.

A forward hook on each layer keeps its input and the place of its output in the graph. When the
criterion is called, Λ of its input is known, and one extra backward pass per draw or column gives
b at every layer. A hook on the loss commits what was found, weighted with the gradient that
arrives there: what the user multiplies the loss with. A forward without a backward commits nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kronewton.errors import CriterionError
from kronewton.layers import DenseRows, Layer
from kronewton.losses import OutputCurvature, check, check_values, curvature
from kronewton.replay import Bridge, ModelCall, Path, leaves, random_state, versions
from kronewton.types import Rows, Statistics

STRAY_FORWARDS = 8  # forwards without a backward whose graphs are kept at most


@dataclass(eq=False)
class LayerCall:
    """One call of a watched layer: its rows a and where its output is in the graph."""

    layer: Layer
    a: Rows  # (…, N, S, d_in)
    batched: bool  # or a single example without a dimension for it
    edge: GradientEdge
    forward: int  # which forward of the model it belongs to


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
    _at: OutputCurvature | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for two parts if and only if they share one output."""
        place = self.output.data_ptr(), self.output._version
        return (*place, self.output.shape, self.output.stride())

    def at(self, output: Tensor) -> Part:
        """The same batch with another output, and without statistics."""
        return replace(self, output=output.detach(), statistics={}, _at=None)

    def curvature(self) -> OutputCurvature:
        """Λ of the criterion at this part's output."""
        if self._at is None:
            self._at = curvature(self.criterion, self.output, *self.targets, batched=self.batched)
        return self._at


class Watcher:
    """Watches one model and at most one criterion."""

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None,
        layers: Sequence[Layer],
        fisher: Fisher,
        replays: bool,
    ) -> None:
        self.capturing = True  # statistics are due in this step
        self._indirect = False  # the criterion was seen on something that the model did not return
        self.replays = replays
        self.layers = {id(layer.module): layer for layer in layers}
        self.fisher = fisher
        self.criterion = criterion
        self._paused = False
        self._clear()
        handles = [
            layer.module.register_forward_hook(
                _Hook(self, layer.module, "_on_layer"), with_kwargs=True
            )
            for layer in layers
        ]
        handles.append(
            model.register_forward_pre_hook(_Hook(self, model, "_before_model"), with_kwargs=True)
        )
        handles.append(model.register_forward_hook(_Hook(self, model, "_after_model")))
        if criterion is not None:
            handles += [
                criterion.register_forward_pre_hook(
                    _Hook(self, criterion, "_before_criterion"), with_kwargs=True
                ),
                criterion.register_forward_hook(
                    _Hook(self, criterion, "_on_criterion"), with_kwargs=True
                ),
            ]
        self._finalizer = weakref.finalize(self, _remove, handles)

    def close(self) -> None:
        """Remove every hook."""
        self._finalizer()

    def _clear(self) -> None:
        self.calls: list[LayerCall] = []
        self.parts: list[Part] = []  # committed; the loss's hook holds those that may yet be
        self.foreign = 0  # criterion calls on outputs that no watched layer had a part in
        self._forward = 0
        self._open: list[ModelCall] = []
        self._outputs: list[tuple[int, Tensor, ModelCall, Path]] = []
        self._arrivals: list[tuple[LayerCall, Tensor]] = []

    def discard(self) -> None:
        """Forget what was committed: its gradients are thrown away."""
        self.parts, self._arrivals = [], []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is watched inside: for replays and for our own calls of the criterion."""
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    def collect(self) -> tuple[list[Part], bool]:
        """The parts whose loss was differentiated since the last call; forgets all others.

        And whether two of them are calls of the criterion on one and the same output.
        """
        self._file_arrivals()
        parts = self.parts
        if any(part.call is not None for part in parts):
            # A criterion shared with another model is called on that model's outputs, too.
            parts = [part for part in parts if part.call is not None or part.statistics]
        if not parts and self.capturing and self.criterion is None:
            parts = self._unwatched_part()
        for part in parts:
            for name, stats in part.statistics.items():
                part.statistics[name] = joined(stats)
        self._clear()
        return parts, len({part.key for part in parts}) < len(parts)

    # The model and its layers.

    def _watching(self) -> bool:
        return not self._paused and torch.is_grad_enabled()

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._watching():
            return
        given = [t for _, t in leaves((args, kwargs)) if t.dim()]
        if given and all(t.shape[0] == 0 for t in given):
            raise CriterionError(
                f"{type(model).__name__} was called on an empty batch, {tuple(given[0].shape)}. "
                "At least one example is needed: skip the batch, or give the loader "
                "drop_last=True."
            )
        self._forward += 1
        state = random_state() if self.replays else (torch.empty(0), [])
        training = [m.training for m in model.modules()] if self.replays else None
        self._open.append(ModelCall(args, kwargs, state, versions((args, kwargs)), training))
        oldest = self._forward - STRAY_FORWARDS
        if self.calls and self.calls[0].forward <= oldest:
            self.calls = [call for call in self.calls if call.forward > oldest]
        if self._outputs and self._outputs[0][0] <= oldest:
            self._outputs = [found for found in self._outputs if found[0] > oldest]

    def _after_model(self, model: nn.Module, args: Any, result: Any) -> None:
        if not self._watching() or not self._open:
            return
        call = self._open.pop()
        # Held, not weakly: of criterion(model(x).flatten(), y) only the view is alive.
        self._outputs += [(self._forward, t, call, path) for path, t in leaves(result)]

    def _on_layer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.capturing or not self._watching():
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        layer = self.layers[id(module)]
        inputs = args[0] if args else kwargs.get("input", next(iter(kwargs.values())))
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            # The user may put the next batch where this one is; activations stay as they are.
            own = inputs.detach() if inputs.requires_grad else inputs.clone()
            a = layer.kind.input_rows(layer, at_least_float32(own), output.shape)
        edge = get_gradient_edge(output)
        batched = output.dim() > layer.kind.example_dims(layer)
        call = LayerCall(layer, a, batched, edge, self._forward)
        if self.fisher.rides_along:
            output.register_hook(_Arrival(self, call))
        self.calls.append(call)

    # The criterion.

    def _before_criterion(self, criterion: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._watching():
            return
        output, *targets = _arguments(criterion, args, kwargs)
        check(criterion, output, *targets)
        if self.capturing:
            check_values(criterion, output, *targets)

    def _on_criterion(self, criterion: nn.Module, args: Any, kwargs: Any, loss: Any) -> None:
        if not self._watching() or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        output, *targets = _arguments(criterion, args, kwargs)
        part = self._new_part(criterion, output, targets)
        if part is not None:
            part.loss = loss.detach()
            loss.register_hook(_Commit(self, part))

    @torch.enable_grad()
    def observe(self, criterion: nn.Module, output: Tensor, targets: Sequence[Tensor]) -> None:
        """Take statistics for a loss that no watched criterion was called for."""
        check(criterion, output, *targets)
        check_values(criterion, output, *targets)
        with self.paused(), torch.enable_grad():
            inner = output.detach().requires_grad_()
            loss = criterion(inner, *targets)
            (gradient,) = torch.autograd.grad(loss, inner)
        part = self._new_part(criterion, output, targets)
        if part is None:
            raise CriterionError(
                "observe() was given an output that no watched layer of the model leads to. Give "
                "it what the model that was given to KFAC returns."
            )
        part.loss = loss.detach()
        output.register_hook(_Commit(self, part, gradient))

    def _new_part(
        self, criterion: nn.Module, output: Tensor, targets: Sequence[Tensor]
    ) -> Part | None:
        fixed = tuple(t.detach() if isinstance(t, Tensor) else t for t in targets)
        part = Part(criterion, output.detach(), fixed, versions(fixed))
        self._locate(part, output)
        found = self._backpropagate(part, output) if self.capturing else self._indirect
        if part.call is None and not found:
            self.foreign += 1
            return None
        if self.capturing:
            self._indirect = part.call is None
        return part

    def _locate(self, part: Part, output: Tensor) -> None:
        """Find which output of the model the criterion was given, so that it can be rerun."""
        for forward, tensor, call, path in reversed(self._outputs):
            if tensor is output:
                part.call, part.path, part.forwards = call, path, frozenset([forward])
                return
        leading = [
            found
            for found in self._outputs
            if found[1].requires_grad and _leads_to([found[1]], output)
        ]
        if len(leading) == 1:  # of several, one alone would not be the whole Jacobian
            forward, tensor, part.call, part.path = leading[0]
            part.bridge = Bridge(tensor, output, part.path)
            part.forwards = frozenset([forward])

    def _backpropagate(self, part: Part, output: Tensor) -> bool:
        """Fill in the part's statistics; False if no watched layer leads to its output."""
        calls = list(self.calls)
        part.batched = all(call.batched for call in calls)
        edges = [call.edge for call in calls]
        if not calls:
            return False
        if self.fisher.rides_along:
            if part.call is not None:
                return True
            part.forwards = frozenset(call.forward for call in calls)
            return _leads_to(edges, output)
        with torch.no_grad():
            weights = part.curvature().weights
        rows: list[Sequence[Tensor | None]] = []
        with self.paused():  # checkpointed layers run again in here
            for cotangent in self.fisher.cotangents(part.curvature()):
                u = cotangent.to(output.dtype)
                rows.append(torch.autograd.grad(output, edges, u, True, allow_unused=True))
        return self._file(part, calls, rows, weights)

    def _file(
        self,
        part: Part,
        calls: Sequence[LayerCall],
        rows: Sequence[Sequence[Tensor | None]],
        weights: Tensor,
    ) -> bool:
        reached: dict[str, list[tuple[LayerCall, Tensor]]] = {}
        for k, call in enumerate(calls):
            found = [gradients[k] for gradients in rows]
            if all(g is not None for g in found):
                rows_b = [_output_rows(call, g) for g in found if g is not None]
                b = torch.stack(rows_b, -4)  # (…, V, N, S, d_out)
                reached.setdefault(call.layer.name, []).append((call, b))
        for name, seen in reached.items():
            stats = [self._statistics(call, b, weights) for call, b in seen]
            part.statistics[name] = stats
        used = [call.forward for seen in reached.values() for call, _ in seen]
        part.forwards = frozenset(used)
        return bool(used)

    def _statistics(self, call: LayerCall, b: Tensor, weights: Tensor) -> Statistics:
        return Statistics(call.a, b, row_weights(weights, *call.a.counts), call.forward)

    # What arrives in the user's own backward pass.

    def _commit(self, part: Part, weight: Tensor) -> None:
        if part.weight is None:
            self.parts.append(part)
        part.weight = weight if part.weight is None else part.weight + weight
        # Their statistics are taken: the graph need not be kept for them.
        if not self.fisher.rides_along:
            self.calls = [call for call in self.calls if call.forward not in part.forwards]

    def _arrived(self, call: LayerCall, gradient: Tensor) -> None:
        b = _output_rows(call, gradient).unsqueeze(-4)  # (…, 1, N, S, d_out)
        self._arrivals.append((call, b))

    def _file_arrivals(self) -> None:
        """Training gradients as rows b: each is weight·ω·∇ℓ, and √ω·∇ℓ is what is wanted."""
        for call, b in self._arrivals:
            parts = [p for p in self.parts if call.forward in p.forwards]
            if not parts or parts[0].weight is None:
                continue
            # Of several calls of the criterion on one output only the sum of gradients arrives.
            together = sum(p.weight for p in parts if p.weight is not None)
            stats = self._statistics(call, b, parts[0].curvature().weights)
            root = stats.weights.sqrt() * together * (parts[0].weight / together).sqrt()
            root = torch.where(root > 0, root, torch.inf)  # masked rows stay zero
            rows = b / (root if root.dim() == 0 else root.unsqueeze(-1))
            filed = replace(stats, b=rows)
            parts[0].statistics.setdefault(call.layer.name, []).append(filed)

    def _unwatched_part(self) -> list[Part]:
        """All gradients that arrived without a criterion, as one part.

        The loss is taken to be the mean over all examples since the last step: what arrives is
        ∇ℓ/N, and ∇ℓ/√N is what is wanted.
        """
        if not self._arrivals:
            return []
        examples: dict[str, int] = {}
        for call, b in self._arrivals:
            examples[call.layer.name] = examples.get(call.layer.name, 0) + b.shape[-3]
        # The smallest: a layer that is called twice in a forward pass sees its examples twice.
        N = min(examples.values())
        one = self._arrivals[0][1].new_ones(())
        part = Part(nn.Identity(), one, (), [], weight=one)
        for call, b in self._arrivals:
            stats = self._statistics(call, b * N**0.5, one / N)
            part.statistics.setdefault(call.layer.name, []).append(stats)
        return [part]


class Fisher:
    """How the rows b are made: exact columns, draws, or the training gradients themselves."""

    def __init__(self, mode: str, draws: int, generator: torch.Generator) -> None:
        self.mode, self.draws, self.generator = mode, draws, generator

    @property
    def rides_along(self) -> bool:
        """Whether the user's own backward pass brings the rows."""
        return self.mode == "empirical"

    def cotangents(self, at: OutputCurvature) -> Iterator[Tensor]:
        """Cotangents u at the criterion's input with Σ u u' = Λ, or its expectation."""
        if self.mode == "exact":
            yield from at.columns()
            return
        for _ in range(self.draws):
            draw = at.draw(self.generator)
            yield draw if self.draws == 1 else draw * self.draws**-0.5


class _Hook:
    """A forward hook that lives no longer than its watcher.

    Holds weak references only: a deep copy of the model copies its hooks, and those must not
    write the copy's statistics into the original's, nor keep an optimizer alive.
    """

    def __init__(self, watcher: Watcher, module: nn.Module, method: str) -> None:
        self._watcher, self._module = weakref.ref(watcher), weakref.ref(module)
        self._method = method

    def __call__(self, module: nn.Module, *args: Any) -> None:
        watcher = self._watcher()
        if watcher is not None and self._module() is module:
            getattr(watcher, self._method)(module, *args)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return self

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _dead_hook, ()  # a pickled model has no optimizer


def _dead_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _Commit:
    """On the loss, or on an observed output: reads the weight of a part, and commits it."""

    def __init__(self, watcher: Watcher, part: Part, expected: Tensor | None = None) -> None:
        self._watcher, self._part, self._expected = weakref.ref(watcher), part, expected

    def __call__(self, gradient: Tensor) -> None:
        watcher = self._watcher()
        if watcher is None or watcher._paused:
            return
        weight = gradient.detach()
        if self._expected is not None:
            # Projected on the criterion's own gradient: the loss is a multiple of the criterion.
            expected = self._expected
            weight = (weight * expected).sum() / expected.square().sum().clamp_min(1e-30)
        watcher._commit(self._part, at_least_float32(weight))


class _Arrival:
    """On a layer's output: a training gradient has arrived."""

    def __init__(self, watcher: Watcher, call: LayerCall) -> None:
        self._watcher, self._call = weakref.ref(watcher), call

    def __call__(self, gradient: Tensor) -> None:
        watcher = self._watcher()
        if watcher is not None and not watcher._paused:
            watcher._arrived(self._call, gradient.detach())


def row_weights(weights: Tensor, N: int, S: int) -> Tensor:
    """The weights of a criterion's positions (N, *positions), carried to the rows of a layer.

    Position by position where the shapes agree; summed over an example's positions and spread
    over its rows where only the examples agree; the mean for all rows otherwise.
    """
    if not any(weights.stride()):  # one number, expanded
        return weights.flatten()[0] if weights.numel() else weights.new_zeros(())
    if weights.numel() == N * S:
        return weights.reshape(N, S)
    if weights.dim() > 0 and weights.shape[0] == N:
        return weights.reshape(N, -1).mean(1, keepdim=True).expand(N, S)
    return weights.mean()


def joined(calls: list[Statistics]) -> list[Statistics]:
    """A layer's calls in one forward pass as one: its examples at more positions.

    Calls with different numbers of examples stay apart, and so do different forward passes.
    """
    groups: dict[tuple[int, int, int], list[Statistics]] = {}
    for stats in calls:
        key = (stats.forward, stats.a.counts[0], stats.b.shape[-4])
        groups.setdefault(key, []).append(stats)
    return [_joined(group) for group in groups.values()]


def _joined(calls: list[Statistics]) -> Statistics:
    first = calls[0]
    if len(calls) == 1:
        return first
    weights = first.weights
    if any(s.weights.dim() for s in calls):
        weights = torch.cat([s.weights.expand(s.a.counts) for s in calls], 1)
    a = DenseRows(torch.cat([s.a.dense() for s in calls], -2))
    return Statistics(a, torch.cat([s.b for s in calls], -2), weights, first.forward)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision is widened: second moments of bf16 numbers lose most of their digits."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _output_rows(call: LayerCall, gradient: Tensor) -> Tensor:
    return call.layer.kind.output_rows(call.layer, at_least_float32(gradient))


def _arguments(criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    if not kwargs:
        given = list(args)
    else:
        bound = inspect.signature(criterion.forward).bind(*args, **kwargs)
        if bound.kwargs:
            raise CriterionError(
                f"{type(criterion).__name__} takes {', '.join(bound.kwargs)} by name only; a "
                "watched criterion takes the model's output and its targets by position. Let its "
                "forward accept them so, or pass criterion=None."
            )
        given = list(bound.args)
    if not given or not isinstance(given[0], Tensor):
        raise CriterionError(
            f"{type(criterion).__name__} was called with {type(given[0]).__name__ if given else 0} "
            "as its first argument; a watched criterion takes the model's output first, as a "
            "tensor. Pass criterion=None, or call optimizer.observe(output, target, criterion)."
        )
    return given


def _leads_to(sources: Sequence[Tensor | GradientEdge], output: Tensor) -> bool:
    zeros = torch.zeros_like(output)
    found = torch.autograd.grad(
        output,
        list(sources),  # type: ignore[arg-type]  # torch takes a mixture
        zeros,
        retain_graph=True,
        allow_unused=True,
    )
    return any(gradient is not None for gradient in found)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
