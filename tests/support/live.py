"""Which backends the tests of all backends run over."""

from __future__ import annotations

import pytest
import torch

import srn_kernels as srn
from srn_kernels import backends
from srn_kernels.maths.matrix import state_dtype


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
