"""GAN training with a normalised discriminator (Section 4.2): hinge loss, Adam, linear decay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srn_lab.data import batches, digits
from srn_lab.networks import Discriminator, Generator
from srn_lab.normalisation import Norm, Spectrum, normalise, one_round, spectra


@dataclass(frozen=True)
class TrainConfig:
    """One run; the defaults are the paper's recipe on a small network.

    ``steps`` counts generator updates.
    """

    norm: Norm = Norm.SRN
    rank_ratio: float = 0.5
    steps: int = 1000
    n_dis: int = 5
    batch_size: int = 64
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.9)
    resolution: int = 8
    width: int = 64
    latent: int = 64
    seed: int = 0
    threads: int = 1
    """torch threads. One is nearly as fast as two at this size, far steadier on a busy machine, and
    makes a run repeat bit for bit whatever the number of cores."""
    spectra_every: int = 100
    """G steps between two records of every layer's exact spectrum; first and last always kept."""
    shared_round: bool = True
    """D(real) and D(fake) of one D step use the same normalised weights, after one power iteration:
    half the cost, and the hinge loss compares both batches under one and the same D. False: each
    of the two forwards normalises anew, with its own power iteration."""

    def __post_init__(self) -> None:
        for name in ("steps", "n_dis", "batch_size", "threads", "spectra_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.rank_ratio <= 1:
            raise ValueError(f"rank_ratio must be in (0, 1], got {self.rank_ratio}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclass(frozen=True)
class StepRecord:
    """One G step. The D columns are means over its ``n_dis`` D steps."""

    step: int
    loss_d: float
    loss_g: float
    logit_real: float
    logit_fake: float
    step_ms: float


@dataclass(frozen=True)
class SpectraRecord:
    """Every layer's spectrum after ``step`` G steps (0: before training)."""

    step: int
    layers: list[Spectrum]


@dataclass
class History:
    """What a run recorded: every step, and the spectra at intervals."""

    steps: list[StepRecord] = field(default_factory=list)
    spectra: list[SpectraRecord] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain lists and numbers, ready for JSON."""
        return asdict(self)


@dataclass
class Gan:
    """Both networks of one run and what the run was."""

    config: TrainConfig
    generator: Generator
    discriminator: Discriminator

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Images (count, 1, resolution, resolution) from G in evaluation mode, no gradients."""
        training = self.generator.training
        self.generator.eval()
        z = torch.randn(count, self.config.latent, generator=generator)
        with torch.no_grad():
            images = self.generator(z)
        self.generator.train(training)
        return images


def hinge_loss_d(logit_real: Tensor, logit_fake: Tensor) -> Tensor:
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))] over the batch, a scalar."""
    return F.relu(1 - logit_real).mean() + F.relu(1 + logit_fake).mean()


def hinge_loss_g(logit_fake: Tensor) -> Tensor:
    """-E[D(G(z))] over the batch, a scalar."""
    return -logit_fake.mean()


def build(config: TrainConfig) -> Gan:
    """Untrained networks, the discriminator normalised; global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        generator = Generator(config.resolution, width=config.width, latent=config.latent)
        discriminator = Discriminator(config.resolution, width=config.width)
        # Inside the fork too: torch's spectral norm draws its u and v from the global state.
        normalise(discriminator, config.norm, config.rank_ratio)
    return Gan(config, generator, discriminator)


def train(
    config: TrainConfig, on_step: Callable[[StepRecord], None] | None = None
) -> tuple[Gan, History]:
    """Train one GAN on the digits. Bit-reproducible for a config on one machine.

    ``on_step`` is called with each G step's record, e.g. to advance a progress bar.
    """
    with _threads(config.threads):
        gan = build(config)
        trainer = Trainer(gan)
        history = History()
        history.spectra.append(SpectraRecord(0, spectra(gan.discriminator)))
        for step in range(1, config.steps + 1):
            record = trainer.step(step)
            history.steps.append(record)
            if step % config.spectra_every == 0 or step == config.steps:
                history.spectra.append(SpectraRecord(step, spectra(gan.discriminator)))
            if on_step is not None:
                on_step(record)
    return gan, history


class Trainer:
    """Networks, data and optimisers of a run, between two of its steps."""

    def __init__(self, gan: Gan) -> None:
        config = gan.config
        self.gan = gan
        self.random = torch.Generator().manual_seed(config.seed)
        self.real_batches = batches(digits(config.resolution), config.batch_size, self.random)
        adam = {"lr": config.learning_rate, "betas": config.betas}
        self.optimizer_d = torch.optim.Adam(gan.discriminator.parameters(), **adam)
        self.optimizer_g = torch.optim.Adam(gan.generator.parameters(), **adam)

    def step(self, step: int) -> StepRecord:
        """G step number ``step``, counted from 1: ``n_dis`` D updates, then one of G."""
        start = time.perf_counter()
        config = self.gan.config
        self._set_learning_rate(config.learning_rate * (1 - (step - 1) / config.steps))
        d_steps = [self.step_d() for _ in range(config.n_dis)]
        loss_d, logit_real, logit_fake = torch.tensor(d_steps, dtype=torch.float64).mean(0).tolist()
        loss_g = self.step_g()
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        return StepRecord(step, loss_d, loss_g, logit_real, logit_fake, elapsed_ms)

    def step_d(self) -> tuple[float, float, float]:
        """One D update; returns loss, mean logit of the real and of the generated images."""
        config, discriminator = self.gan.config, self.gan.discriminator
        real = next(self.real_batches)
        with torch.no_grad():
            fake = self.gan.generator(self._latents())
        round_ = one_round(discriminator, config.norm) if config.shared_round else nullcontext()
        with round_:
            logit_real, logit_fake = discriminator(real), discriminator(fake)
            loss = hinge_loss_d(logit_real, logit_fake)
            self.optimizer_d.zero_grad()
            loss.backward()
        self.optimizer_d.step()
        return loss.item(), logit_real.mean().item(), logit_fake.mean().item()

    def step_g(self) -> float:
        """One G update; returns the loss. D is not changed."""
        discriminator = self.gan.discriminator
        # Frozen, D costs no weight gradients here, and srn_kernels leaves u and v where they are.
        _set_trainable(discriminator, False)
        loss = hinge_loss_g(discriminator(self.gan.generator(self._latents())))
        self.optimizer_g.zero_grad()
        loss.backward()
        _set_trainable(discriminator, True)
        self.optimizer_g.step()
        return loss.item()

    def _latents(self) -> Tensor:
        config = self.gan.config
        return torch.randn(config.batch_size, config.latent, generator=self.random)

    def _set_learning_rate(self, value: float) -> None:
        for optimizer in (self.optimizer_d, self.optimizer_g):
            for group in optimizer.param_groups:
                group["lr"] = value


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _set_trainable(module: nn.Module, trainable: bool) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(trainable)
