"""Statistics → factors: sums with counts, weights of rows, corrected eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kronewton import factors as factors_module
from kronewton.curvature import Curvature
from kronewton.factors import (
    Factors,
    Moment,
    all_reduced,
    batch_factors,
    nearer_sharing,
    rotated,
    thinned,
    with_corrected,
)
from kronewton.layers import DenseRows, find_layers
from kronewton.types import Statistics

pytestmark = pytest.mark.usefixtures("float64")


ONE = torch.tensor(1.0, dtype=torch.float64)


def statistics(N: int = 4, S: int = 1, V: int = 2, weights: Tensor | None = None) -> Statistics:
    a, b = torch.randn(N, S, 3), torch.randn(V, N, S, 2)
    return Statistics(DenseRows(a), b, torch.tensor(1 / N) if weights is None else weights)


def basis(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d))[0]


def exact_block(stats: Statistics) -> Tensor:
    """Σ over draws and examples of vec(G) vec(G)', G the gradient summed over positions."""
    G = torch.einsum("vnso,nsi->vnoi", stats.b, stats.a.dense()).flatten(2).flatten(0, 1)
    return G.T @ G


def farther(stats: Statistics, factors: Factors) -> float:
    """‖H − B ⊗ A‖² less ‖H‖², for the exact block H."""
    product = torch.kron(factors.B.mean, factors.A.mean)
    return float(product.square().sum() - 2 * (exact_block(stats) * product).sum())


def assert_same(found: Factors, wanted: Factors) -> None:
    torch.testing.assert_close(found.A.mean, wanted.A.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.B.mean, wanted.B.mean, rtol=1e-12, atol=1e-14)


# Expand or reduce.


@pytest.mark.parametrize("S", [2, 4])  # by products of rows, and by per-example gradients
def test_sharing_is_what_is_nearer_to_the_exact_block_of_other_examples(S: int):
    chosen = []
    for seed in range(24):
        torch.manual_seed(seed)
        own = torch.randn(8, 1, 3) + (seed % 5) * torch.randn(8, S, 3)  # inputs that are more alike
        a, b = own, torch.randn(2, 8, 1, 2) + 0.8 * torch.randn(2, 8, S, 2)
        left, right = (
            Statistics(DenseRows(a[at]), b[:, at], torch.tensor(0.1), loss_positions=1)
            for at in (slice(0, 4), slice(4, 8))
        )
        expand = farther(right, batch_factors([(left, ONE)]))
        reduce = farther(right, batch_factors(all_reduced([(left, ONE)])))
        whole = Statistics(DenseRows(a), b, torch.tensor(0.1), loss_positions=1)
        found = nearer_sharing([(whole, ONE)])
        assert found == ("reduce" if reduce < expand else "expand")
        chosen.append(found)
    assert min(chosen.count("expand"), chosen.count("reduce")) >= 4


# Moments.


def test_moments_add_sums_and_counts():
    x = Moment(torch.tensor([2.0, 4.0]), torch.tensor(2.0))
    y = Moment(torch.tensor([9.0, 0.0]), torch.tensor(1.0))
    assert (x + y).mean.tolist() == pytest.approx([11 / 3, 4 / 3])


def test_decay_keeps_the_mean_and_weighs_what_comes_next():
    old, new = Moment(torch.tensor(6.0), torch.tensor(2.0)), Moment(ONE * 10, ONE)
    nothing = Moment(ONE * 0, ONE * 0)
    assert float(nothing.after(old, 0.3).mean) == pytest.approx(3.0)
    assert float(new.after(old, 0.5).mean) == pytest.approx((3 + 10) / 2)


def test_running_average_is_corrected_for_its_start():
    values, decay, running = [5.0, 1.0, 4.0, 2.0], 0.9, None
    for v in values:
        batch = Factors(Moment(torch.eye(2) * v, ONE), Moment(torch.eye(3) * v, ONE))
        running = batch if running is None else running.then(batch, decay)
    weights = [decay**k for k in reversed(range(len(values)))]
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    torch.testing.assert_close(running.A.mean, torch.eye(2) * mean)
    torch.testing.assert_close(running.B.mean, torch.eye(3) * mean)


def test_the_same_batch_again_and_again_is_that_batch():
    batch = batch_factors([(statistics(), ONE)])
    running = batch
    for _ in range(20):
        running = running.then(batch, 0.95)
    assert_same(running, batch)


