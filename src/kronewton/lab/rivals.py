"""Who is compared: how each optimizer is built, and the grid that it is tuned over.

Every rival has a grid of the same size, a learning rate by a momentum; its settings come in the
order of their usual merit, so that the first few are a fair smaller grid. K-FAC runs with nothing
set, and its grid is that one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import kronewton as kn
from kronewton.errors import OptionError

Setting = Mapping[str, float]
Criteria = tuple[nn.Module, ...]  # the terms of the loss
KFAC = "kfac"


@dataclass(frozen=True)
class Rival:
    """An optimizer by name, its constructor and its grid.

    closure: the step calls the loss by itself, more than once. patience: how many steps it may take
    where K-FAC may take one, more than it has time for: no rival is to run out of steps for being
    cheap.
    """

    name: str
    label: str
    make: Callable[[nn.Module, Criteria, Setting], Optimizer]
    grid: tuple[Setting, ...]
    closure: bool = False
    patience: int = 6


EXTRA_PACKAGE = "pytorch_optimizer"


def has_extra() -> bool:
    """Whether the package is installed that some rivals come from."""
    return importlib.util.find_spec(EXTRA_PACKAGE) is not None


def extra() -> Any:
    """That package: it takes as long to import as torch, and is not always asked for."""
    return importlib.import_module(EXTRA_PACKAGE)


def find_rival(name: str) -> Rival:
    """The rival of that name. Raises OptionError if there is none or its package is missing."""
    if name not in RIVALS:
        raise OptionError(f"there is no optimizer {name!r}; there are {', '.join(RIVALS)}.")
    if name in EXTRA and not has_extra():
        raise OptionError(
            f"{name} comes from the package pytorch-optimizer, which is not installed; "
            f"pip install 'kronewton[bench]' adds it, and {', '.join(available())} are here."
        )
    return RIVALS[name]


def family(name: str) -> str:
    """The optimizer of a rival's name: that of kfac+2, K-FAC with the dial at 2, is kfac."""
    return name.partition("+")[0]


def available() -> list[str]:
    """The names of the rivals whose packages are installed."""
    there = has_extra()
    return [name for name in RIVALS if there or name not in EXTRA]


def describe(setting: Setting) -> str:
    """A setting in a few letters, as the tables show it."""
    parts = [f"{LETTERS.get(key, key)} {value:g}" for key, value in setting.items()]
    return ", ".join(parts) or "nothing set"


def _grid(lrs: tuple[float, ...], second: str, values: tuple[float, ...]) -> tuple[Setting, ...]:
    return tuple({"lr": lr, second: value} for value, lr in product(values, lrs))


def _kfac(model: nn.Module, criteria: Criteria, setting: Setting) -> Optimizer:
    refine = int(setting.get("refine", 0))
    return kn.KFAC(model, criteria, lr=setting.get("lr", "auto"), refine=refine)


def _sgd(model: nn.Module, _: Criteria, setting: Setting) -> Optimizer:
    return torch.optim.SGD(model.parameters(), setting["lr"], setting["momentum"])


def _adam(model: nn.Module, _: Criteria, setting: Setting) -> Optimizer:
    return torch.optim.Adam(model.parameters(), setting["lr"], (setting["beta1"], 0.999))


def _adamw(model: nn.Module, _: Criteria, setting: Setting) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), setting["lr"], (setting["beta1"], 0.999))


def _lbfgs(model: nn.Module, _: Criteria, setting: Setting) -> Optimizer:
    # Several iterations a step: torch evaluates the loss anew at the start of every step, which
    # would double the cost of a single one.
    return torch.optim.LBFGS(
        model.parameters(),
        setting["lr"],
        max_iter=ITERATIONS,
        max_eval=27 * ITERATIONS,  # more than its line searches take
        history_size=int(setting["history"]),
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )


def _soap(model: nn.Module, _: Criteria, setting: Setting) -> Optimizer:
    betas = (setting["beta1"], 0.95)
    optimizer: Optimizer = extra().SOAP(model.parameters(), setting["lr"], betas, weight_decay=0.0)
    return optimizer


