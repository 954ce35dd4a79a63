"""The compiled launch path without a GPU: Triton's launches, to a driver that records them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux",
    reason="needs Triton and its bundled assembler",
)

DRIVER = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Launcher:
    launches = []
    def __init__(self, source, metadata):
        self.name = metadata.name
    def __call__(self, *arguments):
        grid, stream, function = arguments[:3], arguments[3], arguments[4]
        self.launches.append((self.name, grid, [a for a in arguments if torch.is_tensor(a)]))

class Utilities:
    def load_binary(self, name, kernel, shared, device):
        return 0, 1, 255, 0, 1024  # module, function, registers, spills, threads
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32,
                "max_num_regs": 65536}

class Driver:
    launcher_cls, utils = Launcher, Utilities()
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def map_python_to_cpp_type(self, kind):
        return kind

driver.set_active(Driver())
"""
PROGRAM = """
import srn_kernels as srn
from benchmarks.cases import runner
from srn_kernels.backends import triton as backend

backend.DEVICES, backend.unavailable_reason = frozenset({"cpu"}), lambda: None
layers = [torch.nn.Parameter(torch.randn(s)) for s in [(40, 27), (64, 96), (1, 32)]]
model = srn.apply_stable_rank_norm(runner.WeightReader(layers), backend="triton")
srn.refresh(model)  # or the first forward would form u and v again
Launcher.launches.clear()
for _ in range(3):
    outs = model()
    torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
names = [name for name, *_ in Launcher.launches]
assert names == ["normalize_kernel", "backward_kernel"] * 3, names
tables = {len(tensors) for _, _, tensors in Launcher.launches}
assert tables == {7}, tables
print("launched")
"""


def test_a_models_step_is_two_launches_of_the_compiled_kernels():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER + textwrap.dedent(PROGRAM)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "launched\n"
