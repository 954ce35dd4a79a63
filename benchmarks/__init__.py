"""The benchmark suite of srn_kernels: ``python -m benchmarks --help``."""
