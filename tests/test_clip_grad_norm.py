"""regfused.clip_grad_norm_ and grad_norm beside torch's and beside float64."""

import math
import re
import warnings

import pytest
import torch
from step_cases import DTYPES, SIZES
from torch import nn
from watchers import TRACERS, Called, Dispatched

import regfused
from regfused import extension, reference

BOTH = pytest.mark.parametrize("module", (regfused, reference), ids=("kernels", "reference"))
NORM_TYPES = (1.0, 2.0, math.inf)
needs_kernels = pytest.mark.skipif(extension.C is None, reason="there is no compiled part")


def with_grads(sizes=SIZES, dtype=torch.float32, scale=1.0):
    params = []
    for i, size in enumerate(sizes):
        p = torch.zeros(size, dtype=dtype, requires_grad=True)
        g = torch.randn(size, dtype=torch.float64) * scale
        p.grad = torch.where(g.abs() < 0.05 * scale, torch.full_like(g, 0.5 * scale), g).to(dtype)
        params.append(p)
        if i % 5 == 2:
            params.append(torch.zeros(3, requires_grad=True))  # without a gradient
    return params


def twins_of(params):
    twins = [p.detach().clone() for p in params]
    for p, q in zip(params, twins, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    return twins


def norm_of(params, norm_type):
    """In float64, straight from the definition."""
    everything = torch.cat([p.grad.detach().double().reshape(-1) for p in params if p.grad is not None])
    if math.isinf(norm_type):
        return everything.abs().max().item() if everything.numel() else 0.0
    return everything.abs().pow(norm_type).sum().pow(1 / norm_type).item()


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("max_norm", (0.5, 1e9, 0.0), ids=("clips", "out of reach", "to zero"))
def test_against_float64(module, max_norm, norm_type, dtype):
    params = with_grads(dtype=dtype, scale=0.01)
    want = norm_of(params, norm_type)
    old = [None if p.grad is None else p.grad.double().clone() for p in params]
    norm = module.clip_grad_norm_(params, max_norm, norm_type)
    assert norm.shape == () and norm.dtype == dtype
    storage = torch.finfo(dtype).eps
    assert norm.item() == pytest.approx(want, rel=max(4e-7, storage))
    c = min(1.0, max_norm / (want + 1e-6))
    for p, g in zip(params, old, strict=True):
        if g is None:
            assert p.grad is None
        else:
            # One rounding of the product and of the coefficient; half types round once more when they store.
            torch.testing.assert_close(
                p.grad.double(), c * g, rtol=max(1e-6, storage), atol=6e-8 * (dtype == torch.float16)
            )


@needs_kernels
@pytest.mark.parametrize("norm_type", (1.0, 2.0, "inf", 3.0, 0.5))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_beside_torch(norm_type, dtype):
    params = with_grads(SIZES[1:], dtype)  # torch knows no maximum of nothing
    twins = twins_of(params)
    got = regfused.clip_grad_norm_((p for p in params), 1.0, norm_type)
    want = torch.nn.utils.clip_grad_norm_((p for p in twins), 1.0, norm_type)
    torch.testing.assert_close(got, want)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@needs_kernels
def test_every_instruction_set(isa):
    for dtype in DTYPES:
        for norm_type in (1.0, 2.0, math.inf):
            params = with_grads(dtype=dtype)
            want = norm_of(params, norm_type)
            norm = regfused.clip_grad_norm_(params, 1.0, norm_type)
            assert norm.item() == pytest.approx(want, rel=max(4e-7, torch.finfo(dtype).eps))
            after = norm_of(params, norm_type)
            assert after == pytest.approx(1.0, rel=max(1e-5, torch.finfo(dtype).eps))


@BOTH
def test_the_norm_alone_changes_nothing(module):
    params = with_grads()
    before = [None if p.grad is None else (p.grad.clone(), p.grad._version) for p in params]
    assert module.grad_norm(params).item() == pytest.approx(norm_of(params, 2.0), rel=4e-7)
    assert module.grad_norm(params, "inf").item() == pytest.approx(norm_of(params, math.inf), rel=4e-7)
    for p, was in zip(params, before, strict=True):
        assert was is None or (torch.equal(p.grad, was[0]) and p.grad._version == was[1])


@BOTH
def test_a_single_tensor_no_gradients_and_nothing_at_all(module):
    p = torch.ones(4, requires_grad=True)
    for nothing in ([], [p], p, iter([p])):
        norm = module.clip_grad_norm_(nothing, 1.0)
        assert norm.item() == 0 and norm.dtype == torch.float32 and norm.shape == ()
    p.grad = torch.full((4,), 3.0)
    assert module.clip_grad_norm_(p, 1.0).item() == 6.0
    torch.testing.assert_close(p.grad, torch.full((4,), 0.5))
    q = torch.ones(0, requires_grad=True)
    q.grad = torch.ones(0)
    for norm_type in (1.0, 2.0, math.inf):
        assert module.clip_grad_norm_([q], 1.0, norm_type).item() == 0


@BOTH
@pytest.mark.parametrize("name", ("clip_grad_norm_", "grad_norm"))
def test_an_empty_generator_warns_as_torchs(module, name):
    arguments = (1.0,) if name == "clip_grad_norm_" else ()
    with pytest.warns(UserWarning, match="empty generator") as theirs:
        torch.nn.utils.clip_grad_norm_((p for p in ()), 1.0)
    with pytest.warns(UserWarning, match=str(theirs[0].message)) as ours:
        assert getattr(module, name)((p for p in ()), *arguments).item() == 0
    assert len(ours) == 1 and ours[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(module, name)([], *arguments)
        getattr(module, name)((p for p in with_grads((3,))), *arguments)


@BOTH
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("norm_type", (1.0, 2.0, math.inf))
def test_what_is_not_finite_reaches_every_gradient_as_torchs(module, bad, norm_type):
    params = with_grads((5, 40, 20000))
    params[1].grad[17] = bad
    twins = twins_of(params)
    got = module.clip_grad_norm_(params, 1.0, norm_type)
    want = torch.nn.utils.clip_grad_norm_(twins, 1.0, norm_type)
    torch.testing.assert_close(got, want, equal_nan=True)
    for p, q in zip(params, twins, strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, equal_nan=True)
    if math.isnan(bad):
        assert all(p.grad.isnan().all() for p in params if p.grad is not None)


@BOTH
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_error_if_nonfinite_changes_nothing(module, bad):
    params = with_grads((5, 40))
    params[0].grad[3] = bad
    before = twins_of(params)
    with pytest.raises(
        RuntimeError, match=f"error_if_nonfinite=True demands a finite norm of the gradients, but it is {bad}"
    ):
        module.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="grad_norm: error_if_nonfinite"):
        module.grad_norm(params, error_if_nonfinite=True)
    for p, q in zip(params, before, strict=True):
        assert p.grad is None or torch.equal(p.grad.nan_to_num(7), q.grad.nan_to_num(7))
    params[0].grad[3] = 1.0
    assert module.clip_grad_norm_(params, 1.0, error_if_nonfinite=True).item() == pytest.approx(
        module.grad_norm(before[1:]).item(), rel=0.5
    )


@BOTH
@pytest.mark.parametrize("norm_type", (1.0, 2.0, 3.0, "inf"))
def test_what_is_not_finite_has_torchs_words(module, norm_type):
    params = with_grads((5,))
    params[0].grad[3] = math.inf
    with pytest.raises(RuntimeError) as theirs:
        torch.nn.utils.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
    for function, arguments in ((module.clip_grad_norm_, (params, 1.0)), (module.grad_norm, (params,))):
        with pytest.raises(RuntimeError, match=re.escape(str(theirs.value))):
            function(*arguments, norm_type, error_if_nonfinite=True)


@BOTH
def test_large_and_small_gradients(module):
    p = torch.ones(1000, requires_grad=True)
    p.grad = torch.full((1000,), 1e30)  # whose squares are more than float32 holds
    assert module.clip_grad_norm_(p, 1.0).item() == pytest.approx(1e30 * math.sqrt(1000), rel=1e-6)
    torch.testing.assert_close(p.grad, torch.full((1000,), 1 / math.sqrt(1000)))
    h = torch.ones(1000, dtype=torch.float16, requires_grad=True)
    h.grad = torch.full((1000,), 6e4, dtype=torch.float16)  # whose norm is more than float16 holds
    assert math.isinf(module.clip_grad_norm_(h, 1.0).item())
    torch.testing.assert_close(h.grad, torch.full_like(h.grad, 1 / math.sqrt(1000)))


def layouts():
    yield "transposed", lambda: torch.randn(33, 65).t()
    yield "channels_last", lambda: torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last)
    yield "offset", lambda: torch.randn(101)[1:]
    yield "sliced", lambda: torch.randn(40, 66)[3:, ::2]
    yield "0-dim", lambda: torch.randn(())


