"""What docs/features.md says of torch's own spectral norm, seen on the release that it names."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook

import srn_kernels as srn

PAGE = (Path(__file__).parents[2] / "docs" / "features.md").read_text()
NAMED = re.search(r"torch (\d+\.\d+)", PAGE)[1]
FORMS = {"here": srn.spectral_norm, "parametrization": parametrizations.spectral_norm, "hook": hook}

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(NAMED + "."), reason=f"the page speaks of torch {NAMED}"
)


def ran(norm: Callable) -> nn.Module:
    torch.manual_seed(0)
    layer = norm(nn.Linear(16, 8))
    layer(torch.randn(4, 16)).sum().backward()
    return layer


def norm_of(layer: nn.Module) -> float:
    eye = torch.eye(16)
    with torch.no_grad():
        w = (layer.eval()(eye) - layer(torch.zeros(1, 16))).T
    return torch.linalg.matrix_norm(w, 2).item()


def zero_weight_is_finite(norm: Callable) -> bool:
    layer = nn.Linear(16, 8)
    nn.init.zeros_(layer.weight)
    return bool(norm(layer)(torch.randn(4, 16)).isfinite().all())


def copies_after_a_forward(norm: Callable) -> bool:
    try:
        copy.deepcopy(ran(norm))
    except RuntimeError:
        return False
    return True


def pickles(norm: Callable) -> bool:
    try:
        pickle.loads(pickle.dumps(ran(norm)))
    except (RuntimeError, AttributeError, pickle.PicklingError):
        return False
    return True


def right_before_training(norm: Callable) -> bool:
    torch.manual_seed(0)
    return norm_of(norm(nn.Linear(16, 8))) < 1.05


def keeps_the_class(norm: Callable) -> bool:
    return type(ran(norm)) is nn.Linear


def reading_changes_nothing(norm: Callable) -> bool:
    layer = ran(norm)
    with torch.no_grad():  # away from convergence, where an iteration is seen
        weight = layer._parameters.get("weight", layer._parameters.get("weight_orig"))
        (layer.parametrizations.weight.original if weight is None else weight).normal_()
    before = {k: v.clone() for k, v in layer.named_buffers()}
    _ = layer.weight
    return all(torch.equal(v, before[k]) for k, v in layer.named_buffers())


def takes_plain_checkpoints(norm: Callable) -> bool:
    try:
        norm(nn.Linear(16, 8)).load_state_dict(nn.Linear(16, 8).state_dict())
    except RuntimeError:
        return False
    return True


CLAIMS = {
    "A zero weight gives a finite output": zero_weight_is_finite,
    "Copies (deepcopy) after a forward": copies_after_a_forward,
    "Pickles as a whole": pickles,
    "Norm 1 before the first training step": right_before_training,
    "Keeps the layer's class": keeps_the_class,
    "Reading `weight` changes nothing": reading_changes_nothing,
    "Loads the plain model's checkpoint, strictly": takes_plain_checkpoints,
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_table_says_what_happens(claim: str) -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {claim} |")]
    said = [cell.strip().startswith("yes") for cell in line.split("|")[2:5]]
    assert said == [CLAIMS[claim](norm) for norm in FORMS.values()]
