"""Statistics of batches → running Kronecker factors, as sums with counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronewton.linalg import diagonal, second_moment
from kronewton.structure import DENSE, PLAIN, Sides, Structure
from kronewton.types import Statistics

CHUNK = 1 << 24  # numbers in one chunk of per-example gradients
PART = 4  # of the examples of a batch, every so many make up a part of it
MEASURED = 32  # examples from which sharing is chosen
LARGEST_MEASURED = 1 << 22  # numbers in a matrix up to which it is
SWEEPS, TOLERANCE = 30, 1e-5  # of the search for the best Kronecker product
TINY = 1e-30


@dataclass(frozen=True)
class Moment:
    """A sum and its count, never a mean.

    Micro-batches, running averages with their bias correction and shards of a batch are then all
    one addition.
    """

    total: Tensor
    count: Tensor  # ()

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.total + other.total, self.count + other.count)

    def after(self, earlier: Moment, decay: float) -> Moment:
        """Both together, the earlier one counting less."""
        total = torch.add(self.total, earlier.total, alpha=decay)
        return Moment(total, torch.add(self.count, earlier.count, alpha=decay))

    @property
    def mean(self) -> Tensor:
        return self.total / self.count


@dataclass(frozen=True)
class Factors:
    """The moments of one layer: A over rows, B over batches, and s in an eigenbasis if kept."""

    A: Moment  # (…, d_in, d_in), counted by the rows' weights in the loss
    B: Moment  # (…, d_out, d_out), counted by batches
    s: Moment | None = None  # (…, d_out, d_in), counted by batches
    sides: Sides = PLAIN  # how A and B are stored
    chance: Tensor | None = None  # Σ w²/n over batches of n rows, (), where these are known

    def then(self, batch: Factors, decay: float) -> Factors:
        """The running moments after one more batch."""
        s = self.s
        if batch.s is not None:
            s = batch.s if s is None else batch.s.after(s, decay)
        A, B = batch.A.after(self.A, decay), batch.B.after(self.B, decay)
        chance = None
        if self.chance is not None and batch.chance is not None:
            chance = torch.add(batch.chance, self.chance, alpha=decay**2)
        return Factors(A, B, s, self.sides, chance)

    @property
    def rows(self) -> Tensor | float:
        """As how many rows of one weight B's mean is as good; infinite if that is not known."""
        return math.inf if self.chance is None else self.B.count.square() / self.chance

    def totals(self) -> list[Tensor]:
        """What is summed up: of A, of B, and of s where it is kept."""
        return [m.total for m in (self.A, self.B, self.s) if m is not None]

    def found(self) -> tuple[bool, bool]:
        """Whether every number is finite, and whether there is any curvature."""
        # Diagonals are enough: a bad entry of a row reaches the diagonal through its square.
        a, b = self._traces()
        count = self.A.count.to(a.dtype)
        if a.dim():
            a, b = (a + b).sum(), (a / count * b).sum()
            sum_, product, counted = torch.stack([a, b, count]).tolist()  # one wait
            return math.isfinite(sum_), counted > 0 and product > 0
        of_A, of_B, counted = torch.stack([a, b, count]).tolist()
        finite = math.isfinite(of_A + of_B)
        return finite, counted > 0 and of_A / counted * of_B > 0

    def _traces(self) -> tuple[Tensor, Tensor]:
        """Of A's and of B's total, (…)."""
        return self.sides.input.trace(self.A.total), self.sides.output.trace(self.B.total)

    def _diagonals(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return self.sides.input.diagonal(A), self.sides.output.diagonal(B)

    @property
    def shape(self) -> tuple[int, int]:
        """d_out and d_in."""
        A, B = self._diagonals(self.A.total, self.B.total)
        return B.shape[-1], A.shape[-1]

    @property
    def size(self) -> int:
        """How many numbers the layer's matrix has."""
        A, B = self._diagonals(self.A.total, self.B.total)
        return A.numel() * B.shape[-1]

    def trace(self) -> Tensor:
        """Trace of B ⊗ A, ()."""
        a, b = self._traces()
        traces: Tensor = a / self.A.count * (b / self.B.count)
        return traces.sum() if traces.dim() else traces


Observation = tuple[Statistics, Tensor]  # and the weight of its part of the batch in the loss
Basis = tuple[Tensor, Tensor]  # U_A, U_B


def thinned(
    observations: Sequence[Observation], rows: int, turn: int, reduce: bool = False
) -> list[Observation]:
    """A quarter of every part's examples, but so many as have that many rows; unbiased.

    Making the factors then takes a quarter of the time, and where they run over many batches they
    are as good. turn: which examples, in turn with every batch. reduce: each will be one row.
    """
    return [(_thinned(stats, rows, turn, reduce), part) for stats, part in observations]


def _thinned(stats: Statistics, rows: int, turn: int, reduce: bool) -> Statistics:
    N, S = stats.a.counts
    count = max(math.ceil(N / PART), math.ceil(rows / (1 if reduce else max(1, S))))
    if count >= N:
        return stats
    cut = _cut(stats, *in_turn(N, count, turn))
    return replace(cut, b=cut.b * math.sqrt(N / count))  # a sum over examples: fewer stand for all


def in_turn(N: int, count: int, turn: int) -> tuple[int, int]:
    """From where to where so many of N examples are, others in every turn."""
    tiles = N // count
    # What tiles leave over is at the end in one round, and at the beginning in the next.
    start = turn % tiles * count + turn // tiles % 2 * (N % count)
    return start, start + count


def batch_factors(observations: Sequence[Observation], sides: Sides = PLAIN) -> Factors:
    """A and B of one layer over all parts of one batch: every position an example (expand).

    Grosse & Martens 2016, Eschenhagen et al. 2023, section 3.2.
    """
    A = _sum(_input_moment(stats, part, sides.input) for stats, part in observations)
    total = _total(
        part * sides.output.second_moment(stats.b.flatten(-4, -2)) for stats, part in observations
    )
    rows = sum(math.prod(stats.a.counts) * stats.b.shape[-4] for stats, _ in observations)
    chance = total.new_full((), 1 / rows) if rows else None
    return Factors(A, Moment(total, total.new_ones(())), None, sides, chance)


def _input_moment(stats: Statistics, part: Tensor, structure: Structure = DENSE) -> Moment:
    # Weighted by the loss: an example of weight 2 is that example twice, a masked one is not there.
    weights = stats.weights
    if weights.dim() == 0:
        N, S = stats.a.counts
        scale = part * weights
        return Moment(scale * stats.a.second_moment(None, structure), scale * (N * S))
    return Moment(part * stats.a.second_moment(weights, structure), part * weights.sum())


def reduced_factors(observations: Sequence[Observation], sides: Sides = PLAIN) -> Factors:
    """The same from one row for each example (reduce)."""
    return batch_factors(all_reduced(observations), sides)


def all_reduced(observations: Sequence[Observation]) -> list[Observation]:
    """Every part of a batch with one row for each example."""
    return [(reduced(stats), part) for stats, part in observations]


def reduced(stats: Statistics) -> Statistics:
    """One row for each example: inputs averaged over its positions, gradients summed.

    Eschenhagen et al. 2023, section 3.3. Masked positions are left out of the average.
    """
    S = stats.a.counts[1]
    if S == 1:
        return stats
    b = stats.b.sum(-2, keepdim=True)  # (…, V, N, 1, d_out)
    if stats.weights.dim() == 0:
        return replace(stats, a=stats.a.averaged(), b=b, weights=stats.weights * S)
    share = stats.weights.sum(1, keepdim=True)  # (N, 1)
    if not any(stats.weights.stride()[1:]):  # an example's positions weigh the same
        return replace(stats, a=stats.a.averaged(), b=b, weights=share)
    safe = torch.where(share > 0, share, torch.ones_like(share))
    a = stats.a.averaged(stats.weights / safe)  # (…, N, 1, d_in)
    return replace(stats, a=a, b=b, weights=share)


def nearer_sharing(observations: Sequence[Observation]) -> str:
    """ "expand" or "reduce", by what the batch shows.

    Where the loss has a term for each of several positions, expand: draws at different positions
    are independent, so that their cross terms vanish in the mean, and a batch's own would mislead.
    Where the same gradient comes back to all positions of an example they were pooled, and reduce
    has its gradient exactly. Otherwise whichever is nearer to the exact block. Factors come from
    some examples and the block from others: of the same ones, the factors with fewer rows would
    always fit better.
    """
    stats = observations[0][0]
    if any(s.loss_positions != 1 for s, _ in observations):
        return "expand"
    if all(_same_everywhere(s.b) for s, _ in observations):
        return "reduce"
    size = stats.a.width * stats.b.shape[-1]
    if size > LARGEST_MEASURED:
        return "expand"
    count = max(4, min(MEASURED, LARGEST_MEASURED // size))
    left, right = _halves(observations, count)
    distances = []
    for factors in (batch_factors(left), reduced_factors(left)):
        A, B = factors.A.mean, factors.B.mean
        inner = [part.clamp_min(0) * _overlap(seen, A, B) for seen, part in right]
        own = (_norm(A).square() * _norm(B).square()).sum()
        distances.append(own - 2 * torch.stack(inner).sum())  # less what both have in common
    expand, reduce = torch.stack(distances).tolist()
    return "reduce" if reduce < expand else "expand"


def _overlap(stats: Statistics, A: Tensor, B: Tensor) -> Tensor:
    """⟨H, B ⊗ A⟩ for the exact block H of a part, as a scalar.

    Σ tr(G'B G A) over per-example gradients G = Σ_s b_s a_s', which is Σ_st (b_s'B b_t)(a_s'A a_t):
    whichever is less work.
    """
    S, d_in, d_out = stats.a.counts[1], stats.a.width, stats.b.shape[-1]
    if d_in * d_out <= S * S:
        return _total(
            torch.einsum("...poi,...poi->", B.unsqueeze(-3) @ G @ A.unsqueeze(-3), G)
            for G in example_gradients(stats, B.new_ones(()))
        )
    a = stats.a.dense()  # (…, N, S, d_in)
    of_A = a @ A.unsqueeze(-3) @ a.mT  # (…, N, S, S)
    of_B = stats.b @ B[..., None, None, :, :] @ stats.b.mT  # (…, V, N, S, S)
    return (of_A.unsqueeze(-4) * of_B).sum()


def _same_everywhere(b: Tensor) -> bool:
    """Whether the rows b (…, N, S, d_out) of an example are the same, to rounding."""
    spread = (b - b.mean(-2, keepdim=True)).norm()
    return bool(spread <= 1e3 * torch.finfo(b.dtype).eps * b.norm())


def _halves(
    observations: Sequence[Observation], count: int
) -> tuple[list[Observation], list[Observation]]:
    """Of the first examples of a batch one half and the other, equally large; one is both.

    The middle one of an odd number is in both halves. Parts of one example are in one in turn.
    """
    left: list[Observation] = []
    right: list[Observation] = []
    for stats, part in observations[:count]:
        n = min(stats.a.counts[0], max(1, count // len(observations)))
        if n == 1 and len(observations) > 1:
            half = left if len(left) <= len(right) else right
            half.append((_cut(stats, 0, 1), part))
            continue
        left.append((_cut(stats, 0, -(-n // 2)), part))
        right.append((_cut(stats, n // 2, n), part))
    return left, right or left


def _cut(stats: Statistics, start: int, stop: int) -> Statistics:
    """The rows of some of the examples."""
    weights = stats.weights if stats.weights.dim() == 0 else stats.weights[start:stop]
    return replace(
        stats, a=stats.a.some(start, stop), b=stats.b[..., start:stop, :, :], weights=weights
    )


def best_factors(
    observations: Sequence[Observation], sweeps: int = SWEEPS, tolerance: float = TOLERANCE
) -> Factors:
    """The single Kronecker product that is nearest to the exact block in the Frobenius norm.

    The leading singular pair of Van Loan's rearrangement, whose entries are those of the block:
    alternating least squares from whichever of expand's and reduce's A is better, so that it is
    never farther than they are. The block is used through per-example gradients G only: the best
    B for an A is Σ G A G' / ‖A‖², the best A for a B is Σ G'B G / ‖B‖². Ends when a sweep makes
    less than `tolerance` of relative difference. Scaled so that A has expand's trace.
    """
    expand = batch_factors(observations)
    if not bool(expand.A.count > 0):  # everything is masked
        return expand
    A, B = _first_pair(observations, expand)
    size = _norm(B) * _norm(A)
    for _ in range(sweeps):
        A = _best_input_factor(observations, B)
        B = _best_output_factor(observations, A)
        before, size = size, _norm(B) * _norm(A)
        if bool((size - before <= tolerance * size).all()):
            break
    trace, wanted = diagonal(A).sum(-1), diagonal(expand.A.mean).sum(-1)
    scale = torch.where(trace > 0, wanted / trace, torch.ones_like(trace))[..., None, None]
    return Factors(
        Moment(A * scale * expand.A.count, expand.A.count),
        Moment(B / scale, expand.B.count),
        chance=expand.chance,
    )


def _first_pair(observations: Sequence[Observation], expand: Factors) -> tuple[Tensor, Tensor]:
    """Of the A's of expand and reduce the one that catches more of the block, and its best B."""
    A = expand.A.mean
    B = _best_output_factor(observations, A)
    if all(stats.a.counts[1] == 1 for stats, _ in observations):
        return A, B
    other = reduced_factors(observations).A.mean
    best = _best_output_factor(observations, other)
    better = (_norm(best) * _norm(other) > _norm(B) * _norm(A))[..., None, None]
    return torch.where(better, other, A), torch.where(better, best, B)


def _best_input_factor(observations: Sequence[Observation], B: Tensor) -> Tensor:
    """Σ G'B G / ‖B‖²: (…, d_in, d_in)."""
    found = []
    for stats, part in observations:
        if _is_plain(stats):  # G = b a', and G'B G = (b'B b) a a'
            weights = ((stats.b @ B) * stats.b).sum(-1).sum(0)  # (N, 1)
            found.append(part * stats.a.second_moment(weights))
            continue
        for G in example_gradients(stats, part):
            found.append(torch.einsum("...poi,...pok->...ik", B.unsqueeze(-3) @ G, G))
    return _total(found) / _norm(B).square().clamp_min(TINY)[..., None, None]


def _best_output_factor(observations: Sequence[Observation], A: Tensor) -> Tensor:
    """Σ G A G' / ‖A‖²: (…, d_out, d_out)."""
    found = []
    for stats, part in observations:
        if _is_plain(stats):  # G A G' = (a'A a) b b'
            a = stats.a.dense()
            weights = ((a @ A) * a).sum(-1).expand(stats.b.shape[:-1])
            found.append(part * second_moment(stats.b.flatten(0, 2), weights.flatten()))
            continue
        for G in example_gradients(stats, part):
            found.append(torch.einsum("...poi,...pqi->...oq", G @ A.unsqueeze(-3), G))
    return _total(found) / _norm(A).square().clamp_min(TINY)[..., None, None]


def _is_plain(stats: Statistics) -> bool:
    """One block, and one position for each example."""
    return stats.b.dim() == 4 and stats.a.counts[1] == 1


def _norm(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(matrix)
    return norm


def example_gradients(stats: Statistics, part: Tensor) -> Iterator[Tensor]:
    """Per-example gradients √part·Σ_s b a' of all draws, some at a time: (…, P, d_out, d_in).

    The exact block is the sum of their outer products.
    """
    N, S = stats.a.counts
    V, d_out = stats.b.shape[-4], stats.b.shape[-1]
    d_in = stats.a.width
    step = max(1, CHUNK // (S * (d_in + V * d_out) + V * d_out * d_in))  # examples
    for n in range(0, N, step):
        a = stats.a.dense(n, n + step).unsqueeze(-4)  # (…, 1, n, S, d_in)
        G = stats.b[..., n : n + step, :, :].mT @ a  # (…, V, n, d_out, d_in)
        yield part.clamp_min(0).sqrt() * G.flatten(-4, -3)


def with_corrected(
    factors: Factors, observations: Sequence[Observation], U_A: Tensor, U_B: Tensor
) -> Factors:
    """Add to a batch's factors the second moments of its gradients in an eigenbasis.

    s[o, i] = Σ (u_o' G u_i)² over the per-example gradients G of columns or draws
    (George et al. 2018): the diagonal of the exact block in the basis U_B ⊗ U_A.
    """
    sides = factors.sides
    total = _total(part * _rotated_squares(stats, U_A, U_B, sides) for stats, part in observations)
    return replace(factors, s=Moment(total, total.new_ones(())))


def _rotated_squares(stats: Statistics, U_A: Tensor, U_B: Tensor, sides: Sides) -> Tensor:
    N, S = stats.a.counts
    d_out, d_in, V = stats.b.shape[-1], stats.a.width, stats.b.shape[-4]
    step = max(1, CHUNK // (S * (d_in + V * d_out) + V * d_out * d_in))  # examples
    chunks = []
    for n in range(0, N, step):
        a = _in_basis(stats.a.dense(n, n + step).unsqueeze(-4), U_A, sides.input)
        b = _in_basis(stats.b[..., n : n + step, :, :], U_B, sides.output)
        if S == 1:  # the square of a product is the product of squares
            b2 = b.square().sum(-4).squeeze(-2)  # (…, n, d_out)
            chunks.append(b2.mT @ a.square().squeeze(-4).squeeze(-2))
        else:
            chunks.append((b.mT @ a).square().sum((-4, -3)))  # (…, V, n, d_out, d_in)
    return _total(chunks)


def _in_basis(rows: Tensor, U: Tensor, structure: Structure) -> Tensor:
    """Rows (…, V, N, S, d) in an eigenbasis, which may be of before the model was cast."""
    return structure.rotate_rows(rows.flatten(-4, -2), U.to(rows.dtype)).reshape(rows.shape)


def rotated(s: Moment, old: Basis, new: Basis, sides: Sides = PLAIN) -> Moment:
    """Carry second moments (…, d_out, d_in) into a new basis, as if they were uncorrelated.

    Keeps the trace. Exact if only the eigenvalues have changed. A basis is U_A and U_B.
    """
    old_A, old_B, new_A, new_B = (U.to(s.total.dtype) for U in (*old, *new))
    half = sides.output.carry(s.total, old_B, new_B)
    return Moment(sides.input.carry(half.mT, old_A, new_A).mT, s.count)


def _sum(moments: Iterable[Moment]) -> Moment:
    first, *rest = moments
    return sum(rest, first)


def _total(tensors: Iterable[Tensor]) -> Tensor:
    first, *rest = tensors
    return sum(rest, first)
