"""One fused call over lists of tensors: checks, plans, ops and the autograd node."""
