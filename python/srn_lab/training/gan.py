"""Training of a GAN with a normalised discriminator (Section 4.2): Adam, linear decay."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import srn_kernels as srn
from srn_lab.data import Images, load
from srn_lab.data.batches import Batches
from srn_lab.measures.spectra import effective_weight, evaluating, spectra
from srn_lab.methods import Norm
from srn_lab.methods.losses import between, gradient_penalty, orthogonality_penalty
from srn_lab.methods.method import matrix_layers
from srn_lab.networks import Discriminator, Generator
from srn_lab.training import engine as engines
from srn_lab.training.config import GanConfig, to_dict
from srn_lab.training.engine import Checkpoints, check_finite, set_trainable


@dataclass(frozen=True)
class StepRecord:
    """One G step. The D columns are means over its ``n_dis`` D steps."""

    step: int
    loss_d: float
    loss_g: float
    logit_real: float
    logit_fake: float


@dataclass
class Gan:
    """The networks of one run and what the run was."""

    config: GanConfig
    classes: int
    generator: nn.Module
    discriminator: nn.Module

    def sample(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (count, C, H, W) from G in evaluation mode, and their labels, on the CPU."""
        device = next(self.generator.parameters()).device
        z = torch.randn(count, self.config.latent, generator=random)
        labels = torch.randint(self.classes, (count,), generator=random)
        conditions = labels if self.config.conditional else None
        with evaluating(self.generator):
            parts = [
                self.generator(*_moved(device, *part)).cpu() for part in _split(256, z, conditions)
            ]
        return torch.cat(parts), labels


@dataclass
class History:
    """What a run recorded: every step, and the exact spectra of D's layers at intervals."""

    steps: list[dict] = field(default_factory=list)
    spectra: list[dict] = field(default_factory=list)

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.spectra = state["steps"], state["spectra"]


def build(config: GanConfig, data: Images) -> Gan:
    """Untrained networks, the discriminator normalised; global random state is left alone."""
    channels, classes = data.shape[0], data.classes if config.conditional else 0
    if config.conditional and data.classes < 2:
        raise ValueError(f"conditional needs classes, which {data.name} has not")
    with engines.seeded(config.seed):
        generator = Generator(
            config.data.resolution,
            width=config.width_g,
            latent=config.latent,
            channels=channels,
            classes=classes,
        )
        discriminator = Discriminator(
            config.data.resolution, width=config.width_d, channels=channels, classes=classes
        )
        # Seeded too: torch's spectral norm draws its u and v from the global state.
        config.method.apply(discriminator)
    return Gan(config, data.classes, generator, discriminator)


