"""regfused.penalty where somebody records, transforms or compiles a loss, and of what is no plain tensor."""

import io
import subprocess
import sys
import warnings

import pytest
import torch
import watchers
from torch import nn
from torch.autograd import forward_ad

import regfused
from regfused import extension, reference

BOTH = pytest.mark.parametrize("penalty", (regfused.penalty, reference.penalty), ids=("kernels", "reference"))
STRENGTHS = ({"l1": 0.3}, {"l2": 0.7}, {"l1": 0.3, "l2": 0.7}, {})
needs_kernels = pytest.mark.skipif(extension.C is None, reason="there is no compiled part")


def formula(p, l1=0.0, l2=0.0):
    return l1 * p.sign() + 2 * l2 * p


# --- Batches of gradients ---------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("strengths", STRENGTHS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("way", ("is_grads_batched", "vmap", "old vmap"))
def test_a_batch_of_gradients(penalty, way, dtype, strengths):
    params = [torch.randn(6, 5).to(dtype).t().requires_grad_(), torch.randn(3, requires_grad=True), torch.randn(2)]
    value = penalty(params, **strengths)
    batch = torch.randn(4, dtype=value.dtype)

    def pull(g):
        return torch.autograd.grad(value, params[:2], g, retain_graph=True)

    want = [torch.stack(grads) for grads in zip(*(pull(g) for g in batch), strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a batch that is gone through one by one
        if way == "is_grads_batched":
            got = torch.autograd.grad(value, params[:2], batch, is_grads_batched=True)
        else:
            got = (torch.vmap if way == "vmap" else torch._vmap_internals._vmap)(pull)(batch)
    for g, w, p in zip(got, want, params, strict=False):
        assert g.shape == (4, *p.shape) and g.dtype == p.dtype and torch.equal(g, w)


def test_rows_of_a_jacobian_with_a_penalty():
    p = torch.randn(5, requires_grad=True)
    losses = torch.stack([p.square().sum(), regfused.penalty([p], l1=0.5), regfused.penalty([2 * p], l2=0.25)])
    (rows,) = torch.autograd.grad(losses, p, torch.eye(3), is_grads_batched=True)
    torch.testing.assert_close(rows, torch.stack([2 * p, 0.5 * p.sign(), 2 * p]).detach())


@BOTH
def test_a_gradient_that_is_kept_has_the_bits_of_one_that_is_not(penalty):
    for strengths in STRENGTHS:
        p = torch.tensor([1.0, -2.0, 0.0, 1e30, torch.inf, 0.1], requires_grad=True)
        (want,) = torch.autograd.grad(penalty([p], **strengths), p, torch.tensor(0.3))
        (got,) = torch.autograd.grad(penalty([p], **strengths), p, torch.tensor(0.3), create_graph=True)
        assert torch.equal(got, want) and not want.isnan().any(), strengths


def test_a_gradient_with_a_tangent():
    p = torch.randn(7, requires_grad=True)
    value = regfused.penalty([p], l1=0.3, l2=0.7)
    with forward_ad.dual_level():
        gain = forward_ad.make_dual(torch.tensor(2.0), torch.tensor(3.0))
        (grad,) = torch.autograd.grad(value, p, gain)
        got, tangent = forward_ad.unpack_dual(grad)
    torch.testing.assert_close(got, 2 * formula(p, 0.3, 0.7).detach())
    torch.testing.assert_close(tangent, 3 * formula(p, 0.3, 0.7).detach())


# --- Transforms of functions, compiled --------------------------------------------------------------


def value_of(p):
    return regfused.penalty([p], l1=0.3, l2=0.7)


def along(p):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(value_of(forward_ad.make_dual(p, torch.ones_like(p)))).tangent


TRANSFORMS = {
    "tangents": along,
    "grad": lambda p: torch.func.grad(value_of)(p),
    "vmap": lambda p: torch.func.vmap(value_of)(p),
    "vmap of grad": lambda p: torch.func.vmap(torch.func.grad(value_of))(p),
    "jvp": lambda p: torch.func.jvp(value_of, (p,), (torch.ones_like(p),))[1],
    "jacrev": lambda p: torch.func.jacrev(value_of)(p),
    "hessian": lambda p: torch.func.hessian(value_of)(p),
}


@needs_kernels
@pytest.mark.cpu
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend, fullgraph", (("eager", False), ("aot_eager", True)))
def test_compiled_transforms(transform, backend, fullgraph):
    torch._dynamo.reset()
    p = torch.randn(4, 3)
    want = TRANSFORMS[transform](p)
    got = torch.compile(TRANSFORMS[transform], backend=backend, fullgraph=fullgraph)(p)
    torch.testing.assert_close(got, want)
    seen = []

    def look(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    # Compiled once more, without a transform, it is the operator.
    torch.testing.assert_close(torch.compile(value_of, backend=look, fullgraph=fullgraph)(p), value_of(p))
    assert torch.ops.regfused.penalty in seen


# --- Traced and exported ----------------------------------------------------------------------------


class Loss(nn.Module):
    """A model whose result is a loss with a penalty."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x).square().mean() + regfused.penalty(self.parameters(), l1=0.3, l2=0.7)


@needs_kernels
@pytest.mark.cpu
def test_what_was_saved_needs_nothing_but_torch(tmp_path):
    model, x = Loss(), torch.ones(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x)
    assert "regfused::" not in str(traced.inlined_graph)
    torch.jit.save(traced, tmp_path / "traced.pt")
    for strict in (True, False):
        torch.export.save(torch.export.export(model, (x,), strict=strict), tmp_path / f"{strict}.pt2")
    program = """
import sys, pathlib, torch
sys.modules["regfused"] = None
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    loaded = torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(path)
    print(loaded(torch.ones(3, 4)).item())
"""
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert [float(line) for line in run.stdout.split()] == pytest.approx([model(x).item()] * 3, rel=1e-6)


@pytest.mark.cpu
def test_onnx_of_a_trace():
    pytest.importorskip("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is no longer developed
        torch.onnx.export(Loss(), (torch.ones(3, 4),), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("mode", ("real", "fake", "symbolic"))
@pytest.mark.parametrize("pre_dispatch", (False, True))
@pytest.mark.parametrize("backward", (False, True))
def test_graphs_of_operators(mode, pre_dispatch, backward):
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(p):
        value = value_of(p * 1)
        return torch.autograd.grad(value, p)[0] if backward else value

    if backward and pre_dispatch:
        return  # of what is before the dispatch the engine of autograd records nothing, whatever the operators
    p, q = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    graph = make_fx(function, tracing_mode=mode, pre_dispatch=pre_dispatch)(p)
    for x in (p, q):
        torch.testing.assert_close(graph(x), function(x))


@needs_kernels
def test_a_dispatch_mode_sees_the_operators_and_changes_nothing():
    p = torch.randn(100, requires_grad=True)
    want = (value_of(p), torch.autograd.grad(value_of(p), p)[0])
    with watchers.Dispatched() as mode:
        got = (value_of(p), torch.autograd.grad(value_of(p), p)[0])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert mode.seen.count("regfused.penalty.default") == 2
    assert mode.seen.count("regfused.penalty_backward.default") == 1


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = torch.randn(4, 3, requires_grad=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for p in (real, torch.randn(4, 3, requires_grad=True)):
            value = value_of(p)
            (grad,) = torch.autograd.grad(value, p)
            assert value.fake_mode is mode and grad.fake_mode is mode
            assert value.shape == () and value.dtype == torch.float32 and grad.shape == p.shape


# --- Nested tensors, strengths that wait for a gradient ---------------------------------------------


@BOTH
@pytest.mark.parametrize("layout", (torch.strided, torch.jagged), ids=str)
def test_nested_tensors(penalty, layout):
    parts = [torch.randn(2, 3), torch.randn(5, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are a prototype
        nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    value = penalty([torch.ones(2), nested], l1=0.3, l2=0.7)
    torch.testing.assert_close(value, penalty([torch.ones(2), *parts], l1=0.3, l2=0.7))
    value.backward()
    for part, grad in zip(parts, nested.grad.unbind(), strict=True):
        torch.testing.assert_close(grad, formula(part, 0.3, 0.7))


@BOTH
@pytest.mark.parametrize("name", ("l1", "l2"))
def test_a_strength_that_waits_for_a_gradient(penalty, name):
    for strength in (nn.Parameter(torch.tensor(0.5)), torch.tensor([0.5], requires_grad=True)):
        with pytest.raises(ValueError, match=f"penalty: {name} gets no gradient, and must be a number"):
            penalty([torch.ones(2)], **{name: strength})
    assert penalty([torch.ones(2)], **{name: torch.tensor(0.5)}).item() == 1
