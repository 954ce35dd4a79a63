"""Looking at normalised layers, and taking normalisation off."""

from __future__ import annotations

import pytest
import torch
from models import Discriminator, assert_untouched, images, snapshot, state, wrapped_layers
from torch import nn

import srn_kernels as srn


def test_remove_bakes_in_what_evaluation_used() -> None:
    model, x = srn.apply_stable_rank_norm(Discriminator(), 0.3), images()
    model(x).sum().backward()
    parameters = dict(model.named_parameters())
    expected = model.eval()(x)
    assert srn.remove_stable_rank_norm(model) is model
    assert torch.equal(model(x), expected)
    assert dict(model.named_parameters()).keys() == Discriminator().state_dict().keys()
    assert all(p is parameters[n] for n, p in model.named_parameters())
    untouched = Discriminator()
    for name, module in model.named_modules():
        assert sorted(module.__dict__) == sorted(dict(untouched.named_modules())[name].__dict__)
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._load_state_dict_pre_hooks and not module._load_state_dict_post_hooks
    srn.apply_stable_rank_norm(model, 0.3)  # and it can be wrapped again


def test_removing_one_layer_leaves_the_others() -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3).eval()
    x = images()
    expected = model(x)
    srn.remove_stable_rank_norm(model.conv)
    torch.testing.assert_close(model(x), expected)
    assert [row.name for row in srn.report(model)] == ["up.weight", "head.weight"]


def test_export_leaves_the_original_alone() -> None:
    model, x = srn.apply_stable_rank_norm(Discriminator(), 0.3).eval(), images()
    before = snapshot(model)
    plain = srn.export(model)
    assert_untouched(model, before)
    assert torch.equal(plain(x), model(x))
    assert plain.state_dict().keys() == Discriminator().state_dict().keys()


def test_normalized_weight_is_differentiable() -> None:
    layer = srn.stable_rank_norm(nn.Linear(4, 3).double(), rank_ratio=0.5)
    before = state(layer)
    out = srn.normalized_weight(layer)
    g, direction, h = torch.randn_like(out), torch.randn_like(out), 1e-6
    (grad,) = torch.autograd.grad(out, layer.weight, g)
    values = []
    for step in (h, -h):  # with the same u, v
        shifted = layer.weight.detach() + step * direction
        (w_hat,) = srn.functional.stable_rank_normalize(
            [shifted], [layer.weight_u], [layer.weight_v], [1.5], training=False
        )
        values.append((w_hat * g).sum().item())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx((grad * direction).sum().item(), 1e-7)
    assert all(torch.equal(v, before[k]) for k, v in state(layer).items())


def test_set_rank_ratio_schedules() -> None:
    model = srn.apply_stable_rank_norm(Discriminator().double(), 1.0, init_iterations=500)
    model.eval()
    for ratio in (0.9, 0.5, 0.2):
        srn.set_rank_ratio(model, ratio)
        for layer in wrapped_layers(model):
            w_hat = srn.normalized_weight(layer)
            dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            m = w_hat.movedim(dim, 0).flatten(1)
            target = max(1.0, ratio * min(m.shape))
            assert srn.linalg.stable_rank(m).item() <= target * (1 + 1e-6)
    with pytest.raises(ValueError, match="rank_ratio"):
        srn.set_rank_ratio(model, 0)


def test_report_numbers_against_the_svd() -> None:
    model = srn.apply_stable_rank_norm(Discriminator().double(), 0.3, init_iterations=3000)
    before = snapshot(model)
    found = srn.report(model)
    assert_untouched(model, before)
    for row, layer in zip(found, wrapped_layers(model), strict=True):
        dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        w = layer.weight.detach().movedim(dim, 0).flatten(1)
        w_hat = srn.normalized_weight(layer).detach().movedim(dim, 0).flatten(1)
        assert row.shape == tuple(w.shape)
        assert row.sigma == pytest.approx(torch.linalg.matrix_norm(w, 2).item(), rel=1e-9)
        assert row.stable_rank == pytest.approx(srn.linalg.stable_rank(w).item(), rel=1e-8)
        assert row.normalized_stable_rank == pytest.approx(
            srn.linalg.stable_rank(w_hat).item(), rel=1e-8
        )
        assert row.active == (row.stable_rank > row.target)
        assert (row.gamma < 1) == row.active
    assert any(row.active for row in found)
    text = str(found)
    assert "conv.weight" in text and "12x27" in text
    assert found.to_dict()["layers"][0]["name"] == "conv.weight"
    assert len(text.splitlines()) == 1 + len(found)


def test_info_lists_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    runpy.run_module("srn_kernels.info", run_name="__main__")
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    for name, reason in srn.available_backends().items():
        assert (
            f"backend {name}: {'live' if reason is None else 'not available: ' + reason}" in printed
        )
