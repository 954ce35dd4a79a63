"""Bounds on the stable rank, and the evaluation that compares GANs."""

import math

import pytest
import torch
from srn_lab.data import digits
from srn_lab.elhist import PairKind
from srn_lab.evaluate import active_layers, evaluate, stable_rank_bounds
from srn_lab.normalisation import Norm, Spectrum
from srn_lab.quality import frechet_distance_pca
from srn_lab.train import TrainConfig, build

SHAPES = {"wide": (16, 144), "tall": (32, 9), "head": (1, 32)}
LAYERS = [Spectrum(name, *shape, 1.0, 1.0, 1.0, 1.0) for name, shape in SHAPES.items()]


def test_bounds_are_the_ratio_times_the_shorter_side_and_at_least_one():
    found = stable_rank_bounds(LAYERS, Norm.SRN, 0.3)
    assert found == pytest.approx({"wide": 4.8, "tall": 2.7, "head": 1.0})


@pytest.mark.parametrize(
    ("norm", "rank_ratio"),
    [(Norm.NONE, 0.3), (Norm.SN, 0.3), (Norm.TORCH_SN, 0.3), (Norm.SRN, 1.0)],
)
def test_nothing_is_bounded_without_srn_or_at_a_ratio_of_one(norm, rank_ratio):
    assert set(stable_rank_bounds(LAYERS, norm, rank_ratio).values()) == {math.inf}


def test_a_layer_is_active_when_its_raw_stable_rank_exceeds_its_bound():
    def layer(name, raw, normalised):
        return Spectrum(name, 16, 144, 1.0, normalised, 2.0, raw)

    layers = [layer("above", 9.0, 4.8), layer("below", 4.7, 4.7), layer("at", 4.8, 4.8)]
    assert active_layers(layers, {"above": 4.8, "below": 4.8, "at": 4.8}) == ["above"]


def test_evaluation_draws_the_same_latents_and_pairs_for_every_gan():
    gan = build(TrainConfig(norm=Norm.SN, width=4, latent=4))
    first, again, other = (evaluate(gan, pairs=40, seed=seed) for seed in (1, 1, 2))
    assert first.samples.shape == (1797, 1, 8, 8)
    torch.testing.assert_close(first.samples, again.samples, rtol=0, atol=0)
    assert first.to_dict() == again.to_dict()
    assert first.elhist[PairKind.REAL_REAL].values.shape == (40,)
    assert not first.samples.equal(other.samples)
    assert first.frechet_distance_pca == frechet_distance_pca(digits(), first.samples)
