"""torchao: quantise what export gives; a normalised model itself is refused."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import srn_kernels as srn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
srn.apply_stable_rank_norm(model, 0.5).eval()
x = torch.randn(8, 64)

plain = srn.export(model)
quantize_(plain, Int8WeightOnlyConfig())
error = ((plain(x) - model(x)).norm() / model(x).norm()).item()
print(f"{type(plain[0].weight).__name__}, relative error {error:.4f}")
assert error < 0.02

wrong = copy.deepcopy(model)
try:
    quantize_(wrong, Int8WeightOnlyConfig())
    wrong(x)
except TypeError as refusal:
    print(f"without export: {str(refusal)[:90]}...")
else:
    raise AssertionError("a quantised weight was normalised")