class GanTrainer:
    """Networks, data and optimisers of a run, between two of its steps.

    Every process draws the batch and the latents of all and takes its share, so the sequence of
    global batches does not depend on the number of processes.
    """

    def __init__(self, config: GanConfig, data: Images, engine: Accelerator) -> None:
        if config.batch_size % engine.num_processes:
            raise ValueError(
                f"batch_size {config.batch_size} does not divide by the number of processes, "
                f"{engine.num_processes}"
            )
        self.config, self.engine = config, engine
        self.gan = build(config, data)
        self.random = torch.Generator().manual_seed(config.seed)
        self.batches = Batches(data, config.batch_size, self.random)
        adam = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
        # D's optimiser keeps the parameters themselves, which converting does not replace.
        optimizer_d = torch.optim.Adam(self.gan.discriminator.parameters(), **adam)
        optimizer_g = torch.optim.Adam(self.gan.generator.parameters(), **adam)
        self.discriminator, self.generator, self.optimizer_d, self.optimizer_g = engine.prepare(
            self.gan.discriminator, self.gan.generator, optimizer_d, optimizer_g
        )
        self.average = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)
            self.average = AveragedModel(self.gan.generator, multi_avg_fn=average)
        self.step_number = 0
        self.history = History()
        engine.register_for_checkpointing(self)

    @property
    def evaluated(self) -> Gan:
        """The networks that measures look at: the averaged G where there is one."""
        generator = self.gan.generator if self.average is None else self.average.module
        return Gan(self.config, self.gan.classes, generator, self.gan.discriminator)

    def step(self) -> StepRecord:
        """The next G step: ``n_dis`` updates of D, then one of G."""
        config = self.config
        if self.step_number == config.convert_at:
            self.convert()
        self._set_learning_rate(config.learning_rate * (1 - self.step_number / config.steps))
        self.step_number += 1
        of_d = torch.stack([self.step_d() for _ in range(config.n_dis)]).mean(dim=0)
        numbers = self.engine.reduce(torch.cat([of_d, self.step_g()[None]]), reduction="mean")
        loss_d, logit_real, logit_fake, loss_g = numbers.tolist()
        when = f"step {self.step_number}"
        check_finite(config.label, {"D's loss": loss_d, "G's loss": loss_g}, when)
        record = StepRecord(self.step_number, loss_d, loss_g, logit_real, logit_fake)
        self.history.steps.append(asdict(record))
        if self.average is not None:
            self.average.update_parameters(self.gan.generator)
        if self.step_number % config.spectra_every == 0 or self.step_number == config.steps:
            self.record_spectra()
        return record

    def step_d(self) -> Tensor:
        """One update of D; (loss, mean logit of real, mean logit of generated), float64."""
        config = self.config
        real, labels = _moved(self.engine.device, *self._share(*next(self.batches)))
        labels = labels if config.conditional else None
        with torch.no_grad():
            fake, fake_labels = self._fake(self.gan.generator)
        inputs, conditions = [real, fake], [labels, fake_labels]
        if config.method.norm is Norm.WGAN_GP:
            inputs.append(between(real, fake, self.random))
            conditions.append(labels)
        # One forward of everything: one power iteration, and one call that DDP sees.
        condition = torch.cat(conditions) if config.conditional else None
        with self.engine.autocast():
            logits = self.discriminator(torch.cat(inputs), condition).float()
        on_real, on_fake, *on_between = logits.split(len(real))
        loss = config.loss.discriminator(on_real, on_fake)
        total = loss
        if on_between:
            total = total + config.gp_weight * gradient_penalty(on_between[0], inputs[2])
        if config.method.norm is Norm.ORTHO:
            weights = [effective_weight(m) for _, m in matrix_layers(self.gan.discriminator)]
            total = total + config.ortho_weight * orthogonality_penalty(weights)
        self.optimizer_d.zero_grad()
        self.engine.backward(total)
        self.optimizer_d.step()
        return torch.stack([loss, on_real.mean(), on_fake.mean()]).detach().double()

    def step_g(self) -> Tensor:
        """One update of G; its loss, float64. D is not changed."""
        # Frozen, D costs no weight gradients here, and srn_kernels leaves u and v where they are.
        set_trainable(self.gan.discriminator, False)
        with self.engine.autocast():
            fake, labels = self._fake(self.generator)
            logits = self.gan.discriminator(fake, labels).float()
        loss = self.config.loss.generator(logits)
        self.optimizer_g.zero_grad()
        self.engine.backward(loss)
        set_trainable(self.gan.discriminator, True)
        self.optimizer_g.step()
        return loss.detach().double()

    def convert(self) -> None:
        """From torch's spectral norm to this library's: weights, u, v and Adam's state stay."""
        srn.convert_spectral_norm(self.gan.discriminator)

    def record_spectra(self) -> None:
        """Add every layer's exact spectrum to the history."""
        layers = [asdict(row) for row in spectra(self.gan.discriminator)]
        self.history.spectra.append({"step": self.step_number, "layers": layers})

    def state_dict(self) -> dict:
        """What the accelerator's own state lacks."""
        return {
            "step": self.step_number,
            "random": self.random.get_state(),
            "batches": self.batches.state_dict(),
            "history": self.history.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.step_number = state["step"]
        self.random.set_state(state["random"])
        self.batches.load_state_dict(state["batches"])
        self.history.load_state_dict(state["history"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _fake(self, generator: nn.Module) -> tuple[Tensor, Tensor | None]:
        config = self.config
        z = torch.randn(config.batch_size, config.latent, generator=self.random)
        labels = None
        if config.conditional:
            labels = torch.randint(self.gan.classes, (config.batch_size,), generator=self.random)
        z, labels = _moved(self.engine.device, *self._share(z, labels))
        return generator(z, labels), labels

    def _share(self, *tensors: Tensor | None) -> list[Tensor | None]:
        processes, rank = self.engine.num_processes, self.engine.process_index
        return [t if t is None else t[rank::processes] for t in tensors]

    def _set_learning_rate(self, value: float) -> None:
        for optimizer in (self.optimizer_d, self.optimizer_g):
            for group in optimizer.param_groups:
                group["lr"] = value


def train_gan(
    config: GanConfig,
    folder: Path | None = None,
    *,
    on_step: Callable[[StepRecord], None] | None = None,
    on_samples: Callable[[int, Tensor], None] | None = None,
    samples_every: int = 0,
    save_every_s: float = 60.0,
    save_every: int = 0,
    track: bool = False,
    cpu: bool = False,
    download: bool = False,
) -> GanTrainer:
    """Train one GAN, taking up an interrupted run in ``folder``; bit-reproducible on one machine.

    ``on_step`` hears of every step; ``on_samples`` gets 64 images of fixed latents every
    ``samples_every`` steps. States are saved every ``save_every`` steps, or, at 0, about every
    ``save_every_s`` seconds. ``track``: TensorBoard logs. ``cpu``: no GPU even where there is one.
    """
    data = load(config.data, download=download)
    engine = engines.accelerator(folder, config.mixed_precision, track=track, cpu=cpu)
    with engines.threads(config.threads):
        checkpoints = Checkpoints(folder, to_dict(config), engine) if folder else None
        trainer = GanTrainer(config, data, engine)
        found = checkpoints.newest() if checkpoints else None
        if found is not None:
            if config.convert_at is not None and found > config.convert_at:
                trainer.convert()
            checkpoints.load(found)
        else:
            trainer.record_spectra()
        if track:
            engine.init_trackers("gan")
        saved = time.monotonic()
        steps = config.steps if config.method.trains else 0
        while trainer.step_number < steps:
            record = trainer.step()
            step = record.step
            if track:
                engine.log(_logged(trainer, record), step=step)
            if on_samples and samples_every and (step % samples_every == 0 or step == steps):
                random = torch.Generator().manual_seed(config.seed)
                on_samples(step, trainer.evaluated.sample(64, random)[0])
            due = step % save_every == 0 if save_every else time.monotonic() - saved > save_every_s
            if checkpoints and due and step < steps:
                checkpoints.save(step)
                saved = time.monotonic()
            if on_step is not None:
                on_step(record)
        if track:
            engine.end_training()
    return trainer


def _logged(trainer: GanTrainer, record: StepRecord) -> dict[str, float]:
    values = {f"loss/{n}": v for n, v in (("D", record.loss_d), ("G", record.loss_g))}
    last = trainer.history.spectra[-1]
    if last["step"] == record.step:
        for layer in last["layers"]:
            values[f"sigma/{layer['layer']}"] = layer["raw_sigma"]
            values[f"stable_rank/{layer['layer']}"] = layer["stable_rank"]
    return values


def _split(size: int, *tensors: Tensor | None) -> list[tuple]:
    parts = [
        [None] * (-(-len(tensors[0]) // size)) if t is None else t.split(size) for t in tensors
    ]
    return list(zip(*parts, strict=True))


def _moved(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.to(device) for t in tensors]
