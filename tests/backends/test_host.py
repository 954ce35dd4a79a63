"""The loops of a round: Python and C++ do the same."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import srn_kernels as srn
from srn_kernels.backends import cpu, host

WAYS = ["Python", "C++"]


@pytest.fixture(params=WAYS)
def loops(request: pytest.FixtureRequest) -> ModuleType | SimpleNamespace:
    if request.param == "Python":
        return host.PYTHON
    if cpu._cpu is None:
        pytest.skip(f"cpu: {cpu.unavailable_reason()}")
    return cpu._cpu


def test_what_runs_is_cpp_where_it_is_built():
    for name, in_python in vars(host.PYTHON).items():
        built = getattr(cpu._cpu, name, in_python)
        assert getattr(host, name) is built


def test_each_tensor_counts_one_write(loops):
    x, y = torch.zeros(3), torch.zeros(2, requires_grad=True)
    z = x[1:]  # shares the number of x
    loops.tell_autograd([x, y])
    loops.tell_autograd((z,))
    assert (x._version, y._version, z._version) == (2, 1, 2)


def test_inference_tensors_are_passed_over(loops):
    with torch.inference_mode():
        x = torch.zeros(3)
    y = torch.zeros(3)
    loops.tell_autograd([x, y])
    assert y._version == 1


@pytest.mark.parametrize(
    ("tensor", "answer"),
    [
        (torch.zeros(3, 4), True),
        (torch.zeros(2, 3, 4), True),
        (torch.zeros(0, 4), True),
        (torch.zeros(3), False),
        (torch.zeros(4, 3).t(), False),
        (torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), False),
    ],
)
def test_contiguous_matrices(loops, tensor, answer):
    assert loops.are_contiguous_matrices([torch.zeros(2, 2), tensor]) is answer
    assert loops.are_contiguous_matrices([]) is True


def test_strides_are_compared_one_by_one(loops):
    a, b = torch.zeros(4, 4), torch.zeros(4, 4).t()
    assert loops.have_equal_strides([a, b], (a, b)) is True
    assert loops.have_equal_strides([a, b], (a, a)) is False
    with pytest.raises(ValueError):
        loops.have_equal_strides([a, b], [a])


def test_attributes_stand_in_front_of_parameters_until_they_are_taken(loops):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    raw, shown, other = first.weight, torch.ones(2, 2), torch.zeros(2)
    sites = [[(first, "weight"), (second, "weight")], [(first, "bias")]]
    loops.set_attributes(sites, (shown, other))
    assert first.weight is shown and second.weight is shown and first.bias is other
    assert first._parameters["weight"] is raw
    assert loops.take_attributes(sites) == [shown, other]
    assert first.weight is raw and "weight" not in second.__dict__
    assert loops.take_attributes(sites) == [None, None]
    loops.set_attributes(sites, [shown, other])
    second.__dict__["weight"] = other  # set by somebody in between
    assert loops.take_attributes(sites)[0] is other
    with pytest.raises(ValueError):
        loops.set_attributes(sites, [shown])


def test_nothing_keeps_what_was_shown(loops):
    layer, value = nn.Linear(2, 2), SimpleNamespace()
    before = sys.getrefcount(value)
    for _ in range(100):
        loops.set_attributes([[(layer, "weight")]], [value])
        loops.take_attributes([[(layer, "weight")]])
    assert sys.getrefcount(value) == before
    names = sys.getrefcount(layer), sys.getrefcount(layer.__dict__)
    for _ in range(100):
        loops.set_attributes([[(layer, "weight")]], [value])
        loops.take_attributes([[(layer, "weight")]])
    assert (sys.getrefcount(layer), sys.getrefcount(layer.__dict__)) == names


def test_anything_else_raises(loops):
    for wrong in ([None], [1.0], 3):
        with pytest.raises((TypeError, AttributeError)):
            loops.tell_autograd(wrong)
        with pytest.raises((TypeError, AttributeError)):
            loops.are_contiguous_matrices(wrong)
    with pytest.raises((TypeError, AttributeError, ValueError)):
        loops.set_attributes([[(3, "weight")]], [None])
    with pytest.raises((TypeError, ValueError)):
        loops.take_attributes([[3]])


class Net(nn.Module):
    """A transposed weight, a tied one, recurrent ones, and a batch of a loop's every branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied, self.back = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6)
        self.recurrent = nn.LSTM(5, 4)
        self.tied.weight = self.first.weight
        self.back.weight = nn.Parameter(self.back.weight.detach().t().contiguous().t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.recurrent(self.tied(self.back(self.first(x)) + x))[0]


def train() -> list[float]:
    torch.manual_seed(0)
    net = srn.apply_stable_rank_norm(Net(), 0.7)
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    x, losses = torch.randn(7, 6), []
    for _ in range(4):
        optimiser.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        assert "weight" not in net.first.__dict__
        assert net.recurrent._flat_weights[0] is net.recurrent.weight_ih_l0
    return losses


def test_a_model_trains_alike(monkeypatch):
    losses = train()
    for name, function in vars(host.PYTHON).items():
        monkeypatch.setattr(host, name, function)
    assert train() == losses
    assert losses[-1] < losses[0]
