"""Run the model again on a batch that it has seen, and leave no trace.

Random numbers repeat as in the first run (dropout masks are the same), buffers such as
BatchNorm's running statistics stay as they are, and so do torch's own random streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from kronewton.errors import UnsupportedError

LISTS = ("_flat_weights", "_flat_weight_refs")  # of a recurrent module
Buffers = Sequence[tuple[dict[str, Any], str, Tensor]]  # a module's table, a name there, its tensor


class ChangingBuffers:
    """The buffers that a forward of the model changes, as they were before it.

    A power iteration or a running statistic starts from what the buffer was: a rerun that started
    from what it is now would be another function. Which ones change shows at the first forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self._all = [(m._buffers, k) for m in model.modules() for k in m._buffers]
        self._changing: list[tuple[dict[str, Any], str]] | None = None

    def kept(self) -> Buffers:
        """Copies of those that change, of all before the first forward."""
        watched = self._all if self._changing is None else self._changing
        held = [(table, key, table.get(key)) for table, key in watched]
        return [
            (table, key, t.clone())
            for table, key, t in held
            if isinstance(t, Tensor) and not is_lazy(t)
        ]

    def compare(self, before: Buffers) -> None:
        """After the first forward: which ones are not as they were."""
        if self._changing is None:
            self._changing = [
                (table, key)
                for table, key, t in before
                if not isinstance(table.get(key), Tensor) or not torch.equal(t, table[key])
            ]


def _bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """`F.embedding_bag` by `F.embedding`: its arguments, and its value."""
    if input.dim() == 1:
        assert offsets is not None
        starts = offsets[:-1] if include_last_offset else offsets
        places = torch.arange(len(input), device=starts.device).to(starts)
        bag = torch.searchsorted(starts, places, right=True) - 1
        bags = len(starts)
    else:
        bags, width = input.shape
        bag = torch.arange(bags, device=input.device).repeat_interleave(width)
    tokens = input.reshape(-1)
    rows = F.embedding(tokens, weight)
    here = torch.ones_like(tokens, dtype=rows.dtype)
    if padding_idx is not None:
        here = here * (tokens != padding_idx)
    if mode == "max":
        low = rows.masked_fill(here.unsqueeze(1) == 0, -torch.inf)
        index = bag.unsqueeze(1).expand_as(low)
        found = low.new_zeros(bags, low.shape[1])
        return found.scatter_reduce(0, index, low, "amax", include_self=False).nan_to_num(neginf=0)
    share = here if per_sample_weights is None else here * per_sample_weights.reshape(-1)
    total = rows.new_zeros(bags, rows.shape[1]).index_add(0, bag, rows * share.unsqueeze(1))
    if mode == "sum":
        return total
    counts = here.new_zeros(bags).index_add(0, bag, here).clamp_min(1)
    return total / counts.unsqueeze(1)


@dataclass(frozen=True)
class Autocast:
    """torch's autocast as it was around a call, to call again in it."""

    device: str  # a type
    dtype: torch.dtype
    enabled: bool

    def again(self) -> contextlib.AbstractContextManager[Any]:
        """Without its cache, which holds what the weights were."""
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


def autocast_of(device: str) -> Autocast | None:
    """What is on now; None where this type of device has no autocast."""
    if not torch.amp.is_autocast_available(device):
        return None
    return Autocast(
        device, torch.get_autocast_dtype(device), bool(torch.is_autocast_enabled(device))
    )


@dataclass(frozen=True)
class ModelCall:
    """One call of the model: its arguments and the random state that it started from."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: tuple[Tensor, list[Tensor]]
    versions: list[int] | None = None  # of the arguments, None: not to be checked
    training: list[bool] | None = None  # of every module, None: as it is now
    buffers: Buffers = field(default_factory=list)  # that the call itself changed, as before it
    autocast: Autocast | None = None  # around the call

    def intact(self) -> bool:
        """Whether the arguments still hold the batch: a loop may load the next one into them."""
        return self.versions is None or self.versions == versions((self.args, self.kwargs))


@dataclass(frozen=True, eq=False)
class Inner:
    """The place of an output that a criterion inside the model is given."""

    criterion: nn.Module
    count: int  # of its calls before this one in the same forward

    def output(self, run: Callable[[], Any]) -> Tensor:
        """What the criterion is given when the model runs."""
        given: list[Any] = []

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            given.append(args[0] if args else next(iter(kwargs.values())))

        handle = self.criterion.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            run()
        finally:
            handle.remove()
        output = given[self.count]
        assert isinstance(output, Tensor)
        return output


def compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether torch.compile will run any of these."""
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or "_orig_mod" in m._modules
        for m in modules
    )


