"""The suite's core on every Python and torch at hand: ``make test-matrix``.

Each cell is an environment of its own, from the index: a Python that is found here (3.10 or later),
the oldest torch that is served or the newest there is, the CPU kernels compiled against it, and the
tests of the folders maths, core, model and tools (--quick: a few files). Then the CPU
kernels are compiled for arm64, with Linux and with macOS. What each run covered is printed; what
could not be had is named, and makes the exit status 3: only 0 says that everything was covered.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

SOURCE = Path(__file__).resolve().parents[2]
OLDEST_PYTHON = (3, 10)
TORCHES = {"2.11": "torch==2.11.*", "newest": "torch"}
TOOLS = ["numpy", "setuptools>=77", "wheel", "ninja", "pybind11"]  # as in pyproject.toml
TESTING = ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "scipy"]
CORE = ("tests/maths", "tests/core", "tests/model", "tests/tools")
_FILES = ("maths/test_linalg", "core/test_autograd", "model/test_layers", "model/test_loading")
_FILES += ("tools/test_convert", "tools/test_parametrization", "behaviour/test_compile")
_FILES += ("test_arrows",)
QUICK = tuple(f"tests/{name}.py" for name in _FILES)
NO_INDUCTOR = "not inductor"  # which compiles C++ for every graph
TARGETS = {"arm64, Linux": "aarch64-linux-gnu", "arm64, macOS": "aarch64-macos"}


class Missing(Exception):
    """What cannot be had here, in one line: the cell is not covered."""


class Failed(Exception):
    """A cell that was covered and is wrong."""


def run(*command: str | Path, folder: Path = SOURCE, **variables: str) -> tuple[int, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=folder,
        env=kept | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def pythons() -> dict[str, Path]:
    """{"3.11": interpreter} of every version found: on the path, and of pyenv."""
    places = [Path(p) for p in os.environ["PATH"].split(os.pathsep) if "shims" not in p]
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places += sorted(home.glob("versions/*/bin"), reverse=True)
    found: dict[str, Path] = {}
    for place in places:
        for candidate in place.glob("python3.*"):
            version = re.fullmatch(r"python(3)\.(\d+)", candidate.name)
            if not version or (3, int(version[2])) < OLDEST_PYTHON:
                continue
            name = f"3.{version[2]}"
            # without its headers nothing can be compiled for it
            code = "import ensurepip, sysconfig, pathlib; print(sysconfig.get_path('include'))"
            status, said = run(candidate, "-c", code)
            if status == 0 and Path(said.strip(), "Python.h").exists():
                found.setdefault(name, candidate)
    return dict(sorted(found.items(), key=lambda item: int(item[0].split(".")[1])))


class Cell(NamedTuple):
    """One environment: the folder, and its interpreter."""

    folder: Path
    python: Path


def uv(*arguments: str | Path) -> tuple[int, str]:
    return run(sys.executable, "-m", "uv", *arguments)


def made(folder: Path, interpreter: Path, packages: list[str]) -> Cell:
    """An environment with ``packages``; uv links files, so that ten of them fit on a disk."""
    cell = Cell(folder, folder / "env" / "bin" / "python")
    status, said = uv("venv", "--quiet", "--python", interpreter, folder / "env")
    if status:
        raise Missing(f"no environment: {last_line(said)}")
    status, said = uv("pip", "install", "--quiet", "--python", cell.python, *packages)
    if status:
        raise Missing(f"cannot be installed: {reason(said)}")
    return cell


def last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no output"])[-1]


def reason(text: str) -> str:
    """What uv says of packages that do not go together, on one line."""
    words = " ".join(re.sub(r"[^ -~]", " ", text).split())  # without uv's arrows
    return words[:300] or "no output"


def sources(folder: Path) -> Path:
    """A copy of what git knows, so that no two cells share what they compile."""
    status, said = run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    if status:
        raise SystemExit(f"this is no git checkout: {last_line(said)}")
    for name in said.splitlines():
        if (SOURCE / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(SOURCE / name, folder / name)
    return folder


def test(
    folder: Path, interpreter: Path, torch: str, places: tuple[str, ...], arguments: list[str]
) -> str:
    """Covers one cell; a line that says what it covered."""
    began = [time.perf_counter()]
    cell = made(folder, interpreter, [torch, *TOOLS, *TESTING])
    began.append(time.perf_counter())
    tree = sources(folder / "source")
    status, said = run(cell.python, "setup.py", "build_ext", "--inplace", folder=tree, SRN_CUDA="0")
    if status:
        raise Failed(f"the CPU kernels do not compile: {last_line(said)}")
    began.append(time.perf_counter())
    report = folder / "report.xml"
    status, said = run(
        *(cell.python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"),
        *("--require-backend", "cpu", "--junitxml", report),
        *places,
        *arguments,
        folder=tree,
        PYTHONPATH=f"{tree}:{tree / 'python'}",
    )
    _, version = run(cell.python, "-c", "import torch; print(torch.__version__)")
    covered = ", ".join(place.removeprefix("tests/") for place in places)
    covered += f" ({NO_INDUCTOR})" if NO_INDUCTOR in arguments else ""
    began.append(time.perf_counter())
    took = (f"{after - before:.0f} s" for before, after in pairwise(began))
    counted = f"torch {version.strip()}, {covered}: {counts(report)}"
    counted += "\n    environment {}, kernels {}, tests {}".format(*took)
    if status:
        wrong = [x for x in said.splitlines() if x.startswith(("FAILED", "ERROR"))]
        raise Failed("\n    ".join([counted, *(wrong or [last_line(said)])]))
    return counted


def counts(report: Path) -> str:
    """Tests passed, failed and skipped, the latter with why, from pytest's own report."""
    if not report.exists():
        return "no test ran"
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    why: dict[str, int] = {}
    for skip in (case.find("skipped") for case in cases):
        if skip is not None:
            why[skip.get("message", "")] = why.get(skip.get("message", ""), 0) + 1
    text = f"{len(cases) - bad - sum(why.values())} passed, {bad} failed"
    return text + "".join(f"; {n} skipped: {reason}" for reason, n in sorted(why.items()))


