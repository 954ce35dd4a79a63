"""The commands of ``python -m srn_lab``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from srn_lab import plots
from srn_lab.demo import DemoConfig, run_demo
from srn_lab.elhist import PAIRS, PairKind
from srn_lab.evaluate import Evaluation, evaluate
from srn_lab.networks import RESOLUTIONS
from srn_lab.normalisation import Norm, label
from srn_lab.overhead import OverheadConfig, SnStyle, measure_overhead
from srn_lab.progress import train_with_bar
from srn_lab.runs import CheckpointError, environment, load_run, save_run, write_json
from srn_lab.summary import conversion_table
from srn_lab.train import TrainConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Spectral and stable rank normalisation in GANs: train, compare, time.",
)


def _rank_ratio(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"must be above 0 and at most 1, got {value}")
    return value


def _resolution(value: int) -> int:
    if value not in RESOLUTIONS:
        raise typer.BadParameter(f"must be one of {', '.join(map(str, RESOLUTIONS))}, got {value}")
    return value


def _learning_rate(value: float) -> float:
    if not value > 0:
        raise typer.BadParameter(f"must be above 0, got {value}")
    return value


def _multiple_of_8(value: int) -> int:
    if value < 8 or value % 8:
        raise typer.BadParameter(f"must be a positive multiple of 8, got {value}")
    return value


def _out_folder(value: Path) -> Path:
    if value.exists() and not value.is_dir():
        raise typer.BadParameter(f"{value} exists and is not a folder")
    return value


_RankRatio = Annotated[
    float,
    typer.Option(
        callback=_rank_ratio, help="Stable-rank bound over min(rows, columns), in (0, 1]; srn only."
    ),
]
_LearningRate = Annotated[
    float, typer.Option(callback=_learning_rate, help="Adam's, decayed linearly to 0.")
]
_Steps = Annotated[int, typer.Option(min=1, help="Generator updates.")]
_Width = Annotated[int, typer.Option(min=1, help="Feature maps of both networks.")]
_NDis = Annotated[int, typer.Option(min=1, help="Discriminator updates per generator update.")]
_Seed = Annotated[int, typer.Option(min=0, help="Seed of weights, batches, latents and pairs.")]
_NumFeat = Annotated[int, typer.Option(min=1, help="Base feature maps of the U-Net.")]
_Repeats = Annotated[int, typer.Option(min=1, help="Timed rounds.")]
_Out = Annotated[Path, typer.Option(callback=_out_folder, help="Folder for the results.")]


@app.command()
def demo(
    out: _Out = Path("out"),
    rank_ratio: _RankRatio = DemoConfig.rank_ratio,
    steps: _Steps = DemoConfig.steps,
    width: _Width = DemoConfig.width,
    n_dis: _NDis = DemoConfig.n_dis,
    learning_rate: _LearningRate = DemoConfig.learning_rate,
    seed: _Seed = DemoConfig.seed,
    num_feat: _NumFeat = DemoConfig.num_feat,
    repeats: _Repeats = DemoConfig.repeats,
) -> None:
    """Convert and time a model, train an SN-GAN and an SRN-GAN, draw and print the comparison."""
    console = Console()
    config = DemoConfig(
        rank_ratio=rank_ratio,
        steps=steps,
        width=width,
        n_dis=n_dis,
        learning_rate=learning_rate,
        seed=seed,
        num_feat=num_feat,
        repeats=repeats,
    )
    _print_paths(run_demo(config, out, console), console)


@app.command()
def train(
    out: _Out = Path("out/train"),
    norm: Annotated[
        Norm, typer.Option(help="Normalisation of the discriminator.")
    ] = TrainConfig.norm,
    rank_ratio: _RankRatio = TrainConfig.rank_ratio,
    steps: _Steps = TrainConfig.steps,
    n_dis: _NDis = TrainConfig.n_dis,
    batch_size: Annotated[int, typer.Option(min=2, max=1797)] = TrainConfig.batch_size,
    learning_rate: _LearningRate = TrainConfig.learning_rate,
    resolution: Annotated[
        int, typer.Option(callback=_resolution, help="Side in pixels: 8, 16 or 32.")
    ] = TrainConfig.resolution,
    width: _Width = TrainConfig.width,
    latent: Annotated[int, typer.Option(min=1, help="Latent dimensions.")] = TrainConfig.latent,
    seed: _Seed = TrainConfig.seed,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = TrainConfig.threads,
    spectra_every: Annotated[
        int, typer.Option(min=1, help="Generator updates between two records of the spectra.")
    ] = TrainConfig.spectra_every,
    shared_round: Annotated[
        bool,
        typer.Option(help="One power iteration for D(real) and D(fake) of a step, or one each."),
    ] = TrainConfig.shared_round,
) -> None:
    """Train one GAN; save checkpoint, history and a grid of samples."""
    console = Console()
    config = TrainConfig(
        norm=norm,
        rank_ratio=rank_ratio,
        steps=steps,
        n_dis=n_dis,
        batch_size=batch_size,
        learning_rate=learning_rate,
        resolution=resolution,
        width=width,
        latent=latent,
        seed=seed,
        threads=threads,
        spectra_every=spectra_every,
        shared_round=shared_round,
    )
    gan, history = train_with_bar(config, console)
    files = save_run(out, gan, history)
    images = {label(norm, rank_ratio): evaluate(gan, kinds=(), seed=seed).samples}
    files["samples"] = plots.plot_samples(out / "samples.png", images)
    _print_paths(files, console)


@app.command()
def elhist(
    checkpoints: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="Files that train wrote.")
    ],
    out: _Out = Path("out/elhist"),
    pairs: Annotated[int, typer.Option(min=1, help="Pairs per histogram.")] = PAIRS,
    kind: Annotated[
        list[PairKind] | None, typer.Option(help="Kind of pairs, may be repeated. [default: all]")
    ] = None,
    seed: _Seed = 0,
) -> None:
    """Compare the empirical Lipschitz histograms of trained discriminators."""
    kinds = kind or list(PairKind)
    found: dict[str, Evaluation] = {}
    resolutions = set()
    for path in checkpoints:
        try:
            gan = load_run(path)
        except CheckpointError as error:
            raise typer.BadParameter(str(error), param_hint="CHECKPOINTS") from error
        resolutions.add(gan.config.resolution)
        name = label(gan.config.norm, gan.config.rank_ratio)
        name = f"{name} ({path})" if name in found else name
        found[name] = evaluate(gan, pairs=pairs, kinds=kinds, seed=seed)
    if len(resolutions) > 1:
        message = f"slopes at different resolutions do not compare: {sorted(resolutions)}"
        raise typer.BadParameter(message, param_hint="CHECKPOINTS")
    document = {
        "environment": environment(),
        "runs": {name: evaluation.to_dict() for name, evaluation in found.items()},
    }
    histograms = {name: evaluation.elhist for name, evaluation in found.items()}
    files = {"elhist": plots.plot_elhist(out / "elhist.png", histograms)}
    files["metrics"] = write_json(out / "elhist.json", document)
    _print_paths(files, Console())


@app.command()
def overhead(
    out: _Out = Path("out/overhead"),
    style: Annotated[
        list[SnStyle] | None, typer.Option(help="torch's form, may be repeated. [default: both]")
    ] = None,
    num_feat: _NumFeat = OverheadConfig.num_feat,
    size: Annotated[
        int, typer.Option(callback=_multiple_of_8, help="Side of the images, a multiple of 8.")
    ] = OverheadConfig.size,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = OverheadConfig.batch,
    repeats: _Repeats = OverheadConfig.repeats,
    seed: _Seed = OverheadConfig.seed,
) -> None:
    """Convert a spectrally normalised U-Net discriminator in one call and time both forms."""
    console = Console()
    results = [
        measure_overhead(
            OverheadConfig(
                style=chosen,
                num_feat=num_feat,
                size=size,
                batch=batch,
                repeats=repeats,
                seed=seed,
            )
        )
        for chosen in style or list(SnStyle)
    ]
    conversions = {result.config.style.value: result.to_dict() for result in results}
    console.print(conversion_table(conversions))
    files = {"overhead": plots.plot_overhead(out / "overhead.png", results)}
    document = {"environment": environment(), "conversion": conversions}
    files["metrics"] = write_json(out / "overhead.json", document)
    _print_paths(files, console)


def _print_paths(files: dict[str, Path], console: Console) -> None:
    for name, path in files.items():
        console.print(f"{name:>16}  {path}", highlight=False, soft_wrap=True)
