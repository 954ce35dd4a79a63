"""What a call asks of the dispatcher: how many operators, and the bytes of their tensors.

Each operator reads its inputs from memory and writes its outputs, so the bytes that all operators
touch are what a call would move if nothing stayed in the caches; a fused call touches less. A
fused operator's second look at a weight that it has just read is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Arguments that an operator overwrites without a look at what they held.
_WRITE_ONLY = {
    "aten::copy_": {"self"},
    "aten::_foreach_copy_": {"self"},
    "srn_kernels::normalize": {"outs", "round_state", "stats"},
    "srn_kernels::normalize_backward": {"grad_weights", "grad_gains"},
}
_UNTOUCHED = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::alias")


class Count(NamedTuple):
    operators: int
    bytes: int


def _bytes(tensors: Iterable[Any]) -> int:
    """Of distinct memory."""
    found = {t.data_ptr(): t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)}
    return sum(found.values())


def _traffic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int | None:
    """Bytes read and written by one operator; None if it only makes views or empty memory."""
    schema = func._schema
    if func.is_view or schema.name.startswith(_UNTOUCHED):
        return None
    values = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    read, written = [], []
    for argument in schema.arguments:
        tensors = tree_leaves(values.get(argument.name))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written:
            written += tensors
        only = argument.is_out or argument.name in _WRITE_ONLY.get(schema.name, ())
        if not (is_written and only):
            read += tensors
    if not written:
        written = tree_leaves(result)
    return _bytes(read) + _bytes(written)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        moved = _traffic(func, args, kwargs, result)
        if moved is not None:
            self.operators += 1
            self.bytes += moved
        return result


def count(body: Callable[[], object]) -> Count:
    """Of one call of ``body``; its backwards count too, on a CPU they run in the same thread."""
    with _Counter() as counter:
        body()
    return Count(counter.operators, counter.bytes)
