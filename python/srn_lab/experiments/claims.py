"""The paper's sentences that an experiment can test, each a named function over stored rows.

Longer than other files because the sentences are one list, in the paper's order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from srn_lab.experiments.catalogue import RATIOS
from srn_lab.experiments.results import At, Results, Values
from srn_lab.experiments.statistics import LEAST_SEEDS
from srn_lab.experiments.verdicts import Claim, Verdict, judge


def verdicts(results: Results) -> list[Verdict]:
    """All claims of the experiments in ``results``."""
    names = {experiment.name for experiment in results.experiments}
    return [judge(claim, results) for claim in CLAIMS if claim.experiment in names]


def _paired(first: Values, second: Values) -> Values:
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


def _less(low: str, high: str, get: Callable) -> Callable[[Results], Values]:
    """high - low: above 0 where ``low`` has the smaller number."""
    return lambda results: _paired(results.values(high, get), results.values(low, get))


def _trend(get: Callable) -> Callable[[Results], Values]:
    """Least-squares slope of a number against c, by seed."""

    def numbers(results: Results) -> Values:
        columns = [results.values(f"gan/first/SRN-{100 * c:g}", get) for c in RATIOS]
        seeds = set.intersection(*(set(column) for column in columns))
        return {
            seed: statistics.linear_regression(RATIOS, [column[seed] for column in columns]).slope
            for seed in sorted(seeds)
        }

    return numbers


def _p95(kind: str) -> At:
    return At("elhist", kind, "percentile_95_slope")


def _collapse(results: Results) -> Values:
    """log of how many times half SN's percentile exceeds that of c = 0.1."""
    sn, low = (results.values(f"gan/first/{n}", _p95("real-fake")) for n in ("SN", "SRN-10"))
    return {s: math.log(sn[s] / 2 / low[s]) for s in sorted(sn.keys() & low.keys()) if low[s] > 0}


def _relative(first: str, second: str, get: Callable) -> Callable[[Results], Values]:
    def numbers(results: Results) -> Values:
        a, b = results.values(first, get), results.values(second, get)
        return {seed: a[seed] / b[seed] - 1 for seed in sorted(a.keys() & b.keys())}

    return numbers


def _spread(slot: str, get: Callable) -> Callable[[Results], float | None]:
    """Twice the deviation over the seeds of a slot."""

    def margin(results: Results) -> float | None:
        values = list(results.values(slot, get).values())
        return 2 * statistics.stdev(values) if len(values) >= LEAST_SEEDS else None

    return margin


def _fixed(margin: float) -> Callable[[Results], float]:
    return lambda results: margin


def _linear(results: Results) -> Values:
    """Slope against c of the mean empirical Lipschitz constant, relative to its value at c = 1."""

    def slope(result: dict) -> float:
        found = result["ratios"]
        full = next(r["mean_slope"] for r in found if r["c"] == 1)
        pairs = [(r["c"], r["mean_slope"] / full) for r in found]
        return statistics.linear_regression(*zip(*pairs, strict=True)).slope

    return results.values("linear", slope)


def _linear_bound(results: Results) -> Values:
    def worst(result: dict) -> float:
        return max(abs(r["product_of_norms"] - 1) for r in result["ratios"])

    return results.values("linear", worst)


def _identity(first: str, second: str) -> Callable[[Results], Values]:
    def gap(result: dict) -> float:
        return result[second]["distance"] - result[first]["distance"]

    return lambda results: results.values("identity", gap)


def _identity_error(results: Results) -> Values:
    """Largest deviation of the three distances from their closed forms."""
    root = math.sqrt(2)
    exact = {"rank minimisation": 1.0, "SRN, k = 1": root - 1, "SRN, k = 0": (root - 1) / root}

    def worst(result: dict) -> float:
        return max(abs(result[name]["distance"] - value) for name, value in exact.items())

    return results.values("identity", worst)


def _cls(task: str, label: str, network: str | None = None, role: str = "first") -> str:
    return f"classifier/{role}/{task}/{network or '*'}/{label}"


def _on_first_network(claim: Callable[[str], Callable]) -> Callable[[Results], Values]:
    """Fills in the preset's first network, which Table 1 and Figure 1 are about."""
    return lambda results: claim(results.preset.networks[0])(results)


