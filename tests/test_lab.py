"""The lab's parts: tasks, data files, rivals, the loop, checkpoints."""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import kronewton as kn
from kronewton.errors import DataError, OptionError, StateError
from kronewton.lab import checkpoint, files, rivals, session, texts
from kronewton.lab.images import read_images
from kronewton.lab.rivals import RIVALS, find_rival
from kronewton.lab.tasks import TASKS, Options, find_task
from kronewton.lab.training import (
    Budget,
    Record,
    Run,
    evaluate,
    interleave,
    own_statistics,
    start,
    train,
)

torch.set_num_threads(1)  # the models are tiny, and tests run side by side

CPU = torch.device("cpu")
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)


def begin(task: str = "digits-mlp", rival: str = "adamw", seed: int = 0) -> Run:
    return start(find_task(task), find_rival(rival), find_rival(rival).grid[0], seed, CPU)


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.problem.model.parameters()])


def idx(images: np.ndarray) -> bytes:
    return struct.pack(">IIII", 0x803, *images.shape) + images.tobytes()


# tasks


@pytest.mark.parametrize("name", TASKS)
def test_task_is_fixed_by_its_name_and_seed(name: str) -> None:
    task = find_task(name)
    first, same, other = (task.build(seed, CPU) for seed in (0, 0, 1))
    few = first.train.every(len(first.train) // 16)
    assert few.x.dtype == (torch.long if name.startswith("char") else task.dtype)
    for data, others in ((first.train, other.train), (first.test, other.test)):
        assert torch.equal(data.x, others.x)  # the data does not depend on the seed
        assert torch.equal(data.y, others.y)
    drawn = [nn.utils.parameters_to_vector(p.model.parameters()) for p in (first, same, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert first.criterion(first.model(few.x), few.y).isfinite()


def test_text_is_cut_without_overlap_and_split_by_position() -> None:
    train, test = texts.windows(context=8, train=20, test=5)
    assert train.shape == (20, 9)
    assert torch.equal(train[1:, 0], train[:-1, -1])  # each character is predicted once
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = texts.ALPHABET + "�"
    assert "".join(alphabet[code] for code in train[:, :-1].flatten()) in text
    start = 8 * ((len(text) - 9) // 8 - 4)
    read = "".join(c if c in texts.ALPHABET else "�" for c in text[start : start + 41])
    assert "".join(alphabet[code] for code in [*test[:, :-1].flatten(), test[-1, -1]]) == read


@pytest.mark.parametrize("name", ["char-gpt", "char-lstm"])
def test_models_of_text_see_no_character_before_its_turn(name: str) -> None:
    problem = find_task(name).build(0, CPU)
    x = problem.train.x[:1].clone()
    before = problem.model(x)  # (1, C, T)
    assert before.shape == (1, texts.CHARACTERS, 64)
    x[0, 40] = (x[0, 40] + 1) % texts.CHARACTERS
    changed = (problem.model(x) - before).abs().amax(1)[0] > 1e-6
    assert not changed[:40].any()
    assert changed[40:].any()


def test_a_run_on_text_is_evaluated_on_a_fixed_part_of_the_training_set() -> None:
    problem = find_task("char-lstm").build(0, CPU)
    measured = problem.measured
    assert measured is not None
    assert (len(problem.train), len(measured), len(problem.test)) == (4096, 128, 192)
    assert torch.equal(measured.x[1], problem.train.x[32])
    run = begin("char-lstm")
    (record,) = train(run, Budget(1))
    run.problem.model.eval()
    loss = run.problem.criterion(run.problem.model(measured.x), measured.y)
    assert record.train_loss == pytest.approx(loss.item(), rel=1e-5)


def test_the_noise_of_the_images_is_fixed_and_its_own_in_the_test() -> None:
    problem = find_task("digits-unet").build(0, CPU)
    noise = problem.train.x - problem.train.y
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert not torch.equal(noise[: len(problem.test)], problem.test.x - problem.test.y)


@pytest.mark.parametrize("name", ["digits-vit", "digits-unet", "char-lstm"])
def test_networks_of_today_train(name: str) -> None:
    run = begin(name, "adamw")
    records = list(train(run, Budget(12, every=99)))
    first = sum(record.loss for record in records[:3])
    assert sum(record.loss for record in records[-3:]) < 0.99 * first
    assert all(parameter.grad is not None for parameter in run.problem.model.parameters())


def test_building_a_task_leaves_the_random_stream_alone() -> None:
    before = torch.get_rng_state()
    for task in TASKS.values():
        task.build(3, CPU)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["linear-regression", "deep-linear"])
def test_floor_is_the_least_squares_loss(name: str) -> None:
    problem = find_task(name).build(0, CPU)
    x, y = problem.train.x, problem.train.y
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    normal = torch.linalg.solve(x.T @ x, x.T @ y)
    assert problem.floor == pytest.approx(float((x @ normal - y).square().mean()), rel=1e-9)


def test_floor_of_the_deconvolution_is_the_least_squares_loss_over_kernels() -> None:
    problem = find_task("circular-deconvolution").build(0, CPU)
    x, y = problem.train.x, problem.train.y
    names, shapes = zip(*((n, p.shape) for n, p in problem.model.named_parameters()), strict=True)
    columns = []
    for unit in torch.eye(228, dtype=torch.float64):  # the model is linear in its parameters
        parts = unit.split([math.prod(shape) for shape in shapes])
        kernel = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        columns.append(torch.func.functional_call(problem.model, kernel, (x,)).flatten())
    design = torch.stack(columns, 1)
    gram = design.T @ design
    normal = torch.linalg.solve(gram, design.T @ y.flatten())
    floor = float((design @ normal - y.flatten()).square().mean())
    assert problem.floor == pytest.approx(floor, rel=1e-9)
    assert torch.linalg.cond(gram) > 1e4  # on purpose


CONVOLUTIONS = ("digits-cnn", "digits-conv-autoencoder", "circular-deconvolution")


@pytest.mark.parametrize("rival", ["adamw", "soap"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_train(name: str, rival: str) -> None:
    records = list(train(begin(name, rival), Budget(20, every=20)))
    assert records[-1].train_loss < records[0].train_loss  # type: ignore[operator]
    assert records[-1].test_loss < 1.5 * (records[0].test_loss or 0.0)  # type: ignore[operator]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_models_are_small_and_listed_whole(name: str) -> None:
    run = begin(name, "kfac")
    assert isinstance(run.optimizer, kn.KFAC)
    kernels = sum(row.numel for row in run.optimizer.coverage().rows)
    assert kernels == sum(p.numel() for p in run.problem.model.parameters()) < 20_000


def test_floor_of_the_logistic_regression_is_its_optimum() -> None:
    problem = find_task("scaled-logistic").build(0, CPU)
    x, y = problem.train.x, problem.train.y
    newton = torch.zeros(41, dtype=torch.float64, requires_grad=True)

    def loss(w: torch.Tensor) -> torch.Tensor:
        logits = (x / x.std(0)) @ w[:40] + w[40]
        return nn.functional.binary_cross_entropy_with_logits(logits, y[:, 0])

    for _ in range(12):
        (slope,) = torch.autograd.grad(loss(newton), newton)
        hessian = torch.autograd.functional.hessian(loss, newton.detach())
        newton = (newton - torch.linalg.solve(hessian, slope)).detach().requires_grad_()
    assert problem.floor == pytest.approx(loss(newton).item(), rel=1e-12)
    assert 0.1 < problem.floor < 0.6  # the classes overlap
    assert x.std(0).max() > 500 * x.std(0).min()


def test_residual_network_has_its_stages() -> None:
    model = find_task("digits-resnet").build(0, CPU).model
    kernels = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(kernels) == 1 + 18 + 2  # and two projections
    assert [k.stride for k in kernels if k.kernel_size == (1, 1)] == [(2, 2)] * 2
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_errors_are_per_image_and_per_location() -> None:
    for name, parts in (("digits-conv-autoencoder", (1, 2, 3)), ("circular-deconvolution", (1,))):
        task, problem = find_task(name), find_task(name).build(0, CPU)
        output, y = problem.model(problem.train.x), problem.train.y
        error = (output - y).square().sum(parts).mean()
        loss = problem.criterion(output, y)
        assert task.scale * loss.item() == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("rival", ["sgd", "lbfgs"])
def test_training_is_on_the_loss_as_it_is_shown(rival: str) -> None:
    run = begin("digits-autoencoder", rival)
    x, before = run.problem.train.x, weights(run)
    half = 0.5 * (run.problem.model(x) - x).square().sum(1).mean()
    slopes = torch.autograd.grad(half, list(run.problem.model.parameters()))
    (record,) = train(run, Budget(1))
    assert record.loss == pytest.approx(half.item(), rel=1e-5)
    if rival == "sgd":
        step = -run.setting["lr"] * torch.cat([slope.flatten() for slope in slopes])
        torch.testing.assert_close(weights(run) - before, step, rtol=1e-4, atol=1e-6)


def test_unknown_task_is_named_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"no task 'digits'.*digits-mlp.*mnist-autoencoder"):
        find_task("digits")


def test_option_of_another_task_is_refused() -> None:
    with pytest.raises(OptionError, match="digits-mlp takes no --data"):
        find_task("digits-mlp", Options(small=True))


def test_batch_larger_than_the_data_is_refused() -> None:
    task = find_task("digits-mlp", Options(batch_size=1438))
    with pytest.raises(OptionError, match=r"batch of 1438.*1437 training examples"):
        start(task, find_rival("sgd"), find_rival("sgd").grid[0], 0, CPU)


# data files


@pytest.mark.parametrize("form", ["npz", "idx", "idx.gz", "folder"])
def test_images_are_read_in_every_form(tmp_path: Path, form: str) -> None:
    path = tmp_path / "data"
    if form == "npz":
        np.savez(path, images=PIXELS, labels=np.zeros(12, np.uint8))
        path = tmp_path / "data.npz"
    elif form == "folder":
        path.mkdir()
        (path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS)))
    else:
        path.write_bytes(idx(PIXELS) if form == "idx" else gzip.compress(idx(PIXELS)))
    assert np.array_equal(read_images(path).numpy(), PIXELS)


BAD_ARRAYS = {
    "float": PIXELS / 255,
    "flat": PIXELS.reshape(12, 784),
    "wide": np.zeros((12, 32, 32), np.uint8),
    "empty": PIXELS[:0],
    "pickled": np.array([PIXELS, "code"], dtype=object),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_wrong_arrays_are_refused(tmp_path: Path, what: str) -> None:
    np.savez(tmp_path / "data.npz", images=BAD_ARRAYS[what])
    with pytest.raises(DataError, match=r"could not be read.*allowed are an \.npz.*torchvision"):
        read_images(tmp_path / "data.npz")


def test_array_of_another_name_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x_train=PIXELS)
    with pytest.raises(DataError, match="no array 'images' but x_train"):
        read_images(tmp_path / "data.npz")


BAD_BYTES = {
    "text": b"label,pixel0\n",
    "nothing": b"",
    "labels": struct.pack(">II", 0x801, 12) + bytes(12),
    "header only": idx(PIXELS)[:10],
    "truncated": idx(PIXELS)[:-1],
    "too long": idx(PIXELS) + b"\0",
    "other size": idx(np.zeros((12, 32, 32), np.uint8)),
    "half a gzip": gzip.compress(idx(PIXELS))[:-100],
    "half a zip": b"PK\x03\x04" + bytes(50),
}


@pytest.mark.parametrize("what", BAD_BYTES)
def test_wrong_bytes_are_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "data").write_bytes(BAD_BYTES[what])
    with pytest.raises(DataError, match=r"data could not be read.*allowed are an \.npz"):
        read_images(tmp_path / "data")


def test_truncated_npz_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "data.npz", images=PIXELS)
    whole = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "data.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="could not be read"):
        read_images(tmp_path / "data.npz")


