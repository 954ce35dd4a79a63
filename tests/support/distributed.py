"""Runs named checks in several gloo processes at once, and tells which of them failed where."""

from __future__ import annotations

import datetime
import pickle
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def _work(rank: int, world: int, folder: str, checks: Mapping[str, Callable]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        # a file: any number of runs on one machine keep out of each other's way
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, str | None] = {}
    for name, check in checks.items():
        torch.manual_seed(0)
        torch._dynamo.reset()
        try:
            check(rank, world)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"results{rank}").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


def run_checks(folder: Path, checks: Mapping[str, Callable], world: int = 2) -> dict[str, str]:
    """The traceback of every check that failed, by name."""
    mp.spawn(_work, (world, str(folder), dict(checks)), nprocs=world)
    failures: dict[str, str] = {}
    for rank in range(world):
        for name, text in pickle.loads(Path(folder, f"results{rank}").read_bytes()).items():
            if text is not None:
                failures[name] = failures.get(name, "") + f"rank {rank}:\n{text}"
    return failures


def same_on_all_ranks(model: nn.Module) -> bool:
    """Whether parameters and buffers are equal in every bit."""
    flat = torch.cat([t.detach().double().flatten() for t in model.state_dict().values()])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return all(torch.equal(x, flat) for x in everyone)


def batch(world: int, rank: int, step: int, n: int = 2) -> tuple[Tensor, Tensor]:
    """A step's whole batch of images, and this rank's part of it."""
    generator = torch.Generator().manual_seed(1000 + step)
    whole = torch.randn(n * world, 3, 8, 8, generator=generator, dtype=torch.float64)
    return whole, whole[rank * n : (rank + 1) * n]


UV = ("_u", "_v")


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_same(model: nn.Module, expected: nn.Module, rtol: float = 1e-9) -> None:
    want = expected.state_dict()
    found = {k: whole(v) for k, v in model.state_dict().items()}
    assert found.keys() == want.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, want[key], rtol=rtol, atol=rtol * 1e-2, msg=key)


def in_two_processes(checks: Mapping[str, Callable]) -> tuple[Callable, Callable]:
    """A fixture, to be named ``failures``, that runs all checks at once; and a test of each."""

    @pytest.fixture(scope="module")
    def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        return run_checks(tmp_path_factory.mktemp("ranks"), checks)

    @pytest.mark.parametrize("name", checks)
    def test_two_processes(name: str, failures: dict[str, str]) -> None:
        if name in failures:
            pytest.fail(failures[name], pytrace=False)

    return failures, test_two_processes
