"""A normalisation from outside the package: W / |W|_F (arXiv 1906.04659, section 3.1)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import srn_kernels as srn


class Frobenius(srn.Rule):
    name = "frobenius"

    def normalize(self, w, u, v, target_rank, iterations, eps):
        return (w_hat := w / w.norm()), u, v, self.stats_of(w_hat, frobenius_sq=w.square().sum())

    def gradient(self, g, w, u, v, stats, target_rank):
        return g / w.norm() - (g * w).sum() / w.norm() ** 3 * w


srn.register_rule(Frobenius())


class Plain(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.norm()


def networks() -> tuple[nn.Sequential, nn.Sequential]:
    ours, plain = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    for layer in (plain[0], plain[2]):
        nn.utils.parametrize.register_parametrization(layer, "weight", Plain())
    return srn.apply_stable_rank_norm(ours.double(), rule="frobenius"), plain.double()


@pytest.mark.parametrize("compiled", [False, True])
def test_it_trains_evaluates_saves_loads_reports_and_exports(compiled: bool) -> None:
    torch._dynamo.reset()
    (ours, plain), x = networks(), torch.randn(5, 6, dtype=torch.float64)
    run = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    for model, call in ((ours, run), (plain, plain)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(run.eval()(x), plain.eval()(x))
    twice = []
    for model in (ours, plain):
        weights = [p for p in model.parameters() if p.dim() > 1]
        grads = torch.autograd.grad(model(x).square().sum(), weights, create_graph=True)
        twice.append(torch.autograd.grad(sum(g.square().sum() for g in grads), weights))
    torch.testing.assert_close(*twice)
    (fresh := networks()[0]).load_state_dict(ours.state_dict())
    for same in (fresh, srn.export(ours)):
        torch.testing.assert_close(same.eval()(x), plain(x))
    row, top = srn.report(ours)[0], torch.linalg.matrix_norm(ours[0].weight.detach(), 2)
    assert (row.note[:16], row.sigma) == ("rule='frobenius'", pytest.approx(float(top)))
