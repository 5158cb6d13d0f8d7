"""Saved, and resumed by another process: the steps that follow are the same bit for bit."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cases import convolutional
from kronewton import KFAC
from kronewton.errors import StateError

CUT, STEPS = 7, 13


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2),
        nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 4),
    )  # fmt: skip


class Tokens(nn.Module):
    """A table, tied to the head, and a parameter that no kind covers by its training gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(4, 5), nn.Linear(5, 5)
        self.head, self.scale = nn.Linear(5, 4, bias=False), nn.Parameter(torch.ones(4))
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.float().abs() * 10).long() % 4  # (N, 3)
        y: Tensor = self.head(self.mix(self.table(tokens)).mean(1)) * self.scale
        return y


@dataclass(frozen=True)
class Config:
    """A training: its model, its optimizer's options, and what is around them."""

    model: Callable[[], nn.Module] = dense
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    parts: tuple[int, ...] = (12,)  # sizes of micro-batches
    schedule: bool = False
    average: bool = False
    criterion: bool = True


SHORT = {"factor_every": 2, "inverse_every": 3, "adapt_every": 2}
CONFIGS = {
    **{f"basis {b}": Config(options={"basis": b, **SHORT})
       for b in ("factored", "eigen", "corrected", "adam", "orthogonal")},
    **{f"fisher {f}": Config(options={"fisher": f}) for f in ("sampled", "exact", "empirical")},
    "nothing set": Config(),
    "numbers": Config(options={"lr": 0.3, "momentum": 0.5, "damping": 0.1, "trust_region": None,
                               "weight_decay": 0.1}),
    "conv": Config(convolutional),
    "conv, best": Config(convolutional, {"sharing": "best", "basis": "eigen"}),
    "embedding": Config(Tokens),
    "embedding, eigen": Config(Tokens, {"basis": "eigen", **SHORT}),
    "embedding, uncovered": Config(Tokens, {"fisher": "empirical"}),
    "accumulation": Config(parts=(6, 6)),
    "accumulation, unequal": Config(parts=(2, 7, 3), options={"fisher": "empirical"}),
    "bfloat16": Config(dtype=torch.bfloat16),
    "bfloat16, adam": Config(dtype=torch.bfloat16, options={"basis": "adam"}),
    "refine": Config(options={"refine": 3}),
    "schedule": Config(schedule=True),
    "schedule, adam": Config(schedule=True, options={"basis": "adam"}),
    "average": Config(average=True),
    "float64": Config(dtype=torch.float64),
    "float64, corrected": Config(dtype=torch.float64, options={"basis": "corrected", **SHORT}),
    "no criterion": Config(criterion=False),
    "maximize": Config(options={"maximize": True}),
    "blocks": Config(options={"largest_side": 4}),
}  # fmt: skip


class Training:
    """A training that can be cut anywhere."""

    def __init__(self, config: Config) -> None:
        torch.manual_seed(1)
        self.config = config
        self.model, self.criterion = config.model().to(config.dtype), nn.CrossEntropyLoss()
        watched = self.criterion if config.criterion else None
        self.optimizer = KFAC(self.model, watched, **config.options)
        self.schedule = CosineAnnealingLR(self.optimizer, STEPS) if config.schedule else None
        average = get_ema_multi_avg_fn(0.9)
        self.average = AveragedModel(self.model, multi_avg_fn=average) if config.average else None

    def steps(self, numbers: range) -> Training:
        for number in numbers:
            torch.manual_seed(number)  # of Dropout; K-FAC's own stream is in its state
            x = torch.randn(12, 3).to(self.config.dtype)
            y = torch.randint(0, 4, (12,))
            self.optimizer.zero_grad()
            for xs, ys in zip(x.split(self.config.parts), y.split(self.config.parts), strict=True):
                (self.criterion(self.model(xs), ys) * (len(xs) / 12)).backward()
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
        return self

    @property
    def members(self) -> dict[str, Any]:
        found = {"model": self.model, "optimizer": self.optimizer}
        found |= {} if self.schedule is None else {"schedule": self.schedule}
        return found | ({} if self.average is None else {"average": self.average})

    def state(self) -> dict[str, Any]:
        return {name: member.state_dict() for name, member in self.members.items()}

    def load(self, state: Mapping[str, Any]) -> Training:
        for name, member in self.members.items():
            member.load_state_dict(state[name])
        return self

    def weights(self) -> Tensor:
        kept = self.model.state_dict() if self.average is None else self.average.state_dict()
        return torch.cat([t.detach().double().flatten() for t in kept.values()])


