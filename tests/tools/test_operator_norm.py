"""The norm of a convolution as an operator, against the dense matrix of the same map."""

from __future__ import annotations

import math

import pytest
import torch
from models import Discriminator, same_state, state
from torch import Tensor, nn

import srn_kernels as srn

CASES = [
    (nn.Linear(5, 7), (5,)),
    (nn.Conv1d(2, 3, 3, padding=1), (2, 9)),
    (nn.Conv1d(4, 6, 3, stride=2, groups=2, padding="valid"), (4, 10)),
    (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 6)),
    (nn.Conv2d(2, 3, 3, padding=2, dilation=2, stride=2), (2, 7, 6)),
    (nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"), (2, 5, 5)),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 4, 5)),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate", groups=2), (2, 4, 5)),
    (nn.Conv2d(1, 1, 4), (1, 4, 4)),  # a single output
    (nn.Conv3d(2, 2, 2, padding=1), (2, 3, 4, 3)),
    (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 6)),
    (nn.ConvTranspose2d(4, 2, 3, stride=2, dilation=2, groups=2), (4, 4, 3)),
    (nn.ConvTranspose3d(2, 1, 2, stride=2), (2, 3, 2, 2)),
]


def dense(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Column by column, the layer without its bias on unit inputs."""
    eye = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return (layer(eye) - layer(0 * eye)).flatten(1).T.detach()


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=lambda c: getattr(c, "_get_name", str)())
def test_against_the_dense_matrix(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = layer.double()
    expected = float(torch.linalg.matrix_norm(dense(layer, shape), 2))
    for scale in (1.0, 1e-9, 1e15):
        found = srn.operator_norm(layer, shape, layer.weight * scale)
        assert found == pytest.approx(expected * scale, rel=1e-6)
    assert srn.operator_norm(layer.float(), shape) == pytest.approx(expected, rel=1e-5)


def test_a_circular_convolution_has_its_transfer_function_s_norm() -> None:
    layer = nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular", bias=False).double()
    # Singular values of the blocks of the discrete Fourier transform of the kernel.
    transfer = torch.fft.fft2(layer.weight.detach(), (16, 12)).permute(2, 3, 0, 1)
    expected = float(torch.linalg.matrix_norm(transfer, 2).max())
    assert srn.operator_norm(layer, (3, 16, 12), tol=1e-6) == pytest.approx(expected, rel=1e-9)


def test_report_measures_the_layers_of_a_model_and_changes_nothing() -> None:
    model = srn.apply_stable_rank_norm(Discriminator().double(), 0.5, init_iterations=200).train()
    before = state(model)
    rows = {}
    for shape in ((3, 8, 8), (2, 3, 8, 8)):  # with a batch dimension or without
        found = srn.report(model, input_shape=shape)
        rows = {row.name: row for row in found}
        assert "operator_norm" in str(found)
    assert same_state(model, before)
    assert model.conv.training
    for name, shape in (("conv", (3, 8, 8)), ("up", (12, 8, 8)), ("head", (1536,))):
        plain = getattr(srn.export(model), name)
        expected = float(torch.linalg.matrix_norm(dense(plain, shape), 2))
        assert rows[f"{name}.weight"].operator_norm == pytest.approx(expected, rel=1e-6)
        assert rows[f"{name}.weight"].operator_norm == rows[f"{name}.weight"].operator_norm
    assert rows["conv.weight"].operator_norm > 1.2  # matrix norm 1, and not 1-Lipschitz
    assert rows["head.weight"].operator_norm == pytest.approx(1, rel=1e-9)
    plain = srn.report(model)
    assert all(row.operator_norm is None for row in plain)
    assert "operator_norm" not in str(plain)
    assert plain.to_dict()["layers"][0]["operator_norm"] is None


def test_shapes_are_those_each_layer_sees() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.up = nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1)
            self.flat = nn.BatchNorm1d(2 * 6 * 6)  # refuses a batch of one in training
            self.norm = nn.BatchNorm2d(2)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(self.conv(x)[:, :, ::2, ::2]))
            return self.flat(self.up(x, output_size=(6, 6)).flatten(1))

    model = srn.apply_stable_rank_norm(Shared().double(), 0.9).train()
    rows = {row.name: row for row in srn.report(model, input_shape=(2, 6, 6))}
    plain = srn.export(model)
    sizes = [float(torch.linalg.matrix_norm(dense(plain.conv, (2, n, n)), 2)) for n in (6, 3)]
    assert rows["conv.weight"].operator_norm == pytest.approx(max(sizes), rel=1e-6)
    assert sizes[0] != pytest.approx(sizes[1], rel=1e-3)
    plain.up.output_padding = (1, 1)  # what output_size=(6, 6) comes to
    expected = float(torch.linalg.matrix_norm(dense(plain.up, (2, 3, 3)), 2))
    assert rows["up.weight"].operator_norm == pytest.approx(expected, rel=1e-6)
    plain.up.output_padding = (0, 0)
    assert float(torch.linalg.matrix_norm(dense(plain.up, (2, 3, 3)), 2)) < expected * 0.999
    assert rows["unused.weight"].operator_norm is None
    assert not model.norm.running_mean.any()


def test_zero_non_finite_and_wrong_arguments() -> None:
    layer = nn.Conv2d(2, 3, 3)
    assert srn.operator_norm(layer, (2, 5, 5), torch.zeros_like(layer.weight)) == 0
    assert math.isnan(srn.operator_norm(layer, (2, 5, 5), layer.weight * math.nan))
    with pytest.raises(ValueError, match=r"input_shape \(3, 5, 5\) does not fit Conv2d"):
        srn.operator_norm(layer, (3, 5, 5))
    with pytest.raises(TypeError, match="module must be a linear layer or a convolution"):
        srn.operator_norm(nn.ReLU(), (3,))
    model = srn.apply_stable_rank_norm(Discriminator())
    for shape in ((5, 8, 8), (3, 8), "3"):
        with pytest.raises(ValueError, match="input_shape"):
            srn.report(model, input_shape=shape)
    assert all(not m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.ReLU))
