"""The only place with lasting hooks: watches model and criterion, hands over statistics.

A forward hook on each layer keeps its input and the place of its output in the graph. When the
criterion is called, Λ of its input is known, and one extra backward pass per draw or column gives
b at every layer. A hook on the loss commits what was found, weighted with the gradient that
arrives there: what the user multiplies the loss with. A forward without a backward commits nothing.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import mode
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kronewton.called import arguments_of, device_of
from kronewton.errors import CriterionError
from kronewton.filing import Filing
from kronewton.fisher import Fisher
from kronewton.graph import folded, leads_to, pulled
from kronewton.hooks import Arrival, Commit, Hook, Received, remove
from kronewton.layers import TURNED, Call, Found, Layer, Seen
from kronewton.layers.functional import matrices, sightings
from kronewton.losses import check, check_values
from kronewton.part import LayerCall, Part, numbers
from kronewton.recording import Recorder, Use
from kronewton.replay import (
    Bridge,
    ChangingBuffers,
    Inner,
    ModelCall,
    Path,
    autocast_of,
    compiled,
    leaves,
    random_state,
    tensors_in,
    versions,
)
from kronewton.rows import joined
from kronewton.several import together
from kronewton.whole import CHECKED, Whole

OWN_FUNCTIONS = (nn.MultiheadAttention,)  # modules that are seen from inside, wherever called from
STRAY_FORWARDS = 8  # forwards without a backward whose graphs are kept at most


class Watcher:
    """Watches one model and the criteria that make up its loss."""

    # Of all watchers: one's own passes run through graphs that another one has hooks in.
    _pauses: ClassVar[int] = 0

    def __init__(
        self,
        model: nn.Module,
        criteria: Sequence[nn.Module],
        found: Found,
        fisher: Fisher,
        replays: bool,
    ) -> None:
        self.capturing = True  # statistics are due in this step
        self._sampling = False  # a pass of our own is watched, by this watcher alone
        self.heeds_gradients = False  # nobody says when they are thrown away: see `_begin`
        self.stale = False  # a backward pass has added to gradients that a step has changed
        self._backward = -1  # the number of the last backward pass
        self._indirect = False  # the criterion was seen on something that the model did not return
        self.replays = replays
        self.found, self.fisher, self.criteria = found, fisher, tuple(criteria)
        self.whole = Whole(criteria, CHECKED if criteria and not fisher.rides_along else 0)
        self.filing = Filing(found.layers)
        self._inside = {id(m) for m in model.modules()} & {id(c) for c in criteria}
        self.layers: dict[int, list[Layer]] = {}  # by the module whose calls show them
        for layer in [*found.layers, *found.guests]:
            if layer.kind.hooked:
                self.layers.setdefault(id(layer.module), []).append(layer)
        self._changing = ChangingBuffers(model)
        self._modules = list(model.modules()) if replays else []  # as the replayer has them
        self._model = weakref.ref(model)
        self._waiting: list[Arrival] = []
        self._recorder = Recorder(self._on_use)
        self._recording: list[bool] = []  # of the modules that are running: whether it was entered
        self._clear()
        self._finalizer = weakref.finalize(self, remove, self._hooks(model))

    def _hooks(self, model: nn.Module) -> list[Any]:
        """Register every hook there is."""
        modules = {id(m): m for m in model.modules() if id(m) in self.layers}
        named = {"with_kwargs": True}
        handles: list[Any] = []
        for module in modules.values():
            hook = Hook(self, module, "_on_layer")
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for module in (model, *(m for m in model.modules() if isinstance(m, OWN_FUNCTIONS))):
            handles += [
                module.register_forward_pre_hook(Hook(self, module, "_enter")),
                module.register_forward_hook(Hook(self, module, "_leave"), always_call=True),
            ]
        before, after = Hook(self, model, "_before_model"), Hook(self, model, "_after_model")
        handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(model.register_forward_hook(after))
        for criterion in self.criteria:
            before = Hook(self, criterion, "_before_criterion")
            after = Hook(self, criterion, "_on_criterion")
            handles.append(criterion.register_forward_pre_hook(before, **named))
            handles.append(criterion.register_forward_hook(after, **named))
        return handles

    def close(self) -> None:
        """Remove every hook."""
        self._unwind()
        self._finalizer()

    def _clear(self) -> None:
        for hook in self._waiting:
            hook.let_go()
        self._waiting = []
        self.calls: list[LayerCall] = []
        self.parts: list[Part] = []  # committed; the loss's hook holds those that may yet be
        self.foreign = 0  # criterion calls on outputs that no watched layer had a part in
        self._forward = 0
        self._open: list[ModelCall] = []
        self._outputs: list[tuple[int, Tensor, ModelCall, Path]] = []
        self._arrivals: list[tuple[LayerCall, dict[int, Tensor]]] = []
        self._uses: list[tuple[int, Use]] = []
        self._inner_calls: dict[int, int] = {}  # of a criterion inside the model, in this forward
        self.whole.received = {}

    def discard(self) -> None:
        """Forget what was committed: its gradients are thrown away."""
        for part in self.parts:
            part.weight = None  # of another backward pass, should there be one
        self.parts, self._arrivals, self.whole.received = [], [], {}

    def forget_first(self, parts: int, arrivals: int, received: Collection[int]) -> None:
        """Forget what `seen` told of: its step was not made, and its gradients are gone."""
        self.parts, self._arrivals = self.parts[parts:], self._arrivals[arrivals:]
        self.whole.forget(received)

    @property
    def seen(self) -> tuple[int, int, set[int]]:
        """How much was committed so far since the last step."""
        return len(self.parts), len(self._arrivals), set(self.whole.received)

    @property
    def pending(self) -> bool:
        """Whether a batch has been seen since the last step."""
        return bool(self.parts or self._arrivals or self.foreign)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is watched inside: for replays and for our own calls of the criterion."""
        Watcher._pauses += 1
        try:
            yield
        finally:
            Watcher._pauses -= 1

    @property
    def inert(self) -> bool:
        """Whether what happens now is no training's: a replay, or a pass of one's own."""
        return Watcher._pauses > 0 and not self._sampling

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, between two batches, calls of layers are watched, by this watcher alone."""
        self._sampling = self.capturing = True
        try:
            with self.paused(), torch.enable_grad():
                yield
        finally:
            self._sampling = self.capturing = False
            self._unwind()
            self._clear()

    def collect(self) -> tuple[list[Part], str]:
        """The parts whose loss was differentiated since the last call; forgets all others.

        And the class of a criterion that was called on one and the same output twice.
        """
        self._unwind()
        self._file_arrivals()
        parts = self.parts
        if any(part.call is not None for part in parts):
            # A criterion shared with another model is called on that model's outputs, too.
            of_others = not (self._indirect and not self.capturing)
            parts = [p for p in parts if p.call is not None or p.statistics or not of_others]
        if self.capturing:
            self._indirect |= any(part.call is None for part in parts)
        if not parts and self.capturing and not self.criteria:
            parts = self._unwatched_part()
        for part in parts:
            for name, stats in part.statistics.items():
                part.statistics[name] = joined(stats)
        if self._checking:
            self.whole.compare(parts)
        self._clear()
        calls = Counter((part.key, part.criterion) for part in parts)
        twice = (type(criterion).__name__ for (_, criterion), n in calls.items() if n > 1)
        return parts, next(twice, "")

    @property
    def idle(self) -> bool:
        """Whether nothing has run since the last step."""
        return not (self._forward or self.calls or self.parts)

    # The model and its layers.

    def _watching(self) -> bool:
        if self.inert or not torch.is_grad_enabled():
            return False
        # Inside torch.func's transforms a call is a function's and not the training's.
        return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._watching():
            return
        given = [t for t in tensors_in((args, kwargs)) if t.dim()]
        if given and all(t.shape[0] == 0 for t in given):
            raise CriterionError(
                f"{type(model).__name__} was called on an empty batch, {tuple(given[0].shape)}. "
                "At least one example is needed: skip the batch, or give the loader "
                "drop_last=True."
            )
        self._forward += 1
        self._inner_calls = {}
        state = random_state() if self.replays else (torch.empty(0), [])
        training = [m.training for m in self._modules] if self.replays else None
        buffers = self._changing.kept() if self.replays else []
        given_versions = versions((args, kwargs))
        precision = autocast_of(device_of(args, kwargs))
        self._open.append(
            ModelCall(args, kwargs, state, given_versions, training, buffers, precision)
        )
        oldest = self._forward - STRAY_FORWARDS
        if self.calls and self.calls[0].forward <= oldest:
            self.calls = [call for call in self.calls if call.forward > oldest]
        if self._outputs and self._outputs[0][0] <= oldest:
            self._outputs = [found for found in self._outputs if found[0] > oldest]

    def _after_model(self, model: nn.Module, args: Any, result: Any) -> None:
        if not self._watching() or not self._open:
            return
        call = self._open.pop()
        if self.replays:
            self._changing.compare(call.buffers)
        # Held, not weakly: of criterion(model(x).flatten(), y) only the view is alive.
        outputs = list(leaves(result))
        self._outputs += [(self._forward, t, call, path) for path, t in outputs]
        for _, tensor in outputs if self._checking else ():
            if tensor.requires_grad:
                tensor.register_hook(Received(self, id(tensor)))

    @property
    def _checking(self) -> bool:
        return self.capturing and self.whole.left > 0 and not (self._inside or self._sampling)

    def _on_layer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.capturing or not self._watching():
            return
        # What the module did by functions of torch's own is its kind's to tell.
        self._uses = [found for found in self._uses if found[1].output is not output]
        layers = self.layers[id(module)]
        if not any(t.numel() for t in tensors_in(output)):  # as of an expert that nothing chose
            return
        call = Call(args, kwargs, output)
        with torch.no_grad(), torch.autocast(device_of(args, kwargs), enabled=False):
            sights = layers[0].kind.watch(layers, call)
        for layer, seen in zip(layers, sights, strict=True):
            if seen is not None:
                self._saw(layer.owner or layer, layer.term, seen, seen.outputs)

    def _saw(
        self, layer: Layer, term: str, seen: Seen, outputs: Sequence[Tensor | GradientEdge]
    ) -> None:
        edges = [get_gradient_edge(t) if isinstance(t, Tensor) else t for t in outputs]
        call = LayerCall(layer, term, replace(seen, outputs=()), edges, self._forward)
        if self.fisher.rides_along:
            self._await(call, outputs)
        self.calls.append(call)

    def _await(self, call: LayerCall, outputs: Sequence[Tensor | GradientEdge]) -> None:
        """Wait for the training gradients in a layer's outputs."""
        for k, output in enumerate(outputs):
            hook = Arrival(self, call, k)
            self._waiting.append(hook)
            if isinstance(output, Tensor):
                output.register_hook(hook)
            else:  # the tensor may have been changed in place since
                output.node.register_prehook(hook.of_node(output.output_nr))

    # What is used without a module's call.

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if module is self._model() and self._watching():
            self._unwind()
        enters = self.capturing and self._watching() and not any(self._recording)
        # A function mode would be traced with what is compiled.
        enters = enters and not compiled(module.modules())
        if enters:
            self._recorder.__enter__()
        self._recording.append(enters)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if torch.compiler.is_compiling() or not self._recording:
            return
        if self._recording.pop():
            self._recorder.__exit__(None, None, None)
            self._resolve()

    def _unwind(self) -> None:
        """Leave the recorder that an interrupt in a forward has left entered."""
        stack = torch.overrides._get_current_function_mode_stack()
        if any(self._recording) and stack and stack[-1] is self._recorder:
            self._recorder.__exit__(None, None, None)
        self._recording, self._uses = [], []

    def _on_use(self, use: Use) -> None:
        if self._watching():
            self._uses.append((self._forward, use))

    def _resolve(self) -> None:
        """File the uses of matrices that no module's call has told of."""
        uses, self._uses = self._uses, []
        if not uses:
            return
        owners = matrices(self.found.layers)
        for forward, use in uses:
            for layer, turned, seen in sightings(use, owners):
                term = layer.name + (TURNED if turned else "")
                self._saw(layer, term, seen, [use.edge])
                self.calls[-1].forward = forward

    # The criterion.

    def _before_criterion(self, criterion: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._watching():
            return
        output, *targets = arguments_of(criterion, args, kwargs)
        check(criterion, output, *targets)
        if self.capturing:
            check_values(criterion, output, *targets)

    def _on_criterion(self, criterion: nn.Module, args: Any, kwargs: Any, loss: Any) -> None:
        if not self._watching() or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        output, *targets = arguments_of(criterion, args, kwargs)
        moving = [t for t in targets if isinstance(t, Tensor) and t.requires_grad]
        whole = self._together(criterion, [output, *targets], moving) if moving else None
        part = self._new_part(*whole or (criterion, output, targets))
        if part is not None:
            part.loss = loss.detach()
            if self._checking:
                with self.paused():
                    self.whole.expect(part, loss, [found[1] for found in self._outputs])
            if moving and whole is None:
                self.whole.partial = (
                    f"{type(criterion).__name__} is given a second argument that the model "
                    "computes, and its Hessian is taken in the first one only. Let the model "
                    "return one tensor that the criterion takes apart"
                )
            loss.register_hook(Commit(self, part))

    def _together(
        self, criterion: nn.Module, arguments: Sequence[Any], moving: Sequence[Tensor]
    ) -> tuple[nn.Module, Tensor, list[Any]] | None:
        """The criterion of several outputs as one of their stack, where the model made them all."""
        outputs = [found[1] for found in self._outputs if found[1].requires_grad]
        if id(criterion) in self._inside or not outputs:
            return None
        if not all(self._leads(outputs, t) for t in moving):
            return None
        return together(criterion, arguments)

    @torch.enable_grad()
    def observe(self, criterion: nn.Module, output: Tensor, targets: Sequence[Tensor]) -> None:
        """Take statistics for a loss that no watched criterion was called for."""
        check(criterion, output, *targets)
        check_values(criterion, output, *targets)
        if not output.requires_grad:
            raise CriterionError(
                "observe() was given an output that does not require a gradient: it was computed "
                "under no_grad(), or all that leads to it is frozen. Leave it out there."
            )
        with self.paused(), torch.enable_grad():
            inner = output.detach().requires_grad_()
            loss = criterion(inner, *targets)
            (gradient,) = torch.autograd.grad(loss, inner)
        part = self._new_part(criterion, output, targets)
        if part is None:
            raise CriterionError(
                "observe() was given an output that no watched layer of the model leads to. Give "
                "it what the watched model returns."
            )
        part.loss = loss.detach()
        commit = Commit(self, part, gradient)
        output.register_hook(commit)
        if part.bridge is not None:  # the loss may have gone another way from the model's output
            source = next(t for _, t, call, path in self._outputs
                          if call is part.call and path == part.path)  # fmt: skip
            expected = part.bridge.pull(gradient).detach()
            source.register_hook(Commit(self, part, expected, commit))

    def _new_part(
        self, criterion: nn.Module, output: Tensor, targets: Sequence[Tensor]
    ) -> Part | None:
        fixed = tuple(t.detach() if isinstance(t, Tensor) else t for t in targets)
        part = Part(criterion, output.detach(), fixed, versions(fixed))
        part.autocast = autocast_of(output.device.type)
        self._locate(part, output)
        found = self._backpropagate(part, output) if self.capturing else self._indirect
        if part.call is None and not found:
            self.foreign += 1
            return None
        return part

    def _locate(self, part: Part, output: Tensor) -> None:
        """Find which output of the model the criterion was given, so that it can be rerun."""
        if id(part.criterion) in self._inside and self._open:
            count = self._inner_calls.get(id(part.criterion), 0)
            self._inner_calls[id(part.criterion)] = count + 1
            part.call, part.path = self._open[-1], (Inner(part.criterion, count),)
            part.forwards = frozenset([self._forward])
            return
        for forward, tensor, call, path in reversed(self._outputs):
            if tensor is output:
                part.call, part.path, part.forwards = call, path, frozenset([forward])
                return
        leading = [
            found
            for found in self._outputs
            if found[1].requires_grad and self._leads([found[1]], output)
        ]
        if len(leading) == 1:  # of several, one alone would not be the whole Jacobian
            forward, tensor, part.call, part.path = leading[0]
            part.bridge = Bridge(tensor, output, part.path)
            part.forwards = frozenset([forward])

    def known_calls(self) -> list[LayerCall]:
        """The calls whose rows give their layer's gradient."""
        self._resolve()
        return [call for call in self.calls if call.layer.name not in self.filing.unexplained]

    def _leads(self, sources: Sequence[Tensor | GradientEdge], output: Tensor) -> bool:
        """Whether the output depends on any of the sources."""
        with self.paused():  # or zeros would arrive as training gradients
            return leads_to(sources, output)

    def _backpropagate(self, part: Part, output: Tensor) -> bool:
        """Fill in the part's statistics; False if no watched layer leads to its output."""
        calls = self.known_calls()
        part.batched = not calls or any(call.seen.batched for call in calls)
        if self.fisher.rides_along:
            if part.call is not None or not calls:
                return bool(calls)
            part.forwards = frozenset(call.forward for call in calls)
            return self._leads([edge for call in calls for edge in call.edges], output)
        with torch.no_grad():
            weights = part.curvature().weights
        with self.paused():  # checkpointed layers run again in here
            T = folded(calls, output) if part.batched else 0
            start = None if part.call is not None else self.fisher.drawn
            drawn = self.fisher.cotangents(part.curvature(), T)
            found = self.file(part, calls, output, drawn, weights)
        if not found and start is not None:  # another model's output
            self.fisher.undo(start)
        return found

    def file(
        self,
        part: Part,
        calls: Sequence[LayerCall],
        output: Tensor,
        cotangents: Iterable[Tensor],
        weights: Tensor,
    ) -> bool:
        """Statistics of calls from cotangents at an output; False if none of them leads to it."""
        wanted = self.filing.wanted(calls)
        rows: list[list[Tensor | None]] = []
        for u in cotangents:
            if not wanted.sources:
                return False
            rows.append(pulled(output, wanted.sources, u.to(output.dtype)))
        return self.filing.file(part, wanted, rows, weights)

    # What arrives in the user's own backward pass.

    def _begin(self) -> None:
        """Forget what earlier backward passes brought if its gradients are no longer there."""
        backward = torch._C._current_graph_task_id()  # type: ignore[attr-defined]
        if not self.heeds_gradients or backward == self._backward:
            return
        self._backward = backward
        there = any(
            p.grad is not None and bool(numbers(p.grad).any())
            for layer in self.found.layers
            for p in layer.whole().values()
        )
        if not there:
            self.discard()
        elif not self.pending:
            self.stale = True

    def commit(self, part: Part, weight: Tensor) -> None:
        """Believe a part: what it is weighted with has arrived."""
        self._begin()
        if part.weight is None:
            self.parts.append(part)
        part.weight = weight if part.weight is None else part.weight + weight
        # Their statistics are taken: the graph need not be kept for them.
        if not self.fisher.rides_along:
            self.calls = [call for call in self.calls if call.forward not in part.forwards]

    def arrived(self, call: LayerCall, k: int, gradient: Tensor) -> None:
        """Keep the training gradient in a layer's output."""
        if not self.criteria:  # a part is committed first, and a checkpoint's pass is not another
            self._begin()
        # Outputs of one call (a recurrent layer's) arrive one by one; twice is another backward.
        for known, gradients in reversed(self._arrivals):
            if known is call and k not in gradients:
                gradients[k] = gradient
                return
        self._arrivals.append((call, {k: gradient}))

    def received(self, i: int, gradient: Tensor) -> None:
        """Keep the gradient of the whole loss in an output of the model."""
        self.whole.add(i, gradient)

    def _arrived_rows(self) -> Iterator[tuple[LayerCall, Tensor]]:
        for call, gradients in self._arrivals:
            with torch.no_grad():
                yield (
                    call,
                    call.rows([gradients.get(k) for k in range(len(call.edges))]).unsqueeze(-4),
                )

    def _file_arrivals(self) -> None:
        """Training gradients as rows b: each is weight·ω·∇ℓ, and √ω·∇ℓ is what is wanted."""
        if not self.parts:
            return
        for call, b in self._arrived_rows():
            parts = [p for p in self.parts if call.forward in p.forwards]
            if not parts or parts[0].weight is None:
                continue
            # Of several calls of the criterion on one output only the sum of gradients arrives.
            together = sum(p.weight for p in parts if p.weight is not None)
            stats = self.filing.statistics(call, b, parts[0].curvature().weights)
            root = stats.weights.sqrt() * together * (parts[0].weight / together).sqrt()
            root = torch.where(root > 0, root, torch.inf)  # masked rows stay zero
            rows = b / (root if root.dim() == 0 else root.unsqueeze(-1))
            filed = replace(stats, b=rows)
            parts[0].statistics.setdefault(call.term, []).append(filed)

    def _unwatched_part(self) -> list[Part]:
        """All gradients that arrived without a criterion, as one part.

        The loss is taken to be the mean over all examples since the last step: what arrives is
        ∇ℓ/N, and ∇ℓ/√N is what is wanted.
        """
        if not self._arrivals:
            return []
        arrived = list(self._arrived_rows())
        examples: dict[str, int] = {}
        for call, b in arrived:
            examples[call.term] = examples.get(call.term, 0) + b.shape[-3]
        # The most common: one that is called twice sees its examples twice, a table of positions
        # sees none.
        N = mode(examples.values())
        one = arrived[0][1].new_ones(())
        part = Part(nn.Identity(), one, (), [], weight=one)
        for call, b in arrived:
            stats = self.filing.statistics(call, b * N**0.5, one / N)
            part.statistics.setdefault(call.term, []).append(stats)
        return [part]
