"""Distance-aware features for SNGP or DUE: a soft bound that leaves smaller norms alone.

Every hidden layer is W / max(1, sigma / 0.95), so that a residual block x + f(x) cannot fold
distances away: they stay between 0.05 and 1.95 times what they were.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import srn_kernels as srn

BOUND = 0.95


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(x))


torch.manual_seed(0)
features = nn.Sequential(*(Residual(32) for _ in range(3)))
srn.apply_stable_rank_norm(features, 1.0, sigma_max=BOUND, grad_through_sigma=False)
# A Gaussian process by random Fourier features, as SNGP's last layer; it is not normalised.
frequencies, phase = torch.randn(32, 256) / 8, 2 * torch.pi * torch.rand(256)
head = nn.Linear(256, 2)

x = torch.randn(512, 32)
y = (x[:, 0] > 0).long()
optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], 1e-2)
for _ in range(60):
    optimizer.zero_grad()
    shown = torch.cos(features(x) @ frequencies + phase)
    loss = nn.functional.cross_entropy(head(shown), y)
    loss.backward()
    optimizer.step()

a, b = torch.randn(256, 32), torch.randn(256, 32)
features.eval()
with torch.no_grad():
    ratio = (features(a) - features(b)).norm(dim=1) / (a - b).norm(dim=1)
    weights = [srn.normalized_weight(block.linear) for block in features]
largest = max(torch.linalg.matrix_norm(w, 2).item() for w in weights)
print(f"loss {loss.item():.3f}; largest spectral norm {largest:.3f}")
print(f"distances after three blocks: {ratio.min():.2f} to {ratio.max():.2f} times those before")
assert largest < BOUND * 1.01
assert ratio.min() >= (1 - BOUND) ** 3 and ratio.max() <= (1 + BOUND) ** 3
