"""The callbacks in trainings by Lightning and transformers themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import srn_kernels as srn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = srn.stable_rank_norm(nn.Linear(4, 6), rank_ratio=0.5)
        self.head = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        out = self.head(self.body(x).tanh())
        return {"loss": out.square().mean(), "logits": out}


def test_nothing_of_others_is_imported_unless_asked_for() -> None:
    names = ("lightning", "pytorch_lightning", "transformers", "matplotlib", "wandb", "tensorboard")
    code = (
        "import sys, srn_kernels, srn_kernels.integrations as i\n"
        f"assert not set(sys.modules).intersection({names})\n"
        "try: i.Other\nexcept AttributeError as e: assert 'LightningHistory' in str(e)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lightning_logs_every_so_many_steps() -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from lightning.pytorch.loggers.logger import DummyLogger

    from srn_kernels.integrations import LightningHistory

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return self.net(batch[0])["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    class Kept(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics, step=None) -> None:
            self.seen += [(step, metrics)] if "srn/net.body.weight/sigma" in metrics else []

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(24, 4)), 2)
    callback, logger = LightningHistory(every=2), Kept()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, callbacks=[callback],
        accumulate_grad_batches=2, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), data)
    assert [step for step, _ in logger.seen] == [2, 4, 6]  # 12 batches are 6 steps
    assert len(callback.history.rows) == 3
    sigma = callback.history.rows[-1]["net.body.weight"]["sigma"]
    assert logger.seen[-1][1]["srn/net.body.weight/sigma"] == sigma
    with pytest.raises(ValueError, match="every must be"):
        LightningHistory(every=0)


def test_transformers_trainer_logs_with_its_own_log(tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from srn_kernels.integrations import TrainerHistory

    seen = []
    data = [{"x": torch.randn(4), "labels": torch.zeros(1)} for _ in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, logging_steps=2, per_device_train_batch_size=2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    callback = TrainerHistory(to=lambda values, step: seen.append((step, values)))
    trainer = transformers.Trainer(
        model=Net(), args=arguments, train_dataset=data, callbacks=[callback]
    )
    trainer.train()
    entries = [e for e in trainer.state.log_history if "srn/body.weight/sigma" in e]
    assert [e["step"] for e in entries][:2] == [2, 4]
    assert "loss" in entries[0]
    assert [step for step, _ in seen] == [e["step"] for e in entries]
    sigma = callback.history.rows[0]["body.weight"]["sigma"]
    assert entries[0]["srn/body.weight/sigma"] == sigma == seen[0][1]["srn/body.weight/sigma"]
