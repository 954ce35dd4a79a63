"""Which backend serves a call, and what is left without the extension."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import threading
import types

import oracle
import pytest
import torch

import srn_kernels as srn
from benchmarks.gpu import events
from srn_kernels.functional import stable_rank_normalize


def which_backend(monkeypatch: pytest.MonkeyPatch, **keywords: object) -> str:
    """The backend that serves a call."""
    seen, load = [], srn.backends.load
    monkeypatch.setattr(srn.backends, "load", lambda name: seen.append(name) or load(name))
    weight = torch.randn(3, 4)
    u, v = oracle.make_state(weight)
    stable_rank_normalize([weight], [u], [v], [2.0], **keywords)
    monkeypatch.undo()
    return seen[-1]


def test_use_backend_replaces_auto_and_an_explicit_backend_wins(monkeypatch):
    automatic = which_backend(monkeypatch)
    assert automatic == ("cpu" if srn.available_backends()["cpu"] is None else "reference")
    with srn.use_backend("reference"):
        assert which_backend(monkeypatch) == "reference"
        assert which_backend(monkeypatch, backend=automatic) == automatic
        with srn.use_backend(automatic):
            assert which_backend(monkeypatch) == automatic
        assert which_backend(monkeypatch) == "reference"
    with pytest.raises(KeyError), srn.use_backend("reference"):
        raise KeyError
    assert which_backend(monkeypatch) == automatic


def test_use_backend_holds_for_this_thread_only(monkeypatch):
    automatic, seen = which_backend(monkeypatch), []
    with srn.use_backend("reference"):
        worker = threading.Thread(target=lambda: seen.append(which_backend(monkeypatch)))
        worker.start()
        worker.join()
    assert seen == [automatic]


def test_a_backend_that_does_not_exist_or_cannot_serve_raises():
    weight = torch.randn(3, 4)
    u, v = oracle.make_state(weight)
    with pytest.raises(ValueError, match="'gpu'"), srn.use_backend("gpu"):
        pass
    for name, reason in srn.available_backends().items():
        devices = srn.backends.load(name).DEVICES
        if devices is None or "cpu" in devices:
            continue
        # Not live: the reason. Live: it does not serve CPU tensors.
        said = "serves tensors on" if reason is None else reason
        before = u.clone(), v.clone()
        with pytest.raises(RuntimeError, match=f"{name}.*{re.escape(said)}"):
            stable_rank_normalize([weight], [u], [v], [2.0], backend=name)
        if reason is not None:
            with pytest.raises(RuntimeError, match=re.escape(reason)), srn.use_backend(name):
                pass
        assert all(map(torch.equal, (u, v), before))


def test_auto_passes_by_a_backend_that_lacks_the_dtype_and_a_name_does_not(monkeypatch):
    narrow = types.SimpleNamespace(**vars(srn.backends.load("reference")))
    narrow.STATE_DTYPES = frozenset({torch.float32})
    load = srn.backends.load
    monkeypatch.setattr(srn.backends, "load", lambda n: narrow if n == "cpu" else load(n))
    srn.backends._automatic.cache_clear()
    try:
        assert srn.backends.resolve("auto", "cpu", torch.float32) == "cpu"
        with pytest.warns(UserWarning, match="cpu does not serve torch.float64"):
            assert srn.backends.resolve("auto", "cpu", torch.float64) == "reference"
        with pytest.raises(TypeError, match=r"'cpu'.*torch\.float64"):
            srn.backends.resolve("cpu", "cpu", torch.float64)
    finally:
        srn.backends._automatic.cache_clear()


def test_without_extension_triton_and_numpy_the_reference_serves_and_says_so():
    program = """
        import sys, warnings

        for name in ("triton", "numpy", "srn_kernels.backends._cpu"):
            sys.modules[name] = None  # importing it raises
        import torch
        import srn_kernels as srn

        live = srn.available_backends()
        assert live["reference"] is None and "_cpu halted" in live["cpu"], live
        w = torch.arange(12.0).view(3, 4).requires_grad_()
        u, v = torch.ones(3) / 3**0.5, torch.ones(4) / 2
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (out,) = srn.functional.stable_rank_normalize([w], [u], [v], [1.0])
        assert any("reference" in str(c.message) for c in caught), caught
        out.sum().backward()
        assert torch.equal(out, torch.outer(u, v)) and not w.grad.any()
        try:
            srn.functional.stable_rank_normalize([w], [u], [v], [1.0], backend="cpu")
        except RuntimeError as error:
            assert "_cpu halted" in str(error)
        else:
            raise AssertionError("the cpu backend served")
        assert srn.empty_cache() == 0
        print("served")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "served\n"


DENSE = torch.randn(64, 3, 3, 32).permute(0, 3, 1, 2)  # channels_last


@pytest.mark.parametrize(
    ("weights", "dims", "expected"),
    [
        ([torch.empty(64, 288)], [0], "cuda"),
        ([DENSE], [0], "cuda"),
        ([torch.empty(64, 13824)], [0], "cuda"),  # in parts
        ([torch.empty(64, 20000)], [0], "triton"),  # more than threads hold
        ([torch.empty(64, 17277)], [0], "triton"),  # odd, as wide as vectors would hold
        ([torch.empty(64, 32, 4, 4)], [1], "triton"),  # a transposed convolution
        ([torch.empty(64, 2, 4, 4), torch.empty(64, 40)], [1, 0], "cuda"),  # less than half
        ([torch.empty(64, 3, 4, 4), torch.empty(64, 40)], [1, 0], "triton"),
        ([torch.empty(30000)], [0], "cuda"),
        ([torch.empty(64, 96)[:, ::2], torch.empty(8, 8)], [0, 0], "cuda"),  # copied first
    ],
)
def test_auto_leaves_layouts_that_the_cuda_kernels_read_directly_to_triton(
    monkeypatch, weights, dims, expected
):
    cuda, triton = (srn.backends.load(name) for name in ("cuda", "triton"))
    monkeypatch.setattr(cuda.planning, "kernels", events.KERNELS)
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
    monkeypatch.setattr(triton, "DEVICES", frozenset({"cuda"}))
    monkeypatch.setattr(cuda, "DEVICES", frozenset({"cuda"}))
    for cache in (srn.backends._automatic, cuda.planning.is_direct):
        cache.cache_clear()
    try:
        call = ("cuda", torch.float32, weights, dims)
        assert srn.backends.choose("auto", *call) == expected
        assert srn.backends.choose("cuda", *call) == "cuda"  # by name: served as it is
        with srn.use_backend("cuda"):
            assert srn.backends.choose("auto", *call) == "cuda"
        assert srn.backends.choose("auto", "cuda", torch.float64, weights, dims) == "cuda"
        monkeypatch.setattr(triton, "unavailable_reason", lambda: "gone")
        assert srn.backends.choose("auto", *call) == "cuda"
    finally:
        for cache in (srn.backends._automatic, cuda.planning.is_direct):
            cache.cache_clear()
