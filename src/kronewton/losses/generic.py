"""Λ of any criterion: autograd's Hessian in the output, cut into blocks, made positive."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import Node

from kronewton.errors import CriterionError, UnsupportedError
from kronewton.losses.base import OutputCurvature, at_least_float32
from kronewton.losses.checks import told
from kronewton.losses.criteria import element_weights

DENSE_LIMIT = 2048  # output elements that may be coupled with each other
BLOCKS_LIMIT = 2**26  # numbers in all blocks together


@dataclass(frozen=True)
class Projected(OutputCurvature):
    """Any criterion: autograd's Hessian in the output, its negative eigenvalues set to zero.

    Two output elements that differ in a dimension along which the Hessian couples nothing belong
    to two blocks. An elementwise loss takes one Hessian product in all, a loss per position
    as many as there are classes. Found when first asked for: weights alone cost nothing.
    """

    criterion: nn.Module
    output: Tensor
    targets: tuple[Any, ...]
    lead: int

    @cached_property
    def weights(self) -> Tensor:
        return element_weights(self.criterion, self.output, self.lead, None)

    @property
    def note(self) -> str:
        blocks, name = self._blocks, type(self.criterion).__name__
        if not blocks.curved:
            return f"{name} has no curvature in the output here: its Hessian is zero."
        negative = "had negative eigenvalues, set to zero" if blocks.negative else "was positive"
        mixes = self.lead == 1 and 0 in blocks.coupled
        return f"The Hessian of {name} in the output is autograd's and {negative}." + (
            " It mixes examples, which Kronecker factors cannot follow." if mixes else ""
        )

    @cached_property
    def _blocks(self) -> Blocks:
        with _hessian_product(self.criterion, self.output, self.targets) as hessian:
            coupled, diagonal = _coupled_dimensions(hessian, self.output)
            if not coupled:
                return _projected(diagonal.reshape(-1, 1, 1), coupled, range(diagonal.dim()))
            return _blocks(hessian, self.output, coupled, type(self.criterion).__name__)

    @property
    def curved(self) -> bool:
        return self._blocks.curved

    @property
    def column_count(self) -> int:
        return self.output.numel() // self._examples

    @property
    def _examples(self) -> int:
        return self.output.shape[0] if self.lead and 0 not in self._blocks.coupled else 1

    def columns(self) -> Iterator[Tensor]:
        root = self._blocks.root
        K = root.shape[-1]
        root = root.reshape(self._examples, -1, K, K)  # (N, positions, K, V)
        for position, v in itertools.product(range(root.shape[1]), range(K)):
            column = torch.zeros_like(root[..., 0])
            column[:, position] = root[:, position, :, v]
            yield self._blocks.back(column.reshape(-1, K), self.output)

    def draw(self, generator: Generator) -> Tensor:
        root = self._blocks.root  # (P, K, V)
        signs = torch.randint(
            0, 2, (root.shape[0], 1, root.shape[2]), generator=generator, device=root.device
        )
        # Sums, not matrix products: autocast would take those in half precision.
        return self._blocks.back((root * (2 * signs - 1)).sum(2), self.output)

    def product(self, v: Tensor) -> Tensor:
        root = self._blocks.root
        inner = (root * self._blocks.rows(v).unsqueeze(2)).sum(1, keepdim=True)  # (P, 1, V)
        return self._blocks.back((root * inner).sum(2), self.output)


@dataclass(frozen=True)
class Blocks:
    """The Hessian's projected blocks: P blocks of the K elements that are coupled."""

    root: Tensor  # (P, K, V): root @ root.mT is a block
    coupled: tuple[int, ...]  # dimensions of the output
    free: tuple[int, ...]
    curved: bool  # anything is not zero
    negative: bool  # there was something to project

    def rows(self, v: Tensor) -> Tensor:
        """The output's layout as (P, K)."""
        return v.permute((*self.free, *self.coupled)).reshape(self.root.shape[:2])

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        """(P, K) in the output's layout."""
        order = (*self.free, *self.coupled)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return rows.reshape([like.shape[d] for d in order]).permute(inverse).contiguous()


