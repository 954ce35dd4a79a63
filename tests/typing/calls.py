"""What a type checker makes of the public calls; checked by pyright in strict mode, never run.

A line with ``pyright: ignore`` is a mistake that has to be seen: where it is not, pyright reports
the comment as unnecessary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import srn_kernels as srn
from srn_kernels import functional, linalg, reference

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from typing_extensions import assert_type


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = srn.stable_rank_norm(nn.Conv2d(3, 8, 3), rank_ratio=0.5)
        self.last = srn.spectral_norm(nn.Linear(8, 1), n_power_iterations=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).mean((2, 3)))


def layers_keep_their_class() -> None:
    assert_type(srn.stable_rank_norm(nn.Linear(2, 2), gain=True, backend="cpu"), nn.Linear)
    assert_type(srn.stable_rank_norm(nn.Embedding(5, 2), "weight", 0.7, 1, 1e-12, 0), nn.Embedding)
    assert_type(srn.spectral_norm(nn.ConvTranspose2d(2, 2, 3), dim=1), nn.ConvTranspose2d)
    assert_type(Net().first, nn.Conv2d)
    assert_type(srn.is_normalized(Net().first), bool)
    assert_type(srn.normalized_weight(Net().first), Tensor)


def models_keep_theirs(net: Net, optimizer: Optimizer) -> None:
    overrides = {"first": {"rank_ratio": 0.3}}
    assert_type(srn.apply_stable_rank_norm(net, 0.5, exclude=["last"], overrides=overrides), Net)
    assert_type(srn.apply_stable_rank_norm(net, include=lambda name, m: name != "last"), Net)
    assert_type(srn.convert_spectral_norm(net, rank_ratio=0.9, eps=1e-6), Net)
    assert_type(srn.fuse(net, groups=2), Net)
    assert_type(srn.refresh(net, 10), Net)
    assert_type(srn.export(net), Net)
    assert_type(srn.remove_stable_rank_norm(net), Net)
    assert_type(srn.skipped(net), list[tuple[str, str]])
    assert_type(srn.set_rank_ratio(net, 0.2), None)
    assert_type(srn.to_torch_state_dict(net, form="original"), dict[str, Any])
    assert_type(srn.project_after_step(optimizer, net, 0.5, exclude="last"), srn.Projection)
    with srn.shared_round(net), srn.use_backend("reference"):
        pass
    options: srn.Options = {"gradient": "exact", "sigma_max": 2.0}
    assert_type(srn.apply_stable_rank_norm(net, **options), Net)


def what_there_is_to_see(net: Net) -> None:
    found = srn.report(net, input_shape=(3, 8, 8))
    assert_type(found, srn.Report)
    assert_type(found[0].sigma, float)
    assert_type([row.name for row in found], list[str])
    assert_type(found.to_dict(), dict[str, Any])
    assert_type(srn.History(net, to=print)(step=3), dict[str, dict[str, float]])
    assert_type(srn.plot_spectrum(net, include="first*", limit=4), Figure)
    assert_type(srn.available_backends(), dict[str, str | None])
    assert_type(srn.operator_norm(net.first, (3, 8, 8)), float)


def tensors(weights: Sequence[Tensor], us: list[Tensor], vs: list[Tensor]) -> None:
    called = functional.stable_rank_normalize(
        weights, us, vs, [2.0], dims=[0], out_dtype=torch.float32, gradient="exact"
    )
    assert_type(called, list[Tensor])
    assert_type(functional.stable_rank_project_(weights, us, vs, [2.0]), None)
    assert_type(reference.stable_rank_normalize(weights, us, vs, [2.0]), list[Tensor])
    assert_type(linalg.stable_rank(weights[0]), Tensor)
    found, kept, gamma = linalg.nearest_with_stable_rank(weights[0], 2.0, k=0, method="svd")
    assert_type(found, Tensor)
    assert_type(kept, int | Tensor)
    assert_type(gamma, float | Tensor)
    assert_type(linalg.spectral_clip(weights[0], 1.0), Tensor)
    u, s, v, *_ = linalg.top_singular(weights[0], 2)
    assert_type((u, s, v), tuple[Tensor, Tensor, Tensor])
    assert_type(srn.StableRankNorm(weights[0], rank_ratio=0.5).rank_ratio, float)


def mistakes(net: Net, w: Tensor) -> None:
    srn.stable_rank_norm(3)  # pyright: ignore[reportArgumentType]
    srn.stable_rank_norm(net, rank_ration=0.5)  # pyright: ignore[reportCallIssue]
    srn.spectral_norm(net, gain="yes")  # pyright: ignore[reportArgumentType]
    srn.apply_stable_rank_norm(net, layer_types=nn.Linear)  # pyright: ignore[reportArgumentType]
    srn.convert_spectral_norm(net).first.padding = None  # pyright: ignore[reportAttributeAccessIssue]
    srn.export([net])  # pyright: ignore[reportArgumentType]
    functional.stable_rank_normalize([w], [w], [w])  # pyright: ignore[reportCallIssue]
    linalg.stable_rank(0.5)  # pyright: ignore[reportArgumentType]
    del srn.report(net).row  # pyright: ignore
