"""`kn.explain`: the distances that it prints are the dense ones, and it leaves no trace."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

import kronewton as kn
import oracles
from kronewton.errors import CriterionError, ModelError, OptionError
from oracles import distance
from reading import normal, read_blocks

pytestmark = pytest.mark.usefixtures("float64")


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.Dropout(0.1),
        nn.Conv2d(2, 2, 2, 2, groups=2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


BATCH = normal(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("sharing", ["expand", "reduce", "best"])
def test_distances_are_those_of_what_the_optimizer_holds(sharing: str) -> None:
    model = nn.Sequential(
        *[m for m in conv_net() if not isinstance(m, (nn.BatchNorm2d, nn.Dropout))]
    )
    criterion, (x, y) = nn.CrossEntropyLoss(), BATCH
    found = {r.layer: r.distances for r in kn.explain(model, criterion, BATCH).rows}
    blocks = read_blocks(model, criterion, x, y, sharing=sharing)
    for layer, block in blocks.items():
        wanted = distance(block, oracles.ggn_block(model, criterion, x, y, layer))
        # The optimizer's search for the best ends earlier.
        tolerance = 1e-3 if sharing == "best" else 1e-6
        assert getattr(found[layer], sharing) == pytest.approx(wanted, abs=tolerance)


def test_it_leaves_no_trace() -> None:
    model, criterion = conv_net(), nn.CrossEntropyLoss()
    before, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad():
        kn.explain(model, criterion, BATCH)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not criterion._forward_hooks


def test_the_table_names_layers_matrices_positions_and_what_is_left_out() -> None:
    told = kn.explain(conv_net(), nn.CrossEntropyLoss(), BATCH)
    conv, norm, grouped, linear = told.rows
    assert (conv.layer, conv.kind, conv.matrix, conv.positions) == ("0", "convolution", (2, 10), 16)
    assert (grouped.matrix, grouped.positions) == ((2, 1, 5), 4)
    assert (linear.kind, linear.matrix, linear.positions) == ("linear", (3, 9), 1)
    assert conv.memory == (2**2 + 10**2) * 8
    text = str(told)
    assert "2×1×5" in text
    assert (norm.kind, norm.matrix, norm.positions) == ("norm", (4, 1), 1)
    assert "5 examples" in text
    assert "<td>convolution</td>" in told._repr_html_()


def test_draws_instead_of_columns() -> None:
    told = kn.explain(conv_net(), nn.CrossEntropyLoss(), BATCH, fisher="sampled", draws=3, seed=1)
    assert all(0 <= r.distances.best <= r.distances.expand + 1e-9 for r in told.rows)
    assert "which is itself an estimate" in str(told)


class Two(nn.Module):
    """A model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x + y)


def test_several_inputs() -> None:
    batch = (normal(4, 3), normal(4, 3, seed=1)), normal(4, 2)
    (row,) = kn.explain(Two(), nn.MSELoss(), batch).rows
    assert row.distances.expand <= 1e-6


def test_what_is_refused() -> None:
    model, criterion = nn.Linear(3, 2), nn.MSELoss()
    batch = normal(4, 3), normal(4, 2)
    with pytest.raises(OptionError, match="fisher must be 'exact' or 'sampled' here"):
        kn.explain(model, criterion, batch, fisher="empirical")
    with pytest.raises(OptionError, match="criterion must be"):
        kn.explain(model, nn.functional.mse_loss, batch)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no layer of PReLU is of a kind"):
        kn.explain(nn.PReLU(dtype=torch.cfloat), criterion, batch)
    with pytest.raises(CriterionError, match="shape"):
        kn.explain(model, criterion, (normal(4, 3), normal(4, 3)))

    class Stopped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    with pytest.raises(CriterionError, match=r"output of Sequential does not depend on any"):
        kn.explain(nn.Sequential(nn.Linear(3, 2), Stopped()), criterion, batch)


def test_too_many_backward_passes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules["kronewton.explain"], "MOST_COLUMNS", 1)
    with pytest.raises(OptionError, match=r"takes 2 backward passes .*fisher='sampled'"):
        kn.explain(nn.Linear(3, 2), nn.MSELoss(), (normal(4, 3), normal(4, 2)))
