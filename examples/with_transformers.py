"""transformers: GPT-2, whose layers are Conv1D and whose head is tied to its embedding."""

from __future__ import annotations

import tempfile

import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import srn_kernels as srn


def normalise(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    # A Conv1D's weight is (inputs, outputs): rows along dimension 1. Naming it leaves out the head,
    # whose weight is the embedding's.
    return srn.apply_stable_rank_norm(model, 0.5, layer_types=[Conv1D], dim=1)


torch.manual_seed(0)
config = GPT2Config(
    n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0
)
model = normalise(GPT2LMHeadModel(config))
ids = torch.randint(0, 64, (4, 16))
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
for _ in range(3):
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
expected = model.eval()(ids).logits
print(srn.report(model))

with tempfile.TemporaryDirectory() as folder:
    # For everybody: an ordinary model with the normalised weights, head and embedding still tied.
    srn.export(model).save_pretrained(folder)
    plain = GPT2LMHeadModel.from_pretrained(folder).eval()
    torch.testing.assert_close(plain(ids).logits, expected)
    assert plain.lm_head.weight is plain.transformer.wte.weight

with tempfile.TemporaryDirectory() as folder:
    # To go on training: raw weights, u and v. from_pretrained takes the weights and reports u and v
    # as unexpected; load_state_dict brings them. strict=False, as a tied head is not in the file.
    model.save_pretrained(folder)
    again = normalise(GPT2LMHeadModel.from_pretrained(folder))
    missing, unexpected = again.load_state_dict(
        load_file(f"{folder}/model.safetensors"), strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"], [])
    assert torch.equal(again.eval()(ids).logits, expected)
