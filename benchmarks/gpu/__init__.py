"""What a GPU machine can tell: a plan in stages, its measurements, and a prediction of traffic."""
