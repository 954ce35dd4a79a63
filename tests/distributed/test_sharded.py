"""Weights that two processes hold together: FSDP2 (fully_shard) and tensor parallelism, gloo."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import UV, assert_same, batch, in_two_processes, whole
from models import Discriminator, is_raw, state, wrapped_layers
from tensor_parallel import CHECKS as TENSOR_PARALLEL
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import srn_kernels as srn


class Deep(Discriminator):
    """With attention, whose output projection is read and not called, and a direct reader."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.head.bias.dtype)  # a unit that FSDP2 calls casts its output
        if self.checkpointed:
            y = checkpoint(self.conv, x, use_reentrant=False)
            y = checkpoint(self.up, torch.relu(y), use_reentrant=False)
        else:
            y = self.up(torch.relu(self.conv(x)))
        tokens = torch.relu(y).flatten(2).transpose(1, 2)[:, ::8]
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(torch.relu(y).flatten(1)) + tokens.sum((1, 2), keepdim=True)[:, 0]


TYPES = [nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention]


def normalised(model: nn.Module, rank_ratio: float = 0.3) -> nn.Module:
    return srn.apply_stable_rank_norm(model, rank_ratio, layer_types=TYPES)


def shard(model: nn.Module, nested: bool, **keywords) -> None:
    if nested:
        for unit in (model.conv, model.up, model.attention):
            fully_shard(unit, **keywords)
    fully_shard(model, **keywords)


def train(model, single, world, rank, steps=4, cast=None, tolerance=1e-9) -> None:
    """Losses of every step equal those of one process with the whole batch."""
    optimisers = [torch.optim.Adam(m.parameters(), 1e-3) for m in (model, single)]
    for step in range(steps):
        everything, part = batch(world, rank, step)
        losses = []
        for m, x, optimiser in zip((model, single), (part, everything), optimisers, strict=True):
            x = x if cast is None else x.to(cast)
            optimiser.zero_grad()
            loss = torch.relu(1 - m(x)).mean() + torch.relu(1 + m(x.flip(1))).mean()
            loss = loss.to(x.dtype)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        dist.all_reduce(losses[0])
        torch.testing.assert_close(losses[0] / world, losses[1], rtol=tolerance, atol=tolerance)


def fsdp2(
    rank: int, world: int, *, nested: bool, before: bool, checkpointed: bool = False, shared=False
) -> None:
    single = normalised(Deep(checkpointed).double())
    model = copy.deepcopy(single) if before else Deep(checkpointed).double()
    if not before:
        model.load_state_dict({k: v for k, v in single.state_dict().items() if k[-2:] not in UV})
    shard(model, nested)
    if not before:
        normalised(model)
    if shared:
        pairs = ((model, batch(world, rank, 0)[1]), (single, batch(world, rank, 0)[0]))
        for m, x in pairs:
            with srn.shared_round(m):
                (m(x).mean() - 2 * m(-x).square().mean()).backward()
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-9, atol=1e-11)
    else:
        train(model, single, world, rank)
    assert_same(model, single)
    assert is_raw(model)
    x = batch(world, rank, 99)[1]
    model.eval(), single.eval()
    before_state = state(model)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model(x), single(x), rtol=1e-9, atol=1e-11)
    assert all(torch.equal(v, before_state[k]) for k, v in state(model).items())


def other_kinds(rank: int, world: int) -> None:
    """What only gathered weights offer in nested units: gradient="exact", preserve=2, sigma_max,
    gain."""
    single = Discriminator().double()
    srn.apply_stable_rank_norm(
        single,
        0.4,
        overrides={
            "conv": {"gradient": "exact", "sigma_max": 0.5, "gain": True},
            "up": {"preserve": 2, "gain": True},
            "head": {"sigma_max": 0.5, "gain": True},
        },
        init_iterations=50,
    )
    model = copy.deepcopy(single)
    for unit in model.children():
        fully_shard(unit)
    fully_shard(model)
    train(model, single, world, rank, steps=3, tolerance=1e-8)
    assert_same(model, single, rtol=1e-6)


def one_all_reduce_a_round(rank: int, world: int) -> None:
    """u, v and the scalars of all nested units in one all-reduce of R + C + 1 numbers each."""
    model = Deep().double()
    for unit in (model.conv, model.head, model.attention):
        fully_shard(unit)
    fully_shard(model)
    srn.apply_stable_rank_norm(model, 0.3, layer_types=TYPES, exclude="up")
    x = batch(world, rank, 0)[1]
    model(x).sum().backward()
    sizes: list[int] = []
    original = dist.all_reduce

    def counted(tensor, *arguments, **keywords):
        sizes.append(tensor.numel())
        return original(tensor, *arguments, **keywords)

    dist.all_reduce = counted
    try:
        with CommDebugMode() as comms:
            loss = model(x).sum()
        forward = list(sizes)
        plain = Deep().double()
        for unit in (plain.conv, plain.head, plain.attention):
            fully_shard(unit)
        fully_shard(plain)
        with CommDebugMode() as plain_comms:
            plain(x)
        loss.backward()
    finally:
        dist.all_reduce = original
    matrices = [(row.shape[0], row.shape[1]) for row in srn.report(model)]
    assert forward == [sum(r + c + 1 for r, c in matrices)]
    assert sizes == forward  # and none in backward
    gathers = [
        sum(n for op, n in c.get_comm_counts().items() if "all_gather" in str(op))
        for c in (comms, plain_comms)
    ]
    assert gathers[0] == gathers[1]  # no gather beyond FSDP's own


