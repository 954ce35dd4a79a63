"""opacus: its per-sample gradients would be those of W_hat, so it is refused; torch.func serves."""

from __future__ import annotations

import torch
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import srn_kernels as srn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
srn.apply_stable_rank_norm(model, 0.5)
x = torch.randn(4, 8)

try:
    GradSampleModule(model, strict=False)(x).sum().backward()
except RuntimeError as refusal:
    print(f"refused: {refusal}")
else:
    raise AssertionError("opacus took a normalised model")

model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
srn.apply_stable_rank_norm(model, 0.5).eval()
parameters = {name: p.detach() for name, p in model.named_parameters()}


def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
    return functional_call(model, parameters, (sample.unsqueeze(0),)).square().sum()


each = vmap(grad(loss), (None, 0))(parameters, x)
together = grad(lambda p: sum(loss(p, sample) for sample in x))(parameters)
for name, gradient in together.items():
    torch.testing.assert_close(each[name].sum(0), gradient, rtol=1e-4, atol=1e-6)
print("per-sample gradients by torch.func:", {n: tuple(g.shape) for n, g in each.items()})
