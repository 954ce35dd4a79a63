"""Options and fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch

import srn_kernels as srn
from srn_kernels import backends


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        help="fail, instead of skipping its tests, if this backend is not live",
    )


def pytest_configure(config: pytest.Config) -> None:
    live = srn.available_backends()
    for name in config.getoption("--require-backend"):
        if live[name] is not None:
            raise pytest.UsageError(f"backend {name} is required but not live: {live[name]}")


def live_backends(device: str = "cpu") -> list:
    """Parameters for ``pytest.mark.parametrize``: every backend that can serve a device type."""
    parameters = []
    for name, reason in srn.available_backends().items():
        devices = backends.load(name).DEVICES
        if devices is not None and device not in devices:
            continue
        skip = pytest.mark.skip(reason=f"backend {name} is not live: {reason}")
        parameters.append(pytest.param(name, id=name, marks=[skip] if reason else []))
    return parameters


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
