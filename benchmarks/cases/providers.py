"""Every provider by name, in the order of the tables: floors, peers, then ours."""

from benchmarks.cases import peers  # isort: skip  # their declarations, in this order
from benchmarks.cases import ours
from benchmarks.cases.runner import KERNELS, MODES, PROVIDERS, Provider, Runner

__all__ = ["KERNELS", "MODES", "PROVIDERS", "Provider", "Runner", "ours", "peers"]
