"""Builds the native backends; everything else is in pyproject.toml.

SRN_CUDA: unset = the CUDA backend if nvcc and a CUDA build of torch are there, 1 = it must be
built, 0 = never. TORCH_CUDA_ARCH_LIST chooses its architectures.
"""

import os
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc").glob(pattern))


def cuda_extension() -> Extension | None:
    wish, cuda_sources = os.environ.get("SRN_CUDA", ""), sources("cuda/*.cu")
    possible = CUDA_HOME is not None and torch.version.cuda is not None and bool(cuda_sources)
    if wish == "0" or (wish == "" and not possible):
        return None
    if not possible:
        raise SystemExit("SRN_CUDA=1 needs nvcc, a CUDA build of torch and csrc/cuda/*.cu")
    # Ampere; Hopper, whose bulk copies the kernels use; Blackwell, and PTX for what comes later.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX")
    return CUDAExtension(
        "srn_kernels.backends._cuda",
        cuda_sources + sources("cuda/*.cpp"),
        depends=sources("*.h") + sources("cuda/*.h"),
        extra_compile_args={
            "cxx": ["-O3"],
            "nvcc": ["-O3", "-lineinfo", "--expt-relaxed-constexpr"],
        },
    )


cpu_extension = CppExtension(
    "srn_kernels.backends._cpu",
    sources("*.cpp") + sources("cpu/*.cpp"),
    extra_link_args=["-fopenmp"],
    depends=sources("**/*.h") + sources("**/*.inc"),
    extra_compile_args=[
        "-O3",
        "-fopenmp",
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        "-Wno-psabi",
    ],
)

setup(
    ext_modules=[e for e in (cpu_extension, cuda_extension()) if e is not None],
    cmdclass={"build_ext": BuildExtension},
)
