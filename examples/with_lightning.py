"""Lightning: a GAN whose discriminator is normalised, its numbers logged, its checkpoint exact."""

from __future__ import annotations

import logging
import tempfile
import warnings

import lightning
import torch
from torch import Tensor, nn

import srn_kernels as srn

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Gan(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.G = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.D = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        srn.apply_stable_rank_norm(self.D, rank_ratio=0.5)  # here, so that checkpoints load
        self.history = srn.History(self.D)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(m.parameters(), 1e-3, (0.0, 0.9)) for m in (self.D, self.G)]

    def training_step(self, batch: list[Tensor], index: int) -> None:
        (real,) = batch
        step_d, step_g = self.optimizers()
        with srn.shared_round(self.D):  # one W_hat for both
            fake = self.G(torch.randn(len(real), 4)).detach()
            loss = (1 - self.D(real)).relu().mean() + (1 + self.D(fake)).relu().mean()
        step_d.zero_grad()
        self.manual_backward(loss)
        step_d.step()
        step_g.zero_grad()
        self.manual_backward(-self.D(self.G(torch.randn(len(real), 4))).mean())
        step_g.step()
        for name, numbers in self.history().items():
            self.log_dict({f"{name}/{key}": value for key, value in numbers.items()})


torch.manual_seed(0)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 8)), 16)
with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
    warnings.simplefilter("ignore")  # about the number of workers, and a trainer without a logger
    model = Gan()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    trainer.save_checkpoint(f"{folder}/gan.ckpt")
    again = Gan.load_from_checkpoint(f"{folder}/gan.ckpt")
x = torch.randn(4, 8)
assert torch.equal(again.D.eval()(x), model.D.eval()(x))
assert "0.weight/stable_rank" in trainer.callback_metrics
print(srn.report(again.D))
