"""Dropout where somebody records, transforms or compiles what a model does."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import watchers
from torch import fx, nn
from torch.autograd import forward_ad
from torch.nn import functional

import regfused
from regfused import extension, reference

BOTH = pytest.mark.parametrize("module", (regfused, reference), ids=("kernels", "reference"))
ONES = torch.ones(1000)
needs_kernels = pytest.mark.skipif(extension.C is None, reason="there is no compiled part")


def drops(y):
    """Whether some of many ones were dropped, and the others scaled by a p of a half."""
    assert set(y.flatten().tolist()) <= {0.0, 1.0, 2.0, 4.0}, y
    return bool((y == 0).any())


def assert_follows_its_mode(model, x=ONES):
    for _ in range(2):
        model.eval()
        assert torch.equal(model(x), x)
        model.train()
        assert drops(model(x))
        assert not torch.equal(model(x), model(x))


class Twice(nn.Module):
    """One module that is called in two places."""

    def __init__(self, module):
        super().__init__()
        self.drop = module.Dropout()

    def forward(self, x):
        return self.drop(self.drop(x))


MODELS = {
    "in a row": lambda module: nn.Sequential(module.Dropout(), nn.ReLU()),
    "nested": lambda module: nn.Sequential(nn.Sequential(nn.ReLU(), nn.Sequential(module.Dropout()))),
    "twice": Twice,
    "in place": lambda module: nn.Sequential(nn.ReLU(), module.Dropout(inplace=True)),
    "a subclass": lambda module: nn.Sequential(type("Mine", (module.Dropout,), {})()),
}
EVERY_MODEL = pytest.mark.parametrize("model", MODELS)


# --- torch.fx ---------------------------------------------------------------------------------------


@BOTH
@EVERY_MODEL
@pytest.mark.parametrize("training", (True, False))
def test_a_graph_module_drops_in_its_own_mode(module, model, training):
    original = MODELS[model](module).train(training)
    traced = fx.symbolic_trace(original)
    dropouts = [name for name, part in original.named_modules() if isinstance(part, nn.Dropout)]
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert [name for name in called if name in dropouts] == dropouts * (2 if model == "twice" else 1)
    traced.graph.lint()
    assert_follows_its_mode(traced)
    # And so does a graph of the graph, and a graph of a model that it is a part of.
    assert_follows_its_mode(fx.symbolic_trace(traced))
    assert_follows_its_mode(fx.symbolic_trace(nn.Sequential(nn.Identity(), traced)))
    assert_follows_its_mode(copy.deepcopy(traced))


@BOTH
def test_a_graph_module_goes_through_pickle(module):
    model = nn.Sequential(module.Dropout(), nn.ReLU())
    assert_follows_its_mode(pickle.loads(pickle.dumps(fx.symbolic_trace(model))))

    def function(x):
        return module.dropout(x, 0.5) + 0

    traced = pickle.loads(pickle.dumps(fx.symbolic_trace(function)))
    assert drops(traced(ONES))
    buffer = io.BytesIO()
    torch.save(traced, buffer)
    buffer.seek(0)
    assert drops(torch.load(buffer, weights_only=False)(ONES))


class LeavesTanh(fx.Tracer):
    """Looks into everything but Tanh."""

    def is_leaf_module(self, module, name):
        return isinstance(module, nn.Tanh)


class LeavesNothing(fx.Tracer):
    def is_leaf_module(self, module, name):
        return False


@BOTH
@pytest.mark.parametrize("tracer", (LeavesTanh, LeavesNothing))
def test_tracers_of_other_people(module, tracer):
    model = nn.Sequential(nn.ReLU(), nn.Sequential(module.Dropout()))
    assert_follows_its_mode(fx.GraphModule(model, tracer().trace(model)))


@BOTH
def test_a_functional_call_stays_one(module):
    def function(x, p, inplace):
        y = x * 1
        return module.dropout(y, p, training=True, inplace=inplace)

    free = fx.symbolic_trace(function)
    assert drops(free(ONES, 0.5, False)) and not drops(free(ONES, 0.0, False))
    bound = fx.symbolic_trace(function, concrete_args={"p": 0.25, "inplace": True})
    (node,) = (node for node in bound.graph.nodes if node.target is module.dropout)
    assert dict(node.kwargs) == {"p": 0.25, "training": True, "inplace": True}
    torch.manual_seed(3)
    got = bound(ONES, 0.25, True)
    torch.manual_seed(3)
    assert torch.equal(got, function(ONES, 0.25, True))


@BOTH
def test_a_module_that_is_no_part_of_the_model_is_a_functional_call(module):
    def function(x):
        return module.Dropout(0.5).forward(x)

    assert drops(fx.symbolic_trace(function)(ONES))
    alone = fx.symbolic_trace(module.Dropout())  # as torch.nn.Dropout: the mode of the moment
    assert drops(alone(ONES))
    assert torch.equal(fx.symbolic_trace(module.Dropout().eval())(ONES), ONES)


@BOTH
def test_a_subclass_that_does_more_does_it_once(module):
    class Shifted(module.Dropout):
        def forward(self, x):
            return super().forward(x) + 8

    traced = fx.symbolic_trace(nn.Sequential(Shifted()))
    assert set(traced(ONES).tolist()) == {8.0, 10.0}


@BOTH
def test_passes_that_trace_again(module):
    model = nn.Sequential(nn.Linear(4, 4), module.Dropout(), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way to another package
        from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

        prepared = quantize_fx.prepare_qat_fx(
            copy.deepcopy(model).train(), get_default_qconfig_mapping(), (torch.randn(2, 4),)
        )
    x = torch.randn(2, 4)
    assert any(isinstance(part, module.Dropout) for part in prepared.modules())
    prepared(x)
    prepared.eval()
    assert torch.equal(prepared(x), prepared(x))
    shaped = fx.symbolic_trace(model)
    fx.passes.shape_prop.ShapeProp(shaped).propagate(x)
    assert fx.Transformer(shaped).transform()(x).shape == x.shape
    assert fx.Interpreter(shaped).run(x).shape == x.shape


# --- torch.jit --------------------------------------------------------------------------------------


@BOTH
@EVERY_MODEL
def test_scripted(module, model):
    scripted = torch.jit.script(MODELS[model](module))
    assert_follows_its_mode(scripted)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    assert_follows_its_mode(torch.jit.load(buffer))
    frozen = torch.jit.freeze(scripted.eval())
    assert torch.equal(frozen(ONES), ONES)


def in_kernels(x: torch.Tensor, p: float, training: bool):
    return regfused.dropout(x, p, training) + 0


def in_torch(x: torch.Tensor, p: float, training: bool):
    return reference.dropout(x, p, training) + 0


@pytest.mark.parametrize("function", (in_kernels, in_torch))
def test_a_scripted_function(function):
    scripted = torch.jit.script(function)
    assert drops(scripted(ONES, 0.5, True)) and torch.equal(scripted(ONES, 0.5, False), ONES)
    with pytest.raises(Exception, match="dropout probability has to be between 0 and 1"):
        scripted(ONES, 1.5, True)


@BOTH
@EVERY_MODEL
@pytest.mark.parametrize("training", (True, False))
def test_traced(module, model, training):
    original = MODELS[model](module).train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        # Nothing that depends on the example becomes a constant: neither its size, nor that it has any elements.
        traced = torch.jit.trace(original, torch.ones(0 if training else 7), check_trace=not training)
    assert drops(traced(ONES)) == training
    if training:
        assert not torch.equal(traced(ONES), traced(ONES))
    assert "regfused::" not in str(traced.inlined_graph)


@needs_kernels
@pytest.mark.cpu
def test_what_was_saved_needs_nothing_but_torch(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), regfused.Dropout())
    torch.jit.save(torch.jit.script(model), tmp_path / "scripted.pt")
    torch.jit.save(torch.jit.trace(model, torch.ones(2, 4), check_trace=False), tmp_path / "traced.pt")
    for strict in (True, False):
        for training in (True, False):
            program = torch.export.export(model.train(training), (torch.ones(2, 4),), strict=strict)
            torch.export.save(program, tmp_path / f"{strict} {training}.pt2")
    program = """
