"""Loops over lists of tensors and attributes that every round makes, on whatever device.

They hold no rule. Each stands here in Python; the extension has it in C++ (csrc/host.cpp), which is
what runs where it is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from srn_kernels.backends import built

Sites = Sequence[tuple[nn.Module, str]]  # every place of one attribute


def tell_autograd(tensors: Sequence[Tensor]) -> None:
    """Counts a write in place, which kernels make through plain pointers; inference tensors have
    no such number."""
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


def are_contiguous_matrices(tensors: Sequence[Tensor]) -> bool:
    """Whether all of these have two dimensions or more, in C order."""
    return all(x.is_contiguous() and x.dim() > 1 for x in tensors)


def have_equal_strides(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether each of these lies in memory as the other does."""
    return all(x.stride() == y.stride() for x, y in zip(tensors, others, strict=True))


def set_attributes(sites: Sequence[Sites], values: Sequence[Any]) -> None:
    """Sets an instance attribute at all sites of each list, past ``nn.Module.__setattr__``."""
    for places, value in zip(sites, values, strict=True):
        for module, name in places:
            module.__dict__[name] = value


def take_attributes(sites: Sequence[Sites]) -> list[Any]:
    """Takes those attributes away; returns for each list what its last site had, or None."""
    return [[m.__dict__.pop(name, None) for m, name in places][-1] for places in sites]


PYTHON = SimpleNamespace(
    tell_autograd=tell_autograd,
    are_contiguous_matrices=are_contiguous_matrices,
    have_equal_strides=have_equal_strides,
    set_attributes=set_attributes,
    take_attributes=take_attributes,
)

_cpu, _ = built.load("srn_kernels.backends._cpu")
if _cpu is not None:
    tell_autograd = _cpu.tell_autograd
    are_contiguous_matrices = _cpu.are_contiguous_matrices
    have_equal_strides = _cpu.have_equal_strides
    set_attributes = _cpu.set_attributes
    take_attributes = _cpu.take_attributes
