"""diffusers: a small U-Net, saved for everybody and saved to go on training."""

from __future__ import annotations

import tempfile

import torch
from diffusers import UNet2DModel
from diffusers.utils import logging
from safetensors.torch import load_file

import srn_kernels as srn

logging.set_verbosity_error()  # it lists every u and v that a plain model does not take


def normalise(model: UNet2DModel) -> UNet2DModel:
    return srn.apply_stable_rank_norm(model, 1.0, exclude=["conv_out"])


torch.manual_seed(0)
model = normalise(
    UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(8, 16),
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
)
x, t = torch.randn(2, 1, 16, 16), torch.tensor([3, 5])
optimizer = torch.optim.Adam(model.parameters(), 1e-4)
for _ in range(2):
    optimizer.zero_grad()
    model(x, t).sample.square().mean().backward()
    optimizer.step()
expected = model.eval()(x, t).sample
print(f"{len(srn.report(model))} layers in one round")

with tempfile.TemporaryDirectory() as folder:
    srn.export(model).save_pretrained(folder)
    plain = UNet2DModel.from_pretrained(folder).eval()
    torch.testing.assert_close(plain(x, t).sample, expected)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = normalise(UNet2DModel.from_pretrained(folder))  # the weights; u and v converged anew
    again.load_state_dict(load_file(f"{folder}/diffusion_pytorch_model.safetensors"))  # and exactly
    assert torch.equal(again.eval()(x, t).sample, expected)
