"""nvcc's machine code for every target, without a GPU; and the glue to torch, as far as it goes."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from srn_kernels.backends.cuda import compile as tool

NEEDS_NVCC = pytest.mark.skipif(tool.find_nvcc() is None, reason="needs nvcc")
ROOT = Path(__file__).parents[2]

PTXAS = """\
ptxas info    : Compiling entry function '_ZN3srn16normalize_kernelIfLi83EEEvNS0_10P' for 'sm_90a'
ptxas info    : Function properties for _ZN3srn16normalize_kernelIfLi83EEEvNS0_10P
    {stack} bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 2 barriers, 16 bytes smem
"""


@NEEDS_NVCC
def test_every_target_compiles_without_spills_and_with_its_copies(capsys):
    code = tool.main([])
    printed = capsys.readouterr().out
    assert code == 0, printed
    for architecture in tool.ARCHITECTURES:
        lines = [x for x in printed.splitlines() if x.startswith(f"sm_{architecture} ")]
        # Two directions, each for few and many layers and in float64; then the time.
        assert len(lines) == 7, printed


@pytest.mark.parametrize(
    "stack, stores, faults", [(0, 0, []), (8, 0, ["spills"]), (0, 4, ["spills"])]
)
def test_spills_are_found_in_the_assemblers_report(stack, stores, faults):
    (kernel,) = tool.parse(PTXAS.format(stack=stack, stores=stores))
    assert kernel.name == "normalize, float32, up to 83 layers"
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
