"""What setup.py builds, and leaves out with a reason, against toolkits of every bad kind."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import srn_kernels
from srn_kernels.backends import built
from srn_kernels.backends.built import AGAIN

PROJECT = next(p for p in Path(__file__).resolve().parents if (p / "setup.py").exists())
ALL = "75 80 86 90 100 120"


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, where neither a CUDA_HOME nor a list of architectures is set."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "SRN_CUDA"):
        monkeypatch.delenv(name, raising=False)
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("srn_setup", PROJECT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit(home: Path, release: str = "13.0", archs: str = ALL, headers: bool = True) -> Path:
    """A toolkit whose nvcc answers what setup.py asks, and compiles whatever it knows."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"""#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
  --list-gpu-arch) for a in {archs}; do echo compute_$a; done ;;
  *) exit 0 ;;
esac
"""
    )
    nvcc.chmod(0o755)
    (home / "include").mkdir()
    for name in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h") if headers else ():
        (home / "include" / name).touch()
    return home


def chosen(project: ModuleType, monkeypatch: pytest.MonkeyPatch, *homes: Path) -> Path:
    path = os.pathsep.join([*(str(h / "bin") for h in homes), "/nowhere"])
    monkeypatch.setenv("PATH", path)
    return project.toolkit("13.0", str(homes[0] / "site"))


def test_a_toolkit_that_fits_is_found(project, monkeypatch, tmp_path) -> None:
    good = toolkit(tmp_path / "good")
    assert chosen(project, monkeypatch, good) == good


def test_a_wrapper_without_headers_gives_way_to_a_toolkit(project, monkeypatch, tmp_path) -> None:
    wrapper = toolkit(tmp_path / "local", headers=False)
    pip = toolkit(wrapper / "site" / "nvidia" / "cu13")
    path = project.Path
    monkeypatch.setattr(  # no toolkit of this machine
        project, "Path", lambda *a: path("/nowhere") if a == ("/usr/local/cuda",) else path(*a)
    )
    assert chosen(project, monkeypatch, wrapper) == pip
    (pip / "include" / "cuda_fp16.h").unlink()
    with pytest.raises(project.Unfit, match=r"local has nvcc but no include/cuda_runtime\.h"):
        chosen(project, monkeypatch, wrapper)


@pytest.mark.parametrize(
    ("release", "script", "match"),
    [
        ("12.4", None, r"is of CUDA 12\.4, torch of CUDA 13\.0"),
        ("13.0", "#!/bin/sh\necho 'error: broken' >&2\nexit 1\n", "does not run: error: broken"),
        ("13.0", "no program at all", "does not run"),
    ],
)
def test_a_toolkit_that_does_not_fit_is_named(
    project, monkeypatch, tmp_path, release: str, script: str | None, match: str
) -> None:
    home = toolkit(tmp_path / "cuda", release)
    if script is not None:
        (home / "bin" / "nvcc").write_text(script)
    monkeypatch.setenv("CUDA_HOME", str(home))
    with pytest.raises(project.Unfit, match=match):
        project.toolkit("13.0", str(tmp_path))


@pytest.mark.parametrize(
    ("wish", "archs", "expected"),
    [
        ("8.0;9.0;10.0+PTX", ALL, "8.0;9.0;10.0+PTX"),
        ("8.0;9.0;10.0+PTX", "80 90", "8.0;9.0+PTX"),  # nvcc before 12.8
        ("7.0 7.5 8.6 9.0a", ALL, "8.6;9.0a"),
        ("12.0+PTX", ALL, "12.0+PTX"),
    ],
)
def test_architectures_that_nobody_knows_are_dropped(
    project, tmp_path, wish: str, archs: str, expected: str
) -> None:
    nvcc = toolkit(tmp_path / "cuda", archs=archs) / "bin" / "nvcc"
    found, dropped = project.architectures(nvcc, wish)
    assert found == expected
    assert len(dropped) == len(wish.replace(";", " ").split()) - len(expected.split(";"))


def test_no_architecture_or_a_name_is_an_error(project, tmp_path) -> None:
    nvcc = toolkit(tmp_path / "cuda") / "bin" / "nvcc"
    with pytest.raises(project.Unfit, match=r"no architecture is left: 7\.5 .the kernels need"):
        project.architectures(nvcc, "7.5")
    with pytest.raises(project.Unfit, match="'Ampere'"):
        project.architectures(nvcc, "Ampere")


@pytest.mark.parametrize("wish", ["", "1"])
def test_cuda_that_cannot_be_is_left_out_or_with_srn_cuda_an_error(
    project, monkeypatch, tmp_path, capsys, wish: str
) -> None:
    if wish:
        monkeypatch.setenv("SRN_CUDA", wish)
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", "12.4")))
    fake = SimpleNamespace(__version__="9.9.0", version=SimpleNamespace(cuda="13.0"))
    monkeypatch.setattr(project, "find_torch", lambda: fake)
    monkeypatch.setattr(project, "cpu_extension", lambda torch: "the CPU extension")
    monkeypatch.setattr(project, "check_compiler", lambda: None)
    record = {"modules": dict.fromkeys((project.CPU_MODULE, project.CUDA_MODULE))}
    if wish == "1":
        with pytest.raises(SystemExit, match=r"SRN_CUDA=1, but .*CUDA 12\.4"):
            project.extensions(record)
        return
    assert project.extensions(record) == ["the CPU extension"]
    assert capsys.readouterr().err.count("\n") == 1
    assert "CUDA 12.4" in record["modules"][project.CUDA_MODULE]
    assert record["modules"][project.CPU_MODULE] is None


def test_no_compiler_leaves_a_pure_python_package(project, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    record = {"modules": dict.fromkeys((project.CPU_MODULE, project.CUDA_MODULE))}
    assert project.extensions(record) == []
    assert "no C++ compiler" in record["modules"][project.CPU_MODULE]
    assert "pure Python" in capsys.readouterr().err


def test_an_extension_of_another_torch_is_not_loaded(monkeypatch) -> None:
    major, minor = torch.__version__.split(".")[:2]
    same, other = f"{major}.{minor}.99", f"{major}.{int(minor) + 1}.0"
    name = "srn_kernels.backends.nothing"
    for was, match in ((other, f"built against torch {other}"), (same, "is not built")):
        monkeypatch.setattr(built, "record", lambda was=was: {"torch": was, "modules": {}})
        module, reason = built.load(name)
        assert module is None
        assert match in reason


def unbuilt(folder: Path) -> Path:
    """A copy of the package, as a clone has it."""
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "built.json")
    return shutil.copytree(
        Path(srn_kernels.__file__).parent, folder / "srn_kernels", ignore=left_out
    )


def info(folder: Path, path: Path) -> str:
    return subprocess.run(
        [sys.executable, "-m", "srn_kernels.info"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_what_the_build_could_not_make_is_said_with_the_remedy(tmp_path) -> None:
    """A copy of the package without extensions, with the record of a build without a compiler."""
    package = unbuilt(tmp_path)
    modules = [
        line.split('"')[1]
        for line in (PROJECT / "setup.py").read_text().splitlines()
        if line.startswith(("CPU_MODULE", "CUDA_MODULE"))
    ]
    record = {"torch": None, "modules": dict.fromkeys(modules, "no C++ compiler (c++)")}
    (package / "backends" / "built.json").write_text(json.dumps(record))
    said = info(tmp_path, tmp_path)
    assert "backend cpu: not available: no C++ compiler (c++); to build it: pip install" in said
    assert "several times slower" in said


@pytest.mark.parametrize("version", [None, "13.0"])
def test_cuda_is_not_to_be_built_again_for_a_torch_without_it(monkeypatch, version) -> None:
    name, reason = "srn_kernels.backends._cuda", "built against torch 9.9.0, which has no CUDA"
    monkeypatch.setattr(built, "record", lambda: {"modules": {name: reason}})
    monkeypatch.setattr(torch.version, "cuda", version)
    assert built.unfit(name) == (reason if version is None else f"{reason}; to build it: {AGAIN}")


def test_a_clone_that_hides_the_installed_package_says_so(tmp_path) -> None:
    """As after ``pip install .``, where Python still runs in the clone."""
    clone, site = unbuilt(tmp_path / "clone"), tmp_path / "site"
    installed = unbuilt(site)
    (site / "srn_kernels-9.dist-info").mkdir()
    (site / "srn_kernels-9.dist-info" / "METADATA").write_text("Name: srn_kernels\nVersion: 9\n")
    assert "hides" not in info(clone.parent, site)
    (installed / "backends" / "built.json").write_text("{}")
    assert f"the package in {installed} is, but {clone} hides it" in info(clone.parent, site)
    assert "hides" not in info(tmp_path, site)