class Replayer:
    """Reruns one model with other tensors in the place of its trained parameters."""

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        self.model, self.originals = model, list(parameters)
        self.without_forward_mode = ""  # what torch said, where it has none for this model
        self.unfused: set[str] = set()  # of UNFUSED, what this model must do without
        self.without_products = ""  # likewise, where it cannot be differentiated twice either
        self.modules = list(model.modules())
        self._recurrent = [m for m in self.modules if isinstance(m, nn.RNNBase)]
        self._buffers = [m._buffers for m in model.modules() if m._buffers]
        wanted = {id(p): i for i, p in enumerate(parameters)}
        tables: list[tuple[dict[str, Any], str, Any]] = [
            (m._parameters, k, p) for m in model.modules() for k, p in m._parameters.items()
        ]
        # A tied parameter has several slots, and all of them are replaced.
        self.slots = [(table, key, wanted[id(p)]) for table, key, p in tables if id(p) in wanted]

    def parameters(self) -> list[Tensor]:
        """The parameters that are replaced, detached, in their order."""
        return [p.detach() for p in self.originals]

    def run(
        self,
        call: ModelCall,
        path: Path,
        tensors: Sequence[Tensor] | None = None,
        kept: dict[int, Any] | None = None,
    ) -> Tensor:
        """The output at `path` of the model on the call's arguments, with `tensors` as parameters.

        Without tensors the parameters are those that the model has now. kept: what was returned,
        by the id of its call; a call that is among them is not run again, but for what a criterion
        inside the model is given.
        """
        inner = path[0] if path and isinstance(path[0], Inner) else None
        if inner is None and kept is not None and id(call) in kept:
            return follow(kept[id(call)], path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_kept_buffers(self._buffers, call.buffers))
            stack.enter_context(_random_state(call.random_state))
            for words in self.unfused:
                stack.enter_context(UNFUSED[words]())
            if compiled(self.modules):  # which torch differentiates once, and in no forward mode
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if call.training is not None and call.training != [m.training for m in self.modules]:
                stack.enter_context(self._mode(call.training))
            if tensors is not None:
                stack.enter_context(self._swapped(tensors))
            if inner is not None:
                return inner.output(lambda: self.model(*call.args, **call.kwargs))
            returned = self.model(*call.args, **call.kwargs)
            if kept is not None:
                kept[id(call)] = returned
            return follow(returned, path)

    def kept_buffers(self) -> contextlib.AbstractContextManager[None]:
        """Inside, buffers may change; afterwards they are as before."""
        return _kept_buffers(self._buffers)

    def unfuse(self, error: str) -> bool:
        """Do without the functions that an error names; False if it names none, or no new one."""
        named = {words for words in UNFUSED if words in error} - self.unfused
        self.unfused |= named
        return bool(named)

    @contextlib.contextmanager
    def _mode(self, training: Sequence[bool]) -> Iterator[None]:
        """Every module in training or evaluation, as it was in the first run."""
        now = [m.training for m in self.modules]
        try:
            for m, mode in zip(self.modules, training, strict=False):
                m.training = mode
            yield
        finally:
            for m, mode in zip(self.modules, now, strict=True):
                m.training = mode

    @contextlib.contextmanager
    def _swapped(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        kept = [table[key] for table, key, _ in self.slots]
        # Recurrent modules list their weights anew when they find others, and may move them.
        lists = [(vars(m), {k: vars(m)[k] for k in LISTS if k in vars(m)}) for m in self._recurrent]
        try:
            for table, key, i in self.slots:
                table[key] = tensors[i]
            yield
        finally:
            for (table, key, _), parameter in zip(self.slots, kept, strict=True):
                table[key] = parameter
            for listed, held in lists:
                listed.update(held)


def _plain_attention() -> contextlib.AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH)


@contextlib.contextmanager
def _plain_recurrence() -> Iterator[None]:
    # Not torch.backends' own contexts: those set precisions, too, and warn of them.
    on_host, on_device = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(on_host)
        torch._C._set_cudnn_enabled(on_device)


