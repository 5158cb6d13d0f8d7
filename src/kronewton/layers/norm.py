"""The scale and shift of norms: y = w∘x̂ + bias.

A is the 1×1 matrix [1] and b an example's own gradient, summed over its positions: B ⊗ A is then
the exact block of both parameters together, for any batch whose examples do not mix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from kronewton.layers.base import (
    Call,
    Kind,
    Layer,
    Seen,
    as_column,
    at_least_float32,
    from_column,
    kept,
    not_of_torch,
    ones_like_examples,
)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *BATCH_NORMS, *INSTANCE_NORMS)


class NormKind(Kind):
    """Scale and shift as one column: (numbers, 1)."""

    name = "norm"

    def see(self, layer: Layer, call: Call) -> Seen | None:
        output = call.output
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        given = call.argument(0, "input")
        x = kept(next(iter(call.kwargs.values())) if given is None else given)
        batched = x.dim() >= _batched_dims(layer.module)
        x = x if batched else x.unsqueeze(0)
        normal = normalised(layer.module, x)  # x̂, in the shape of x

        def rows(gradients: Sequence[Tensor | None]) -> Tensor:
            (u,) = gradients
            assert u is not None
            u = at_least_float32(u).reshape(x.shape)
            own = {"weight": lambda: u * normal, "bias": lambda: u}
            parts = [_of_examples(layer.module, own[k]()) for k in layer.trained]
            return torch.cat(parts, 1).unsqueeze(1)  # (N, 1, numbers)

        return Seen(ones_like_examples(len(x), x), (output,), rows, batched=batched)

    def sums(self, layer: Layer) -> bool:
        return True

    def matrix(self, layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
        return as_column(tensors)

    def split(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        return from_column(layer, matrix)

    def refusal(self, module: nn.Module) -> str:
        return not_of_torch(module, NORMS)


def _batched_dims(module: nn.Module) -> int:
    """How many dimensions an input has at least, if its first one counts examples."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) + 1
    if isinstance(module, _InstanceNorm):  # (C, L) is an example alone
        return INSTANCE_NORMS.index(next(k for k in INSTANCE_NORMS if isinstance(module, k))) + 3
    return 2


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """x̂: what the module makes of x without its scale and shift."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    assert isinstance(module, _NormBase)
    moments = module.running_mean, module.running_var
    of_batch = module.training or moments[0] is None
    if isinstance(module, _BatchNorm):
        if of_batch:
            return F.batch_norm(x, None, None, training=True, eps=module.eps)
        return F.batch_norm(x, _like(x, moments[0]), _like(x, moments[1]), eps=module.eps)
    if of_batch or not module.track_running_stats:
        return F.instance_norm(x, eps=module.eps)
    mean, var = (_like(x, m) for m in moments)
    return F.instance_norm(x, mean, var, use_input_stats=False, eps=module.eps)


def _like(x: Tensor, moment: Tensor | None) -> Tensor | None:
    return None if moment is None else moment.to(x.dtype)


def _of_examples(module: nn.Module, u: Tensor) -> Tensor:
    """u in the shape of the input, summed over positions: (N, numbers)."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        size = len(module.normalized_shape)
        return u.reshape(len(u), -1, u.shape[-size:].numel()).sum(1)
    return u.flatten(2).sum(2) if u.dim() > 2 else u