def test_corrected_eigenvalues_run_with_the_factors():
    batches = []
    for v in (1.0, 4.0):
        moment = Moment(torch.full((2, 2), v), ONE)
        batches.append(Factors(Moment(torch.eye(2), ONE), Moment(torch.eye(2), ONE), moment))
    running = batches[0].then(batches[1], 0.5)
    torch.testing.assert_close(running.s.mean, torch.full((2, 2), (0.5 + 4) / 1.5))


# One batch.


@pytest.mark.parametrize("S", [1, 3])
def test_factors_are_the_mean_over_rows_and_the_sum_over_draws(S):
    stats = statistics(S=S)
    found = batch_factors([(stats, ONE)])
    rows, b = stats.a.dense().flatten(0, 1), stats.b.flatten(0, 2)
    A = sum(torch.outer(r, r) for r in rows) / len(rows)
    torch.testing.assert_close(found.A.mean, A)
    torch.testing.assert_close(found.B.mean, sum(torch.outer(r, r) for r in b))
    trace = torch.kron(found.B.mean, found.A.mean).trace()
    torch.testing.assert_close(found.trace(), trace)
    assert found.size == 6


def test_a_row_of_weight_two_is_that_row_twice():
    stats = statistics(weights=torch.tensor([[1.0], [2.0], [1.0], [1.0]]) / 5)
    twice = [0, 1, 1, 2, 3]
    b = stats.b[:, twice] / torch.tensor([1.0, 2, 2, 1, 1]).sqrt()[:, None, None]
    copies = Statistics(DenseRows(stats.a.dense()[twice]), b, torch.tensor(1 / 5))
    assert_same(batch_factors([(stats, ONE)]), batch_factors([(copies, ONE)]))


def test_a_masked_row_is_absent_in_the_bias_entry_too():
    stats = statistics(weights=torch.tensor([[0.5], [0.0], [0.5], [0.0]]))
    a = torch.cat([stats.a.dense(), torch.ones(4, 1, 1)], -1)
    b = stats.b.clone()
    b[:, [1, 3]] = 0
    cut = Statistics(DenseRows(a[[0, 2]]), b[:, [0, 2]], torch.tensor(0.5))
    found = batch_factors([(Statistics(DenseRows(a), b, stats.weights), ONE)])
    assert_same(found, batch_factors([(cut, ONE)]))
    assert float(found.A.mean[-1, -1]) == pytest.approx(1.0)


def test_uniform_weights_as_a_number_or_row_by_row():
    stats = statistics(N=4, S=3)
    spread = Statistics(stats.a, stats.b, torch.full((4, 3), float(stats.weights)))
    one, other = batch_factors([(stats, ONE)]), batch_factors([(spread, ONE)])
    assert_same(one, other)
    torch.testing.assert_close(one.A.count, other.A.count)


def test_parts_of_unequal_size_add_up_to_the_batch():
    stats = statistics(N=6)
    a, b = stats.a.dense(), stats.b
    first = Statistics(DenseRows(a[:2]), b[:, :2] * 3**0.5, torch.tensor(1 / 2))
    second = Statistics(DenseRows(a[2:]), b[:, 2:] * 1.5**0.5, torch.tensor(1 / 4))
    parts = [(first, ONE * 2 / 6), (second, ONE * 4 / 6)]
    assert_same(batch_factors(parts), batch_factors([(stats, ONE)]))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_quarter_of_the_rows_in_turn_is_the_batch_on_average(weighted):
    N, S = 16, 3
    weights = torch.rand(N, 1).expand(N, S) / N if weighted else None
    seen = [(statistics(N, S, weights=weights), ONE)]
    parts = [batch_factors(thinned(seen, 1, turn)) for turn in range(4)]
    whole = batch_factors(seen)
    torch.testing.assert_close(sum(p.B.mean for p in parts) / 4, whole.B.mean)
    A = sum(p.A.total for p in parts) / sum(p.A.count for p in parts)
    torch.testing.assert_close(A, whole.A.mean)


def test_every_example_has_its_turn_and_a_few_rows_are_never_thinned():
    stats = statistics(10, 2)
    of_turns = [thinned([(stats, ONE)], 1, turn)[0][0] for turn in range(6)]
    first = torch.stack([s.a.dense()[0] for s in of_turns])  # (6, S, d_in)
    starts = {int((stats.a.dense() - one).abs().sum((1, 2)).argmin()) for one in first}
    assert starts == {0, 3, 6, 1, 4, 7}
    assert thinned([(stats, ONE)], 20, 5)[0][0] is stats
    assert thinned([(stats, ONE)], 12, 0)[0][0].a.counts == (6, 2)


