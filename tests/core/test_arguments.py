"""Wrong arguments are named and change nothing; numbers of every make are numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

import srn_kernels as srn
from srn_kernels import functional
from srn_kernels.functional import stable_rank_normalize, stable_rank_project_


@pytest.mark.parametrize("real", [np.float32, np.float64, np.float16, Fraction])
@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_scalars_of_numpy_are_numbers(real: type, integer: type) -> None:
    w = torch.randn(6, 4, 3)
    vectors = (torch.randn(n) for n in (4, 18))
    u, v = (x / x.norm() for x in vectors)
    plain, other = (
        functional.stable_rank_normalize(
            [w],
            [u.clone()],
            [v.clone()],
            [rank],
            n_power_iterations=count,
            eps=eps,
            dims=[dim],
        )[0]
        for rank, count, eps, dim in (
            (1.5, 2, 0.0, 1),
            (real(1.5), integer(2), real(0), integer(1)),
        )
    )
    assert torch.equal(plain, other)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"target_ranks": [True]}, r"target_ranks\[0\] must be a number, got True"),
        ({"target_ranks": [np.bool_(True)]}, r"target_ranks\[0\] must be a number"),
        ({"target_ranks": ["2"]}, r"target_ranks\[0\] must be a number, got '2'"),
        ({"target_ranks": [1 + 1j]}, r"target_ranks\[0\] must be a number"),
        ({"eps": True}, "eps must be a number"),
        ({"n_power_iterations": True}, "n_power_iterations must be an int"),
        ({"n_power_iterations": np.float64(1)}, "n_power_iterations must be an int"),
        ({"dims": [np.float32(0)]}, r"dims\[0\] must be an int"),
        ({"dims": [False]}, r"dims\[0\] must be an int"),
    ],
)
def test_what_is_no_number_is_refused_by_name(changed: dict, match: str) -> None:
    u, v = torch.ones(4) / 2, torch.ones(9) / 3
    arguments = {"weights": [torch.randn(4, 9)], "us": [u], "vs": [v], "target_ranks": [2.0]}
    with pytest.raises(TypeError, match=match):
        functional.stable_rank_normalize(**arguments | changed)
    assert torch.equal(u, torch.ones(4) / 2)


def test_an_unknown_rule_is_refused_by_name() -> None:
    for rule in ("spectra", None, "stable_rank:2"):
        with pytest.raises(ValueError, match="rule must be one of"):
            srn.stable_rank_norm(nn.Linear(3, 4), rule=rule)
    with pytest.raises(TypeError, match="rule must be an instance of"):
        srn.register_rule(srn.Rule)


def test_a_rule_that_kernels_do_not_serve_says_so() -> None:
    class Identity(srn.Rule):
        name = "identity of this test"

    rule = srn.register_rule(Identity())
    assert srn.register_rule(rule) is rule
    with pytest.raises(ValueError, match="one of the name"):
        srn.register_rule(Identity())
    for keywords, match in (
        ({"backend": "cpu"}, "served by plain PyTorch"),
        ({"preserve": 2}, "has no preserve"),
        ({"sigma_max": 2.0}, "knows no sigma"),
    ):
        layer = nn.Linear(3, 4)
        with pytest.raises(ValueError, match=match):
            srn.stable_rank_norm(layer, rule=rule.name, **keywords)
        assert not srn.is_normalized(layer)


GOOD = {
    "weights": lambda: [torch.randn(3, 5), torch.randn(4, 6)],
    "us": lambda: [torch.ones(3) / 3**0.5, torch.ones(4) / 2],
    "vs": lambda: [torch.ones(5) / 5**0.5, torch.ones(6) / 6**0.5],
    "target_ranks": lambda: [2.0, 2.0],
}


def second(argument: str, value: object) -> dict[str, object]:
    """A call whose second layer alone is wrong."""
    return {argument: [GOOD[argument]()[0], value]}


INVALID = {
    "weights-int": (
        second("weights", torch.ones(4, 6, dtype=torch.int32)),
        TypeError,
        r"weights\[1\].*int32",
    ),
    "weights-complex": (
        second("weights", torch.ones(4, 6, dtype=torch.complex64)),
        TypeError,
        r"weights\[1\].*complex64",
    ),
    "weights-no-tensor": (second("weights", "w"), TypeError, r"weights\[1\].*str"),
    "weights-1d": (second("weights", torch.ones(4)), ValueError, r"weights\[1\].*\(4,\)"),
    "us-count": ({"us": [torch.ones(3)]}, ValueError, r"us must have one entry.*1 for 2"),
    "us-shape": (second("us", torch.ones(3)), ValueError, r"us\[1\].*\(4,\).*\(4, 6\).*\(3,\)"),
    "us-2d": (second("us", torch.ones(4, 1)), ValueError, r"us\[1\].*got \(4, 1\)"),
    "us-dtype": (second("us", torch.ones(4).double()), TypeError, r"us\[1\].*float32.*float64"),
    "us-no-tensor": (second("us", [1.0] * 4), TypeError, r"us\[1\].*list"),
    "us-strided": (second("us", torch.ones(8)[::2]), ValueError, r"us\[1\] must be contiguous"),
    "us-grad": (
        second("us", torch.ones(4, requires_grad=True)),
        ValueError,
        r"us\[1\].*gradient",
    ),
    "us-device": (second("us", torch.ones(4, device="meta")), ValueError, r"us\[1\].*meta.*cpu"),
    "vs-count": ({"vs": []}, ValueError, r"vs must have one entry.*0 for 2"),
    "vs-shape": (second("vs", torch.ones(7)), ValueError, r"vs\[1\].*\(6,\).*\(7,\)"),
    "vs-dtype": (second("vs", torch.ones(6).half()), TypeError, r"vs\[1\].*float32.*float16"),
    "ranks-count": ({"target_ranks": [2.0]}, ValueError, r"target_ranks must have one entry"),
    "rank-low": (second("target_ranks", 0.5), ValueError, r"target_ranks\[1\].*0\.5"),
    "rank-nan": (second("target_ranks", math.nan), ValueError, r"target_ranks\[1\].*nan"),
    "rank-text": (
        second("target_ranks", "all"),
        (TypeError, ValueError),
        r"target_ranks\[1\].*all",
    ),
    "rank-none": (second("target_ranks", None), (TypeError, ValueError), r"target_ranks\[1\].*No"),
    "iterations-0": ({"n_power_iterations": 0}, ValueError, r"n_power_iterations.*0"),
    "iterations-half": ({"n_power_iterations": 0.5}, TypeError, r"n_power_iterations.*0\.5"),
    "iterations-bool": ({"n_power_iterations": True}, TypeError, r"n_power_iterations.*True"),
    "eps-negative": ({"eps": -1e-3}, ValueError, r"eps.*-0\.001"),
    "eps-nan": ({"eps": math.nan}, ValueError, r"eps.*nan"),
    "eps-inf": ({"eps": math.inf}, ValueError, r"eps.*inf"),
    "eps-text": ({"eps": "small"}, TypeError, r"eps.*small"),
    "dims-count": ({"dims": [0]}, ValueError, r"dims must have one entry.*1 for 2"),
    "dims-range": ({"dims": [0, 2]}, ValueError, r"dims\[1\] = 2.*\(4, 6\)"),
    "dims-text": ({"dims": [0, "rows"]}, (TypeError, ValueError), r"dims\[1\].*rows"),
    "dims-half": ({"dims": [0, 0.5]}, (TypeError, ValueError), r"dims\[1\].*0\.5"),
    "backend-unknown": ({"backend": "gpu"}, ValueError, r"backend.*'gpu'"),
    "backend-type": ({"backend": None}, ValueError, r"backend.*None"),
}


INVALID_NORMALIZE = {
    "out_dtype-int": ({"out_dtype": torch.int8}, TypeError, r"out_dtype.*int8"),
    "out_dtype-float64": ({"out_dtype": torch.float64}, ValueError, r"out_dtype float64.*\[0\]"),
    "gradient": ({"gradient": "nearest"}, ValueError, r"gradient.*'nearest'"),
}


def refuse(call: object, changed: dict[str, object], error: object, message: str) -> None:
    arguments = {**{name: make() for name, make in GOOD.items()}, **changed}
    tensors = [t for x in arguments.values() if isinstance(x, list) for t in x]
    tensors = [t for t in tensors if isinstance(t, Tensor) and t.device.type == "cpu"]
    before = [(t.detach().clone(), t._version) for t in tensors]
    with pytest.raises(error, match=message):
        call(**arguments)
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


@pytest.mark.parametrize("case", INVALID)
@pytest.mark.parametrize("call", [stable_rank_normalize, stable_rank_project_])
def test_a_wrong_argument_is_named_with_its_value_and_nothing_changes(call, case):
    refuse(call, *INVALID[case])


@pytest.mark.parametrize("case", INVALID_NORMALIZE)
def test_a_wrong_argument_of_normalize_is_named_and_nothing_changes(case):
    refuse(stable_rank_normalize, *INVALID_NORMALIZE[case])


@pytest.mark.parametrize("case", [c for c in INVALID if not c.startswith("backend")])
@pytest.mark.parametrize(
    "call", [srn.reference.stable_rank_normalize, srn.reference.stable_rank_project_]
)
def test_the_reference_functions_check_the_same_arguments(call, case):
    refuse(call, *INVALID[case])


OVERLAPPING = {
    "expanded": torch.randn(1, 6).expand(4, 6),
    "sliding": torch.randn(9).unfold(0, 6, 1),
}


@pytest.mark.parametrize("kind", OVERLAPPING)
def test_a_weight_that_overlaps_itself_is_read_but_not_overwritten(kind):
    weight = OVERLAPPING[kind]
    u, v = oracle.make_state(weight)
    refuse(stable_rank_project_, second("weights", weight), ValueError, r"weights\[1\]")
    stable_rank_normalize([weight], [u], [v], [2.0])
