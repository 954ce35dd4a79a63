"""Three measures of a classifier's sample complexity, with margins over the data (ICLR version).

Spec-Fro (Neyshabur et al. 2018), Spec-L1 (Bartlett et al. 2017) and Jac-Norm (Wei and Ma 2019),
each divided by the margin of a sample. Lower is better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srn_lab.measures.spectra import effective_weight, evaluating
from srn_lab.methods.method import matrix_layers


@dataclass(frozen=True)
class Complexity:
    """Natural logarithms of the measures, float64 (samples with a positive margin,)."""

    spec_fro: Tensor
    spec_l1: Tensor
    jac_norm: Tensor
    positive: float
    """The share of samples that have a positive margin, the only ones with measures."""

    def summary(self) -> dict[str, float]:
        """Medians and the share, for JSON."""
        return {
            "log_spec_fro": self.spec_fro.median().item(),
            "log_spec_l1": self.spec_l1.median().item(),
            "log_jac_norm": self.jac_norm.median().item(),
            "positive_margins": self.positive,
        }


def log_spec_fro(weights: list[Tensor]) -> float:
    """log( prod |W_i|_2^2 * sum_i srank(W_i) ), before the margin; W_i as (rows, the rest)."""
    product, ranks = 0.0, 0.0
    for weight in weights:
        values = torch.linalg.svdvals(weight.detach().double().flatten(1))
        product += 2 * math.log(values[0].item())
        ranks += (values.square().sum() / values[0].square()).item()
    return product + math.log(ranks)


def log_spec_l1(weights: list[Tensor]) -> float:
    """log( prod |W_i|_2^2 * (sum_i (|W_i|_{2,1} / |W_i|_2)^{2/3})^3 ), before the margin.

    |W|_{2,1} of (rows, columns) is the sum over rows of their 2-norms, the form in which layers are
    rows by inputs (Bartlett's matrices are its transposes).
    """
    product, total = 0.0, 0.0
    for weight in weights:
        matrix = weight.detach().double().flatten(1)
        sigma = torch.linalg.matrix_norm(matrix, 2).item()
        product += 2 * math.log(sigma)
        total += (matrix.norm(dim=1).sum().item() / sigma) ** (2 / 3)
    return product + 3 * math.log(total)


def complexity(network: nn.Module, x: Tensor, labels: Tensor, *, batch: int = 250) -> Complexity:
    """The measures on images ``x`` (N, ...) of classes ``labels`` (N,).

    Jac-Norm's hidden layers are the inputs of every linear or convolution layer but the first;
    sum_i |h_i|_2 |d margin / d h_i|_2 / margin.
    """
    with evaluating(network):
        weights = [effective_weight(layer) for _, layer in matrix_layers(network)]
        fro, l1 = log_spec_fro(weights), log_spec_l1(weights)
    margins, jacobians = [], []
    with evaluating(network, gradients=True):
        for index in torch.arange(len(x)).split(batch):
            margin, jacobian = _margins_and_jacobians(network, x[index], labels[index])
            margins.append(margin)
            jacobians.append(jacobian)
    margin, jacobian = torch.cat(margins), torch.cat(jacobians)
    positive = margin > 0
    if not positive.any():
        raise ValueError("no sample has a positive margin, so none has a measure")
    log_margin = margin[positive].log()
    return Complexity(
        spec_fro=fro - 2 * log_margin,
        spec_l1=l1 - 2 * log_margin,
        jac_norm=jacobian[positive].clamp(min=1e-300).log() - log_margin,
        positive=positive.double().mean().item(),
    )


def _margins_and_jacobians(network: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    device = next(network.parameters()).device
    hidden: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].requires_grad:
            hidden.append(inputs[0])

    layers = [layer for _, layer in matrix_layers(network)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        inputs = x.to(device).clone().requires_grad_()
        logits = network(inputs).double()
    finally:
        for hook in hooks:
            hook.remove()
    labels = labels.to(device)
    right = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    margin = right - others
    # The first of them is the image itself.
    states = [h for h in hidden if h is not inputs]
    gradients = torch.autograd.grad(margin.sum(), states)
    total = torch.zeros(len(x), dtype=torch.float64, device=device)
    for state, gradient in zip(states, gradients, strict=True):
        total += _norms(state) * _norms(gradient)
    return margin.detach().cpu(), total.detach().cpu()


def _norms(x: Tensor) -> Tensor:
    return x.detach().flatten(1).double().norm(dim=1)
