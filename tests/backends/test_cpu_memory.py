"""The memory that the C++ backend recycles: who gets it again, and when."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import oracle
import pytest
import torch
from torch import Tensor

from srn_kernels import empty_cache, functional
from srn_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu._cpu is None, reason=f"cpu: {cpu.unavailable_reason()}")


@pytest.fixture
def empty_recycler() -> Iterator[None]:
    empty_cache()
    yield
    empty_cache()


BIG = (256, 256)  # 256 KB in float32: large enough to be kept


def test_a_storage_comes_back_once_nothing_refers_to_it(empty_recycler):
    like = torch.empty(BIG)
    (first,) = cpu.take_like([like])
    pointer = first.data_ptr()
    assert first._base is None
    del first
    (second,) = cpu.take_like([like])
    assert second.data_ptr() == pointer
    second.fill_(2.0)
    (third,) = cpu.take_like([like])
    assert third.data_ptr() != pointer
    third.zero_()
    assert (second == 2.0).all()


@pytest.mark.parametrize(
    "keep",
    [
        lambda t: t,
        lambda t: t[3:5, ::2],
        lambda t: t.detach(),
        lambda t: t.data,
        lambda t: t.view(-1).view(torch.int32),
        lambda t: t.numpy(),
        lambda t: memoryview(t.numpy()),
        lambda t: torch.from_dlpack(t),
        lambda t: t.untyped_storage(),
        lambda t: t.requires_grad_().square(),
        lambda t: torch.nn.Parameter(t),
        lambda t: torch.empty(0).set_(t.untyped_storage()),
    ],
    ids=[
        "tensor",
        "view",
        "detached",
        "data",
        "reinterpreted",
        "numpy",
        "memoryview",
        "dlpack",
        "storage",
        "graph",
        "parameter",
        "set_",
    ],
)
def test_a_storage_is_not_handed_out_while_anything_refers_to_it(empty_recycler, keep):
    like = torch.empty(BIG)
    (first,) = cpu.take_like([like])
    pointer = first.data_ptr()
    kept = keep(first)
    del first
    others = [cpu.take_like([like])[0] for _ in range(3)]
    assert pointer not in [t.data_ptr() for t in others]
    del kept
    assert cpu.take_like([like])[0].data_ptr() == pointer


@pytest.mark.parametrize("look", [Tensor.untyped_storage, copy.deepcopy, pickle.dumps])
def test_looking_at_a_storage_from_python_does_not_keep_it_for_ever(empty_recycler, look):
    like, pointers = torch.empty(BIG), set()
    for _ in range(5):
        (taken,) = cpu.take_like([like])
        look(taken)
        pointers.add(taken.data_ptr())
        del taken
    assert len(pointers) == 1
    assert empty_cache() == like.nbytes


def test_a_graph_keeps_w_hat_until_its_backward(empty_recycler):
    w = torch.randn(BIG, requires_grad=True)
    x = torch.randn(8, BIG[1], requires_grad=True)
    u, v = oracle.make_state(w)

    def loss() -> Tensor:
        (out,) = functional.stable_rank_normalize([w], [u], [v], [2.0], training=False)
        return (x @ out.T).square().sum()

    (expected,) = torch.autograd.grad(loss(), x)
    first = loss()
    for _ in range(3):
        for t in cpu.take_like([w, w, w]):
            t.detach().fill_(float("nan"))
    assert torch.equal(torch.autograd.grad(first, x)[0], expected)


def test_tensors_of_one_call_have_storages_and_versions_of_their_own(empty_recycler):
    like = [torch.empty(BIG), torch.empty(BIG).T, torch.empty(5, 3)]
    for dtype in (None, torch.bfloat16):
        taken = cpu.take_like(like, dtype)
        assert len({t.data_ptr() for t in taken}) == 3
        for t, model in zip(taken, like, strict=True):
            assert (t.shape, t.stride()) == (model.shape, model.stride())
            assert t.dtype == (dtype or model.dtype)
            assert t.storage_offset() == 0
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
        taken[0].zero_()
        assert [t._version for t in taken] == [1, 0, 0]
        del t, taken


@pytest.mark.parametrize("change", ["grown", "shrunk", "shared"])
def test_a_storage_that_was_changed_is_not_reused(empty_recycler, change):
    like = torch.empty(BIG)
    (first,) = cpu.take_like([like])
    if change == "shared":
        first.share_memory_()
    else:
        first.untyped_storage().resize_(like.nbytes * 2 if change == "grown" else 1024)
    pointer = first.data_ptr()
    hold = first.untyped_storage()
    del first, hold
    (second,) = cpu.take_like([like])
    assert second.untyped_storage().nbytes() == like.nbytes
    assert not second.is_shared()
    assert change != "shared" or second.data_ptr() != pointer
    second.fill_(1.0)


def test_emptying_frees_what_is_idle_and_only_that(empty_recycler):
    taken = cpu.take_like([torch.empty(BIG), torch.empty(BIG)])
    taken[1].fill_(7.0)
    del taken[0]
    assert empty_cache() == 256 * 1024
    assert empty_cache() == 0
    assert (taken[0] == 7.0).all()
    taken.clear()
    assert empty_cache() == 256 * 1024


def test_storages_not_used_for_many_calls_are_freed(empty_recycler):
    cpu.take_like([torch.empty(BIG)])
    small = [torch.empty(4)]
    for _ in range(1100):
        cpu.take_like(small)
    assert empty_cache() == 0


def test_training_again_and_again_needs_no_new_memory(empty_recycler):
    w = torch.randn(BIG)
    u, v = oracle.make_state(w)
    seen = set()
    for _ in range(10):
        leaf = w.clone().requires_grad_()
        (out,) = functional.stable_rank_normalize([leaf], [u], [v], [2.0], backend="cpu")
        out.square().sum().backward()
        seen |= {out.data_ptr(), leaf.grad.data_ptr()}
        del out, leaf
    assert len(seen) <= 3
