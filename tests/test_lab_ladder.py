"""The ladder of `kronewton explain`: right weights, right batch, drawn or refused aloud."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import kronewton as kn
from kronewton.errors import OptionError
from kronewton.lab import ladder, plots
from kronewton.lab.files import write_json
from kronewton.lab.problems import Problem
from kronewton.lab.rivals import find_rival
from kronewton.lab.tasks import Options, find_task
from kronewton.lab.training import Run, start

torch.set_num_threads(1)  # the models are tiny, and tests run side by side


def begin(name: str, batch_size: int | None = None) -> Run:
    task = find_task(name, Options(batch_size))
    return start(task, find_rival("kfac"), {}, 0, torch.device("cpu"))


def measured(name: str, steps: int = 0) -> ladder.Ladder:
    run = begin(name)
    return ladder.measure(run, ladder.advance(run, steps, lambda _: None), steps)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_copy_is_at_the_weights_after_so_many_steps_and_unwatched(steps: int) -> None:
    run = begin("two-spirals")
    initial, shown = weights(run.problem.model), []
    problem = ladder.advance(run, steps, shown.append)
    assert len(shown) == max(1, steps)
    assert torch.equal(weights(problem.model), weights(run.problem.model)) == (steps > 0)
    assert torch.equal(weights(problem.model), initial) == (steps == 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in problem.model.modules())


def test_it_is_the_ladder_of_the_next_batch_and_of_128_of_a_full_one() -> None:
    run = begin("digits-mlp", batch_size=16)
    problem = ladder.advance(run, 2, lambda _: None)
    order = torch.randperm(1437, generator=torch.Generator().manual_seed(0))[32:48]
    batch = problem.train.x[order], problem.train.y[order]
    wanted = kn.explain(problem.model, problem.criterion, batch)
    assert ladder.measure(run, problem, 2).explanation == wanted
    assert "128 examples" in str(measured("two-spirals"))
    assert "32 examples" in str(measured("circular-deconvolution"))  # all that it has


@pytest.mark.parametrize(
    ("steps", "said"), [(0, "at initial weights"), (1, "after 1 step of"), (3, "after 3 steps of")]
)
def test_it_says_at_which_weights(steps: int, said: str) -> None:
    assert said in str(measured("linear-regression", steps))


def test_too_many_outputs_are_drawn_and_that_is_said() -> None:
    found = measured("circular-deconvolution")
    assert found.explanation is not None
    assert "which is itself an estimate" in str(found.explanation)
    assert "distances are to the block of 4 draws" in " ".join(str(found).split())
    assert not measured("linear-regression").remark


def test_a_task_that_says_how_many_examples_has_them_drawn() -> None:
    run = begin("digits-mlp")
    small = replace(run, task=replace(run.task, explained=4))
    found = ladder.measure(small, run.task.build(0, torch.device("cpu")), 0)
    assert "which is itself an estimate, 4 examples" in str(found.explanation)
    assert "distances are to the block of 4 draws" in found.remark


def test_a_model_without_a_covered_layer_is_a_sentence() -> None:
    run = begin("two-spirals")
    problem = run.problem
    bare = Problem(nn.PReLU(dtype=torch.cfloat), problem.criterion, problem.train, problem.test)
    found = ladder.measure(run, bare, 0)
    assert found.explanation is None
    assert str(found).startswith("No ladder: no layer of PReLU is of a kind that K-FAC covers")


def test_weights_that_are_no_numbers_are_a_sentence() -> None:
    run = begin("two-spirals")
    nn.init.constant_(run.problem.model[2].weight, torch.nan)  # type: ignore[arg-type, index]
    found = ladder.measure(run, run.problem, 0)
    assert found.explanation is None
    assert str(found).startswith("No ladder: ")


def test_what_refuses_draws_too_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> kn.Explanation:
        raise OptionError("layer '0' has too many numbers.")

    monkeypatch.setattr(kn, "explain", refuse)
    said = str(measured("two-spirals"))
    assert said.startswith("No ladder: draws were refused too, as layer '0' has too many numbers.")
    assert said.endswith("--batch-size sets the examples.")


def test_the_file_has_every_distance(tmp_path: Path) -> None:
    found = measured("linear-regression")
    write_json(tmp_path / "ladder.json", found)
    (row,) = json.loads((tmp_path / "ladder.json").read_text())["explanation"]["rows"]
    assert set(row["distances"]) == set(ladder.RUNGS)
    assert row["distances"]["expand"] < 1e-6 < row["distances"]["diagonal"]


def drawn(found: ladder.Ladder, monkeypatch: pytest.MonkeyPatch) -> Figure:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.ladder_plot(find_task("two-spirals"), found, Path("ladder.png"))
    return figures[0]


def test_picture_has_a_group_per_layer_and_a_mark_per_approximation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = measured("two-spirals")
    assert found.explanation is not None
    figure = drawn(found, monkeypatch)
    (ax,) = figure.axes
    names = [label.get_text().split("\n") for label in ax.get_xticklabels()]
    assert [name[:2] for name in names] == [[f"layer {i}", "linear"] for i in (0, 2, 4)]
    marks = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    for field, label in ladder.RUNGS.items():
        assert marks[label] == [getattr(r.distances, field) for r in found.explanation.rows]
    assert "the exact one" in figure.get_suptitle()
    remarked = drawn(replace(found, remark="of draws"), monkeypatch)
    assert "that of 4 draws" in remarked.get_suptitle()


def test_no_mark_is_above_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured("linear-regression")
    assert found.explanation is not None
    (row,) = found.explanation.rows
    far = replace(row, layer="", distances=replace(row.distances, reduce=3.0))
    explanation = replace(found.explanation, rows=(far,))
    (ax,) = drawn(replace(found, explanation=explanation), monkeypatch).axes
    assert ax.get_ylim()[1] > 3
    assert ax.get_xticklabels()[0].get_text().startswith("the model\nlinear\n1×8, 1 position")


@pytest.mark.parametrize(
    ("distance", "shown"),
    [(0.0, "0"), (1e-8, "0"), (5e-4, "5e-4"), (0.0049, "5e-3"), (0.123, "0.12"), (0.996, "0.996"),
     (1.0, "1.00"), (2.345, "2.35")],
)  # fmt: skip
def test_heights_in_digits(distance: float, shown: str) -> None:
    assert plots._short(distance) == shown
