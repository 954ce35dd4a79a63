"""peft: LoRA on a normalised model. The base stays normalised, the adapters do not get it."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import srn_kernels as srn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.v(torch.tanh(self.q(x)))))


torch.manual_seed(0)
x = torch.randn(8, 16)
lora = LoraConfig(target_modules=["q", "v"], r=2)

# Normalised first: peft keeps the layers and puts adapters beside them.
base = srn.apply_stable_rank_norm(Net(), 0.5)
expected = base.eval()(x)
model = get_peft_model(base, lora)
assert torch.equal(model.eval()(x), expected)  # adapters begin at zero
srn.fuse(model)  # the round is the whole model's from here on, not the base's

# Or adapters first: then they have to be left out by name.
other = get_peft_model(Net(), lora)
srn.apply_stable_rank_norm(other, 0.5, exclude=["*lora_*"])
assert not any("lora" in row.name for row in srn.report(other))

for wrapped in (model, other):
    wrapped.train()
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    expected = wrapped.eval()(x)
    # Merging replaces layers, which a normalised model refuses: export first.
    merged = srn.export(wrapped).merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
print(srn.report(model))
