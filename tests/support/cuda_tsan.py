"""Runs rounds of the CUDA kernels on the CPU under ThreadSanitizer: `make tsan`.

Fibers of a CTA do not order each other's accesses, only barriers and counters do: a missing barrier
is a race, and so is a counter that publishes too early.
"""

from __future__ import annotations

import os
import subprocess
import sys

import cuda_shim
import oracle
import torch


def run() -> None:
    backend = cuda_shim.install("thread")
    from gpu_rounds import Round

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = [(60, 260), (40, 27), (9, 1100), (3, 5000)]
    made = [(torch.randn(s), 0) for s in shapes]
    made += [oracle.make_weight("conv-transpose", (30, 36), torch.bfloat16)]
    layers = Round.make(made, backend=backend)
    gains = [torch.full((1,), 1.5), torch.full((1,), -0.5)]
    bounds = [0.5, 0.0, 1e6, 0.5, 0.0]
    through = [True, True, False, False, True]
    for iterations in (2, 0, -1):  # training, evaluation, and a round that is repeated
        layers.normalize(iterations, scalings=(gains, [0, 1, -1, -1, -1], bounds, through))
    upstream = [torch.randn_like(w) for w in layers.weights]
    wanted = [torch.empty_like(g) for g in gains]
    layers.gradients(upstream, range(len(made)), (wanted, [0, 1, -1, -1, -1]))
    print("ThreadSanitizer: three forwards and a backward were run")


def main() -> int:
    if "libtsan" in os.environ.get("LD_PRELOAD", ""):
        run()
        return 0
    library = subprocess.run(
        [cuda_shim.COMPILER, "-print-file-name=libtsan.so"], capture_output=True, text=True
    ).stdout.strip()
    # The sanitizer wants to be first in the process, at addresses that are not random.
    command = ["setarch", "-R", sys.executable, __file__]
    environment = {**os.environ, "LD_PRELOAD": library, "TSAN_OPTIONS": "exitcode=66"}
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
