"""nvcc's machine code for every target, without a GPU; and the glue to torch, as far as it goes."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from srn_kernels.backends.cuda import compile as tool
from srn_kernels.backends.cuda import sass

NEEDS_NVCC = pytest.mark.skipif(tool.find_nvcc() is None, reason="needs nvcc")
ROOT = Path(__file__).parents[2]

PTXAS = """\
ptxas info    : Compiling entry function '_ZN3srn16normalize_kernelIfLi62EEEvNS0_10P' for 'sm_90a'
ptxas info    : Function properties for _ZN3srn16normalize_kernelIfLi62EEEvNS0_10P
    {stack} bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 2 barriers, 16 bytes smem
"""


@NEEDS_NVCC
def test_a_target_compiles_without_spills_and_with_its_copies(capsys):
    """The oldest target, which has the fewest instructions; `make kernels` compiles all."""
    code = tool.main(["--arch", "80"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    # Two directions in two types, beside their loops and the time of both files.
    kernels = [x for x in printed.splitlines() if " layers" in x and "instructions" not in x]
    assert len(kernels) == 4, printed


def test_a_loop_that_was_not_counted_is_a_fault():
    kernel = "_Z16normalize_kernelIfLi62E"
    report = tool.Report(tool.readable(kernel), 128, 0, 0, 0)
    counted = [
        sass.Loop(kernel, phase, types, 1, 20, 0)
        for phase in ("slab", "rescale")
        for types in ("float32", "bfloat16", "float16")
    ]
    assert tool.missing([report], counted) == []
    assert tool.missing([report], counted[1:]) == [
        "normalize, float32, up to 62 layers: no loop of slab of float32 was found"
    ]
    assert tool.missing([report._replace(name="another kernel")], []) == []


@pytest.mark.parametrize(
    "stack, stores, faults", [(0, 0, []), (8, 0, ["spills"]), (0, 4, ["spills"])]
)
def test_spills_are_found_in_the_assemblers_report(stack, stores, faults):
    (kernel,) = tool.parse(PTXAS.format(stack=stack, stores=stores))
    assert kernel.name == "normalize, float32, up to 62 layers"
    assert (kernel.registers, kernel.shared, kernel.faults) == (128, 16, faults)


@NEEDS_NVCC
def test_broken_sources_and_lost_copies_fail(tmp_path, capsys):
    (tmp_path / "kernels.cu").write_text("__global__ void f(int* p) { *p = 1; }")
    assert tool.main(["--arch", "80", "--csrc", str(tmp_path)]) == 1
    assert "no cp.async.cg.shared.global" in capsys.readouterr().out
    (tmp_path / "kernels.cu").write_text("__global__ void f(int* p) { *q = 1; }")
    assert tool.main(["--arch", "80", "--csrc", str(tmp_path)]) == 1
    assert '"q" is undefined' in capsys.readouterr().out


def test_without_nvcc_the_step_says_so(monkeypatch, capsys):
    monkeypatch.setattr(tool, "find_nvcc", lambda: None)
    assert tool.main([]) == 0
    assert "nvcc was not found, nothing was compiled" in capsys.readouterr().out


def _sass(*body: str) -> str:
    lines = [f"        /*{16 * k:04x}*/  {text} ;" for k, text in enumerate(body)]
    return "\n".join(["\t\tFunction : _Z16normalize_kernelIfLi62E", *lines])


def test_loops_are_found_and_held_to_their_limits():
    unit = ["LDS.128 R4, [R1]", *["FFMA R4, R4, R5, R6"] * 8, "STG.E.128 [R8], R4"]
    around = ["MOV R1, R2", *unit, "@P0 BRA 0x10", "@!P1 BRA 0x0", "EXIT"]
    (loop,) = sass.loops(_sass(*around))
    assert (loop.phase, loop.types, loop.units) == ("rescale", "float32", 1)
    assert (loop.instructions, loop.global_loads, loop.faults) == (len(unit) + 1, 0, [])
    slow = ["MOV R1, R2", *["IADD3 R1, R1, R1, R1"] * 18, *unit, "@P0 BRA 0x10"]
    assert sass.loops(_sass(*slow))[0].faults == ["more than 28 instructions"]
    loads = ["MOV R1, R2", *["LDG.E R1, [R2.64]"] * 2, *unit, "@P0 BRA 0x10"]
    assert sass.loops(_sass(*loads))[0].faults == ["global loads"]


def test_the_two_loops_of_a_slab_count_together():
    dots = [
        "LDS.128 R4, [R1]",
        *["FFMA R4, R4, R5, R6"] * 9,
        "SHFL.BFLY PT, R1, R2, 0x1",
        "BRA 0x0",
    ]
    at = 16 * len(dots)
    shares = ["LDS.128 R4, [R1]", *["FFMA R4, R4, R5, R6"] * 4, f"@P0 BRA {at:#x}"]
    (loop,) = sass.loops(_sass(*dots, *shares))
    assert (loop.phase, loop.units, loop.instructions) == ("slab", 1, len(dots) + len(shares))


@pytest.mark.skipif(
    not Path("/usr/local/cuda/include/cuda_runtime_api.h").exists() or shutil.which("g++") is None,
    reason="needs the CUDA toolkit's headers",
)
def test_the_glue_to_cuda_torch_is_well_formed(tmp_path):
    # Generated when torch is built for CUDA; a CPU build has every other header.
    generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include"), str(tmp_path)]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-I/usr/local/cuda/include"]
    command += [f"-isystem{p}" for p in includes] + [str(ROOT / "csrc/cuda/runtime.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