@contextlib.contextmanager
def _hessian_product(
    criterion: nn.Module, output: Tensor, targets: tuple[Any, ...]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """v ↦ Hv on a copy of the output: no autocast, hooks, trace in buffers or random state."""
    name = type(criterion).__name__
    devices = [output.device] if output.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.enable_grad(),
        torch.autocast(output.device.type, enabled=False),
        _stand_ins(criterion),
    ):
        x = output.clone().requires_grad_()
        loss = criterion.forward(x, *[_fixed(t) for t in targets])
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise CriterionError(
                f"{name} returned {told(loss)}; one number that depends on the output is "
                'allowed. Reduce the loss inside the criterion with "mean" or "sum".'
            )
        try:
            # A seed that requires grad: without one a function that is differentiable only once
            # looks linear, and leaves no trace in the graph.
            seed = torch.ones_like(loss).requires_grad_()
            (gradient,) = torch.autograd.grad(loss, x, seed, create_graph=True)
            if ends_in_an_error(gradient.grad_fn):
                raise RuntimeError("a function in it is marked once_differentiable")
        except RuntimeError as error:
            raise _once(name, error) from error

        def product(v: Tensor) -> Tensor:
            try:
                (Hv,) = torch.autograd.grad(
                    gradient, x, v, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise _once(name, error) from error
            return Hv

        yield product


def _once(name: str, error: RuntimeError) -> UnsupportedError:
    return UnsupportedError(
        f"{name} cannot be differentiated twice in the output ({error}). "
        + _way_out("a criterion that can be")
    )


def ends_in_an_error(node: Node | None) -> bool:
    """Whether a path through the graph stops at a node that torch put there to raise."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


def _fixed(target: Any) -> Any:
    if not isinstance(target, Tensor):
        return target
    target = target.detach()
    return at_least_float32(target) if target.is_floating_point() else target


@contextlib.contextmanager
def _stand_ins(criterion: nn.Module) -> Iterator[None]:
    """Inside, copies in at least float32 stand in for the criterion's parameters and buffers."""
    stores: list[dict[str, Any]] = [
        store for module in criterion.modules() for store in (module._parameters, module._buffers)
    ]
    originals = [dict(store) for store in stores]
    try:
        for store in stores:
            store.update({k: _fixed(t).clone() for k, t in store.items() if t is not None})
        yield
    finally:
        for store, original in zip(stores, originals, strict=True):
            store.clear()
            store.update(original)


def _coupled_dimensions(hessian: Callable[[Tensor], Tensor], x: Tensor) -> tuple[list[int], Tensor]:
    """Dimensions along which H couples different indices; all others cut it into blocks. And H1.

    Any two indices differ in a bit. For each bit, v lives on the half that has it set, and Hv on
    the other half tells: log₂ of the size products, and no pair is missed.
    """
    count = torch.arange(x.numel(), dtype=torch.float64, device=x.device).reshape(x.shape)
    v = (0.5 + (count * 0.6180339887498949) % 1).to(x.dtype)  # no two entries in a simple ratio
    rounding = 10 * torch.finfo(x.dtype).eps
    whole, diagonal = hessian(v), hessian(torch.ones_like(x))
    if bool(((whole - v * diagonal).abs() <= rounding * whole.abs()).all()):
        return [], diagonal  # most criteria couple nothing, and two products show it
    coupled = []
    for d, size in enumerate(x.shape):
        index = torch.arange(size, device=x.device).reshape(-1, *[1] * (x.dim() - d - 1))
        for bit in range((size - 1).bit_length()):
            inside = (index >> bit) % 2 == 1
            Hv = hessian(v * inside).abs()
            if bool(Hv.masked_fill(inside, 0).amax() > rounding * Hv.amax()):
                coupled.append(d)
                break
    return coupled, diagonal


def _blocks(
    hessian: Callable[[Tensor], Tensor], x: Tensor, coupled: list[int], name: str
) -> Blocks:
    """All blocks of the Hessian, symmetrised and projected; UnsupportedError if too large."""
    free = tuple(d for d in range(x.dim()) if d not in coupled)
    K = math.prod(x.shape[d] for d in coupled)
    P = x.numel() // K
    if K > DENSE_LIMIT or P * K * K > BLOCKS_LIMIT:
        raise UnsupportedError(
            f"{name} couples {K} elements of an output of shape {tuple(x.shape)} with each other; "
            f"up to {DENSE_LIMIT}, and {BLOCKS_LIMIT} numbers in all blocks, are allowed. "
            + _way_out("a criterion that sums over examples")
        )
    H = x.new_zeros(P, K, K)
    layout = Blocks(H, tuple(coupled), free, False, False)
    for k in range(K):
        unit = x.new_zeros(P, K)
        unit[:, k] = 1
        H[:, :, k] = layout.rows(hessian(layout.back(unit, x)))
    return _projected(H, coupled, free)


def _projected(H: Tensor, coupled: Sequence[int], free: Sequence[int]) -> Blocks:
    """Blocks (P, K, K), symmetrised and without their negative eigenvalues."""
    if H.shape[-1] == 1:
        s, root = H[..., 0], H.clamp(min=0).sqrt()
    elif bool(torch.isfinite(H).all()):
        s, U = torch.linalg.eigh((H + H.mT) / 2)
        root = U * s.clamp(min=0).sqrt().unsqueeze(1)
    else:
        s = root = torch.full_like(H, math.nan)
    negative = s.min() < -1000 * torch.finfo(H.dtype).eps * s.abs().max()
    return Blocks(root, tuple(coupled), tuple(free), bool(H.any()), bool(negative))


def _way_out(other: str) -> str:
    return (
        'Use fisher="empirical" with a number for lr and momentum, which need no Hessian, or '
        f"{other}."
    )
