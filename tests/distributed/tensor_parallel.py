"""Checks of tensor parallelism; test_sharded.py runs them in two processes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from distributed import UV, assert_same, whole
from models import is_raw
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import srn_kernels as srn


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 10), nn.Linear(10, 8, bias=False)
        self.c, self.d = nn.Linear(8, 9), nn.Linear(9, 1)  # 9: the ranks hold 5 and 4 rows

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))


PLAN = {
    "a": ColwiseParallel(),
    "b": RowwiseParallel(),
    "c": ColwiseParallel(output_layouts=Replicate()),
}


def tensor_parallel(rank: int, world: int, *, before: bool, training: bool) -> None:
    torch.manual_seed(4)
    single = srn.apply_stable_rank_norm(Blocks().double(), 0.4).train(training)
    mesh = init_device_mesh("cpu", (world,))
    if before:
        model = parallelize_module(copy.deepcopy(single), mesh, PLAN)
    else:
        model = Blocks().double()
        model.load_state_dict({k: v for k, v in single.state_dict().items() if k[-2:] not in UV})
        srn.apply_stable_rank_norm(parallelize_module(model, mesh, PLAN), 0.4).train(training)
    assert model.a.weight.placements == (Shard(0),)
    assert model.b.weight.placements == (Shard(1),)
    optimisers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, single)]
    x = torch.randn(5, 12, dtype=torch.float64)
    for _ in range(5):
        for m, optimiser in zip((model, single), optimisers, strict=True):
            optimiser.zero_grad()
            (m(x).square().sum() + m(-x).sum()).backward()
            optimiser.step()
    assert_same(model, single)
    torch.testing.assert_close(model.eval()(x), single.eval()(x), rtol=1e-9, atol=1e-11)
    assert is_raw(model)


def tensor_parallel_checkpointed(rank: int, world: int) -> None:
    torch.manual_seed(4)
    single = srn.apply_stable_rank_norm(Blocks().double(), 0.4)
    model = parallelize_module(copy.deepcopy(single), init_device_mesh("cpu", (world,)), PLAN)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    for reentrant in (True, False):
        for m in (model, single):
            m.zero_grad()
            checkpoint(m, x, use_reentrant=reentrant).square().sum().backward()
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-9, atol=1e-11)
    assert_same(model, single)


def tensor_parallel_limits(rank: int, world: int) -> None:
    """What cannot work says so, by name."""
    mesh = init_device_mesh("cpu", (world,))
    model = srn.apply_stable_rank_norm(parallelize_module(Blocks(), mesh, PLAN), 0.4)
    x = torch.randn(5, 12)
    single = copy.deepcopy(model)
    with pytest.raises(Exception, match="round over DTensor weights runs eagerly"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        for call in (compiled, single):
            call(x).square().sum().backward()
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(whole(p.grad), whole(q.grad))
    assert is_raw(model)
    conv = nn.Conv2d(4, 4, 4)
    conv.weight = nn.Parameter(distribute_tensor(conv.weight.detach(), mesh, [Shard(3)]))
    with pytest.raises(NotImplementedError, match="weight is placed as"):
        srn.spectral_norm(conv)
    assert not srn.is_normalized(conv)
    for keywords in ({"gradient": "exact"}, {"preserve": 2}):
        layer = parallelize_module(nn.Linear(4, 4), mesh, ColwiseParallel())
        with pytest.raises(NotImplementedError, match="weight is a DTensor, for which there is"):
            srn.stable_rank_norm(layer, **keywords)
        assert not srn.is_normalized(layer)


def torchs_own_fails_with_tensor_parallelism(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    model = Blocks()
    for layer in model.children():
        parametrizations.spectral_norm(layer)
    with pytest.raises(Exception, match=r"already exists|parameter name"):
        parallelize_module(model, mesh, PLAN)


CHECKS: dict[str, Callable[[int, int], None]] = {
    **{
        f"TP, normalised first={b}, training={t}": functools.partial(
            tensor_parallel, before=b, training=t
        )
        for b in (True, False)
        for t in (True, False)
    },
    "TP, checkpointed": tensor_parallel_checkpointed,
    "TP, limits": tensor_parallel_limits,
    "torch's own fails with TP": torchs_own_fails_with_tensor_parallelism,
}