def _packed(padded: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """The rows of sequences, the longest first, by time step, and how many there are in each."""
    x = padded.transpose(0, 1) if batch_first else padded
    x = x[: int(lengths[0])]
    there = lengths > torch.arange(len(x), device=lengths.device).unsqueeze(1)  # (T, N)
    return x[there.to(x.device)], there.sum(1)


class _Replaced(TorchFunctionMode):
    """Inside, another function is called in the place of one of torch's."""

    def __init__(self, function: Callable[..., Any], by: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.by = function, by

    def __torch_function__(
        self, func: Any, kinds: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        chosen = self.by if func is self.function else func
        return chosen(*args, **(kwargs or {}))


# Functions without forward mode, or with one derivative only, by what torch's errors call them,
# and how to run without them.
UNFUSED: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "scaled_dot_product": _plain_attention,
    "mkldnn_rnn": _plain_recurrence,
    "cudnn_rnn": _plain_recurrence,
    "miopen_rnn": _plain_recurrence,
    "embedding_bag": partial(_Replaced, F.embedding_bag, _bag),
    "_pack_padded_sequence": partial(_Replaced, torch._VF._pack_padded_sequence, _packed),
}


@contextlib.contextmanager
def _kept_buffers(
    tables: Sequence[dict[str, Tensor | None]], earlier: Buffers = ()
) -> Iterator[None]:
    """Buffers inside are copies: of what they are, or, where that is known, of what they were."""
    kept = [dict(table) for table in tables]
    known = {(id(table), key) for table, key, _ in earlier}
    try:
        for table in tables:
            for key, t in table.items():
                if t is not None and (id(table), key) not in known:
                    table[key] = t.clone()
        for table, key, t in earlier:
            table[key] = t.clone()
        yield
    finally:
        for table, buffers in zip(tables, kept, strict=True):
            table.update(buffers)


def random_state() -> tuple[Tensor, list[Tensor]]:
    """The state of torch's generators: the CPU's and every started accelerator's."""
    return torch.get_rng_state(), _device_states() if torch.cuda.is_initialized() else []


@_disable_dynamo  # which can't follow what torch does here
def _device_states() -> list[Tensor]:
    require_no_graph("A model that is watched")
    return torch.cuda.get_rng_state_all()


def require_no_graph(what: str) -> None:
    """Raise UnsupportedError while a CUDA graph is being captured."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"{what} can't be captured in a CUDA graph: what a step does is decided step by step, "
            "and a graph would repeat one of them. Let torch.compile(model, "
            "mode='reduce-overhead') make graphs of the model alone, and call step() as usual."
        )


@contextlib.contextmanager
def _random_state(state: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    before = random_state()
    try:
        _set_random_state(state)
        yield
    finally:
        _set_random_state(before)


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


Path = tuple[Any, ...]  # keys and indices from a model's return value down to one tensor


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in a nest of tuples, lists and dicts, with the path to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a nest of tuples, lists and dicts, in the order of `leaves`.

    Without their paths, for what is asked in every step.
    """
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, (dict, tuple, list))
    return [tensor for item in inner for tensor in tensors_in(item)] if nested else []


def versions(value: Any) -> list[int]:
    """How often each tensor in a nest has been changed in place."""
    return [tensor._version for tensor in tensors_in(value)]


def follow(value: Any, path: Path) -> Tensor:
    """The tensor at a path that `leaves` gave."""
    for key in path:
        value = value[key]
    if not isinstance(value, Tensor):
        raise TypeError(f"the model returned {type(value).__name__} and not a tensor")
    return value


class Bridge:
    """What the user does between the model's output z and the criterion's input, linearised.

    A reshape, a squeeze or a slice of logits is common: its Jacobian is all that is needed, and
    reverse mode gives it as the derivative of J'u in u, which stays when the graph is freed.
    """

    def __init__(self, source: Tensor, output: Tensor, path: Path) -> None:
        self.path, self.source = path, source.detach()
        self._u = torch.zeros_like(output, requires_grad=True)
        (self._pulled,) = torch.autograd.grad(
            output, source, self._u, create_graph=True, materialize_grads=True
        )
        # Nonlinear, and another output of the model could not be carried to the criterion.
        self.linear = self._pulled.requires_grad and torch.allclose(
            self.push(source.detach()), output.detach(), rtol=1e-5, atol=0
        )

    def pull(self, cotangent: Tensor) -> Tensor:
        """J'u: a cotangent at the criterion's input, carried back to the model's output."""
        with torch.enable_grad():
            tangent = torch.zeros_like(self._pulled, requires_grad=True)
            (pushed,) = torch.autograd.grad(
                self._pulled,
                self._u,
                tangent,
                retain_graph=True,
                create_graph=True,
                materialize_grads=True,
            )
            (pulled,) = torch.autograd.grad(
                pushed, tangent, cotangent.to(pushed.dtype), materialize_grads=True
            )
        return pulled

    def push(self, tangent: Tensor) -> Tensor:
        """J v: a tangent at the model's output, carried to the criterion's input."""
        with torch.enable_grad():
            (pushed,) = torch.autograd.grad(
                self._pulled, self._u, tangent, retain_graph=True, materialize_grads=True
            )
        return pushed