def _gap_claim(low: str, high: str, get: Callable, task: str = "CLS", role: str = "first"):
    return _on_first_network(
        lambda net: _less(_cls(task, low, net, role), _cls(task, high, net, role), get)
    )


_FID, _IS, _ND = At("scores", "fid"), At("scores", "inception_score"), At("divergence")
_REAL_FAKE = _p95("real-fake")
_P95_IS = "difference of eLhist's 95th percentiles"


def _gan(label: str, role: str = "first") -> str:
    return f"gan/{role}/{label}"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "identity_distances_exact",
        "example_a2",
        "Appendix A.2",
        "At stable rank 2 the identity lies at 1, sqrt 2 - 1 and (sqrt 2 - 1)/sqrt 2 from its "
        "rank-2, k = 1 and k = 0 solutions.",
        "largest deviation from the closed forms",
        _identity_error,
        _fixed(1e-6),
    ),
    Claim(
        "srn_nearer_than_rank_minimisation",
        "example_a2",
        "Appendix A.2",
        "SRN with k = 1 stays nearer to the identity than rank minimisation does.",
        "difference of distances",
        _identity("SRN, k = 1", "rank minimisation"),
    ),
    Claim(
        "k0_nearer_than_k1",
        "example_a2",
        "Theorem 1, Appendix A.2",
        "Without preserving the spectral norm (k = 0) the solution is nearer still.",
        "difference of distances",
        _identity("SRN, k = 0", "SRN, k = 1"),
    ),
    Claim(
        "linear_lipschitz_falls_with_rank",
        "linear",
        "Section 3",
        "At equal spectral norms a lower rank makes the empirical Lipschitz constant smaller.",
        "slope of the mean empirical Lipschitz constant against c, 1 at c = 1",
        _linear,
    ),
    Claim(
        "linear_bound_stays",
        "linear",
        "Section 3",
        "The product of the spectral norms does not see the difference.",
        "largest deviation of the product from 1",
        _linear_bound,
        _fixed(1e-6),
    ),
    Claim(
        "elhist_falls_with_c",
        "fig2a",
        "Section 4.2, Figure 2 (a)",
        "The lower c, the smaller eLhist's 95th percentile.",
        "slope of the percentile against c = 0.1 ... 0.9",
        _trend(_REAL_FAKE),
    ),
    Claim(
        "elhist_falls_with_c_real_real",
        "fig2a",
        "Section 4.2, Figures 6 (b), 7 (b)",
        "The trend holds for pairs of real images.",
        "slope of the percentile against c = 0.1 ... 0.9",
        _trend(_p95("real-real")),
    ),
    Claim(
        "elhist_falls_with_c_fake_fake",
        "fig2a",
        "Section 4.2, Figures 6 (b), 7 (b)",
        "The trend holds for pairs of generated images.",
        "slope of the percentile against c = 0.1 ... 0.9",
        _trend(_p95("fake-fake")),
    ),
    Claim(
        "extreme_c_collapses_elhist",
        "fig2a",
        "Section 4.2, Figure 2 (a)",
        "At an extreme c (0.1) the histogram collapses towards 0; taken as below half of SN's.",
        "log of half SN's percentile over that at c = 0.1",
        _collapse,
    ),
    Claim(
        "extreme_c_costs_quality",
        "fig2a",
        "Section 4.2, Figure 2 (a)",
        "At an extreme c (0.1) the samples are worse than at a moderate one (0.5).",
        "difference of FIDs",
        _less(_gan("SRN-50"), _gan("SRN-10"), _FID),
    ),
    Claim(
        "srn_at_one_equals_sn",
        "fig2a",
        "Section 4",
        "At c = 1 SRN is SN.",
        "relative difference of eLhist's 95th percentiles",
        _relative(_gan("SRN-100"), _gan("SN"), _REAL_FAKE),
        _fixed(1e-3),
    ),
    Claim(
        "srn_below_sn_elhist",
        "fig2b",
        "Section 4.2, Figure 2 (b)",
        "SRN's histogram (c = 0.5) lies below SN's.",
        _P95_IS,
        _less(_gan("SRN-50"), _gan("SN"), _REAL_FAKE),
    ),
    Claim(
        "srn_above_random_elhist",
        "fig2b",
        "Section 4.2, Figure 2 (b)",
        "SRN's histogram lies above that of an untrained GAN.",
        _P95_IS,
        _less(_gan("Random"), _gan("SRN-50"), _REAL_FAKE),
    ),
    Claim(
        "srn_above_wgan_gp_elhist",
        "fig2b",
        "Section 4.2, Figure 2 (b)",
        "SRN's histogram lies above WGAN-GP's.",
        _P95_IS,
        _less(_gan("WGAN-GP"), _gan("SRN-50"), _REAL_FAKE),
    ),
    Claim(
        "wgan_gp_below_random_elhist",
        "fig2b",
        "Section 4.2, Figure 2 (b)",
        "WGAN-GP's histogram lies below even that of an untrained GAN.",
        _P95_IS,
        _less(_gan("WGAN-GP"), _gan("Random"), _REAL_FAKE),
    ),
    Claim(
        "srn_below_sn_elhist_conditional",
        "fig6",
        "Section 4.2, Figure 6",
        "With classes, SRN's histogram (c = 0.5) lies below SN's too.",
        _P95_IS,
        _less(_gan("cond. SRN-50"), _gan("cond. SN"), _REAL_FAKE),
    ),
    Claim(
        "srn_below_sn_elhist_second",
        "fig7",
        "Section 4.2, Figure 7",
        "SRN's histogram (c = 0.5) lies below SN's on the second data set too.",
        _P95_IS,
        _less(_gan("SRN-50", "second"), _gan("SN", "second"), _REAL_FAKE),
    ),
    Claim(
        "fid_better_than_sn",
        "table2",
        "Section 4.2, Table 2",
        "SRN-70 reaches a better FID than SN.",
        "difference of FIDs",
        _less(_gan("SRN-70"), _gan("SN"), _FID),
    ),
    Claim(
        "is_better_than_sn",
        "table2",
        "Section 4.2, Table 2",
        "SRN-70 reaches a better inception score than SN.",
        "difference of inception scores",
        _less(_gan("SN"), _gan("SRN-70"), _IS),
    ),
    Claim(
        "fid_better_than_sn_conditional",
        "table2",
        "Section 4.2, Table 2",
        "With classes, SRN-70 reaches a better FID than SN.",
        "difference of FIDs",
        _less(_gan("cond. SRN-70"), _gan("cond. SN"), _FID),
    ),
    Claim(
        "intra_fid_better_than_sn",
        "table2",
        "Section 4.2, Table 2",
        "With classes, SRN-70 reaches a better Intra-FID than SN.",
        "difference of Intra-FIDs",
        _less(_gan("cond. SRN-70"), _gan("cond. SN"), At("scores", "intra_fid")),
    ),
    Claim(
        "fid_better_than_sn_second",
        "table3",
        "Section 4.2, Table 3",
        "SRN-70 reaches a better FID than SN on the second data set.",
        "difference of FIDs",
        _less(_gan("SRN-70", "second"), _gan("SN", "second"), _FID),
    ),
    Claim(
        "divergence_better_than_sn",
        "table4",
        "Section 4.2, Table 4",
        "A fresh critic separates SRN-70's images from real ones less well than SN's.",
        "difference of the critic's losses",
        _less(_gan("SN"), _gan("SRN-70"), _ND),
    ),
    Claim(
        "divergence_better_than_sn_second",
        "table4",
        "Section 4.2, Table 4",
        "A fresh critic separates SRN-70's images less well on the second data set too.",
        "difference of the critic's losses",
        _less(_gan("SN", "second"), _gan("SRN-70", "second"), _ND),
    ),
    Claim(
        "jacobian_below_sn_real",
        "fig9",
        "Section 4.2, Figure 9",
        "D's gradients at real images are smaller under SRN (c = 0.5) than under SN.",
        "difference of mean gradient norms",
        _less(_gan("SRN-50"), _gan("SN"), At("jacobian", "real", "mean")),
    ),
    Claim(
        "jacobian_below_sn_fake",
        "fig9",
        "Section 4.2, Figure 9",
        "D's gradients at generated images are smaller under SRN (c = 0.5) than under SN.",
        "difference of mean gradient norms",
        _less(_gan("SRN-50"), _gan("SN"), At("jacobian", "fake", "mean")),
    ),
    Claim(
        "jacobian_below_sn_conditional",
        "fig10",
        "Section 4.2, Figure 10",
        "With classes, D's gradients at real images are smaller under SRN (c = 0.5) than under SN.",
        "difference of mean gradient norms at real images",
        _less(_gan("cond. SRN-50"), _gan("cond. SN"), At("jacobian", "real", "mean")),
    ),
    Claim(
        "loss_steadier_than_sn",
        "fig11",
        "Appendix E.3, Figure 11",
        "D's loss is steadier under SRN (c = 0.5) than under SN.",
        "difference of deviations about the moving average",
        _less(_gan("SRN-50"), _gan("SN"), At("roughness")),
    ),
    Claim(
        "gap_smaller_than_vanilla",
        "table1",
        "Section 4.1, Table 1",
        "The generalisation gap is smaller at low c (SRN-30) than without normalisation.",
        "difference of accuracy gaps",
        _gap_claim("SRN-30", "Vanilla", At("gap_accuracy")),
    ),
    Claim(
        "gap_smaller_than_sn",
        "table1",
        "Section 4.1, Table 1",
        "The generalisation gap is smaller at low c (SRN-30) than under SN.",
        "difference of accuracy gaps",
        _gap_claim("SRN-30", "SN", At("gap_accuracy")),
    ),
    Claim(
        "test_accuracy_kept",
        "table1",
        "Section 4.1, Table 1",
        "Test performance is about the same as without normalisation (SRN-50, within 2 points).",
        "difference of test accuracies",
        _gap_claim("Vanilla", "SRN-50", At("test_accuracy")),
        _fixed(0.02),
    ),
    Claim(
        "loss_gap_smaller_than_sn",
        "fig1a",
        "Section 4.1, Figure 1 (a)",
        "The gap of the loss is smaller at low c (SRN-30) than under SN.",
        "difference of loss gaps",
        _gap_claim("SRN-30", "SN", At("gap_loss")),
    ),
    Claim(
        "random_labels_fitted_less_than_vanilla",
        "fig1b",
        "Section 4.1, Figure 1 (b)",
        "SRN-30 fits shuffled labels less than a network without normalisation.",
        "difference of train accuracies",
        _gap_claim("SRN-30", "Vanilla", At("train_accuracy"), "RAND"),
    ),
    Claim(
        "random_labels_fitted_less_than_sn",
        "fig1b",
        "Section 4.1, Figure 1 (b)",
        "SRN-30 fits shuffled labels less than SN.",
        "difference of train accuracies",
        _gap_claim("SRN-30", "SN", At("train_accuracy"), "RAND"),
    ),
    Claim(
        "random_labels_fitted_less_than_sn_second",
        "fig1c",
        "Section 4.1, Figure 1 (c)",
        "SRN-30 fits shuffled labels less than SN on the second data set too.",
        "difference of train accuracies",
        _gap_claim("SRN-30", "SN", At("train_accuracy"), "RAND", "second"),
    ),
    *(
        Claim(
            f"{name}_lower",
            "measures",
            "ICLR version, Section 4",
            f"{title} is lower under SRN-30 than without normalisation.",
            "difference of median logarithms",
            _gap_claim("SRN-30", "Vanilla", At("complexity", f"log_{name}")),
        )
        for name, title in (
            ("spec_fro", "Spec-Fro"),
            ("spec_l1", "Spec-L1"),
            ("jac_norm", "Jac-Norm"),
        )
    ),
    Claim(
        "conversion_keeps_fid",
        "conversion",
        "this library's, not the paper's",
        "A GAN converted from torch's SN half way ends like one that stays, within the spread of "
        "seeds.",
        "difference of FIDs; the margin is twice the deviation over seeds",
        _less(_gan("SN (torch)"), _gan("SN (torch), converted half way"), _FID),
        _spread(_gan("SN (torch)"), _FID),
    ),
)
