"""The empirical Lipschitz histogram against functions whose slopes are known."""

import pytest
import torch
from srn_lab.elhist import PairKind, Slopes, draw_pairs, slopes
from torch import nn


class Linear(nn.Module):
    """f(x) = <w, x> + 3 on flattened images; counts how it was called."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return x.flatten(1) @ self.w + 3


def images(count, seed):
    return torch.randn(count, 1, 2, 3, generator=torch.Generator().manual_seed(seed))


def test_slopes_of_a_linear_function_are_bounded_by_its_norm_and_reach_it():
    w = torch.tensor([3.0, 0.0, -4.0, 0.0, 0.0, 0.0])
    f = Linear(w)
    found = slopes(f, images(700, 1), images(700, 2))
    assert found.values.shape == (700,)
    assert found.values.max() <= 5 * (1 + 1e-5)
    x = images(1, 3)
    along, across = w.view(1, 1, 2, 3), torch.eye(6)[1].view(1, 1, 2, 3)
    # Along w the slope is |w| = 5, across it 0, and half-way (unit w plus unit e1) 5 / sqrt(2).
    shifts = torch.cat([0.3 * along, across, along / 5 + across])
    exact = slopes(f, x + shifts, x.expand(3, -1, -1, -1))
    torch.testing.assert_close(exact.values.tolist(), [5.0, 0.0, 5 / 2**0.5], rtol=1e-5, atol=1e-5)


def test_slopes_run_in_evaluation_mode_without_gradients_and_restore_the_mode():
    f = nn.Sequential(Linear(torch.ones(6)), nn.Dropout(0.5))
    f[1].eval()
    slopes(f, images(600, 1), images(600, 2))
    assert set(f[0].seen) == {(False, False)}
    assert (f.training, f[0].training, f[1].training) == (True, True, False)


def test_identical_pairs_are_left_out_and_counted():
    x, y = images(4, 1), images(4, 2)
    y[1], y[3] = x[1], x[3]
    found = slopes(Linear(torch.ones(6)), x, y)
    assert found.identical_pairs == 2
    assert found.values.shape == (2,)
    assert found.values.isfinite().all()
    with pytest.raises(ValueError, match="no pair of distinct images"):
        slopes(Linear(torch.ones(6)), x, x)


def test_percentile_95_and_summary_of_known_slopes():
    found = Slopes(torch.arange(101, dtype=torch.float64), identical_pairs=4)
    assert found.percentile_95 == 95.0
    assert found.summary() == {
        "pairs": 101,
        "identical_pairs_left_out": 4,
        "mean_slope": 50.0,
        "median_slope": 50.0,
        "percentile_95_slope": 95.0,
        "max_slope": 100.0,
    }


@pytest.mark.parametrize(
    ("kind", "x_sign", "y_sign"),
    [(PairKind.REAL_FAKE, 1, -1), (PairKind.REAL_REAL, 1, 1), (PairKind.FAKE_FAKE, -1, -1)],
    ids=lambda value: getattr(value, "value", None),
)
def test_pairs_come_from_the_named_sets_and_never_join_an_image_with_itself(kind, x_sign, y_sign):
    real = torch.arange(1.0, 6.0)[:, None]
    fake = -torch.arange(1.0, 4.0)[:, None]
    x, y = draw_pairs(real, fake, kind, 400, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (400, 1)
    assert (x.sign() == x_sign).all()
    assert (y.sign() == y_sign).all()
    assert (x != y).all()
    pools = {1: set(real.flatten().tolist()), -1: set(fake.flatten().tolist())}
    assert set(x.flatten().tolist()) == pools[x_sign]
    assert set(y.flatten().tolist()) == pools[y_sign]
