"""What normalisation does to a model, or did to a checkpoint: tables and curves."""

from srn_kernels.tools.report.history import History
from srn_kernels.tools.report.layers import report
from srn_kernels.tools.report.table import LayerReport, Report

__all__ = ["History", "LayerReport", "Report", "report"]