import sys, pathlib, torch
sys.modules["regfused"] = None
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    loaded = torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(path)
    print(path.name, (loaded(torch.ones(2, 4)) == 0).any().item())
"""
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    drops = dict(line.rsplit(" ", 1) for line in run.stdout.splitlines())
    assert len(drops) == 6 and drops["False False.pt2"] == drops["True False.pt2"] == "False"


# --- torch.export, ONNX -----------------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("strict", (True, False))
def test_exported(strict, training):
    ours, theirs = (nn.Sequential(nn.ReLU(), layer).train(training) for layer in (regfused.Dropout(), nn.Dropout()))
    programs = [torch.export.export(model, (ONES,), strict=strict) for model in (ours, theirs)]
    targets = [[str(n.target) for n in program.graph.nodes if n.op == "call_function"] for program in programs]
    assert targets[0] == targets[1]
    assert drops(programs[0].module()(ONES)) == training
    # The compiler's operator is there again afterwards.
    torch._dynamo.reset()
    compiled = torch.compile(ours.train(), fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    y = compiled(ONES)
    torch.manual_seed(2)
    assert torch.equal(y, ours(ONES))


@BOTH
@pytest.mark.cpu
@pytest.mark.parametrize("training", (True, False))
def test_onnx_of_a_trace(module, training):
    onnx = pytest.importorskip("onnx")
    model = nn.Sequential(nn.Linear(4, 4), module.Dropout(0.25)).train(training)
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is no longer developed
        torch.onnx.export(model, (torch.ones(2, 4),), file, dynamo=False, training=mode, do_constant_folding=False)
    graph = onnx.load_from_string(file.getvalue()).graph
    assert ("Dropout" in [node.op_type for node in graph.node]) == training


# --- Batches of gradients ---------------------------------------------------------------------------

STRIDES = {
    "contiguous": lambda: torch.randn(6, 5),
    "transposed": lambda: torch.randn(5, 6).t(),
    "sliced": lambda: torch.randn(6, 10)[:, ::2],
    "0-dim": lambda: torch.randn(()),
}


def old_vmap(vjp, batch):
    return torch._vmap_internals._vmap(vjp)(batch)


BATCHES = {
    "is_grads_batched": None,
    "vmap": lambda vjp, batch: torch.func.vmap(vjp)(batch),
    "vmap in the middle": lambda vjp, batch: torch.func.vmap(vjp, in_dims=-1)(batch.movedim(0, -1)),
    "old vmap": old_vmap,
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("way", BATCHES)
def test_a_batch_of_gradients(way, strides, inplace, dtype):
    x = STRIDES[strides]().to(dtype).requires_grad_()
    y = regfused.dropout(x.clone(memory_format=torch.preserve_format), 0.3, inplace=inplace)
    batch = torch.randn(3, *y.shape).to(dtype)
    want = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in batch])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a batch that is gone through one by one
        if way == "is_grads_batched":
            (got,) = torch.autograd.grad(y, x, batch, is_grads_batched=True)
        else:
            got = BATCHES[way](lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0], batch)
    assert got.dtype == dtype and torch.equal(got, want)


def test_batches_of_batches_and_of_gradients_of_gradients():
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = regfused.dropout(x * x, 0.3)
    factor = torch.where(y == 0, 0.0, 1 / 0.7)
    batch = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    pull = lambda g: torch.autograd.grad(y, x, g, create_graph=True)[0]  # noqa: E731
    torch.testing.assert_close(torch.vmap(torch.vmap(pull))(batch), 2 * x * factor * batch)
    (grads,) = torch.autograd.grad(y, x, batch[0], is_grads_batched=True, create_graph=True)
    (second,) = torch.autograd.grad(grads.sum(), x)
    torch.testing.assert_close(second, 2 * factor * batch[0].sum(0))


def test_a_gradient_with_a_tangent():
    x = torch.randn(6, 5, requires_grad=True)
    y = regfused.dropout(x, 0.3)
    factor = torch.where(y == 0, 0.0, torch.tensor(1 / 0.7))
    g, along = torch.randn(5, 6).t(), torch.randn(5, 6).t()
    with forward_ad.dual_level():
        (grad,) = torch.autograd.grad(y, x, forward_ad.make_dual(g, along))
        got, tangent = forward_ad.unpack_dual(grad)
    assert torch.equal(got, g * factor) and torch.equal(tangent, along * factor)


# --- Transforms of functions, compiled --------------------------------------------------------------


def rows(x):
    return x.view(2, 500)


TRANSFORMS = {
    "grad": (lambda f: torch.func.grad(lambda x: f(x).sum()), ONES),
    "vjp": (lambda f: lambda x: torch.func.vjp(f, x)[1](ONES)[0], ONES),
    "vmap": (lambda f: torch.func.vmap(f, randomness="different"), rows(ONES)),
    "vmap of grad": (
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()), randomness="different"),
        rows(ONES),
    ),
    "jvp": (lambda f: lambda x: torch.func.jvp(f, (x,), (ONES,))[1], ONES),
    "jacrev": (lambda f: lambda x: torch.func.jacrev(f, chunk_size=1)(x).sum(0), torch.ones(20)),
    "hessian": (
        lambda f: (
            lambda x: torch.func.jacfwd(
                torch.func.jacrev(lambda x: f(x).square().sum() / 2, chunk_size=1), randomness="same"
            )(x).sum(0)
        ),
        torch.ones(20),
    ),
}


@needs_kernels
@pytest.mark.cpu
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend, fullgraph", (("eager", False), ("aot_eager", True)))
def test_compiled_transforms(transform, backend, fullgraph):
    torch._dynamo.reset()
    make, x = TRANSFORMS[transform]
    layer = regfused.Dropout(0.5)
    got = torch.compile(make(layer), backend=backend, fullgraph=fullgraph)(x)
    assert drops(got), got
    # Compiled once more, without a transform, it is the operator.
    plain = torch.compile(layer, backend=backend, fullgraph=fullgraph)
    torch.manual_seed(1)
    y = plain(ONES)
    torch.manual_seed(1)
    assert torch.equal(y, regfused.dropout(ONES))


@needs_kernels
@pytest.mark.cpu
def test_compiled_with_tangents():
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager")
    def run(x, along):
        with forward_ad.dual_level():
            y = regfused.dropout(forward_ad.make_dual(x, along))
            return forward_ad.unpack_dual(y)

    y, tangent = run(ONES, ONES)
    assert drops(y) and torch.equal(y, tangent)


@needs_kernels
@pytest.mark.cpu
def test_one_compiled_function_with_a_transform_and_without():
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, transformed):
        if transformed:
            return torch.func.grad(lambda x: regfused.dropout(x).sum())(x) + regfused.dropout(x * 0)
        return regfused.dropout(x)

    for _ in range(2):
        assert drops(run(ONES, True))
        torch.manual_seed(1)
        y = run(ONES, False)
        torch.manual_seed(1)
        assert torch.equal(y, regfused.dropout(ONES))


# --- Modes ------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("inplace", (False, True))
def test_a_dispatch_mode_sees_the_operator_and_changes_nothing(inplace):
    x = torch.randn(1000, requires_grad=True)
    results = []
    mode = watchers.Dispatched()
    for context in (warnings.catch_warnings(), mode):
        torch.manual_seed(4)
        with context:
            y = regfused.dropout(x * 1, 0.3, inplace=inplace)
            (grad,) = torch.autograd.grad(y.sum(), x)
        results.append((y.detach(), grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    op = "regfused.dropout_.default" if inplace else "regfused.dropout.default"
    assert op in mode.seen and mode.seen.count("regfused.dropout.default") == (1 if inplace else 2)


def test_a_function_mode_sees_the_function():
    seen = []

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    torch.manual_seed(4)
    want = regfused.dropout(ONES, 0.3)
    torch.manual_seed(4)
    with Functions(), Functions():
        got = regfused.dropout(ONES, 0.3)
    assert torch.equal(got, want) and (extension.C is None or seen.count(regfused.dropout) == 2)


@pytest.mark.parametrize("mode", ("real", "fake", "symbolic"))
@pytest.mark.parametrize("pre_dispatch", (False, True))
@pytest.mark.parametrize("inplace", (False, True))
def test_graphs_of_operators(mode, pre_dispatch, inplace):
    from torch.fx.experimental.proxy_tensor import make_fx

    def forward(x):
        return regfused.dropout(x * 1, 0.5, inplace=inplace)

    def both(x):
        y = forward(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    # Of what is before the dispatch the engine of autograd records nothing, whatever the operators.
    functions = ((forward, ONES), (both, ONES.clone().requires_grad_()))
    for function, x in functions[: 1 if pre_dispatch else 2]:
        graph = make_fx(function, tracing_mode=mode, pre_dispatch=pre_dispatch)(x)
        masks = []
        for _ in range(2):
            results = graph(x)
            y, grad = results if isinstance(results, tuple) else (results, results)
            assert drops(y) and torch.equal(y, grad)
            masks.append(y == 0)
        assert not torch.equal(*masks)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for x in (torch.ones(6, 4).t().requires_grad_(), ONES.clone().requires_grad_(), mode.from_tensor(ONES)):
            y = regfused.dropout(x, 0.3)
            assert y.fake_mode is mode
            assert y.shape == x.shape
            if x.requires_grad:
                (grad,) = torch.autograd.grad(y.sum(), x)
                assert grad.shape == x.shape and grad.fake_mode is mode
    # Nothing of it stays.
    assert drops(regfused.dropout(ONES))


# --- Nested tensors ---------------------------------------------------------------------------------


@needs_kernels
@BOTH
@pytest.mark.parametrize("layout", (torch.strided, torch.jagged), ids=str)
def test_nested_tensors(module, layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are a prototype
        x = torch.nested.nested_tensor([torch.ones(300, 2), torch.ones(500, 2)], layout=layout, requires_grad=True)
    y = module.dropout(x * 1, 0.5)
    assert y.is_nested and y.layout == layout
    for part, size in zip(y.unbind(), (300, 500), strict=True):
        assert part.shape == (size, 2) and drops(part.detach())
    sum(part.sum() for part in y.unbind()).backward()
    for part, grad in zip(y.unbind(), x.grad.unbind(), strict=True):
        assert torch.equal(part, grad)
    for part in module.dropout(x, training=False).unbind():
        assert torch.equal(part, torch.ones_like(part))
    if layout == torch.strided:
        with pytest.raises(ValueError, match="input must be one tensor, but is a nested tensor"):
            torch.ops.regfused.dropout(x, 0.5, torch.tensor(1))
    with pytest.raises(NotImplementedError, match="bernoulli_"):  # as torch says of its own
        module.dropout(x * 1, 0.5, inplace=True)


# --- What p is not ----------------------------------------------------------------------------------


@BOTH
def test_a_p_that_waits_for_a_gradient(module):
    leaf = torch.tensor([0.5], requires_grad=True)
    for p in (nn.Parameter(torch.tensor(0.5)), leaf, leaf * 1):
        late = module.Dropout()
        late.__dict__["p"] = p
        for call in (
            lambda p=p: module.Dropout(p),
            lambda p=p: module.dropout(ONES, p),
            lambda p=p: module.dropout(ONES, p, training=False),
            lambda late=late: late(ONES),
        ):
            with pytest.raises(ValueError, match="dropout: p gets no gradient, and must be a number"):
                call()
    assert drops(module.dropout(ONES, torch.tensor(0.5)))


@BOTH
def test_the_words_of_torch_for_a_p_out_of_range(module):
    for p in (-0.1, 1.1, torch.tensor(2.0)):
        with pytest.raises(ValueError) as theirs:
            functional.dropout(ONES, p)
        for call in (lambda p=p: module.dropout(ONES, p), lambda p=p: module.Dropout(p)):
            with pytest.raises(ValueError) as ours:
                call()
            assert str(theirs.value) in str(ours.value) and "dropout: p must be in [0, 1]" in str(ours.value)
