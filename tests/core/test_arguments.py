"""Numbers of every make are numbers, and a bool is none."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import srn_kernels as srn
from srn_kernels import functional


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
