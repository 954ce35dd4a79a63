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


PROGRAM = """
from dataclasses import replace
from srn_kernels.backends.triton import common, compile as tool, launch
tool.CASES = {"odd": tool.Case([(64, 27)]), "starved": tool.Case([(64, 8192)])}
config = launch.device_config
launch.device_config = lambda *a: replace(config(*a), registers=64)
raise SystemExit(tool.main(["--full", "--arch", "90", "--jobs", "1"]))
"""


def test_lost_wide_loads_and_spills_fail():
    done = run("-c", PROGRAM)
    assert done.returncode == 1, done.stderr
    odd, starved = (
        next(line for line in done.stdout.splitlines() if f"sm_90 {name}, forward" in line)
        for name in ("odd", "starved")
    )
    assert "lost its wide loads" in odd
    assert "spills" in starved
    assert "does not order memory" not in done.stdout


# What the compiler makes of a wait, and of an arrival after a tile's last store.
GOOD = """
    @%p1 ld.global.gpu.acquire.b32 %r1, [ %rd1 + 0 ];
    st.global.v4.b32 [ %rd2 + 0 ], { %r2, %r3, %r4, %r5 };
    bar.sync 0;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r6, [ %rd1 + 0 ], %r7;
    bar.sync 0;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r6, [ %rd3 + 0 ], %r7;
"""


@pytest.mark.parametrize(
    ("old", "new", "ordered"),
    [
        ("", "", True),
        ("ld.global.gpu.acquire", "ld.global", False),
        ("acq_rel", "relaxed", False),
        ("    bar.sync 0;\n    @%p1 atom", "    @%p1 atom", False),
    ],
    ids=["good", "plain poll", "relaxed arrival", "no barrier"],
)
def test_lost_memory_order_fails(old, new, ordered):
    program = "import sys; from srn_kernels.backends.triton.compile import orders_memory; "
    done = run("-c", program + f"print(orders_memory({GOOD.replace(old, new, 1)!r}))")
    assert done.stdout == f"{ordered}\n", done.stderr


def test_nothing_is_compiled_under_the_interpreter():
    program = "import os, sys; os.environ['TRITON_INTERPRET'] = '1'; "
    program += "from srn_kernels.backends.triton import compile; compile.main([])"
    done = run("-c", program)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
