"""The demonstration: convert and time a model, train an SN-GAN and an SRN-GAN, compare them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from srn_lab import plots
from srn_lab.data import digits
from srn_lab.evaluate import Evaluation, active_layers, evaluate, stable_rank_bounds
from srn_lab.normalisation import Norm, label
from srn_lab.overhead import Overhead, OverheadConfig, SnStyle, measure_overhead
from srn_lab.progress import train_with_bar
from srn_lab.quality import frechet_distance_pca
from srn_lab.runs import config_dict, environment, save_run, write_json
from srn_lab.summary import comparison_table, conversion_table
from srn_lab.train import Gan, History, TrainConfig, build

_LAST = 100  # steps over which final losses are averaged


@dataclass(frozen=True)
class DemoConfig:
    """Sized for about three minutes on two cores. Work is fixed by counts, so runs repeat exactly.

    Against the paper's recipe the learning rate is higher and ``n_dis`` lower, because training
    is far shorter.
    """

    rank_ratio: float = 0.5
    steps: int = 1500
    width: int = 32
    n_dis: int = 2
    learning_rate: float = 1e-3
    seed: int = 0
    num_feat: int = 64
    repeats: int = 15

    def training(self, norm: Norm) -> TrainConfig:
        """The run with ``norm``; everything else is equal for all."""
        return TrainConfig(
            norm=norm,
            rank_ratio=self.rank_ratio if norm is Norm.SRN else 1.0,
            steps=self.steps,
            width=self.width,
            n_dis=self.n_dis,
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
    evaluation: Evaluation

    def to_dict(self) -> dict:
        last = self.history.steps[-_LAST:]
        return {
            "config": config_dict(self.gan.config),
            "median_step_ms": statistics.median(r.step_ms for r in self.history.steps),
            "final_steps_averaged": len(last),
            "final_loss_d_mean": statistics.mean(r.loss_d for r in last),
            "final_loss_g_mean": statistics.mean(r.loss_g for r in last),
            **self.evaluation.to_dict(),
            "srn_active": self._srn_active(),
        }

    def _srn_active(self) -> dict:
        config = self.gan.config
        bounds = stable_rank_bounds(self.evaluation.layers, config.norm, config.rank_ratio)
        records = [active_layers(record.layers, bounds) for record in self.history.spectra]
        return {
            "at_start": records[0],
            "at_end": records[-1],
            "fraction_of_records": {
                layer: sum(layer in active for active in records) / len(records) for layer in bounds
            },
        }


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
    runs: dict[str, _Run] = {}
    with clock.part("total"):
        with clock.part("conversion_and_timing"), console.status("converting and timing"):
            overheads = [measure_overhead(config.conversion(style)) for style in SnStyle]
        for norm in (Norm.SN, Norm.SRN):
            training = config.training(norm)
            with clock.part(f"train_{norm.value}"):
                gan, history = train_with_bar(training, console)
            with clock.part(f"evaluate_{norm.value}"):
                run = _Run(gan, history, evaluate(gan, seed=config.seed))
                runs[label(norm, training.rank_ratio)] = run
        with clock.part("evaluate_scale"):
            scale = _quality_scale(config)
        with clock.part("write"):
            files = _write_pictures(out, runs, overheads)
            for run in runs.values():
                norm = run.gan.config.norm.value
                saved = save_run(out / norm, run.gan, run.history)
                files |= {f"{norm}_{kind}": path for kind, path in saved.items()}
    files["metrics"] = out / "metrics.json"
    document = {
        "environment": environment(),
        "config": asdict(config),
        "wall": clock.parts,
        "conversion": {o.config.style.value: o.to_dict() for o in overheads},
        "frechet_distance_pca_scale": scale,
        "runs": {name: run.to_dict() for name, run in runs.items()},
        "files": {name: str(path.relative_to(out)) for name, path in files.items()},
    }
    write_json(files["metrics"], document)
    console.print(conversion_table(document["conversion"]))
    console.print(comparison_table(document["runs"], scale))
    for name, run in document["runs"].items():
        for when, title in (("at_start", "before training"), ("at_end", "after training")):
            if layers := run["srn_active"][when]:
                console.print(f"{name} bounds {title}: {', '.join(layers)}.")
    console.print(f"Total {clock.parts['total_s']:.0f} s on {document['environment']['cpu']}.")
    return files


def _quality_scale(config: DemoConfig) -> dict[str, float]:
    """The two ends between which a trained generator's distance should lie."""
    real = digits()
    untrained = evaluate(build(config.training(Norm.SN)), kinds=(), seed=config.seed)
    return {
        "between_halves_of_the_real_images": frechet_distance_pca(real[::2], real[1::2]),
        "untrained_generator": untrained.frechet_distance_pca,
    }


def _write_pictures(out: Path, runs: dict[str, _Run], overheads: list[Overhead]) -> dict[str, Path]:
    constrained = runs[list(runs)[-1]]
    config = constrained.gan.config
    bounds = stable_rank_bounds(constrained.evaluation.layers, config.norm, config.rank_ratio)
    images = {"real": digits(), **{name: run.evaluation.samples for name, run in runs.items()}}
    histories = {name: run.history for name, run in runs.items()}
    histograms = {name: run.evaluation.elhist for name, run in runs.items()}
    return {
        "samples": plots.plot_samples(out / "samples.png", images),
        "elhist": plots.plot_elhist(out / "elhist.png", histograms),
        "stable_rank": plots.plot_stable_ranks(
            out / "stable_rank.png", histories, bounds, bounded=list(runs)[-1]
        ),
        "overhead": plots.plot_overhead(out / "overhead.png", overheads),
    }
