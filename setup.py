"""Builds the native backends that fit this environment; everything else is in pyproject.toml.

What does not fit is left out, with one line that says why, here and in
``python -m srn_kernels.info``: the package works without, in plain PyTorch.

SRN_CUDA: unset = the CUDA backend if all that it needs is there, 1 = it must be built, 0 = never.
TORCH_CUDA_ARCH_LIST chooses its architectures.

An extension fits one release of torch, the one that it was compiled against. Therefore torch is no
build requirement: pip's isolated environment would fetch the newest, gigabytes of it, and make an
extension that the torch in use refuses. It is looked for in the environment that is installed into.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = "srn_kernels/backends"
CPU_MODULE = "srn_kernels.backends._cpu"
CUDA_MODULE = "srn_kernels.backends._cuda"

# Ampere; Hopper, whose bulk copies the kernels use; Blackwell, and PTX for what comes later.
ARCHITECTURES = "8.0;9.0;10.0+PTX"
# Without these it's a compiler or a driver package, not a toolkit.
CUDA_HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")


class Unfit(Exception):
    """Why an extension cannot be built here, in one line."""


def run(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"error|fatal|unsupported|not found", line, re.I)]
    return (named or lines or [f"exit status {done.returncode}"])[0]


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc").glob(pattern))


# --- what is there -------------------------------------------------------------------------------


def find_torch():
    """torch of this environment; pip's isolation hides the site-packages that it installs into."""
    places = [sysconfig.get_path(scheme) for scheme in ("purelib", "platlib")]
    sys.path += [place for place in dict.fromkeys(places) if place not in sys.path]
    try:
        import torch
    except ImportError as error:
        raise Unfit(f"built without torch in {places[0]} ({error})") from error
    return torch


def check_compiler() -> None:
    """Compiles and links a shared library with OpenMP against Python's headers."""
    from setuptools._distutils import ccompiler
    from setuptools._distutils import sysconfig as settings

    compiler = ccompiler.new_compiler()
    settings.customize_compiler(compiler)
    command = getattr(compiler, "compiler_cxx", None)
    if not command:  # another kind of compiler than Unix has
        return
    if shutil.which(command[0]) is None:
        raise Unfit(f"no C++ compiler ({command[0]} is not on the path)")
    with tempfile.TemporaryDirectory() as folder:
        done = run(
            *(command[0], "-shared", "-fPIC", "-fopenmp", "-std=c++17"),
            *(f"-I{sysconfig.get_path('include')}", "-x", "c++", "-", "-o", f"{folder}/probe.so"),
            text="#include <Python.h>\n#include <omp.h>\nint n() { return omp_get_max_threads(); }",
        )
    if done.returncode:
        raise Unfit(f"{command[0]} cannot build a Python extension with OpenMP: {complaint(done)}")


def toolkit(cuda: str, site_packages: str) -> Path:
    """The CUDA toolkit to compile with, for torch's CUDA version.

    It is CUDA_HOME where that is set; else where nvcc on the path is, /usr/local/cuda, and pip's.
    """
    major = cuda.split(".")[0]
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        homes = [Path(home)]
    else:
        nvcc = shutil.which("nvcc")
        homes = [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent] if nvcc else []
        homes += [Path("/usr/local/cuda"), Path(site_packages, "nvidia", f"cu{major}")]
    faults = []
    for home in dict.fromkeys(homes):
        nvcc = home / "bin" / "nvcc"
        if not nvcc.exists():
            continue
        missing = [name for name in CUDA_HEADERS if not (home / "include" / name).exists()]
        if missing:
            faults.append(f"{home} has nvcc but no include/{missing[0]}")
            continue
        done = run(str(nvcc), "--version")
        release = re.search(r"release (\d+)\.\d+", done.stdout)
        if done.returncode or not release:
            faults.append(f"{nvcc} does not run: {complaint(done)}")
        elif release[1] != major:
            faults.append(f"{nvcc} is of CUDA {release[0][8:]}, torch of CUDA {cuda}")
        else:
            return home
    raise Unfit("; ".join(faults) or f"no nvcc in {', '.join(map(str, dict.fromkeys(homes)))}")


def architectures(nvcc: Path, wish: str) -> tuple[str, list[str]]:
    """TORCH_CUDA_ARCH_LIST without what the kernels or nvcc do not know, and what was dropped."""
    known = set(run(str(nvcc), "--list-gpu-arch").stdout.split())
    kept, dropped = [], []
    for entry in re.split(r"[;\s]+", wish.strip()):
        number = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if not number:
            raise Unfit(f"TORCH_CUDA_ARCH_LIST has {entry!r}: give numbers, as in {ARCHITECTURES}")
        if int(number[1]) < 8:
            dropped.append(f"{entry} (the kernels need 8.0)")
        elif f"compute_{number[1]}{number[2]}" not in known:
            dropped.append(f"{entry} (nvcc does not know it)")
        else:
            kept.append(entry)
    if not kept:
        raise Unfit(f"no architecture is left: {', '.join(dropped)}")
    if "+PTX" in wish and not any("+PTX" in entry for entry in kept):
        kept[-1] += "+PTX"  # what was dropped stood for later cards
    return ";".join(kept), dropped


