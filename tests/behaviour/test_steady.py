"""A repeated round is the round that begin would make, whatever happened in between."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from models import Discriminator, images, is_raw
from torch import Tensor, nn

import srn_kernels as srn
from srn_kernels.model import root

EVENTS: dict[str, Callable[[nn.Module, Tensor], object]] = {}


def event(function: Callable) -> Callable:
    EVENTS[function.__name__] = function
    return function


@event
def train(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    return out


@event
def two_forwards(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    real, fake = model(x), model(-x)
    (real.sum() - fake.square().sum()).backward()
    return real + fake


@event
def penalise(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    return grad.detach()


@event
def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model.eval()(x)
    model.train()
    return out


@event
def differentiate_in_evaluation(model: nn.Module, x: Tensor) -> Tensor:
    out = model.eval()(x)
    model.train()
    out.sum().backward()
    return out


@event
def sample(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@event
def forward_alone(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).detach()


@event
def frozen(model: nn.Module, x: Tensor) -> Tensor:
    wanted = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    out = model(x)
    for p, w in zip(model.parameters(), wanted, strict=True):
        p.requires_grad_(w)
    return out


@event
def toggle_the_first(model: nn.Module, x: Tensor) -> None:
    model.conv.weight.requires_grad_(not model.conv.weight.requires_grad)


@event
def toggle_training_of_one(model: nn.Module, x: Tensor) -> None:
    model.up.train(not model.up.training)


@event
def write(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model.head.weight.mul_(1.1).add_(0.01)


@event
def write_between(model: nn.Module, x: Tensor) -> None:
    """No backward has come since u and v moved: this is no optimiser step."""
    model(x)
    with torch.no_grad():
        model.up.weight.mul_(0.7).add_(0.02)


@event
def replace(model: nn.Module, x: Tensor) -> None:
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * 0.9)


@event
def replace_u(model: nn.Module, x: Tensor) -> None:
    model.conv.weight_u = torch.ones_like(model.conv.weight_u)


@event
def replace_v(model: nn.Module, x: Tensor) -> None:
    model.conv.weight_v = torch.ones_like(model.conv.weight_v)


@event
def swap_data(model: nn.Module, x: Tensor) -> None:
    model.head.weight.data = model.head.weight.data.flip(0, 1)


@event
def load(model: nn.Module, x: Tensor) -> None:
    model.load_state_dict({k: 1.05 * t for k, t in model.state_dict().items()})


@event
def load_assigned(model: nn.Module, x: Tensor) -> None:
    loaded = {k: t.clone() for k, t in model.state_dict().items()}
    model.load_state_dict(loaded, assign=True)


@event
def load_plain(model: nn.Module, x: Tensor) -> None:
    plain = {k: t * 2 for k, t in model.state_dict().items() if not k.endswith(("_u", "_v"))}
    model.load_state_dict(plain, strict=False)


@event
def schedule(model: nn.Module, x: Tensor) -> None:
    entry = model.conv.__dict__["_srn"]["weight"]
    srn.set_rank_ratio(model, 0.2 if entry.settings.rank_ratio > 0.2 else 0.5)


@event
def call_features(model: nn.Module, x: Tensor) -> Tensor:
    return model.features(x).detach()


@event
def share(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    with srn.shared_round(model):
        out = model(x) + model(-x)
        out.square().sum().backward()
    return out


@event
def reorder_memory(model: nn.Module, x: Tensor) -> None:
    dense = model.conv.weight.is_contiguous()
    model.to(memory_format=torch.channels_last if dense else torch.contiguous_format)


@event
def use_bfloat16(model: nn.Module, x: Tensor) -> Tensor:
    out = model.bfloat16()(x.bfloat16()).detach()
    model.float()
    return out


@event
def swap_dtype(model: nn.Module, x: Tensor) -> str:
    weight = model.head.weight.data
    model.head.weight.data = weight.bfloat16()
    try:
        return str(model(x).dtype)  # head's matmul refuses mixed dtypes
    except RuntimeError as error:
        return str(error)
    finally:
        model.head.weight.data = weight


@event
def autocast(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    return out


@event
def change_backend(model: nn.Module, x: Tensor) -> Tensor:
    with srn.use_backend("reference"):
        return model(x).detach()


@event
def fail(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(RuntimeError):
        model(x[:, :2])


@event
def refresh(model: nn.Module, x: Tensor) -> None:
    srn.refresh(model)


@event
def transform(model: nn.Module, x: Tensor) -> Tensor | str:
    parameters = {k: p.detach() * 1.01 for k, p in model.named_parameters()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, p, (x,)).square().sum()

    try:
        return torch.func.grad(loss)(parameters)["conv.weight"]
    except RuntimeError as error:  # of stale u and v, which a transform cannot form anew
        return str(error)


@event
def transform_over_the_input(model: nn.Module, x: Tensor) -> Tensor | str:
    try:
        return torch.func.grad(lambda x: model(x).square().sum())(x)
    except RuntimeError as error:
        return str(error)


@event
def fuse_in_two(model: nn.Module, x: Tensor) -> Tensor:
    out = train(srn.fuse(model, groups=2), x)
    srn.fuse(model)
    return out


def wrapped() -> Discriminator:
    return srn.apply_stable_rank_norm(Discriminator(), 0.3)


def never_repeating(model: nn.Module) -> nn.Module:
    model.__dict__[root.ROUND].keep = lambda key, frame: None
    return model


def assert_same(a: nn.Module, b: nn.Module, what: str) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), (what, name)
        assert (p.grad is None) == (q.grad is None), (what, name)
        assert p.grad is None or torch.equal(p.grad, q.grad), (what, name)
    for (name, p), q in zip(a.named_buffers(), b.buffers(), strict=True):
        assert torch.equal(p, q), (what, name)


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each attempt to repeat a round held."""
    seen: list[bool] = []
    original = root.begin_again

    def watched(steady):
        seen.append(original(steady))
        return seen[-1]

    monkeypatch.setattr(root, "begin_again", watched)
    return seen


