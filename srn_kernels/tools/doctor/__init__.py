"""What a model would gain from this library, and the lines to add: ``srn_kernels.doctor``."""
