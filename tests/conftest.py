"""Options and fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch
from live import serves

import srn_kernels as srn
from srn_kernels import backends


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
