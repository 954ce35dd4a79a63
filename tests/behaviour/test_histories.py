"""Random histories of a model against a twin that normalises layer by layer and knows no rounds.

The twin is the specification in a few lines: plain modules, the functional core called for one
layer at a time, and for each layer one word for what its u and v are worth. ``--histories N`` runs
more. Longer than other files: specification, events and refusals are read together.
"""

from __future__ import annotations

import copy
import pickle
import random
import threading
import zlib
from collections.abc import Callable, Sequence

import pytest
import torch
from models import Discriminator, images, is_raw
from torch import Tensor, nn

import srn_kernels as srn
from srn_kernels.functional import stable_rank_normalize
from srn_kernels.model import begin

NAMES = ("conv", "up", "head")
DIMS = {"conv": 0, "up": 1, "head": 0}


class Twin:
    """A plain Discriminator, with u, v and their worth beside it."""

    def __init__(self, model: nn.Module, ratio: float) -> None:
        self.plain = Discriminator()
        self.plain.load_state_dict({k: p.detach() for k, p in model.named_parameters()})
        self.ratio = ratio
        self.vectors: dict[str, tuple[Tensor, Tensor]] = {}
        self.worth = dict.fromkeys(NAMES, "new")  # "new", "fresh" or "stale"
        self.seen = dict.fromkeys(NAMES, False)  # a backward, since u and v last moved
        for name in NAMES:
            self.converge(name)
            self.worth[name] = "new"

    def layer(self, name: str) -> nn.Module:
        return getattr(self.plain, name)

    def normalize(self, name: str, pair: Sequence[Tensor], steps: int) -> Tensor:
        weight, (u, v) = self.layer(name).weight, pair
        target = max(1.0, self.ratio * min(len(u), len(v)))
        (out,) = stable_rank_normalize(
            *([weight], [u], [v], [target]),
            n_power_iterations=max(1, steps),
            dims=[DIMS[name]],
            training=steps > 0,
        )
        return out

    def drawn(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self.layer(name).weight
        seed = zlib.crc32(f"{name}.weight:{tuple(weight.shape)}".encode())
        generator = torch.Generator().manual_seed(seed)
        rows = weight.shape[DIMS[name]]
        pair = [
            torch.randn(n, generator=generator, dtype=torch.float64)
            for n in (rows, weight.numel() // rows)
        ]
        return tuple((x / x.norm()).float() for x in pair)

    def converge(self, name: str, steps: int = 15) -> None:
        if self.worth[name] == "new" or name not in self.vectors:
            self.vectors[name] = self.drawn(name)
        with torch.no_grad():
            self.normalize(name, self.vectors[name], steps)
        self.worth[name], self.seen[name] = "fresh", False

    def round(self, names: Sequence[str] = NAMES) -> dict[str, Tensor]:
        """W_hat of some layers together, as one round makes it."""
        for name in names:
            if self.worth[name] != "fresh":
                self.converge(name)
        moves = torch.is_grad_enabled() and any(self.layer(n).training for n in names)
        moves = moves and any(p.requires_grad for n in names for p in self.layer(n).parameters())
        outs = {}
        for name in names:
            steps = int(moves and self.layer(name).training)
            if steps:
                self.seen[name] = False
            outs[f"{name}.weight"] = self.normalize(name, self.vectors[name], steps)
        return outs

    def run(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(self.plain, weights, (x,))

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, self.round())

    def backward(self, names: Sequence[str] = NAMES) -> None:
        for name in names:
            self.seen[name] = True

    def wrote(self, name: str) -> None:
        if not self.seen[name]:
            self.replaced(name)

    def replaced(self, name: str) -> None:
        if self.worth[name] != "new":
            self.worth[name] = "stale"


class Pair:
    """The model and its twin; every event is done to both, and what it returns is compared."""

    def __init__(self) -> None:
        self.model = srn.apply_stable_rank_norm(Discriminator(), 0.3)
        self.twin = Twin(self.model, 0.3)

    def both(self, change: Callable[[nn.Module], None]) -> None:
        for model in (self.model, self.twin.plain):
            change(model)

    def same(self, what: str) -> None:
        model, twin = self.model, self.twin
        for name, q in twin.plain.named_parameters():
            p = model.get_parameter(name)
            assert torch.equal(p, q), (what, name)
            assert (p.grad is None) == (q.grad is None), (what, name)
            assert p.grad is None or torch.equal(p.grad, q.grad), (what, name)
            assert p.requires_grad == q.requires_grad
        for name, (u, v) in twin.vectors.items():
            layer = getattr(model, name)
            assert torch.equal(layer.weight_u, u) and torch.equal(layer.weight_v, v), (what, name)
        assert is_raw(model), what
        assert not begin._leases.stack, what


EVENTS: dict[str, Callable[[Pair, Tensor], object]] = {}


def event(function: Callable[[Pair, Tensor], object]) -> Callable:
    EVENTS[function.__name__] = function
    return function


def equal(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b), (a - b).abs().max()


def trains(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters())


@event
def train(pair: Pair, x: Tensor) -> None:
    pair.both(lambda m: m.zero_grad())
    ours, theirs = pair.model(x), pair.twin(x)
    equal(ours, theirs)
    for out in (ours, theirs):
        out.square().sum().backward()
    pair.twin.backward()
    pair.both(lambda m: torch.optim.SGD(m.parameters(), lr=0.05).step())


@event
def two_forwards(pair: Pair, x: Tensor) -> None:
    pair.both(lambda m: m.zero_grad())
    for call in (pair.model, pair.twin):
        real, fake = call(x), call(-x)
        (real.sum() - fake.square().sum()).backward()
    pair.twin.backward()


@event
def penalise(pair: Pair, x: Tensor) -> None:
    """A gradient penalty: twice differentiable."""
    pair.both(lambda m: m.zero_grad())
    for call in (pair.model, pair.twin):
        z = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(call(z).sum(), z, create_graph=True)
        grad.square().sum().backward()
    pair.twin.backward()


@event
def evaluate(pair: Pair, x: Tensor) -> None:
    flags = [m.training for m in pair.model.modules()]
    pair.both(lambda m: m.eval())
    with torch.no_grad():
        equal(pair.model(x), pair.twin(x))
    for model in (pair.model, pair.twin.plain):
        for module, flag in zip(model.modules(), flags, strict=True):
            module.training = flag


@event
def differentiate_in_evaluation(pair: Pair, x: Tensor) -> None:
    pair.both(lambda m: m.eval())
    ours, theirs = pair.model(x), pair.twin(x)
    equal(ours, theirs)
    for out in (ours, theirs):
        out.sum().backward()
    pair.twin.backward()
    pair.both(lambda m: m.train())


@event
def sample(pair: Pair, x: Tensor) -> None:
    with torch.no_grad():
        equal(pair.model(x), pair.twin(x))


@event
def forward_alone(pair: Pair, x: Tensor) -> None:
    equal(pair.model(x), pair.twin(x))


@event
def forward_called_directly(pair: Pair, x: Tensor) -> None:
    equal(pair.model.forward(x), pair.twin(x))


@event
def frozen(pair: Pair, x: Tensor) -> None:
    wanted = [p.requires_grad for p in pair.model.parameters()]
    pair.both(lambda m: m.requires_grad_(False))
    equal(pair.model(x), pair.twin(x))
    for model in (pair.model, pair.twin.plain):
        for p, w in zip(model.parameters(), wanted, strict=True):
            p.requires_grad_(w)


@event
def toggle_the_first(pair: Pair, x: Tensor) -> None:
    pair.both(lambda m: m.conv.weight.requires_grad_(not m.conv.weight.requires_grad))


@event
def toggle_training_of_one(pair: Pair, x: Tensor) -> None:
    pair.both(lambda m: m.up.train(not m.up.training))


def write(m: nn.Module) -> None:
    with torch.no_grad():
        m.head.weight.mul_(1.1).add_(0.01)


@event
def write_one(pair: Pair, x: Tensor) -> None:
    pair.both(write)
    pair.twin.wrote("head")


@event
def write_between(pair: Pair, x: Tensor) -> None:
    equal(pair.model(x), pair.twin(x))
    pair.both(write)
    pair.twin.wrote("head")


@event
def replace(pair: Pair, x: Tensor) -> None:
    def change(m: nn.Module) -> None:
        m.conv.weight = nn.Parameter(m.conv.weight.detach() * 0.9)

    pair.both(change)
    pair.twin.replaced("conv")


@event
def replace_u(pair: Pair, x: Tensor) -> None:
    if pair.twin.worth["conv"] == "new":
        return
    pair.model.conv.weight_u = torch.ones_like(pair.model.conv.weight_u)
    pair.twin.vectors["conv"] = torch.ones(12), pair.twin.vectors["conv"][1]


@event
def swap_data(pair: Pair, x: Tensor) -> None:
    """Nobody can see it: u and v follow over the next iterations."""

    def change(m: nn.Module) -> None:
        m.head.weight.data = m.head.weight.data.flip(0, 1)

    pair.both(change)


@event
def load(pair: Pair, x: Tensor) -> None:
    state = {k: 1.05 * t for k, t in pair.model.state_dict().items()}
    pair.model.load_state_dict(state)
    pair.twin.plain.load_state_dict({k: state[k] for k in pair.twin.plain.state_dict()})
    for name in NAMES:
        pair.twin.vectors[name] = tuple(state[f"{name}.weight_{x}"].clone() for x in "uv")
        pair.twin.worth[name], pair.twin.seen[name] = "fresh", False


@event
def load_assigned(pair: Pair, x: Tensor) -> None:
    state = {k: t.clone() for k, t in pair.model.state_dict().items()}
    pair.model.load_state_dict(state, assign=True)
    plain = {k: state[k].clone() for k in pair.twin.plain.state_dict()}
    pair.twin.plain.load_state_dict(plain, assign=True)
    for name in NAMES:
        pair.twin.worth[name], pair.twin.seen[name] = "fresh", False


@event
def load_plain(pair: Pair, x: Tensor) -> None:
    plain = {k: t * 2 for k, t in pair.twin.plain.state_dict().items()}
    pair.both(lambda m: m.load_state_dict(plain))
    for name in NAMES:
        pair.twin.replaced(name)
        pair.twin.converge(name)


@event
def schedule(pair: Pair, x: Tensor) -> None:
    pair.twin.ratio = 0.2 if pair.twin.ratio > 0.2 else 0.5
    srn.set_rank_ratio(pair.model, pair.twin.ratio)


@event
def call_features(pair: Pair, x: Tensor) -> None:
    """Layers outside a round of their root: each makes its own."""
    w = pair.twin.round(["conv"]) | pair.twin.round(["up"])
    y = nn.functional.conv2d(x, w["conv.weight"], pair.twin.plain.conv.bias, padding=1)
    bias = pair.twin.plain.up.bias
    y = nn.functional.conv_transpose2d(y.relu(), w["up.weight"], bias, stride=2, padding=1)
    equal(pair.model.features(x), y.relu().flatten(1))


@event
def share(pair: Pair, x: Tensor) -> None:
    pair.both(lambda m: m.zero_grad())
    with srn.shared_round(pair.model):
        ours = pair.model(x) + pair.model(-x)
        ours.square().sum().backward()
    weights = pair.twin.round()
    theirs = pair.twin.run(x, weights) + pair.twin.run(-x, weights)
    theirs.square().sum().backward()
    equal(ours, theirs)
    pair.twin.backward()


@event
def fail(pair: Pair, x: Tensor) -> None:
    with pytest.raises(RuntimeError):
        pair.model(x[:, :2])
    pair.twin.round()


@event
def interrupt(pair: Pair, x: Tensor) -> None:
    """At a random layer, before, inside or after its forward."""
    layer = getattr(pair.model, random.choice(NAMES))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = random.random() < 0.5
    add = layer.register_forward_pre_hook if before else layer.register_forward_hook
    handle = add(stop)
    with pytest.raises(KeyboardInterrupt):
        pair.model(x)
    handle.remove()
    pair.twin.round()


@event
def refresh(pair: Pair, x: Tensor) -> None:
    srn.refresh(pair.model)
    for name in NAMES:
        pair.twin.converge(name)


@event
def cast(pair: Pair, x: Tensor) -> None:
    pair.both(lambda m: m.bfloat16())
    with torch.no_grad():
        equal(pair.model(x.bfloat16()), pair.twin(x.bfloat16()))
    pair.both(lambda m: m.float())
    for name in NAMES:
        pair.twin.seen[name] = False


@event
def reorder_memory(pair: Pair, x: Tensor) -> None:
    dense = pair.model.conv.weight.is_contiguous()
    order = torch.channels_last if dense else torch.contiguous_format
    pair.both(lambda m: m.to(memory_format=order))
    for name in NAMES:
        pair.twin.seen[name] = False


@event
def another_backend(pair: Pair, x: Tensor) -> None:
    with srn.use_backend("reference"):
        equal(pair.model(x), pair.twin(x))


@event
def transform(pair: Pair, x: Tensor) -> None:
    if "fresh" not in {*pair.twin.worth.values()} or len({*pair.twin.worth.values()}) > 1:
        return
    ours = torch.func.grad(lambda z: pair.model(z).square().sum())(x)
    theirs = torch.func.grad(lambda z: pair.twin(z).square().sum())(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # conv's own kernels differ


@event
def fuse(pair: Pair, x: Tensor) -> None:
    srn.fuse(pair.model, groups=random.choice([1, 2, 3]))


@event
def look(pair: Pair, x: Tensor) -> None:
    """Nothing that only looks changes anything."""
    assert len(srn.report(pair.model)) == 3
    assert all(srn.is_normalized(getattr(pair.model, n)) for n in NAMES)
    exported = srn.export(pair.model).eval()
    evaluated = copy.deepcopy(pair.model).eval()
    torch.testing.assert_close(exported(x), evaluated(x), rtol=1e-5, atol=1e-6)


@event
def evaluate_in_threads(pair: Pair, x: Tensor) -> None:
    evaluate(pair, x)  # converges what is stale
    pair.both(lambda m: m.eval())
    outs: list[Tensor] = []
    calls = [threading.Thread(target=lambda: outs.append(pair.model(x))) for _ in range(3)]
    for thread in calls:
        thread.start()
    for thread in calls:
        thread.join()
    expected = pair.twin(x)
    pair.both(lambda m: m.train())
    for out in outs:
        equal(out, expected)
    assert len(outs) == 3


@event
def copied(pair: Pair, x: Tensor) -> None:
    pair.model = copy.deepcopy(pair.model)  # without gradients, as torch copies Parameters
    pair.twin.plain.zero_grad()
    for name in NAMES:
        pair.twin.seen[name] = False


@event
def pickled(pair: Pair, x: Tensor) -> None:
    pair.model = pickle.loads(pickle.dumps(pair.model))
    pair.twin.plain.zero_grad()
    for name in NAMES:
        pair.twin.seen[name] = False


@event
def remove_and_wrap_again(pair: Pair, x: Tensor) -> None:
    srn.remove_stable_rank_norm(pair.model)
    for name in NAMES:
        if pair.twin.worth[name] != "fresh":
            pair.twin.converge(name)
        with torch.no_grad():
            weight = pair.twin.layer(name).weight
            weight.copy_(pair.twin.normalize(name, pair.twin.vectors[name], 0))
    srn.apply_stable_rank_norm(pair.model, pair.twin.ratio)
    for name in NAMES:
        pair.twin.worth[name] = "new"
        pair.twin.converge(name)
        pair.twin.worth[name] = "new"


def test_any_history_gives_what_the_twin_gives(history: int) -> None:
    random.seed(history)
    torch.manual_seed(history)
    pair, done = Pair(), []
    for _ in range(25):
        name = random.choice(list(EVENTS)) if random.random() < 0.7 else "train"
        done.append(name)
        try:
            if trains(pair.model) or name not in ("train", "two_forwards", "penalise"):
                EVENTS[name](pair, images())
        except AssertionError as error:
            raise AssertionError(f"{done}: {error}") from error
        pair.same(str(done))
