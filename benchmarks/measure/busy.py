"""Rounds beside other processes that want the same cores, as data loaders do.

A delay comes now and then, and is many times a round: the mean tells what it costs, the median
hides it.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.cases import workloads
from benchmarks.measure.store import Row
from benchmarks.measure.suite import Key, Options, Watcher, gated
from benchmarks.measure.timing import Body, Samples, Spread, measure

# What stands in a row, and what a reader is told.
CASES = {
    "0": "nobody",
    "1": "one process a core",
    "2": "two processes a core",
    "loader": "a DataLoader that decodes images, one worker a core",
}
WORKLOADS = ("sngan_cifar_resnet_D", "real_esrgan_unet_D", "emulator_175", "biggan_128_D_ch96")
PROVIDERS = ("torch_sn", "foreach", "module")
MODE = "forward_backward"


class Photographs(Dataset):
    """JPEG files in memory, decoded and resized when they are asked for."""

    def __init__(self, count: int = 64, side: int = 384) -> None:
        from PIL import Image  # only here: the tables, which import this, need no pictures

        generator = np.random.default_rng(0)
        small = generator.integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8)
        self.files = []
        for pixels in small:
            file = io.BytesIO()
            Image.fromarray(pixels).resize((side, side)).save(file, "JPEG", quality=90)
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return 10**9  # never ends

    def __getitem__(self, place: int) -> Tensor:
        from PIL import Image

        with Image.open(io.BytesIO(self.files[place % len(self.files)])) as image:
            pixels = np.asarray(image.convert("RGB").resize((128, 128)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


@contextlib.contextmanager
def neighbours(case: str, cores: int) -> Iterator[Callable[[], object]]:
    """Others at work on the cores; gives what to call before each measurement (it takes the next
    batch of a loader, so that its workers have to make another)."""
    if case == "loader":
        loader = DataLoader(Photographs(), batch_size=16, num_workers=cores, prefetch_factor=4)
        batches = iter(loader)
        next(batches)
        try:
            yield lambda: next(batches)
        finally:
            del batches
        return
    spin = (sys.executable, "-S", "-c", "while True: pass")
    processes = [subprocess.Popen(spin) for _ in range(int(case) * cores)]
    try:
        time.sleep(0.5 if processes else 0)
        yield lambda: None
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _mean(samples: Samples[Key], key: Key) -> float:
    return statistics.fmean([t for t in samples[key] if t is not None])


def _exactly(value: float, repeats: int) -> Spread:
    return Spread(value, value, value, repeats)


def run(names: Sequence[str], options: Options, base: Row, watcher: Watcher) -> Iterator[list[Row]]:
    """The forward and backward of workloads for PROVIDERS in each of CASES; rows of each workload
    as they come."""
    options = replace(options, providers=PROVIDERS, modes=(MODE,), rank_ratios=(1.0,))
    cores = os.cpu_count() or 1
    for name in names:
        rows = []
        problem = workloads.make_problem(workloads.find(name), 0, options.n_power_iterations)
        runners = gated(problem, options, watcher)
        for case in CASES:
            watcher.say(f"{name}: beside {CASES[case]}")
            with neighbours(case, cores) as before:
                samples: Samples[Key] = measure(
                    {key: Body(runner.forward_backward, before) for key, runner in runners.items()},
                    repeats=options.repeats,
                    budget=options.budget,
                    step=watcher.advance,
                )
            for key in samples:
                row = replace(
                    base, workload=name, mode=MODE, busy=case, provider=key[0], rank_ratio=key[1]
                )
                mean, times = _mean(samples, key), samples.spread(key)
                rows.append(row.with_result("time_ms", times, 1e3))
                rows.append(row.with_result("mean_ms", _exactly(mean, times.repeats), 1e3))
                if key[0] != "torch_sn":
                    over = _mean(samples, ("torch_sn", 1.0)) / mean
                    found = _exactly(over, times.repeats)
                    rows.append(row.with_result("speedup_of_means_over_torch_sn_x", found))
        yield rows


def count_steps(names: Sequence[str], options: Options) -> int:
    """How often :func:`run` will call ``Watcher.advance``."""
    return options.repeats * len(names) * len(CASES)
