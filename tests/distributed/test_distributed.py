"""DistributedDataParallel and FullyShardedDataParallel (the first), gloo, two processes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from distributed import batch, in_two_processes, same_on_all_ranks
from models import Discriminator, is_raw, wrapped_layers
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import srn_kernels as srn


class Gan(Discriminator):
    """With a layer that the forward does not always use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)
        self.use_spare = False

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + self.spare(x[:, 0, 0, :4]).sum(1, keepdim=True) if self.use_spare else out


def model_of(rank: int, rank_ratio: float = 0.3, **keywords) -> nn.Module:
    """Unequal seeds: the ranks start from different weights and random states."""
    torch.manual_seed(100 + rank)
    model = srn.apply_stable_rank_norm(Gan().double(), rank_ratio, **keywords)
    torch.manual_seed(200 + rank)
    return model


def assert_close_state(model: nn.Module, expected: nn.Module) -> None:
    want = expected.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, want[key], rtol=1e-9, atol=1e-11, msg=key)


def twenty_steps(rank: int, world: int, *, broadcast: bool, unused: bool, groups: int = 1) -> None:
    """Bit-identical ranks, and the numbers of one process with the whole batch."""
    model = model_of(rank, groups=groups)
    ddp = DistributedDataParallel(model, broadcast_buffers=broadcast, find_unused_parameters=unused)
    single = copy.deepcopy(model)
    optimisers = [torch.optim.Adam(m.parameters(), 1e-3) for m in (model, single)]
    for step in range(20):
        whole, part = batch(world, rank, step)
        for m in (model, single):
            m.use_spare = not unused or step % 3 == 1
        for call, x, optimiser in zip((ddp, single), (part, whole), optimisers, strict=True):
            optimiser.zero_grad()
            # D(real) and D(fake): two forwards before one backward
            (torch.relu(1 - call(x)).mean() + torch.relu(1 + call(x.flip(1))).mean()).backward()
            optimiser.step()
        assert same_on_all_ranks(model), step
    assert_close_state(model, single)
    assert is_raw(model)


def torchs_own_diverges(rank: int, world: int) -> None:
    """u, v from the global random state are never made equal without broadcast_buffers."""
    torch.manual_seed(100 + rank)
    model = Discriminator().double()
    for layer in model.children():
        parametrizations.spectral_norm(layer)
    DistributedDataParallel(model, broadcast_buffers=False)
    assert not same_on_all_ranks(model)
    ours = model_of(rank)
    with torch.no_grad():
        for p in ours.parameters():  # what DDP does to the parameters
            dist.broadcast(p, 0)
    DistributedDataParallel(ours, broadcast_buffers=False)
    ours(batch(world, rank, 0)[1])
    assert same_on_all_ranks(ours)


def accumulation(rank: int, world: int) -> None:
    model = model_of(rank)
    model.use_spare = True
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    single = copy.deepcopy(model)
    optimisers = [torch.optim.SGD(m.parameters(), 1e-2) for m in (model, single)]
    for step in range(6):
        for call, m, optimiser in zip((ddp, single), (model, single), optimisers, strict=True):
            optimiser.zero_grad()
            for micro in range(3):
                whole, part = batch(world, rank, 10 * step + micro)
                if m is single:
                    call(whole).square().mean().backward()
                elif micro < 2:
                    with ddp.no_sync():
                        call(part).square().mean().backward()
                else:
                    call(part).square().mean().backward()
            optimiser.step()
        assert same_on_all_ranks(model)
    assert_close_state(model, single)


def arrivals(rank: int, world: int, groups: int) -> list[str]:
    """The order of backward: layers' inputs, and buckets that were ready to be sent."""
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)]).double()
    srn.apply_stable_rank_norm(model, 0.5, groups=groups)
    # 8.6 KB a layer: a bucket each
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.008, broadcast_buffers=False)
    events: list[str] = []

    def hook(_, bucket):  # torch compares annotations by identity; ours would be strings
        events.append("bucket")
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda f: f.value()[0] / world)

    ddp.register_comm_hook(None, hook)
    x = torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # DDP rebuilds its buckets after the first backward
        events.clear()
        y = x
        out = ddp(y)
        nodes, node = [], out.grad_fn
        while node is not None and len(nodes) < 6:  # addmm -> addmm by the input's edge
            nodes.append(node)
            node = node.next_functions[1][0]
        for i, n in enumerate(nodes):
            n.register_hook(lambda *_, i=i: events.append(f"layer {5 - i}"))
        out.sum().backward()
    return events


def overlap(rank: int, world: int) -> None:
    """One node: no bucket before the last layer's backward; three: two thirds before."""
    one, three = arrivals(rank, world, 1), arrivals(rank, world, 3)
    assert "bucket" not in one[: one.index("layer 0")]
    assert three[: three.index("layer 0")].count("bucket") >= 3


def compiled(rank: int, world: int, *, outside: bool) -> None:
    model = model_of(rank)
    single = model_of(0)  # after DDP's constructor all ranks have rank 0's weights
    if outside:
        ddp = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    else:
        ddp = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
    for m in (model, single):
        m.use_spare = True
    optimisers = [torch.optim.SGD(m.parameters(), 1e-2) for m in (model, single)]
    for step in range(3):
        whole, part = batch(world, rank, step)
        for call, x, optimiser in zip((ddp, single), (part, whole), optimisers, strict=True):
            optimiser.zero_grad()
            call(x).square().mean().backward()
            optimiser.step()
        assert same_on_all_ranks(model)
    assert_close_state(model, single)
    assert is_raw(model)


def fsdp1(rank: int, world: int, *, original: bool, nested: bool) -> None:
    """FSDP1 shows weights that are whole only while it gathers them: refused, before and after."""
    model = model_of(0, 0.3)
    policy = ModuleWrapPolicy({nn.Conv2d, nn.Linear}) if nested else None
    wrap = functools.partial(
        FullyShardedDataParallel,
        auto_wrap_policy=policy,
        use_orig_params=original,
        device_id=torch.device("cpu"),
    )
    model(batch(world, rank, 0)[1])
    fsdp = wrap(model)
    with pytest.raises(RuntimeError, match=r"FSDP1.*fully_shard"):
        fsdp(batch(world, rank, 0)[1])
    late = FullyShardedDataParallel(
        Discriminator().double(), use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match=r"conv\.weight is flattened .*FSDP1.* use fully_shard"):
        srn.apply_stable_rank_norm(late)
    assert not wrapped_layers(late)


CHECKS: dict[str, Callable[[int, int], None]] = {
    **{
        f"20 steps, broadcast_buffers={b}, find_unused_parameters={f}": functools.partial(
            twenty_steps, broadcast=b, unused=f
        )
        for b in (True, False)
        for f in (True, False)
    },
    "20 steps, groups=3": functools.partial(twenty_steps, broadcast=False, unused=False, groups=3),
    "torch's own diverges": torchs_own_diverges,
    "no_sync": accumulation,
    "overlap": overlap,
    "compile(DDP)": functools.partial(compiled, outside=True),
    "DDP(compile)": functools.partial(compiled, outside=False),
    **{
        f"FSDP1, use_orig_params={o}, nested={n}": functools.partial(fsdp1, original=o, nested=n)
        for o in (True, False)
        for n in (True, False)
    },
}


failures, test_two_processes = in_two_processes(CHECKS)
