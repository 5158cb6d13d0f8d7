"""`nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells: matrices that every time step uses again.

torch runs all time steps in one function, and no module's output shows what arrives at the gates.
So a call is run again here, step by step and from detached inputs. What is recorded of it is a
tape: gradients in the module's own outputs are taken back along it, and what arrives at the gates'
pre-activations are the rows b. Time steps are positions of the same examples.

Each level and direction is a strand, of up to three matrices: `ih` on the inputs, `hh` on the
hidden state before, and `hr`, which projects the hidden state. Its symbols, in its own time:

| symbol | shape | meaning |
|---|---|---|
| x, h, c | (T, N, d), (T, N, P), (T, N, H) | inputs, hidden states, and an LSTM's cells |
| z | (T, N, gates·H) | what the inputs and the biases give to the pre-activations |
| inner | (T, N, H) | an LSTM's hidden state before its projection, or a GRU's reset gate |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from kronewton.layers.attention import ProjectionKind
from kronewton.layers.base import (
    Call,
    Layer,
    Seen,
    at_least_float32,
    kept,
    not_of_torch,
)
from kronewton.layers.linear import LinearKind

CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU, *CELLS)
PARTS = ("ih", "hh", "hr")
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


class GateKind(ProjectionKind):
    """One matrix of a strand: of the gates, or of the projection."""

    name = "recurrent"
    hooked = True

    def __init__(self, part: str, suffix: str) -> None:
        super().__init__(f"weight_{part}{suffix}", f"bias_{part}{suffix}")
        self.part, self.suffix = part, suffix

    def watch(self, layers: Sequence[Layer], call: Call) -> list[Seen | None]:
        outputs = _outputs(call)
        moving = any(p.requires_grad for layer in layers for p in layer.whole().values())
        if not moving or not any(t.requires_grad for t in outputs):
            return [None] * len(layers)
        kinds = [layer.kind for layer in layers if isinstance(layer.kind, GateKind)]
        wanted = {(kind.part, kind.suffix) for kind in kinds}
        frame = frame_of(layers[0].module, call)
        # A recorder of torch's functions may be listening, and these are not the model's.
        with torch.enable_grad(), torch._C.DisableTorchFunction():
            tape = Tape(rerun(layers[0].module, frame, call, wanted), outputs, len(layers))
        return [self._seen(layer, tape, frame) for layer in layers]

    def _seen(self, layer: Layer, tape: Tape, frame: Frame) -> Seen:
        kind = layer.kind
        assert isinstance(kind, GateKind)
        strand = tape.strands[kind.suffix]
        inputs = frame.examples(strand.inputs(kind.part), strand.reverse)
        a = kind.input_rows(kind._named(layer), inputs, inputs.shape)

        def rows(gradients: Sequence[Tensor | None]) -> Tensor:
            b = strand.output_rows(kind.part, tape.gradients(layer, gradients))
            return frame.examples(b, strand.reverse)

        return Seen(a, tape.outputs, rows, frame.present, frame.batched)


class RecurrentKind(LinearKind):
    """The module as a whole: which layers it is."""

    name = "recurrent"

    def layers(self, name: str, module: nn.Module, own: Sequence[str]) -> list[Layer]:
        dot, found = f"{name}." if name else "", []
        for suffix in suffixes(module):
            for part in PARTS:
                kind = GateKind(part, suffix)
                trained = tuple(k for k in (kind.weight, kind.bias) if k in own)
                if trained:
                    found.append(Layer(f"{dot}{part}{suffix}", module, kind, trained))
        return found

    def refusal(self, module: nn.Module) -> str:
        if getattr(module, "dropout", 0) and getattr(module, "num_layers", 1) > 1:
            return "its dropout between levels cannot be repeated"
        return not_of_torch(module, RECURRENT)


def suffixes(module: nn.Module) -> list[str]:
    """What follows the names of the parameters of each strand, in the order of torch's states."""
    if not isinstance(module, nn.RNNBase):
        return [""]
    ways = ("", "_reverse") if module.bidirectional else ("",)
    return [f"_l{level}{way}" for level in range(module.num_layers) for way in ways]


