"""The commands of ``python -m srn_lab``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from srn_lab.cli import options
from srn_lab.cli.demo import DemoConfig, run_demo
from srn_lab.cli.options import one_clear_error, print_paths
from srn_lab.cli.paper import paper, publish
from srn_lab.cli.progress import train_with_bar
from srn_lab.data import NAMES, DataSpec, load
from srn_lab.data.pictures import sample_grid
from srn_lab.files import write_json
from srn_lab.machine import environment
from srn_lab.measures import PairKind
from srn_lab.measures.elhist import PAIRS
from srn_lab.measures.evaluate import Evaluation, evaluate
from srn_lab.methods import Loss, Method, Norm
from srn_lab.report import plots
from srn_lab.report.terminal import conversion_table
from srn_lab.timing.overhead import OverheadConfig, SnStyle, measure_overhead
from srn_lab.training.config import GanConfig
from srn_lab.training.runs import load_run, save_run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="The experiments of Stable Rank Normalization: remake, train, measure, time.",
)
app.command()(paper)
app.command()(publish)


@app.command()
def demo(
    out: options.Out = Path("out"),
    rank_ratio: options.RankRatio = DemoConfig.rank_ratio,
    steps: options.Steps = DemoConfig.steps,
    width: options.Width = DemoConfig.width,
    n_dis: options.NDis = DemoConfig.n_dis,
    learning_rate: options.LearningRate = DemoConfig.learning_rate,
    seed: options.Seed = DemoConfig.seed,
    num_feat: options.NumFeat = DemoConfig.num_feat,
    repeats: options.Repeats = DemoConfig.repeats,
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
    with one_clear_error():
        print_paths(run_demo(config, out, console), console)


@app.command()
def train(
    out: options.Out = Path("out/train"),
    data: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "mnist5k",
    root: Annotated[str, typer.Option(help="Folder of the files of a data set.")] = "data",
    download: Annotated[bool, typer.Option(help="Fetch what is missing, where possible.")] = False,
    resolution: Annotated[int, typer.Option(help="Side in pixels: 8, 16, 32 or 64.")] = 16,
    method: Annotated[Norm, typer.Option(help="What is done to the discriminator.")] = Norm.SRN,
    rank_ratio: Annotated[float, typer.Option("--rank-ratio", "--c", help="c; srn only.")] = 0.5,
    preserve: Annotated[int, typer.Option(help="Theorem 1's k; srn only.")] = 1,
    loss: Annotated[Loss, typer.Option(help="Loss of both networks.")] = Loss.HINGE,
    conditional: Annotated[bool, typer.Option(help="Both networks see the classes.")] = False,
    steps: options.Steps = 1000,
    n_dis: options.NDis = 2,
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    learning_rate: options.LearningRate = 1e-3,
    width: options.Width = 16,
    latent: Annotated[int, typer.Option(min=1, help="Latent dimensions.")] = 64,
    ema: Annotated[float, typer.Option(help="Decay of an averaged generator; 0: none.")] = 0.0,
    seed: options.Seed = 0,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 1,
    spectra_every: Annotated[
        int, typer.Option(min=1, help="Generator updates between two records of the spectra.")
    ] = 100,
    samples_every: Annotated[
        int, typer.Option(min=0, help="Generator updates between two grids of samples; 0: none.")
    ] = 0,
    save_every: Annotated[
        int, typer.Option(min=0, help="Generator updates between two states; 0: once a minute.")
    ] = 0,
    mixed_precision: Annotated[str, typer.Option(help="no, fp16 or bf16.")] = "no",
    log: Annotated[bool, typer.Option(help="TensorBoard logs under OUT/logs.")] = False,
    cpu: Annotated[bool, typer.Option(help="Leave a GPU alone.")] = False,
) -> None:
    """Train one GAN, or take up one that was interrupted; save networks, history and samples.

    Started by ``accelerate launch -m srn_lab train`` it runs on several processes.
    """
    console = Console()
    with one_clear_error():
        chosen = Method(method, rank_ratio, preserve) if method is Norm.SRN else Method(method)
        config = GanConfig(
            data=DataSpec(data, resolution, root),
            method=chosen,
            conditional=conditional,
            loss=loss,
            steps=steps,
            n_dis=n_dis,
            batch_size=batch_size,
            learning_rate=learning_rate,
            width_d=width,
            width_g=width,
            latent=latent,
            ema=ema,
            spectra_every=spectra_every,
            mixed_precision=mixed_precision,
            seed=seed,
            threads=threads,
        )
        trainer = train_with_bar(
            config,
            console,
            folder=out,
            on_samples=lambda step, x: sample_grid(out / f"samples-{step:06d}.png", x),
            samples_every=samples_every,
            save_every=save_every,
            track=log,
            cpu=cpu,
            download=download,
        )
        if not trainer.engine.is_main_process:
            return
        files = save_run(out, trainer.evaluated, trainer.history)
        images, _ = trainer.evaluated.sample(64, _random(seed))
        files["samples"] = plots.plot_samples(out / "samples.png", {config.label: images})
    print_paths(files, console)


@app.command()
def elhist(
    checkpoints: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="Files that train wrote.")
    ],
    out: options.Out = Path("out/elhist"),
    pairs: Annotated[int, typer.Option(min=1, help="Pairs per histogram.")] = PAIRS,
    kind: Annotated[
        list[PairKind] | None, typer.Option(help="Kind of pairs, may be repeated. [default: all]")
    ] = None,
    seed: options.Seed = 0,
) -> None:
    """Compare the empirical Lipschitz histograms of trained discriminators without classes."""
    kinds = kind or list(PairKind)
    found: dict[str, Evaluation] = {}
    data = set()
    with one_clear_error():
        for path in checkpoints:
            gan = load_run(path)
            if gan.config.conditional:
                raise ValueError(f"{path}: its discriminator needs classes, which pairs have not")
            data.add((gan.config.data.name, gan.config.data.resolution))
            name = gan.config.label
            name = f"{name} ({path})" if name in found else name
            real = load(gan.config.data).images
            fake, _ = gan.sample(len(real), _random(seed))
            found[name] = evaluate(
                gan.discriminator, real, fake, pairs=pairs, kinds=kinds, seed=seed
            )
        if len(data) > 1:
            raise ValueError(f"slopes on different images do not compare: {sorted(data)}")
    document = {
        "environment": environment(),
        "runs": {name: evaluation.to_dict() for name, evaluation in found.items()},
    }
    histograms = {name: evaluation.elhist for name, evaluation in found.items()}
    files = {"elhist": plots.plot_elhist(out / "elhist.png", histograms)}
    files["metrics"] = write_json(out / "elhist.json", document)
    print_paths(files, Console())


@app.command()
def overhead(
    out: options.Out = Path("out/overhead"),
    style: Annotated[
        list[SnStyle] | None, typer.Option(help="torch's form, may be repeated. [default: both]")
    ] = None,
    num_feat: options.NumFeat = OverheadConfig.num_feat,
    size: options.Size = OverheadConfig.size,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = OverheadConfig.batch,
    repeats: options.Repeats = OverheadConfig.repeats,
    seed: options.Seed = OverheadConfig.seed,
) -> None:
    """Convert a spectrally normalised U-Net discriminator in one call and time both forms."""
    console = Console()
    results = [
        measure_overhead(
            OverheadConfig(
                style=chosen, num_feat=num_feat, size=size, batch=batch, repeats=repeats, seed=seed
            )
        )
        for chosen in style or list(SnStyle)
    ]
    conversions = {result.config.style.value: result.to_dict() for result in results}
    console.print(conversion_table(conversions))
    files = {"overhead": plots.plot_overhead(out / "overhead.png", results)}
    document = {"environment": environment(), "conversion": conversions}
    files["metrics"] = write_json(out / "overhead.json", document)
    print_paths(files, console)


def _random(seed: int):
    import torch

    return torch.Generator().manual_seed(seed)
