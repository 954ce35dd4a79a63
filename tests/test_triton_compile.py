"""Ahead-of-time compilation without a GPU; in processes of their own, never interpreted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux",
    reason="needs Triton and its bundled assembler",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def test_no_kernel_spills_or_loses_its_wide_loads():
    done = run(
        *("-m", "srn_kernels.backends.triton.compile", "--arch", "90"),
        *("--case", "rows of 1152", "rows of 13824", "odd rows", "conv transpose 4x4"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sm_90") == 8


def test_lost_wide_loads_and_spills_fail():
    program = """
from dataclasses import replace
from srn_kernels.backends.triton import compile as tool, launch
tool.CASES = {"odd": tool.Case([(64, 27)]), "starved": tool.Case([(64, 8192)])}
config = launch.device_config
launch.device_config = lambda *a: replace(config(*a), registers=64)
raise SystemExit(tool.main(["--arch", "90"]))
"""
    done = run("-c", program)
    assert done.returncode == 1, done.stderr
    odd, starved = (
        next(line for line in done.stdout.splitlines() if f"sm_90 {name}, forward" in line)
        for name in ("odd", "starved")
    )
    assert "lost its wide loads" in odd
    assert "spills" in starved