def test_a_part_of_weight_c_scales_b_and_leaves_the_mean_of_a():
    stats = statistics()
    one, three = batch_factors([(stats, ONE)]), batch_factors([(stats, 3 * ONE)])
    torch.testing.assert_close(three.A.mean, one.A.mean)
    torch.testing.assert_close(three.B.mean, 3 * one.B.mean)


def test_a_quarter_that_is_then_reduced_is_a_quarter_of_what_is_reduced():
    rows = DenseRows(torch.randn(40, 3, 2))
    stats = Statistics(rows, torch.randn(1, 40, 3, 2), torch.tensor(1 / 40))
    first = all_reduced(thinned([(stats, ONE)], 16, 1, reduce=True))[0][0]
    last = thinned(all_reduced([(stats, ONE)]), 16, 1)[0][0]
    assert first.a.counts == last.a.counts == (16, 1)
    torch.testing.assert_close(first.a.dense(), last.a.dense())
    torch.testing.assert_close(first.b, last.b)


def test_a_loss_in_a_tiny_unit_has_curvature_all_the_same():
    rows = torch.randn(8, 1, 3, dtype=torch.float32)
    stats = Statistics(DenseRows(rows), rows[None], torch.tensor(1 / 8))
    assert batch_factors([(stats, torch.tensor(1e-23))]).found() == (True, True)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_anywhere_is_found(side, bad):
    stats = statistics()
    assert batch_factors([(stats, ONE)]).found() == (True, True)
    rows = stats.a.dense() if side == "a" else stats.b
    rows.view(-1)[1] = bad
    assert not batch_factors([(stats, ONE)]).found()[0]


# Corrected eigenvalues.


@pytest.mark.parametrize("S", [1, 3])
def test_corrected_eigenvalues_are_the_exact_blocks_diagonal_in_the_basis(S):
    stats, U_A, U_B = statistics(S=S, V=3), basis(3), basis(2)
    found = with_corrected(batch_factors([(stats, ONE)]), [(stats, ONE)], U_A, U_B).s
    U = torch.kron(U_B, U_A)
    dense = (U.T @ exact_block(stats) @ U).diagonal().reshape(2, 3)
    torch.testing.assert_close(found.mean, dense, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.mean.sum(), exact_block(stats).trace())


def test_corrected_eigenvalues_do_not_depend_on_the_chunk(monkeypatch):
    stats, U_A, U_B = statistics(N=7, S=3), basis(3), basis(2)
    whole = with_corrected(batch_factors([(stats, ONE)]), [(stats, ONE)], U_A, U_B).s
    monkeypatch.setattr(factors_module, "CHUNK", 12)  # two examples at a time
    chunked = with_corrected(batch_factors([(stats, ONE)]), [(stats, ONE)], U_A, U_B).s
    torch.testing.assert_close(chunked.mean, whole.mean)


def test_corrected_eigenvalues_of_a_weighted_part():
    stats, U_A, U_B = statistics(), basis(3), basis(2)
    one = with_corrected(batch_factors([(stats, ONE)]), [(stats, ONE)], U_A, U_B).s
    half = with_corrected(batch_factors([(stats, ONE)]), [(stats, ONE / 2)] * 2, U_A, U_B).s
    torch.testing.assert_close(half.mean, one.mean)


def test_one_example_is_exact_so_that_corrected_eigenvalues_are_the_products():
    stats = statistics(N=1, V=1)
    batch = batch_factors([(stats, ONE)])
    s_A, U_A = torch.linalg.eigh(batch.A.mean)
    s_B, U_B = torch.linalg.eigh(batch.B.mean)
    found = with_corrected(batch, [(stats, ONE)], U_A, U_B).s
    torch.testing.assert_close(found.mean, torch.outer(s_B, s_A), rtol=1e-10, atol=1e-12)


def test_rotation_keeps_the_trace_the_count_and_the_sign():
    s = Moment(torch.rand(2, 3), torch.tensor(2.5))
    same = torch.eye(3), torch.eye(2)
    turned = rotated(s, same, (basis(3), basis(2)))
    torch.testing.assert_close(turned.mean.sum(), s.mean.sum())
    assert float(turned.count) == 2.5
    assert turned.total.ge(0).all()
    assert not torch.allclose(turned.total, s.total)


def test_rotation_by_a_permutation_moves_the_eigenvalues():
    s = Moment(torch.rand(2, 3), ONE)
    R_A, R_B = torch.eye(3)[:, [2, 0, 1]], -torch.eye(2)[:, [1, 0]]
    same = torch.eye(3), torch.eye(2)
    torch.testing.assert_close(rotated(s, same, (R_A, R_B)).total, s.total[[1, 0]][:, [2, 0, 1]])