def test_missing_data_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs --data PATH and none was given.*torchvision"):
        read_images(None)
    with pytest.raises(DataError, match=r"nowhere does not exist.*torchvision"):
        read_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no images"):
        read_images(tmp_path)


def test_mnist_task_from_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=PIXELS)
    task = find_task(
        "mnist-autoencoder", Options(data=tmp_path / "data.npz", small=True, examples=8)
    )
    problem = task.build(0, CPU)
    assert (len(problem.train), len(problem.test)) == (8, 4)
    output = problem.model(problem.train.x)
    assert 0 < output.min() < output.max() < 1  # a sigmoid at the end too
    half = 0.5 * (output - problem.train.y).square().sum(1).mean()  # per image
    loss = problem.criterion(output, problem.train.y)
    assert task.scale * loss.item() == pytest.approx(half.item(), rel=1e-5)
    with pytest.raises(OptionError, match=r"12 training examples.*1 to 11"):
        find_task("mnist-autoencoder", Options(data=tmp_path / "data.npz", examples=12))


# rivals


def test_grids_have_one_size_and_no_repeats() -> None:
    assert RIVALS["kfac"].grid == ({},)
    for rival in RIVALS.values():
        if rival.name != "kfac":
            assert len(rival.grid) == 12
            assert len({tuple(setting.items()) for setting in rival.grid}) == 12


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    run = begin("char-gpt", "muon")
    names = {id(p): name for name, p in run.problem.model.named_parameters()}
    hidden, rest = ([names[id(p)] for p in g["params"]] for g in run.optimizer.param_groups)
    assert all(name.startswith("blocks") and name.endswith("weight") for name in hidden)
    assert len(hidden) == 3 * 4
    assert {"head.weight", "tokens.weight", "positions.weight", "norm.weight"} <= set(rest)
    assert run.optimizer.param_groups[1]["lr"] == run.setting["lr"] / 10