def go_on(folder: str) -> None:
    """In the new process: every training from its file to its end."""
    torch.set_num_threads(1)
    states = torch.load(Path(folder) / "states.pt")  # weights_only, the default
    ends = {name: Training(CONFIGS[name]).load(state) for name, state in states.items()}
    weights = {name: run.steps(range(CUT, STEPS)).weights() for name, run in ends.items()}
    torch.save(weights, Path(folder) / "ends.pt")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("resumed")
    states = {name: Training(c).steps(range(CUT)).state() for name, c in CONFIGS.items()}
    torch.save(states, folder / "states.pt")
    code = f"import test_resume; test_resume.go_on({str(folder)!r})"
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True)
    ends: dict[str, Tensor] = torch.load(folder / "ends.pt")
    return ends


@pytest.mark.parametrize("name", CONFIGS)
def test_another_process_goes_on_bit_for_bit(name, resumed):
    whole = Training(CONFIGS[name]).steps(range(STEPS))
    assert resumed[name].equal(whole.weights())
    assert bool(torch.isfinite(whole.weights()).all())


@pytest.mark.parametrize("lost", ["generator", "scalars", "A_total", "inverse_B_inverse",
                                  "previous"])  # fmt: skip
def test_whatever_is_lost_of_the_state_is_noticed(lost):
    # Each of these parts is needed: the test above fails without it.
    config = Config(options={"basis": "factored", **SHORT})
    state = copy.deepcopy(Training(config).steps(range(CUT)).state())
    whole = Training(config).steps(range(STEPS)).weights()
    for entries in state["optimizer"]["state"].values():
        kept = entries.get(f"kfac_{lost}")
        if kept is None:
            continue
        if lost == "generator":
            kept.copy_(torch.Generator().manual_seed(99).get_state())
        elif lost == "scalars":
            kept[1] += 1  # the number of the step
        elif lost == "previous":
            del entries["kfac_previous"]
        else:
            kept.mul_(1.001)
    resumed = Training(config).load(state).steps(range(CUT, STEPS))
    assert not resumed.weights().equal(whole)


def test_bfloat16_parameters_have_a_float32_state_and_get_it_back():
    run = Training(CONFIGS["bfloat16"]).steps(range(CUT))
    state = run.optimizer.state_dict()["state"]
    again = Training(CONFIGS["bfloat16"])
    again.optimizer.load_state_dict(state_of(run))
    for index, entries in again.optimizer.state_dict()["state"].items():
        for key, tensor in entries.items():
            wanted = torch.bfloat16 if key == "kfac_previous" else state[index][key].dtype
            assert tensor.dtype == wanted
            assert torch.equal(tensor.nan_to_num(), state[index][key].nan_to_num())
            if "total" in key or "inverse" in key:
                assert tensor.dtype == torch.float32


def state_of(run: Training) -> dict[str, Any]:
    stream = io.BytesIO()
    torch.save(run.optimizer.state_dict(), stream)
    stream.seek(0)
    state: dict[str, Any] = torch.load(stream)
    return state


# Other containers. They keep the numbers and not the strides: equal but for rounding.


def in_float64(name: str) -> Config:
    return replace(CONFIGS[name], dtype=torch.float64)


def test_distributed_checkpoint_in_one_process_by_parameters_names(tmp_path):
    config = in_float64("embedding, uncovered")
    run = Training(config).steps(range(CUT))
    model, optimizer = get_state_dict(run.model, run.optimizer)
    assert "mix.weight" in optimizer["state"]
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path)
    dcp_to_torch_save(tmp_path, tmp_path / "all.pt")
    saved = torch.load(tmp_path / "all.pt")
    again = Training(config)
    set_state_dict(
        again.model, again.optimizer, model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
    )  # fmt: skip
    assert_goes_on(config, again)


def test_distributed_checkpoint_of_a_plain_state_dict(tmp_path):
    config = in_float64("embedding, uncovered")
    dcp.save(Training(config).steps(range(CUT)).state(), checkpoint_id=tmp_path)
    dcp_to_torch_save(tmp_path, tmp_path / "all.pt")
    again = Training(config).load(torch.load(tmp_path / "all.pt"))
    assert_goes_on(config, again)