def cross_compile(folder: Path, target: str) -> str:
    """The CPU kernels and the recycler as objects for another processor, by zig's clang."""
    cell = made(folder, Path(sys.executable), ["ziglang"])
    try:
        from torch.utils.cpp_extension import include_paths
    except ImportError:
        raise Missing("torch's headers: no torch beside this script") from None
    headers = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    flags = ["-O3", "-std=c++20", "-fPIC", "-ffp-contract=fast", "-Wno-psabi", "-DSRN_TORCH=none"]
    files = sorted((SOURCE / "csrc" / "cpu").glob("*.cpp"))
    for file in files:
        output = folder / f"{file.stem}.o"
        command = (cell.python, "-m", "ziglang", "c++", "-target", target, "-c", *flags, *headers)
        status, said = run(*command, file, "-o", output, ZIG_LOCAL_CACHE_DIR=str(folder))
        if status:
            errors = [line for line in said.splitlines() if "error:" in line]
            raise Failed(f"{file.name} does not compile: {(errors or [last_line(said)])[0]}")
        check_object(output, target)
    return f"{len(files)} files of csrc/cpu compile; not linked and not run, without the bindings"


def check_object(path: Path, target: str) -> None:
    """That the object is what was asked for: ELF with machine 183, or 64-bit Mach-O for arm64."""
    head = path.read_bytes()[:20]
    elf = head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") == 183
    mach = head[:8] == b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"
    if not (mach if "macos" in target else elf):
        raise Failed(f"{path.name} is no object for {target}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument(
        "--quick", action="store_true", help=f"only {', '.join(QUICK)}, {NO_INDUCTOR}"
    )
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    options = parser.parse_args()
    if uv("--version")[0]:
        raise SystemExit("uv is missing: pip install uv, or make setup")
    there, places, chosen_tests = pythons(), CORE, options.pytest
    if options.quick:
        places, chosen_tests = QUICK, ["-k", NO_INDUCTOR, *options.pytest]
    print(f"Python: {', '.join(f'{name} ({path})' for name, path in there.items())}", flush=True)
    cells = {
        f"Python {name}, torch {torch}": (test, path, requirement, places, chosen_tests)
        for torch, requirement in TORCHES.items()
        for name, path in there.items()
    }
    cells |= {name: (cross_compile, target) for name, target in TARGETS.items()}
    chosen = {name: cell for name, cell in cells.items() if options.only in name}
    if not chosen:
        raise SystemExit(f"no cell's name contains {options.only!r}; there are: {', '.join(cells)}")
    outcomes: dict[str, list[str]] = {"covered": [], "failed": [], "NOT covered": []}
    for name, (cover, *arguments) in chosen.items():
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
            try:
                outcome, text = "covered", cover(Path(folder), *arguments)
            except Failed as error:
                outcome, text = "failed", str(error)
            except Missing as error:
                outcome, text = "NOT covered", str(error)
        outcomes[outcome].append(name)
        took = time.perf_counter() - began
        print(f"{took:5.0f} s  {name}: {outcome}\n    {text}", flush=True)
    for name in ("macOS", "arm64 processors"):
        print(f"       {name}: never run here; only compiled for, where that is listed above")
    print(
        f"covered {len(outcomes['covered'])} of {len(chosen)}; "
        f"failed: {', '.join(outcomes['failed']) or 'none'}; "
        f"not covered: {', '.join(outcomes['NOT covered']) or 'none'}"
    )
    return 1 if outcomes["failed"] else 3 if outcomes["NOT covered"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