@pytest.mark.parametrize("seed", range(40))
def test_any_history_gives_what_begin_alone_gives(seed: int, repeats: list[bool]) -> None:
    draw = random.Random(seed)
    model = wrapped()
    twin = never_repeating(copy.deepcopy(model))
    history = []
    for _ in range(25):
        name = draw.choice(list(EVENTS)) if draw.random() < 0.6 else "train"
        history.append(name)
        if draw.random() < 0.05:
            model, twin = copy.deepcopy(model), copy.deepcopy(twin)
            history.append("deepcopy")
        x = images()
        seen, expected = EVENTS[name](model, x), EVENTS[name](twin, x)
        if isinstance(seen, Tensor):
            assert torch.equal(seen, expected), history
        else:
            assert seen == expected, history
        assert_same(model, twin, str(history))
        assert is_raw(model)
    assert any(repeats)


def test_a_training_step_of_a_gan_repeats_all_its_rounds(repeats: list[bool]) -> None:
    """D(real) and D(fake) of a step, samples without gradients, evaluation, D frozen for G."""
    model, x = wrapped(), images()
    for step in range(4):
        if step == 2:
            repeats.clear()
        two_forwards(model, x)
        train(model, x)
        sample(model, x)
        frozen(model, x)
        evaluate(model, x)
    assert repeats == [True] * 12


# What a round must notice at once; what happens to it is the business of begin.
CHANGES = [
    "toggle_training_of_one",
    "write_between",
    "replace",
    "replace_u",
    "replace_v",
    "load_assigned",
    "schedule",
    "call_features",
    "share",
    "transform",
]


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_goes_through_begin_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = wrapped(), images()
    train(model, x)
    train(model, x)
    EVENTS[name](model, x)
    began = []
    original = root.begin
    monkeypatch.setattr(root, "begin", lambda *a: began.append(a) or original(*a))
    for _ in range(3):
        train(model, x)
        assert len(began) == 1


