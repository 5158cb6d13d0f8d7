"""The table of behaviours: K-FAC shows them all, and an optimizer that does not is found out."""

from __future__ import annotations

import json

import pytest
import torch

from kronewton.lab import behaviours
from kronewton.lab.behaviours import BEHAVIOURS, BEYOND, MAKERS
from kronewton.lab.cli import main

EVERY = {**BEHAVIOURS, **BEYOND}


@pytest.mark.parametrize("what", EVERY)
def test_kfac_shows_every_behaviour(what):
    assert EVERY[what](MAKERS["kfac"])


@pytest.mark.parametrize("what", BEHAVIOURS)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_controls_show_those_of_torch(name, what):
    assert BEHAVIOURS[what](MAKERS[name])


class Broken(torch.optim.Optimizer):
    """Does nothing that is asked of it, or does it where it must not."""

    def __init__(self, params, model, criterion, **options) -> None:
        self.generator = torch.Generator().manual_seed(0)
        super().__init__(params if isinstance(params[0], dict) else list(params), {"lr": 0.1})

    def add_param_group(self, param_group) -> None:
        if not self.param_groups:
            super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype == torch.float64:
                    p.sub_(0.1 * (p if p.grad is None else p.grad)).set_(p.contiguous())
                elif p.dtype == torch.bfloat16:
                    p.fill_(torch.inf)
        if closure is not None:
            closure()

    def register_step_post_hook(self, hook) -> None:
        pass

    def register_state_dict_post_hook(self, hook, prepend=False) -> None:
        pass

    def state_dict(self) -> dict:
        raise RuntimeError("no\nstate")

    __getstate__ = state_dict


NOT_TOLD = ("takes a bare list of parameters", "parameters without elements")


@pytest.mark.parametrize("what", [what for what in BEHAVIOURS if what not in NOT_TOLD])
def test_an_optimizer_that_does_not_is_found_out(what):
    answer = behaviours._answer(what, "sgd", lambda make: BEHAVIOURS[what](Broken))
    assert not answer.yes
    assert "\n" not in answer.why


def test_one_that_does_not_move_shows_nothing(monkeypatch):
    monkeypatch.setattr(Broken, "step", lambda self, closure=None: None)
    assert not BEHAVIOURS["takes a bare list of parameters"](Broken)
    assert not BEHAVIOURS["parameters without elements"](Broken)


def test_nan_is_found_in_adamws_weights():
    assert not BEYOND["a batch of NaN leaves the weights finite"](MAKERS["adamw"])


def test_the_command_prints_the_counts_and_writes_the_answers(tmp_path, capsys, monkeypatch):
    chosen = {what: BEHAVIOURS[what] for what in list(BEHAVIOURS)[:2]}
    monkeypatch.setattr(behaviours, "BEHAVIOURS", chosen)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "behaviours", "--json", str(tmp_path / "answers.json")])
    assert ended.value.code == 0
    table = capsys.readouterr().out
    assert "of 2" in table
    assert "K-FAC" in table
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert {a["behaviour"] for a in answers} == {*chosen, *BEYOND}
    assert all(a["yes"] for a in answers if a["optimizer"] == "K-FAC")
