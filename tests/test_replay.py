"""A rerun of the model gives the same output and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kronewton.replay import Bridge, ModelCall, Replayer, follow, leaves, random_state

pytestmark = pytest.mark.usefixtures("float64")


def call(*args: Tensor, **kwargs: Tensor) -> ModelCall:
    return ModelCall(args, kwargs, random_state())


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def trained(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


def test_dropout_masks_repeat_and_batch_statistics_are_the_batches():
    model, x = noisy(), torch.randn(6, 3)
    replayer, seen = Replayer(model, trained(model)), call(x)
    first = model(x)
    torch.rand(5)  # the training draws on
    again = replayer.run(seen, ())
    assert again.equal(first)
    assert not model(x).equal(first)


def test_buffers_parameters_and_random_streams_are_as_before():
    model, x = noisy(), torch.randn(6, 3)
    replayer, seen = Replayer(model, trained(model)), call(x)
    model(x)
    buffers = {k: (b, b.clone()) for k, b in model.named_buffers()}
    parameters = {k: (p, p.clone()) for k, p in model.named_parameters()}
    stream = torch.get_rng_state()
    replayer.run(seen, (), [p.detach() * 2 for p in trained(model)])
    for k, b in model.named_buffers():
        assert b is buffers[k][0]
        assert b.equal(buffers[k][1])
    for k, p in model.named_parameters():
        assert p is parameters[k][0]
        assert p.equal(parameters[k][1])
    assert torch.get_rng_state().equal(stream)


def test_buffers_that_are_rebound_or_missing_are_restored():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("absent", None)
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return self.linear(x)

    model, x = Counting(), torch.randn(3, 2)
    before = model.count
    Replayer(model, trained(model)).run(call(x), ())
    assert model.count is before
    assert float(before) == 0
    assert model.absent is None


def test_other_parameters_take_the_place_and_a_failing_model_gets_its_own_back():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    replayer, others = Replayer(model, trained(model)), [torch.randn(2, 3), torch.randn(2)]
    torch.testing.assert_close(replayer.run(call(x), (), others), x @ others[0].T + others[1])
    own, wrong = trained(model), call(torch.randn(4, 5))
    stream = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shape"):
        replayer.run(wrong, (), others)
    assert all(p is q for p, q in zip(trained(model), own, strict=True))
    assert torch.get_rng_state().equal(stream)


def test_without_tensors_the_parameters_are_those_of_now():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    replayer, seen = Replayer(model, trained(model)), call(x)
    with torch.no_grad():
        model.bias.add_(1)
    torch.testing.assert_close(replayer.run(seen, ()), x @ model.weight.T + model.bias)


def test_a_tied_parameter_is_replaced_in_all_its_slots():
    model, x = nn.Sequential(nn.Linear(3, 3, False), nn.Linear(3, 3, False)), torch.randn(4, 3)
    model[1].weight = model[0].weight
    W = torch.randn(3, 3)
    replayer = Replayer(model, [model[0].weight])
    assert len(replayer.slots) == 2
    torch.testing.assert_close(replayer.run(call(x), (), [W]), x @ W.T @ W.T)
    assert model[1].weight is model[0].weight


def test_parameters_that_are_not_named_stay():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    W = torch.randn(2, 3)
    found = Replayer(model, [model.weight]).run(call(x), (), [W])
    torch.testing.assert_close(found, x @ W.T + model.bias)


def test_keyword_arguments_and_a_path_into_the_result():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, tuple[Tensor, ...]]:
            return {"heads": (self.linear(x), self.linear(x) * scale)}

    model, x = Two(), torch.randn(4, 3)
    seen = call(x, scale=torch.tensor(3.0))
    found = Replayer(model, trained(model)).run(seen, ("heads", 1))
    torch.testing.assert_close(found, 3 * model.linear(x))


def test_leaves_and_follow_are_inverse():
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    nest = {"x": a, "y": [b, {"z": (c, None, "text")}], 3: 5}
    found = list(leaves(nest))
    assert [path for path, _ in found] == [("x",), ("y", 0), ("y", 1, "z", 0)]
    assert all(follow(nest, path) is tensor for path, tensor in found)


# Between the model's output and the criterion.

LINEAR = {
    "view": lambda z: z.view(2, 12),
    "squeeze": lambda z: z.squeeze(1),
    "slice": lambda z: z[1:, :, ::2],
    "permute": lambda z: z.permute(2, 0, 1).reshape(-1, 4),
    "flatten": lambda z: z.flatten(0, 1),
    "index": lambda z: z[torch.tensor([3, 0])],
    "scaled": lambda z: z * 0.5,
    "padded": lambda z: nn.functional.pad(z, (1, 1)),
    "mean": lambda z: z.mean(-1),
    "product": lambda z: z @ torch.arange(12.0).reshape(6, 2),
}
NONLINEAR = {
    "square": lambda z: z.square(),
    "softmax": lambda z: z.softmax(-1),
    "shift": lambda z: z + 1,
    "constant": lambda z: z * 0 + 1,
}


def bridged(between) -> tuple[Tensor, Bridge, Tensor]:
    z = torch.randn(4, 1, 6, requires_grad=True)
    output = between(z)
    return z, Bridge(z, output, ()), output


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_bridge_carries_tangents_and_other_outputs(name):
    z, bridge, output = bridged(LINEAR[name])
    assert bridge.linear
    tangent = torch.randn_like(z)
    torch.testing.assert_close(bridge.push(tangent), LINEAR[name](tangent))
    torch.testing.assert_close(bridge.push(z.detach()), output.detach())


@pytest.mark.parametrize("name", LINEAR)
def test_a_bridge_survives_the_users_backward(name):
    z, bridge, output = bridged(LINEAR[name])
    output.square().sum().backward()
    tangent = torch.randn_like(z)
    for _ in range(2):
        torch.testing.assert_close(bridge.push(tangent), LINEAR[name](tangent))


@pytest.mark.parametrize("name", NONLINEAR)
def test_a_bridge_that_is_not_linear_says_so(name):
    assert not bridged(NONLINEAR[name])[1].linear


def test_a_bridge_leaves_no_gradient():
    z, bridge, _ = bridged(LINEAR["view"])
    bridge.push(torch.randn_like(z))
    assert z.grad is None
