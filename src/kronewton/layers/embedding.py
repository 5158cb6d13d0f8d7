"""`nn.Embedding` and `nn.EmbeddingBag`: y = W'a with a one-hot, or counting the tokens of a bag.

The matrix is the table transposed, (d, vocabulary). A token's row a is never laid out unless it
is asked for: A of an embedding is diagonal, and holds how often each token occurs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronewton.layers.base import (
    Call,
    Kind,
    Layer,
    Seen,
    at_least_float32,
    not_of_torch,
    rows_of,
)
from kronewton.structure import DENSE, DIAGONAL, Sides, Structure, side_of
from kronewton.types import Rows

CHUNK = 1 << 24  # numbers in the rows that are laid out at a time


@dataclass(frozen=True, eq=False)
class TokenRows(Rows):
    """Rows that are sums of few axes: K tokens each, with shares."""

    tokens: Tensor  # (N, S, K)
    shares: Tensor  # (N, S, K), 0 for a token that is not there
    size: int  # of the vocabulary

    @property
    def counts(self) -> tuple[int, int]:
        N, S = self.tokens.shape[:2]
        return N, S

    @property
    def width(self) -> int:
        return self.size

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        tokens, shares = self.tokens[start:stop], self.shares[start:stop]
        rows = shares.new_zeros(*tokens.shape[:2], self.size)
        return rows.scatter_add_(2, tokens, shares)

    def second_moment(self, weights: Tensor | None = None, structure: Structure = DENSE) -> Tensor:
        if self.tokens.shape[-1] == 1 or structure == DIAGONAL:
            counts = self._squares(weights)
            return counts if structure == DIAGONAL else structure.of_dense(torch.diag(counts))
        step = max(1, CHUNK // max(1, self.counts[1] * self.size))
        moment = self.shares.new_zeros(structure.stored(self.size))
        for n in range(0, self.counts[0], step):
            flat = None if weights is None else weights[n : n + step].reshape(-1)
            moment += structure.second_moment(self.dense(n, n + step).flatten(0, 1), flat)
        return moment

    def _squares(self, weights: Tensor | None) -> Tensor:
        """Σ a², (vocabulary,): a token that stands twice in a row counts four times."""
        index, shares = self._merged()
        row, token = index // self.size, index % self.size
        squares = shares.square()
        if weights is not None:
            squares = squares * weights.reshape(-1)[row]
        return squares.new_zeros(self.size).index_add_(0, token, squares)

    def _merged(self) -> tuple[Tensor, Tensor]:
        """Pairs of row and token as row·vocabulary + token, each once, and their shares."""
        N, S, K = self.tokens.shape
        row = torch.arange(N * S, device=self.tokens.device).reshape(N, S, 1)
        index, shares = (row * self.size + self.tokens).flatten(), self.shares.flatten()
        if K == 1:
            return index, shares
        once, place = index.unique(return_inverse=True)
        return once, shares.new_zeros(len(once)).index_add_(0, place, shares)

    def squares(self) -> Tensor:
        return self._squares(None).sum()

    def some(self, start: int, stop: int) -> Rows:
        return TokenRows(self.tokens[start:stop], self.shares[start:stop], self.size)

    def averaged(self, shares: Tensor | None = None) -> Rows:
        N, S = self.counts
        share = self.shares / S if shares is None else self.shares * shares.unsqueeze(-1)
        return TokenRows(self.tokens.reshape(N, 1, -1), share.reshape(N, 1, -1), self.size)


class TableKind(Kind):
    """What embeddings and bags share: the table as a matrix, and how its factors are stored."""

    def layers(self, name: str, module: nn.Module, own: Sequence[str]) -> list[Layer]:
        return [Layer(name, module, self, ("weight",))] if "weight" in own else []

    def matrix(self, layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].t()

    def split(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        return {"weight": matrix.t()}

    def sides(self, shape: Sequence[int], largest: int, sharing: str) -> Sides:
        d_out, size = shape[-2:]
        # One token is one axis: only sums of tokens, averages or bags, leave the diagonal.
        sums = sharing in ("reduce", "best") and size <= largest
        return Sides(DENSE if sums else DIAGONAL, side_of(d_out, size, largest))


class EmbeddingKind(TableKind):
    """One token at each position (N, *positions)."""

    name = "embedding"

    def see(self, layer: Layer, call: Call) -> Seen | None:
        module, output = layer.module, call.output
        assert isinstance(module, nn.Embedding)
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        given = call.argument(0, "input")
        return token_sight(given, output, len(module.weight), module.padding_idx)

    def refusal(self, module: nn.Module) -> str:
        if getattr(module, "scale_grad_by_freq", False):
            return "scale_grad_by_freq changes its gradient"
        return not_of_torch(module, (nn.Embedding,))


def token_sight(given: Tensor, output: Tensor, size: int, padding: int | None) -> Seen:
    """What a look-up of tokens (N, *positions) in a table shows."""
    N = len(given) if given.dim() else 1
    tokens = given.detach().reshape(N, -1, 1).long().clone()
    shares = at_least_float32(output.detach()).new_ones(tokens.shape)
    if padding is not None:  # a row of zeros: the padding's vector is no function of the table
        shares = shares * (tokens != padding)

    def rows(gradients: Sequence[Tensor | None]) -> Tensor:
        (u,) = gradients
        assert u is not None
        return at_least_float32(u).reshape(*tokens.shape[:2], -1)

    return Seen(TokenRows(tokens, shares, size), (output,), rows, batched=given.dim() > 0)


class BagKind(TableKind):
    """A sum or mean of tokens for each example: one row with several entries."""

    name = "embedding bag"

    def sides(self, shape: Sequence[int], largest: int, sharing: str) -> Sides:
        return super().sides(shape, largest, "reduce")

    def see(self, layer: Layer, call: Call) -> Seen | None:
        module, output = layer.module, call.output
        assert isinstance(module, nn.EmbeddingBag)
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        tokens, shares = _bags(module, call, at_least_float32(output.detach()))
        a = TokenRows(tokens.unsqueeze(1), shares.unsqueeze(1), len(module.weight))

        def rows(gradients: Sequence[Tensor | None]) -> Tensor:
            (u,) = gradients
            assert u is not None
            return rows_of(at_least_float32(u))

        return Seen(a, (output,), rows)

    def refusal(self, module: nn.Module) -> str:
        if getattr(module, "mode", "") == "max":
            return "the maximum over a bag takes every dimension from a token of its own"
        if getattr(module, "scale_grad_by_freq", False):
            return "scale_grad_by_freq changes its gradient"
        return not_of_torch(module, (nn.EmbeddingBag,))


def _bags(module: nn.EmbeddingBag, call: Call, like: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of each bag, padded to the longest one, and their shares: (bags, K) each."""
    given = call.argument(0, "input").detach().long().clone()
    weights = call.argument(2, "per_sample_weights")
    weights = like.new_ones(given.shape) if weights is None else weights.detach().to(like.dtype)
    if given.dim() == 1 and not len(given):  # every bag is empty
        given, weights = given.new_zeros(1), weights.new_zeros(1)
    if given.dim() == 1:
        offsets = call.argument(1, "offsets").detach()
        if not module.include_last_offset:
            ends = call.argument(0, "input").shape[0]
            offsets = torch.cat([offsets, offsets.new_tensor([ends])])
        starts, ends = offsets[:-1], offsets[1:]
        place = torch.arange(int((ends - starts).max().clamp_min(1)), device=given.device)
        at = starts.unsqueeze(1) + place  # (bags, K)
        inside = at < ends.unsqueeze(1)
        at = at.clamp(max=max(0, len(given) - 1))
        given, weights = given[at], weights[at] * inside
    if module.padding_idx is not None:
        weights = weights * (given != module.padding_idx)
    if module.mode == "mean":
        counted = (weights != 0).sum(1, keepdim=True).clamp_min(1)
        weights = weights / counted
    return given, weights
