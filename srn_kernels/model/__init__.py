"""What holds normalised weights in a model: wrapping, rounds, u and v that fit, checkpoints."""
