"""Do u and v fit the weight: every event in every state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from models import Discriminator, images, sigma_max, wrapped_layers
from torch import nn

import srn_kernels as srn
from srn_kernels.model.freshness import State
from srn_kernels.model.weight import NormalizedWeight

UNSET, NEW, FRESH, STALE, UNSEEN = State


def layer_in(state: State) -> tuple[nn.Linear, NormalizedWeight]:
    layer = srn.stable_rank_norm(nn.Linear(5, 4), rank_ratio=0.5)
    entry = layer.__dict__["_srn"]["weight"]
    if state is not NEW:
        entry.become(state)
    assert entry.state() is state
    return layer, entry


def write(layer: nn.Linear, entry: NormalizedWeight) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def replace(layer: nn.Linear, entry: NormalizedWeight) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def write_vectors(layer: nn.Linear, entry: NormalizedWeight) -> None:
    layer.weight_u.copy_(layer.weight_u.roll(1))


def backward(layer: nn.Linear, entry: NormalizedWeight) -> None:
    entry.fit.backward_seen = True


def step(layer: nn.Linear, entry: NormalizedWeight) -> None:
    backward(layer, entry)
    write(layer, entry)


def iterate(layer: nn.Linear, entry: NormalizedWeight) -> None:
    layer(torch.ones(1, 5))


def evaluate(layer: nn.Linear, entry: NormalizedWeight) -> None:
    layer.eval()(torch.ones(1, 5))


def trace(layer: nn.Linear, entry: NormalizedWeight) -> None:
    torch.compile(layer, backend="eager", fullgraph=True)(torch.ones(1, 5))


def load(layer: nn.Linear, entry: NormalizedWeight) -> None:
    layer.load_state_dict({k: t.clone() for k, t in layer.state_dict().items()})


def load_plain(layer: nn.Linear, entry: NormalizedWeight) -> None:
    layer.load_state_dict({k: t.clone() for k, t in nn.Linear(5, 4).state_dict().items()})


def cast(layer: nn.Linear, entry: NormalizedWeight) -> None:
    layer.double().float()


def refresh(layer: nn.Linear, entry: NormalizedWeight) -> None:
    srn.refresh(layer)


def show_a_tensor(layer: nn.Linear, entry: NormalizedWeight) -> None:
    """What torch.func.functional_call puts in a Parameter's place is nobody's new weight."""
    layer._parameters["weight"] = layer.weight.detach() * 3


def in_a_tensor(layer: nn.Linear, entry: NormalizedWeight) -> None:
    """A training forward over a tensor in the Parameter's place moves u and v of the layer."""
    w = layer.weight.detach() * 2
    torch.func.functional_call(layer, {"weight": w}, (torch.ones(1, 5),)).sum()


def write_after_a_backward_and_a_round(layer: nn.Linear, entry: NormalizedWeight) -> None:
    iterate(layer, entry)
    backward(layer, entry)
    iterate(layer, entry)  # u and v have moved since: this is no step of an optimiser
    write(layer, entry)


def write_after_a_backward_and_refresh(layer: nn.Linear, entry: NormalizedWeight) -> None:
    backward(layer, entry)
    refresh(layer, entry)
    write(layer, entry)


# What each event makes of UNSET, NEW, FRESH, STALE and UNSEEN.
TABLE: dict[Callable, tuple[State, State, State, State, State]] = {
    write: (UNSET, NEW, STALE, STALE, UNSEEN),
    replace: (UNSET, NEW, STALE, STALE, UNSEEN),
    write_vectors: (UNSET, FRESH, FRESH, STALE, UNSEEN),
    backward: (UNSET, NEW, FRESH, STALE, UNSEEN),
    step: (UNSET, NEW, FRESH, STALE, UNSEEN),
    iterate: (FRESH, FRESH, FRESH, FRESH, FRESH),
    evaluate: (FRESH, FRESH, FRESH, FRESH, FRESH),
    trace: (UNSET, UNSEEN, UNSEEN, STALE, UNSEEN),
    load: (FRESH, FRESH, FRESH, FRESH, FRESH),
    load_plain: (FRESH, FRESH, FRESH, FRESH, FRESH),
    cast: (UNSET, NEW, FRESH, STALE, UNSEEN),
    refresh: (FRESH, FRESH, FRESH, FRESH, FRESH),
    show_a_tensor: (UNSET, NEW, FRESH, STALE, UNSEEN),
    in_a_tensor: (FRESH, FRESH, FRESH, FRESH, UNSEEN),
    write_after_a_backward_and_a_round: (STALE, STALE, STALE, STALE, STALE),
    write_after_a_backward_and_refresh: (STALE, STALE, STALE, STALE, STALE),
}


@pytest.mark.parametrize("event", TABLE, ids=lambda e: e.__name__)
@pytest.mark.parametrize("state", State, ids=lambda s: s.name)
def test_event(state: State, event: Callable) -> None:
    layer, entry = layer_in(state)
    event(layer, entry)
    assert entry.state() is TABLE[event][list(State).index(state)]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("state", State, ids=lambda s: s.name)
def test_a_copy_has_the_state_and_its_own_weight(state: State, how: Callable) -> None:
    layer, _ = layer_in(state)
    twin = how(layer)
    entry = twin.__dict__["_srn"]["weight"]
    assert entry.state() is state
    assert entry.fit.parameter is (None if state is UNSEEN else twin.weight)
    replace(twin, entry)
    assert entry.state() is TABLE[replace][list(State).index(state)]


def test_moving_to_real_memory_leaves_no_numbers() -> None:
    with torch.device("meta"):
        layer = srn.stable_rank_norm(nn.Linear(5, 4))
    layer.to_empty(device="cpu")
    entry = layer.__dict__["_srn"]["weight"]
    assert entry.state() is UNSET
    nn.init.orthogonal_(layer.weight)
    layer(torch.ones(1, 5))
    assert entry.state() is FRESH
    assert 1 - 1e-6 <= sigma_max(layer) < 1.1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("change", ["replaced", "written", "swapped"])
def test_a_weight_that_changes_before_a_copys_first_forward(how: Callable, change: str) -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 1.0)
    model(images()).sum().backward()
    twin = how(model).eval()
    for layer in wrapped_layers(twin):
        new = 20 * nn.init.orthogonal_(torch.empty_like(layer.weight))
        if change == "replaced":
            layer.weight = nn.Parameter(new)
        elif change == "written":
            with torch.no_grad():
                layer.weight.copy_(new)
        else:
            layer._parameters["weight"] = nn.Parameter(new)
    twin(images())
    for layer in wrapped_layers(twin):
        assert 1 - 1e-6 <= sigma_max(layer) < 1.01


def test_a_write_after_a_backward_passes_for_the_optimisers_step() -> None:
    """As in torch's own spectral norm, and documented: refresh() tells."""
    model = srn.apply_stable_rank_norm(Discriminator(), 1.0)
    model(images()).sum().backward()
    with torch.no_grad():
        model.conv.weight.mul_(0).add_(torch.eye(12, 27).view(12, 3, 3, 3)).mul_(36)
    before = model.conv.weight_u.clone()
    model.eval()(images())
    assert torch.equal(model.conv.weight_u, before)
    srn.refresh(model)
    assert sigma_max(model.conv) == pytest.approx(1.0, abs=1e-5)
