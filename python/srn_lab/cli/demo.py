"""The demonstration: convert and time a model, train an SN-GAN and an SRN-GAN, compare them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from srn_lab.data import DataSpec, load
from srn_lab.files import write_json
from srn_lab.machine import environment
from srn_lab.measures.evaluate import Evaluation, evaluate, frechet_distance_pca
from srn_lab.measures.spectra import active_layers, stable_rank_bounds
from srn_lab.methods import Method, Norm
from srn_lab.processes import Tell, side_by_side
from srn_lab.report import plots
from srn_lab.report.terminal import comparison_table, conversion_table
from srn_lab.timing.overhead import Overhead, OverheadConfig, SnStyle, measure_overhead
from srn_lab.training.config import GanConfig, to_dict
from srn_lab.training.gan import Gan, History, StepRecord, build, train_gan
from srn_lab.training.runs import load_run, save_run

_LAST = 100  # steps over which final losses are averaged
_IMAGES = 2000  # real, and generated, that are compared


@dataclass(frozen=True)
class DemoConfig:
    """Sized for two minutes on two cores. Work is fixed by counts, so runs repeat exactly.

    Against the paper's recipe the learning rate is higher and ``n_dis`` lower, because training
    is far shorter.
    """

    rank_ratio: float = 0.5
    steps: int = 600
    width: int = 16
    n_dis: int = 2
    learning_rate: float = 1e-3
    seed: int = 0
    num_feat: int = 64
    repeats: int = 5

    def training(self, norm: Norm) -> GanConfig:
        """The run with ``norm``; everything else is equal for all."""
        return GanConfig(
            data=DataSpec("mnist5k", 16),
            method=Method(norm, self.rank_ratio if norm is Norm.SRN else 1.0),
            steps=self.steps,
            width_d=self.width,
            width_g=self.width,
            n_dis=self.n_dis,
            batch_size=32,
            latent=64,
            learning_rate=self.learning_rate,
            seed=self.seed,
            spectra_every=max(1, self.steps // 30),
        )

    def conversion(self, style: SnStyle) -> OverheadConfig:
        """The timing of a model that starts with torch's ``style``."""
        return OverheadConfig(
            style=style, num_feat=self.num_feat, repeats=self.repeats, seed=self.seed
        )


@dataclass(frozen=True)
class _Run:
    gan: Gan
    history: History
    median_step_ms: float
    evaluation: Evaluation

    @property
    def label(self) -> str:
        return self.gan.config.label

    def to_dict(self) -> dict:
        last = self.history.steps[-_LAST:]
        return {
            "config": to_dict(self.gan.config),
            "median_step_ms": self.median_step_ms,
            "final_steps_averaged": len(last),
            "final_loss_d_mean": statistics.mean(r["loss_d"] for r in last),
            "final_loss_g_mean": statistics.mean(r["loss_g"] for r in last),
            **self.evaluation.to_dict(),
            "srn_active": self._srn_active(),
        }

    def _srn_active(self) -> dict:
        method = self.gan.config.method
        bounds = stable_rank_bounds(self.evaluation.layers, method)
        records = [
            [row["layer"] for row in record["layers"] if _exceeds(row, bounds)]
            for record in self.history.spectra
        ]
        return {
            "at_start": records[0],
            "at_end": active_layers(self.evaluation.layers, method),
            "fraction_of_records": {
                layer: sum(layer in active for active in records) / len(records) for layer in bounds
            },
        }


def _exceeds(row: dict, bounds: Mapping[str, float]) -> bool:
    return row["raw_stable_rank"] > bounds[row["layer"]]


