"""Options and fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch

import srn_kernels as srn
from srn_kernels import backends
from srn_kernels.maths.matrix import state_dtype


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        help="fail, instead of skipping its tests, if this backend is not live",
    )

    parser.addoption(
        "--device",
        default="cpu",
        help="where tensors are made; the tests of all backends run those that serve there",
    )

    parser.addoption(
        "--instruction-set",
        default="auto",
        help="which code of the CPU kernels to run: baseline, avx2, avx512",
    )

    parser.addoption(
        "--cuda-shim",
        action="store_true",
        help="build csrc/cuda for the CPU and let it serve CPU tensors as the cuda backend",
    )

    parser.addoption(
        "--histories",
        type=int,
        default=40,
        help="how many random histories of tests/behaviour/test_histories.py",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "history" in metafunc.fixturenames:
        metafunc.parametrize("history", range(metafunc.config.getoption("histories")))


def pytest_configure(config: pytest.Config) -> None:
    if (device := config.getoption("--device")) != "cpu":
        torch.set_default_device(device)
    if config.getoption("--cuda-shim"):
        import cuda_shim  # with the compiler's tools

        cuda_shim.install()
    if (chosen := config.getoption("--instruction-set")) != "auto":
        extension = backends.load("cpu")._cpu
        if extension is None or not extension.select_instruction_set(chosen):
            raise pytest.UsageError(f"the CPU kernels have no {chosen} code for this processor")
    live = srn.available_backends()
    for name in config.getoption("--require-backend"):
        if live[name] is not None:
            raise pytest.UsageError(f"backend {name} is required but not live: {live[name]}")


def serves(backend: str, dtype: torch.dtype) -> bool:
    """Whether a backend has kernels for weights of a dtype."""
    return state_dtype(dtype) in backends.load(backend).STATE_DTYPES


def live_backends(dtype: torch.dtype | None = None) -> list:
    """Parameters for ``pytest.mark.parametrize``: every backend for the tests' device.

    Given a dtype, those that serve it; a test parametrised over dtypes leaves out by itself those
    that its backend does not serve.
    """
    parameters, device = [], torch.get_default_device().type
    for name, reason in srn.available_backends().items():
        module = backends.load(name)
        if module.DEVICES is not None and device not in module.DEVICES:
            continue
        if dtype is not None and not serves(name, dtype):
            continue
        skip = pytest.mark.skip(reason=f"backend {name} is not live: {reason}")
        parameters.append(pytest.param(name, id=name, marks=[skip] if reason else []))
    return parameters


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the dtypes that a backend does not serve; test_backends.py has what it says."""
    chosen, left_out = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend, dtype = params.get("backend"), params.get("dtype")
        unserved = backend in backends.BACKENDS and dtype and not serves(backend, dtype)
        (left_out if unserved else chosen).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
