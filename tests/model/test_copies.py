"""Models that are copied and pickled, and layers and weights that are tied or replaced."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import images, same_state, state, wrapped, wrapped_layers
from torch import nn

import srn_kernels as srn


def test_tied_weights_share_everything() -> None:
    seen = []

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            seen[:] = self.a.weight, self.b.weight
            return self.b(self.a(x))

    model = srn.apply_stable_rank_norm(Tied(), 0.5)
    model(torch.randn(2, 6)).sum().backward()
    assert seen[0] is seen[1]
    assert len(srn.report(model)) == 1
    keys = set(model.state_dict())
    assert {"a.weight", "b.weight", "a.weight_u", "b.weight_u", "a.weight_v", "b.weight_v"} == keys
    model.double().float()
    model(torch.randn(2, 6))
    assert model.a.weight_u is model.b.weight_u
    twin = copy.deepcopy(model)
    twin(torch.randn(2, 6))
    assert twin.a.weight_u is twin.b.weight_u
    assert twin.a.weight_u is not model.a.weight_u


def test_tied_weights_share_u_and_v_after_a_checkpoint_brought_each_its_own() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    srn.apply_stable_rank_norm(model, 0.5)
    checkpoint = {k: t.clone() for k, t in model.state_dict().items()}
    model.load_state_dict(checkpoint, assign=True)
    assert model[0].weight_u is model[1].weight_u
    assert model[0].weight_v is model[1].weight_v


def test_deepcopy_keeps_its_own_layers() -> None:
    model, x = wrapped(), images()
    model(x).sum().backward()
    twin = copy.deepcopy(model)
    before = state(twin)
    model(x)
    assert same_state(twin, before)
    assert not same_state(model, before)
    assert all(a is not b for a, b in zip(wrapped_layers(twin), wrapped_layers(model), strict=True))
    with torch.no_grad():
        twin.conv.weight.zero_()
    assert model.conv.weight.abs().sum() > 0


def test_whole_module_pickle_continues_identically() -> None:
    model, x = wrapped(), images()
    model(x).sum().backward()
    twin = pickle.loads(pickle.dumps(model))
    for _ in range(2):
        assert torch.equal(twin(x), model(x))
    assert same_state(twin, state(model))
    assert type(twin.conv) is nn.Conv2d


def test_one_layer_pickles_and_copies_without_its_model() -> None:
    model = wrapped()
    model(images())
    small, whole = len(pickle.dumps(model.conv)), len(pickle.dumps(model))
    assert small < whole / 3
    layer = copy.deepcopy(model.conv).eval()
    torch.testing.assert_close(layer(images(1)).shape, model.conv.eval()(images(1)).shape)


def test_a_replaced_layer_raises_and_is_reported() -> None:
    model = wrapped()
    model.head = nn.Linear(6 * 16 * 16, 2)
    with pytest.raises(RuntimeError, match="'head' of Discriminator was replaced"):
        model(images())
    notes = {row.name: row.note for row in srn.report(model)}
    assert "replaced" in notes["head.weight"]
    srn.apply_stable_rank_norm(model, 0.3)
    model(images())
    assert srn.is_normalized(model.head)
    model.head = nn.Linear(6 * 16 * 16, 2)
    srn.fuse(model)
    model(images())
    assert not srn.is_normalized(model.head)
