"""What is compared: normalisations of a network's weights, penalties, losses."""

from srn_lab.methods.losses import Loss
from srn_lab.methods.method import Method, Norm

__all__ = ["Loss", "Method", "Norm"]
