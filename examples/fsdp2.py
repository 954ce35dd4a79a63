"""FSDP2 on two processes: sharded weights, and the same result as in one process (CPU, gloo)."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn

import srn_kernels as srn

PROCESSES = 2


def train(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)  # every process begins with the same weights
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh())
    alone = srn.apply_stable_rank_norm(copy.deepcopy(model), 0.25)

    srn.apply_stable_rank_norm(model, 0.25)  # before fully_shard or after it
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)

    batch = torch.randn(8, 32)  # all of it on each process, so that one process can be compared
    for m in (model, alone):
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            m(batch).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.eval()(batch), alone.eval()(batch), rtol=1e-4, atol=1e-5)
    rows = srn.report(model)  # every process has to ask
    if rank == 0:
        print(f"{PROCESSES} processes, shards of {tuple(model[0].weight.to_local().shape)} each")
        print(rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        spawn(train, (f"file://{Path(folder) / 'meeting'}",), nprocs=PROCESSES)