def _shampoo(model: nn.Module, _: Criteria, setting: Setting) -> Optimizer:
    optimizer: Optimizer = extra().ScalableShampoo(
        model.parameters(),
        setting["lr"],
        (setting["beta1"], 0.99),
        moving_average_for_momentum=True,
        nesterov=False,
        start_preconditioning_step=ROOTS_EVERY,  # there are none before
        preconditioning_compute_steps=ROOTS_EVERY,
        graft_type=RMSPROP,
    )
    return optimizer


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """All layers' matrices but embeddings' and the last one, the output's, as Muon's author has it.

    Tokens and positions that are parameters of their own are embeddings too: they are no weights.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = [p for name, p in model.named_parameters() if "weight" in name and p.ndim >= 2]
    return [p for p in weights if id(p) not in tables][:-1]


def _muon(model: nn.Module, _: Criteria, setting: Setting) -> Optimizer:
    hidden = _hidden_matrices(model)
    chosen = {id(p) for p in hidden}
    # AdamW trains the rest, at a tenth of the learning rate.
    rest = [p for p in model.parameters() if id(p) not in chosen]
    lr, momentum = setting["lr"], setting["momentum"]
    groups = [
        {"params": hidden, "lr": lr, "momentum": momentum, "use_muon": True},
        {"params": rest, "lr": lr / 10, "use_muon": False},
    ]
    _round_in(extra(), _fast_dtype(model))
    optimizer: Optimizer = extra().Muon([g for g in groups if g["params"]], weight_decay=0.0)
    return optimizer


def _fast_dtype(model: nn.Module) -> torch.dtype:
    """bfloat16, unless the model is on a CPU without units for it, where products take for ever."""
    told: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in old torch
    units = told.get("avx512_bf16") or told.get("amx_bf16")
    on_cpu = next(model.parameters()).device.type == "cpu"
    return torch.float32 if on_cpu and not units else torch.bfloat16


def _round_in(library: ModuleType, dtype: torch.dtype) -> None:
    """Have Muon orthogonalise in a precision, which its constructor can't be told."""
    base = sys.modules[library.Muon.__mro__[1].__module__]
    real = sys.modules["pytorch_optimizer.optimizer.utils.matrix"].zero_power_via_newton_schulz_5
    base.zero_power_via_newton_schulz_5 = partial(real, dtype=dtype)  # type: ignore[attr-defined]


LETTERS = {"beta1": "β₁", "momentum": "μ", "history": "m"}
ROOTS_EVERY = 10  # steps from one root of Shampoo's matrices to the next, as often as SOAP's bases
ITERATIONS = 5  # of L-BFGS in one of its steps
RMSPROP = 3  # the length of Shampoo's steps is RMSProp's, as in Anil et al. 2020
EXTRA = ("soap", "shampoo", "muon")
_SMALL = (3e-3, 1e-3, 1e-2, 3e-4, 3e-2, 1e-1)  # so that the first three lie on both sides
_MIDDLE = (1e-2, 3e-3, 3e-2, 2e-2)
_MUONS = (3e-2, 1e-2, 1e-1, 3e-3, 3e-1, 1e-3)
_LARGE = (0.1, 0.3, 0.03, 1.0, 0.01, 3.0)
_ALL = (
    Rival("kfac", "K-FAC", _kfac, ({},), patience=1),
    Rival("sgd", "SGD", _sgd, _grid(_LARGE, "momentum", (0.9, 0.98))),
    Rival("adam", "Adam", _adam, _grid(_SMALL, "beta1", (0.9, 0.8))),
    Rival("adamw", "AdamW", _adamw, _grid(_SMALL, "beta1", (0.9, 0.8))),
    Rival(
        "lbfgs",
        "L-BFGS",
        _lbfgs,
        tuple(
            {"lr": lr, "history": history}
            for lr, history in product((1.0, 0.3, 3.0, 0.1), (30, 100, 10))
        ),
        closure=True,
        patience=2,
    ),
    Rival("soap", "SOAP", _soap, _grid(_MIDDLE, "beta1", (0.95, 0.9, 0.8)), patience=4),
    Rival("shampoo", "Shampoo", _shampoo, _grid(_SMALL, "beta1", (0.9, 0.8)), patience=2),
    Rival("muon", "Muon", _muon, _grid(_MUONS, "momentum", (0.95, 0.8)), patience=4),
)
RIVALS = {rival.name: rival for rival in _ALL}