def test_distributed_checkpoint_makes_no_step_of_its_own():
    run = Training(CONFIGS["nothing set"]).steps(range(2))
    before, state = run.weights(), copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.zero_grad()
    get_state_dict(run.model, run.optimizer)  # sets gradients of zero and calls step()
    assert run.weights().equal(before)
    after = run.optimizer.state_dict()
    for index, entries in state["state"].items():
        for key, tensor in entries.items():
            assert torch.equal(after["state"][index][key].nan_to_num(), tensor.nan_to_num())


@pytest.mark.parametrize("name", ["nothing set", "basis eigen", "embedding, uncovered"])
def test_one_flat_table_of_tensors_is_enough(name):
    # As docs/failures.md has it for safetensors, which takes contiguous tensors by name.
    config = in_float64(name)
    run = Training(config).steps(range(CUT))
    state = run.optimizer.state_dict()
    flat = {
        f"{index}.{key}": tensor.contiguous()
        for index, entries in state["state"].items()
        for key, tensor in entries.items()
    }
    assert all(isinstance(t, Tensor) for t in flat.values())
    again = Training(config)
    again.model.load_state_dict(run.model.state_dict())
    nested: dict[int, dict[str, Tensor]] = {}
    for name_, tensor in flat.items():
        index, key = name_.split(".", 1)
        nested.setdefault(int(index), {})[key] = tensor
    groups = again.optimizer.state_dict()["param_groups"]
    again.optimizer.load_state_dict({"state": nested, "param_groups": groups})
    assert_goes_on(config, again)


def test_the_code_of_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "failures.md").read_text()
    (code,) = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    config = in_float64("nothing set")
    run = Training(config).steps(range(CUT))
    exec(compile(code, "docs/failures.md", "exec"), {"optimizer": run.optimizer})
    assert_goes_on(config, run)


def test_safetensors_keeps_what_the_page_makes_for_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    page = (Path(__file__).parents[1] / "docs" / "failures.md").read_text()
    (code,) = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    write, read = code.split("nested = {}")
    config = in_float64("nothing set")
    run = Training(config).steps(range(CUT))
    names: dict[str, Any] = {"optimizer": run.optimizer}
    exec(compile(write, "docs/failures.md", "exec"), names)
    safetensors.save_file(names["flat"], tmp_path / "state.safetensors")
    again = Training(config)
    again.model.load_state_dict(run.model.state_dict())
    flat = safetensors.load_file(tmp_path / "state.safetensors")
    names = {"optimizer": again.optimizer, "flat": flat}
    exec(compile("nested = {}" + read, "docs/failures.md", "exec"), names)
    assert_goes_on(config, again)


def assert_goes_on(config: Config, again: Training) -> None:
    whole = Training(config).steps(range(STEPS))
    again.steps(range(CUT, STEPS))
    torch.testing.assert_close(again.weights(), whole.weights(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("groups", [3, [3], [{}], [{"params": 3}]])
def test_groups_that_are_none_are_refused(groups):
    run = Training(CONFIGS["nothing set"])
    with pytest.raises(StateError, match="'param_groups' are not tables with a list"):
        run.optimizer.load_state_dict({"state": {}, "param_groups": groups})


@pytest.mark.parametrize("basis", ["adam", "orthogonal", "factored", "eigen"])
@pytest.mark.parametrize("largest", [64, 40, 20, 8])
def test_a_state_goes_on_with_a_lower_largest_side(basis: str, largest: int) -> None:
    torch.manual_seed(0)
    model, criterion = nn.Linear(32, 96), nn.CrossEntropyLoss()
    x, y = torch.randn(64, 32), torch.randint(0, 96, (64,))
    first = KFAC(model, criterion, basis=basis)
    second = KFAC(copy.deepcopy(model), criterion, basis=basis, largest_side=largest)
    state = None
    for optimizer in (first, second):
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(25):
            optimizer.zero_grad()
            trained = optimizer._watcher._model()
            loss = criterion(trained(x), y)
            loss.backward()
            optimizer.step()
        state = optimizer.state_dict()
        assert float(optimizer.diagnostics()["skipped"]) == 0
    assert float(loss.detach()) < 4.0  # log 96 is 4.6