# How a module lays out its sequences.


class Frame(ABC):
    """The way from a module's layout of its sequences to (T, N, d), and back."""

    N: int
    batched = True
    present: Tensor | None = None  # (N, T), False at padding

    @abstractmethod
    def enter(self) -> Tensor:
        """The call's input, (T, N, d)."""

    @abstractmethod
    def leave(self, y: Tensor) -> Tensor:
        """Outputs (T, N, d) in the module's layout, but for dimensions of one."""

    @abstractmethod
    def reversed(self, x: Tensor) -> Tensor:
        """Each sequence from its end to its start, what is padding staying where it is."""

    @abstractmethod
    def last(self, states: Sequence[Tensor]) -> Tensor:
        """Of the states (N, d) of all time steps the one at each sequence's end."""

    def examples(self, x: Tensor, reverse: bool) -> Tensor:
        """Rows (T, N, d) of a strand as examples and their positions: (N, T, d)."""
        return (self.reversed(x) if reverse else x).transpose(0, 1)


class Full(Frame):
    """Sequences of one length, or the one time step of a cell."""

    def __init__(self, module: nn.Module, given: Tensor) -> None:
        cell = isinstance(module, CELLS)
        self.given, self.batched = given, given.dim() > 2 - cell
        examples = given if self.batched else given.unsqueeze(0 if cell else 1)
        self.first = self.batched and bool(getattr(module, "batch_first", False))
        x = examples.unsqueeze(0) if cell else examples
        self.x = x.transpose(0, 1) if self.first else x
        self.N = self.x.shape[1]

    def enter(self) -> Tensor:
        return kept(self.x).contiguous()  # one product for all time steps, not one for each

    def leave(self, y: Tensor) -> Tensor:
        return y.transpose(0, 1) if self.first else y

    def reversed(self, x: Tensor) -> Tensor:
        return x.flip(0)

    def last(self, states: Sequence[Tensor]) -> Tensor:
        return states[-1]


class Packed(Frame):
    """Sequences of several lengths, padded here, in the order of the examples before sorting.

    A strand runs from each sequence's start (or end, backwards) through its padding: what it
    makes of that leads to no output, and no state need be held back at a sequence's end.
    """

    def __init__(self, packed: PackedSequence) -> None:
        self.data, sizes = packed.data, packed.batch_sizes.cpu()
        self.T, self.N = len(sizes), int(sizes[0])
        every = torch.arange(self.N, device="cpu")
        time, place = (every < sizes.unsqueeze(1)).nonzero(as_tuple=True)
        time, place = time.to(self.data.device), place.to(self.data.device)
        if packed.sorted_indices is not None:
            place = packed.sorted_indices[place]
        self.places = time * self.N + place  # of every row of the data, among T·N
        here = torch.zeros(self.T * self.N, dtype=torch.bool, device=self.data.device)
        here[self.places] = True
        here = here.reshape(self.T, self.N)
        self.present, self.lengths = here.t(), here.sum(0)
        t = torch.arange(self.T, device=self.data.device).unsqueeze(1)
        self.mirror = torch.where(here, self.lengths - 1 - t, t)  # (T, N)

    def enter(self) -> Tensor:
        data = at_least_float32(self.data.detach())
        x = data.new_zeros(self.T * self.N, data.shape[1])
        return x.index_copy_(0, self.places, data).reshape(self.T, self.N, -1)

    def leave(self, y: Tensor) -> Tensor:
        return y.flatten(0, 1)[self.places]

    def reversed(self, x: Tensor) -> Tensor:
        return x.gather(0, self.mirror.unsqueeze(-1).expand_as(x))

    def last(self, states: Sequence[Tensor]) -> Tensor:
        x = torch.stack(list(states))
        return x.gather(0, (self.lengths - 1)[None, :, None].expand_as(x[:1])).squeeze(0)

    def examples(self, x: Tensor, reverse: bool) -> Tensor:
        assert self.present is not None
        return super().examples(x, reverse).masked_fill(~self.present.unsqueeze(-1), 0)


