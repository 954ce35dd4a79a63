"""Norm of the Jacobian of a network at given inputs: its local Lipschitz constant (Eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srn_lab.measures.spectra import evaluating


def jacobian_norms(
    network: nn.Module,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    iterations: int = 50,
    tol: float = 1e-4,
    batch: int = 128,
) -> Tensor:
    """|J_f(x_i)|_2 for every input x_i of ``x`` (N, ...), float64 (N,).

    One output an input, (N,) or (N, 1): the norm of the gradient, exact. More: the largest singular
    value by power iteration on J^T J with products only, until it moves by less than ``tol``,
    relative, everywhere, or ``iterations``; from below. The network runs in evaluation mode and
    must treat its inputs independently, as all do there, and be twice differentiable by autograd.
    """
    if x.shape[0] == 0:
        raise ValueError("x holds no inputs")
    parameter = next(network.parameters(), x)
    parts = []
    with evaluating(network, gradients=True):
        for index in torch.arange(len(x)).split(batch):
            inputs = x[index].to(parameter.device).clone().requires_grad_()
            of = () if labels is None else (labels[index].to(parameter.device),)
            outputs = network(inputs, *of)
            outputs = outputs.unsqueeze(1) if outputs.dim() == 1 else outputs.flatten(1)
            if outputs.shape[1] == 1:
                (gradient,) = torch.autograd.grad(outputs.sum(), inputs)
                norms = gradient.flatten(1).double().norm(dim=1)
            else:
                norms = _power_iteration(outputs, inputs, iterations, tol)
            parts.append(norms.detach().cpu())
    return torch.cat(parts)


def _power_iteration(outputs: Tensor, inputs: Tensor, iterations: int, tol: float) -> Tensor:
    # The derivative of J^T u with respect to u, applied to v, is J v: no forward mode is needed.
    u = torch.ones_like(outputs, requires_grad=True)
    (transposed,) = torch.autograd.grad(outputs, inputs, u, create_graph=True)
    random = torch.Generator().manual_seed(0)
    v = torch.randn(inputs.shape, generator=random).to(inputs)
    norms = torch.zeros(len(inputs), dtype=torch.float64, device=inputs.device)
    for _ in range(iterations):
        v = v / _norms(v).clamp(min=1e-30)
        (product,) = torch.autograd.grad(transposed, u, v, retain_graph=True)
        before, norms = norms, product.flatten(1).double().norm(dim=1)
        if ((norms - before).abs() <= tol * norms).all():
            break
        (v,) = torch.autograd.grad(outputs, inputs, product, retain_graph=True)
    return norms


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