def mixed_precision(rank: int, world: int, *, nested: bool) -> None:
    single = normalised(Deep())
    model = copy.deepcopy(single)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    shard(model, nested, mp_policy=policy)
    with torch.no_grad():  # so that the hooks below come after those of the units
        model(batch(world, rank, 0)[1].float())
    seen: dict[str, Tensor] = {}
    for name in ("conv", "up", "head"):
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(
            lambda m, _, name=name: seen.__setitem__(name, m.weight.detach())
        )
    train(model, single, world, rank, cast=torch.float32, tolerance=3e-2)
    for name, w_hat in seen.items():
        assert w_hat.dtype == torch.bfloat16
        dim = 1 if name == "up" else 0
        top = torch.linalg.matrix_norm(w_hat.double().movedim(dim, 0).flatten(1), 2).item()
        assert abs(top - 1) < 5e-2, (name, top)
    for value in state(model).values():
        assert value.dtype == torch.float32
    for p in model.parameters():
        assert p.dtype == p.grad.dtype == torch.float32


def torchs_own_fails_with_mixed_precision(rank: int, world: int) -> None:
    model = Discriminator()
    for layer in model.children():
        parametrizations.spectral_norm(layer)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="dtype"):
        model(batch(world, rank, 0)[1].float())


def initialised_after_sharding(rank: int, world: int) -> None:
    """meta, fully_shard, to_empty, initialise: u and v converge on the shards."""
    with torch.device("meta"):
        model = srn.apply_stable_rank_norm(Discriminator().double(), 1.0)
    shard_all = [model.conv, model.up, model.head]
    for unit in shard_all:
        fully_shard(unit)
    fully_shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(7)
    for p in model.parameters():
        nn.init.normal_(p)
    model.eval()
    model(batch(world, rank, 0)[1])
    for layer in wrapped_layers(model):
        dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        w_hat = whole(srn.normalized_weight(layer)).movedim(dim, 0).flatten(1)
        assert 0.999 < torch.linalg.matrix_norm(w_hat, 2).item() < 1.1
    rows = {row.name: row for row in srn.report(model)}
    with torch.no_grad():  # and again in place, with no backward in between
        model.conv.weight.mul_(7.0)
    model(batch(world, rank, 0)[1])
    for row in srn.report(model):
        factor = 7.0 if row.name == "conv.weight" else 1.0
        assert row.sigma == pytest.approx(factor * rows[row.name].sigma, rel=1e-2)


def written_without_a_backward(rank: int, world: int) -> None:
    """Shards of a unit that change between forwards, without a backward, make u, v converge."""
    single = normalised(Deep().double())
    model = copy.deepcopy(single)
    shard(model, nested=True)
    x = batch(world, rank, 3)[0]  # the same on every rank
    for training in (True, False):
        for m in (model, single):
            m.train()(x).sum().backward()
            m.train(training)(x)  # u and v belong to the weights since
            with torch.no_grad():
                for w in (m.conv.weight, m.up.weight, m.attention.in_proj_weight):
                    w.mul_(3 * w.clone())  # other top singular vectors
            with torch.no_grad():
                m.eval()(x)
        for key in ("conv.weight_u", "up.weight_v", "attention.in_proj_weight_u"):
            found, want = model.get_buffer(key), single.get_buffer(key)
            torch.testing.assert_close(whole(found), want, rtol=1e-9, atol=1e-11)


def distributed_checkpoint(rank: int, world: int) -> None:
    single = normalised(Deep().double())
    model = copy.deepcopy(single)
    shard(model, True)
    train(model, single, world, rank, steps=2)
    folder = [None]
    if rank == 0:
        import tempfile

        folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder[0])
    other = normalised(Deep().double())
    shard(other, True)
    target = {"model": other.state_dict()}
    dcp.load(target, checkpoint_id=folder[0])
    other.load_state_dict(target["model"])
    assert_same(other, single)
    alone = normalised(Deep().double())  # and into a model that is not sharded
    target = {"model": alone.state_dict()}
    dcp.load(target, checkpoint_id=folder[0])
    alone.load_state_dict(target["model"])
    train(other, alone, world, rank, steps=2)
    dist.barrier()


