"""torch.compile of normalised models: one graph, the same numbers, no recompilation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import Discriminator, images, is_raw, same_state, state
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import srn_kernels as srn


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("rank_ratio", [1.0, 0.3], ids=["SN", "SRN"])
def test_training_and_evaluation_in_one_graph_each(rank_ratio: float) -> None:
    eager = srn.apply_stable_rank_norm(Discriminator().double(), rank_ratio)
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimisers = [torch.optim.SGD(m.parameters(), 1e-2) for m in (eager, model)]
    x = images().double()
    frames = set()
    for _ in range(4):
        for m, optimiser in zip((eager, compiled), optimisers, strict=True):
            optimiser.zero_grad()
            (m(x).square().sum() - m(-x).sum()).backward()  # two forwards, one backward
            optimiser.step()
        assert same_state(model, state(eager))
        frames.add(counter.frame_count)
    # torch.compile runs the outermost module's hooks as a frame of their own
    assert frames == {2}
    for p, q in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert is_raw(model)
    for m in (eager, model):
        m.eval()
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), eager(x), rtol=1e-12, atol=1e-14)
    assert counter.frame_count == 4
    assert same_state(model, state(eager))
    model(x)  # eager again: what the compiled steps changed is not taken for a new weight
    assert same_state(model, state(eager))


MODES = ("train", "eval", "train no_grad", "eval no_grad", "train")


def run_modes(backend: str, dtype: torch.dtype) -> list[set[int]]:
    """Every mode with several batch sizes against eager; the frame counts of each mode."""
    eager = srn.apply_stable_rank_norm(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(144, 1)).to(dtype), 0.5
    )
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for mode in MODES:
        counts = []
        for n in (2, 3, 5):
            x, outs = images(n).to(dtype), []
            for m in (eager, compiled):
                m.train("train" in mode)
                m.zero_grad()
                with torch.set_grad_enabled("no_grad" not in mode):
                    outs.append(m(x))
                if outs[-1].requires_grad:
                    (outs[-1].square().mean() - m(-x).mean()).backward()
            torch.testing.assert_close(*outs)
            for p, q in zip(eager.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
            for key, value in state(model).items():
                torch.testing.assert_close(value, state(eager)[key])
            counts.append(counter.frame_count)
        frames.append(set(counts))
    return frames


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_no_mode_compiles_twice_whatever_the_batch(backend: str) -> None:
    frames = run_modes(backend, torch.float64 if backend == "aot_eager" else torch.float32)
    assert [len(counts) for counts in frames] == [1] * len(MODES)
    assert frames[-1] == frames[-2]  # back to training: what was compiled serves


def test_checkpoints_and_shared_rounds_compile() -> None:
    class Checkpointed(Discriminator):
        def forward(self, x):
            y = checkpoint(self.conv, x, use_reentrant=False)
            return self.head(torch.relu(self.up(torch.relu(y))).flatten(1))

    eager = srn.apply_stable_rank_norm(Discriminator().double(), 0.3)
    model = srn.apply_stable_rank_norm(Checkpointed().double(), 0.3)
    model.load_state_dict(eager.state_dict())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images().double()
    for m, call in ((eager, eager), (model, compiled)):
        call(x).square().sum().backward()
        with srn.shared_round(m):
            (call(x) - call(-x)).square().sum().backward()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-13)
    for key, value in state(model).items():
        torch.testing.assert_close(value, state(eager)[key], rtol=1e-12, atol=1e-14)


def test_one_compiled_part_of_an_eager_model() -> None:
    model = srn.apply_stable_rank_norm(Discriminator().double(), 0.3)
    twin, x = copy.deepcopy(model), images().double()
    model.up = torch.compile(model.up, backend="aot_eager")
    for _ in range(2):
        for m in (model, twin):
            m(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-13)
    assert is_raw(model)


def test_export_in_evaluation_keeps_the_batch_dynamic() -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3).eval()
    shapes = ({0: torch.export.Dim("n")},)
    for m in (model, srn.export(model)):
        program = torch.export.export(m, (images(),), dynamic_shapes=shapes)
        x = images(5)
        torch.testing.assert_close(program.module()(x), model(x))
    assert is_raw(model)


def test_the_plain_copy_becomes_onnx(tmp_path) -> None:
    pytest.importorskip("onnxscript", reason="the dynamo exporter of ONNX needs onnxscript")
    onnx = pytest.importorskip("onnx.reference", reason="onnx evaluates the file")
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(srn.export(model), (images(),), dynamo=True, verbose=False)
    x = images()
    name = program.model_proto.graph.input[0].name
    (out,) = onnx.ReferenceEvaluator(program.model_proto).run(None, {name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(x), rtol=1e-5, atol=1e-6)
    assert {n.op_type for n in program.model_proto.graph.node} <= {
        "Conv",
        "ConvTranspose",
        "Relu",
        "Reshape",
        "Flatten",
        "Gemm",
    }


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layer"])
def test_torchscript_is_refused_in_one_line(whole: bool) -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3).eval()
    target, x = (model, images()) if whole else (model.conv, images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"^torch\.jit\.script cannot .*export\(model\)"):
            torch.jit.script(target)
        with pytest.raises(RuntimeError, match=r"^torch\.jit\.trace cannot .*export\(model\)"):
            torch.jit.trace(target, x)
        assert is_raw(model)
        plain = srn.export(model)
        for scripted in (torch.jit.script(plain), torch.jit.trace(plain, x)):
            torch.testing.assert_close(scripted(x), model(x))


# --- torch.func ----------------------------------------------------------------------------------


def test_functional_call_and_grad_equal_autograd_and_leave_the_state() -> None:
    model, x = srn.apply_stable_rank_norm(Discriminator().double(), 0.3).eval(), images().double()
    before = state(model)
    model(x).square().sum().backward()
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(p, y):
        return functional_call(model, p, (y,)).square().sum()

    grads = torch.func.grad(loss)(parameters, x)
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(per_sample[name].sum(0), p.grad, rtol=1e-11, atol=1e-12)
    assert same_state(model, before)
    assert is_raw(model)
    model(x)  # and other weights passed for a while are not taken for a new weight
    assert same_state(model, before)


def test_functional_call_in_training_moves_the_buffers_it_was_given() -> None:
    model, x = srn.apply_stable_rank_norm(Discriminator().double(), 0.3), images().double()
    twin, before = copy.deepcopy(model), state(model)
    parameters = {k: p.detach().requires_grad_() for k, p in model.named_parameters()}
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    functional_call(model, (parameters, buffers), (x,)).square().sum().backward()
    twin(x).square().sum().backward()
    assert same_state(model, before)
    for key, value in state(twin).items():
        assert torch.equal(buffers[key], value)
    for name, p in twin.named_parameters():
        torch.testing.assert_close(parameters[name].grad, p.grad, rtol=1e-12, atol=1e-13)
    assert all(p.grad is None for p in model.parameters())


def test_vmap_over_the_input_works_and_over_an_ensemble_is_refused() -> None:
    members = [srn.apply_stable_rank_norm(Discriminator(), 0.3).eval() for _ in range(3)]
    x = images(4)
    out = torch.vmap(lambda y: members[0](y[None])[0])(x)
    torch.testing.assert_close(out, members[0](x))
    parameters, buffers = torch.func.stack_module_state(members)
    before = state(members[0])
    with pytest.raises(RuntimeError, match=r"vmap over the weights .* is not supported"):
        torch.vmap(
            lambda p, b: functional_call(members[0], (p, b), (x,)),
        )(parameters, buffers)
    assert is_raw(members[0])
    assert same_state(members[0], before)
    members[0](x)


def test_a_layer_on_its_own_compiles() -> None:
    layer = srn.spectral_norm(nn.Linear(6, 5).double())
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 6).double()
    for _ in range(2):
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-12, atol=1e-14)
    assert same_state(layer, state(twin))
