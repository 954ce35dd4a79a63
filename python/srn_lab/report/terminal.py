"""The tables that the commands print, from the same dictionaries that they write as JSON."""

from __future__ import annotations

from rich.table import Table

from srn_lab.measures.elhist import PairKind


def conversion_table(conversions: dict[str, dict]) -> Table:
    """Timings of ``Overhead.to_dict`` results by torch style: whole model and weights alone."""
    first = next(iter(conversions.values()))
    title = f"One convert_spectral_norm call over {first['normalised_layers']} layers"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("torch's form")
    table.add_column("forward + backward of")
    for heading in ("torch, ms", "converted, ms", "ratio"):
        table.add_column(heading, justify="right")
    for style, found in conversions.items():
        for what, key, ratio in (
            ("the whole model", "step", "step_torch_over_converted"),
            ("its normalisations", "normalisation_alone", "normalisation_torch_over_converted"),
        ):
            times = [f"{found[key][name]['median_ms']:.2f}" for name in ("torch", "converted")]
            table.add_row(style, what, *times, f"{found[ratio]['median_ratio']:.2f}")
    worst = max(found["max_abs_output_difference"] for found in conversions.values())
    largest = max(found["max_abs_output"] for found in conversions.values())
    table.caption = (
        f"Evaluation outputs differ by at most {worst:.1e}; the largest is {largest:.2g}."
    )
    return table


def comparison_table(runs: dict[str, dict], quality_scale: dict[str, float], data: str) -> Table:
    """The runs side by side, one row a measurement."""
    table = Table(title=f"GANs on {data}", title_justify="left", caption_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")

    def row(title: str, value, form: str) -> None:
        table.add_row(title, *(format(value(run), form) for run in runs.values()))

    row("Frechet distance (PCA of pixels)", lambda r: r["frechet_distance_pca"], ".3f")
    for kind in PairKind:
        title = f"eLhist 95th percentile, {kind.value}"
        row(title, lambda r, k=kind: r["elhist"][k.value]["percentile_95_slope"], ".3f")
    row("mean stable rank of the layers of rank above 1", _mean_stable_rank, ".2f")
    row("layers that SRN bounds at the start", lambda r: len(r["srn_active"]["at_start"]), "d")
    row("layers that SRN bounds at the end", lambda r: len(r["srn_active"]["at_end"]), "d")
    row("median ms per generator step", lambda r: r["median_step_ms"], ".1f")
    table.caption = (
        "Frechet distance between two halves of the real images "
        f"{quality_scale['between_halves_of_the_real_images']:.3f}, "
        f"of an untrained generator {quality_scale['untrained_generator']:.3f}."
    )
    return table


def _mean_stable_rank(run: dict) -> float:
    ranks = [r["stable_rank"] for r in run["layers"] if min(r["rows"], r["columns"]) > 1]
    return sum(ranks) / len(ranks)