def frame_of(module: nn.Module, call: Call) -> Frame:
    """How the sequences of a call are laid out."""
    given = call.argument(0, "input")
    return Packed(given) if isinstance(given, PackedSequence) else Full(module, given)


def _outputs(call: Call) -> list[Tensor]:
    """The tensors that a call returned: y, h_n and c_n, or a cell's h and c."""
    found: list[Tensor] = []
    for item in call.output if type(call.output) is tuple else (call.output,):
        if isinstance(item, PackedSequence):
            found.append(item.data)
        else:
            found += item if isinstance(item, tuple) else (item,)
    return found


# The second run.


class Weights(NamedTuple):
    """The parameters of a strand, detached."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None


def weights_of(module: nn.Module, suffix: str) -> Weights:
    """What the module computes with, in at least float32."""
    if isinstance(module, nn.RNNBase):  # has a list of its own, which its forward uses
        table = dict(zip(module._flat_weights_names, module._flat_weights, strict=True))
    else:
        table = {name: getattr(module, name) for name in WEIGHTS[:4]}
    found: list[Any] = [table.get(name + suffix) for name in WEIGHTS]
    own: list[Any] = [p if p is None else at_least_float32(p.detach()) for p in found]
    return Weights(*own)


class Scan(NamedTuple):
    """What one strand did, a tensor for each time step."""

    h: list[Tensor]
    c: list[Tensor]  # of an LSTM only
    inner: list[Tensor]  # of a GRU, and of an LSTM with a projection


Pass = Callable[[Tensor, Tensor, "Tensor | None", Weights, "Tensor | None"], Scan]


def _simple(
    nonlinearity: Callable[[Tensor], Tensor],
    z: Tensor,
    h: Tensor,
    c: Tensor | None,
    own: Weights,
    probe: Tensor | None,
) -> Scan:
    """h ← φ(z + W_hh h)."""
    scan, across = Scan([], [], []), own.hh.t()
    for gates in z.unbind():
        h = nonlinearity(torch.addmm(gates, h, across))
        scan.h.append(h)
    return scan


def _lstm(z: Tensor, h: Tensor, c: Tensor | None, own: Weights, probe: Tensor | None) -> Scan:
    """c ← σ(f)∘c + σ(i)∘tanh(g), h ← W_hr (σ(o)∘tanh(c)), with i, f, g, o = z + W_hh h."""
    assert c is not None
    scan, across = Scan([], [], []), own.hh.t()
    probes = probe.unbind() if probe is not None else ()
    for t, gates in enumerate(z.unbind()):
        i, f, g, o = torch.addmm(gates, h, across).chunk(4, 1)
        c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
        h = o.sigmoid() * c.tanh()
        if own.hr is not None:
            scan.inner.append(h)
            h = torch.addmm(probes[t], h, own.hr.t())
        scan.h.append(h)
        scan.c.append(c)
    return scan


def _lstm_apart(z: Tensor, h: Tensor, c: Tensor | None, own: Weights, probe: Tensor | None) -> Scan:
    """One step of an LSTM whose h does not lead back to its c."""
    assert c is not None
    i, f, g, o = torch.addmm(z[0], h, own.hh.t()).chunk(4, 1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
    return Scan([o.sigmoid() * c.detach().tanh()], [c], [])


def _gru(z: Tensor, h: Tensor, c: Tensor | None, own: Weights, probe: Tensor | None) -> Scan:
    """h ← (1 − u)∘n + u∘h with n = tanh(z_n + r∘(W_hh h)_n); r, u are gates."""
    scan, across, H = Scan([], [], []), own.hh.t(), h.shape[1]
    shift = h.new_zeros(3 * H) if own.bias_hh is None else own.bias_hh
    gates, new = z.split([2 * H, H], 2)
    for z_ru, z_n in zip(gates.unbind(), new.unbind(), strict=True):
        hidden_ru, hidden_n = torch.addmm(shift, h, across).split([2 * H, H], 1)
        r, u = (z_ru + hidden_ru).sigmoid().chunk(2, 1)
        h = torch.lerp(torch.addcmul(z_n, r, hidden_n).tanh(), h, u)
        scan.h.append(h)
        scan.inner.append(r)
    return scan


PASSES: dict[str, Pass] = {
    "RNN_TANH": partial(_simple, torch.tanh),
    "RNN_RELU": partial(_simple, torch.relu),
    "LSTM": _lstm,
    "LSTM apart": _lstm_apart,
    "GRU": _gru,
}


def mode_of(module: nn.Module, call: Call) -> str:
    """Which of the passes a module made in a call."""
    if isinstance(module, nn.RNNBase):
        return str(module.mode)
    if isinstance(module, nn.RNNCell):
        return f"RNN_{module.nonlinearity.upper()}"
    if isinstance(module, nn.GRUCell):
        return "GRU"
    # Without a fused kernel h is made from the very tensor c that is returned, and what arrives in
    # c has the part that comes by way of h in it already.
    h, c = call.output
    return "LSTM apart" if _made_from(h, c) else "LSTM"


def _made_from(h: Tensor, c: Tensor) -> bool:
    """Whether c is a step of the graph that leads to h, near its end."""
    nodes = [h.grad_fn]
    for _ in range(2):
        nodes = [below for node in nodes if node for below, _ in node.next_functions]
    return c.grad_fn is not None and c.grad_fn in nodes


@dataclass(frozen=True, eq=False)
class Strand:
    """One level in one direction, as it ran."""

    x: Tensor  # (T, N, d)
    before: Tensor  # (T, N, P), the hidden state that each time step starts from
    inner: Tensor | None  # (T, N, H)
    z: Tensor  # (T, N, gates·H), on the tape
    probe: Tensor | None  # (T, N, P), zeros that are added to the projection, on the tape
    resets: bool  # whether `inner` is a GRU's reset gate
    reverse: bool

    def inputs(self, part: str) -> Tensor:
        """Of one of the matrices: (T, N, d_in)."""
        found = {"ih": self.x, "hh": self.before, "hr": self.inner}[part]
        assert found is not None
        return found

    def source(self, part: str) -> Tensor:
        """The tensor on the tape whose gradient gives the rows b."""
        found = self.probe if part == "hr" else self.z
        assert found is not None
        return found

    def output_rows(self, part: str, gradient: Tensor) -> Tensor:
        """b in (T, N, d_out), by the gradient in the source."""
        if part != "hh" or not self.resets:
            return gradient
        assert self.inner is not None
        H = self.inner.shape[2]  # r stands between W_hh h and the new state
        return torch.cat([gradient[..., : 2 * H], gradient[..., 2 * H :] * self.inner], 2)


class Run(NamedTuple):
    """A call that was run again."""

    strands: dict[str, Strand]  # by the ends of their parameters' names
    outputs: list[Tensor]  # as the module's, but for dimensions of one
    sources: dict[tuple[str, str], Tensor]  # by part and suffix: where gradients are wanted


def rerun(module: nn.Module, frame: Frame, call: Call, wanted: set[tuple[str, str]]) -> Run:
    """Run a call again, and record the tape from the first of the wanted matrices on."""
    pending, ways = suffixes(module), 1 + bool(getattr(module, "bidirectional", False))
    y, strands, ends = frame.enter(), {}, []
    mode = mode_of(module, call)
    states = _states(module, frame, call, y)
    for start in range(0, len(pending), ways):
        made = []
        for k, suffix in enumerate(pending[start : start + ways]):
            parts = {part for part, end in wanted if end == suffix}
            x = frame.reversed(y) if k else y
            own = weights_of(module, suffix)
            scan, strands[suffix] = _strand(mode, own, x, next(states), parts, bool(k))
            h = torch.stack(scan.h)
            made.append(frame.reversed(h) if k else h)
            ends.append([frame.last(s) for s in (scan.h, scan.c) if s])
        y = torch.cat(made, 2) if ways > 1 else made[0]
    last = [torch.stack(s) for s in zip(*ends, strict=True)]
    outputs = last if isinstance(module, CELLS) else [frame.leave(y), *last]
    return Run(strands, outputs, {(p, s): strands[s].source(p) for p, s in wanted})


def _states(
    module: nn.Module, frame: Frame, call: Call, like: Tensor
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The states h and c that each strand starts from."""
    given, count = call.argument(1, "hx"), len(suffixes(module))
    if given is None:
        H: Any = module.hidden_size
        widths = getattr(module, "proj_size", 0) or H, H
        given = [like.new_zeros(count, frame.N, width) for width in widths]
    states = [given] if isinstance(given, Tensor) else given
    h, *c = [kept(s).reshape(count, frame.N, -1).unbind() for s in states]
    with_cells = isinstance(module, (nn.LSTM, nn.LSTMCell))
    return zip(h, c[0] if with_cells else [None] * count, strict=True)