class _Clock:
    """Wall seconds of the named parts."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[f"{name}_s"] = time.perf_counter() - start


def run_demo(config: DemoConfig, out: Path, console: Console) -> dict[str, Path]:
    """Run everything, write pictures, checkpoints and ``metrics.json`` below ``out``."""
    clock = _Clock()
    with clock.part("total"):
        with clock.part("conversion_and_timing"):
            overheads = [_convert(config.conversion(style), console) for style in SnStyle]
        conversions = {o.config.style.value: o.to_dict() for o in overheads}
        with clock.part("train"):
            trained = _train(config, out, console)
        with clock.part("evaluate"):
            runs = [_evaluated(out, *one, seed=config.seed) for one in trained]
            scale = _quality_scale(config)
        with clock.part("write"):
            files = _write_pictures(out, runs, overheads)
            for run in runs:
                norm = run.gan.config.method.norm.value
                files |= {
                    f"{norm}_{path.stem}": path
                    for path in (out / norm / "checkpoint.pt", out / norm / "history.json")
                }
    files["metrics"] = out / "metrics.json"
    document = {
        "environment": environment(),
        "config": asdict(config),
        "wall": clock.parts,
        "conversion": conversions,
        "frechet_distance_pca_scale": scale,
        "runs": {run.label: run.to_dict() for run in runs},
        "files": {name: str(path.relative_to(out)) for name, path in files.items()},
    }
    write_json(files["metrics"], document)
    data = runs[0].gan.config.data
    about = f"{data.name}, {data.resolution}x{data.resolution}"
    console.print(comparison_table(document["runs"], scale, about))
    for name, run in document["runs"].items():
        for when, title in (("at_start", "before training"), ("at_end", "after training")):
            if layers := run["srn_active"][when]:
                console.print(f"{name} bounds {title}: {', '.join(layers)}.")
    console.print(f"Total {clock.parts['total_s']:.0f} s on {document['environment']['cpu']}.")
    return files


def _convert(config: OverheadConfig, console: Console) -> Overhead:
    with console.status(f"converting and timing torch's {config.style.value} form"):
        found = measure_overhead(config)
    console.print(conversion_table({config.style.value: found.to_dict()}))
    return found


@dataclass(frozen=True)
class _Training:
    config: GanConfig
    folder: Path


def _train(config: DemoConfig, out: Path, console: Console) -> list[tuple[Norm, float, History]]:
    """Both GANs side by side, a process each: one thread is what networks of this size can use."""
    norms = (Norm.SN, Norm.SRN)
    calls = [_Training(config.training(norm), out / norm.value) for norm in norms]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    found: dict[int, tuple[float, History]] = {}
    with Progress(*columns, console=console) as bar:
        tasks = [bar.add_task(f"training {call.config.label}", total=1.0) for call in calls]

        def advance(shares: Mapping[int, float]) -> None:
            for index, share in shares.items():
                bar.update(tasks[index], completed=share)

        for index, outcome in side_by_side(_train_one, calls, len(calls), advance):
            if isinstance(outcome, Exception):
                raise outcome
            bar.update(tasks[index], completed=1.0)
            found[index] = outcome
    return [(norm, *found[index]) for index, norm in enumerate(norms)]


def _train_one(call: _Training, tell: Tell) -> tuple[float, History]:
    """Train and save one GAN; the median time of a step, and the history."""
    times = [time.perf_counter()]

    def hear(record: StepRecord) -> None:
        times.append(time.perf_counter())
        tell(record.step / call.config.steps)

    trainer = train_gan(call.config, on_step=hear, cpu=True)
    save_run(call.folder, trainer.gan, trainer.history)
    spans = [1e3 * (b - a) for a, b in itertools.pairwise(times)]
    return statistics.median(spans), trainer.history


def _evaluated(out: Path, norm: Norm, step_ms: float, history: History, *, seed: int) -> _Run:
    gan = load_run(out / norm.value / "checkpoint.pt")
    return _Run(gan, history, step_ms, _evaluate(gan, seed))


def _evaluate(gan: Gan, seed: int) -> Evaluation:
    fake, _ = gan.sample(_IMAGES, torch.Generator().manual_seed(seed))
    return evaluate(gan.discriminator, _real(gan.config), fake, seed=seed)


def _real(config: GanConfig) -> torch.Tensor:
    images = load(config.data).images
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[chosen[:_IMAGES]]


def _quality_scale(config: DemoConfig) -> dict[str, float]:
    """The two ends between which a trained generator's distance should lie."""
    training = config.training(Norm.SN)
    real = _real(training)
    untrained = build(training, load(training.data))
    fake, _ = untrained.sample(_IMAGES, torch.Generator().manual_seed(config.seed))
    return {
        "between_halves_of_the_real_images": frechet_distance_pca(real[::2], real[1::2]),
        "untrained_generator": frechet_distance_pca(real, fake),
    }


def _write_pictures(out: Path, runs: list[_Run], overheads: list[Overhead]) -> dict[str, Path]:
    constrained = runs[-1]
    bounds = stable_rank_bounds(constrained.evaluation.layers, constrained.gan.config.method)
    images = {"real": _real(constrained.gan.config)}
    images |= {run.label: run.evaluation.samples for run in runs}
    return {
        "samples": plots.plot_samples(out / "samples.png", images),
        "elhist": plots.plot_elhist(
            out / "elhist.png", {run.label: run.evaluation.elhist for run in runs}
        ),
        "stable_rank": plots.plot_stable_ranks(
            out / "stable_rank.png",
            {run.label: run.history for run in runs},
            bounds,
            bounded=constrained.label,
        ),
        "overhead": plots.plot_overhead(out / "overhead.png", overheads),
    }