# The running curvature.


def running(basis_name: str) -> Curvature:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    found = find_layers(model, {id(p) for p in model.parameters()})
    return Curvature(found.layers, basis_name, lambda name: "expand", lambda name: 4096)


@pytest.mark.parametrize("name", ["factored", "eigen", "corrected"])
def test_a_bad_batch_is_dropped_counted_and_leaves_the_curvature_as_it_was(name):
    curvature, G = running(name), torch.randn(2, 3)
    good = {"0": [(statistics(), ONE)]}
    curvature.learn(good, 0.95)
    curvature.refresh(["0"], 0.1)
    curvature.forget_batch()
    before, scale = curvature.apply("0", G, 0.1), curvature.scale
    bad = statistics()
    bad.b[0, 0, 0, 0] = math.nan
    curvature.learn({"0": [(bad, ONE)]}, 0.95)
    curvature.refresh(["0"], 0.1)
    assert curvature.dropped == 1
    assert curvature.scale == scale
    torch.testing.assert_close(curvature.apply("0", G, 0.1), before, rtol=1e-10, atol=1e-12)


def test_corrected_eigenvalues_of_a_refreshed_basis_are_the_batch_measured_again():
    curvature = running("corrected")
    first, second = ({"0": [(statistics(N=8), ONE)]} for _ in range(2))
    curvature.learn(first, 0.95)
    curvature.refresh(["0"], 0.1)
    curvature.forget_batch()
    curvature.learn(second, 0.95)
    trace = float(curvature.factors["0"].s.mean.sum())
    old = curvature.inverses["0"]
    curvature.refresh(["0"], 0.1)
    new, running_s = curvature.inverses["0"], curvature.factors["0"].s
    assert float(running_s.mean.sum()) == pytest.approx(trace, rel=1e-12)
    # The second batch counts in full and is measured in the new basis, the first is rotated there.
    (stats, _), (earlier, _) = second["0"][0], first["0"][0]
    fresh = with_corrected(batch_factors([(stats, ONE)]), [(stats, ONE)], new.U_A, new.U_B).s
    stale = with_corrected(batch_factors([(earlier, ONE)]), [(earlier, ONE)], old.U_A, old.U_B).s
    turned = rotated(stale, old.basis, new.basis)
    wanted = (0.95 * turned.total + fresh.total) / 1.95
    torch.testing.assert_close(running_s.mean, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(new.s, running_s.mean)


def test_a_layer_without_a_batch_descends_scaled_by_the_others():
    curvature, G = running("eigen"), torch.randn(2, 3)
    curvature.scale = 2.0
    torch.testing.assert_close(curvature.apply("0", G, 0.5), G / 2.5)


def test_halves_of_a_batch_have_no_example_in_common_but_an_odd_middle_one():
    def numbers(half):
        return [float(v) for stats, _ in half for v in stats.a.dense(0, 9)[..., 0, 0]]

    def one(first: int, count: int):
        rows = torch.arange(first, first + count, dtype=torch.float64).reshape(count, 1, 1)
        b, weight = torch.ones(1, count, 1, 1), torch.ones(())
        return Statistics(DenseRows(rows), b, weight, 1, 1), torch.ones(())

    whole = [numbers(h) for h in factors_module._halves([one(0, 6)], 32)]
    assert whole == [[0, 1, 2], [3, 4, 5]]
    assert [numbers(h) for h in factors_module._halves([one(0, 5)], 32)] == [[0, 1, 2], [2, 3, 4]]
    assert [numbers(h) for h in factors_module._halves([one(k, 1) for k in range(6)], 4)] == [
        [0, 2],
        [1, 3],
    ]
    assert [numbers(h) for h in factors_module._halves([one(0, 1)], 32)] == [[0], [0]]


def test_running_factors_are_as_good_as_so_many_rows():
    one = Moment(torch.eye(2), ONE)
    first, second = (Factors(one, one, chance=ONE / rows) for rows in (10, 40))
    both = first.then(second, 0.5)  # weights ½ and 1, whose squares are of the variance
    assert float(both.rows) == pytest.approx(1.5**2 / (0.25 / 10 + 1 / 40))
    unknown = Factors(one, one)
    assert (
        unknown.rows == unknown.then(first, 0.5).rows == first.then(unknown, 0.5).rows == math.inf
    )
