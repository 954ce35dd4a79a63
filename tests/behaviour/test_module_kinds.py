"""Every kind of module that holds a weight, against an SVD of what its forward used."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Discriminator, is_raw, sigma_max, state, wrapped_layers
from torch import Tensor, nn

import srn_kernels as srn

RECURRENT = {
    "LSTM": lambda: nn.LSTM(5, 7, num_layers=2, batch_first=True),
    "LSTM, bidirectional, projected": lambda: nn.LSTM(5, 7, bidirectional=True, proj_size=3),
    "GRU": lambda: nn.GRU(5, 7, num_layers=2, dropout=0.0, bidirectional=True),
    "RNN": lambda: nn.RNN(5, 7),
}


def optimal(w: Tensor, rank_ratio: float, dim: int = 0) -> Tensor:
    """W_hat by an SVD (Theorem 1, k = 1)."""
    m = w.detach().double().movedim(dim, 0).flatten(1)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    s = s / s[0]
    r = max(1.0, rank_ratio * min(m.shape))
    if rank_ratio < 1 and min(m.shape) > 1 and s.square().sum() > r:
        s[1:] *= ((r - 1) / s[1:].square().sum()).sqrt()
    shape = [w.shape[dim], *w.shape[:dim], *w.shape[dim + 1 :]]
    return ((u * s) @ vh).reshape(shape).movedim(0, dim)


@pytest.mark.parametrize("rank_ratio", [1.0, 0.4], ids=["SN", "SRN"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_weights_by_name(kind: str, rank_ratio: float) -> None:
    model = RECURRENT[kind]().double()
    plain = copy.deepcopy(model)
    names = [n for n, _ in model.named_parameters() if n.startswith("weight_")]
    with torch.no_grad():
        for name in names:
            getattr(model, name).mul_(5)
            getattr(plain, name).copy_(optimal(getattr(model, name), rank_ratio))
    srn.apply_stable_rank_norm(
        model, rank_ratio, layer_types=[type(model)], init_iterations=3000
    ).eval()
    assert [row.name for row in srn.report(model)] == names
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=1e-8, atol=1e-9)
    model.train()(x)[0].sum().backward()
    assert all(getattr(model, n).grad.abs().sum() > 0 for n in names)
    assert all(w is getattr(model, n) for w, n in zip(model._flat_weights, names[:1], strict=False))
    single = srn.spectral_norm(RECURRENT["LSTM"](), "weight_hh_l0")
    assert [row.name for row in srn.report(single)] == ["weight_hh_l0"]


ATTENTION = {
    "packed": {},
    "unpacked": {"kdim": 6, "vdim": 4},
    "batch first, without bias": {"bias": False, "batch_first": True},
    "with k, v bias": {"add_bias_kv": True},
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_projections(kind: str) -> None:
    arguments = ATTENTION[kind]
    model = nn.MultiheadAttention(8, 2, **arguments).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3).add_(0.1 * torch.randn_like(p))
    plain = copy.deepcopy(model)
    srn.apply_stable_rank_norm(
        model, 0.5, layer_types=[nn.MultiheadAttention, nn.Linear], init_iterations=3000
    ).eval()
    names = [row.name for row in srn.report(model)]
    inputs = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert names == [*(inputs if "kdim" in arguments else ["in_proj_weight"]), "out_proj.weight"]
    with torch.no_grad():
        for name in names:
            plain.get_parameter(name).copy_(optimal(plain.get_parameter(name), 0.5))
    q = torch.randn(5, 2, 8, dtype=torch.float64)
    k = torch.randn(5, 2, arguments.get("kdim", 8), dtype=torch.float64)
    v = torch.randn(5, 2, arguments.get("vdim", 8), dtype=torch.float64)
    torch.testing.assert_close(model(q, k, v)[0], plain.eval()(q, k, v)[0], rtol=1e-8, atol=1e-9)
    model.train()(q, k, v)[0].sum().backward()
    assert all(model.get_parameter(n).grad.abs().sum() > 0 for n in names)


def test_torchs_legacy_hook_leaves_the_attention_output_raw_and_frozen() -> None:
    model, x = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8)
    nn.utils.spectral_norm(model.out_proj)
    with torch.no_grad():
        model.out_proj.weight_orig.mul_(10)
    model(x, x, x)[0].sum().backward()
    assert model.out_proj.weight_orig.grad is None
    ours = nn.MultiheadAttention(8, 2)
    srn.apply_stable_rank_norm(ours, 1.0)
    ours(x, x, x)[0].sum().backward()
    assert ours.out_proj.weight.grad is not None


def test_a_transformer_layer_and_its_fast_path() -> None:
    """In evaluation without gradients the layer reads its weights without calling its parts."""
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    srn.apply_stable_rank_norm(model, 0.5, layer_types=[nn.Linear, nn.MultiheadAttention]).eval()
    plain, x = srn.export(model), torch.randn(3, 5, 8)
    assert len(srn.report(model)) == 8
    torch.testing.assert_close(model(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert is_raw(model)


def test_embedding_trains_and_sparse_gradients_are_refused() -> None:
    model = srn.apply_stable_rank_norm(
        nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 1)), 0.5, layer_types=[nn.Embedding]
    )
    model(torch.arange(6)).sum().backward()
    assert model[0].weight.grad.layout == torch.strided
    sparse = nn.Sequential(nn.Linear(4, 4), nn.Embedding(10, 4, sparse=True))
    for wrap in (
        lambda: srn.spectral_norm(sparse[1]),
        lambda: srn.apply_stable_rank_norm(sparse, layer_types=[nn.Linear, nn.Embedding]),
        lambda: srn.apply_stable_rank_norm(
            nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True)), layer_types=[nn.EmbeddingBag]
        ),
    ):
        with pytest.raises(ValueError, match=r"weight.*sparse=True"):
            wrap()
    assert not wrapped_layers(sparse)
    bag = srn.spectral_norm(nn.EmbeddingBag(10, 4))
    bag(torch.arange(6).view(2, 3)).sum().backward()
    assert bag.weight.grad is not None


def test_bilinear_and_own_modules() -> None:
    model = srn.apply_stable_rank_norm(nn.Bilinear(3, 4, 5), 1.0, layer_types=[nn.Bilinear]).eval()
    assert srn.report(model)[0].shape == (5, 12)
    model(torch.randn(2, 3), torch.randn(2, 4))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernel.T

    own = srn.spectral_norm(Own(), "kernel", init_iterations=200)
    own(torch.randn(2, 5)).sum().backward()
    assert sigma_max(own, "kernel") == pytest.approx(1.0, abs=1e-5)
    assert {"kernel_u", "kernel_v"} < set(own.state_dict())


@pytest.mark.parametrize("make", [nn.LazyLinear, lambda n: nn.LazyConv2d(n, 3)])
def test_lazy_modules_wait_for_their_shape(make) -> None:
    lazy = make(4)
    with pytest.raises(ValueError, match=r"weight is not initialised yet: run a forward"):
        srn.spectral_norm(lazy)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), make(4))
    srn.apply_stable_rank_norm(model, 1.0)
    assert srn.skipped(model) == [("1.weight", "lazy: not initialised yet")]
    model(torch.randn(2, 3, 5, 5))
    srn.apply_stable_rank_norm(model, 1.0)
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert len(srn.report(model)) == 2
    assert srn.skipped(model) == [("0.weight", "normalised already")]


@pytest.mark.parametrize("how", ["initialise", "load", "load plain", "assign"])
def test_meta_device_then_to_empty_or_load(how: str) -> None:
    source = srn.apply_stable_rank_norm(Discriminator(), 0.3)
    with torch.device("meta"):
        model = srn.apply_stable_rank_norm(Discriminator(), 0.3)
    if how == "assign":
        model.load_state_dict(source.state_dict(), assign=True)
    else:
        model.to_empty(device="cpu")
    if how == "initialise":
        for layer in model.children():
            layer.reset_parameters()
    elif how.startswith("load"):
        keep = lambda k: how == "load" or not k.endswith(("_u", "_v"))  # noqa: E731
        model.load_state_dict({k: v for k, v in source.state_dict().items() if keep(k)})
    if how in ("load", "assign"):
        assert all(torch.equal(v, state(source)[k]) for k, v in state(model).items())
    x = torch.randn(2, 3, 8, 8)
    model.eval()(x)
    for layer in wrapped_layers(model):
        assert 0.999 < sigma_max(layer) < 1.1
    if how != "initialise":
        # a plain checkpoint converges from a draw of its own
        tolerance = {"rtol": 0.2, "atol": 0.1} if how == "load plain" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(model(x), source.eval()(x), **tolerance)


@pytest.mark.parametrize("dims, form", [(2, torch.channels_last), (3, torch.channels_last_3d)])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "conv transpose"])
def test_channels_last_equals_contiguous_over_training(dims, form, transposed: bool) -> None:
    kinds = {(2, False): nn.Conv2d, (2, True): nn.ConvTranspose2d}
    kinds |= {(3, False): nn.Conv3d, (3, True): nn.ConvTranspose3d}
    model = nn.Sequential(kinds[dims, transposed](4, 6, 3, padding=1), nn.Tanh()).double()
    srn.apply_stable_rank_norm(model, 0.4)
    twin = copy.deepcopy(model).to(memory_format=form)
    assert twin[0].weight.is_contiguous(memory_format=form)
    optimisers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    for _ in range(3):
        x = torch.randn(2, 4, *[5] * dims, dtype=torch.float64)
        for m, optimiser in zip((model, twin), optimisers, strict=True):
            optimiser.zero_grad()
            m(x.contiguous(memory_format=form) if m is twin else x).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(twin[0].weight, model[0].weight, rtol=1e-11, atol=1e-12)
    for key, value in state(twin).items():  # v is in the order of the contiguous weight
        torch.testing.assert_close(value, state(model)[key], rtol=1e-11, atol=1e-12)
    model.load_state_dict(twin.state_dict())


def test_conv_transpose_groups_and_dim() -> None:
    """torch's dim: 1 for transposed convolutions, as a matrix of (out / groups, in * kernel)."""
    layer = srn.spectral_norm(nn.ConvTranspose1d(8, 6, 3, groups=2).double(), init_iterations=2000)
    theirs = nn.utils.parametrizations.spectral_norm(nn.ConvTranspose1d(8, 6, 3, groups=2))
    assert layer.weight_u.shape == theirs.parametrizations.weight[0]._u.shape == (3,)
    torch.testing.assert_close(srn.normalized_weight(layer), optimal(layer.weight, 1.0, 1))
    other = srn.spectral_norm(nn.ConvTranspose1d(8, 6, 3), dim=0)
    assert other.weight_u.shape == (8,)


