"""Spectral and stable-rank normalisation of every weight of a model in one fused call.

Source: Sanyal, Torr, Dokania, "Stable Rank Normalization for Improved Generalization in Neural
Networks and GANs" (arXiv 1906.04659).
"""

from srn_kernels import functional, linalg, moved, reference
from srn_kernels.backends import available_backends, use_backend
from srn_kernels.backends.cpu import empty_cache
from srn_kernels.core.autograd import StableRankNormFunction
from srn_kernels.maths.rule import Rule
from srn_kernels.maths.rules import register_rule
from srn_kernels.model.root import shared_round
from srn_kernels.model.settings import Options
from srn_kernels.model.wrap import (
    apply_stable_rank_norm,
    export,
    fuse,
    is_normalized,
    normalized_weight,
    refresh,
    remove_stable_rank_norm,
    set_rank_ratio,
    skipped,
    spectral_norm,
    stable_rank_norm,
)
from srn_kernels.tools.checkpoint import to_torch_state_dict
from srn_kernels.tools.convert import convert_spectral_norm
from srn_kernels.tools.operator_norm import operator_norm
from srn_kernels.tools.parametrization import StableRankNorm
from srn_kernels.tools.plots import plot_spectrum
from srn_kernels.tools.projection import Projection, project_after_step
from srn_kernels.tools.report import History, Report, report

__version__ = "0.2.0"

moved.install()

__all__ = [
    "History",
    "Options",
    "Projection",
    "Report",
    "Rule",
    "StableRankNorm",
    "StableRankNormFunction",
    "apply_stable_rank_norm",
    "available_backends",
    "convert_spectral_norm",
    "empty_cache",
    "export",
    "functional",
    "fuse",
    "is_normalized",
    "linalg",
    "normalized_weight",
    "operator_norm",
    "plot_spectrum",
    "project_after_step",
    "reference",
    "refresh",
    "register_rule",
    "remove_stable_rank_norm",
    "report",
    "set_rank_ratio",
    "shared_round",
    "skipped",
    "spectral_norm",
    "stable_rank_norm",
    "to_torch_state_dict",
    "use_backend",
]
