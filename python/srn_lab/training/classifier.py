"""Training of classifiers by SGD with momentum, on true or on shuffled labels (Section 4.1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from srn_lab.data import Images, load
from srn_lab.data.batches import Batches
from srn_lab.measures.spectra import evaluating
from srn_lab.methods.losses import orthogonality_penalty
from srn_lab.methods.method import Norm, matrix_layers
from srn_lab.networks import classifier
from srn_lab.training import engine as engines
from srn_lab.training.config import ClassifierConfig, to_dict
from srn_lab.training.engine import Checkpoints, check_finite

_ORTHO_WEIGHT = 1e-4


class ClassifierTrainer:
    """A classifier with its data and optimiser, between two epochs."""

    def __init__(self, config: ClassifierConfig, train: Images, test: Images, engine: Accelerator):
        if config.method.norm in (Norm.WGAN_GP, Norm.RANDOM):
            raise ValueError(f"method {config.method.norm.value} is for GANs")
        if train.classes < 2:
            raise ValueError(f"a classifier needs classes, which {train.name} has not")
        if config.batch_size % engine.num_processes:
            raise ValueError(
                f"batch_size {config.batch_size} does not divide by the number of processes, "
                f"{engine.num_processes}"
            )
        self.config, self.engine, self.test = config, engine, test
        self.train = _training_part(config, train)
        with engines.seeded(config.seed):
            self.network = classifier(config.network, train.classes, train.shape[0])
            config.method.apply(self.network)
        self.random = torch.Generator().manual_seed(config.seed)
        self.batches = Batches(self.train, config.batch_size, self.random)
        optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.model, self.optimizer = engine.prepare(self.network, optimizer)
        self.epoch_number = 0
        self.curves: list[dict] = []
        engine.register_for_checkpointing(self)

    def epoch(self) -> None:
        """One pass over the training images at the learning rate of its number."""
        config = self.config
        halvings = self.epoch_number // config.halve_every
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.5**halvings
        self.epoch_number += 1
        processes, rank = self.engine.num_processes, self.engine.process_index
        for _ in range(len(self.train) // config.batch_size):
            images, labels = next(self.batches)
            images = images[rank::processes].to(self.engine.device)
            labels = labels[rank::processes].to(self.engine.device)
            with self.engine.autocast():
                logits = self.model(images).float()
            loss = F.cross_entropy(logits, labels)
            if config.method.norm is Norm.ORTHO:
                weights = [layer.weight for _, layer in matrix_layers(self.network)]
                loss = loss + _ORTHO_WEIGHT * orthogonality_penalty(weights)
            self.optimizer.zero_grad()
            self.engine.backward(loss)
            self.optimizer.step()
        check_finite(config.label, {"the loss": loss.item()}, f"epoch {self.epoch_number}")

    def record(self) -> dict:
        """Loss and accuracy on both parts, evaluation mode; added to the curves."""
        train, test = (evaluate(self.network, part) for part in (self.train, self.test))
        row = {"epoch": self.epoch_number}
        row |= {f"train_{name}": value for name, value in train.items()}
        row |= {f"test_{name}": value for name, value in test.items()}
        self.curves.append(row)
        return row

    def state_dict(self) -> dict:
        """What the accelerator's own state lacks."""
        return {
            "epoch": self.epoch_number,
            "random": self.random.get_state(),
            "batches": self.batches.state_dict(),
            "curves": self.curves,
        }

    def load_state_dict(self, state: dict) -> None:
        self.epoch_number, self.curves = state["epoch"], state["curves"]
        self.random.set_state(state["random"])
        self.batches.load_state_dict(state["batches"])


def _training_part(config: ClassifierConfig, train: Images) -> Images:
    if config.images > len(train):
        raise ValueError(f"images must be at most {len(train)} for {train.name}: {config.images}")
    if config.images:
        # A fixed random part: bundled sets are sorted by class.
        fixed = torch.Generator().manual_seed(0)
        train = train.subset(torch.randperm(len(train), generator=fixed)[: config.images])
    if not config.random_labels:
        return train
    shuffled = torch.Generator().manual_seed(config.seed)
    labels = train.labels[torch.randperm(len(train), generator=shuffled)]
    return Images(train.name, train.pixels, labels, train.classes)


def logits_of(network: nn.Module, data: Images, batch: int = 500) -> Tensor:
    """Logits (N, classes) in evaluation mode, on the CPU."""
    device = next(network.parameters()).device
    with evaluating(network):
        parts = [
            network(data.take(index)[0].to(device)).float().cpu()
            for index in torch.arange(len(data)).split(batch)
        ]
    return torch.cat(parts)


def evaluate(network: nn.Module, data: Images) -> dict[str, float]:
    """Mean cross-entropy ("loss") and share of right answers ("accuracy")."""
    logits = logits_of(network, data).double()
    return {
        "loss": F.cross_entropy(logits, data.labels).item(),
        "accuracy": (logits.argmax(dim=1) == data.labels).double().mean().item(),
    }


def train_classifier(
    config: ClassifierConfig,
    folder: Path | None = None,
    *,
    on_epoch: Callable[[int], None] | None = None,
    record_every: int = 1,
    save_every_s: float = 60.0,
    cpu: bool = False,
    download: bool = False,
) -> ClassifierTrainer:
    """Train a classifier, taking up an interrupted run in ``folder``."""
    train, test = (load(config.data, part, download=download) for part in ("train", "test"))
    engine = engines.accelerator(folder, config.mixed_precision, track=False, cpu=cpu)
    with engines.threads(config.threads), engines.seeded(config.seed):
        trainer = ClassifierTrainer(config, train, test, engine)
        checkpoints = Checkpoints(folder, to_dict(config), engine) if folder else None
        found = checkpoints.newest() if checkpoints else None
        if found is not None:
            checkpoints.load(found)
        else:
            trainer.record()
        saved = time.monotonic()
        while trainer.epoch_number < config.epochs:
            trainer.epoch()
            done = trainer.epoch_number
            if done % record_every == 0 or done == config.epochs:
                trainer.record()
            if checkpoints and done < config.epochs and time.monotonic() - saved > save_every_s:
                checkpoints.save(done)
                saved = time.monotonic()
            if on_epoch is not None:
                on_epoch(done)
    return trainer