def test_weight_tying_of_an_embedding_and_its_decoder() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.decode = nn.Embedding(12, 6), nn.Linear(6, 12, bias=False)
            self.decode.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.decode(torch.tanh(self.embed(tokens)))

    model = Language().double()
    torchs = copy.deepcopy(model)
    srn.apply_stable_rank_norm(model, 1.0, layer_types=[nn.Embedding, nn.Linear])
    assert [row.name for row in srn.report(model)] == ["embed.weight"]
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(5):
        optimiser.zero_grad()
        model(torch.arange(12)).square().sum().backward()
        optimiser.step()
    assert model.embed.weight is model.decode.weight
    assert len(list(model.parameters())) == 1
    assert sigma_max(model.embed) == sigma_max(model.decode) == pytest.approx(1.0, abs=1e-2)
    # torch's parametrization: two u, v and two nodes for the one Parameter
    nn.utils.parametrizations.spectral_norm(torchs.embed)
    nn.utils.parametrizations.spectral_norm(torchs.decode)
    assert torchs.embed.parametrizations.weight[0]._u is not (
        torchs.decode.parametrizations.weight[0]._u
    )


def test_weights_without_elements_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(0, 3), nn.Conv2d(0, 2, 3))
    srn.apply_stable_rank_norm(model, 0.5)
    assert srn.skipped(model) == [("1.weight", "no elements"), ("2.weight", "no elements")]
    assert model[1](model[0](torch.randn(2, 4))[:, :0]).shape == (2, 3)
    with pytest.raises(ValueError, match="weight has no elements"):
        srn.spectral_norm(nn.Linear(0, 3))


def test_complex_weights_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"1\.weight must be a real floating-point.*complex64"):
        srn.apply_stable_rank_norm(model)
    assert not wrapped_layers(model)
    nn.utils.parametrizations.spectral_norm(model[1])
    with pytest.raises(TypeError, match=r"1\.weight must be a real floating-point.*complex64"):
        srn.convert_spectral_norm(model)
    assert nn.utils.parametrize.is_parametrized(model[1])


def test_an_overridden_train_that_never_reaches_the_root() -> None:
    class Frozen(Discriminator):
        """As Projected GAN's discriminator: its own flag stays, its layers' flags change."""

        def train(self, mode: bool = True):
            for layer in (self.conv, self.up):
                layer.train(mode)
            self.head.train(False)
            return self

        def eval(self):
            return self.train(False)

    model, x = srn.apply_stable_rank_norm(Frozen(), 0.3), torch.randn(2, 3, 8, 8)
    model.eval()
    assert model.training
    before = state(model)
    model(x)
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    model.train()(x)
    moved = {k for k, v in state(model).items() if not torch.equal(v, before[k])}
    assert moved == {f"{n}.weight_{s}" for n in ("conv", "up") for s in "uv"}
