"""Who is compared: how each optimizer is built, and the grid that it is tuned over.

Every rival has a grid of the same size, a learning rate by a momentum; its settings come in the
order of their usual merit, so that the first few are a fair smaller grid. K-FAC runs with nothing
set, and its grid is that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from types import ModuleType

import torch
from torch import nn
from torch.optim import Optimizer

import kronewton as kn
from kronewton.errors import OptionError

extra: ModuleType | None
try:
    import pytorch_optimizer as extra
except ImportError:
    extra = None

Setting = Mapping[str, float]
Criteria = tuple[nn.Module, ...]  # the terms of the loss
KFAC = "kfac"


@dataclass(frozen=True)
class Rival:
    """An optimizer by name, its constructor and its grid.

    closure: the step calls the loss by itself, more than once.
    """

    name: str
    label: str
    make: Callable[[nn.Module, Criteria, Setting], Optimizer]
    grid: tuple[Setting, ...]
    closure: bool = False


def find_rival(name: str) -> Rival:
    """The rival of that name. Raises OptionError if there is none or its package is missing."""
    if name not in RIVALS:
        raise OptionError(f"there is no optimizer {name!r}; there are {', '.join(RIVALS)}.")
    if name in EXTRA and extra is None:
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
    return [name for name in RIVALS if extra is not None or name not in EXTRA]


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
    # One iteration a step, so that its steps compare with the others'.
    return torch.optim.LBFGS(
        model.parameters(),
        setting["lr"],
        max_iter=1,
        max_eval=27,  # the step's own and those of the line search
        history_size=int(setting["history"]),
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )


def _soap(model: nn.Module, _: Criteria, setting: Setting) -> Optimizer:
    assert extra is not None
    betas = (setting["beta1"], 0.95)
    optimizer: Optimizer = extra.SOAP(model.parameters(), setting["lr"], betas, weight_decay=0.0)
    return optimizer


def _shampoo(model: nn.Module, _: Criteria, setting: Setting) -> Optimizer:
    assert extra is not None
    # New roots in every step, the package's default: it diverges with old ones.
    optimizer: Optimizer = extra.Shampoo(model.parameters(), setting["lr"], setting["momentum"])
    return optimizer


def _muon(model: nn.Module, _: Criteria, setting: Setting) -> Optimizer:
    assert extra is not None
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    # AdamW trains the vectors, at a tenth of the learning rate.
    groups = [
        {
            "params": matrices,
            "lr": setting["lr"],
            "momentum": setting["momentum"],
            "use_muon": True,
        },
        {"params": vectors, "lr": setting["lr"] / 10, "use_muon": False},
    ]
    optimizer: Optimizer = extra.Muon([g for g in groups if g["params"]], weight_decay=0.0)
    return optimizer


LETTERS = {"beta1": "β₁", "momentum": "μ"}
EXTRA = ("soap", "shampoo", "muon")
_SMALL = (3e-3, 1e-2, 1e-3, 3e-2, 3e-4, 1e-1)
_LARGE = (0.1, 0.3, 0.03, 1.0, 0.01, 3.0)
_ALL = (
    Rival("kfac", "K-FAC", _kfac, ({},)),
    Rival("sgd", "SGD", _sgd, _grid(_LARGE, "momentum", (0.9, 0.98))),
    Rival("adam", "Adam", _adam, _grid(_SMALL, "beta1", (0.9, 0.8))),
    Rival("adamw", "AdamW", _adamw, _grid(_SMALL, "beta1", (0.9, 0.8))),
    Rival(
        "lbfgs",
        "L-BFGS",
        _lbfgs,
        _grid((1.0, 0.3, 0.1, 0.03, 3.0, 0.01), "history", (20, 100)),
        closure=True,
    ),
    Rival("soap", "SOAP", _soap, _grid(_SMALL, "beta1", (0.95, 0.8))),
    Rival("shampoo", "Shampoo", _shampoo, _grid(_LARGE, "momentum", (0.0, 0.5))),
    Rival(
        "muon", "Muon", _muon, _grid((3e-2, 1e-2, 1e-1, 3e-3, 3e-1, 1e-3), "momentum", (0.95, 0.8))
    ),
)
RIVALS = {rival.name: rival for rival in _ALL}