def look_and_take_off(rank: int, world: int) -> None:
    """normalized_weight, report, set_rank_ratio, refresh and remove on shards."""
    single = normalised(Deep().double())
    model = copy.deepcopy(single)
    shard(model, True)
    for m in (model, single):
        srn.set_rank_ratio(m, 0.5)
        srn.refresh(m, 1000)
    for a, b in zip(wrapped_layers(model), wrapped_layers(single), strict=True):
        for name in b.__dict__["_srn"]:
            found, want = srn.normalized_weight(a, name), srn.normalized_weight(b, name)
            torch.testing.assert_close(whole(found), want, rtol=1e-11, atol=1e-12)
            g = torch.randn_like(want)
            (grad,) = torch.autograd.grad(want, getattr(b, name), g)
            placed = distribute_tensor(g, found.device_mesh, found.placements)
            (split,) = torch.autograd.grad(found, getattr(a, name), placed)
            torch.testing.assert_close(whole(split), grad, rtol=1e-10, atol=1e-12)
    for a, b in zip(srn.report(model), srn.report(single), strict=True):
        assert (a.name, a.active) == (b.name, b.active)
        assert a.sigma == pytest.approx(b.sigma, rel=1e-12)
        assert a.normalized_stable_rank == pytest.approx(b.normalized_stable_rank, rel=1e-10)
    srn.remove_stable_rank_norm(model)
    srn.remove_stable_rank_norm(single)
    assert_same(model, single)


# --- tensor parallelism --------------------------------------------------------------------------


def edge_cases(rank: int, world: int) -> None:
    """Zero, non-finite, vector-like and unevenly split weights, against one process."""
    mesh = init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(1)
    for shape, dim, value in [
        ((7, 5), 0, None),
        ((1, 6), 0, None),  # rank 1 holds nothing
        ((6, 1), 0, None),
        ((5, 3, 2, 2), 1, None),
        ((4, 4), 0, 0.0),
        ((4, 4), 0, float("nan")),
        ((4, 4), 0, 1e15),
        ((4, 4), 0, 1e-10),
    ]:
        w = torch.randn(shape, generator=generator, dtype=torch.float32)
        if value is not None:
            w = w * value
        for place in (Shard(0), Shard(1), Replicate()):
            layers = []
            for split in (True, False):
                layer = nn.Module()
                data = distribute_tensor(w.clone(), mesh, [place]) if split else w.clone()
                layer.weight = nn.Parameter(data)
                layers.append(srn.stable_rank_norm(layer, rank_ratio=0.5, dim=dim))
            out = [srn.normalized_weight(layer) for layer in layers]
            g = torch.randn(shape, generator=generator)
            torch.testing.assert_close(whole(out[0]), out[1], rtol=2e-5, atol=2e-6, equal_nan=True)
            out[0].backward(distribute_tensor(g, mesh, [place]))
            out[1].backward(g)
            scale = layers[1].weight.grad.abs().nan_to_num(1.0).max().item()
            torch.testing.assert_close(
                whole(layers[0].weight.grad),
                layers[1].weight.grad,
                rtol=1e-4,
                atol=1e-4 * scale,
                equal_nan=True,
            )
            for key in ("weight_u", "weight_v"):
                torch.testing.assert_close(
                    getattr(layers[0], key), getattr(layers[1], key), rtol=1e-4, atol=1e-5
                )


CHECKS: dict[str, Callable[[int, int], None]] = {
    **{
        f"FSDP2, nested={n}, normalised first={b}": functools.partial(fsdp2, nested=n, before=b)
        for n in (True, False)
        for b in (True, False)
    },
    **{
        f"FSDP2, checkpointed, nested={n}": functools.partial(
            fsdp2, nested=n, before=True, checkpointed=True, shared=True
        )
        for n in (True, False)
    },
    **{
        f"FSDP2, shared round, nested={n}, normalised first={b}": functools.partial(
            fsdp2, nested=n, before=b, shared=True
        )
        for n in (True, False)
        for b in (True, False)
    },
    "FSDP2, exact gradient, preserve, soft bound and gain": other_kinds,
    "one all-reduce a round": one_all_reduce_a_round,
    **{
        f"bfloat16, nested={n}": functools.partial(mixed_precision, nested=n) for n in (True, False)
    },
    "torch's own fails in bfloat16": torchs_own_fails_with_mixed_precision,
    "initialised after sharding": initialised_after_sharding,
    "written without a backward": written_without_a_backward,
    "distributed checkpoint": distributed_checkpoint,
    "look and take off": look_and_take_off,
    "edge cases": edge_cases,
    **TENSOR_PARALLEL,
}


failures, test_two_processes = in_two_processes(CHECKS)