def check_nvcc(home: Path, chosen: str) -> None:
    """Compiles an empty kernel for every architecture; a host compiler may be too new for nvcc."""
    numbers = re.findall(r"(\d+)\.(\d[af]?)", chosen)
    targets = [f"-gencode=arch=compute_{a}{b},code=sm_{a}{b}" for a, b in numbers]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_runtime.h>\n__global__ void nothing() {}\n")
        done = run(str(home / "bin" / "nvcc"), *targets, "-c", str(source), "-o", f"{folder}/o")
    if done.returncode:
        raise Unfit(f"{home}/bin/nvcc cannot compile: {complaint(done)}")


# --- the extensions ------------------------------------------------------------------------------


def against(torch) -> list[str]:
    """Another torch in the same place makes another command, which compiles again."""
    return [f"-DSRN_TORCH={torch.__version__}"]


def cpu_extension(torch) -> Extension:
    check_compiler()
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        CPU_MODULE,
        sources("*.cpp") + sources("cpu/*.cpp"),
        extra_link_args=["-fopenmp"],
        extra_compile_args=[
            "-O3",
            "-g0",  # Python's own flags may have -g, which makes it 16 MB in place of one
            "-fopenmp",
            "-ffp-contract=fast",
            "-fvisibility=hidden",
            "-Wno-psabi",
            *against(torch),
        ],
    )


def cuda_extension(torch) -> Extension:
    if torch.version.cuda is None:
        raise Unfit(f"built against torch {torch.__version__}, which has no CUDA")
    check_compiler()
    home = toolkit(torch.version.cuda, sysconfig.get_path("purelib"))
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    chosen, dropped = architectures(home / "bin" / "nvcc", wish)
    if dropped:
        say(f"CUDA architectures {chosen}, without {', '.join(dropped)}")
    check_nvcc(home, chosen)
    os.environ.update(CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=chosen)
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(home)  # where it was imported before
    extension = cpp_extension.CUDAExtension(
        CUDA_MODULE,
        sources("cuda/*.cu") + sources("cuda/*.cpp"),
        extra_compile_args={
            "cxx": ["-O3", *against(torch)],
            "nvcc": ["-O3", "-lineinfo", "--expt-relaxed-constexpr", *against(torch)],
        },
    )
    extension.optional = os.environ.get("SRN_CUDA", "") != "1"
    return extension


def say(line: str) -> None:
    print(f"srn_kernels: {line}", file=sys.stderr, flush=True)


def extensions(record: dict) -> list[Extension]:
    """What can be built here; ``record`` gets for each module None or the reason why it is not."""
    wish = os.environ.get("SRN_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"SRN_CUDA must be unset, 0 or 1, got {wish!r}")
    built, modules = [], record["modules"]
    try:
        torch = find_torch()
        record.update(torch=torch.__version__, cuda=torch.version.cuda)
        built.append(cpu_extension(torch))
    except Unfit as reason:
        modules[CPU_MODULE] = modules[CUDA_MODULE] = str(reason)
        say(f"installed as pure Python, without compiled backends: {reason}")
        if wish == "1":
            raise SystemExit(f"SRN_CUDA=1, but {reason}") from None
        return []
    try:
        if wish == "0":
            raise Unfit("built with SRN_CUDA=0")
        built.append(cuda_extension(torch))
    except Unfit as reason:
        modules[CUDA_MODULE] = str(reason)
        if wish == "1":
            raise SystemExit(f"SRN_CUDA=1, but {reason}") from None
        say(f"no CUDA backend: {reason}")
    return built


def write_record(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "built.json").write_text(json.dumps(record, indent=1) + "\n")


class BuildPython(build_py):
    """Says in the package what was compiled for it, and against what."""

    def run(self) -> None:
        super().run()
        write_record(Path(PACKAGE if self.editable_mode else f"{self.build_lib}/{PACKAGE}"))


def build_extensions() -> type[build_ext]:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # ninja knows what is old, also after another torch came

        def run(self) -> None:
            super().run()
            write_record(Path(PACKAGE if self.inplace else f"{self.build_lib}/{PACKAGE}"))
            for name in (name for name, reason in record["modules"].items() if reason):
                for old in Path(self.build_lib).glob(name.replace(".", "/") + ".*"):
                    old.unlink()  # of an earlier build in the same folder

        def build_extension(self, extension: Extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                if not extension.optional:
                    raise
                reason = f"compiling it failed: {str(error).splitlines()[0]}"
                record["modules"][extension.name] = reason
                say(f"no CUDA backend: {reason}")

    return Build


record = {"torch": None, "cuda": None, "modules": {CPU_MODULE: None, CUDA_MODULE: None}}

if __name__ == "__main__":
    # Metadata and source distributions need no compiler, and no second search for one.
    only_metadata = {"egg_info", "dist_info", "sdist"} & set(sys.argv)
    modules = [] if only_metadata else extensions(record)
    commands: dict = {"build_py": BuildPython}
    if modules:
        commands["build_ext"] = build_extensions()
    setup(ext_modules=modules, cmdclass=commands)
