"""The extension as a user with a GPU gets it, built and looked at without one: ``make build-cuda``.

Runs in an environment with a CUDA build of torch. Compiles with SRN_CUDA=1 into build/cuda, imports
the result without a driver, compares the fat binary's images with the architectures that were asked
for, and runs the host-side tests of the CUDA backend against it.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parents[2]
BUILD = SOURCE / "build" / "cuda"
# The project's own options ask for pytest-benchmark.
OPTIONS = ("-o", "addopts=--strict-markers", "-o", "pythonpath=tests/support", "-rs")
HOST_TESTS = ("test_cuda_plan.py", "test_setup.py")
LOOK = """
import torch
from srn_kernels.backends import available_backends, built, load
backend = load("cuda")
assert backend.extension is not None, available_backends()["cuda"]
print("imported", backend.extension.__file__)
print("backend cuda:", available_backends()["cuda"] or "live")
w, u, v = torch.ones(3, 4), torch.ones(3), torch.ones(4)
try:
    backend.normalize([w], [u], [v], [1.0], [0], [1e-12], [1], torch.float32)
except (TypeError, ValueError, RuntimeError) as error:
    print("refuses CPU tensors:", str(error).splitlines()[0][:100])
else:
    raise SystemExit("the CUDA kernels took CPU tensors")
"""


def images(library: Path) -> list[str]:
    """The images in a fat binary, by cuobjdump: machine code as sm_N, PTX as ptx_N."""
    places = [Path(p, "nvidia", "cu13", "bin") for p in sys.path]
    search = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin", *map(str, places)])
    tool = shutil.which("cuobjdump", path=search)
    if tool is None:
        raise SystemExit("no cuobjdump: pip install nvidia-cuda-cuobjdump")
    found = []
    for option, name in (("--list-elf", r"\.(sm_\d+a?)\."), ("--list-ptx", r"\.(sm_\d+a?)\.")):
        said = subprocess.run([tool, option, library], capture_output=True, text=True, check=True)
        prefix = "ptx_" if option == "--list-ptx" else "sm_"
        found += [prefix + n[3:] for n in re.findall(name, said.stdout)]
    return sorted(set(found))


def wanted(chosen: str) -> list[str]:
    entries = re.findall(r"(\d+)\.(\d[af]?)(\+PTX)?", chosen)
    return sorted(
        {f"sm_{a}{b}" for a, b, _ in entries} | {f"ptx_{a}{b}" for a, b, ptx in entries if ptx}
    )


def main() -> None:
    if torch.version.cuda is None:
        raise SystemExit(f"torch {torch.__version__} has no CUDA: choose another by CUDA_TORCH=")
    began = time.perf_counter()
    environment = os.environ | {"SRN_CUDA": "1"}
    subprocess.run(
        [sys.executable, "setup.py", "build", "--build-base", str(BUILD)],
        cwd=SOURCE,
        env=environment,
        check=True,
    )
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"\ntorch {torch.__version__}, Python {platform.python_version()}: "
        f"built in {time.perf_counter() - began:.0f} s, "
        f"{spent.ru_utime + spent.ru_stime:.0f} s of a processor"
    )
    (library,) = BUILD.glob("lib*/srn_kernels/**/_cuda*.so")
    place = next(p for p in library.parents if p.name.startswith("lib"))
    found = images(library)
    print(f"{library.stat().st_size / 1e6:.1f} MB; images: {', '.join(found)}")
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("srn_setup", SOURCE / "setup.py")
    setup = module_from_spec(spec)
    spec.loader.exec_module(setup)
    home = setup.toolkit(torch.version.cuda, setup.sysconfig.get_path("purelib"))
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST") or setup.ARCHITECTURES
    chosen, _ = setup.architectures(home / "bin" / "nvcc", wish)
    if found != wanted(chosen):
        raise SystemExit(f"the images should be {', '.join(wanted(chosen))}")
    environment = os.environ | {"PYTHONPATH": str(place)}
    subprocess.run([sys.executable, "-c", LOOK], cwd=BUILD, env=environment, check=True)
    tests = [str(path) for name in HOST_TESTS for path in (SOURCE / "tests").rglob(name)]
    environment["PYTHONPATH"] += f"{os.pathsep}{SOURCE}"
    subprocess.run(
        # importlib mode and this order: the package is the built one, benchmarks the source's
        [sys.executable, "-m", "pytest", "-q", *OPTIONS, *tests],
        cwd=SOURCE,
        env=environment,
        check=True,
    )


if __name__ == "__main__":
    main()