def _strand(
    mode: str,
    own: Weights,
    x: Tensor,
    state: tuple[Tensor, Tensor | None],
    parts: set[str],
    reverse: bool,
) -> tuple[Scan, Strand]:
    """Run one level in one direction over x (T, N, d)."""
    (h, c), shift = state, own.bias_ih
    if mode != "GRU" and shift is not None and own.bias_hh is not None:
        shift = shift + own.bias_hh
    z = F.linear(x, own.ih, shift)  # of all time steps at once
    if not z.requires_grad and parts & {"ih", "hh"}:
        z.requires_grad_()
    probe = None
    if own.hr is not None:
        probe = h.new_zeros(*x.shape[:2], len(own.hr)).requires_grad_("hr" in parts)
    scan = PASSES[mode](z, h, c, own, probe)
    before = torch.stack([h, *scan.h[:-1]]).detach()
    inner = torch.stack(scan.inner).detach() if scan.inner else None
    return scan, Strand(x.detach(), before, inner, z, probe, mode == "GRU", reverse)


class Tape:
    """The graph of a second run, and the way back along it, which all layers of a call share."""

    def __init__(self, run: Run, outputs: Sequence[Tensor], takers: int) -> None:
        pairs = list(zip(outputs, run.outputs, strict=True))
        self.strands, self.sources = run.strands, run.sources
        self.outputs = tuple(theirs for theirs, _ in pairs if theirs.requires_grad)
        self._ends = [own.reshape(theirs.shape) for theirs, own in pairs if theirs.requires_grad]
        self._takers = takers
        self._found: dict[Any, _Found] = {}

    def gradients(self, layer: Layer, given: Sequence[Tensor | None]) -> Tensor:
        """The gradient at a layer's source, by the gradients in the module's outputs.

        Several sets of them (draws, columns) may be asked for by one layer after the other. Each
        is taken back once, and kept until every layer has had it.
        """
        kind = layer.kind
        assert isinstance(kind, GateKind)
        key = tuple(None if g is None else _identity(g) for g in given)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = _Found(given, self._back(given), [])
        found.taken.append(layer.name)
        if len(found.taken) >= self._takers:
            del self._found[key]
        return found.gradients[kind.part, kind.suffix]

    def _back(self, given: Sequence[Tensor | None]) -> dict[tuple[str, str], Tensor]:
        pairs = [
            (end, at_least_float32(g).to(end.dtype))
            for end, g in zip(self._ends, given, strict=True)
            if g is not None and end.requires_grad
        ]
        if not pairs:
            return {key: torch.zeros_like(source) for key, source in self.sources.items()}
        ends, gradients = zip(*pairs, strict=True)
        sources = list(self.sources.values())
        found = torch.autograd.grad(
            ends, sources, gradients, retain_graph=True, materialize_grads=True
        )
        return dict(zip(self.sources, found, strict=True))


class _Found(NamedTuple):
    """What one set of gradients led to."""

    given: Sequence[Tensor | None]  # held, so that no other one takes their place in memory
    gradients: dict[tuple[str, str], Tensor]
    taken: list[str]  # by which layers


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """The same for two tensors that are the same numbers in memory: hooks detach what they get."""
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()