@BOTH
@pytest.mark.parametrize("make_one", [pytest.param(f, id=name) for name, f in layouts()])
def test_any_layout(module, make_one):
    g = make_one()
    p = torch.zeros(g.shape, requires_grad=True)
    p.grad = g
    old = g.double().clone()
    norm = module.clip_grad_norm_([p], 0.25).item()
    assert norm == pytest.approx(old.norm().item(), rel=1e-6)
    torch.testing.assert_close(p.grad.double(), old * min(1, 0.25 / (norm + 1e-6)), rtol=1e-6, atol=1e-9)


def test_mixed_dtypes_promote_as_torchs():
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float64)):
        params = [p for dtype in dtypes for p in with_grads((9,), dtype)]
        twins = twins_of(params)
        got, want = regfused.clip_grad_norm_(params, 0.5), torch.nn.utils.clip_grad_norm_(twins, 0.5)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-2, atol=0)


def test_what_the_kernels_do_not_take_is_torchs():
    complex_one = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    complex_one.grad = torch.randn(3, dtype=torch.complex64)
    params = [*with_grads((5,)), complex_one]
    twins = twins_of(params)
    got, want = regfused.clip_grad_norm_(params, 0.5), torch.nn.utils.clip_grad_norm_(twins, 0.5)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(params[-1].grad, twins[-1].grad)

    embedding = nn.Embedding(5, 3, sparse=True)
    outcomes = []
    for function in (regfused.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        embedding.zero_grad()
        embedding(torch.tensor([1, 1, 2])).sum().backward()
        try:
            outcomes.append(function(embedding.parameters(), 0.5).item())
        except (RuntimeError, NotImplementedError) as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_a_gradient_that_is_there_twice_is_scaled_twice():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.full((3,), 2.0)
    q = p.detach().clone()
    q.grad = p.grad.clone()
    got, want = regfused.clip_grad_norm_([p, p], 1.0), torch.nn.utils.clip_grad_norm_([q, q], 1.0)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(p.grad, q.grad)


@needs_kernels
def test_foreach_is_torchs(monkeypatch):
    calls = []
    torchs = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: calls.append(args[-1]) or torchs(*args))
    params = with_grads((5,))
    for foreach in (True, False, None):
        regfused.clip_grad_norm_(params, 1.0, foreach=foreach)
    assert calls == [True, False]


