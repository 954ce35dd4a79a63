"""Tries every way to install, each from an empty environment: ``make check-install``.

An environment is a copy (hard links) of one that has torch alone, always at the same path, so that
compiling is done once for the source tree and once for the source distribution. Each case says what
has to be live afterwards, what the build or ``srn_kernels.info`` must have said, and normalises a
layer in a process whose current folder is not the source.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
TOOLS = ["setuptools>=77", "wheel", "ninja", "pybind11", "numpy"]  # as in pyproject.toml
SMOKE = """
import json, sys, warnings, torch
warnings.simplefilter("ignore")
import srn_kernels as srn
layer = srn.apply_stable_rank_norm(torch.nn.Sequential(torch.nn.Linear(40, 30)), 0.5)
layer(torch.randn(2, 40)).sum().backward()
srn.refresh(layer, 200)
top = float(torch.linalg.matrix_norm(srn.normalized_weight(layer[0]), 2))
assert abs(top - 1) < 1e-3, top
json.dump(srn.available_backends(), sys.stdout)
"""


class Workshop:
    """A folder with the template environment, the environment of the case, and the sources."""

    def __init__(self, folder: Path, torch: str, wheel: Path | None = None) -> None:
        self.wheel = wheel
        self.folder, self.env, self.source = folder, folder / "env", folder / "source"
        self.bin = folder / "bin"  # what stays of the path where compilers are taken off
        files = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=SOURCE,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        for name in filter(lambda n: (SOURCE / n).is_file(), files):
            (self.source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(SOURCE / name, self.source / name)
        self.empty = self._template("empty", [])
        self.with_torch = self._template("torch", [torch, "numpy"])
        self.bin.mkdir()
        for tool in ("sh", "bash", "env", "git", "uname", "ls", "cat", "sed", "grep"):
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)

    def _template(self, name: str, packages: list[str]) -> Path:
        place = self.folder / f"template-{name}"
        subprocess.run([sys.executable, "-m", "venv", self.env], check=True)
        if packages:
            self.pip("install", *packages)
        self.env.rename(place)
        return place

    def renew(self, template: Path) -> None:
        shutil.rmtree(self.env, ignore_errors=True)
        shutil.copytree(template, self.env, symlinks=True, copy_function=os.link)

    def run(self, *command: str | Path, check: bool = True, **variables: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SRN_CUDA")}
        environment["PATH"] = f"{self.env}/bin:{environment['PATH']}"
        done = subprocess.run(
            [str(c) for c in command],
            cwd=self.folder,
            env=environment | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if check and done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}")
        return done.stdout

    def pip(self, *arguments: str | Path, **keywords) -> str:
        return self.run(self.env / "bin" / "python", "-m", "pip", *arguments, **keywords)

    def without_compilers(self) -> str:
        return f"{self.env}/bin:{self.bin}"

    def with_broken_nvcc(self) -> str:
        place = self.folder / "broken"
        place.mkdir(exist_ok=True)
        nvcc = place / "nvcc"
        nvcc.write_text("#!/bin/sh\necho 'nvcc: cannot execute' >&2\nexit 1\n")
        nvcc.chmod(0o755)
        return f"{place}:{self.env}/bin:{os.environ['PATH']}"

    def live(self) -> tuple[set[str], str]:
        python = self.env / "bin" / "python"
        found = self.run(python, "-c", SMOKE)
        text = self.run(python, "-m", "srn_kernels.info")
        return {name for name in ("cpu", "reference") if f'"{name}": null' in found}, text


def cases(shop: Workshop) -> dict:
    """Name: (template, steps, backends that must be live, words that must have been said)."""
    both, plain = {"cpu", "reference"}, {"reference"}
    tree, torch = str(shop.source), shop.with_torch
    isolated = ("install", "-v", tree)

    def wheel(*arguments: str, **variables: str) -> str:
        shutil.rmtree(shop.folder / "dist", ignore_errors=True)
        said = shop.pip(
            "wheel", "-v", "--no-deps", "-w", shop.folder / "dist", *arguments, **variables
        )
        (built,) = (shop.folder / "dist").glob("*.whl")
        names = zipfile.ZipFile(built).namelist()
        top = {name.split("/")[0] for name in names}
        assert all(t.startswith("srn_kernels") for t in top), f"the wheel installs {top}"
        shop.renew(torch)  # the wheel alone, without what built it
        return said + shop.pip("install", "--no-deps", built)

    def given() -> str:
        """The wheel that ``--wheel`` names, into an environment that has torch alone."""
        return shop.pip("install", "-v", "--no-deps", shop.wheel)

    def open_build(*arguments: str, **variables: str) -> str:
        shop.pip("install", *TOOLS)
        return shop.pip("install", "-v", "--no-build-isolation", *arguments, **variables)

    def from_sdist() -> str:
        shop.pip("install", "build", *TOOLS)
        python = shop.env / "bin" / "python"
        shop.run(python, "-m", "build", "--sdist", "-n", tree, "-o", shop.folder / "sdist")
        (archive,) = (shop.folder / "sdist").glob("*.tar.gz")
        return shop.pip("install", "-v", "--no-deps", archive)

    def then_torch() -> str:
        said = shop.pip("install", "-v", "--no-deps", tree)
        for place in (torch / "lib").glob("python*/site-packages"):  # as pip would, but at once
            shutil.copytree(
                place, shop.env / "lib" / place.parent.name / "site-packages",
                symlinks=True, copy_function=_link, dirs_exist_ok=True,
            )  # fmt: skip
        return said

    if shop.wheel is not None:
        return {f"the wheel {shop.wheel.name}": (torch, given, both, "built against torch")}
    return {
        "pip install .": (torch, lambda: shop.pip(*isolated), both, "built against torch"),
        "pip install . before torch": (shop.empty, then_torch, plain, "built without torch"),
        "pip install --no-build-isolation .": (
            torch, lambda: open_build(tree), both, "built against torch"),
        "pip install . with an nvcc that does not run": (
            torch, lambda: shop.pip(*isolated, PATH=shop.with_broken_nvcc()), both,
            "no CUDA backend"),
        "a wheel": (torch, lambda: wheel(tree), both, "built against torch"),
        "a source distribution": (torch, from_sdist, both, "built against torch"),
        "pip install --editable .": (
            torch, lambda: open_build("-e", tree), both, "built against torch"),
        "pip install . without c++ and nvcc": (
            torch, lambda: shop.pip(*isolated, PATH=shop.without_compilers()), plain,
            "no C++ compiler"),
        "a wheel without c++ and nvcc": (
            torch, lambda: wheel(tree, PATH=shop.without_compilers()), plain, "no C++ compiler"),
    }  # fmt: skip


def _link(source: str, target: str) -> None:
    if not os.path.exists(target):
        os.link(source, target)


def forced(shop: Workshop) -> str:
    """SRN_CUDA=1 where it cannot be: an error, not a wait."""
    shop.renew(shop.with_torch)
    said = shop.pip(
        "install", shop.source, check=False, SRN_CUDA="1", PATH=shop.without_compilers()
    )
    assert "SRN_CUDA=1, but" in said, said[-3000:]
    return next(line.strip() for line in said.splitlines() if "SRN_CUDA=1, but" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch", help="the requirement to try it with")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--wheel", type=Path, help="this one alone")
    options = parser.parse_args()
    wheel = None if options.wheel is None else options.wheel.resolve(strict=True)
    folder = Path(tempfile.mkdtemp(prefix="check-install-"))
    try:
        shop = Workshop(folder, options.torch, wheel)
        for name, (template, steps, expected, words) in cases(shop).items():
            if options.only not in name:
                continue
            began = time.perf_counter()
            shop.renew(template)
            said = steps()
            took = time.perf_counter() - began
            live, told = shop.live()
            assert live == expected, f"{name}: live are {live}, not {expected}\n{told}"
            assert words in said + told, f"{name}: nothing says {words!r}\n{told}"
            if expected == {"reference"}:
                assert words in told, f"{name}: info does not say {words!r}\n{told}"
            print(f"{took:5.0f} s  {name}: {', '.join(sorted(live))}", flush=True)
            for line in (line for line in said.splitlines() if "srn_kernels: " in line):
                print(f"         {line.strip()}")
            if name.endswith("--editable ."):  # it left its extension in the source
                for extension in shop.source.glob("srn_kernels/**/*.so"):
                    extension.unlink()
        if wheel is None and options.only in "SRN_CUDA=1":
            began = time.perf_counter()
            line = forced(shop)
            print(f"{time.perf_counter() - began:5.0f} s  SRN_CUDA=1: {line}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