def test_layers_that_went_to_another_round_are_noticed(repeats: list[bool]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Discriminator())
    srn.apply_stable_rank_norm(model, 0.3)
    twin = never_repeating(copy.deepcopy(model))
    x = images()
    for m in (model, twin):
        train(m, x)
        train(m, x)
        srn.fuse(m[1])
        if m is twin:
            never_repeating(m[1])
        train(m, x)
        train(m, x)
    assert_same(model, twin, "fuse")
    assert repeats == [True, False, True, True]


def test_layers_that_join_take_part_in_the_next_round() -> None:
    model, x = srn.apply_stable_rank_norm(Discriminator(), 0.3, include=["conv", "up"]), images()
    train(model, x)
    train(model, x)
    srn.apply_stable_rank_norm(model, 0.3)
    train(model, x)
    records = {id(e.record[0]) for e in model.__dict__[root.ROUND].entries}
    assert len(records) == 1  # one node for all three


def test_a_tied_layer_that_joins_is_normalised() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model.forward = lambda x: model["b"](model["a"](x))
    srn.apply_stable_rank_norm(model, 0.3, include="a")
    x = torch.randn(2, 4)
    train(model, x)
    train(model, x)
    model["b"].weight = model["a"].weight
    # b has no u and v of its own: fuse gives it a's
    twin = copy.deepcopy(model["a"])
    twin.weight = model["a"].weight
    model["b"] = twin
    srn.fuse(model)
    seen = []
    model["b"].register_forward_pre_hook(lambda m, _: seen.append(m.weight))
    train(model, x)
    assert not isinstance(seen[0], nn.Parameter)


def test_a_replaced_layer_is_noticed(repeats: list[bool]) -> None:
    model, x = wrapped(), images()
    train(model, x)
    train(model, x)
    model.head = nn.Linear(6 * 16 * 16, 1)
    with pytest.raises(RuntimeError, match="'head' of Discriminator was replaced"):
        model(x)
    assert repeats == [True, False]


def test_tracing_is_refused_in_the_middle_of_training() -> None:
    model, x = wrapped(), images()
    train(model, x)
    train(model, x)
    with pytest.raises(RuntimeError, match=r"jit\.trace cannot record"):
        torch.jit.trace(model, x)


def test_a_compiled_layer_inside_a_repeated_round() -> None:
    model = wrapped()
    twin = never_repeating(copy.deepcopy(model))
    for m in (model, twin):
        m.up.compile(backend="eager")
    for name in ("train", "train", "train", "call_features", "train", "train", "call_features"):
        x = images()
        assert torch.equal(EVENTS[name](model, x), EVENTS[name](twin, x))
        assert_same(model, twin, name)


def test_what_is_kept_does_not_travel_with_the_model() -> None:
    model = wrapped()
    train(model, images())
    this = model.__dict__[root.ROUND]
    assert this.steady
    twin = copy.deepcopy(model).__dict__[root.ROUND]
    assert not twin.steady and twin.last is None


def test_what_no_longer_holds_is_let_go() -> None:
    """Weights that were replaced must not stay in memory."""
    model, x = wrapped(), images()
    train(model, x)
    evaluate(model, x)
    replace(model, x)
    train(model, x)
    this = model.__dict__[root.ROUND]
    kept = {id(w) for steady in this.steady.values() for w in steady.weights}
    assert kept == {id(m.weight) for m in (model.conv, model.up, model.head)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: srn.apply_stable_rank_norm(Discriminator(), 0.3, gain=True),
        lambda: srn.apply_stable_rank_norm(Discriminator(), 0.3, sigma_max=2.0),
        lambda: srn.apply_stable_rank_norm(Discriminator(), 0.3, preserve=2),
        lambda: srn.apply_stable_rank_norm(Discriminator(), 0.3, groups=2),
    ],
    ids=["gain", "sigma_max", "preserve", "groups"],
)
def test_other_kinds_of_rounds_are_not_repeated(wrap: Callable, repeats: list[bool]) -> None:
    model, x = wrap(), images()
    for _ in range(3):
        train(model, x)
    assert repeats == [] and not model.__dict__[root.ROUND].steady
