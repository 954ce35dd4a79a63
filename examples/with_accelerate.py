"""accelerate: prepare a normalised model, train, save the state and resume it exactly."""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from torch import nn

import srn_kernels as srn


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    srn.apply_stable_rank_norm(model, rank_ratio=0.3)  # before prepare
    return model, torch.optim.Adam(model.parameters(), 1e-3)


accelerator = Accelerator(cpu=True)
model, optimizer = accelerator.prepare(*make())
x = torch.randn(8, 16)
for _ in range(5):
    optimizer.zero_grad()
    accelerator.backward(model(x).square().mean())
    optimizer.step()

with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    later = Accelerator(cpu=True)  # another run
    again, _ = later.prepare(*make())
    later.load_state(folder)
assert torch.equal(again.eval()(x), model.eval()(x))
print(srn.report(later.unwrap_model(again)))
