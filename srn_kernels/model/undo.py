"""A model as it was, where a call that changes it raises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_CONTAINERS = (dict, list, set)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        key: (value, value.copy() if isinstance(value, _CONTAINERS) else None)
        for key, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    attributes.clear()
    for key, (value, content) in before.items():
        attributes[key] = value
        if content is None:
            continue
        # The same container: handles of hooks know theirs by a weak reference.
        value.clear()
        value.extend(content) if isinstance(value, list) else value.update(content)


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module, *others: Any) -> Iterator[None]:
    """Whatever raises within, modules, hooks, buffers and our own records are as before.

    ``others``: objects beside the modules whose attributes are put back. Tensors keep what is
    written in place, so new ones have to be made.
    """
    things = [*model.modules(), *others]
    before = [(thing, type(thing), _copied(thing.__dict__)) for thing in things]
    try:
        yield
    except BaseException:
        for thing, kind, attributes in before:
            if type(thing) is not kind:
                thing.__class__ = kind
            _restore(thing.__dict__, attributes)
        raise
