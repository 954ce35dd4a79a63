"""The units without training: Section 3's linear layers and Appendix A.2's identity matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from srn_kernels import linalg
from srn_lab.experiments.units import Place


@dataclass(frozen=True)
class LinearUnit:
    """Section 3's two linear layers: lower rank, lower empirical Lipschitz constant, same norms."""

    seed: int
    slot: str = "linear"
    ratios: tuple[float, ...] = (1.0, 0.5, 0.3, 0.2, 0.1)
    shape: tuple[int, int, int] = (64, 256, 32)
    """Inputs, hidden units, outputs."""
    pairs: int = 4000
    cost: float = 0.02

    def describe(self) -> dict:
        return {
            "seed": self.seed,
            "ratios": list(self.ratios),
            "shape": list(self.shape),
            "pairs": self.pairs,
        }

    def run(self, place: Place) -> dict:
        random = torch.Generator().manual_seed(self.seed)

        def gaussian(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        inputs, hidden, outputs = self.shape
        weights = [gaussian(hidden, inputs), gaussian(outputs, hidden)]
        difference = gaussian(self.pairs, inputs) - gaussian(self.pairs, inputs)
        found = []
        for ratio in self.ratios:
            normed = [_constrained(weight, ratio) for weight in weights]
            product = normed[1] @ normed[0]
            slope = (difference @ product.t()).norm(dim=1) / difference.norm(dim=1)
            found.append(
                {
                    "c": ratio,
                    "mean_slope": slope.mean().item(),
                    "jacobian_norm": torch.linalg.matrix_norm(product, 2).item(),
                    "product_of_norms": math.prod(
                        torch.linalg.matrix_norm(w, 2).item() for w in normed
                    ),
                }
            )
        return {"ratios": found}


def _constrained(weight: Tensor, ratio: float) -> Tensor:
    normed = weight / torch.linalg.matrix_norm(weight, 2)
    if ratio == 1:
        return normed
    target = max(1.0, ratio * min(weight.shape))
    return linalg.nearest_with_stable_rank(normed, target, method="svd")[0]


@dataclass(frozen=True)
class IdentityUnit:
    """Appendix A.2: the identity matrix at stable rank 2, in a random orthogonal basis.

    Rank minimisation against SRN with k = 1 and k = 0, whose distances are known exactly.
    """

    seed: int
    slot: str = "identity"
    cost: float = 0.01

    def describe(self) -> dict:
        return {"seed": self.seed}

    def run(self, place: Place) -> dict:
        random = torch.Generator().manual_seed(self.seed)
        weight = torch.linalg.qr(torch.randn(3, 3, generator=random, dtype=torch.float64))[0]
        u, s, vt = torch.linalg.svd(weight)
        found = {
            "rank minimisation": (u[:, :2] * s[:2]) @ vt[:2],
            "SRN, k = 1": linalg.nearest_with_stable_rank(weight, 2.0, 1, method="svd")[0],
            "SRN, k = 0": linalg.nearest_with_stable_rank(weight, 2.0, 0, method="svd")[0],
        }
        return {
            name: {
                "distance": (weight - matrix).norm().item(),
                "sigma": torch.linalg.matrix_norm(matrix, 2).item(),
                "stable_rank": linalg.stable_rank(matrix).item(),
            }
            for name, matrix in found.items()
        }
