"""What torch calls: hooks that live no longer than the watcher that they tell."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kronewton.layers.base import at_least_float32
from kronewton.part import LayerCall, Part


class Told(Protocol):
    """A watcher, as hooks know it."""

    @property
    def inert(self) -> bool:
        """Whether what happens now is its own doing, or another watcher's."""

    def commit(self, part: Part, weight: Tensor) -> None:
        """The gradient has arrived that a part's loss is weighted with."""

    def arrived(self, call: LayerCall, k: int, gradient: Tensor) -> None:
        """A training gradient has arrived in a layer's output number k."""

    def received(self, i: int, gradient: Tensor) -> None:
        """The gradient has arrived in a model's output of this id."""


class Hook:
    """A forward hook that lives no longer than its watcher.

    Holds weak references only: a deep copy of the model copies its hooks, and those must not
    write the copy's statistics into the original's, nor keep an optimizer alive.
    """

    def __init__(self, watcher: Told, module: nn.Module, method: str) -> None:
        self._watcher, self._module = weakref.ref(watcher), weakref.ref(module)
        self._method = method

    def __call__(self, module: nn.Module, *args: Any) -> None:
        watcher = self._watcher()
        if watcher is not None and self._module() is module:
            getattr(watcher, self._method)(module, *args)

    def __deepcopy__(self, memo: Any) -> Hook:
        return self

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _dead_hook, ()  # a pickled model has no optimizer


def _dead_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class Commit:
    """On the loss, or on an observed output: reads the weight of a part, and commits it.

    rather: one nearer to the loss, which leaves nothing to do here if a gradient arrives there.
    """

    def __init__(
        self,
        watcher: Told,
        part: Part,
        expected: Tensor | None = None,
        rather: Commit | None = None,
    ) -> None:
        self._watcher, self._part, self._expected = weakref.ref(watcher), part, expected
        self._rather, self.called = rather, False

    def __call__(self, gradient: Tensor) -> None:
        watcher = self._watcher()
        if watcher is None or watcher.inert or (self._rather and self._rather.called):
            return
        self.called = True
        weight = at_least_float32(gradient.detach())
        if self._expected is not None:
            # Projected on the criterion's own gradient: the loss is a multiple of the criterion.
            wide, expected = weight.double(), self._expected.double()
            wide = (wide * expected).sum() / expected.square().sum().clamp_min(1e-30)
            weight = wide.to(weight.dtype)
        watcher.commit(self._part, weight)


class Received:
    """On an output of the model: the gradient of the whole loss has arrived."""

    def __init__(self, watcher: Told, i: int) -> None:
        self._watcher, self._i = weakref.ref(watcher), i

    def __call__(self, gradient: Tensor) -> None:
        watcher = self._watcher()
        if watcher is not None and not watcher.inert and not torch.is_grad_enabled():
            watcher.received(self._i, gradient.detach())


class Arrival:
    """On a layer's output: a training gradient has arrived."""

    def __init__(self, watcher: Told, call: LayerCall, k: int) -> None:
        self._watcher, self._k = weakref.ref(watcher), k
        self._call: LayerCall | None = call

    def let_go(self) -> None:
        """Forget the call: what it keeps may hold the output, in whose graph this hook is."""
        self._call = None

    def __call__(self, gradient: Tensor | None) -> None:
        watcher = self._watcher()
        if gradient is None:  # a fused function's output that the loss does not use
            return
        # With grad mode on it is a derivative that the loss is made of, and not the loss's own.
        if watcher is None or watcher.inert or torch.is_grad_enabled():
            return
        if self._call is not None:
            watcher.arrived(self._call, self._k, gradient.detach())

    def of_node(self, place: int) -> Callable[[tuple[Tensor, ...]], None]:
        """The same for a node of the graph, whose outputs' gradients come together."""

        def hook(gradients: tuple[Tensor, ...]) -> None:
            self(gradients[place])

        return hook


def remove(handles: list[Any]) -> None:
    """Of all that was registered, from the modules."""
    for handle in handles:
        handle.remove()
