"""One list of options, and what is said of a wrong one."""

from __future__ import annotations

import inspect
import pydoc
from dataclasses import fields

import pytest
import torch
from models import Discriminator
from torch import nn

import srn_kernels as srn
from srn_kernels.model.settings import Settings

FUNCTIONS = [
    srn.stable_rank_norm,
    srn.spectral_norm,
    srn.apply_stable_rank_norm,
    srn.convert_spectral_norm,
    srn.project_after_step,
]


def test_options_and_settings_are_one_list() -> None:
    assert set(srn.Options.__annotations__) == {f.name for f in fields(Settings)} - {"rank_ratio"}
    for name in srn.Options.__annotations__:
        assert f"\n        {name}: " in srn.Options.__doc__, name


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_signatures_and_help_show_the_names(function) -> None:
    parameters = inspect.signature(function).parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    shown = pydoc.plain(pydoc.render_doc(function))
    for name in ("n_power_iterations", "eps", "stable_rank", "init_iterations", "backend"):
        assert name in parameters
        assert name in shown
    assert ("preserve" in parameters) == (function.__name__[0] in "sa")
    assert ("dim" in parameters) == (function is not srn.convert_spectral_norm)


def test_positions_are_torchs_own_and_the_papers() -> None:
    names = list(inspect.signature(srn.spectral_norm).parameters)
    assert names[:5] == ["module", "name", "n_power_iterations", "eps", "dim"]
    names = list(inspect.signature(srn.stable_rank_norm).parameters)
    assert names[:6] == ["module", "name", "rank_ratio", "n_power_iterations", "eps", "dim"]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_an_unknown_keyword_names_the_nearest(function) -> None:
    model = Discriminator()
    arguments = [model.conv if function in FUNCTIONS[:2] else model]
    if function is srn.project_after_step:
        arguments.insert(0, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(TypeError, match=r"'init_iteration'; did you mean 'init_iterations'"):
        function(*arguments, init_iteration=3)
    with pytest.raises(TypeError, match="'zzz'; there are"):
        function(*arguments, zzz=3)


def test_messages_name_the_override_the_candidates_and_the_remedy() -> None:
    model = Discriminator()
    cases = [
        ({"overrides": {"he*": {"eps": -1.0}}}, r"overrides\['he\*'\]: eps"),
        ({"overrides": {"up": {"dim": 9}}}, r"overrides\['up'\]: up\.weight: dim = 9"),
        (
            {"overrides": {"up": {"rank_ration": 1}}},
            r"overrides\['up'\] .*'rank_ration'; did you mean 'rank_ratio'",
        ),
        ({"include": "haed"}, r"'conv', 'up', 'head'"),
        ({"include": ["conv", "haed"]}, r"nothing matches \['haed'\]; there are 'conv', 'up'"),
    ]
    for keywords, match in cases:
        with pytest.raises(ValueError, match=match):
            srn.apply_stable_rank_norm(model, **keywords)
    with pytest.raises(TypeError, match=r"layer_types must be .*write \[nn\.Linear\]"):
        srn.apply_stable_rank_norm(model, layer_types=nn.Linear)
    with pytest.raises(TypeError, match=r"got Linear; StableRankNorm\(module\.weight\)"):
        srn.StableRankNorm(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"1 Discriminator.*apply_stable_rank_norm\(model\)"):
        srn.convert_spectral_norm(model)
    with pytest.raises(TypeError, match="'preserve' has no meaning"):
        srn.convert_spectral_norm(model, preserve=2)