@pytest.mark.parametrize("units", [False, True])
def test_muon_orthogonalises_in_bfloat16_where_the_machine_has_units_for_it(units, monkeypatch):
    """Elsewhere a product in it takes many times as long, and Muon would be no rival."""
    told = {"avx512_bf16": units, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    seen, real = [], torch.Tensor.to

    def spied(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        seen.append((self.ndim, found.dtype))
        return found

    run = begin("digits-mlp", "muon")
    x, y = run.problem.train.x[:64], run.problem.train.y[:64]
    run.problem.criterion(run.problem.model(x), y).backward()
    monkeypatch.setattr(torch.Tensor, "to", spied)
    run.optimizer.step()
    monkeypatch.undo()
    assert ((2, torch.bfloat16) in seen or (3, torch.bfloat16) in seen) == units
    weights = nn.utils.parameters_to_vector(run.problem.model.parameters())
    assert weights.isfinite().all()


@pytest.mark.parametrize("name", RIVALS)
def test_rival_trains_digits(name: str) -> None:
    run = begin(rival=name)
    records = list(train(run, Budget(30, every=10)))
    assert [r.step for r in records if r.train_loss is not None] == [1, 10, 20, 30]
    assert not records[-1].diverged
    assert records[-1].train_loss < records[0].train_loss  # type: ignore[operator]


def test_missing_package_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "EXTRA_PACKAGE", "no_such_package")
    assert rivals.available() == ["kfac", "sgd", "adam", "adamw", "lbfgs"]
    with pytest.raises(OptionError, match=r"soap comes from .*kronewton\[bench\].*kfac, sgd"):
        find_rival("soap")
    with pytest.raises(OptionError, match="no optimizer 'newton'; there are kfac, sgd"):
        find_rival("newton")


# the loop


def test_batches_are_a_function_of_the_seed() -> None:
    runs = [begin(seed=seed) for seed in (0, 0, 1)]
    losses = [[r.loss for r in train(run, Budget(15, every=99))] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_a_run_goes_on_from_its_last_record() -> None:
    whole, parts = begin(), begin()
    list(train(whole, Budget(9)))
    (*_, last) = train(parts, Budget(4))
    (*_, end) = train(parts, Budget(9), last)
    assert end.step == 9
    assert end.seconds > last.seconds
    assert torch.equal(weights(whole), weights(parts))


@pytest.mark.parametrize("rival", ["kfac", "sgd"])
def test_evaluation_leaves_training_alone(rival: str) -> None:
    often, never = begin(rival=rival), begin(rival=rival)
    list(train(often, Budget(12, every=1)))
    list(train(never, Budget(12, every=99)))
    assert torch.equal(weights(often), weights(never))


def test_what_a_model_draws_depends_on_its_seed_and_step_alone() -> None:
    alone, beside = begin("digits-vae"), begin("digits-vae")
    losses = [record.loss for record in train(alone, Budget(6))]
    pair = {"it": train(beside, Budget(6)), "other": train(begin("digits-vae", seed=1), Budget(6))}
    found = {"it": [], "other": []}  # type: ignore[var-annotated]
    for key, record in interleave(pair, {"it": 1, "other": 2}):
        torch.rand(3)
        found[key].append(record.loss)
    assert found["it"] == losses != found["other"]
    assert len(set(losses)) == 6


def test_both_terms_of_the_vae_are_shown_to_kfac() -> None:
    run = begin("digits-vae", "kfac")
    problem = run.problem
    x = problem.train.x[:128]
    (logits, law), divergence = problem.model(x), problem.terms[1]
    mean, deviation = law[:, :8], (0.5 * law[:, 8:]).exp()
    told = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, deviation), torch.distributions.Normal(0.0, 1.0)
    )
    assert divergence(law).item() == pytest.approx(told.sum(1).mean().item(), rel=1e-5)
    bernoulli = torch.distributions.Bernoulli(logits=logits, validate_args=False)
    whole = told.sum(1).mean() - bernoulli.log_prob(x).sum(1).mean()
    assert problem.criterion((logits, law), x).item() == pytest.approx(whole.item(), rel=1e-5)
    assert isinstance(run.optimizer, kn.KFAC)
    records = list(train(run, Budget(12, every=99)))
    assert records[-1].train_loss < 0.9 * records[0].train_loss  # type: ignore[operator]
    assert all(row.curved for row in run.optimizer.coverage().rows)