@needs_kernels
def test_versions_are_bumped():
    params = with_grads((5, 20))
    versions = [p.grad._version for p in params]
    regfused.clip_grad_norm_(params, 0.1)
    assert [p.grad._version for p in params] == [v + 1 for v in versions]


@needs_kernels
@pytest.mark.cpu
def test_the_same_bits_for_any_number_of_threads(threads, monkeypatch):
    start = with_grads((100_000, 7, 300_001))
    seen = []
    for isa in extension.C.build_info()["isas"]:
        monkeypatch.setenv("REGFUSED_ISA", isa)
        for n in (1, 2, 3, 8):
            threads(n)
            params = twins_of(start)
            norm = regfused.clip_grad_norm_(params, 1.0)
            seen.append([norm, *(p.grad for p in params if p.grad is not None)])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.cpu
def test_while_compiling():
    torch._dynamo.reset()
    params = with_grads((5, 20))
    twins = twins_of(params)
    torch.compile(lambda: regfused.clip_grad_norm_(params, 0.5), backend="eager")()
    torch.nn.utils.clip_grad_norm_(twins, 0.5)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@BOTH
@pytest.mark.parametrize("layout", (torch.strided, torch.jagged), ids=str)
def test_nested_gradients(module, layout):
    start = [torch.randn(2, 3), torch.randn(5, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are a prototype
        param = torch.nested.nested_tensor(start, layout=layout, requires_grad=True)
    sum((i + 1) * part.square().sum() for i, part in enumerate(param.unbind())).backward()
    alone = torch.ones(4, requires_grad=True)
    alone.sum().backward()
    grads = [2 * start[0], 4 * start[1], torch.ones(4)]
    want = torch.cat([grad.flatten() for grad in grads]).double().norm()
    # Terms are squared and added up in float64.
    eps = torch.finfo(torch.float32).eps
    for norm in (module.grad_norm([param, alone]), module.clip_grad_norm_([param, alone], 0.5)):
        torch.testing.assert_close(norm.double(), want, rtol=eps, atol=0)
    # Roundings of the coefficient and of the product.
    for got, grad in zip((*param.grad.unbind(), alone.grad), grads, strict=True):
        torch.testing.assert_close(got.double(), grad.double() * (0.5 / (want + 1e-6)), rtol=2 * eps, atol=0)


@BOTH
@pytest.mark.parametrize("arguments, message", [
    ((-1.0,), "clip_grad_norm_: max_norm must be >= 0, but got -1.0"),
    ((math.nan,), "clip_grad_norm_: max_norm must be >= 0, but got nan"),
    ((None,), "clip_grad_norm_: max_norm must be a number, but got None"),
    ((1.0, "two"), "clip_grad_norm_: norm_type must be a number or 'inf', but got 'two'"),
    ((1.0, math.nan), "clip_grad_norm_: norm_type must be a number or 'inf', but got nan"),
])  # fmt: skip
def test_bad_arguments_change_nothing(module, arguments, message):
    params = with_grads((5,))
    before = params[0].grad.clone()
    with pytest.raises(ValueError, match=message):
        module.clip_grad_norm_(params, *arguments)
    assert torch.equal(params[0].grad, before)


@needs_kernels
def test_something_else_than_tensors():
    with pytest.raises(TypeError, match="parameters must be tensors, but item 1 is a float"):
        regfused.clip_grad_norm_([torch.ones(2), 1.0], 1.0)


# --- Where somebody watches -----------------------------------------------------------------------


def clipped(function):
    """The same as a function of gradients, which returns the norm and what became of them."""

    def of_gradients(*grads):
        params = []
        for grad in grads:
            params.append(torch.zeros(grad.shape, requires_grad=True))
            params[-1].grad = grad.clone()
        return function(params), *(p.grad for p in params)

    return of_gradients


WATCHED = {
    "clips": lambda params: regfused.clip_grad_norm_(params, 0.5),
    "clips, norm inf": lambda params: regfused.clip_grad_norm_(params, 0.5, "inf"),
    "measures": lambda params: regfused.grad_norm(params, 1.0),
}


@pytest.mark.parametrize("function", WATCHED)
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_graph_holds_it(tracer, function):
    of_gradients = clipped(WATCHED[function])
    first, second = ([scale * torch.randn(5), scale * torch.randn(3, 4)] for scale in (1.0, 70.0))
    graph = TRACERS[tracer](of_gradients, *first)
    for grads in (first, second):
        torch.testing.assert_close(graph(*grads), of_gradients(*grads))


@pytest.mark.parametrize("function", WATCHED)
def test_tensors_without_values(function):
    with torch._subclasses.FakeTensorMode() as mode:
        norm, *grads = clipped(WATCHED[function])(torch.ones(5), torch.ones(3, 4))
        assert [type(t) for t in (norm, *grads)] == [torch._subclasses.FakeTensor] * 3
        assert norm.shape == () and norm.fake_mode is mode


@pytest.mark.parametrize("function", WATCHED)
def test_modes_see_it(function):
    grads = [torch.randn(5), torch.randn(3, 4)]
    want = clipped(WATCHED[function])(*grads)
    for mode, seen in ((Dispatched(), "norm"), (Called(), "norm")):
        with mode:
            got = clipped(WATCHED[function])(*grads)
        torch.testing.assert_close(got, want)
        assert any(seen in name for name in mode.seen)
        assert any("mul_" in name for name in mode.seen) == ("clips" in function)


def test_what_is_not_finite_where_somebody_watches():
    params = with_grads((5,))
    params[0].grad[3] = math.nan
    with Dispatched(), pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
        regfused.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)


@needs_kernels
def test_a_default_device_is_no_watcher():
    params = with_grads((5, 20))
    versions = [p.grad._version for p in params]
    with torch.device(params[0].device), torch.profiler.profile() as profile:
        regfused.clip_grad_norm_(params, 0.1)
    assert [p.grad._version for p in params] == [v + 1 for v in versions]
    assert not [event for event in profile.events() if "foreach" in event.name]