def test_losses_are_by_the_training_sets_own_statistics_of_batch_normalisation() -> None:
    task = find_task("digits-bn-cnn")
    run = start(task, find_rival("sgd"), {"lr": 0.1, "momentum": 0.9}, 0, torch.device("cpu"))
    model, train_set = run.problem.model, run.problem.train
    records = list(train(run, Budget(steps=3)))
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with own_statistics(run):
        evaluated, _ = evaluate(run, train_set)
    assert records[-1].train_loss == evaluated
    assert all(b.equal(buffers[name]) for name, b in model.named_buffers())
    assert momenta == [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    # By running averages three steps old it is another; in training mode the same, to their n − 1.
    stale, _ = evaluate(run, train_set)
    assert stale > 1.3 * evaluated
    with torch.no_grad():
        as_trained = float(run.problem.criterion(model(train_set.x), train_set.y))
    assert as_trained == pytest.approx(evaluated, rel=1e-3)


def test_seconds_end_a_run_and_evaluation_is_not_on_the_clock() -> None:
    often = list(train(begin(), Budget(10**6, seconds=0.05)))
    assert often[-2].seconds < 0.05 <= often[-1].seconds
    assert often[-1].train_loss is not None


def test_loss_that_is_no_number_ends_the_run() -> None:
    run = start(find_task("digits-mlp"), find_rival("sgd"), {"lr": 1e30, "momentum": 0.9}, 0, CPU)
    records = list(train(run, Budget(20, every=99)))
    assert len(records) < 20
    assert records[-1].diverged
    assert list(train(run, Budget(20), records[-1])) == []


def test_interleaved_runs_take_turns() -> None:
    records = [Record(step, 0.0, 0.0) for step in range(1, 6)]
    turns = {"a": 2, "b": 1}
    order = [key for key, _ in interleave({"a": iter(records), "b": iter(records[:3])}, turns)]
    assert order == ["a", "a", "b", "a", "a", "b", "a", "b"]


def test_parameters_without_curvature_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.uncovered(begin(rival="kfac")) is None
    assert session.uncovered(begin(rival="sgd")) is None
    row = begin(rival="kfac").optimizer.coverage().rows[0]  # type: ignore[attr-defined]
    rows = (row, replace(row, parameter="1.weight", curved=False))
    monkeypatch.setattr(kn.KFAC, "coverage", lambda _: SimpleNamespace(rows=rows))
    assert "no curvature for 1.weight: see" in (session.uncovered(begin(rival="kfac")) or "")


# checkpoints


@pytest.mark.parametrize("rival", ["sgd", "adamw", "kfac", "lbfgs", "soap"])
def test_resumed_equals_uninterrupted(tmp_path: Path, rival: str) -> None:
    whole, first, second = (begin(rival=rival) for _ in range(3))
    list(train(whole, Budget(27)))
    (*_, last) = train(first, Budget(13))
    checkpoint.save(tmp_path, first, last)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    found = checkpoint.load_(tmp_path, second)
    assert repr(found) == repr(last)  # a number that is not known yet is NaN, and none is equal
    list(train(second, Budget(27), found))
    assert torch.equal(weights(whole), weights(second))


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run = begin()
    (*_, last) = train(run, Budget(1))
    checkpoint.save(tmp_path, run, last)
    for other, what in (
        (begin("two-spirals"), "task 'digits-mlp' where this run has 'two-spirals'"),
        (begin(rival="sgd"), "optimizer 'adamw'"),
        (begin(seed=1), "seed 0"),
    ):
        before = weights(other).clone()
        with pytest.raises(StateError, match=what):
            checkpoint.load_(tmp_path, other)
        assert torch.equal(before, weights(other))


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run = begin()
    (*_, last) = train(run, Budget(1))
    checkpoint.save(tmp_path, run, last)
    file = tmp_path / checkpoint.FILE
    whole = file.read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(DataError, match="damaged or is no checkpoint"):
            checkpoint.load_(tmp_path, run)
    torch.save({"weights": torch.zeros(1)}, file)
    with pytest.raises(DataError, match="damaged or is no checkpoint"):
        checkpoint.load_(tmp_path, run)
    torch.save(Path("code"), file)  # an object that only a pickle with code could bring back
    with pytest.raises(DataError, match="damaged or is no checkpoint"):
        checkpoint.load_(tmp_path, run)


# files


def test_unwritable_file_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be written"):
        files.write_json(tmp_path / "no folder" / "file.json", {})
